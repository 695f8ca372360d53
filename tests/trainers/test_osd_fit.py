"""OSD through `draftsmith fit` in its own processes: online, offline, routed, two ranks, export, one-line errors."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from draftsmith.data.served_log import read
from draftsmith.inference import load, registry
from draftsmith.inference.cli import main
from draftsmith.inference.requests import TokenRequest
from draftsmith.trainers import runs
from tests.commands import ROOT, run, weights
from tests.tiny import write_lm, write_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the pair where the shipped configs look for it, and prompts of two tags."""
    place = tmp_path_factory.mktemp("osd")
    write_lm(place / "exports" / "target", seed=1, max_length=64)
    write_lm(place / "exports" / "draft", seed=2, layers=1, width=16, max_length=64)
    rows = [
        {"prompt": f"{('def add(a, b)', 'The quick brown')[i % 2]} {i}", "tag": ("code", "prose")[i % 2]}
        for i in range(48)
    ]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logs = [
        {"prompt": f"def add {i}", "choices": [{"text": " return a + b", "finish_reason": "stop"}]} for i in range(24)
    ]
    (place / "logs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs) + "{broken\n")
    return place


PROMPTS = ("--data.traffic.prompts", "[prompts.jsonl]", "--data.traffic.val_prompts", "[prompts.jsonl]")


@pytest.fixture(scope="module")
def online(place: Path) -> Path:
    """The shipped debug config on the prompts."""
    out, err = run(place, "fit", "-c", "osd/debug", "--run", "online", *PROMPTS)
    assert "val/alpha_decode" in out and "draftsmith export runs/online OUT" in out
    assert "Traceback" not in err
    return place / "runs" / "online"


@pytest.mark.slow
def test_online_learning_ends_in_an_export_that_decodes_losslessly(place: Path, online: Path) -> None:
    served = read(online / "served.jsonl")
    assert [s.number for s in served] == list(range(48)) and len({s.version for s in served}) > 5
    assert not (online / "buffer").exists()  # private text stays in memory
    out, _ = run(place, "export", "runs/online", "trained")
    assert "drafter" in out
    target, draft = load(place / "exports" / "target"), load(place / "trained")
    assert draft.kind == "drafter" and draft.manifest is not None
    assert draft.manifest.couplings.target is not None  # it knows whom it was trained for
    assert "online/alpha_ema" in draft.manifest.metrics and draft.manifest.couplings.trained["positions"] == "all"
    assert not torch.equal(draft.part.net.lm_head.weight, load(place / "exports" / "draft").part.net.lm_head.weight)
    requests = [TokenRequest(target.tokenizer.encode(f"def add {i}"), 16) for i in range(4)]
    plain = registry.build("autoregressive", {"target": target}).decode(requests)
    fast = registry.build("speculative", {"target": target, "draft": draft}).decode(requests)
    assert plain.output == fast.output


@pytest.mark.slow
def test_two_ranks_learn_as_one_process_does(place: Path) -> None:
    """2 x 4 requests in flight see what 1 x 8 sees; each rank serves its half, both make the same updates."""
    common = ("fit", "-c", "osd/debug", *PROMPTS, "--data.buffer.interval", "8", "--trainer.val_check_interval", "4")
    run(place, *common, "--run", "one", "--data.serve.in_flight", "8")
    run(place, *common, "--run", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    one, two = place / "runs" / "one", place / "runs" / "two"
    halves = [read(two / name) for name in ("served.jsonl", "served-rank-1.jsonl")]
    assert [s.number for s in halves[0]] == list(range(0, 48, 2))
    assert [s.number for s in halves[1]] == list(range(1, 48, 2))
    whole = {s.number: s for s in read(one / "served.jsonl")}
    for s in halves[0] + halves[1]:
        assert (s.version, s.tokens, s.examined) == (
            whole[s.number].version,
            whole[s.number].tokens,
            whole[s.number].examined,
        )
    a, b = weights(one), weights(two)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=2e-4)
    figures = [json.loads((folder / runs.PROVENANCE).read_text())["metrics"] for folder in (one, two)]
    for name in ("online/served", "online/swaps", "online/rollbacks", "buffer/held_out", "val/tau"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=1e-6), name


@pytest.mark.slow
def test_routed_drafts_export_one_folder_each_and_a_router(place: Path) -> None:
    overlay = place / "routed.yaml"
    config = yaml.safe_load((ROOT / "configs" / "osd" / "debug.yaml").read_text())
    del config["model"]["init_args"]["draft"]
    config["model"]["init_args"]["drafts"] = {key: {"path": "exports/draft"} for key in ("code", "prose")}
    config["data"]["init_args"]["router"] = {"drafts": ["code", "prose"], "fallback": "code"}
    overlay.write_text(yaml.safe_dump(config))
    run(place, "fit", "-c", str(overlay), "--run", "routed", *PROMPTS)
    assert {(s.tag, s.draft) for s in read(place / "runs" / "routed" / "served.jsonl")} == {("code", 0), ("prose", 1)}
    run(place, "export", "runs/routed", "drafts")
    assert sorted(p.name for p in (place / "drafts").iterdir()) == ["code", "prose", "router.json"]
    router = json.loads((place / "drafts" / "router.json").read_text())
    assert (router["keys"], router["by"], router["fallback"]) == (["code", "prose"], "tag", "code")
    parts = [load(place / "drafts" / key) for key in ("code", "prose")]
    assert [p.manifest.couplings.trained["tag"] for p in parts if p.manifest is not None] == ["code", "prose"]
    assert not torch.equal(parts[0].part.net.lm_head.weight, parts[1].part.net.lm_head.weight)


@pytest.mark.slow
def test_learning_from_request_logs(place: Path) -> None:
    run(place, "fit", "-c", "osd/debug", "--run", "logs", "--data.traffic.logs", "[logs.jsonl]")
    served = read(place / "runs" / "logs" / "served.jsonl")
    assert len(served) == 24 and all(len(s.rounds) == 0 and s.alpha > 0 for s in served)
    early, late = served[:8], served[-8:]
    assert sum(s.alpha for s in late) > sum(s.alpha for s in early)  # it learns the logged answers


@pytest.mark.slow
@pytest.mark.parametrize("source", ["teacher", "mix_token"])
def test_offline_distillation(place: Path, source: str) -> None:
    (place / "text").mkdir(exist_ok=True)
    for i in range(30):
        (place / "text" / f"{i}.txt").write_text(f"def add_{i}(a, b):\n    return a + b\n" * 20)
    small = yaml.safe_load((ROOT / "configs" / "osd" / "offline.yaml").read_text())
    small["trainer"] |= {"accelerator": "cpu", "max_steps": 8, "accumulate_grad_batches": 1, "val_check_interval": 4}
    small["model"]["init_args"] |= {"source": source, "optim": {"lr": 0.003, "schedule": "constant"}}
    small["data"]["init_args"]["text"] |= {"length": 24, "batch_size": 8}
    small["data"]["init_args"]["corpus"] = {"sources": ["text"], "dedup": None, "val_fraction": 0.2}
    (place / "offline.yaml").write_text(yaml.safe_dump(small))
    out, _ = run(place, "fit", "-c", "offline.yaml", "--run", f"offline-{source}")
    assert "val/alpha " in out and "val/alpha_decode" in out and "val/tau" in out


BAD = {
    "unknown loss": (("--model.loss", "forward_lk"), "unknown loss 'forward_lk'"),
    "unknown source": (("--model.source", "pupil"), "unknown source 'pupil'"),
    "interval": (("--data.buffer.interval", "0"), "buffer interval must be at least 1"),
    "steps": (("--data.serve.steps", "0"), "at least 1"),
    "missing target": (("--data.target", "exports/nowhere"), "no such directory"),
    "missing draft": (("--model.draft.path", "./exports/nowhere"), "no model directory"),
    "other vocabulary": (("--model.draft.path", "other"), "vocabularies differ"),
    "unknown positions": (("--data.recorder.positions", "right"), "unknown positions 'right'"),
    "unusable log": (("--data.traffic.logs", "[broken.jsonl]"), "no usable request in broken.jsonl"),
    "unknown decoder setting": (("--data.serve.decoder", "{gamma: 5}"), "gamma"),
}


def inside(place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The same command in this process (it never starts others): no seconds of start-up."""
    monkeypatch.chdir(place)
    monkeypatch.setenv(runs.FOLDER_VARIABLE, "")
    monkeypatch.delenv(runs.FOLDER_VARIABLE)
    return main(list(arguments))


# jsonargparse tells its callers, once per process, of a parameter that is going to be renamed
RENAMED = pytest.mark.filterwarnings(r"ignore:\s*(skip_none|``instantiate_classes``|By default only one)")


@RENAMED
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    place: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    if case == "other vocabulary" and not (place / "other").exists():
        write_lm(place / "other", layers=1, tokenizer=False)
        write_tokenizer(place / "other", "quite another text, with other merges " * 5, vocab_size=290)
    (place / "broken.jsonl").write_text("{broken\n")
    traffic = () if case == "unusable log" else PROMPTS
    assert inside(place, monkeypatch, "fit", "-c", "osd/debug", "--run", "bad", *traffic, *arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in err and out == ""


@RENAMED
def test_an_unknown_routing_key_ends_the_run_with_its_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((ROOT / "configs" / "osd" / "debug.yaml").read_text())
    del config["model"]["init_args"]["draft"]
    config["model"]["init_args"]["drafts"] = {key: {"path": "exports/draft"} for key in ("code", "poems")}
    config["data"]["init_args"]["router"] = {"drafts": ["code", "poems"]}
    (place / "unrouted.yaml").write_text(yaml.safe_dump(config))
    assert inside(place, monkeypatch, "fit", "-c", "unrouted.yaml", "--run", "unrouted", *PROMPTS) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "'prose'" in line and "code, poems" in line
