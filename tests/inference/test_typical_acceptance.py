"""Medusa's typical acceptance: a hand-worked tree, the fast rule against a slow one, and that it is lossy."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from draftsmith.inference import registry
from draftsmith.inference.acceptance import Fault
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_policies.dyspec import DySpecPolicy
from draftsmith.inference.tree_policies.fixed_widths import FixedWidthsPolicy
from draftsmith.inference.typical_acceptance import threshold, verify_typical
from tests.fakes import markov, near, requests_for, string_law
from tests.path_tables import PathTables, TableSource, numbers

CPU = torch.device("cpu")
T1 = SamplingParams(temperature=1.0)


def test_threshold_by_hand() -> None:
    """Four equal tokens: H = log 4, so 0.09 / 4 counts. A sure token: H = 0, so 0.09. delta 0.9: epsilon counts."""
    assert float(threshold(torch.full((4,), 0.25), 0.3, 0.09)) == pytest.approx(0.0225)
    assert float(threshold(torch.tensor([1.0, 0.0]), 0.3, 0.09)) == pytest.approx(0.09)
    assert float(threshold(torch.tensor([1.0, 0.0]), 0.3, 0.9)) == pytest.approx(0.3)


def test_the_longest_plausible_path_by_hand() -> None:
    """root -> 1 (token 0), 2 (token 1); 2 -> 3 (token 2), 4 (token 0).

    Root law (.8 .1 .1): H = .639, threshold .09 e^-.639 = .0475: both children pass. Node 2's law (.04 .06 .9):
    H = .392, threshold .0608: token 2 passes, token 0 does not. So the path is 2, 3 although token 1 has a tenth of the
    mass, and what follows is the argmax behind node 3.
    """
    laws = {0: [0.8, 0.1, 0.1], 1: [1.0, 0.0, 0.0], 2: [0.04, 0.06, 0.9], 3: [0.2, 0.5, 0.3], 4: [0.0, 0.0, 1.0]}
    tree = Tree.from_rows([[0, 0, 1, 2, 0]], [[-1, 0, 0, 2, 2]], CPU)
    assert 0.09 * math.exp(-0.6390) < 0.1 and 0.06 < 0.09 * math.exp(-0.3919) < 0.061
    verdict = verify_typical(tree, lambda node: torch.tensor([laws[int(node[0])]]))
    assert (verdict.k.item(), verdict.path.tolist(), verdict.y.item()) == (2, [[0, 2, 3]], 1)
    assert (verdict.examined.item(), verdict.beta_sum.item()) == (4, 3.0)


def test_of_equally_long_paths_the_likelier_one() -> None:
    tree = Tree.from_rows([[0, 1, 0]], [[-1, 0, 0]], CPU)
    verdict = verify_typical(tree, lambda node: torch.tensor([[0.6, 0.4]]))
    assert (verdict.k.item(), verdict.path.tolist(), verdict.y.item()) == (1, [[0, 2]], 0)


def slow(tree: Tree, b: int, p: Tensor, epsilon: float, delta: float) -> tuple[list[int], int]:
    """Path by path, as FasterDecoding/Medusa does it."""
    best: tuple[int, float, list[int]] = (0, 0.0, [0])
    for leaf in range(1, int(tree.size[b])):
        path = [leaf]
        while path[0]:
            path.insert(0, int(tree.parent[b, path[0]]))
        kept, score = [0], 0.0
        for above, node in itertools.pairwise(path):
            law = p[above].tolist()
            x = law[int(tree.tokens[b, node])]
            entropy = -sum(v * math.log(v) for v in law if v > 0)
            if not x > min(epsilon, delta * math.exp(-entropy)):
                break
            kept.append(node)
            score += math.log(x)
        if (len(kept) - 1, score) > (best[0], best[1] if best[0] else -math.inf):
            best = (len(kept) - 1, score, kept)
    return best[2], int(p[best[2][-1]].argmax())


@pytest.mark.parametrize("policy", [FixedWidthsPolicy([3, 2, 1]), DySpecPolicy(9, 5)])
def test_fast_rule_equals_the_slow_one(policy: FixedWidthsPolicy | DySpecPolicy) -> None:
    tables, rows = PathTables(noise=0.7, seed=3), 120
    roots = tables.roots(rows, apart=True)
    want, depth = [b % 10 for b in range(rows)], [1 + b % 4 for b in range(rows)]
    tree = policy.grow(TableSource(tables, roots), torch.zeros(rows).long(), want, depth, numbers(rows, 1))
    p = tables.target(tables.contexts(tree, roots))
    verdict = verify_typical(tree, lambda node: p[torch.arange(rows), node], 0.3, 0.5)
    for b in range(rows):
        path, y = slow(tree, b, p[b], 0.3, 0.5)
        assert (verdict.path[b, : len(path)].tolist(), int(verdict.k[b]), int(verdict.y[b])) == (path, len(path) - 1, y)
    assert not verdict.fault.any() and int(verdict.k.max()) >= 2


def test_a_law_that_is_none_is_a_fault() -> None:
    tree = Tree.from_rows([[0, 1]], [[-1, 0]], CPU)
    verdict = verify_typical(tree, lambda node: torch.tensor([[float("nan")] * 2]))
    assert (verdict.k.item(), verdict.fault.item()) == (0, Fault.TARGET)


def test_it_does_not_keep_the_law() -> None:
    """The certificate that holds for every lossless setting fails here, with the same rows; without it, it holds."""
    prompts, rows = ((1,), (2, 3)), 2000
    target = markov(6, 2, seed=3)
    parts = {"target": target, "draft": near(target, noise=1.2)}
    p_values, taus = {}, {}
    for lossy in (False, True):
        settings = {"policy": "fixed", "widths": "3-2", "lossy_typical": lossy}
        decoder = registry.build("tree", parts, sampling=T1, settings=settings, seed=11)
        result = decoder.decode(requests_for(prompts, rows, 7))
        law = string_law(target, prompts[0], 2, T1, ())
        p_values[lossy] = law.test(result.output[::2], 2).p_value
        taus[lossy] = sum(result.rounds.committed) / len(result.rounds)
        assert result.notes["rule"] == ("typical" if lossy else "token")
        assert registry.get("tree").is_lossless(registry.make_settings("tree", settings)) is not lossy
    assert p_values[False] > 0.001 and p_values[True] < 1e-9
    assert taus[True] > taus[False], "what it is for: longer paths"


def test_at_temperature_0_it_is_the_exact_rule() -> None:
    target = markov(6, 2, seed=3)
    parts = {"target": target, "draft": near(target, noise=1.2)}
    requests = requests_for(((1,), (2, 3)), 6, 9)
    exact, typical = (
        registry.build("tree", parts, settings={"lossy_typical": lossy}).decode(requests).output
        for lossy in (False, True)
    )
    assert exact == typical


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"typical_epsilon": 0.0}, "epsilon of typical acceptance"),
        ({"typical_delta": 1.0}, "delta of typical acceptance"),
        ({"lossy_typical": True, "verification": "traversal"}, "choose one"),
    ],
)
def test_bad_settings(settings: dict[str, float | bool | str], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        registry.make_settings("tree", settings)
