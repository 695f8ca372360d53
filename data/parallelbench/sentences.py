"""words_to_sentence: a sentence of a template grammar that holds four given words, harder from level to level.

The reference's sets of words were written by a language model; here a level says how many semantic fields the words
come from and how much of the sentence is left free. Every content word of a sentence is one of the four given ones, so
the right answers can be listed: 2 (easy), 18 (medium), 864 (hard).
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from draftsmith.data.parallelbench.tasks import Answer, Sample, Task
from draftsmith.data.parallelbench.words import FIELDS, LIGHT_VERBS, PLACES

NOUNS = tuple(word for field in FIELDS for word in field.nouns)
VERBS = tuple(word for field in FIELDS for word in field.verbs)
ADJECTIVES = tuple(word for field in FIELDS for word in field.adjectives)
CLASSES: dict[str, Answer] = {
    "N": NOUNS,
    "V": VERBS,
    "A": ADJECTIVES,
    "P": PLACES,
    "L": LIGHT_VERBS,
    "the": ("the",),
}
LEVELS: dict[str, tuple[str, ...]] = {
    "easy": ("the A N V the N",),
    "medium": ("the N V the N P the N",),
    "hard": ("the N P the N L the N P the N",),
}


@dataclass(frozen=True)
class WordsToSentence(Task):
    """easy: noun, verb, adjective, noun of one field; medium: verb and three nouns of two; hard: nouns of four."""

    level: str = "easy"
    kind = "text"
    instruction = "Write one sentence that holds all of these words."
    lengths = (4,)
    smallest = 4

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"words_to_sentence_{self.level}"

    def draw(self, rng: random.Random, n: int) -> Sample:
        fields = rng.sample(FIELDS, 4)
        if self.level == "easy":
            one = fields[0]
            words = [*rng.sample(one.nouns, 2), rng.choice(one.verbs), rng.choice(one.adjectives)]
        elif self.level == "medium":
            words = [*rng.sample(fields[0].nouns, 2), rng.choice(fields[1].nouns), rng.choice(fields[1].verbs)]
        else:
            words = [rng.choice(field.nouns) for field in fields]
        rng.shuffle(words)
        blank = Sample(self.name, tuple(words), ())
        return Sample(self.name, tuple(words), rng.choice(list(self.outcomes(blank))))

    def num_outcomes(self, sample: Sample) -> int:
        return {"easy": 2, "medium": 18, "hard": 864}[self.level]

    def outcomes(self, sample: Sample) -> Iterator[Answer]:
        given = {kind: [w for w in sample.items if w in CLASSES[kind]] for kind in ("N", "V", "A")}
        for template in LEVELS[self.level]:
            slots = template.split()
            free = [CLASSES[slot] for slot in slots if slot in ("P", "L")]
            for nouns, verbs, adjectives in product(*(permutations(given[kind]) for kind in ("N", "V", "A"))):
                for rest in product(*free):
                    take = {"N": iter(nouns), "V": iter(verbs), "A": iter(adjectives)}
                    others = iter(rest)
                    yield tuple(
                        next(take[slot]) if slot in take else next(others) if slot in ("P", "L") else slot
                        for slot in slots
                    )

    def alphabet(self) -> Answer:
        return tuple(word for words in CLASSES.values() for word in words)


def grammatical(tokens: Sequence[str]) -> bool:
    """Whether some template of any level makes these tokens (lower case, no full stop)."""
    templates = (template.split() for level in LEVELS.values() for template in level)
    return any(
        len(slots) == len(tokens) and all(token in CLASSES[slot] for slot, token in zip(slots, tokens, strict=True))
        for slots in templates
    )


def sentence_tokens(text: str) -> Answer:
    """Words in lower case, without punctuation."""
    return tuple(re.findall(r"[a-z0-9']+", text.lower()))
