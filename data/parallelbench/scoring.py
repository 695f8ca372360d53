"""Parsers of answers and their scores, lenient and strict, and what is needed beside for free text.

Lenient takes what stands between the last "[" and the next "]" and forgives quotes and blanks; strict demands the
written form. A text without an answer of the right form scores 0 and is counted as unparsed.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from draftsmith.data.parallelbench.forms import answer_text, is_list
from draftsmith.data.parallelbench.puzzles import LatinSquare, Sudoku
from draftsmith.data.parallelbench.sentences import WordsToSentence, grammatical, sentence_tokens
from draftsmith.data.parallelbench.tasks import Answer, Sample, Task
from draftsmith.inference.errors import InvalidValue, MissingExtra, UnknownKey

Grammar = Callable[[str], bool]
_ITEM = re.compile(r'"([^"]*)"')


def parse_list(text: str | None, strict: bool = False) -> Answer | None:
    """The items of the last list in `text`; None where there is none (strict: where it is not written as asked)."""
    if text is None or "[" not in text:
        return None
    inside, closed, _ = text.rsplit("[", 1)[1].partition("]")
    if strict:
        if not closed:
            return None
        items = inside.split(", ") if inside else []
        found = [_ITEM.fullmatch(item) for item in items]
        return None if None in found else tuple(match[1] for match in found if match)
    return tuple(item.strip().strip("\"'").strip() for item in inside.split(",") if item.strip())


def parse(task: Task, sample: Sample, text: str | None, strict: bool = False) -> Answer | None:
    """The tokens of an answer in text form; None where the text holds no answer of this task's form."""
    if text is None:
        return None
    if isinstance(task, LatinSquare):
        return _latin(sample, text, strict)
    if isinstance(task, Sudoku):
        if strict:
            lines = text.strip().split("\n")
            whole = len(lines) == 4 and all(re.fullmatch("[1-4]{4}", line) for line in lines)
            return tuple("".join(lines)) if whole else None
        digits = re.findall(r"\d", text)
        return tuple(digits) if len(digits) == 16 else None
    if isinstance(task, WordsToSentence):
        if strict and not re.fullmatch(r"[A-Z][^.]*\.", text.strip()):
            return None
        return sentence_tokens(text) or None
    if task.name == "domino" and not strict:
        return tuple(re.findall(r"\d+", text)) or None
    if is_list(task):
        return parse_list(text, strict)
    if strict:
        return tuple(text.strip()) if re.fullmatch(r"\d+", text.strip()) else None
    numbers = re.findall(r"\d+", text.replace(",", ""))
    return tuple(numbers[-1]) if numbers else None


def _latin(sample: Sample, text: str, strict: bool) -> Answer | None:
    n, symbols = len(sample.items), set(sample.items)
    if strict:
        rows = [tuple(line.split(", ")) for line in text.strip().split("\n")]
        return tuple(cell for row in rows for cell in row) if len(rows) == n else None
    cells = [[cell.strip() for cell in line.split(",")] for line in text.split("\n")]
    kept = [row for row in cells if len(row) == n and set(row) == symbols]
    return tuple(cell for row in kept[:n] for cell in row) if len(kept) >= n else None


@dataclass(frozen=True)
class Score:
    """Of one prediction."""

    lenient: bool
    strict: bool
    unparsed: bool


def score(task: Task, sample: Sample, text: str | None, grammar: Grammar | None = None) -> Score:
    """Both scores of a prediction in text form; None is an answer that never came.

    grammar: for words_to_sentence, judges the sentence in place of the template grammar (`grammar_backend`).
    """

    def right(answer: Answer | None) -> bool:
        if answer is None:
            return False
        if isinstance(task, WordsToSentence):  # whole words: "art" does not count inside "start"
            good = grammar(text or "") if grammar is not None else grammatical(answer)
            return good and set(sample.items) <= set(answer)
        return task.valid(sample, answer)

    lenient = parse(task, sample, text)
    return Score(right(lenient), right(parse(task, sample, text, strict=True)), lenient is None)


def score_tokens(task: Task, sample: Sample, answer: Sequence[str] | None) -> Score:
    """Of an answer in token form: lenient and strict are one."""
    if answer is None:
        return Score(False, False, True)
    right = task.valid(sample, answer)
    return Score(right, right, False)


@dataclass(frozen=True)
class SetScore:
    """Of a set of predictions."""

    trials: int
    lenient: int
    strict: int
    unparsed: int


def score_set(
    tasks: Sequence[Task], samples: Sequence[Sample], predictions: Sequence[str | None], grammar: Grammar | None = None
) -> SetScore:
    """Counts over a set. Raises InvalidValue when there is not one prediction for each sample."""
    if len(predictions) != len(samples) or len(tasks) != len(samples):
        raise InvalidValue(
            f"{len(predictions)} predictions for {len(samples)} samples of {len(tasks)} tasks: give one for each"
        )
    found = [score(t, s, text, grammar) for t, s, text in zip(tasks, samples, predictions, strict=True)]
    return SetScore(
        len(found), sum(f.lenient for f in found), sum(f.strict for f in found), sum(f.unparsed for f in found)
    )


def reference_text(task: Task, sample: Sample) -> str:
    """The sample's own answer as text."""
    return answer_text(task, sample, sample.reference)


GRAMMARS = ("template", "languagetool")


def grammar_backend(name: str) -> Grammar | None:
    """Who judges the grammar of free sentences: None (the templates) or a function text -> bool.

    "languagetool" needs the package language-tool-python and Java. Raises UnknownKey for another name and MissingExtra
    where the package is not installed.
    """
    if name not in GRAMMARS:
        raise UnknownKey(f"unknown metric of grammar {name!r}: choose one of {', '.join(GRAMMARS)}")
    if name == "template":
        return None
    try:
        library = importlib.import_module("language_tool_python")
    except ModuleNotFoundError:
        raise MissingExtra(
            "grammar by languagetool needs Java and one package: pip install language-tool-python; "
            "or take --grammar template"
        ) from None
    checker = library.LanguageTool("en-US")
    return lambda text: not checker.check(text)
