"""Plain decoding: one target call per token. The baseline of every speed-up and the law that lossless decoders keep."""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.decoders.session import Session, check_vocab_size, drain, empty_result
from draftsmith.inference.engine import Engine
from draftsmith.inference.requests import Commit, DecodeResult, Recorder, TokenRequest
from draftsmith.inference.sampling import SamplingParams


class AutoregressiveDecoder:
    """Samples every token from the target."""

    def __init__(
        self,
        target: Engine,
        *,
        sampling: SamplingParams | None = None,
        seed: int = 0,
        tokenizer: Any | None = None,
        recorder: Recorder | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """vocab_size: decode over the first ids only (heads are often padded above the tokenizer's size)."""
        self._target = target
        self._sampling = sampling or SamplingParams()
        self._seed = seed
        self._tokenizer = tokenizer
        self._recorder = recorder
        self._vocab_size = check_vocab_size(vocab_size, target.spec.vocab_size)

    def decode(self, requests: Sequence[TokenRequest]) -> DecodeResult:
        """Decode all requests as one batch."""
        return drain(self.stream(requests))

    def stream(self, requests: Sequence[TokenRequest]) -> Generator[Commit, None, DecodeResult]:
        """Yields every row's token as it is drawn; the generator's return value is the DecodeResult."""
        if not requests:
            return empty_result("target")
        session = Session(
            requests,
            target=self._target,
            vocab_size=self._vocab_size,
            sampling=self._sampling,
            seed=self._seed,
            tokenizer=self._tokenizer,
            recorder=self._recorder,
            headroom=0,
        )
        while session.running:
            with torch.inference_mode():  # closed before each yield: the caller's code is not to run in it
                commits, _ = session.plain_round(time.perf_counter())
                session.shrink()
            yield from commits
        return session.result()


@dataclass(frozen=True)
class AutoregressiveSettings:
    """Plain decoding has none of its own; temperature and filters are SamplingParams."""


def build(
    parts: Mapping[str, Any],
    *,
    sampling: SamplingParams | None,
    settings: AutoregressiveSettings,
    seed: int,
    tokenizer: Any | None,
    recorder: Recorder | None,
    costs: CostCurve | None,
    vocab_size: int | None,
) -> AutoregressiveDecoder:
    """For the registry; `settings` and `costs` change nothing here."""
    return AutoregressiveDecoder(
        parts["target"],
        sampling=sampling,
        seed=seed,
        tokenizer=tokenizer,
        recorder=recorder,
        vocab_size=vocab_size,
    )
