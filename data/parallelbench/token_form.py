"""Token form: every item is one token, the answer is n tokens and nothing else, so theory.py holds literally.

A prompt is [task] items ... [word] [place or count] [sep]; the canvas behind it has as many holes as the answer tokens.
Ids: 0 pad, 1 end, 2 sep, the tasks, the numbers #0 .. #24, then all tasks' tokens in order; the mask is the last one,
above the tokenizer's own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from draftsmith.data.parallelbench.registry import TASKS, with_names
from draftsmith.data.parallelbench.tasks import Answer, Sample, Task
from draftsmith.data.parallelbench.words import NAMES
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.errors import InvalidValue

PAD, END, SEP = 0, 1, 2
_NUMBERS = 25


class TokenForm:
    """The vocabulary of some tasks; `mask_id` = `vocab_size` - 1."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Raises InvalidValue for no task, or one twice."""
        names = [task.name for task in tasks]
        if not tasks or len(set(names)) != len(names):
            raise InvalidValue(f"a token form has one task at least and none twice, got {names}")
        self.tasks = {task.name: task for task in tasks}
        items = dict.fromkeys(token for task in tasks for token in task.alphabet())
        self.vocabulary: tuple[str, ...] = (
            *("<pad>", "<end>", "<sep>"),
            *(f"<{name}>" for name in names),
            *(f"#{i}" for i in range(_NUMBERS)),
            *items,
        )
        self._ids = {token: i for i, token in enumerate(self.vocabulary)}
        self.mask_id = len(self.vocabulary)
        self.vocab_size = len(self.vocabulary) + 1

    @classmethod
    def of(cls, vocabulary: Mapping[str, int]) -> "TokenForm | None":
        """The form whose vocabulary this is (token -> id); None when it is that of something else."""
        names = [token[1:-1] for token in sorted(vocabulary, key=vocabulary.__getitem__) if token[1:-1] in TASKS]
        words = sum(name in vocabulary for name in NAMES)
        if not names:
            return None
        made = cls(with_names(names, words or len(NAMES)))
        return made if made._ids == dict(vocabulary) else None

    def prompt(self, sample: Sample) -> list[int]:
        """Ids of a sample's question."""
        tokens = [f"<{sample.task}>", *sample.items]
        if sample.word is not None:
            tokens.append(sample.word)
        if sample.index is not None:
            tokens.append(f"#{sample.index}")
        return [*self.ids(tokens), SEP]

    def ids(self, tokens: Sequence[str]) -> list[int]:
        """Raises InvalidValue for a token that none of the tasks has."""
        strange = [token for token in tokens if token not in self._ids]
        if strange:
            raise InvalidValue(f"the token form of {', '.join(self.tasks)} has no token {strange[0]!r}")
        return [self._ids[token] for token in tokens]

    def tokens(self, ids: Sequence[int]) -> Answer:
        """Answers read back; the mask id has no token and reads as the empty string, which is never right."""
        return tuple(self.vocabulary[i] if 0 <= i < self.mask_id else "" for i in ids)

    def request(self, sample: Sample, row_id: int) -> CanvasRequest:
        """The canvas of a sample, its answer masked."""
        prompt, n = self.prompt(sample), len(sample.reference)
        holes = range(len(prompt), len(prompt) + n)
        return CanvasRequest([*prompt, *[self.mask_id] * n], holes, row_id=row_id, tag=sample.task)

    def save_tokenizer(self, directory: Path) -> None:
        """A word-level tokenizer of this vocabulary, blanks between the words, as an export takes it along."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        made = Tokenizer(models.WordLevel(self._ids, unk_token="<pad>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
        wrapped.save_pretrained(str(directory))
