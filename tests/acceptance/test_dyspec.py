"""Acceptance of DySpec: its Small-scale items A (losslessness), B (usefulness) and C (optimality), with figures.

Laws are random tables keyed by the path (tests/path_tables.py), V=6. About two minutes on one core.
"""

import math
import time

import pytest
import torch

from draftsmith.inference.tree_calibration import Calibration, Calibrator
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_policies.dyspec import DySpecPolicy, DySpecThresholdPolicy
from draftsmith.inference.tree_policies.eagle2 import Eagle2Policy
from draftsmith.inference.tree_policies.fixed_widths import FixedWidthsPolicy
from draftsmith.inference.tree_policies.sequoia import SequoiaPolicy
from tests.fakes import ChiSquare, chi_square
from tests.figures import DECODING, record
from tests.inference.test_tree_policies import Spy, best_sum, grow
from tests.inference.test_tree_verification import pruned
from tests.path_tables import PathTables, Round, first_pairs, pair_law, play

SLUG = "dyspec"
FILES = (*DECODING, "inference/tree*.py", "inference/tree_policies/*.py")
ROUNDS = 20_000
SEEDS = (0, 1, 2)

pytestmark = pytest.mark.acceptance


def law_tests(tables: PathTables, played: Round, seed: int) -> tuple[ChiSquare, ChiSquare]:
    """Of the first token and of the first pair."""
    pairs, want = first_pairs(tables, played, seed), pair_law(tables)
    one = chi_square(pairs[:, 0].bincount(minlength=6), want.sum(1))
    return one, chi_square((pairs[:, 0] * 6 + pairs[:, 1]).bincount(minlength=36), want.flatten())


@pytest.mark.parametrize("name", ["greedy", "threshold"])
def test_losslessness(name: str) -> None:
    """A: m = 8, 20 000 rounds, p > 1e-4; the pruned tree of the negative control: p < 1e-6."""
    begin = time.perf_counter()
    figures: dict[str, object] = {}
    for seed in SEEDS:
        tables = PathTables(noise=1.0, seed=seed)
        policy = DySpecPolicy(8, 8) if name == "greedy" else DySpecThresholdPolicy(8, 8)
        played = play(tables, policy, ROUNDS, depth=8, apart=False, seed=seed)
        one, two = law_tests(tables, played, seed)
        assert min(one.p_value, two.p_value) > 1e-4 and two.detectable_tv < 0.03, f"{one}; {two}"
        figures[f"{name}_p_first_token_seed{seed}"] = {"value": one.p_value, "need": "> 1e-4"}
        figures[f"{name}_p_first_pair_seed{seed}"] = {"value": two.p_value, "need": "> 1e-4"}
        figures[f"{name}_detectable_tv_seed{seed}"] = two.detectable_tv
    tables = PathTables(noise=1.0, seed=1)
    control = play(tables, DySpecPolicy(8, 8), 6000, depth=8, apart=False, seed=1, change=[pruned])
    _, broken = law_tests(tables, control, 1)
    assert broken.p_value < 1e-6, str(broken)
    seconds = time.perf_counter() - begin
    figures |= {
        f"{name}_rounds": ROUNDS,
        f"{name}_pruned_p": {"value": broken.p_value, "need": "< 1e-6"},
        f"{name}_pruned_chi2": broken.statistic,
        f"{name}_law_seconds": {"value": seconds, "unit": "s"},
    }
    record(SLUG, figures, SEEDS, FILES)


def calibration(tables: PathTables) -> Calibration:
    """From about 4000 to 6000 verified draws of other contexts."""
    calibrator = Calibrator()
    for policy, rows, seed in ((FixedWidthsPolicy([4, 2, 2]), 800, 5), (ChainPolicy(16), 400, 6)):
        played = play(tables, policy, rows, depth=16, seed=100 + seed)
        calibrator(played.tree, played.verdict, range(rows))
    return calibrator.result({})


@pytest.mark.parametrize("sd, noise", [(1.5, 1.0), (4.0, 1.0), (1.5, 0.3)])
def test_usefulness(sd: float, noise: float) -> None:
    """B: m = 16, 2500 rounds; calibrated DySpec against the chain, fixed widths and raw DySpec."""
    tables = PathTables(sd=sd, noise=noise, seed=1)
    found = calibration(tables)
    policies = {
        "chain": ChainPolicy(16),
        "fixed_4_2_1": FixedWidthsPolicy([4, 2, 1]),
        "fixed_2_2_2_1": FixedWidthsPolicy([2, 2, 2, 1]),
        "raw": DySpecPolicy(16, 16),
        "calibrated": DySpecPolicy(16, 16, table=found.table),
        "threshold_calibrated": DySpecThresholdPolicy(16, 16, table=found.table),
        "sequoia": SequoiaPolicy(16, 16, p=found.sequoia),
        "eagle2": Eagle2Policy(16, 8, beam=4),
    }
    emitted, calls = {}, {}
    for name, policy in policies.items():
        played = play(tables, policy, 2500, depth=16, seed=9)
        emitted[name], calls[name] = played.emitted, played.calls
    best = max(emitted[name] for name in ("chain", "fixed_4_2_1", "fixed_2_2_2_1", "raw"))
    ratio, over_raw = emitted["calibrated"] / best, emitted["calibrated"] / emitted["raw"]
    key = f"sd{sd}_noise{noise}"
    figures: dict[str, object] = {f"{key}_emitted_{name}": value for name, value in emitted.items()}
    figures |= {f"{key}_draft_calls_{name}": calls[name] for name in ("calibrated", "threshold_calibrated", "chain")}
    figures[f"{key}_calibrated_over_best"] = {"value": ratio, "need": ">= 0.95"}
    figures[f"{key}_calibrated_over_raw"] = {"value": over_raw} | ({"need": ">= 1.9"} if noise < 1 else {})
    figures[f"{key}_calibration_draws"] = found.tests
    record(SLUG, figures, [1, 5, 6, 9], FILES)
    assert ratio >= 0.95, emitted
    assert noise >= 1 or over_raw >= 1.9, emitted


def test_optimality() -> None:
    """C: sum of values of the greedy tree = the largest over all subtrees, to 1e-12, in under 5 s."""
    begin = time.perf_counter()
    worst, cases = 0.0, 0
    for vocab, depth, nodes in ((2, 3, 6), (3, 3, 5), (4, 2, 6), (4, 3, 4)):
        tables, policy = PathTables(vocab=vocab, seed=vocab + depth), Spy(nodes, depth)
        grow(policy, tables, 3, nodes=nodes, depth=depth, greedy=True)
        for b, row in enumerate(policy.rows):
            want = best_sum(tables, tables.roots(3, apart=True)[b : b + 1], nodes, depth)
            worst, cases = max(worst, abs(math.fsum(row.values) - want)), cases + 1
    seconds = time.perf_counter() - begin
    record(
        SLUG,
        {
            "optimality_cases": cases,
            "optimality_worst_difference": {"value": worst, "need": "<= 1e-12"},
            "optimality_seconds": {"value": seconds, "unit": "s", "need": "< 5"},
        },
        [0],
        FILES,
    )
    assert worst <= 1e-12 and seconds < 5


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
