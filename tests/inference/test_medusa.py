"""Medusa heads: what each predicts, weights of their own, exactness in the decoder, files."""

from pathlib import Path

import pytest
import torch

from draftsmith.inference import registry
from draftsmith.inference.decoders.tree import TreeDecoder
from draftsmith.inference.drafters.medusa import MedusaTreeDrafter, read_medusa
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue
from draftsmith.inference.formats import DrafterRecord, MedusaFields, medusa
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.nets.medusa import MedusaConfig, MedusaHeads, load_heads
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_policies.fixed_widths import FixedWidthsPolicy
from draftsmith.inference.tree_settings import TreeSettings
from tests.tiny import lm, write_lm

SIZES = MedusaConfig(heads=3, layers=2, hidden_size=32, vocab_size=40)


def random_heads(seed: int = 0) -> MedusaHeads:
    torch.manual_seed(seed)
    heads = MedusaHeads(SIZES)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return heads.eval()


def test_a_fresh_head_is_the_targets_own() -> None:
    model = lm(vocab_size=40)
    heads = random_heads()
    heads.start_from(model.lm_head.weight)
    hidden = torch.randn(5, 32)
    logits = heads.logits(hidden)
    assert logits.shape == (5, 3, 40)
    for m in range(3):
        torch.testing.assert_close(logits[:, m], model.lm_head(hidden))


def test_every_layer_of_every_head_has_weights_of_its_own() -> None:
    heads = random_heads()
    weights = [p for name, p in heads.named_parameters() if name.endswith("linear.weight")]
    assert len({p.data_ptr() for p in weights}) == 6 == len(weights)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_keeps_the_targets_law_in_a_ragged_batch(temperature: float) -> None:
    model = lm(layers=3, vocab_size=40, max_length=64)
    target = HFEngine(model)
    requests = [TokenRequest(p, n, row_id=i) for i, (p, n) in enumerate((([3, 4], 15), ([5] * 6, 8), ([1], 12)))]
    for policy in (ChainPolicy(5), FixedWidthsPolicy([2, 2, 1])):
        decoder = TreeDecoder(
            target,
            MedusaTreeDrafter(random_heads(), policy, target=target),
            sampling=SamplingParams(temperature=temperature),
            settings=TreeSettings(nodes=policy.nodes, depth=5),
        )
        found = decoder.decode(requests)
        assert sum(found.rounds.drafted) > 0 and max(found.rounds.accepted) <= 3
        if temperature == 0.0:
            assert found.output == registry.build("autoregressive", {"target": target}).decode(requests).output
        else:  # alone as in the batch: the rows' states are not mixed up
            assert [decoder.decode([request]).output[0] for request in requests] == found.output


def test_head_m_is_asked_for_the_token_m_plus_2_behind_the_state_it_reads() -> None:
    """Heads that know a fixed text by heart, one matrix each, draft it in full blocks of the real decoder."""
    model = lm(seed=1, layers=3, vocab_size=40, max_length=64)
    target = HFEngine(model)
    text = registry.build("autoregressive", {"target": target}).decode([TokenRequest([7, 3], 24)]).output[0]
    ids = torch.tensor([[7, 3, *text]])
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
    heads = MedusaHeads(MedusaConfig(heads=3, layers=1, hidden_size=32, vocab_size=40)).eval()
    for m, (_, last) in enumerate(heads.parts()):
        goal = torch.nn.functional.one_hot(ids[0, m + 2 :], 40).float()
        with torch.no_grad():
            last.weight.copy_(torch.linalg.lstsq(states[: len(goal)], goal).solution.T * 20)
    policy = ChainPolicy(3)
    decoder = TreeDecoder(
        target, MedusaTreeDrafter(heads, policy, target=target), settings=TreeSettings(nodes=3, depth=3)
    )
    result = decoder.decode([TokenRequest([7, 3], 24)])
    assert result.output[0] == text
    drafted, accepted = sum(result.rounds.drafted), sum(result.rounds.accepted)
    assert accepted >= 0.8 * drafted, (accepted, drafted)


def test_files_are_read_back_and_others_refused(tmp_path: Path) -> None:
    heads = random_heads()
    record = DrafterRecord(MedusaFields(3, 2, 32, 40, "target"), heads.state_dict())
    (tmp_path / "heads").mkdir()
    medusa.write(record, tmp_path / "heads")
    found = read_medusa(tmp_path / "heads")
    assert found.config == SIZES
    assert all(torch.equal(found.state_dict()[name], x) for name, x in heads.state_dict().items())
    with pytest.raises(InvalidType, match="no Medusa heads"):
        read_medusa(write_lm(tmp_path / "lm"))
    with pytest.raises(InvalidValue, match=r"2\.2\.weight is missing"):
        load_heads(SIZES, {k: v for k, v in heads.state_dict().items() if k != "2.2.weight"})


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidValue, match="heads must be at least 1"):
        MedusaConfig(0, 1, 32, 40)
    target = HFEngine(lm(width=16, vocab_size=40))
    with pytest.raises(InvalidValue, match="another target"):
        MedusaTreeDrafter(random_heads(), ChainPolicy(2), target=target)
    target = HFEngine(lm(vocab_size=40))
    drafter = MedusaTreeDrafter(random_heads().train(), ChainPolicy(2), target=target)
    with pytest.raises(InvalidState, match="train mode"):
        TreeDecoder(target, drafter).decode([TokenRequest([1, 2], 4)])
