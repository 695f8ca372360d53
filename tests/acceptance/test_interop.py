"""Acceptance of the export formats (interop.md, small-scale items 1, 2, 3 and 5) in the readers' own code.

Items 1 to 3 need the speculators library (`make interop-test` puts it into .interop, apart from .venv) and are skipped
without it; item 4 is tests/inference/test_formats.py. Item 5 runs on transformers alone.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.inference.formats import convert, read_drafter, specforge, speculators
from draftsmith.inference.formats.record import DrafterRecord
from draftsmith.inference.hypotheses.subjects import target_matrices
from draftsmith.inference.nets.eagle_head import EagleConfig, EagleHead, load_tensors
from draftsmith.modules.eagle_rollout import rollout
from tests.eagles import LAYERS, toy_config, toy_record, write_target
from tests.figures import ROOT, record
from tests.tiny import write_lm

SLUG = "interop"
FILES = ("inference/formats/*.py", "inference/nets/eagle_head.py", "modules/eagle_rollout.py")
TOKENS = 12
LIBRARY = ROOT / ".interop"

pytestmark = pytest.mark.acceptance

CONFIGS: dict[str, EagleConfig] = {
    "plain": toy_config(),
    "normed residual": toy_config(norm_before_residual=True),
    "one norm before fc": toy_config(norm_before_fc=True),
    "a norm for each state": toy_config(fc_norm=True),
    "normed output": toy_config(norm_output=True),
    "qwen3": toy_config(family="qwen3"),
    "whole vocabulary": toy_config(draft_vocab_size=64),
    "llama3 rope": toy_config(
        rope={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
}


@pytest.fixture(scope="module")
def library() -> Any:
    """The speculators package, behind everything that .venv has itself."""
    if LIBRARY.is_dir():
        sys.path.append(str(LIBRARY))
    return pytest.importorskip("speculators", reason="speculators is not installed: make interop-test")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def exported(config: EagleConfig, out: Path, target: Path) -> DrafterRecord:
    found = toy_record(config, seed=5)
    out.mkdir()
    speculators.write(found, out, verifier=target)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_1_speculators_loads_our_export(name: str, library: Any, target: Path, tmp_path: Path) -> None:
    ours = exported(CONFIGS[name], tmp_path / "out", target)
    config = library.SpeculatorModelConfig.from_pretrained(tmp_path / "out")
    assert type(config).__name__ == "Eagle3SpeculatorConfig"
    assert config.eagle_aux_hidden_state_layer_ids == list(CONFIGS[name].aux_layers)
    assert config.draft_vocab_size == CONFIGS[name].draft_vocab_size
    model = library.SpeculatorModel.from_pretrained(tmp_path / "out")
    theirs = model.state_dict()
    assert set(theirs) - set(ours.tensors) <= {"verifier_norm.weight", "verifier_lm_head.weight"}
    for tensor_name, tensor in ours.tensors.items():
        assert torch.equal(theirs[tensor_name], tensor), tensor_name
    assert not any(tensor.isnan().any() for tensor in theirs.values() if tensor.is_floating_point())
    record(SLUG, {f"speculators loads ours: {name}": True}, (5,), FILES)


@pytest.mark.parametrize("name", CONFIGS)
def test_2_logits_equal_those_of_the_speculators_class(name: str, library: Any, target: Path, tmp_path: Path) -> None:
    """Three steps of training-time test on the same states and tokens; their logits are caught at their head."""
    from speculators.models.eagle3 import Eagle3DraftModel

    ours = exported(CONFIGS[name], tmp_path / "out", target)
    config = library.SpeculatorModelConfig.from_pretrained(tmp_path / "out")
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel(config)
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    assert not unexpected and all(key.startswith("verifier_") for key in missing), (missing, unexpected)
    model.eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (1, TOKENS), generator=generator)
    states = torch.randn(1, TOKENS, CONFIGS[name].feature_size, generator=generator)
    caught: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _, __, out: caught.append(out.detach()))
    with torch.no_grad():
        drafted = model(
            hidden_states=states[:, :-1],
            input_ids=tokens[:, 1:],
            document_ids=torch.zeros(1, TOKENS - 1, dtype=torch.long),
            position_ids=torch.arange(TOKENS - 1).unsqueeze(0),
            ttt_steps=3,
        )
    handle.remove()
    head = EagleHead(CONFIGS[name])
    load_tensors(head, ours.tensors, name)
    head.eval()
    gap = 0.0
    with torch.no_grad():
        outs = rollout(head, head.embed(tokens), head.project(states[:, :-1]), 3)
        for k, out in enumerate(outs):
            rows = TOKENS - 1 - k  # rows whose tokens are there: theirs reads id 0 behind the end
            mine, theirs = head.logits(out)[:, :rows], caught[k][:, :rows]
            gap = max(gap, float((mine - theirs).abs().max()))
            assert torch.equal(mine.argmax(-1), drafted[k][:, :rows]), f"step {k}"
    record(SLUG, {f"largest logit difference: {name}": {"value": gap, "need": "<= 1e-4"}}, (1, 5), FILES)
    assert gap <= 1e-4


def test_3_the_speculators_converter_reads_our_specforge_export(library: Any, target: Path, tmp_path: Path) -> None:
    from speculators.convert.eagle.eagle3_converter import Eagle3Converter

    ours = toy_record(toy_config(own_embedding=False), seed=6)
    (tmp_path / "out").mkdir()
    specforge.write(ours, tmp_path / "out", target_layers=LAYERS)
    Eagle3Converter().convert(
        tmp_path / "out",
        tmp_path / "converted",
        base_model=str(target),
        validate=False,
        eagle_aux_hidden_state_layer_ids=[2, 4, 5],
    )
    theirs = load_file(tmp_path / "converted" / "model.safetensors")
    for name, tensor in ours.tensors.items():
        assert torch.equal(theirs[name], tensor), name
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["norm_before_residual"] is False
    again = read_drafter(tmp_path / "converted", target=target)  # and what they wrote is read by us
    assert isinstance(again.fields, EagleConfig) and isinstance(ours.fields, EagleConfig)
    embedding = {name: t for name, t in again.tensors.items() if name == "embed_tokens.weight"}
    assert not embedding or torch.equal(embedding["embed_tokens.weight"], target_matrices(target)["embedding"])
    same = dataclasses.replace(again.fields, own_embedding=False, max_positions=ours.fields.max_positions)
    assert same == ours.fields
    record(SLUG, {"speculators converts our SpecForge export": True}, (6,), FILES)


def test_5_transformers_assists_with_our_export(tmp_path: Path) -> None:
    """Assisted greedy text is plain greedy text, and as many tokens are drafted as we wrote into the export."""
    from transformers import AutoModelForCausalLM
    from transformers.generation.candidate_generator import AssistedCandidateGenerator

    big = write_lm(tmp_path / "target", seed=0)
    convert(write_lm(tmp_path / "draft", seed=1), tmp_path / "out", "hf", measured={"draft_length": 3})
    target = AutoModelForCausalLM.from_pretrained(big)
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    asked: list[int] = []
    original = AssistedCandidateGenerator.get_candidates

    def counted(self: Any, input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = original(self, input_ids, *args, **options)
        asked.append(found[0].shape[1] - input_ids.shape[1])
        return found

    AssistedCandidateGenerator.get_candidates = counted
    try:
        for prompt in ([2, 3, 4], [9, 8, 7, 6], [250, 30]):
            ids = torch.tensor([prompt])
            options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            plain = target.generate(ids, **options)
            assisted = target.generate(ids, assistant_model=assistant, **options)
            assert torch.equal(plain, assisted)
    finally:
        AssistedCandidateGenerator.get_candidates = original
    assert max(asked) == 3 and asked.count(3) > len(asked) / 2  # less at the end of a text
    record(SLUG, {"assisted greedy equals plain greedy": True, "assistant tokens asked for": max(asked)}, (0, 1), FILES)
