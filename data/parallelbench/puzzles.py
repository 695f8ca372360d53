"""Puzzles: latin squares (every square is right) and sudoku (one solution). Answers are read row by row."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

from draftsmith.data.parallelbench.tasks import Answer, Sample, Task, UniqueTask
from draftsmith.data.parallelbench.words import SYMBOLS
from draftsmith.inference.errors import InvalidValue

BLANK = "_"


@lru_cache(maxsize=8)
def latin_squares(n: int) -> tuple[tuple[int, ...], ...]:
    """All n x n latin squares on 0..n-1, row by row: 1, 2, 12, 576 for n = 1..4. Raises InvalidValue for n > 4."""
    if n > 4:
        raise InvalidValue(f"latin squares are listed up to n = 4 (of n = 5 there are 161280), got {n}")
    rows = list(permutations(range(n)))
    found: list[tuple[tuple[int, ...], ...]] = [()]
    for _ in range(n):
        found = [
            (*square, row)
            for square in found
            for row in rows
            if all(old[j] != row[j] for old in square for j in range(n))
        ]
    return tuple(tuple(cell for row in square for cell in row) for square in found)


@lru_cache(maxsize=1)
def sudoku_grids() -> tuple[tuple[int, ...], ...]:
    """The 288 grids of 4 x 4 sudoku: latin squares whose 2 x 2 boxes hold four different digits too."""
    boxes = [[8 * r + 2 * c + d for d in (0, 1, 4, 5)] for r in range(2) for c in range(2)]
    return tuple(grid for grid in latin_squares(4) if all(len({grid[i] for i in box}) == 4 for box in boxes))


@dataclass(frozen=True)
class LatinSquare(Task):
    """Rows and columns are permutations of the symbols; n is the side, 4 in the standard set."""

    symbols: tuple[str, ...] = SYMBOLS
    name = "latin_square_n4"
    kind = "puzzle"
    instruction = "Make a latin square of size {length} with these symbols: no symbol twice in a row or column."
    lengths = (4,)
    smallest = 2

    def draw(self, rng: random.Random, n: int) -> Sample:
        symbols = tuple(rng.sample(self.symbols, n))
        square = rng.choice(latin_squares(n))
        return Sample(self.name, symbols, tuple(symbols[cell] for cell in square))

    def num_outcomes(self, sample: Sample) -> int:
        return len(latin_squares(len(sample.items)))

    def outcomes(self, sample: Sample) -> Iterator[Answer]:
        for square in latin_squares(len(sample.items)):
            yield tuple(sample.items[cell] for cell in square)

    def valid(self, sample: Sample, answer: Sequence[str]) -> bool:
        n, symbols = len(sample.items), set(sample.items)
        lines = [answer[i * n : (i + 1) * n] for i in range(n)] + [answer[i::n] for i in range(n)]
        return len(answer) == n * n and all(set(line) == symbols for line in lines)

    def alphabet(self) -> Answer:
        return self.symbols


@dataclass(frozen=True)
class Sudoku(UniqueTask):
    """4 x 4 sudoku with `holes` blank cells and exactly one solution; the answer is the whole grid."""

    holes: int = 12
    name = "sudoku_n4_12"
    kind = "puzzle"
    instruction = "Fill the sudoku: every row, column and box of 2 x 2 holds the digits 1 to 4 once."
    lengths = (4,)

    def __post_init__(self) -> None:
        if not 1 <= self.holes <= 12:  # no puzzle of three clues has one solution
            raise InvalidValue(f"a 4 x 4 sudoku of one solution has 1 to 12 blank cells, got {self.holes}")

    def draw(self, rng: random.Random, n: int) -> Sample:
        if n != 4:
            raise InvalidValue(f"{self.name} has n = 4 alone, got {n}")
        while True:
            grid = rng.choice(sudoku_grids())
            clues = _clues(rng, grid, self.holes)
            if clues is not None:
                shown = tuple(str(grid[i] + 1) if i in clues else BLANK for i in range(16))
                return Sample(self.name, shown, tuple(str(cell + 1) for cell in grid))

    def alphabet(self) -> Answer:
        return ("1", "2", "3", "4", BLANK)


@lru_cache(maxsize=1)
def _grids_with() -> dict[tuple[int, int], int]:
    """(cell, digit) -> the grids that have it, as the bits of one number."""
    table: dict[tuple[int, int], int] = {}
    for number, grid in enumerate(sudoku_grids()):
        for cell, digit in enumerate(grid):
            table[cell, digit] = table.get((cell, digit), 0) | 1 << number
    return table


def _clues(rng: random.Random, grid: tuple[int, ...], holes: int) -> set[int] | None:
    """Cells that stay when cells are blanked in random order while one solution is left; None when too many stay."""
    table, clues = _grids_with(), set(range(16))
    for cell in rng.sample(range(16), 16):
        fitting = -1
        for i in clues - {cell}:
            fitting &= table[i, grid[i]]
        if fitting.bit_count() == 1:
            clues.remove(cell)
        if len(clues) == 16 - holes:
            return clues
    return None
