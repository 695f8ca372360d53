"""Commit filters: features by hand, equivariance, cut blocks, bad input."""

import pytest
import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.commit_filter import (
    FEATURES,
    CommitFilter,
    FilterConfig,
    Signals,
    check_confidence,
    features,
    law_signals,
)
from draftsmith.inference.portable import PortableNet


def signals(width: int = 6, rows: int = 4, seed: int = 0) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand(rows, width, generator=generator) for _ in range(4)]
    return Signals(draw[0], draw[1] < 0.6, (draw[2] * 4).long(), draw[3], draw[0] * draw[3])


def column(signals: Signals, name: str, row: int = 0) -> Tensor:
    return features(FilterConfig(4, features=(name,)), signals)[row, :, 0]


def by_hand() -> Signals:
    now = torch.tensor([[0.5, 0.9, 0.2, 0.7]])
    masked = torch.tensor([[True, False, True, True]])
    before = Signals(
        torch.tensor([[0.25, 0.8, 0.2, 0.9]]), torch.tensor([[True, True, True, True]]), torch.tensor([[3, 3, 4, 6]])
    )
    return Signals(now, masked, torch.tensor([[3, 3, 5, 5]]), now / 2, now / 4, before)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("confidence", [0.5, 1.0, 0.2, 0.7]),  # committed positions read 1
        ("masked", [1, 0, 1, 1]),
        ("rank", [1 / 4, 0, 2 / 4, 0]),
        ("share_masked", [0.75] * 4),
        ("mean_confidence", [1.4 / 3] * 4),
        ("risk", [0.3 + 0.5, 0, 0.3 + 0.5 + 0.8, 0.3]),
        ("position", [0, 0.25, 0.5, 0.75]),
        ("left", [1.0, 0.5, 1.0, 0.2]),
        ("right", [1.0, 0.2, 0.7, 1.0]),
        ("same_left", [0, 1, 0, 1]),
        ("same_right", [1, 0, 1, 0]),
        ("agreement", [1, 1, 0, 0]),
        ("gain", [0.25, 0.2, 0.0, -0.2]),
        ("first", [0] * 4),
        ("entropy", [0.25, 0, 0.1, 0.35]),
        ("margin", [0.125, 1.0, 0.05, 0.175]),
    ],
)
def test_features_by_hand(name: str, wanted: list[float]) -> None:
    assert column(by_hand(), name).tolist() == pytest.approx(wanted, abs=1e-6)


def test_every_feature_is_tested_by_hand() -> None:
    mark = next(m for m in test_features_by_hand.pytestmark if m.name == "parametrize")
    assert {case[0] for case in mark.args[1]} == set(FEATURES)


def test_rows_whose_block_has_just_begun() -> None:
    two = by_hand()
    both = Signals(two.confidence, two.masked, two.predicted, previous=two.previous, has_previous=torch.tensor([False]))
    assert column(both, "first").tolist() == [1] * 4
    assert column(both, "agreement").tolist() == column(both, "gain").tolist() == [0] * 4


def test_the_reference_net_is_the_papers() -> None:
    net = CommitFilter(FilterConfig(32, "reference"))
    assert sum(p.numel() for p in net.parameters()) == 2112  # 2 (32^2 + 32)
    raw = FilterConfig(6, "reference", feature="raw")
    seen = signals()
    assert torch.equal(features(raw, seen), seen.confidence)
    one = features(FilterConfig(6, "reference"), seen)
    assert torch.equal(one[~seen.masked], torch.ones_like(one[~seen.masked]))


def test_what_stands_at_committed_positions_changes_nothing() -> None:
    seen = signals()
    other = Signals(
        torch.where(seen.masked, seen.confidence, 0.123), seen.masked, seen.predicted, seen.entropy, seen.margin
    )
    for net in ("reference", "equivariant"):
        made = CommitFilter(FilterConfig(6, net))
        assert torch.equal(made.score(seen), made.score(other)), net


def test_a_cut_block_reads_as_committed_behind_its_end() -> None:
    torch.manual_seed(0)
    seen = signals(6)
    short = Signals(*(x[:, :4] for x in (seen.confidence, seen.masked, seen.predicted)))
    filled = Signals(seen.confidence, seen.masked & (torch.arange(6) < 4), seen.predicted)
    net = CommitFilter(FilterConfig(6, "reference"))
    assert torch.equal(net.score(short), net.score(filled)[:, :4])


def test_the_equivariant_net_takes_any_length_and_moves_with_its_input() -> None:
    torch.manual_seed(0)
    config = FilterConfig(6, features=("confidence", "masked", "rank"), window=1)
    net = CommitFilter(config)
    assert net.score(signals(6)).shape == (4, 6) and net.score(signals(10)).shape == (4, 10)
    given = torch.rand(1, 12, 3)
    assert torch.allclose(net(given.roll(1, 1))[:, 4:9], net(given)[:, 3:8], atol=1e-6)


def test_laws() -> None:
    logits = torch.tensor([[0.0, 0.0, float("-inf")], [3.0, 1.0, 0.0]])
    entropy, margin = law_signals(logits)
    p = logits[1].softmax(-1)
    assert float(entropy[0]) == pytest.approx(0.6309, abs=1e-4)  # ln 2 / ln 3
    assert margin.tolist() == pytest.approx([0.0, float(p[0] - p[1])], abs=1e-6)


def test_filters_are_portable_and_their_word_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    for net in ("reference", "equivariant"):
        made = CommitFilter(FilterConfig(8, net))
        assert isinstance(made, PortableNet)
        given = made.seal_inputs()
        with torch.no_grad():
            assert torch.allclose(made.seal_reference(given), made.seal_replay(given), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"net": "deep"}, "filter net"),
        ({"feature": "two"}, "filter feature"),
        ({"features": ("colour",)}, "filter features"),
        ({"features": ()}, "must be different ones"),
        ({"hidden": 0}, "hidden of at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        FilterConfig(8, **settings)  # type: ignore[arg-type]  # fields by name


def test_bad_input() -> None:
    with pytest.raises(InvalidValue, match="blocks of 4, these have 6: set block_length to 4"):
        features(FilterConfig(4, "reference"), signals(6))
    seen = signals(6)
    with pytest.raises(InvalidValue, match="'entropy' needs the logits"):
        features(FilterConfig(6), Signals(seen.confidence, seen.masked, seen.predicted))
    for bad in (-0.5, float("nan"), 1.5):  # an entropy fed as a confidence is negative
        with pytest.raises(InvalidValue, match=r"confidences must lie in \[0, 1\]"):
            check_confidence(torch.tensor([[0.5, bad]]))
    check_confidence(torch.tensor([[0.0, 1.0]]))
