"""torchmetrics wrappers: the same numbers as the functions they wrap, over batches and over ranks."""

import math

import pytest
import torch
from torch import Tensor

from draftsmith.inference import metrics
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import RoundStats
from draftsmith.modules.losses.chunked_head import HeadStats
from draftsmith.modules.metrics import Acceptance, LawMeans, by_request


def rounds(seed: int, requests: int = 6, num: int = 40) -> RoundStats:
    """Random but possible rounds."""
    g = torch.Generator().manual_seed(seed)
    stats = RoundStats()
    for _ in range(num):
        n = int(torch.randint(0, 6, (1,), generator=g))
        k = int(torch.randint(0, n + 1, (1,), generator=g))
        looked = min(k + 1, n)
        beta = float(torch.rand(1, generator=g)) * looked
        stats.append(int(torch.randint(requests, (1,), generator=g)), n, k, k + 1, beta, 0.1)
    return stats


def test_by_hand() -> None:
    stats = RoundStats()
    stats.append(row=0, drafted=3, accepted=1, committed=2, beta_sum=1.0, seconds=0.0)  # examined 2
    stats.append(row=1, drafted=3, accepted=3, committed=4, beta_sum=2.0, seconds=0.0)  # examined 3
    stats.append(row=1, drafted=0, accepted=0, committed=1, beta_sum=0.0, seconds=0.0)
    metric = Acceptance()
    metric.update(stats)
    values = {name: float(x) for name, x in metric.compute().items()}
    assert values["alpha"] == pytest.approx(3 / 5)
    assert values["accepted_rate"] == pytest.approx(4 / 5)
    assert values["tau"] == pytest.approx(7 / 3)
    assert values["tau_per_request"] == pytest.approx((2 + 2.5) / 2)
    assert metric.histogram() == {3: [0, 1, 0, 1]}


def test_batches_add_up_to_the_whole() -> None:
    parts = [rounds(s) for s in range(3)]
    whole = RoundStats()
    for i, part in enumerate(parts):
        whole.extend(part, row_offset=10 * i)
    metric = Acceptance()
    for part in parts:
        metric.update(part)
    expected = metrics.summarize(whole)
    values = metric.compute()
    assert metric.total() == expected.counts
    assert metric.histogram() == expected.histogram
    assert expected.alpha is not None and expected.tau_per_request is not None
    for name, value in (
        ("alpha", expected.alpha.value),
        ("alpha_low", expected.alpha.low),
        ("alpha_high", expected.alpha.high),
        ("tau_per_request", expected.tau_per_request.value),
    ):
        assert float(values[name]) == pytest.approx(value, abs=1e-12)


def gathered(metric: Acceptance | LawMeans, others: list[Acceptance | LawMeans]) -> dict[str, Tensor]:
    """`compute` as after torchmetrics' own synchronisation of these ranks."""
    ranks = [metric, *others]
    names = list(metric._reductions)
    queues = {name: [_state(rank, name) for rank in ranks] for name in names}

    def gather(x: Tensor, group: object = None) -> list[Tensor]:
        name = next(n for n in names if _state(metric, n).shape == x.shape and torch.equal(_state(metric, n), x))
        return queues[name]

    metric.dist_sync_fn = gather
    metric.distributed_available_fn = lambda: True
    metric._to_sync = True
    return metric.compute()


def _state(metric: Acceptance | LawMeans, name: str) -> Tensor:
    value = getattr(metric, name)
    return torch.cat(value) if isinstance(value, list) else value


def test_ranks_reduce_to_the_pooled_statistics() -> None:
    parts = [rounds(s, requests=3 + s, num=20 + 10 * s) for s in range(2)]  # unequal shares
    ranks, alone = [Acceptance(), Acceptance()], Acceptance()
    for rank, part in zip(ranks, parts, strict=True):
        rank.update(part)
        alone.update(part)
    expected = alone.compute()
    values = gathered(ranks[0], [ranks[1]])
    assert all(float(values[k]) == pytest.approx(float(expected[k]), abs=1e-12) for k in expected)
    naive = sum(float(rank.total().alpha or 0) for rank in ranks) / 2
    assert abs(naive - float(expected["alpha"])) > 1e-4  # a mean of the ranks' means would be another number


def test_nothing_examined_is_nan_and_reset_forgets() -> None:
    metric = Acceptance()
    metric.update(RoundStats())
    assert math.isnan(float(metric.compute()["alpha"]))
    metric.update(rounds(0))
    metric.reset()
    metric.update(RoundStats())
    assert math.isnan(float(metric.compute()["tau"])) and metric.histogram() == {}


def test_impossible_or_too_long_rounds_are_refused() -> None:
    stats = RoundStats()
    stats.append(row=0, drafted=2, accepted=3, committed=4, beta_sum=1.0, seconds=0.0)
    with pytest.raises(InvalidValue, match="impossible"):
        Acceptance().update(stats)
    with pytest.raises(InvalidValue, match="drafted 5"):
        Acceptance(max_draft=4).update(rounds(0))


def test_law_means_weigh_positions_not_batches() -> None:
    def stats(n: int, seed: int) -> HeadStats:
        g = torch.Generator().manual_seed(seed)
        x = torch.rand(3, n, generator=g)
        return HeadStats(torch.arange(n), x[0], x[1] > 0.5, x[1], x[2])

    a, b = stats(3, 0), stats(9, 1)
    metric = LawMeans()
    metric.update(stats(0, 0))
    assert float(metric.compute()["alpha"]) == 0.0
    metric.update(a)
    metric.update(b)
    values = metric.compute()
    assert float(values["alpha"]) == pytest.approx(float(torch.cat([a.alpha, b.alpha]).mean()))
    assert float(values["loss"]) == pytest.approx(float(torch.cat([a.loss, b.loss]).mean()))
    assert float(values["agree"]) == pytest.approx(float(torch.cat([a.agree, b.agree]).float().mean()))


def test_rounds_of_each_request() -> None:
    stats = rounds(4)
    parts = by_request(stats)
    assert sum(map(len, parts)) == len(stats)
    assert all(len(set(part.row)) == 1 for part in parts)
    assert [part.row[0] for part in parts] == sorted(set(stats.row))
