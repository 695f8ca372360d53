"""How many tokens to draft next, and whether drafting pays at all.

schedule    next draft length
constant    always the same
heuristic   +2 when all were accepted, else -1 (transformers' rule)
confidence  drafting ends after a token that the draft itself finds unlikely (that token is still offered); the next
            round drafts one token more than was offered, so that little is drafted in vain
cost        the length of the best expected tokens per second at the row's running acceptance (forecast.best_g)

Every choice follows from what a row has seen of itself, so it is the same whoever shares the batch; lengths may depend
on numbers already drawn, since every round draws fresh ones (rng.py). Only greedily, where no choice of length can
change the output, do the rows pool what they saw: a batch is cheaper when it agrees.

Plain decoding takes over while the expected gain is below 1. It is left by probes: short drafts after 16, 32, 64, ...
plain rounds, doubling while they fail. Evidence, mode and probe interval persist over decode calls.
Shape letters: g draft length, n offered, k accepted; alpha acceptance probability of a position.
"""

import dataclasses
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.forecast import best_g, speedup

SCHEDULES = ("constant", "heuristic", "confidence", "cost")
FALLBACKS = ("auto", "measured", "never")

_PRIOR_ALPHA = 0.6  # before anything was seen
_PRIOR_WEIGHT = 8.0  # positions that the prior counts for: one bad round does not outvote it, two may
_DECAY = 0.9  # of older evidence, per round: about the last ten rounds count
_GRID = 100  # alpha is rounded to 1/100 before it is looked up
_PROBE = 2  # longest draft of a probe
_FIRST_INTERVAL = 16  # plain rounds before the first probe
_LAST_INTERVAL = 512  # a probe costs about half a plain round: 0.1% of this
_SETTLED = 32  # a stretch of drafting this long was worth its probe: the next interval starts small again


@dataclass(frozen=True)
class DraftLengthSettings:
    """How many tokens are drafted per round."""

    draft_length: int = field(default=5, metadata={"help": "tokens per round (g); the start value of other schedules"})
    schedule: str = field(default="constant", metadata={"help": "how g changes", "choices": SCHEDULES})
    max_draft_length: int = field(default=16, metadata={"help": "longest draft of the changing schedules"})
    confidence_threshold: float = field(
        default=0.4, metadata={"help": "schedule confidence: stop after a token that the draft gave less than this"}
    )
    fallback: str = field(
        default="auto",
        metadata={
            "help": "decode plainly while drafting does not pay. auto: judged by the cost curve; without one by the "
            "clock when greedy, and not at all when sampling (the clock would make sampled ids unrepeatable). "
            "measured: always by the clock. never: always draft",
            "choices": FALLBACKS,
        },
    )

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown_choice("schedule", self.schedule, SCHEDULES)
        if self.fallback not in FALLBACKS:
            raise unknown_choice("fallback", self.fallback, FALLBACKS)
        if self.draft_length < 1:
            raise InvalidValue(
                f"draft_length must be at least 1, got {self.draft_length} (decoder 'autoregressive' drafts nothing)"
            )
        if self.max_draft_length < 1:
            raise InvalidValue(f"max_draft_length must be at least 1, got {self.max_draft_length}")
        if not 0.0 <= self.confidence_threshold <= 1.0:
            raise InvalidValue(f"confidence_threshold must be between 0 and 1, got {self.confidence_threshold}")

    @property
    def longest(self) -> int:
        """The longest draft that a round may have."""
        return self.draft_length if self.schedule == "constant" else max(self.draft_length, self.max_draft_length)


class Gain:
    """Expected speed-up over plain decoding by a cost curve, kept on a grid of alpha: a round has no time to scan."""

    def __init__(self, costs: CostCurve, longest: int) -> None:
        self._costs = costs
        self._longest = longest
        self._at: dict[tuple[int, int], float] = {}
        self._best: dict[int, int] = {}

    def at(self, alpha: float, g: int) -> float:
        """The speed-up at draft length g."""
        key = (_on_grid(alpha), g)
        if key not in self._at:
            self._at[key] = speedup(key[0] / _GRID, g, self._costs)
        return self._at[key]

    def best(self, alpha: float) -> int:
        """The draft length of the largest speed-up."""
        key = _on_grid(alpha)
        if key not in self._best:
            self._best[key] = best_g(key / _GRID, self._costs, self._longest)
        return self._best[key]


def _on_grid(alpha: float) -> int:
    return min(_GRID, max(0, round(alpha * _GRID)))


class Clock:
    """Seconds of plain and of speculative rounds as they happen, per batch size; makes a cost curve of them."""

    _KEEP = 5  # newest rounds of a kind; their median counts, so that a slow moment of the machine does not decide
    _CALIBRATE = 3  # plain rounds that are timed before drafting is judged
    _REFRESH = 256  # rounds after which a plain one is timed again (contexts grow)
    _STALE = 8  # rounds for which a cost curve is used before it is made anew

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._seconds: dict[int, dict[int, deque[float]]] = {}  # batch -> g (0: plain) -> newest times
        self._since_plain = 0
        self._gains: dict[int, tuple[int, Gain]] = {}  # batch -> (uses left, gain)

    def add(self, batch: int, g: int, seconds: float) -> None:
        """A round with g drafted tokens (0: a plain one) took so long."""
        table = self._seconds.setdefault(batch, {})
        table.setdefault(g, deque(maxlen=self._KEEP)).append(seconds)
        self._since_plain = 0 if g == 0 else self._since_plain + 1

    def wants_plain(self, batch: int) -> bool:
        """Whether the next round should be plain, for want of a time to compare with."""
        return self._since_plain >= self._REFRESH or self._nearest(batch) is None

    def _nearest(self, batch: int) -> int | None:
        """The batch size with timed plain rounds that stands for this one: a batch shrinks while its rows end."""
        timed = [b for b, table in self._seconds.items() if len(table.get(0, ())) >= self._CALIBRATE]
        close = [b for b in timed if max(b, batch) <= 2 * min(b, batch)]
        return min(close, key=lambda b: abs(b - batch)) if close else None

    def gain(self, batch: int) -> Gain | None:
        """The speed-up by what was timed at this batch size or near it; None before both kinds of round were."""
        nearest = self._nearest(batch)
        if nearest is None:
            return None
        batch = nearest
        uses, gain = self._gains.get(batch, (0, None))
        if gain is None or uses <= 0:
            table = {g: statistics.median(times) for g, times in self._seconds[batch].items()}
            plain = table.pop(0)
            if not table:
                return None
            # least squares through the plain round: seconds(g) = plain + slope * g
            slope = sum(g * (t - plain) for g, t in table.items()) / sum(g * g for g in table)
            gain = Gain(CostCurve(batch=batch, plain=plain, draft_step=max(slope, 0.0)), self._longest)
            uses = self._STALE
        self._gains[batch] = (uses - 1, gain)
        return gain


@dataclass
class Evidence:
    """Running acceptance of a row (greedily: of all rows together), and whether drafting is suspended."""

    alpha_sum: float = _PRIOR_ALPHA * _PRIOR_WEIGHT
    weight: float = _PRIOR_WEIGHT  # positions that alpha_sum is over
    plain: bool = False
    interval: int = _FIRST_INTERVAL // 2  # of the probes; doubled whenever plain decoding is entered or a probe fails
    age: int = 0  # rounds
    stretch: int = 0  # rounds with drafts since drafting was last resumed

    @property
    def alpha(self) -> float:
        return self.alpha_sum / self.weight

    @property
    def resting(self) -> bool:
        """Plain decoding, and no probe is due."""
        return self.plain and self.age % self.interval != 0

    def see(self, seen: Sequence[tuple[float, int]]) -> None:
        """A round with drafts: (beta sum, examined positions) per row."""
        self.alpha_sum = _DECAY * self.alpha_sum + sum(beta for beta, _ in seen)
        self.weight = _DECAY * self.weight + sum(examined for _, examined in seen)
        self.stretch += 1

    def judge(self, gain: float) -> None:
        """Suspend or resume drafting by the speed-up that is expected of it now."""
        if gain < 1.0:
            settled = not self.plain and self.stretch >= _SETTLED
            self.interval = _FIRST_INTERVAL if settled else min(2 * self.interval, _LAST_INTERVAL)
            # little weight is kept, so that one good probe is enough to resume
            self.alpha_sum, self.weight = self.alpha * _PROBE, float(_PROBE)
            self.plain = True
        elif self.plain:
            self.plain, self.stretch = False, 0


class RowLength:
    """Draft length of one row."""

    def __init__(self, settings: DraftLengthSettings, evidence: Evidence) -> None:
        self._settings = settings
        self.evidence = evidence
        self._g = settings.draft_length

    def length(self, gain: Gain | None) -> int:
        """The schedule's draft length, whether drafting is suspended or not."""
        if self._settings.schedule == "cost" and gain is not None:
            return gain.best(self.evidence.alpha)
        return self._g

    def want(self, gain: Gain | None) -> int:
        """Tokens to draft in the next round; 0: decode plainly."""
        if self.evidence.resting:
            return 0
        g = self.length(gain)
        return min(g, _PROBE) if self.evidence.plain else g

    def observe(self, wanted: int, n: int, k: int) -> None:
        """n of the `wanted` tokens were offered (fewer where the draft was not confident) and k accepted."""
        settings = self._settings
        if settings.schedule == "heuristic":
            self._g = min(self._g + 2, settings.longest) if k == n else max(self._g - 1, 1)
        elif settings.schedule == "confidence":
            self._g = min(n + 1, settings.longest) if n < wanted else min(max(self._g, n + 2), settings.longest)


@dataclass(frozen=True)
class Outcome:
    """What a row saw in one round."""

    row: RowLength
    wanted: int
    n: int
    k: int
    beta_sum: float  # over the examined positions


class DraftLengths:
    """Draft lengths of a decoder; outlives its decode calls."""

    def __init__(self, settings: DraftLengthSettings, costs: CostCurve | None, *, greedy: bool) -> None:
        self.settings = settings
        self._pooled = greedy
        by_clock = settings.fallback == "measured" or (settings.fallback == "auto" and costs is None and greedy)
        if settings.schedule == "cost" and costs is None and not by_clock:
            raise InvalidValue(
                "schedule 'cost' needs a cost curve (costs=, as `draftsmith bench` measures it) or fallback 'measured'"
            )
        self.clock = Clock(settings.longest) if by_clock else None
        self._gain = None if by_clock or costs is None else Gain(costs, settings.longest)
        self._state = Evidence()  # what the next call starts from

    def open(self, rows: int) -> list[RowLength]:
        """The draft lengths of a new call's rows."""
        shared = dataclasses.replace(self._state)
        return [
            RowLength(self.settings, shared if self._pooled else dataclasses.replace(self._state)) for _ in range(rows)
        ]

    def gain(self, batch: int) -> Gain | None:
        """How to judge a draft length at this batch size; None while nothing is known about costs."""
        return self._gain if self.clock is None else self.clock.gain(batch)

    def end_round(self, outcomes: Sequence[Outcome], batch: int) -> None:
        """Tell the live rows of a round what became of it."""
        groups: dict[int, list[Outcome]] = {}
        for outcome in outcomes:
            groups.setdefault(id(outcome.row.evidence), []).append(outcome)
        gain = None if self.settings.fallback == "never" else self.gain(batch)
        for group in groups.values():
            evidence = group[0].row.evidence
            evidence.age += 1
            offered = [o for o in group if o.n]
            if not offered:
                continue
            evidence.see([(o.beta_sum, min(o.k + 1, o.n)) for o in offered])
            for o in offered:
                o.row.observe(o.wanted, o.n, o.k)
            if gain is not None:
                evidence.judge(gain.at(evidence.alpha, max(o.row.length(gain) for o in offered)))

    def close(self, rows: Sequence[RowLength]) -> None:
        """A call ended: its rows' mean is what the next one starts from."""
        states = list({id(row.evidence): row.evidence for row in rows}.values())
        if states:
            self._state = Evidence(
                alpha_sum=sum(e.alpha_sum for e in states) / len(states),
                weight=sum(e.weight for e in states) / len(states),
                plain=2 * sum(e.plain for e in states) > len(states),
                interval=max(e.interval for e in states),
                age=max(e.age for e in states),
                stretch=max(e.stretch for e in states),
            )
