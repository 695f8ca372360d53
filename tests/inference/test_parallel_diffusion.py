"""The block sampler: its law at one commit a pass, rules that reduce to it, caches, ends of text, rows on their own."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.commit_rules import RULES, BlockView, Oracle
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionDecoder, ParallelDiffusionSettings
from draftsmith.inference.diffusion_passes import CACHES
from draftsmith.inference.diffusion_rows import EOT
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.nets.commit_filter import CommitFilter, FilterConfig
from draftsmith.inference.nets.masked_lm import MaskedLM, MaskedLMConfig
from draftsmith.inference.registry import build_canvas
from draftsmith.inference.requests import DecodeResult
from draftsmith.inference.sampling import SamplingParams
from tests.fakes import MarkovEngine, chi_square, markov
from tests.inference.test_sync import counted
from tests.tabular_canvas import TabularNet, random_joint

MASK, EOS, LENGTH = 19, 3, 16
T1 = SamplingParams(temperature=1.0)
SEQUENTIAL: dict[str, Any] = {"rule": "low_confidence", "eot": "none"}


def net_of(seed: int = 0, **fields: Any) -> MaskedLM:
    """A random network; large weights, so that positions depend on each other and confidences differ."""
    torch.manual_seed(seed)
    config = MaskedLMConfig(20, 32, 2, 4, 48, max_length=32, mask_id=MASK, eos_id=EOS, **fields)
    net = MaskedLM(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    net.fuse()
    return net


def prompts(count: int = 3, holes: int = LENGTH, row: int = 0) -> list[CanvasRequest]:
    """Prompts of different lengths, each with `holes` masks behind it."""
    return [
        CanvasRequest(
            [5 + (i + j) % 9 for j in range(2 + 3 * i)] + [MASK] * holes,
            range(2 + 3 * i, 2 + 3 * i + holes),
            row_id=row + i,
        )
        for i in range(count)
    ]


def decode(net: Any, requests: list[CanvasRequest], sampling: SamplingParams | None = None, **settings: Any) -> Any:
    settings = {"block_length": 8, **settings}
    return ParallelDiffusionDecoder(net, ParallelDiffusionSettings(**settings), sampling=sampling).decode(requests)


def says(answer: float) -> CommitFilter:
    """A filter whose every logit is `answer`."""
    net = CommitFilter(FilterConfig(8, net="reference"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.layers[2].bias.fill_(answer)  # type: ignore[union-attr,operator]
    return net


# ---------------------------------------------------------------------------------------------------------------------
# The law


def strings(net: TabularNet, rows: int, **settings: Any) -> Tensor:
    """How often each string came out, flat."""
    length, vocab = net.joint.dim(), net.joint.shape[0]
    decoder = ParallelDiffusionDecoder(
        net,  # type: ignore[arg-type]
        ParallelDiffusionSettings(block_length=0, eot="none", **settings),
        sampling=T1,
    )
    counts = torch.zeros(net.joint.numel())
    for output in decoder.decode(
        [CanvasRequest([vocab] * length, range(length), row_id=i) for i in range(rows)]
    ).output:
        counts[sum(token * vocab ** (length - 1 - i) for i, token in enumerate(output))] += 1
    return counts


def test_one_commit_in_random_order_samples_the_models_law() -> None:
    """Guarantee 6: chi-square of 3,000 strings; two commits a pass from the same table fail it."""
    net = TabularNet(random_joint(3, 4, seed=1, sharpness=1.5))
    law = net.joint.flatten()
    right = chi_square(strings(net, 3000, rule="low_confidence", score="random"), law)
    assert right.p_value > 1e-3, str(right)
    assert right.detectable_tv < 0.1
    wrong = chi_square(strings(net, 3000, rule="top_n", steps=2, score="random"), law)
    assert wrong.p_value < 1e-3, str(wrong)


def test_temperature_and_filters_shape_each_conditional() -> None:
    """top_k 1 at any temperature is greedy."""
    net = net_of()
    sharp = decode(net, prompts(), SamplingParams(temperature=0.7, top_k=1), **SEQUENTIAL)
    assert sharp.output == decode(net, prompts(), **SEQUENTIAL).output


# ---------------------------------------------------------------------------------------------------------------------
# Rules that reduce to the sequential decode


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "threshold", "threshold": 1.0},
        {"rule": "top_n", "steps": LENGTH},
        {"rule": "top_n"},
        {"rule": "factor", "factor": 1e-9},
    ],
    ids=str,
)
def test_rules_that_take_none_are_the_sequential_decode(settings: dict[str, Any]) -> None:
    """Guarantee 7, token for token and pass for pass."""
    net = net_of()
    want = decode(net, prompts(), **SEQUENTIAL)
    got = decode(net, prompts(), eot="none", **settings)
    assert got.output == want.output and got.notes["passes"] == want.notes["passes"] == [LENGTH] * 3


def test_filters_that_say_no_and_yes() -> None:
    """Learn2PD's guarantees 1, 2 and 4: no filter leaves a pass empty; never is the base decode, always one a block."""
    net, settings = net_of(), ParallelDiffusionSettings(block_length=8, rule="learned_filter", eot="none")
    want = decode(net, prompts(), **SEQUENTIAL)
    never = ParallelDiffusionDecoder(net, settings, filter=says(-9.0)).decode(prompts())
    assert never.output == want.output and never.notes["passes"] == want.notes["passes"]
    always = ParallelDiffusionDecoder(net, settings, filter=says(9.0)).decode(prompts())
    assert always.notes["passes"] == [LENGTH // 8] * 3
    bar = ParallelDiffusionSettings(block_length=8, rule="learned_filter", eot="none", threshold=1.0)
    assert ParallelDiffusionDecoder(net, bar, filter=says(9.0)).decode(prompts()).output == want.output


@pytest.mark.parametrize("seed", range(4))
def test_the_oracle_meets_its_reference(seed: int) -> None:
    """Learn2PD's guarantee 3: the output is y exactly, in no more passes than y took."""
    net, requests = net_of(seed), prompts()
    base = decode(net, requests, **SEQUENTIAL)
    references = [r.filled(self_made(base, i)) for i, r in enumerate(requests)]
    settings = ParallelDiffusionSettings(block_length=8, eot="none")
    made = ParallelDiffusionDecoder(net, settings, rule=Oracle(references)).decode(requests)
    assert made.output == base.output
    assert all(a <= b for a, b in zip(made.notes["passes"], base.notes["passes"], strict=True))
    assert sum(made.notes["passes"]) < sum(base.notes["passes"])


def self_made(result: DecodeResult, row: int) -> list[int]:
    """A whole answer: what follows an end of text is of no interest, here it has to be there."""
    answer = result.output[row]
    return answer + [EOS] * (LENGTH - len(answer))


def test_committed_tokens_stay() -> None:
    """Guarantee 4: commits are disjoint, at least one a pass and row, in blocks from left to right; prompts stay."""
    net, requests = net_of(), prompts()
    decoder = ParallelDiffusionDecoder(net, ParallelDiffusionSettings(block_length=8, rule="factor", eot="none"))
    filled: list[dict[int, int]] = [{} for _ in requests]
    stream, stops = decoder.stream(requests), {}
    while True:
        try:
            commit = next(stream)
        except StopIteration as end:
            result: DecodeResult = end.value
            break
        holes = list(requests[commit.row].holes)
        before = (len(filled[commit.row])) // 8
        assert commit.positions and all(holes.index(p) // 8 == before for p in commit.positions)
        assert not set(commit.positions) & set(filled[commit.row])
        filled[commit.row].update(zip(commit.positions, commit.tokens, strict=True))
        if commit.stop is not None:
            stops[commit.row] = commit.stop
    for i, request in enumerate(requests):
        answer = [filled[i][p] for p in request.holes]
        assert answer[: len(result.output[i])] == result.output[i] and MASK not in answer
        assert stops[i] == result.stop[i] == ("stop_id" if EOS in answer else "length")
    assert result.rounds.row == [c for c in result.rounds.row] and set(result.rounds.drafted) == {0}
    assert sum(result.rounds.committed) == sum(map(len, result.output))
    assert [result.rounds.row.count(i) for i in range(3)] == result.notes["passes"]


# ---------------------------------------------------------------------------------------------------------------------
# Caches


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("fields", [{}, {"logit_shift": True}, {"positions": "rope", "num_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_with_blocks_of_one_a_cache_changes_nothing(cache: str, fields: dict[str, Any], guidance: float) -> None:
    """Guarantee 8, with ragged rows, and one full pass a token."""
    net = net_of(**fields)
    want = decode(net, prompts(), T1, block_length=1, guidance=guidance, **SEQUENTIAL)
    got = decode(net, prompts(), T1, block_length=1, guidance=guidance, cache=cache, **SEQUENTIAL)
    assert got.output == want.output and got.notes == want.notes


@pytest.mark.parametrize("fields", [{}, {"logit_shift": True}, {"positions": "rope"}], ids=str)
def test_a_prefix_that_sees_nothing_else_makes_the_prefix_cache_exact(fields: dict[str, Any]) -> None:
    """One layer: keys and values depend on a position's own token alone, so stale ones are right wherever the token
    has not changed. The prefix cache then changes nothing; the dual one neither, since it feeds what changes.
    """
    torch.manual_seed(0)
    net = MaskedLM(MaskedLMConfig(20, 32, 1, 4, 48, max_length=32, mask_id=MASK, eos_id=EOS, **fields)).eval()
    want = decode(net, prompts(), eot="none", rule="factor", block_length=4)
    for cache in ("prefix", "dual"):
        got = decode(net, prompts(), eot="none", rule="factor", block_length=4, cache=cache)
        assert got.output == want.output and got.notes["passes"] == want.notes["passes"]
        assert sum(got.notes["token_passes"]) < sum(want.notes["token_passes"])


def test_what_each_cache_feeds() -> None:
    """A prompt of 2 and two blocks of 8, one token a pass: full passes, then the suffix, or the block."""
    net, one = net_of(), prompts(1)
    fed = {c: decode(net, one, cache=c, **SEQUENTIAL).notes["token_passes"] for c in CACHES}
    assert fed == {"none": [16 * 18], "prefix": [18 + 7 * 16 + 18 + 7 * 8], "dual": [18 + 7 * 8 + 18 + 7 * 8]}


# ---------------------------------------------------------------------------------------------------------------------
# Rows on their own


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("eot", EOT)
@pytest.mark.parametrize("shift", [False, True])
def test_batch_mates_change_nothing(cache: str, eot: str, shift: bool) -> None:
    """Ragged prompts and an infill beside them, greedy and sampled, with and without guidance."""
    net = net_of(logit_shift=shift)
    infill = CanvasRequest.from_mask([4, MASK, 5, MASK, 6, 6, MASK, MASK] * 2, MASK, row_id=9)
    requests = [*prompts(), infill]
    for sampling, guidance in ((None, 0.0), (T1, 0.0), (T1, 0.7)):
        settings: dict[str, Any] = {"cache": cache, "eot": eot, "guidance": guidance, "threshold": 0.3}
        together = decode(net, requests, sampling, **settings)
        for i, request in enumerate(requests):
            alone = decode(net, [request], sampling, **settings)
            assert alone.output[0] == together.output[i]
            for note in ("passes", "token_passes"):
                assert alone.notes[note][0] == together.notes[note][i]


def test_a_row_is_keyed_by_its_id_and_the_seed() -> None:
    net = net_of()
    twice = [CanvasRequest(r.tokens, r.holes, row_id=5) for r in (prompts(1) * 2)]
    settings = ParallelDiffusionSettings(block_length=8)
    same = ParallelDiffusionDecoder(net, settings, sampling=T1, seed=1).decode(twice).output
    assert same[0] == same[1]
    seeds = {
        tuple(ParallelDiffusionDecoder(net, settings, sampling=T1, seed=s).decode(twice).output[0]) for s in range(9)
    }
    assert len(seeds) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Ends of text


@pytest.mark.parametrize("rule", ["low_confidence", "factor"])
def test_left_done_changes_no_text(rule: str) -> None:
    """Learn2PD's guarantee 5, for any network: what is committed stays, so a finished text can be handed out."""
    shorter = 0
    for seed in range(6):
        net = net_of(seed)
        whole, stopped = (decode(net, prompts(), rule=rule, eot=eot) for eot in ("none", "left_done"))
        assert stopped.output == whole.output and stopped.stop == whole.stop
        shorter += sum(whole.notes["passes"]) - sum(stopped.notes["passes"])
    assert shorter > 0


def ends_at(place: int) -> TabularNet:
    """Four tokens of which number `place` is the end (id 2) for sure; what stands right of it is nearly free."""
    joint = random_joint(3, 4, seed=5, sharpness=1.0)
    joint.select(place, 0).zero_()
    joint.select(place, 1).zero_()
    return TabularNet(joint, eos_id=2)


def test_modes_of_the_end_of_text() -> None:
    """The end at position 1 is committed first, being sure: first_committed and reference then cut the canvas there,
    left_done waits for position 0, none fills all four.
    """
    net, request = ends_at(1), [CanvasRequest([3] * 4, range(4))]
    made = {eot: decode(net, request, rule="low_confidence", block_length=0, eot=eot) for eot in EOT}
    assert {eot: r.notes["token_passes"][0] for eot, r in made.items() if eot != "left_done"} == {
        "none": 16,
        "first_committed": 6,
        "reference": 6,
    }
    assert 8 <= made["left_done"].notes["token_passes"][0] <= 16
    for result in made.values():
        assert len(result.output[0]) <= 2 and result.output[0][-1] == 2 and result.stop == ["stop_id"]
    assert made["left_done"].output == made["none"].output


def test_reference_mode_cuts_behind_a_predicted_end() -> None:
    """Blocks of two: the end at 3 is only predicted while the first block is decoded, yet nothing behind it is left."""
    joint = random_joint(3, 5, seed=5, sharpness=0.5)
    joint[..., 2] *= 1e-3
    for place in range(3):
        joint.select(place, 2).mul_(1e-3)
    joint.select(3, 0).zero_()
    joint.select(3, 1).zero_()
    net = TabularNet(joint, eos_id=2)
    request = [CanvasRequest([3] * 5, range(5))]
    cut = decode(net, request, rule="low_confidence", block_length=5, eot="reference")
    assert cut.notes["token_passes"] == [5 + 4 * 3]  # after the first pass the canvas is 4 long
    assert cut.output[0][-1] == 2 and len(cut.output[0]) == 4


def test_forbidden_and_last_ends() -> None:
    """forbid: no end anywhere, every hole filled; last: an end is committed only when all else in its block is."""
    net = ends_at(1)
    for place in (0, 2, 3):
        net.joint.select(place, 2).zero_()
    request = [CanvasRequest([3] * 4, range(4))]
    order: list[int] = []
    decoder = ParallelDiffusionDecoder(
        net,  # type: ignore[arg-type]
        ParallelDiffusionSettings(rule="low_confidence", block_length=0, eot="none", eos="last"),
    )
    for commit in decoder.stream(request):
        order += commit.positions
    assert order[-1] == 1
    plain = net_of(2)
    written = decode(plain, prompts(), eos="forbid")
    assert all(len(o) == LENGTH and EOS not in o for o in written.output) and written.stop == ["length"] * 3


def test_an_infill_has_ends_only_where_it_names_them() -> None:
    """Something is given right of the holes: the network's own end of text must not shorten what is filled in."""
    net = net_of()
    canvas = [4, MASK, MASK, 5, MASK, MASK, 6]
    whole = decode(net, [CanvasRequest.from_mask(canvas, MASK)], block_length=0)
    assert len(whole.output[0]) == 4
    for stop in set(whole.output[0]):
        named = decode(net, [CanvasRequest(canvas, [1, 2, 4, 5], stop_ids=(stop,))], block_length=0)
        assert named.output[0][-1] == stop


# ---------------------------------------------------------------------------------------------------------------------
# Guidance, and what is refused


def test_guidance_by_hand() -> None:
    """One hole: the token is the argmax of u + (w + 1)(c - u), u with the prompt masked."""
    changed = 0
    for seed, w in itertools.product(range(6), (0.5, 3.0)):
        net = net_of(seed)
        canvas = torch.tensor([[5, 6, 7, MASK]])
        with torch.no_grad():
            c = net.head(net(canvas))[0, 3]
            u = net.head(net(torch.full_like(canvas, MASK)))[0, 3]
        mixed = u + (w + 1) * (c - u)
        mixed[MASK] = float("-inf")
        request = [CanvasRequest([5, 6, 7, MASK], [3])]
        assert decode(net, request, block_length=1, guidance=w).output == [[int(mixed.argmax())]]
        changed += int(mixed.argmax() != c.argmax())
    assert changed > 0


def filled(**settings: Any) -> Any:
    return lambda: decode(net_of(), prompts(1), **settings)


def endless() -> TabularNet:
    return TabularNet(random_joint(3, 4, 1))


def learned(block_length: int, threshold: float) -> ParallelDiffusionDecoder:
    settings = ParallelDiffusionSettings(block_length=block_length, rule="learned_filter", threshold=threshold)
    return ParallelDiffusionDecoder(net_of(), settings, filter=says(0.0))


def causal() -> MaskedLM:
    class Causal(MaskedLM):
        def states(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.embed_tokens(tokens).cumsum(1)

    return Causal(MaskedLMConfig(20, 32, 1, 4, 48, max_length=32, mask_id=MASK))


def nan_net() -> MaskedLM:
    net = net_of()
    with torch.no_grad():
        net.lm_head.weight[4] = float("nan")
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (filled(block_length=5), "16 tokens to fill are no multiple of block_length 5"),
        (filled(rule="top_n", steps=3), "3 steps are no multiple of 2 blocks"),
        (filled(rule="top_n", steps=18), "more steps .18. than tokens to fill .16."),
        (filled(steps=4), "steps belong to rule top_n"),
        (filled(rule="luck"), "unknown rule 'luck'"),
        (filled(cache="half"), "unknown cache 'half'"),
        (filled(rule="learned_filter"), "needs a filter"),
        (filled(threshold=-1.0), "threshold and guidance must be at least 0"),
        (lambda: decode(net_of(), [CanvasRequest([MASK, 5, MASK], [0])]), "the mask id 19 stands among the given"),
        (lambda: decode(net_of(), [CanvasRequest([25, MASK], [1])]), "id 25 is outside the vocabulary"),
        (lambda: decode(net_of(), prompts(1, holes=32)), "2 given tokens and 32 to fill exceed"),
        (lambda: decode(net_of(), [CanvasRequest([MASK] * 8, range(8))], guidance=1.0), "prompt, and this canvas has"),
        (lambda: decode(endless(), [CanvasRequest([3] * 4, range(4))], block_length=0), "needs an id that ends a text"),
        (lambda: ParallelDiffusionDecoder(causal()), "this network is causal"),
        (lambda: decode(nan_net(), prompts(1)), "of request 0 are no law"),
        (lambda: decode(net_of(), prompts(1), SamplingParams(presence_penalty=1.0)), "penalties count"),
        (lambda: learned(4, 0.9), "trained for blocks of 8, block_length is 4"),
        (lambda: learned(8, 2.0), "must lie in"),
        (lambda: ParallelDiffusionDecoder(net_of(), filter=says(0.0)), "set rule learned_filter"),
        (lambda: MaskedLMConfig(20, 32, 2, 4, 48, 32, mask_id=3, eos_id=3), "eos_id and mask_id are both 3"),
        (lambda: MaskedLMConfig(20, 32, 2, 4, 48, 32, mask_id=3, pad_id=3), "pad_id and mask_id are both 3"),
    ],
)  # fmt: skip
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make()


def test_a_causal_engine_is_another_type() -> None:
    engine: MarkovEngine = markov(5)
    with pytest.raises(InvalidType, match="a causal model cannot fill holes"):
        ParallelDiffusionDecoder(engine)  # type: ignore[arg-type]


def test_nothing_to_do() -> None:
    """No requests, and a canvas without holes beside one with some."""
    net = net_of()
    assert decode(net, []).output == []
    result = decode(net, [CanvasRequest([4, 5], []), *prompts(1)])
    assert result.output[0] == [] and len(result.output[1]) > 0 and result.notes["passes"][0] == 0


def test_the_registry_builds_it() -> None:
    net = net_of()
    decoder = build_canvas("parallel_diffusion", {"target": net}, settings={"block_length": 8, "rule": "factor"})
    assert decoder.decode(prompts()).output == decode(net, prompts(), rule="factor").output


@pytest.mark.parametrize("rule", RULES)
def test_a_pass_waits_for_the_device_once(rule: str) -> None:
    """`.cpu().numpy()` is one wait; nothing else reads a value, sampled or greedy, with a cache and guidance."""
    settings = ParallelDiffusionSettings(block_length=8, rule=rule, cache="dual", guidance=0.5, threshold=0.3)
    judge = CommitFilter(FilterConfig(8)).eval() if rule == "learned_filter" else None
    for sampling in (None, T1):
        decoder = ParallelDiffusionDecoder(net_of(), settings, filter=judge, sampling=sampling)
        with counted() as seen:
            result = decoder.decode(prompts())
        assert seen == ["cpu", "numpy"] * max(result.notes["passes"])


def test_a_rule_of_ones_own() -> None:
    """Any function of a view is a rule."""

    def everything(view: BlockView) -> Tensor:
        return torch.ones_like(view.masked)

    made = ParallelDiffusionDecoder(net_of(), ParallelDiffusionSettings(block_length=8, eot="none"), rule=everything)
    assert made.decode(prompts()).notes["passes"] == [2, 2, 2]
