"""Near-duplicate documents: MinHash to find candidates, the exact Jaccard index to decide.

Source: Broder, "On the resemblance and containment of documents", 1997 (shingles, min-wise hashing); banding as in
Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3. Candidates are checked exactly, so nothing is
dropped by chance; a pair of similarity s escapes with probability (1 - s^4)^32, that is 5e-8 at 0.8 and 0.13 at 0.5.
Limits: resemblance of whole documents; a short passage inside two long documents is not found.
Memory: the signatures (1 KiB a document) and the band tables; texts are shingled again when a pair is compared.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from draftsmith.inference.errors import InvalidValue

SHINGLE = 5  # words in a shingle
BANDS, ROWS = 32, 4  # of the signature: 128 hash functions
_CHUNK = 1 << 15  # shingles hashed at once: 32 MiB of scratch
_WORD = re.compile(r"\w+|[^\w\s]")
_WORD_HASHES: dict[str, int] = {}
_MEMO = 256  # shingled documents kept for the next comparison

Hashes = NDArray[np.uint64]


def shingles(text: str) -> Hashes:
    """Sorted distinct 64-bit hashes of all runs of SHINGLE words (a shorter text is one run; an empty one has none)."""
    words = _WORD.findall(text)
    if not words:
        return np.empty(0, np.uint64)
    if len(_WORD_HASHES) > 1 << 20:
        _WORD_HASHES.clear()
    codes = np.empty(len(words), np.uint64)
    for i, word in enumerate(words):
        code = _WORD_HASHES.get(word)
        if code is None:  # crc32 and not hash(): the same numbers in every process
            code = _WORD_HASHES[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        codes[i] = code
    width = min(SHINGLE, len(words))
    rolled = np.zeros(len(words) - width + 1, np.uint64)
    for j in range(width):
        rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + codes[j : j + len(rolled)]
    rolled ^= rolled >> np.uint64(29)
    rolled *= np.uint64(0xBF58476D1CE4E5B9)
    return np.unique(rolled ^ (rolled >> np.uint64(32)))


def jaccard(a: Hashes, b: Hashes) -> float:
    """|a and b| / |a or b| of two sorted sets of hashes, in 0..1; two empty sets are alike (1)."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - common
    return common / union if union else 1.0


def _signature(hashes: Hashes, multipliers: Hashes, offsets: Hashes) -> NDArray[np.uint64]:
    lowest = np.full(len(multipliers), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(hashes), _CHUNK):
        part = hashes[start : start + _CHUNK, None] * multipliers + offsets
        np.minimum(lowest, part.min(0), out=lowest)
    return lowest


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int]:
    """For each text the index of the earlier KEPT text it repeats, or -1 where it is kept itself.

    Args: threshold: Jaccard index in (0, 1] from which a later text counts as a repetition.
    The first of a family is kept, so the kept texts are pairwise below the threshold. Deterministic.
    """
    if not 0 < threshold <= 1:
        raise InvalidValue(f"dedup threshold must lie in (0, 1], got {threshold}: use null to keep near-duplicates")
    draw = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, (2, BANDS * ROWS), dtype=np.uint64)
    multipliers, offsets = draw[0] | np.uint64(1), draw[1]
    tables: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    memo: dict[int, Hashes] = {}
    verdict: list[int] = []
    for index, text in enumerate(texts):
        hashes = shingles(text)
        bands = _signature(hashes, multipliers, offsets).reshape(BANDS, ROWS)
        keys = [band.tobytes() for band in bands]
        candidates = {kept for table, key in zip(tables, keys, strict=True) for kept in table.get(key, ())}
        twin = -1
        for kept in sorted(candidates):
            if kept not in memo:
                if len(memo) >= _MEMO:
                    memo.pop(next(iter(memo)))
                memo[kept] = shingles(texts[kept])
            if jaccard(hashes, memo[kept]) >= threshold:
                twin = kept
                break
        verdict.append(twin)
        if twin < 0:
            for table, key in zip(tables, keys, strict=True):
                table.setdefault(key, []).append(index)
    return verdict
