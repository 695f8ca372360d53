"""What a call costs on this machine: read by the forecast, the cost-optimal draft length and the fall-back.

Every operation is timed on the engines themselves at a stated batch and context length, interleaved (one of each per
repetition, in a rotated order, so that a slow moment of the machine hits all alike) and reduced by the median.
Shape letters: B batch, n tokens of one call, g draft length.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidValue


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
