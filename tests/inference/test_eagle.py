"""EAGLE heads in the decoder: exactness with a reduced vocabulary, ragged batches, limits, and files that are wrong."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.inference import couplings, load, registry
from draftsmith.inference.decoders.tree import TreeDecoder
from draftsmith.inference.drafters.eagle import EagleTreeDrafter
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.load_eagle import read_head
from draftsmith.inference.manifest import AuxLayers, TargetCoupling
from draftsmith.inference.nets.eagle_head import EagleConfig, EagleHead, default_aux_layers, load_tensors, shapes
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_policies.fixed_widths import FixedWidthsPolicy
from draftsmith.inference.tree_settings import TreeSettings
from tests.fakes import chi_square
from tests.tiny import add_manifest, lm, write_lm


def head_for(model: Any, seed: int = 0, **changes: Any) -> EagleHead:
    """A random head for a tests.tiny.lm target; its laws are wrong but peaked."""
    torch.manual_seed(seed)
    c = model.config
    first = changes.get("version") == 1
    sizes = {
        "hidden_size": c.hidden_size,
        "target_hidden_size": c.hidden_size,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": c.hidden_size // 4,
        "vocab_size": c.vocab_size,
        "draft_vocab_size": c.vocab_size,
        "aux_layers": default_aux_layers(c.num_hidden_layers, 1 if first else 3),
        "max_positions": c.max_position_embeddings,
        "own_embedding": False,
    }
    head = EagleHead(EagleConfig(**(sizes | changes)))
    with torch.no_grad():
        for p in head.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn_like(p) * 0.3)
    return head.eval()


def decoder_for(model: Any, head: EagleHead, policy: Any, temperature: float = 0.0, seed: int = 0) -> TreeDecoder:
    target = HFEngine(model)
    return TreeDecoder(
        target,
        EagleTreeDrafter(head, policy, target=target),
        sampling=SamplingParams(temperature=temperature),
        settings=TreeSettings(nodes=policy.nodes, depth=4),
        seed=seed,
    )


PROMPTS = [[3, 4], [5, 6, 7, 8, 9, 10, 11], [1], [8, 8, 8]]


@pytest.mark.parametrize("changes", [{}, {"version": 1}, {"family": "qwen3", "norm_output": True}])
def test_greedy_output_is_the_targets_own_in_a_ragged_batch(changes: dict[str, Any]) -> None:
    model = lm(layers=6, vocab_size=40, max_length=64)
    head = head_for(model, **changes)
    requests = [TokenRequest(p, n) for p, n in zip(PROMPTS, (20, 9, 14, 1), strict=True)]
    plain = registry.build("autoregressive", {"target": HFEngine(model)}).decode(requests)
    for policy in (ChainPolicy(3), FixedWidthsPolicy([3, 2, 1])):
        found = decoder_for(model, head, policy).decode(requests)
        assert found.output == plain.output
        assert sum(found.rounds.drafted) > 0


def test_a_row_drafts_the_same_alone_and_in_a_batch() -> None:
    """The session's bookkeeping (ragged pairs, rows that leave) must not show in what is drafted."""
    model = lm(layers=6, vocab_size=40, max_length=64)
    head = head_for(model)
    decoder = decoder_for(model, head, FixedWidthsPolicy([2, 2]), temperature=1.0)
    requests = [TokenRequest(p, n, row_id=i) for i, (p, n) in enumerate(zip(PROMPTS, (18, 6, 12, 9), strict=True))]
    together = decoder.decode(requests)
    for i, request in enumerate(requests):
        alone = decoder.decode([request])
        assert alone.output[0] == together.output[i]
        mine = [a for row, a in zip(together.rounds.row, together.rounds.accepted, strict=True) if row == i]
        assert mine == list(alone.rounds.accepted)


def test_a_reduced_draft_vocabulary_changes_no_law() -> None:
    """Guarantee 7, T=1: first token and first pair against the target's exact laws."""
    model = lm(layers=2, vocab_size=6, width=16, max_length=32)
    head = head_for(model, draft_vocab_size=3)
    head.set_draft_vocabulary(torch.tensor([1, 2, 4]))
    decoder = decoder_for(model, head, FixedWidthsPolicy([2, 1]), temperature=1.0, seed=4)
    rows = 6000
    result = decoder.decode([TokenRequest([2, 3], 3, row_id=i) for i in range(rows)])
    with torch.no_grad():
        first = model(torch.tensor([[2, 3]])).logits[0, -1].double().softmax(-1)
        second = model(torch.tensor([[2, 3, t] for t in range(6)])).logits[:, -1].double().softmax(-1)
    law = {(a, b): float(first[a] * second[a, b]) for a in range(6) for b in range(6)}
    seen = Counter(tuple(out[:2]) for out in result.output)
    assert any(t not in (1, 2, 4) for out in result.output for t in out)  # what the draft cannot say is said
    assert sum(result.rounds.accepted) > rows / 10
    counts, probs = (torch.tensor([float(table[pair]) for pair in law]) for table in (seen, law))
    test = chi_square(counts, probs)
    assert test.p_value > 1e-4 and test.detectable_tv < 0.06, test


def test_a_head_with_fewer_positions_than_the_target_stops_drafting_and_the_text_goes_on() -> None:
    model = lm(layers=6, vocab_size=40, max_length=64)
    head = head_for(model, max_positions=20)
    requests = [TokenRequest([3, 4, 5], 40), TokenRequest([6] * 25, 12)]
    with pytest.warns(UserWarning, match="the prompt fills the draft's context"):
        found = decoder_for(model, head, ChainPolicy(3)).decode(requests)
    plain = registry.build("autoregressive", {"target": HFEngine(model)}).decode(requests)
    assert found.output == plain.output and sum(found.rounds.drafted) > 0


# --- what is refused


def test_a_head_for_another_target_is_refused() -> None:
    head = head_for(lm(layers=6, vocab_size=40))
    for other, said in ((lm(layers=2, vocab_size=40), "another target"), (lm(layers=6, vocab_size=30), "40 ids")):
        with pytest.raises(InvalidValue, match=said):
            EagleTreeDrafter(head, ChainPolicy(2), target=HFEngine(other))


def test_a_head_in_train_mode_and_a_decoder_of_chains_are_refused() -> None:
    model = lm(layers=6, vocab_size=40)
    target, head = HFEngine(model), head_for(model)
    drafter = EagleTreeDrafter(head, ChainPolicy(2), target=target)
    with pytest.raises(InvalidType, match="take decoder 'tree'"):
        registry.build("speculative", {"target": target, "draft": drafter}).decode([TokenRequest([1, 2], 4)])
    head.train()
    with pytest.raises(InvalidState, match="train mode"):
        registry.build("tree", {"target": target, "draft": drafter}).decode([TokenRequest([1, 2], 4)])


def test_a_head_that_was_lent_nothing_says_so() -> None:
    model = lm(layers=6, vocab_size=40)
    with pytest.raises(InvalidState, match="use_embedding"):
        head_for(model).embed(torch.tensor([1]))
    with pytest.raises(InvalidState, match="use_output"):
        head_for(model, version=1).logits(torch.zeros(1, 32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("d2t"), "has no d2t"),
        (lambda t: t.update({"fc.weight": t["fc.weight"][:, :32].clone()}), r"fc.weight is \[32, 32\]"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * float("nan")}), "lm_head.weight holds NaN"),
        (lambda t: t.pop("norm.weight"), "lacks norm.weight"),
        (lambda t: t.update({"midlayer.x": t["norm.weight"].clone()}), "unknown midlayer.x"),
        (lambda t: t.update({"d2t": t["d2t"] + torch.arange(10)}), "offsets"),
        (lambda t: t.update({"norm.weight": torch.ones(31)}), r"norm.weight is \[31\]"),
    ],
)
def test_wrong_tensors_are_one_line_each(change: Any, said: str) -> None:
    model = lm(layers=6, vocab_size=40)
    head = head_for(model, draft_vocab_size=10)
    head.set_draft_vocabulary(torch.arange(10) * 4)
    tensors = dict(head.state_dict())
    change(tensors)
    with pytest.raises(InvalidValue, match=said) as caught:
        load_tensors(head_for(model, draft_vocab_size=10), tensors, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "EAGLE version"),
        ({"family": "gpt2"}, "family"),
        ({"num_layers": 2}, "exactly one layer"),
        ({"num_kv_heads": 3}, "evenly"),
        ({"draft_vocab_size": 41}, "draft_vocab_size"),
        ({"aux_layers": ()}, "aux_layers"),
        ({"aux_layers": (2, 2)}, "aux_layers"),
        ({"hidden_size": 16}, "own_embedding"),
        ({"version": 1, "aux_layers": (6,), "fc_norm": True}, "no fc_norm"),
        ({"version": 1, "aux_layers": (6,), "draft_vocab_size": 8}, "the target's head"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_configurations_that_are_no_head_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        head_for(lm(layers=6, vocab_size=40), **changes)


def test_a_configuration_round_trips_and_unknown_keys_are_named() -> None:
    config = head_for(lm(layers=6, vocab_size=40)).config
    assert EagleConfig.from_json(config.to_json()) == config
    with pytest.raises(InvalidValue, match="did you mean 'hidden_size'"):
        EagleConfig.from_json(config.to_json() | {"hiden_size": 1})
    with pytest.raises(InvalidValue, match="lacks hidden_size"):
        EagleConfig.from_json({k: v for k, v in config.to_json().items() if k != "hidden_size"})


def test_default_layers_are_2_half_and_l_minus_3_clamped_without_repeats() -> None:
    assert default_aux_layers(32) == (2, 16, 29)
    assert default_aux_layers(6) == (2, 3)
    assert default_aux_layers(1) == (1,) and default_aux_layers(2) == (1,)
    assert default_aux_layers(12, version=1) == (12,)


# --- directories


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Path]:
    """A target directory and a directory of a head for it, without a manifest."""
    target = write_lm(tmp_path / "target", layers=6)
    head = head_for(lm(layers=6), draft_vocab_size=64)
    head.set_draft_vocabulary(torch.arange(64) * 5)
    directory = tmp_path / "head"
    directory.mkdir()
    save_file({k: v.contiguous() for k, v in head.state_dict().items()}, directory / "model.safetensors")
    text = json.dumps({"architectures": ["EagleHead"], "vocab_size": 320, "eagle": head.config.to_json()})
    (directory / "config.json").write_text(text)
    return target, directory


def test_a_directory_is_read_back_bit_by_bit(exported: tuple[Path, Path]) -> None:
    head = read_head(exported[1])
    stored = load_file(exported[1] / "model.safetensors")
    assert set(stored) == set(shapes(head.config)) == set(head.state_dict())
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in stored.items())


def test_it_decodes_through_load_and_registry_on_a_packed_native_target(exported: tuple[Path, Path]) -> None:
    target_dir, directory = exported
    add_manifest(
        directory,
        "eagle",
        vocab_size=320,
        target=TargetCoupling(couplings.target_fingerprint(target_dir), "target"),
        aux_layers=AuxLayers((2, 3), "after"),
    )
    target, draft = load(target_dir), load(directory)
    requests = [TokenRequest([5, 6, 7], 24)]
    plain = registry.build("autoregressive", {"target": target}).decode(requests)
    for settings in ({}, {"policy": "fixed"}):
        found = registry.build("tree", {"target": target, "draft": draft}, settings=settings).decode(requests)
        assert found.output == plain.output and sum(found.rounds.drafted) > 0
    with pytest.raises(InvalidValue, match="no transformers class"):
        load(directory, engine="hf")
