"""Text with marked holes: `[[MASK:12]]` is a hole of 12 tokens, `[[MASK:4-12]]` one of 4 to 12.

A canvas has a fixed length, so a range stands for one canvas per length (per combination, with several ranges). All of
them are filled and scored by the model's own joint log p of the holes. Lengths are compared by its mean per token
("mean"), since the sum falls with every token and would always choose the shortest ("sum" is offered for those who want
exactly that: the likeliest completion under a law that has every length alike).
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.inference.any_subset_score import Score, score
from draftsmith.inference.canvas import CanvasDecoder, CanvasRequest
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.nets.any_subset_lm import AnySubsetLM
from draftsmith.inference.requests import DecodeResult

COMPARE = ("mean", "sum")
MOST_CANVASES = 256  # combinations of lengths, times samples
_ANCHORS = (".", "a", "0")
_MARK = re.compile(r"\[\[MASK:([^\]]*)\]\]")
_LENGTHS = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Template:
    """A text cut at its holes."""

    pieces: tuple[str, ...]  # one more than holes
    lengths: tuple[tuple[int, int], ...]  # least and most tokens of each hole


@dataclass(frozen=True)
class Infilling:
    """One way to fill the holes."""

    text: str
    fills: tuple[str, ...]  # the text of each hole
    lengths: tuple[int, ...]  # tokens of each hole
    tokens: tuple[int, ...]  # of all holes
    score: Score
    calls: int  # network calls of its row


def parse(text: str) -> Template:
    """Raises InvalidValue for a text without holes and for a mark that is none."""
    pieces, lengths, end = [], [], 0
    for mark in _MARK.finditer(text):
        found = _LENGTHS.fullmatch(mark.group(1))
        least = int(found.group(1)) if found else 0
        most = int(found.group(2) or least) if found else 0
        if not 1 <= least <= most:
            raise InvalidValue(
                f"{mark.group(0)} is no hole: write [[MASK:12]] for 12 tokens, [[MASK:4-12]] for 4 to 12"
            )
        pieces.append(text[end : mark.start()])
        lengths.append((least, most))
        end = mark.end()
    if not lengths:
        raise InvalidValue("the text has no hole: mark one as [[MASK:12]] (tokens) or [[MASK:4-12]] (a range)")
    return Template((*pieces, text[end:]), tuple(lengths))


def canvases(template: Template, tokenizer: Any, net: AnySubsetLM, samples: int = 1) -> list[CanvasRequest]:
    """One canvas per combination of lengths and sample; the tag holds the lengths ("4,12").

    The pieces are tokenised apart, without special tokens; a text that is all holes gets the tokenizer's BOS where the
    network has no sink. Raises InvalidValue for too many of them.
    """
    count = math.prod(most - least + 1 for least, most in template.lengths) * samples
    if count > MOST_CANVASES:
        raise InvalidValue(f"{count} canvases (lengths times samples), at most {MOST_CANVASES}: narrow the ranges")
    ids = [_ids(tokenizer, piece, inside=i > 0) for i, piece in enumerate(template.pieces)]
    if not any(ids) and not net.config.sink and getattr(tokenizer, "bos_token_id", None) is not None:
        ids[0] = [tokenizer.bos_token_id]
    made: list[CanvasRequest] = []
    for lengths in itertools.product(*(range(least, most + 1) for least, most in template.lengths)):
        tokens = list(ids[0])
        for length, piece in zip(lengths, ids[1:], strict=True):
            tokens += [net.config.mask_id] * length + piece
        for _ in range(samples):
            tag = ",".join(map(str, lengths))
            made.append(CanvasRequest.from_mask(tokens, net.config.mask_id, row_id=len(made), tag=tag))
    return made


def _ids(tokenizer: Any, piece: str, inside: bool) -> list[int]:
    """Ids of a piece; `inside` a text, where tokenizers that put a space before their input must not."""
    if inside and piece:
        for anchor in _ANCHORS:  # one that stays a token of its own before this piece
            before = list(tokenizer.encode(anchor, add_special_tokens=False))
            ids = list(tokenizer.encode(anchor + piece, add_special_tokens=False))
            if ids[: len(before)] == before:
                return ids[len(before) :]
    return list(tokenizer.encode(piece, add_special_tokens=False))


def infill(
    decoder: CanvasDecoder,
    net: AnySubsetLM,
    tokenizer: Any,
    text: str,
    *,
    samples: int = 1,
    compare: str = "mean",
    batch: int = 16,
) -> tuple[list[Infilling], list[DecodeResult]]:
    """Fill the marked holes of `text`: all candidates, the best by `compare` first, and what decoding them took.

    Args: samples: candidates per combination of lengths. batch: canvases decoded together.
    Raises InvalidValue for bad marks, and for what the decoder refuses.
    """
    if compare not in COMPARE:
        raise unknown_choice("compare", compare, COMPARE)
    for name, value in (("samples", samples), ("batch", batch)):
        if value < 1:
            raise InvalidValue(f"{name} must be at least 1, got {value}")
    requests = canvases(parse(text), tokenizer, net, samples)
    results = [decoder.decode(requests[first : first + batch]) for first in range(0, len(requests), batch)]
    outputs = [output for result in results for output in result.output]
    calls = [n for result in results for n in result.notes["nfe_per_row"]]
    scores = score(net, requests, outputs)
    made = [
        _infilling(tokenizer, request, output, found, n)
        for request, output, found, n in zip(requests, outputs, scores, calls, strict=True)
    ]
    return sorted(made, key=lambda one: -(one.score.mean if compare == "mean" else one.score.total)), results


def _infilling(tokenizer: Any, request: CanvasRequest, output: Sequence[int], found: Score, calls: int) -> Infilling:
    lengths = tuple(int(length) for length in request.tag.split(","))
    ends = list(itertools.accumulate(lengths))
    parts = [output[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return Infilling(
        _text(tokenizer, request.filled(output)),
        tuple(_text(tokenizer, part) for part in parts),
        lengths,
        tuple(output),
        found,
        calls,
    )


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
