"""What a call costs on this machine: read by the forecast, the cost-optimal draft length and the fall-back.

Every operation is timed on the engines themselves at a stated batch and context length, interleaved (one of each per
repetition, in a rotated order, so that a slow moment of the machine hits all alike) and reduced by the median.
Shape letters: B batch, n tokens of one call, g draft length.
"""

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from draftsmith.inference.drafters.base import Drafter, DraftTask
from draftsmith.inference.engine import Engine
from draftsmith.inference.environment import machine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import RoundStats
from draftsmith.inference.sampling import SamplingParams

VERIFY_TOKENS = (1, 2, 3, 4, 6, 9, 13, 17, 25)  # of one target call; t_verify is interpolated between them
DRAFT_TOKENS = (1, 9)  # two draft lengths tell the step and what a round of drafting costs anyway


@dataclass(frozen=True)
class CostCurve:
    """Seconds of each kind of call at one batch size. All of them are medians; lower is better.

    A speculative round of g drafted tokens should take g * draft_step + draft_fixed + t_verify(g + 1) + overhead,
    a plain round plain + plain_overhead.
    """

    batch: int
    plain: float  # a 1-token target call, head included
    draft_step: float  # one more drafted token
    verify: Mapping[int, float] = field(default_factory=dict)  # n tokens of one target call -> seconds
    overhead: float = 0.0  # a speculative round outside the network calls (acceptance, bookkeeping, Python)
    plain_overhead: float = 0.0  # a plain round outside its network call
    draft_fixed: float = 0.0  # per round of drafting, however many tokens (the catch-up of committed ones)
    context: int = 0  # tokens in the cache when it was measured
    repetitions: int = 0
    machine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.verify:
            object.__setattr__(self, "verify", {1: self.plain})
        bad = {n: t for n, t in self.verify.items() if n < 1 or not t > 0}
        if bad or not self.plain > 0 or min(self.draft_step, self.overhead, self.plain_overhead, self.draft_fixed) < 0:
            raise InvalidValue(
                f"a cost curve holds seconds above 0 for n >= 1 tokens; got plain {self.plain}, "
                f"verify {dict(self.verify)}"
            )

    @staticmethod
    def textbook(c: float, batch: int = 1) -> "CostCurve":
        """Unit costs of the i.i.d. formula: a target call takes 1 whatever it verifies, a draft step takes c."""
        return CostCurve(batch=batch, plain=1.0, draft_step=c)

    @property
    def c(self) -> float:
        """Draft step over plain target step."""
        return self.draft_step / self.plain

    @property
    def plain_round(self) -> float:
        """Seconds of one plain decoding round."""
        return self.plain + self.plain_overhead

    def t_verify(self, n: int) -> float:
        """Seconds of a target call on n tokens: linear between measured points, the last slope (>= 0) behind them."""
        if n < 1:
            raise InvalidValue(f"a target call has at least one token, got {n}")
        points = sorted(self.verify.items())
        if n <= points[0][0] or len(points) == 1:
            return points[0][1]
        for (n0, t0), (n1, t1) in itertools.pairwise(points):
            if n <= n1:
                return t0 + (t1 - t0) * (n - n0) / (n1 - n0)
        (n0, t0), (n1, t1) = points[-2:]
        return t1 + max(t1 - t0, 0.0) * (n - n1) / (n1 - n0)

    def round_seconds(self, g: int) -> float:
        """Expected seconds of one speculative round with g drafted tokens; a plain round for g = 0."""
        if g == 0:
            return self.plain_round
        return g * self.draft_step + self.draft_fixed + self.t_verify(g + 1) + self.overhead

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `from_json` reads it back."""
        verify = {str(n): t for n, t in sorted(self.verify.items())}
        return {**vars(self), "verify": verify, "machine": dict(self.machine)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "CostCurve":
        """Inverse of `to_json`. Raises InvalidValue for missing or unknown fields."""
        try:
            return CostCurve(**{**data, "verify": {int(n): float(t) for n, t in data["verify"].items()}})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InvalidValue(f"not a cost curve (measure it anew with `draftsmith bench`): {error}") from None

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> "CostCurve":
        """Read what `save` wrote. Raises InvalidValue for anything else."""
        try:
            data = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise InvalidValue(f"cannot read the cost curve {path}: {error}") from None
        return CostCurve.from_json(data)


def measure(
    target: Engine,
    drafter: Drafter | None,
    *,
    batch: int = 1,
    context: int = 64,
    sampling: SamplingParams | None = None,
    verify_tokens: Sequence[int] = VERIFY_TOKENS,
    repetitions: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> CostCurve:
    """Time a decoder's calls at `batch` rows with `context` committed tokens each.

    Any tokens do: costs do not depend on them. The context is shortened where the target's positions end earlier.
    Without a drafter the draft step is 0. clock: seconds, for tests.
    Raises InvalidValue for a batch or context below 1, or a network whose positions end before a draft fits.
    """
    if batch < 1 or context < 1 or repetitions < 1:
        raise InvalidValue(f"batch, context and repetitions start at 1, got {batch}, {context} and {repetitions}")
    sampling = sampling or SamplingParams()
    context = min(context, target.spec.max_length - max(verify_tokens))
    if context < 1:
        raise InvalidValue(
            f"the target's {target.spec.max_length} positions do not hold {max(verify_tokens)} more tokens"
        )
    ids = torch.arange(context + max(verify_tokens)).remainder(target.spec.vocab_size).expand(batch, -1)
    jobs: dict[tuple[str, int], Callable[[], None]] = {}
    with torch.inference_mode():
        cache = target.new_cache(batch, ids.shape[1])
        on_device = ids.to(target.device)
        target.forward(on_device[:, :context], cache=cache)

        def verify(n: int) -> None:
            hidden, _ = target.forward(on_device[:, context : context + n], cache=cache)
            target.head(hidden)
            cache.truncate([context] * batch)

        for n in sorted({1, *verify_tokens}):
            jobs["verify", n] = functools.partial(verify, n)
        if drafter is not None:
            jobs |= _draft_jobs(drafter, target, ids[:, :context], sampling)
        times: dict[tuple[str, int], list[float]] = {name: [] for name in jobs}
        order = list(jobs)
        for job in order:  # warm-up: first calls allocate
            jobs[job]()
        for r in range(repetitions):
            turn = r % len(order)
            for name in (*order[turn:], *order[:turn]):
                _wait(target)
                start = clock()
                jobs[name]()
                _wait(target)
                times[name].append(clock() - start)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    step, fixed = 0.0, 0.0
    if drafter is not None:
        short, long = DRAFT_TOKENS
        step = max(median["draft", long] - median["draft", short], 0.0) / (long - short)
        fixed = max(median["draft", short] - short * step, 0.0)
    return CostCurve(
        batch=batch,
        plain=median["verify", 1],
        draft_step=step,
        verify={n: t for (kind, n), t in median.items() if kind == "verify"},
        draft_fixed=fixed,
        context=context,
        repetitions=repetitions,
        machine={**machine(), "threads": torch.get_num_threads()},
    )


def calibrate(curve: CostCurve, rounds: Mapping[int, RoundStats]) -> CostCurve:
    """Add what a decoder's whole rounds take beyond the calls. rounds: g -> rounds of that constant length, 0 -> plain.

    Each row's first round is left out (it contains the prefill). With two draft lengths the part that grows with g goes
    to the draft step (drawing and keeping a token), the rest to the overhead.
    """
    beyond: dict[int, float] = {}
    for g, stats in rounds.items():
        seen: set[int] = set()
        seconds = []
        for row, drafted, spent in zip(stats.row, stats.drafted, stats.seconds, strict=True):
            if row in seen and drafted == g:
                seconds.append(spent)
            seen.add(row)
        if seconds:
            bare = replace(curve, overhead=0.0, plain_overhead=0.0)
            beyond[g] = statistics.median(seconds) - bare.round_seconds(g)
    plain = max(beyond.pop(0, 0.0), 0.0)
    slope = 0.0
    if len(beyond) > 1:
        (g0, b0), (g1, b1) = min(beyond.items()), max(beyond.items())
        slope = (b1 - b0) / (g1 - g0)
    step = max(curve.draft_step + slope, 0.0)
    rest = [b - g * (step - curve.draft_step) for g, b in beyond.items()]
    return replace(
        curve, draft_step=step, overhead=max(statistics.mean(rest), 0.0) if rest else 0.0, plain_overhead=plain
    )


def _draft_jobs(
    drafter: Drafter, target: Engine, ids: torch.Tensor, sampling: SamplingParams
) -> dict[tuple[str, int], Callable[[], None]]:
    batch, context = ids.shape
    longest = max(DRAFT_TOKENS)
    vocab = min(target.spec.vocab_size, drafter.vocab_size or target.spec.vocab_size)
    task = DraftTask(
        rows=batch,
        capacity=context + longest,
        longest=longest,
        vocab_size=vocab,
        sampling=sampling,
        device=target.device,
        want_law=False,
        confidence=None,
    )
    session = drafter.start(task)
    tokens = ids.remainder(vocab).tolist()
    if session.room(context) < longest:
        raise InvalidValue(f"the draft's positions do not hold {longest} tokens behind a context of {context}")
    u = None if sampling.greedy else torch.full((batch, longest), 0.5, dtype=torch.float64, device=target.device)

    def draft(g: int) -> None:
        session.propose(tokens, [g] * batch, None if u is None else u[:, :g], None)
        session.commit([context] * batch)

    return {("draft", g): functools.partial(draft, g) for g in DRAFT_TOKENS}


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
