"""ParallelBench's tasks by name, in the order of the paper's table; the repository's extra generators come last."""

from collections.abc import Sequence
from dataclasses import replace

from draftsmith.data.parallelbench.lists import (
    Copy,
    InsertIndex,
    InsertRandom,
    ListTask,
    RemoveIndex,
    RemoveRandom,
    Repeat,
    ReplaceIndex,
    ReplaceRandom,
    Reverse,
    Shuffle,
    Sort,
)
from draftsmith.data.parallelbench.numbers import Arithmetic, CumulativeSum, Domino
from draftsmith.data.parallelbench.puzzles import LatinSquare, Sudoku
from draftsmith.data.parallelbench.sentences import LEVELS, WordsToSentence
from draftsmith.data.parallelbench.tasks import Task
from draftsmith.data.parallelbench.words import NAMES
from draftsmith.inference.errors import UnknownKey

_TASKS: tuple[Task, ...] = (
    Copy(),
    Sort(),
    Reverse(),
    Shuffle(),
    ReplaceIndex(),
    ReplaceRandom(),
    InsertIndex(),
    InsertRandom(),
    RemoveIndex(),
    RemoveRandom(),
    LatinSquare(),
    Sudoku(),
    *(WordsToSentence(level) for level in LEVELS),
    Repeat(each=True),
    Repeat(each=False),
    Domino(),
    Arithmetic(),
    CumulativeSum(),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
LIST_TASKS = tuple(name for name, task in TASKS.items() if task.kind == "list")


def get(name: str) -> Task:
    """The task of a name. Raises UnknownKey (a KeyError) that lists the names."""
    if name not in TASKS:
        raise UnknownKey(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def with_names(names: Sequence[str], words: int = len(NAMES)) -> tuple[Task, ...]:
    """The tasks of these names, the list tasks over the first `words` names alone (small vocabularies learn faster).

    Raises UnknownKey for an unknown task.
    """
    found = [get(name) for name in names]
    return tuple(replace(task, words=NAMES[:words]) if isinstance(task, ListTask) else task for task in found)
