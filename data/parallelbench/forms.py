"""Text of a sample: the prompt with its one-shot example, the answer, and the infilling form.

Lists are written ["A", "B"] with double quotes and ", " between; latin squares as four lines "A, B, C, D"; sudoku as
four lines of digits; a sentence with a capital and a full stop.
"""

from collections.abc import Sequence

from draftsmith.data.parallelbench.puzzles import LatinSquare, Sudoku
from draftsmith.data.parallelbench.sentences import WordsToSentence
from draftsmith.data.parallelbench.tasks import Sample, Task, example
from draftsmith.inference.errors import InvalidValue


def list_text(items: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{item}"' for item in items) + "]"


def is_list(task: Task) -> bool:
    """Whether the answer is written as a list."""
    return task.kind == "list" or task.name in ("domino", "cumulative_sum")


def question(task: Task, sample: Sample) -> str:
    """What the sample shows, without the instruction."""
    if isinstance(task, Sudoku):
        return "\n".join("".join(sample.items[4 * r : 4 * r + 4]) for r in range(4))
    if isinstance(task, LatinSquare | WordsToSentence):
        return ", ".join(sample.items)
    if task.name == "arithmetic":
        return "".join(sample.items)
    return list_text(sample.items)


def instruction(task: Task, sample: Sample) -> str:
    """The instruction with the sample's word, place (counted from 1), count and length."""
    place = None if sample.index is None else sample.index + 1
    length = len(sample.items) if isinstance(task, LatinSquare) else len(sample.reference)
    return task.instruction.format(word=sample.word, index=place, count=sample.index, length=length)


def answer_text(task: Task, sample: Sample, answer: Sequence[str]) -> str:
    """The answer as the strict parser wants it."""
    if isinstance(task, LatinSquare):
        n = len(sample.items)
        return "\n".join(", ".join(answer[r * n : r * n + n]) for r in range(n))
    if isinstance(task, Sudoku):
        return "\n".join("".join(answer[4 * r : 4 * r + 4]) for r in range(4))
    if isinstance(task, WordsToSentence):
        return " ".join(answer).capitalize() + "."
    return list_text(answer) if is_list(task) else "".join(answer)


def prompt_text(task: Task, sample: Sample, *, one_shot: bool | None = None) -> str:
    """The whole prompt. one_shot None: an example for lists, numbers and puzzles, none for text."""
    shown = task.kind != "text" if one_shot is None else one_shot
    lines = []
    if shown:
        n = len(sample.reference) if task.name == "domino" else len(sample.items)
        size = {"puzzle": 4, "text": 4}.get(task.kind, n)
        size = len(sample.reference) if task.name == "arithmetic" else size
        given = example(task, size)
        lines += ["Example:", instruction(task, given), question(task, given)]
        lines += ["Answer:", answer_text(task, given, given.reference), ""]
    lines += [instruction(task, sample), question(task, sample), "Answer:", ""]
    return "\n".join(lines)


def infill_text(task: Task, sample: Sample, mask: str = "[MASK]") -> str:
    """The output's frame with `mask` where an item stands, so that items alone are generated.

    Raises InvalidValue for a task without such a frame.
    """
    if not task.skeleton:
        raise InvalidValue(
            f"{task.name} has no infilling form: copy, reverse, shuffle, replace_* and insert_* have one; "
            "use the text or the token form"
        )
    return list_text([mask] * len(sample.reference))
