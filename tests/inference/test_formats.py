"""Drafter formats of other engines: golden names, shapes and dtypes, round trips, detection, all problems at once."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.formats import (
    DrafterRecord,
    MedusaFields,
    convert,
    detect,
    eagle,
    medusa,
    read_drafter,
    specforge,
    speculators,
)
from draftsmith.inference.formats.files import rope_of
from draftsmith.inference.formats.hf_assistant import assistant_settings
from draftsmith.inference.nets.eagle_head import EagleConfig, EagleHead, load_tensors
from tests.eagles import AUX, LAYERS, eagle1_config, toy_config, toy_record, write_target
from tests.tiny import write_lm

# Names, shapes and dtypes as the readers' own code has them (V=64, Vd=16, H=32, 4 heads of 8, 2 kv heads, I=48, L=8).
LAYER: dict[str, tuple[list[int], str]] = {
    "self_attn.q_proj.weight": ([32, 64], "float32"),
    "self_attn.k_proj.weight": ([16, 64], "float32"),
    "self_attn.v_proj.weight": ([16, 64], "float32"),
    "self_attn.o_proj.weight": ([32, 32], "float32"),
    "mlp.gate_proj.weight": ([48, 32], "float32"),
    "mlp.up_proj.weight": ([48, 32], "float32"),
    "mlp.down_proj.weight": ([32, 48], "float32"),
    "hidden_norm.weight": ([32], "float32"),
    "input_layernorm.weight": ([32], "float32"),
    "post_attention_layernorm.weight": ([32], "float32"),
}
AROUND: dict[str, tuple[list[int], str]] = {
    "fc.weight": ([32, 96], "float32"),
    "norm.weight": ([32], "float32"),
    "lm_head.weight": ([16, 32], "float32"),
    "d2t": ([16], "int64"),
    "t2d": ([64], "bool"),
    "embed_tokens.weight": ([64, 32], "float32"),
}
SPECULATORS = AROUND | {f"layers.0.{name}": row for name, row in LAYER.items()}
EAGLE_3 = AROUND | {f"midlayer.{name}": row for name, row in LAYER.items()}
EAGLE_1: dict[str, tuple[list[int], str]] = {
    "embed_tokens.weight": ([64, 32], "float32"),
    "fc.weight": ([32, 64], "float32"),
    "fc.bias": ([32], "float32"),
    "layers.0.self_attn.q_proj.weight": ([32, 32], "float32"),
    "layers.0.self_attn.k_proj.weight": ([16, 32], "float32"),
    "layers.0.self_attn.v_proj.weight": ([16, 32], "float32"),
    "layers.0.self_attn.o_proj.weight": ([32, 32], "float32"),
    "layers.0.mlp.gate_proj.weight": ([48, 32], "float32"),
    "layers.0.mlp.up_proj.weight": ([48, 32], "float32"),
    "layers.0.mlp.down_proj.weight": ([32, 48], "float32"),
    "layers.0.post_attention_layernorm.weight": ([32], "float32"),
}
MEDUSA: dict[str, tuple[list[int], str]] = {
    "0.0.linear.weight": ([8, 8], "float32"),
    "0.0.linear.bias": ([8], "float32"),
    "0.1.weight": ([12, 8], "float32"),
    "1.0.linear.weight": ([8, 8], "float32"),
    "1.0.linear.bias": ([8], "float32"),
    "1.1.weight": ([12, 8], "float32"),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def write(record: DrafterRecord, directory: Path, to: str, target: Path) -> Path:
    directory.mkdir(parents=True)
    if to == "speculators":
        speculators.write(record, directory, verifier=target)
    elif to == "specforge":
        specforge.write(record, directory, target_layers=LAYERS)
    elif to == "eagle":
        eagle.write(record, directory, target_layers=LAYERS)
    else:
        medusa.write(record, directory)
    return directory


def table(directory: Path, name: str = "model.safetensors") -> dict[str, tuple[list[int], str]]:
    stored = load_file(directory / name)
    return {key: (list(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in stored.items()}


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def medusa_record() -> DrafterRecord:
    fields = MedusaFields(heads=2, layers=1, hidden_size=8, vocab_size=12, base="some/target")
    return DrafterRecord(fields, {name: torch.randn(shape) for name, shape in medusa.medusa_shapes(fields).items()})


@pytest.mark.parametrize(
    "to, config, golden",
    [
        ("speculators", toy_config(), SPECULATORS),
        ("specforge", toy_config(), EAGLE_3),
        ("eagle", toy_config(), EAGLE_3),
        ("eagle", eagle1_config(), EAGLE_1),
    ],
    ids=["speculators", "specforge", "eagle3", "eagle1"],
)
def test_golden_names_shapes_and_dtypes(
    to: str, config: EagleConfig, golden: dict[str, Any], target: Path, tmp_path: Path
) -> None:
    out = write(toy_record(config), tmp_path / "out", to, target)
    assert table(out) == golden


def test_golden_medusa(tmp_path: Path, target: Path) -> None:
    record = medusa_record()
    out = write(record, tmp_path / "out", "medusa", target)
    assert table(out, "medusa_lm_head.safetensors") == MEDUSA
    stated = json.loads((out / "config.json").read_text())
    assert (stated["medusa_num_heads"], stated["medusa_num_layers"]) == (2, 1)
    assert stated["base_model_name_or_path"] == "some/target"
    again = read_drafter(out)
    assert again.fields == record.fields and same(again.tensors, record.tensors)


def test_golden_variants_of_speculators(target: Path, tmp_path: Path) -> None:
    qwen = toy_config(family="qwen3", norm_before_fc=True, own_embedding=False)
    found = table(write(toy_record(qwen), tmp_path / "qwen", "speculators", target))
    added = {"layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight", "input_norm.weight"}
    assert found.keys() == (SPECULATORS.keys() | added) - {"embed_tokens.weight"}
    assert found["input_norm.weight"] == ([96], "float32")
    assert found["layers.0.self_attn.q_norm.weight"] == ([8], "float32")
    parts = toy_config(fc_norm=True, draft_vocab_size=64)
    found = table(write(toy_record(parts), tmp_path / "parts", "speculators", target))
    assert found.keys() == (SPECULATORS.keys() | {f"fc_norm.{i}.weight" for i in range(3)}) - {"d2t", "t2d"}


def test_configuration_of_speculators(target: Path, tmp_path: Path) -> None:
    out = write(toy_record(), tmp_path / "out", "speculators", target)
    stated = json.loads((out / "config.json").read_text())
    layer = stated.pop("transformer_layer_config")
    assert stated == {
        "speculators_model_type": "eagle3",
        "architectures": ["Eagle3DraftModel"],
        "speculators_version": "0.9.0",
        "dtype": "float32",
        "draft_vocab_size": 16,
        "target_hidden_size": None,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": str(target.resolve()), "architectures": ["LlamaForCausalLM"]},
        },
    }
    assert layer["rope_theta"] == 10000.0
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert layer["model_type"] == "llama" and layer["num_hidden_layers"] == 1 and layer["vocab_size"] == 64


def test_vllm_takes_ours_and_each_required_key_is_needed(target: Path, tmp_path: Path) -> None:
    out = write(toy_record(), tmp_path / "out", "speculators", target)
    stated, names = json.loads((out / "config.json").read_text()), list(table(out))
    assert speculators.vllm_problems(stated, names, found=True) == []
    assert len(speculators.REQUIRED_BY_VLLM) == 5
    for key in speculators.REQUIRED_BY_VLLM:
        broken = json.loads(json.dumps(stated))
        holder: Any = broken
        *above, last = key.split(".")
        for part in above:
            holder = holder[int(part)] if part.isdigit() else holder[part]
        if last.isdigit():
            holder.clear()
        else:
            del holder[last]
        assert f"{key} is missing" in speculators.vllm_problems(broken, names, found=True)
    assert "typo.weight would be skipped in silence" in speculators.vllm_problems(stated, ["typo.weight"], found=True)
    assert "the verifier's path does not exist" in speculators.vllm_problems(stated, names, found=False)


def test_four_states_are_told_to_vllm(target: Path, tmp_path: Path) -> None:
    out = write(toy_record(toy_config(aux_layers=(1, 2, 4, 5))), tmp_path / "out", "speculators", target)
    stated = json.loads((out / "config.json").read_text())
    assert speculators.vllm_problems(stated, [], found=True) == []
    del stated["transformer_layer_config"]["num_aux_hidden_states"]
    assert "4 ids, but vLLM makes fc for 3 states" in speculators.vllm_problems(stated, [], found=True)


SOUND: dict[str, tuple[str, EagleConfig]] = {
    "speculators": ("speculators", toy_config()),
    "speculators, whole vocabulary": ("speculators", toy_config(draft_vocab_size=64)),
    "speculators, target's embedding": ("speculators", toy_config(own_embedding=False)),
    "speculators, other width": ("speculators", toy_config(target_hidden_size=48)),
    "speculators, every flag": (
        "speculators",
        toy_config(norm_before_residual=True, fc_norm=True, norm_output=True, family="qwen3", attention_bias=True),
    ),
    "speculators, llama3 rope": (
        "speculators",
        toy_config(
            rope={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        ),
    ),
    "specforge": ("specforge", toy_config()),
    "specforge, whole vocabulary": ("specforge", toy_config(draft_vocab_size=64, own_embedding=False)),
    "specforge, ids given": ("specforge", toy_config(aux_layers=(2, 3, 6), fc_norm=True)),
    "specforge, first id 3": ("specforge", toy_config(aux_layers=(3, 4, 5))),
    "eagle3": ("eagle", toy_config(own_embedding=False)),
    "eagle3, linear rope": (
        "eagle",
        toy_config(rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    ),
    "eagle1": ("eagle", eagle1_config()),
    "eagle1, no bias": ("eagle", replace(eagle1_config(), fc_bias=False)),
}


@pytest.mark.parametrize("case", SOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(case: str, dtype: torch.dtype, target: Path, tmp_path: Path) -> None:
    to, config = SOUND[case]
    record = toy_record(config, dtype=dtype)
    out = write(record, tmp_path / "out", to, target)
    assert detect(out).format == to
    again = read_drafter(out, target=target)
    assert again.fields == config
    assert same(again.tensors, record.tensors)
    head = EagleHead(config).to(dtype)
    load_tensors(head, dict(again.tensors), str(out))  # what the trainer's warm start does


def test_ids_by_the_convention_of_each_reader(target: Path, tmp_path: Path) -> None:
    record = toy_record(toy_config(aux_layers=(2, 3, 6)))
    ours = json.loads((write(record, tmp_path / "a", "speculators", target) / "config.json").read_text())
    assert ours["eagle_aux_hidden_state_layer_ids"] == [2, 3, 6]  # inputs of layers: hidden_states[i]
    theirs = json.loads((write(record, tmp_path / "b", "specforge", target) / "config.json").read_text())
    assert theirs["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 5]  # outputs of layers
    default = json.loads((write(toy_record(), tmp_path / "c", "specforge", target) / "config.json").read_text())
    assert "eagle_config" not in default  # absent: SGLang's default means what ours does
    assert specforge.ids_for_sglang(AUX) == [1, 3, 4]
    for layers in ((2, 4, 5), (3, 4, 5), (0, 2, 4)):
        ids = specforge.ids_for_sglang(layers)
        assert ids is not None and specforge.ids_from_sglang(ids) == layers
    with pytest.raises(InvalidValue, match=r"first state is hidden_states\[1\]"):
        write(toy_record(toy_config(aux_layers=(1, 2, 3))), tmp_path / "d", "specforge", target)
    with pytest.raises(InvalidValue, match=r"the EAGLE code always \[2, 4, 5\]"):
        write(record, tmp_path / "e", "eagle", target)


def test_silent_files_need_the_targets_depth(target: Path, tmp_path: Path) -> None:
    out = write(toy_record(), tmp_path / "out", "specforge", target)
    with pytest.raises(InvalidValue, match="give the target"):
        read_drafter(out)
    assert read_drafter(out, target_layers=12).fields == toy_config(aux_layers=(2, 6, 9))
    with pytest.raises(InvalidValue, match=r"outside 0\.\.4"):
        read_drafter(write(toy_record(), tmp_path / "ids", "speculators", target), target_layers=4)


def test_every_problem_is_listed_at_once(target: Path, tmp_path: Path) -> None:
    config = toy_config(norm_before_residual=True)
    tensors = dict(toy_record(config).tensors)
    tensors["fc.weight"] = tensors["fc.weight"].clone()
    tensors["fc.weight"][0, 0] = float("nan")
    tensors["norm.weight"] = torch.ones(3)
    tensors["t2d"] = torch.ones(64, dtype=torch.bool)
    tensors["stray.weight"] = torch.ones(1)
    del tensors["lm_head.weight"]
    with pytest.raises(InvalidValue) as error:
        write(DrafterRecord(config, tensors), tmp_path / "out", "eagle", target)
    text = str(error.value)
    for part in (
        "6 problems",
        "lm_head.weight is missing, it should be [16, 32]",
        "stray.weight [1] belongs to no such drafter",
        "norm.weight is [3], it should be [32]",
        "fc.weight holds NaN or infinity",
        "t2d marks 64 ids, draft_vocab_size is 16",
        "norm_before_residual is on, which the EAGLE code does not read",
    ):
        assert part in text, text
    assert not any((tmp_path / "out").iterdir())


def test_wrong_maps_are_refused(target: Path, tmp_path: Path) -> None:
    record = toy_record()
    tensors = dict(record.tensors)
    tensors["d2t"] = tensors["d2t"] + torch.arange(16)  # ids where offsets belong
    with pytest.raises(InvalidValue, match="d2t holds offsets, not ids"):
        write(DrafterRecord(record.fields, tensors), tmp_path / "out", "speculators", target)
    tensors = {k: v for k, v in record.tensors.items() if k != "t2d"}
    with pytest.raises(InvalidValue, match="they come as a pair"):
        write(DrafterRecord(record.fields, tensors), tmp_path / "pair", "speculators", target)


def test_what_a_format_cannot_hold(target: Path, tmp_path: Path) -> None:
    one = toy_record(eagle1_config())
    with pytest.raises(InvalidType, match="EAGLE-3 drafters only"):
        write(one, tmp_path / "a", "speculators", target)
    with pytest.raises(InvalidType, match="EAGLE-3 drafters only"):
        write(one, tmp_path / "b", "specforge", target)
    with pytest.raises(InvalidValue, match="name the target with --target"):
        write(toy_record(), tmp_path / "c", "speculators", tmp_path / "nowhere")
    with pytest.raises(InvalidValue, match="Llama layers only"):
        write(toy_record(toy_config(family="qwen3")), tmp_path / "d", "specforge", target)


def test_detection_names_its_evidence(target: Path, tmp_path: Path) -> None:
    assert detect(target).format == "hf"
    three = write(toy_record(), tmp_path / "three", "eagle", target)
    assert "midlayer.* tensors" in detect(three).evidence
    config = json.loads((three / "config.json").read_text())
    (three / "config.json").write_text(json.dumps(config | {"medusa_num_heads": 3}))
    with pytest.raises(InvalidValue, match=r"fits several formats \(medusa: .*eagle: .*--from FORMAT"):
        detect(three)
    assert read_drafter(three, target=target, format="eagle").fields == toy_config()
    empty = tmp_path / "empty"
    empty.mkdir()
    save_file({"x": torch.ones(1)}, empty / "model.safetensors")
    (empty / "config.json").write_text("{}")
    with pytest.raises(InvalidValue, match="no known drafter format"):
        detect(empty)


def test_pickles_are_refused_unless_asked_for(target: Path, tmp_path: Path) -> None:
    record = toy_record()
    out = write(record, tmp_path / "out", "eagle", target)
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    with pytest.raises(InvalidValue, match=r"is a pickle.*--allow-pickle"):
        read_drafter(out, target=target)
    again = read_drafter(out, target=target, allow_pickle=True)
    assert same(again.tensors, record.tensors)
    torch.save({"fc.weight": Evil()}, out / "pytorch_model.bin")
    with pytest.raises(InvalidValue, match="more than tensors"):
        read_drafter(out, target=target, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


class Evil:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_rope_in_either_form() -> None:
    assert rope_of({}) == ({"rope_type": "default", "rope_theta": 10000.0}, [])
    assert rope_of({"rope_theta": 5e5})[0] == {"rope_type": "default", "rope_theta": 5e5}
    old = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope_of(old)[0] == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    both, notes = rope_of({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert both["rope_theta"] == 1e6 and "disagree" in notes[0]


def test_convert_between_all_formats_that_can_hold_it(target: Path, tmp_path: Path) -> None:
    record = toy_record()
    here = write(record, tmp_path / "0", "speculators", target)
    for step, to in enumerate(("specforge", "eagle", "speculators"), 1):
        convert(here, tmp_path / str(step), to, target=target)
        here = tmp_path / str(step)
    again = read_drafter(here, target=target)
    assert again.fields == record.fields and same(again.tensors, record.tensors)
    with pytest.raises(InvalidValue, match="not empty"):
        convert(here, tmp_path / "1", "eagle", target=target)
    with pytest.raises(InvalidValue, match="cannot become 'hf'"):
        convert(here, tmp_path / "9", "hf", target=target)
    with pytest.raises(InvalidValue, match="did you mean 'speculators'"):
        convert(here, tmp_path / "9", "speculator", target=target)
    assert not (tmp_path / "9").exists()


def test_hf_assistant_states_what_was_measured(tmp_path: Path) -> None:
    source = write_lm(tmp_path / "lm")
    convert(source, tmp_path / "out", "hf", measured={"draft_length": 3})
    stated = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stated["num_assistant_tokens"] == 3
    assert stated["num_assistant_tokens_schedule"] == "constant"
    assert stated["assistant_confidence_threshold"] == 0.0
    assert stated["eos_token_id"] == 1  # kept
    assert same(load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert assistant_settings({})["num_assistant_tokens"] == 20
    sure = assistant_settings({"draft_length": 8, "schedule": "confidence", "confidence_threshold": 0.7})
    assert sure["assistant_confidence_threshold"] == 0.7
    assert assistant_settings({"schedule": "heuristic"})["num_assistant_tokens_schedule"] == "heuristic"


def test_two_layers_are_refused(target: Path, tmp_path: Path) -> None:
    out = write(toy_record(), tmp_path / "out", "speculators", target)
    stated = json.loads((out / "config.json").read_text())
    stated["transformer_layer_config"]["num_hidden_layers"] = 2
    (out / "config.json").write_text(json.dumps(stated))
    with pytest.raises(InvalidValue, match="2 layers"):
        read_drafter(out)
    stated["speculators_model_type"] = "dflash"
    (out / "config.json").write_text(json.dumps(stated))
    with pytest.raises(InvalidValue, match=re.escape("of type 'dflash'")):
        read_drafter(out)


def test_truncated_weights_are_one_line(target: Path, tmp_path: Path) -> None:
    out = write(toy_record(), tmp_path / "out", "specforge", target)
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(InvalidValue, match="truncated or damaged"):
        read_drafter(out, target=target)
