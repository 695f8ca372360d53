"""Issue 3's bars for strategies: loss curves, bytes per rank, one export from every checkpoint, what Lightning costs.

Two CPU ranks over gloo with the real DeepSpeed engine. About fifteen minutes: `make acceptance SYSTEM=scale`.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from draftsmith.data.served_log import read
from draftsmith.inference.cli import main
from draftsmith.trainers.export import rebuild
from tests.figures import record
from tests.tiny import write_lm
from tests.tiny_run import finish, make_place, start
from tests.zero_runs import curve, fit, ranks_of, samples, watch, zero

pytestmark = pytest.mark.acceptance

STEPS, BATCH = 30, 4
FILES = (  # what these figures depend on
    *("trainers/strategies.py", "trainers/shards.py", "trainers/export.py", "trainers/callbacks/checkpoint.py"),
    *("modules/lm.py", "modules/osd_drafter.py", "modules/optim.py", "modules/hf_model.py"),
    *("data/stateful_loader.py", "data/online_stream.py", "configs/deepspeed/*.json", "tests/acceptance/test_scale.py"),
)


def worst(one: list[float], other: list[float]) -> float:
    """Largest relative difference of two curves of the same length."""
    assert len(one) == len(other) > 0
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("scale"), STEPS)


@pytest.fixture(scope="module")
def one(place: Path) -> str:
    fit(place, "one", *watch(place, "one"), *ranks_of(1, BATCH))
    return "one"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lm_on_two_ranks_learns_as_one_process_does(place: Path, one: str, stage: int) -> None:
    name = f"zero{stage}"
    fit(place, name, *zero(place, stage, 2, BATCH), *watch(place, name))
    assert samples(place, name) == samples(place, one)
    difference = worst(curve(place, one), curve(place, name))
    ends = [rebuild(place / "runs" / run, "last").state_dict() for run in (one, name)]
    weights = max(float((ends[0][key] - ends[1][key]).abs().max()) for key in ends[0])
    record(
        "scale",
        {
            f"lm, {name}, 2 ranks: largest relative difference of the loss over {STEPS} steps": {
                "value": difference,
                "need": "<= 1e-4",
            },
            f"lm, {name}, 2 ranks: largest difference of a weight after {STEPS} steps": {
                "value": weights,
                "need": "<= 1e-4",
            },
        },
        seeds=[3],
        files=FILES,
    )
    assert difference <= 1e-4 and weights <= 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_tied_embeddings_are_shared_once(place: Path, stage: int) -> None:
    """Embedding and head are one parameter: gathered in both roles, saved once, exported once."""
    tied = ["--model.model.arch.tie_word_embeddings", "true", "--trainer.max_steps", "12"]
    if not (place / "tied.jsonl").exists():
        fit(place, "tied", *watch(place, "tied"), *ranks_of(1, BATCH), *tied)
    name = f"tied{stage}"
    fit(place, name, *zero(place, stage, 2, BATCH), *watch(place, name), *tied)
    difference = worst(curve(place, "tied"), curve(place, name))
    module = rebuild(place / "runs" / name, "last")
    assert module.net.lm_head.weight is module.net.model.embed_tokens.weight
    assert main(["export", str(place / "runs" / name), str(place / f"{name}-export")]) == 0
    stored = load_file(place / f"{name}-export" / "model.safetensors")
    assert "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored
    figure = {"value": difference, "need": "<= 1e-4"}
    what = f"lm, tied embeddings, zero{stage}, 2 ranks: largest relative difference of the loss over 12 steps"
    record("scale", {what: figure}, seeds=[3], files=FILES)
    assert difference <= 1e-4


def osd_offline(place: Path) -> Path:
    """The shipped offline config on the tiny corpus, with tiny networks."""
    write_lm(place / "target", seed=1, max_length=64)
    write_lm(place / "draft", seed=2, layers=1, width=16, max_length=64)
    root = Path(__file__).resolve().parents[2]
    config = yaml.safe_load((root / "configs" / "osd" / "offline.yaml").read_text())
    config["seed_everything"] = 3
    config["trainer"] |= {"accelerator": "cpu", "max_steps": STEPS, "max_epochs": -1, "accumulate_grad_batches": 1}
    config["trainer"] |= {"val_check_interval": 10, "limit_val_batches": 1, "log_every_n_steps": 1}
    config["trainer"]["callbacks"][0]["init_args"] |= {"requests": 2, "prompt_length": 8, "max_new_tokens": 8}
    config["model"]["init_args"] |= {"draft": {"path": "draft"}, "teacher": {"path": "target"}}
    config["model"]["init_args"]["optim"] = {"lr": 3e-3, "warmup_steps": 3, "schedule": "constant"}
    text = {"tokenizer": "target", "length": 32, "batch_size": BATCH, "cache_dir": str(place / "cache")}
    corpus = {"sources": [str(place / "text")], "dedup": None, "val_fraction": 0.2}
    config["data"]["init_args"] = {"corpus": corpus, "text": text}
    path = place / "osd.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def osd(place: Path, run: str, *words: str) -> None:
    own = yaml.safe_load((place / "osd.yaml").read_text())["trainer"]["callbacks"]
    finish(start(place, "fit", "-c", "osd.yaml", *words, *watch(place, run, own), "--run", run))


@pytest.fixture(scope="module")
def osd_one(place: Path) -> str:
    osd_offline(place)
    osd(place, "osd-one", *ranks_of(1, BATCH))
    return "osd-one"


def in_pieces(place: Path, ranks: int) -> list[str]:
    """Arguments for ZeRO-3 with the teacher in pieces too."""
    words = zero(place, 3, ranks, BATCH)
    config = yaml.safe_load(Path(words[1]).read_text())
    config["trainer"]["strategy"]["init_args"]["partition_teacher"] = True
    path = place / "pieces.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["-c", str(path), *words[2:]]


def test_draft_and_teacher_are_born_in_pieces(place: Path, osd_one: str) -> None:
    """Both are read from their directories without any rank holding them whole, and learn as one process does."""
    name = "osd-pieces"
    births = {"class_path": "tests.zero_runs.Births", "init_args": {"path": str(place / "births")}}
    words = [*in_pieces(place, 2), *watch(place, name, [births]), "--checkpoint.monitor", "val/alpha"]
    finish(start(place, "fit", "-c", "osd.yaml", *words, "--run", name))
    held = [json.loads((place / f"births.{rank}.json").read_text()) for rank in range(2)]
    difference = worst(curve(place, osd_one), curve(place, name))
    what = "osd offline, zero3 with partition_teacher, 2 ranks"
    figures = {
        f"{what}: elements of draft and teacher held whole after building": {
            "value": max(rank[net][0] for rank in held for net in ("trained", "teacher")),
            "need": "0",
        },
        f"{what}: largest relative difference of the loss over {STEPS} steps": {"value": difference, "need": "<= 1e-4"},
    }
    record("scale", figures, seeds=[3], files=FILES)
    assert all(rank[net][0] == 0 < rank[net][1] for rank in held for net in ("trained", "teacher"))
    assert difference <= 1e-4
    _, err = finish(start(place, "fit", "-c", "osd.yaml", *in_pieces(place, 2), "--run", "refused"), code=2)
    assert "AcceptanceEval decodes with the teacher" in err


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_osd_offline_on_two_ranks_learns_as_one_process_does(place: Path, osd_one: str, stage: int) -> None:
    name = f"osd-zero{stage}"
    osd(place, name, *zero(place, stage, 2, BATCH))
    difference = worst(curve(place, osd_one), curve(place, name))
    figure = {"value": difference, "need": "<= 1e-4"}
    record(
        "scale",
        {f"osd offline, zero{stage}, 2 ranks: largest relative difference of the loss over {STEPS} steps": figure},
        seeds=[3],
        files=FILES,
    )
    assert difference <= 1e-4


def served(run: Path, *names: str) -> dict[int, tuple[Any, ...]]:
    """What every request got, by its number: draft version, tokens, examined positions."""
    entries = [entry for name in names for entry in read(run / name)]
    return {entry.number: (entry.version, entry.tokens, entry.examined) for entry in entries}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_osd_online_on_two_ranks_serves_and_learns_as_one_process_does(
    place: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy serving, randomness keyed by request id: 2 x 4 requests in flight see what 1 x 8 sees."""
    monkeypatch.chdir(place)  # the config's paths are relative to where it ran
    write_lm(place / "exports" / "target", seed=1, max_length=64)
    write_lm(place / "exports" / "draft", seed=2, layers=1, width=16, max_length=64)
    lines = [json.dumps({"prompt": f"{('def add(a, b)', 'The quick brown')[i % 2]} {i}"}) for i in range(48)]
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    prompts = ("--data.traffic.prompts", "[prompts.jsonl]", "--data.traffic.val_prompts", "[prompts.jsonl]")
    common = ("fit", "-c", "osd/debug", *prompts, "--data.buffer.interval", "8", "--trainer.val_check_interval", "4")
    root = place / "runs"
    if not (root / "online-one").exists():
        finish(start(place, *common, "--run", "online-one", "--data.serve.in_flight", "8"))
    name = f"online-zero{stage}"
    config = zero(place, stage, 2, 2)[:2]
    finish(start(place, *common, *config, "--run", name, "--trainer.devices", "2"))
    whole = served(root / "online-one", "served.jsonl")
    halves = served(root / name, "served.jsonl", "served-rank-1.jsonl")
    ends = [rebuild(root / run, "last").state_dict() for run in ("online-one", name)]
    weights = max(float((ends[0][key] - ends[1][key]).abs().max()) for key in ends[0])
    what = f"osd online, greedy, zero{stage}, 2 ranks"
    figures = {
        f"{what}: draft version, tokens, examined positions of 48 requests equal one process": whole == halves,
        f"{what}: largest difference of a weight at the end": {"value": weights, "need": "<= 1e-4"},
    }
    record("scale", figures, seeds=[0], files=FILES)
    assert whole == halves and weights <= 1e-4


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_where_the_others_stopped(
    place: Path, one: str, stage: int, before: int, after: int
) -> None:
    name = f"elastic{stage}-{before}{after}"
    words = ["--checkpoint.elastic", "true", "--checkpoint.every_n_steps", "15"]
    fit(place, name, *zero(place, stage, before, BATCH), *watch(place, name, stop_at=15), *words)
    fit(place, name, *zero(place, stage, after, BATCH), *watch(place, name), *words)
    assert samples(place, name) == samples(place, one)  # none twice, none skipped
    difference = worst(curve(place, one), curve(place, name))
    what = f"elastic resume, zero{stage}, {before} -> {after} ranks at step 15"
    figures = {
        f"{what}: sample ids equal one process": True,
        f"{what}: largest relative difference of the loss": {"value": difference, "need": "<= 1e-4"},
    }
    record("scale", figures, seeds=[3], files=FILES)
    assert difference <= 1e-4


@pytest.mark.parametrize(("before", "after", "rows", "accumulate"), [(2, 1, 4, 1), (1, 2, 4, 1), (2, 1, 2, 2)])
def test_ddp_goes_on_with_another_number_of_ranks(
    place: Path, one: str, before: int, after: int, rows: int, accumulate: int
) -> None:
    """Without being asked for; `rows` over all ranks afterwards, so with half of them two batches make a step."""
    name = f"ddp-{before}{after}-{rows}"
    strategy = {1: [], 2: ["--trainer.strategy", "ddp"]}
    words = ["--checkpoint.every_n_steps", "15"]
    fit(place, name, *strategy[before], *ranks_of(before, BATCH), *watch(place, name, stop_at=15), *words)
    more = ["--trainer.accumulate_grad_batches", str(accumulate), "--trainer.val_check_interval", "1.0"]
    fit(place, name, *strategy[after], *ranks_of(after, rows), *watch(place, name), *words, *more)
    assert samples(place, name) == samples(place, one)  # none twice, none skipped
    ends = [rebuild(place / "runs" / run, "last").state_dict() for run in (one, name)]
    weights = max(float((ends[0][key] - ends[1][key]).abs().max()) for key in ends[0])
    what = f"ddp, {before} -> {after} ranks at step 15, {accumulate} batches a step"
    figures = {
        f"{what}: sample ids equal one process": True,
        f"{what}: largest difference of a weight at the end": {"value": weights, "need": "<= 1e-4"},
    }
    record("scale", figures, seeds=[3], files=FILES)
    assert weights <= 1e-4


def test_one_training_state_exports_the_same_bits_from_every_checkpoint(place: Path, one: str) -> None:
    """A run of no step in effect (rate 1e-30 moves nothing): every strategy saves the same state, rebuilt alike."""
    still = ["--model.optim.lr", "1e-30", "--model.optim.weight_decay", "0.0", "--trainer.max_steps", "2"]
    kinds = {"single": ranks_of(1, BATCH), "ddp": [*ranks_of(2, BATCH), "--trainer.strategy", "ddp"]}
    kinds |= {f"zero{stage}": zero(place, stage, 2, BATCH) for stage in (1, 2, 3)}
    states = {}
    for kind, words in kinds.items():
        fit(place, f"still-{kind}", *words, *still)
        states[kind] = rebuild(place / "runs" / f"still-{kind}", "last").state_dict()
    for state in states.values():
        assert state.keys() == states["single"].keys()
        assert all(torch.equal(state[key], states["single"][key]) for key in state)
    figure = {"exports of one state, bit-equal over single, ddp, zero1, zero2, zero3": True}
    record("scale", figure, seeds=[3], files=FILES)


def large(place: Path, **arch: int) -> list[str]:
    """Arguments of a network of at least 50M parameters, built from sizes."""
    sizes = {
        "hidden_size": 640,
        "intermediate_size": 1792,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        **arch,
    }
    return [w for key, value in sizes.items() for w in (f"--model.model.arch.{key}", str(value))]


def test_zero3_on_two_ranks_holds_at_most_60_percent_of_one_rank(place: Path) -> None:
    sizes: dict[int, list[dict[str, int]]] = {}
    for ranks in (1, 2):
        name = f"bytes{ranks}"
        callback = {"class_path": "tests.zero_runs.StateBytes", "init_args": {"path": str(place / name)}}
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
        words = [
            "--trainer.max_steps",
            "2",
            "--trainer.enable_checkpointing",
            "false",
            "--trainer.limit_val_batches",
            "0",
        ]
        strategy = ["--trainer.strategy", "zero3", *ranks_of(ranks, BATCH)]
        fit(place, name, "-c", f"{name}.yaml", *strategy, *large(place), *words)
        sizes[ranks] = [json.loads((place / f"{name}.{rank}.json").read_text()) for rank in range(ranks)]
    alone = sizes[1][0]
    assert alone["elements"] >= 50e6

    def total(rank: dict[str, int]) -> int:
        assert all(rank[part] > 0 for part in ("parameters", "masters", "gradients", "optimizer")), rank
        return sum(rank.values()) - rank["elements"]

    share = max(total(rank) for rank in sizes[2]) / total(alone)
    figures = {
        "zero3: parameters of the network": alone["elements"],
        "zero3, 1 rank: bytes of parameters, gradients, masters, moments": total(alone),
        "zero3, 2 ranks: the same per rank (the larger one)": max(total(rank) for rank in sizes[2]),
        "zero3, 2 ranks: share of one rank's bytes": {"value": share, "need": "<= 0.6"},
    }
    record("scale", figures, seeds=[3], files=FILES)
    assert share <= 0.6


def test_lightning_and_our_callbacks_cost_at_most_8_percent(place: Path) -> None:
    """A bare step on a twin of the module follows every step of the run, on the same batch; medians of 200."""
    callback = {"class_path": "tests.bare_loop.Beside", "init_args": {"path": str(place / "beside.json")}}
    (place / "beside.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 7, "num_attention_heads": 4}
    words = large(place, **sizes, num_key_value_heads=4)
    more = ["--trainer.max_steps", "220", "--trainer.gradient_clip_val", "1.0", "--trainer.limit_val_batches", "0"]
    more += ["--trainer.log_every_n_steps", "10", "--checkpoint.every_n_steps", "1000"]  # as the shipped configs
    fit(place, "beside", "-c", "beside.yaml", *words, *more, *ranks_of(1, 8))
    seconds = json.loads((place / "beside.json").read_text())
    bare, whole = (statistics.median(seconds[kind][-200:]) for kind in ("bare", "lightning"))
    figures = {
        "a bare step, median of 200": {"value": bare * 1000, "unit": "ms", "need": ">= 30"},
        "Lightning and our callbacks over a bare loop": {"value": whole / bare - 1, "need": "<= 0.08"},
    }
    record("scale", figures, seeds=[3], files=FILES)
    assert bare >= 0.03 and whole / bare - 1 <= 0.08
