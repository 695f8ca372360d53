"""Names and words of ParallelBench's tasks: made here, so that nothing is downloaded.

A name is two syllables, so no name is part of another and none is a common word. The six fields of words_to_sentence
hold nouns, verbs (past tense, with an object) and adjectives; no word stands twice, in a field or in two.
"""

from dataclasses import dataclass

_ONSETS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T")
_ENDINGS = ("bor", "dan", "gel", "kim", "len", "mur", "nis", "pok", "ril", "sum", "tav", "zen")
_VOWELS = ("a", "e", "i", "o", "u")

# 144 names; the vowel turns with both parts, so that neighbours in the list do not look alike
NAMES: tuple[str, ...] = tuple(
    onset + _VOWELS[(i + 2 * j) % len(_VOWELS)] + ending
    for j, ending in enumerate(_ENDINGS)
    for i, onset in enumerate(_ONSETS)
)
SYMBOLS: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")  # of latin squares


@dataclass(frozen=True)
class Field:
    """Words of one subject."""

    name: str
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]


def _field(name: str, nouns: str, verbs: str, adjectives: str) -> Field:
    return Field(name, tuple(nouns.split()), tuple(verbs.split()), tuple(adjectives.split()))


FIELDS: tuple[Field, ...] = (
    _field("farm", "farmer horse barn goat tractor fence", "fed herded milked", "muddy woolly rural"),
    _field("sea", "sailor ship whale harbour anchor gull", "sighted towed hauled", "salty stormy tidal"),
    _field("kitchen", "cook kettle oven spoon recipe pan", "stirred baked tasted", "spicy greasy boiling"),
    _field("school", "teacher pupil pencil book lesson desk", "taught copied graded", "curious patient clever"),
    _field("forest", "hunter wolf oak deer trail owl", "tracked chased startled", "mossy shady wild"),
    _field("city", "driver tram tower baker bridge mayor", "passed painted guarded", "busy noisy crowded"),
)
PLACES: tuple[str, ...] = ("near", "behind", "beside")
LIGHT_VERBS: tuple[str, ...] = ("saw", "found", "followed", "ignored")
