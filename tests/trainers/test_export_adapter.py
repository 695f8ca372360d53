"""`draftsmith export --adapter`: a PEFT directory that peft, transformers and `load` put onto its base alike."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from draftsmith.inference import load
from draftsmith.inference import manifest as manifests
from draftsmith.inference.checkpoint import hash_files
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue
from draftsmith.inference.loader import LoadedPart, check_pair
from draftsmith.inference.manifest import Seal, SealCheck
from draftsmith.modules.emo_lm import EMOLM
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lm import LM
from draftsmith.modules.lora import LoRAConfig
from draftsmith.trainers import export
from tests.tiny import write_lm
from tests.tiny_run import finish, make_place, start

pytest.importorskip("peft", reason="peft is not installed: pip install 'draftsmith[lora]'")

TOKENS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm(tmp_path_factory.mktemp("base") / "base")


def adapted(base: Path, lora: LoRAConfig | None = None, dtype: str = "float32") -> EMOLM:
    """A module whose adapters are not zero, as if trained."""
    module = EMOLM(HFModel(path=str(base), dtype=dtype), lora=lora or LoRAConfig(4, alpha=6.0))
    module.configure_model()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return module.eval()


@pytest.fixture(scope="module")
def module(base: Path) -> EMOLM:
    return adapted(base)


@pytest.fixture(scope="module")
def exported(module: EMOLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "adapter"
    export.write(module.export_spec(adapter=True), out)
    return out


@pytest.fixture
def instant_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    seal = Seal("0" * 64, 2, 48, 1.0, (SealCheck("float32", "nobody", 0.0, 1e-4),))
    monkeypatch.setattr(export, "run_seal", lambda directory, inputs: seal)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def engine_logits(part: LoadedPart) -> torch.Tensor:
    hidden, _ = part.part.forward(TOKENS, cache=part.part.new_cache(2, 24))
    return part.part.head(hidden)


def plain(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(base))


class TestWhatIsWritten:
    def test_peft_and_transformers_load_it_onto_the_base(self, base: Path, module: EMOLM, exported: Path) -> None:
        from peft import PeftModel

        wanted = logits(module.net)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(plain(base), str(exported))), wanted)
        torch.testing.assert_close(logits(plain(exported)), wanted)  # transformers follows base_model_name_or_path
        assert (logits(plain(base)) - wanted).abs().max() > 0.1  # the control: the adapter says something

    def test_load_adds_it_in_without_peft(self, base: Path, module: EMOLM, exported: Path) -> None:
        part = load(exported)
        assert part.kind == "adapter" and part.tokenizer is not None and part.stop_ids == (1,)
        torch.testing.assert_close(engine_logits(part), logits(module.net), atol=1e-4, rtol=1e-4)
        assert check_pair(part, load(base)) == 300  # the base drafts for it
        with pytest.raises(InvalidType, match="it can be target, not draft"):
            check_pair(load(base), part)

    def test_the_files_and_the_manifest(self, base: Path, module: EMOLM, exported: Path) -> None:
        manifest = manifests.read(exported)
        assert manifest is not None and manifest.seal is not None and manifest.couplings.target is not None
        assert (manifest.kind, manifest.net, manifest.dtype) == ("adapter", "LlamaForCausalLM", "float32")
        assert manifest.couplings.target.fingerprint == target_fingerprint(base)
        assert manifest.couplings.trained["emo"]["mode"] == "mle_anchored"
        (check,) = manifest.seal.checks
        assert 0 < check.max_abs_difference < check.tolerance and check.compute_dtype == "float32"
        stored = load_file(exported / "adapter_model.safetensors")
        assert stored and all(".lora_" in name and "default" not in name for name in stored)
        assert not (exported / "model.safetensors").exists() and not list(exported.glob("*.md"))
        settings = json.loads((exported / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(base) and settings["inference_mode"]
        assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 6.0, "LORA")
        kept: Any = module.net
        assert not kept.peft_config["default"].inference_mode  # the module's own settings are left alone

    def test_stored_in_bfloat16_it_is_held_to_its_rounded_numbers(self, module: EMOLM, tmp_path: Path) -> None:
        manifest = export.write(module.export_spec(adapter=True), tmp_path / "half", dtype="bfloat16")
        assert manifest.seal is not None
        low, exact = manifest.seal.checks
        assert (low.compute_dtype, exact.compute_dtype) == ("bfloat16", "float32")
        assert exact.max_abs_difference < 1e-4 < low.max_abs_difference < low.tolerance
        stored = load_file(tmp_path / "half" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}

    def test_a_family_of_the_adapter_engine_with_transposed_maps(self, tmp_path: Path, instant_seal: None) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
        module = adapted(tmp_path / "gpt2", LoRAConfig(4, targets=("c_attn", "c_proj")))
        export.write(dataclasses.replace(module.export_spec(adapter=True), tokenizer_dir=None), tmp_path / "out")
        torch.testing.assert_close(engine_logits(load(tmp_path / "out")), logits(module.net), atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_a_module_that_differs_from_base_plus_adapter_gives_no_export(self, base: Path, tmp_path: Path) -> None:
        """The negative control: a frozen weight that was changed is not in the adapter."""
        module = adapted(base)
        net: Any = module.net
        with torch.no_grad():
            net.model.norm.weight += 0.5
        with pytest.raises(
            InvalidState, match=r"the export differs from LlamaForCausalLM as trained by .* nothing was"
        ):
            export.write(module.export_spec(adapter=True), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_runs_without_an_adapter_or_a_base(self, base: Path) -> None:
        whole = EMOLM(HFModel(path=str(base)))
        whole.configure_model()
        with pytest.raises(InvalidValue, match=r"the run has no model\.lora"):
            export._spec(whole, None, adapter=True)
        with pytest.raises(InvalidValue, match="LM trains no adapter: leave --adapter out"):
            export._spec(LM(HFModel(path=str(base))), None, adapter=True)
        with pytest.raises(InvalidValue, match="has one adapter to export: leave --draft out"):
            export._spec(whole, "main", adapter=True)

    def test_a_base_that_moved_is_found_beside_the_export_and_another_one_is_refused(
        self, base: Path, tmp_path: Path, instant_seal: None
    ) -> None:
        first = tmp_path / "first" / "base"
        shutil.copytree(base, first)
        module = adapted(first)
        export.write(module.export_spec(adapter=True), tmp_path / "exports" / "adapter")
        shutil.move(first, tmp_path / "exports" / "base")
        torch.testing.assert_close(
            engine_logits(load(tmp_path / "exports" / "adapter")), logits(module.net), atol=1e-4, rtol=1e-4
        )
        shutil.rmtree(tmp_path / "exports" / "base")
        with pytest.raises(InvalidValue, match=r"is an adapter for base, which is neither at .*first/base nor at"):
            load(tmp_path / "exports" / "adapter")
        write_lm(tmp_path / "exports" / "base", seed=9)
        with pytest.raises(InvalidValue, match="give the base model that it was trained on"):
            load(tmp_path / "exports" / "adapter")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"use_dora": True}, r"only plain LoRA is known here \(use_dora\): use peft"),
            ("model.layers.0.mlp.no_proj", "the base model has no linear map model.layers.0.mlp.no_proj"),
            ("model.embed_tokens", r"model.embed_tokens is \[320, 32\] in the base"),
            (None, "lora_B.weight is missing"),
        ],
    )
    def test_adapters_that_are_more_or_less_than_ours(
        self, exported: Path, tmp_path: Path, change: Any, said: str
    ) -> None:
        shutil.copytree(exported, tmp_path / "out")
        arrays = load_file(tmp_path / "out" / "adapter_model.safetensors")
        names = sorted(name for name in arrays if "layers.0.mlp.up_proj" in name)
        if isinstance(change, dict):
            settings = json.loads((exported / "adapter_config.json").read_text())
            (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(settings | change))
        elif change is None:
            del arrays[names[1]]
        else:
            for name in names:
                arrays[name.replace("model.layers.0.mlp.up_proj", change)] = arrays.pop(name)
        save_file(arrays, tmp_path / "out" / "adapter_model.safetensors")
        manifest = manifests.read(exported)
        assert manifest is not None
        hashes = dataclasses.replace(manifest, files=hash_files(tmp_path / "out"))
        (tmp_path / "out" / "manifest.json").write_text(hashes.to_json())
        with pytest.raises(InvalidValue, match=said):
            load(tmp_path / "out")


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    place = make_place(tmp_path, steps=3)
    base = write_lm(place / "base", tokenizer=False, vocab_size=300, width=16, layers=1, max_length=64)
    config: dict[str, Any] = yaml.safe_load((place / "tiny.yaml").read_text())
    config["model"]["class_path"] = "draftsmith.modules.emo_lm.EMOLM"
    config["model"]["init_args"] |= {"model": {"path": "base"}, "lora": {"r": 2}}
    (place / "tiny.yaml").write_text(yaml.safe_dump(config))
    finish(start(place, "fit", "-c", "tiny.yaml", "--run", "lora"))
    out, _ = finish(start(place, "export", "lora", "out", "--checkpoint", "last", "--adapter"))
    assert "adapter: a LoRA adapter in the PEFT layout" in out
    part = load(place / "out")
    assert part.kind == "adapter" and part.manifest is not None and part.manifest.couplings.target is not None
    assert part.manifest.couplings.target.fingerprint == target_fingerprint(base)
    _, err = finish(start(place, "export", "lora", "no", "--adapter", "--kind", "lm"), code=2)
    assert err == "error: --adapter writes kind 'adapter', not 'lm': leave --kind out\n"
