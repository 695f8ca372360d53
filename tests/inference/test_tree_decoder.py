"""The tree decoder as a whole: what it keeps between rounds, ragged rows, stops, limits, recorders, features."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.inference import metrics, registry, tree_verification
from draftsmith.inference.decoders.session import ContextWarning
from draftsmith.inference.decoders.tree import TreeDecoder
from draftsmith.inference.drafters.tree_base import Accepted, TreeTask
from draftsmith.inference.drafters.tree_model import TreeModelDrafter
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig
from draftsmith.inference.recorder import LawRecorder, RecorderSettings
from draftsmith.inference.requests import RoundView, TokenRequest
from draftsmith.inference.sampling import SamplingParams, law
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_calibration import CALIBRATION_FILE, Calibrator
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_policies.dyspec import DySpecPolicy
from draftsmith.inference.tree_policies.fixed_widths import FixedWidthsPolicy
from draftsmith.inference.tree_settings import POLICIES, TreeSettings
from tests.engines import SIZES, tiny_hf
from tests.fakes import markov, near, requests_for
from tests.inference.test_sync import counted

RAGGED = ((1,), (2, 3), (4, 5, 1), (1, 2, 3, 4), (5, 5, 5, 1, 2))
SAMPLED = SamplingParams(temperature=1.0)
GROWN = [p for p in POLICIES if p != "auto"]


@pytest.fixture(scope="module")
def nets() -> tuple[NativeEngine, NativeEngine]:
    """A target and a draft near it: real networks with real caches."""

    def engine(noise: float) -> NativeEngine:
        model = tiny_hf("llama", seed=3, **{**SIZES, "vocab_size": 40, "max_position_embeddings": 48})
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(noise * p.std() * torch.randn(p.shape, generator=generator))
            model.lm_head.weight.mul_(4)  # peaked laws, so that paths are long
        net = CausalLM(CausalLMConfig.from_hf(model.config)).eval()
        net.load_state_dict(model.state_dict())
        return NativeEngine(net)

    return engine(0.0), engine(0.01)


def plain(target: Any, requests: Sequence[TokenRequest]) -> list[list[int]]:
    return registry.build("autoregressive", {"target": target}).decode(requests).output


@pytest.mark.parametrize("policy", GROWN)
def test_greedy_equals_plain_on_networks_to_the_end_of_the_context(policy: str, nets: Any) -> None:
    """Ragged prompts, rows that end at different rounds, the last tokens of a context of 48 positions."""
    target, draft = nets
    requests = [TokenRequest(p, max_new_tokens=60 if i == 4 else 12 + 6 * i, row_id=i) for i, p in enumerate(RAGGED)]
    with pytest.warns(ContextWarning):
        want = plain(target, requests)
    decoder = registry.build("tree", {"target": target, "draft": draft}, settings={"policy": policy, "nodes": 10})
    with pytest.warns(ContextWarning):
        result = decoder.decode(requests)
    assert result.output == want and len(want[4]) == 48 - 5
    assert max(result.rounds.accepted) >= 2 and max(result.rounds.drafted) >= 4


def test_a_draft_of_a_shorter_context_stops_offering(nets: Any) -> None:
    target, _ = nets
    small = tiny_hf("llama", seed=3, **{**SIZES, "vocab_size": 40, "max_position_embeddings": 12})
    net = CausalLM(CausalLMConfig.from_hf(small.config)).eval()
    net.load_state_dict(small.state_dict())
    requests = [
        TokenRequest((1, 2), 30, row_id=0),
        TokenRequest((3,) * 9, 20, row_id=1),
        TokenRequest((4,), 6, row_id=2),
    ]
    decoder = registry.build("tree", {"target": target, "draft": NativeEngine(net)}, settings={"policy": "dyspec"})
    result = decoder.decode(requests)
    assert result.output == plain(target, requests)
    late = [n for row, n in zip(result.rounds.row, result.rounds.drafted, strict=True) if row == 0][-5:]
    assert late == [0] * 5 and max(result.rounds.drafted) > 0
    with pytest.warns(ContextWarning, match="fills the draft's context"):
        decoder.decode([TokenRequest((3,) * 14, 4)])


@pytest.mark.parametrize("policy", GROWN)
def test_a_row_does_not_depend_on_its_batch_mates(policy: str, nets: Any) -> None:
    target, draft = nets
    settings = {"policy": policy, "nodes": 7, "depth": 4}
    requests = [TokenRequest(p, 9 + 2 * i, row_id=i) for i, p in enumerate(RAGGED)]

    def outputs(some: Sequence[TokenRequest]) -> list[list[int]]:
        parts = {"target": target, "draft": draft}
        return registry.build("tree", parts, sampling=SAMPLED, settings=settings, seed=4).decode(some).output

    together = outputs(requests)
    assert [outputs([r])[0] for r in requests] == together
    assert outputs(requests[::-1]) == together[::-1]


class Checking(TreeModelDrafter):
    """After every commit the draft's cache must be that of a plain pass over the row's committed tokens."""

    def start(self, task: TreeTask) -> Any:
        session = super().start(task)
        commit, propose, engine = session.commit, session.propose, self.engine
        rows: list[Sequence[Sequence[int]]] = []

        def watched_propose(tokens: Any, *rest: Any) -> Tree | None:
            rows.append(tokens)
            return propose(tokens, *rest)

        def watched_commit(accepted: Accepted) -> None:
            proposed = session._tree is not None
            commit(accepted)
            cache = session._cache
            for b, (held, length) in enumerate(zip(cache.lengths, accepted.lengths, strict=True)):
                assert held < length and (length - 2 <= held or not accepted.kept[b] or not proposed)
                tokens = rows[-1][b]  # the decoder's own list: it grew by what was committed
                fresh = engine.new_cache(1, held)
                engine.forward(torch.tensor([tokens[:held]]), cache=fresh)
                for layer in range(engine.spec.num_layers):
                    torch.testing.assert_close(cache.keys[layer][b : b + 1, :, :held], fresh.keys[layer])
                    torch.testing.assert_close(cache.values[layer][b : b + 1, :, :held], fresh.values[layer])

        session.commit, session.propose = watched_commit, watched_propose  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize("policy", [FixedWidthsPolicy([3, 2, 1]), FixedWidthsPolicy([3, 2], replacement=True), None])
def test_the_drafts_cache_after_every_round(policy: Any, nets: Any) -> None:
    target, draft = nets
    drafter = Checking(draft, policy or DySpecPolicy(8, 4))
    decoder = TreeDecoder(target, drafter, sampling=SAMPLED, seed=1)
    result = decoder.decode([TokenRequest(p, 14, row_id=i) for i, p in enumerate(RAGGED)])
    assert max(result.rounds.accepted) >= 2


def test_stops_cut_a_path(nets: Any) -> None:
    target, draft = nets
    requests = [TokenRequest(p, 20, row_id=i) for i, p in enumerate(RAGGED)]
    free = plain(target, requests)
    stops = tuple({row[6] for row in free})
    requests = [replace(r, stop_ids=stops) for r in requests]
    decoder = registry.build("tree", {"target": target, "draft": draft}, settings={"policy": "fixed"})
    result = decoder.decode(requests)
    assert result.output == plain(target, requests) and "stop_id" in result.stop
    for row in result.output:
        assert all(t not in stops for t in row[:-1])
    assert sum(result.rounds.committed) == sum(map(len, result.output))


@pytest.mark.filterwarnings("ignore::draftsmith.inference.tree_calibration.EstimateWarning")
def test_statistics_of_trees() -> None:
    """alpha is that of tests, tau that of tokens; drafted counts nodes."""
    target = markov(8, 1, seed=2)
    parts = {"target": target, "draft": near(target, noise=0.8)}
    for policy in ("chain", "fixed", "dyspec", "eagle2"):
        decoder = registry.build("tree", parts, sampling=SAMPLED, settings={"policy": policy, "nodes": 6, "depth": 3})
        rounds = decoder.decode(requests_for(RAGGED, 400, 12)).rounds
        counts = metrics.count(rounds)
        assert counts.alpha is not None and counts.accepted_rate is not None and counts.tau is not None
        error = (counts.alpha * (1 - counts.alpha) / counts.examined) ** 0.5
        assert abs(counts.alpha - counts.accepted_rate) < 4 * error, policy
        assert all(k <= e <= n for k, e, n in zip(rounds.accepted, rounds.examined, rounds.drafted, strict=True))
        assert max(rounds.drafted) > max(rounds.accepted) or policy == "chain"
    chain = registry.build("tree", parts, sampling=SAMPLED, settings={"policy": "chain", "nodes": 3})
    rounds = chain.decode(requests_for(RAGGED, 100, 12)).rounds
    assert rounds.examined == [min(k + 1, n) for k, n in zip(rounds.accepted, rounds.drafted, strict=True)]


@pytest.mark.parametrize("policy", ["fixed", "dyspec", "eagle2"])
@pytest.mark.parametrize("sampling", [SAMPLED, SamplingParams(temperature=0.8, presence_penalty=0.5, top_k=4)])
def test_a_recorder_sees_the_path_as_a_chain(policy: str, sampling: SamplingParams) -> None:
    target = markov(8, 2, seed=2)
    seen = 0

    def recorder(view: RoundView) -> None:
        nonlocal seen
        for b, (n, k) in enumerate(zip(view.num_drafted, view.accepted, strict=True)):
            text = [*view.context[b], *view.drafted[b, :n].tolist()]
            assert k <= n <= view.drafted.shape[1] and n - k <= 1
            for i in range(k + 1):
                prefix = text[: len(view.context[b]) + i]
                hidden, _ = target.forward(torch.tensor([prefix]))
                torch.testing.assert_close(view.target_logits[b, i], hidden[0, -1])
                assert view.target_law is not None
                if not sampling.has_penalties:
                    torch.testing.assert_close(view.target_law[b, i], law(hidden[:, -1:], sampling)[0, 0])
                if i < n and view.draft_law is not None:
                    assert float(view.draft_law[b, i, text[len(prefix)]]) > 0
                seen += i > 0

    parts = {"target": target, "draft": near(target, noise=0.5)}
    settings = {"policy": policy, "nodes": 6, "depth": 3}
    decoder = registry.build("tree", parts, sampling=sampling, settings=settings, recorder=recorder)
    decoder.decode(requests_for(RAGGED, 10, 12))
    assert seen > 10
    laws = LawRecorder(RecorderSettings(top_k=8))
    requests = requests_for(RAGGED, 5, 9)
    decoder = registry.build("tree", parts, sampling=sampling, settings=settings, recorder=laws)
    records = laws.finish_all(requests, decoder.decode(requests))
    assert all(
        record.positions.tolist() == list(range(len(r.prompt), len(record.ids)))
        for r, record in zip(requests, records, strict=True)
    )


class Featured:
    """A drafter that wants the target's states: it checks that they are those of the committed tokens."""

    aux_layers = (1, 3)
    vocab_size = None
    tokenizer = None

    def __init__(self, target: NativeEngine) -> None:
        self.target = target
        self.checked = 0

    def start(self, task: TreeTask) -> Any:
        outer = self

        class Session:
            calls = 0

            def __init__(self) -> None:
                self.seen: list[Tensor] = [torch.zeros(0)] * task.rows
                self.tokens: Any = None

            def room(self, length: int) -> int:
                return task.nodes

            def propose(self, tokens: Any, want: Any, depth: Any, u: Any, penalties: Any) -> Tree | None:
                self.tokens = tokens
                for b, text in enumerate(tokens):
                    got = self.seen[b]
                    if len(text) == 1:
                        assert len(got) == 0
                        continue
                    _, aux = outer.target.forward(torch.tensor([text[:-1]]), aux_layers=outer.aux_layers)
                    if want[b] > 0:
                        torch.testing.assert_close(got, torch.cat(aux, -1)[0], atol=1e-5, rtol=1e-5)
                        outer.checked += 1
                if len(tokens[0]) % 3 == 0:
                    return None  # a plain round
                rows = [[text[-1], 1, 2, 3] if n >= 3 else [text[-1]] for text, n in zip(tokens, want, strict=True)]
                return Tree.from_rows(rows, [[-1, 0, 0, 1][: len(r)] for r in rows], task.device)

            def commit(self, accepted: Accepted) -> None:
                assert accepted.features is not None and accepted.features.shape[2] == 2 * 32
                for b, count in enumerate(accepted.counts):
                    new = accepted.features[b, :count]
                    self.seen[b] = torch.cat([self.seen[b], new]) if len(self.seen[b]) else new

            def select(self, rows: Sequence[int]) -> None:
                self.seen = [self.seen[r] for r in rows]

        return Session()


def test_features_reach_the_drafter_prefill_included(nets: Any) -> None:
    target, _ = nets
    drafter = Featured(target)
    requests = [TokenRequest(p, 8 + 2 * i, row_id=i) for i, p in enumerate(RAGGED)]
    result = registry.build("tree", {"target": target, "draft": drafter}).decode(requests)
    assert result.output == plain(target, requests) and drafter.checked > 20
    with pytest.raises(InvalidValue, match="a Featured makes its trees itself: leave policy at 'auto', got 'chain'"):
        registry.build("tree", {"target": target, "draft": drafter}, settings={"policy": "chain"})


def test_a_drafter_with_laws_takes_the_policy_that_is_asked_for() -> None:
    target = markov(8, 1)
    drafter = TreeModelDrafter(near(target), ChainPolicy(3))
    kept = registry.build("tree", {"target": target, "draft": drafter}, sampling=SAMPLED)
    assert max(kept.decode(requests_for([[1]], 1, 9)).rounds.drafted) == 3
    other = registry.build("tree", {"target": target, "draft": drafter}, settings={"policy": "fixed", "widths": "2-2"})
    assert max(other.decode(requests_for([[1]], 1, 9)).rounds.drafted) == 6


def test_a_calibration_is_used_and_held_to_its_conditions(tmp_path: Path) -> None:
    target = markov(8, 1, seed=2)
    parts = {"target": target, "draft": near(target, noise=0.3)}
    calibrator = Calibrator()
    settings = TreeSettings(policy="fixed")
    drafter = TreeModelDrafter(parts["draft"], FixedWidthsPolicy([3, 2]))
    TreeDecoder(target, drafter, sampling=SAMPLED, settings=settings, watcher=calibrator).decode(
        requests_for(RAGGED, 50, 20)
    )
    path = tmp_path / CALIBRATION_FILE
    calibrator.result({"temperature": 1.0, "draft_temperature": 1.0, "drawn": True}).save(path)
    taus = {}
    for calibration in ("", str(path)):
        chosen = {"policy": "dyspec", "nodes": 8, "depth": 8, "calibration": calibration}
        decoder = registry.build("tree", parts, sampling=SAMPLED, settings=chosen)
        taus[calibration] = metrics.count(decoder.decode(requests_for(RAGGED, 60, 30)).rounds).tau
    assert taus[str(path)] > taus[""]
    with pytest.raises(InvalidValue, match="measured with temperature"):
        registry.build("tree", parts, settings={"policy": "sequoia", "calibration": str(path)})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"policy": "eagle"}, "unknown policy 'eagle'"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"beam": 0}, "beam must be at least 1"),
        ({"widths": "3-0"}, "widths must be numbers"),
        ({"widths": "3,2"}, "widths must be numbers"),
        ({"threshold": 1.0}, "threshold and min_value"),
        ({"draft_temperature": -1.0}, "draft_temperature"),
        ({"policy": "dyspec", "calibration": "no/such.json"}, "no calibration at"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    target = markov(8)
    with pytest.raises(InvalidValue, match=message):
        registry.build("tree", {"target": target, "draft": near(target)}, settings=settings)


@pytest.mark.parametrize("policy", ["chain", "fixed", "sequoia", "eagle2"])
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED, SamplingParams(temperature=0.8, presence_penalty=0.5)])
def test_one_synchronisation_a_round_where_the_walk_may_not_wait(
    policy: str, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: the walk makes as many steps as the tree could need, and its outcome is the same."""
    target = markov(8, 2, seed=2)
    parts = {"target": target, "draft": near(target, noise=0.3)}
    requests = requests_for(RAGGED, 5, 10)

    settings = {"policy": policy, "nodes": 6, "depth": 3}
    decoder = registry.build("tree", parts, sampling=sampling, settings=settings, seed=2)
    want = decoder.decode(requests)
    monkeypatch.setattr(tree_verification._Walk, "go_on", lambda walk, still: True)
    monkeypatch.setattr(Tree, "check", lambda tree: None)  # once a call, it waits
    with counted() as seen:
        got = decoder.decode(requests)
    assert got.output == want.output and got.rounds.examined == want.rounds.examined
    rounds = max(got.rounds.row.count(row) for row in range(5))
    assert seen == ["tolist"] * rounds
