"""torchmetrics over the statistics of `inference/metrics.py`: the same definitions, summed over batches and ranks.

Shape letters: G longest draft length, R requests.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from draftsmith.inference import metrics
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import RoundStats
from draftsmith.modules.losses.chunked_head import HeadStats

_COUNTS = tuple(metrics.Counts.__dataclass_fields__)
_NAN = float("nan")


class Acceptance(Metric):
    """Acceptance of decode calls: alpha, accepted/examined, tau, tau per request, and the accepted-length histogram.

    `compute` gives float64 scalars, NaN where nothing was examined; intervals are bootstraps over requests. Of several
    ranks each must `update` at least once before (an empty RoundStats will do), else torchmetrics waits forever.
    """

    counts: Tensor  # float64 [6], in the order of metrics.Counts
    table: Tensor  # int64 [G+1, G+1]: rounds by (drafted, accepted)
    requests: list[Tensor]  # float64 [R, 4] each: beta_sum, examined, committed, rounds

    def __init__(self, max_draft: int = 64) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(len(_COUNTS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("table", torch.zeros(max_draft + 1, max_draft + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("requests", [], dist_reduce_fx="cat")

    def update(self, rounds: RoundStats) -> None:
        """Add the rounds of one decode call (its rows are requests of their own).

        Raises InvalidValue for impossible rounds and for drafts longer than `max_draft`.
        """
        longest = max(rounds.drafted, default=0)
        if longest >= len(self.table):
            raise InvalidValue(f"a round drafted {longest} tokens, the histogram ends at {len(self.table) - 1}")
        total = metrics.count(rounds)
        self.counts += torch.tensor([getattr(total, name) for name in _COUNTS], dtype=torch.float64).to(self.counts)
        for n, row in metrics.histogram(rounds).items():
            self.table[n, : n + 1] += torch.tensor(row).to(self.table)
        own = [metrics.count(part) for part in by_request(rounds)]
        columns = torch.tensor([[x.beta_sum, x.examined, x.committed, x.rounds] for x in own], dtype=torch.float64)
        self.requests.append(columns.view(-1, 4).to(self.counts.device))

    def total(self) -> metrics.Counts:
        """The sums so far."""
        values = dict(zip(_COUNTS, self.counts.tolist(), strict=True))
        return metrics.Counts(**{name: value if name == "beta_sum" else round(value) for name, value in values.items()})

    def histogram(self) -> dict[int, list[int]]:
        """As `metrics.histogram`: for each draft length that occurred, the rounds that accepted 0, 1, ... of it."""
        rows = self.table.tolist()
        return {n: row[: n + 1] for n, row in enumerate(rows) if n and sum(row)}

    def compute(self) -> dict[str, Tensor]:
        total = self.total()
        # a list of batches, or, after a synchronisation, one tensor
        per_request = dim_zero_cat(self.requests).cpu() if len(self.requests) else torch.zeros(0, 4).double()
        beta, examined, committed, rounds = per_request.unbind(1)
        speaks = examined > 0
        alpha = metrics.ratio_estimate(beta[speaks], examined[speaks])
        tau = metrics.ratio_estimate(committed / rounds, torch.ones_like(rounds))
        values: dict[str, float | None] = {
            "alpha": total.alpha,
            "alpha_low": alpha.low if alpha else None,
            "alpha_high": alpha.high if alpha else None,
            "accepted_rate": total.accepted_rate,
            "tau": total.tau,
            "tau_per_request": tau.value if tau else None,
        }
        return {
            name: torch.tensor(_NAN if value is None else value, dtype=torch.float64, device=self.counts.device)
            for name, value in values.items()
        }


class LawMeans(Metric):
    """Mean loss, alpha = sum min(p, q), agreement and teacher's entropy per position, over batches and ranks.

    `compute` gives float64 scalars, 0 when there was no position.
    """

    sums: Tensor  # float64 [4]
    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("positions", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, stats: HeadStats) -> None:
        columns = (stats.loss, stats.alpha, stats.agree, stats.entropy)
        self.sums += torch.stack([column.double().sum() for column in columns]).to(self.sums)
        self.positions += len(stats.rows)

    def compute(self) -> dict[str, Tensor]:
        means = self.sums / self.positions.clamp_min(1)
        return dict(zip(("loss", "alpha", "agree", "entropy"), means, strict=True))


def by_request(rounds: RoundStats) -> list[RoundStats]:
    """The rounds of each request apart, in ascending order of the row."""
    parts: dict[int, RoundStats] = {}
    for entry in zip(*vars(rounds).values(), strict=True):
        parts.setdefault(entry[0], RoundStats()).append(*entry)
    return [parts[row] for row in sorted(parts)]
