"""The filter as a stop rule of a draft: the target's law stays, offers end where the chances do, what is refused."""

import math

import pytest
import torch
from torch import Tensor

from draftsmith.inference.decoders.speculative import SpeculativeDecoder, SpeculativeSettings
from draftsmith.inference.drafters.base import DraftTask
from draftsmith.inference.drafters.filtered import CAUSAL, FilteredDrafter, chain_signals
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.commit_filter import CommitFilter, FilterConfig
from draftsmith.inference.sampling import SamplingParams
from tests.fakes import markov, near, pool, requests_for, string_law

PROMPTS = ((1,), (2, 3), (4, 5, 1), (1, 2, 3, 4))
SETTINGS = SpeculativeSettings(draft_length=4, schedule="confidence", fallback="never")


def trained_by_hand() -> CommitFilter:
    """A filter whose word depends on everything that it may read."""
    torch.manual_seed(0)
    net = CommitFilter(FilterConfig(8, features=CAUSAL, window=0, hidden=8)).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.mul_(3)
    return net


def test_the_targets_law_is_kept() -> None:
    target = markov(6, 2, seed=3)
    draft = near(target, noise=1.2)
    params = SamplingParams(temperature=1.0)
    laws = [string_law(target, p, 3, params) for p in PROMPTS]
    drafter = FilteredDrafter(draft, trained_by_hand(), 0.35)
    decoder = SpeculativeDecoder(target, drafter, settings=SETTINGS, sampling=params, seed=5)
    result = decoder.decode(requests_for(PROMPTS, 12_000, 7))
    test = pool([law.test(result.output[i::4], 3) for i, law in enumerate(laws)], len(result.output))
    assert test.p_value > 0.001, str(test)
    offered = set(result.rounds.drafted)
    assert len(offered) > 2 and 1 in offered  # the filter does end offers, at several lengths


def test_a_rule_that_reads_the_token_itself_breaks_the_law() -> None:
    """The negative control: offering token i by what it is itself, not by what stands before it."""
    target = markov(6, 2, seed=3)
    drafter = Peeking(near(target, noise=1.2), trained_by_hand(), 0.5)
    params = SamplingParams(temperature=1.0)
    laws = [string_law(target, p, 3, params) for p in PROMPTS]
    result = SpeculativeDecoder(target, drafter, settings=SETTINGS, sampling=params, seed=5).decode(
        requests_for(PROMPTS, 12_000, 7)
    )
    test = pool([law.test(result.output[i::4], 3) for i, law in enumerate(laws)], len(result.output))
    assert test.p_value < 1e-6, str(test)


class Peeking(FilteredDrafter):
    """Offers only tokens that the draft itself finds likely."""

    def start(self, task: DraftTask):  # type: ignore[no-untyped-def]  # a session of a local class
        session = super().start(task)
        propose = session.propose

        def peeking(tokens, want, u, penalties):  # type: ignore[no-untyped-def]  # as the session's
            made = propose(tokens, want, u, penalties)
            likely = made.law.gather(-1, made.tokens.unsqueeze(-1)).squeeze(-1) > 0.3
            return type(made)(made.tokens, likely.cumprod(1).sum(1), made.law)

        session.propose = peeking  # type: ignore[method-assign]  # the mutation
        return session


def test_greedy_output_is_the_targets_and_offers_follow_the_threshold() -> None:
    target = markov(12, 2, seed=1)
    draft = near(target, noise=0.6)
    means = {}
    outputs = []
    for threshold in (0.0, 0.4, 1.0):
        drafter = FilteredDrafter(draft, trained_by_hand(), threshold)
        result = SpeculativeDecoder(target, drafter, settings=SETTINGS).decode(requests_for(PROMPTS, 8, 24))
        outputs.append(result.output)
        drafted = [n for n in result.rounds.drafted if n]
        means[threshold] = sum(drafted) / len(drafted)
    assert outputs[0] == outputs[1] == outputs[2]
    assert means[1.0] == 1.0 < means[0.4] < means[0.0]


def test_later_tokens_change_no_earlier_word() -> None:
    net = trained_by_hand()
    law = torch.rand(3, 6, 9).softmax(-1)
    tokens = torch.randint(0, 9, (3, 6))
    before = net.score(chain_signals(tokens, law))
    other, changed = law.clone(), tokens.clone()
    other[:, 4:], changed[:, 4:] = torch.rand(3, 2, 9).softmax(-1), 0
    after = net.score(chain_signals(changed, other))
    assert torch.allclose(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])


def test_signals_of_a_chain() -> None:
    law = torch.tensor([[[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]]])
    seen = chain_signals(torch.tensor([[1, 0]]), law)
    assert seen.confidence.tolist() == [[pytest.approx(0.2), 1.0]]
    assert seen.margin is not None and seen.entropy is not None
    assert seen.margin[0].tolist() == pytest.approx([0.5, 1.0])
    wanted = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    assert _close(seen.entropy[0], [wanted, 0.0])


def _close(found: Tensor, wanted: list[float]) -> bool:
    return found.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        FilterConfig(8, features=CAUSAL, window=1),
        FilterConfig(8, features=("rank",), window=0),
        FilterConfig(8, "reference"),
    ],
)
def test_filters_that_look_ahead_are_refused(config: FilterConfig) -> None:
    with pytest.raises(InvalidValue, match="must not look at later tokens"):
        FilteredDrafter(markov(6), CommitFilter(config), 0.5)
    with pytest.raises(InvalidValue, match=r"must lie in \[0, 1\]"):
        FilteredDrafter(markov(6), trained_by_hand(), 1.5)
