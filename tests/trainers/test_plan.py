"""`draftsmith plan`: sizes without weights, the memory of a rank by hand, what the command prints, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftsmith.inference import cli
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lm import LM
from draftsmith.trainers import memory, networks, plan
from draftsmith.trainers.memory import Load, rank
from draftsmith.trainers.meta import StepTrace, fused_attention, trace_step
from tests.tiny import write_lm
from tests.tiny_run import make_place

SEVENTY_B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_place(tmp_path, steps=40)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


# --- networks without weights


def test_seventy_billion_parameters_take_no_memory() -> None:
    net = networks.weightless(HFModel(arch=SEVENTY_B)).build()
    assert networks.parameter_count(net) == 70_553_706_496  # as published for Llama 3 70B
    assert {p.device.type for p in net.parameters()} == {"meta"}


def test_a_directory_needs_its_config_alone(tmp_path: Path) -> None:
    write_lm(tmp_path / "x")
    real = networks.parameter_count(HFModel(path=str(tmp_path / "x")).build())
    (tmp_path / "x" / "model.safetensors").unlink()
    net = networks.weightless(HFModel(path=str(tmp_path / "x"))).build()
    assert networks.parameter_count(net) == real and next(net.parameters()).device.type == "meta"


def test_tied_weights_count_once() -> None:
    arch = {"model_type": "llama", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 16}
    arch |= {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    tied = networks.parameter_count(networks.weightless(HFModel(arch=arch)).build())
    apart = networks.parameter_count(networks.weightless(HFModel(arch={**arch, "tie_word_embeddings": False})).build())
    assert apart - tied == 100 * 16


# --- the trace of a step


def test_bytes_of_a_step_by_hand() -> None:
    net = nn.Sequential(nn.Linear(100, 200, bias=False, device="meta"), nn.ReLU(), nn.Linear(200, 50, device="meta"))
    x = torch.empty(1000, 100, device="meta")

    def loss() -> Tensor:
        return net(x).sum()

    trace = trace_step(loss, [net], [], "cpu")
    weights = 4 * (100 * 200 + 200 * 50 + 50)
    assert trace.parameters == trace.gradients == weights
    assert trace.largest_gradient == 4 * 100 * 200
    hidden, out = 4 * 1000 * 200, 4 * 1000 * 50
    # in ReLU's backward: what it kept, the gradient that came and the one that goes on
    assert 3 * hidden <= trace.backward(0.0) <= 3 * hidden + out
    assert trace.backward(1.0) >= trace.backward(0.0)
    assert hidden + out <= trace.forward <= 2 * hidden + out
    assert all(p.grad is None for p in net.parameters())


def test_recomputing_activations_is_seen() -> None:
    from types import SimpleNamespace

    from draftsmith.data.text import TextConfig, TextDataModule
    from draftsmith.trainers.workload import trace_batch

    arch = {**SEVENTY_B, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 300}
    arch |= {"num_key_value_heads": 4, "num_hidden_layers": 8}

    def peak(checkpointing: bool) -> int:
        subject: Any = SimpleNamespace(
            module=(module := LM(HFModel(arch=arch), gradient_checkpointing=checkpointing)),
            nets=networks.without_weights(module),
            data=TextDataModule(text=TextConfig(length=128, batch_size=8)),
        )
        return trace_batch(subject, None, "cpu").forward

    assert peak(True) < 0.5 * peak(False)


def test_fused_attention_stores_no_square() -> None:
    q = torch.empty(2, 4, 512, 16, device="meta", requires_grad=True)

    class Net(nn.Module):
        def forward(self) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum()

    square = 2 * 4 * 512 * 512 * 4
    assert trace_step(Net(), [], [], "cuda").backward() < square
    with fused_attention("cpu"):
        grouped = nn.functional.scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
    assert grouped.shape == q.shape


# --- the memory of a rank, by hand: 1000 parameters; 500 bytes of activations forward, 300 beside all gradients

P = 1000
EVENTS = [(500, 0), (400, 0), (4300, 4000), (4000, 4000)]
TRACE = StepTrace(parameters=4 * P, gradients=4 * P, largest_gradient=400, events=EVENTS, forward_events=1)


def load(**changes: Any) -> Load:
    given: dict[str, Any] = {"parameters": P, "largest": 100, "trace": TRACE, "weight_bytes": 4, "compute_bytes": 4}
    return Load(**(given | {"on_gpu": False, "teacher": 70, "serving": 0} | changes))


def test_the_trace_of_the_example() -> None:
    assert TRACE.forward == 500 and TRACE.backward() == 4300 and TRACE.backward(0.0) == 400


def test_one_process() -> None:
    found = rank(load(), 0, 1)
    assert found.always == {"weights": 4000, "optimizer": 8000, "costs": 0, "teacher": 70, "serving": 0}
    held = {"gradients": 4000, "buffers": 0}
    assert found.phases["forward"] == held | {"activations": 500}  # the last step's gradients are still there
    assert found.phases["backward"] == held | {"activations": 300}
    assert found.phases["optimizer"] == held | {"temporaries": 800}
    assert found.phase == "optimizer" and found.peak == 12070 + 4800


def test_ddp_has_buckets_beside_the_gradients() -> None:
    assert rank(load(), 0, 2).peak - rank(load(), 0, 1).peak == 4000


def test_a_gpu_steps_all_parameters_at_once() -> None:
    assert rank(load(on_gpu=True), 0, 1).phases["optimizer"]["temporaries"] == 4000


def test_autocast_copies_the_weights() -> None:
    found = rank(load(compute_bytes=2), 0, 1)
    assert found.always["weights"] == 4000 and found.phases["forward"]["activations"] == 500 + 2000


def test_zero_2_on_two_ranks() -> None:
    found = rank(load(), 2, 2)
    states = {"weights": 4000, "masters": 2000, "optimizer": 4000}
    assert found.always == states | {"costs": 0, "teacher": 70, "serving": 0}
    assert found.phases == {
        "forward": {"activations": 500},
        "backward": {"activations": 300, "buffers": 4000},
        "reduction": {"buffers": 4000, "temporaries": 4000, "gradients": 0},
        "optimizer": {"gradients": 4000, "temporaries": 4000},
    }


def test_zero_3_on_two_ranks() -> None:
    found = rank(load(), 3, 2)
    states = {"weights": 2000, "masters": 2000, "optimizer": 4000, "gradients": 2000, "buffers": 4000}
    assert found.always == states | {"costs": 0, "teacher": 70, "serving": 0}
    assert found.phases["forward"] == {"activations": 500, "gathered": 4000}
    assert found.phases["reduction"] == {"gathered": 4000, "temporaries": 2 * 4000}
    assert found.phases["optimizer"] == {"temporaries": 2000 + 4000}


def test_bf16_under_zero_keeps_float32_masters() -> None:
    found = rank(load(compute_bytes=2, on_gpu=True), 2, 4)
    assert found.always["weights"] == 2000 and found.always["masters"] == 1000 and found.always["optimizer"] == 2000
    third = rank(load(compute_bytes=2, on_gpu=True), 3, 4)
    assert third.always["weights"] == 500 and third.always["masters"] == 1000


def test_offload_leaves_the_gpu() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    found = rank(load(compute_bytes=2, on_gpu=True), 2, 4, offload)
    assert found.always["masters"] == found.always["optimizer"] == 0
    assert rank(load(), 2, 4, offload).always["optimizer"] == 2000  # a CPU rank has nowhere else to put it


def test_buckets_are_those_of_the_config() -> None:
    small = rank(load(), 2, 4, {"reduce_bucket_size": 100})
    assert small.phases["reduction"] == {"buffers": 400, "temporaries": 400, "gradients": 1000}  # of earlier buckets
    assert small.phases["backward"]["buffers"] == 400 and rank(load(), 2, 4).phases["backward"]["buffers"] == 4000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_share_more(stage: int) -> None:
    peaks = [rank(load(), stage, world).peak for world in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]
    states = [sum(rank(load(), stage, world).always.values()) for world in (1, 8)]
    assert states[1] < states[0]


# --- the command


def test_a_plan(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "-c", "tiny.yaml", "--step-seconds", "36")
    assert found["world_size"] == 1 and found["device"] == "cpu" and found["stage"] == 0
    assert [row["stage"] for row in found["memory_per_rank"]] == [0, 1, 2, 3]
    assert found["tokens_per_step"] == 4 * 32 and found["steps"] == 40 and found["tokens"] == 40 * 4 * 32
    assert found["hours"] == pytest.approx(0.4)
    count = found["parameters"]["net"]
    assert count == networks.parameter_count(LM(HFModel(arch=json.loads(json.dumps(_arch())))).spec.build())
    assert found["checkpoint_bytes"] == 12 * count and found["disk_bytes"] == 36 * count + 8 * count
    assert not Path("cache").exists() and not Path("runs").exists()


def _arch() -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(Path("tiny.yaml").read_text())
    return dict(content["model"]["init_args"]["model"]["arch"])


def test_the_table_and_its_notes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--trainer.devices", "2", "--trainer.strategy", "zero2")
    assert code == 0
    assert "memory of each of 2 CPU ranks" in out and "ZeRO-2 *" in out and "no ZeRO" in out
    assert "hours are left out: --measure" in out and "GPU is computed" not in out


def test_gpus_and_nodes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "-c", "tiny.yaml", "--gpus", "8", "--nodes=4")
    assert found["world_size"] == 32 and found["device"] == "cuda" and found["tokens_per_step"] == 32 * 4 * 32
    assert any("not measured" in note for note in found["notes"])


def test_a_run_without_an_end_and_one_by_epochs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endless = planned(capsys, "-c", "tiny.yaml", "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1")
    assert endless["steps"] is None and any("no planned end" in note for note in endless["notes"])
    unprepared = planned(capsys, "-c", "tiny.yaml", "--trainer.max_steps", "-1", "--trainer.max_epochs", "2")
    assert unprepared["steps"] is None and any("not prepared" in note for note in unprepared["notes"])


@pytest.mark.slow
def test_a_measured_step_is_a_real_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "-c", "tiny.yaml", "--measure", "--trainer.accumulate_grad_batches", "2")
    assert found["step_seconds"] > 0 and found["hours"] == pytest.approx(40 * found["step_seconds"] / 3600)
    epochs = planned(capsys, "-c", "tiny.yaml", "--trainer.max_steps", "-1", "--trainer.max_epochs", "2")
    assert epochs["steps"] > 0  # the data is prepared by now


def test_offline_osd_counts_its_teacher(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lm(Path("target"), vocab_size=300, width=64)
    write_lm(Path("draft"), vocab_size=300, width=32)
    words = (
        "-c",
        "osd/offline",
        "--model.teacher.path=target",
        "--model.draft.path=draft",
        "--trainer.accelerator=cpu",
    )
    found = planned(capsys, *words, "--data.text.tokenizer=target", "--trainer.max_steps=10")
    teacher = networks.parameter_count(HFModel(path="target").build())
    assert found["parameters"]["teacher"] == teacher
    assert all(row["always"]["teacher"] == 4 * teacher for row in found["memory_per_rank"])
    own = planned(capsys, *words, "--data.text.tokenizer=target", "--model.source=student")
    assert all(row["always"]["serving"] > 0 for row in own["memory_per_rank"])


def test_online_osd_counts_what_serves(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lm(Path("target"), vocab_size=300, width=64)
    write_lm(Path("draft"), vocab_size=300, width=32)
    found = planned(capsys, "-c", "osd/debug", "--data.target=target", "--model.draft.path=draft")
    target, draft = (networks.parameter_count(HFModel(path=name).build()) for name in ("target", "draft"))
    assert found["parameters"]["served target"] == target
    served = found["memory_per_rank"][0]["always"]["serving"]
    # caches: 4 requests of 8 + 16 + 3 tokens, 2 layers, keys and values of 2 heads, widths 16 and 8
    rows = 4 * (8 + 16 + 3) * 2 * 2 * 2 * 4
    assert served == 4 * target + 2 * 4 * draft + rows * 16 + rows * 8
    assert found["steps"] == 48 // 4 * 2


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ((), "nothing to plan"),
        (("-c", "tiny.yaml", "--gpus", "0"), "--gpus wants a number above 0, got '0'"),
        (("-c", "tiny.yaml", "--gpus", "many"), "'many'"),
        (("-c", "tiny.yaml", "--nodes"), "--nodes wants"),
        (("-c", "tiny.yaml", "--step-seconds", "nan"), "'nan'"),
        (("-c", "tiny.yaml", "--step-seconds", "1", "--measure"), "leave one of them out"),
        (("-c", "tiny.yaml", "--trainer.accelerator", "gpu", "--trainer.devices", "auto"), "give --gpus"),
        (
            (
                "-c",
                "osd/offline",
            ),
            "exports/",
        ),
        (
            (
                "-c",
                "nothing",
            ),
            "nothing",
        ),
    ],
)
def test_bad_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], word: str
) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and word in err and len(err.strip().splitlines()) == 1


def test_a_measurement_that_fails_says_why(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "-c", "tiny.yaml", "--measure", "--data.corpus.sources", "[nowhere.txt]")
    assert code == 2 and "cannot measure" in err and "nowhere.txt" in err


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "draftsmith plan -c lm/base" in out


def test_the_parts_of_the_table_are_those_of_a_rank() -> None:
    for stage in range(4):
        found = rank(load(), stage, 2)
        kinds = set(found.always) | {kind for phase in found.phases.values() for kind in phase}
        assert sum(plan._part(found, kind) for kind in kinds) == found.peak
    assert memory.REPLICATED == 0
