"""The bench: rows, interleaving, a forecast frozen beforehand, comparisons that can fail, one line for bad input."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference import bench, bench_report
from draftsmith.inference.bench import BenchSettings, Contestant, Parts, Prompt
from draftsmith.inference.cli import run_main
from draftsmith.inference.commands import bench as command
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.peers import PEERS
from draftsmith.inference.requests import RoundStats, TokenRequest
from tests import tiny
from tests.fakes import markov, near

QUICK = ["--repetitions", "2", "--max-new-tokens", "12", "--quiet", "--g", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target, a one-layer draft, and six prompts of two tags, as ids."""
    made = tmp_path_factory.mktemp("bench")
    tiny.write_lm(made / "target", tokenizer=False, vocab_size=96, layers=2)
    tiny.write_lm(made / "draft", tokenizer=False, vocab_size=96, layers=1)
    rows = [{"prompt_ids": [5 + i, 9, 40, 9, 40 + i], "tag": "even" if i % 2 == 0 else "odd"} for i in range(6)]
    (made / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def command_line(folder: Path, *more: str, draft: bool = True) -> list[str]:
    parts = ["--draft", str(folder / "draft")] if draft else []
    return [str(folder / "target"), *parts, "--prompts", str(folder / "prompts.jsonl"), *QUICK, *more]


def test_command_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert command.main(command_line(folder, "--batch", "1,2", "--json", str(out))) == 0
    shown, said = capsys.readouterr()
    report = json.loads(out.read_text())
    assert report["state"] == "measured" and report["schema"] == 1
    assert report["settings"]["threads"] == torch.get_num_threads() and report["settings"]["dtype"] == "float32"
    assert report["environment"]["versions"]["torch"].startswith("2.")
    first, second = report["batches"]
    rows = {row["name"]: row for row in first["rows"]}
    ours = {"plain", "speculative", "speculative_auto", "prompt_lookup"}
    assert ours | set(PEERS) <= set(rows) and all(row["offered"] for row in rows.values())
    for row in rows.values():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["tokens"] == rows["plain"]["tokens"]
        assert row["same_as_plain"]["equal"] == row["same_as_plain"]["of"] == first["requests"]
        assert row["label"] in shown
    assert rows["plain"]["speedup_vs_plain"]["value"] == 1.0
    assert rows["plain"]["acceptance"]["tau"]["value"] == 1.0 and rows["plain"]["acceptance"]["alpha"] is None
    assert set(rows["speculative"]["acceptance_by_tag"]) == {"even", "odd"}
    assert 2.0 < rows["speculative"]["mean_draft_length"] <= 3.0
    missing = {row["name"]: row["why"] for row in second["rows"] if not row["offered"]}
    assert set(missing) == {"hf_assisted", "hf_assisted_constant", "hf_prompt_lookup"}
    assert all("not offered at batch 2" in why for why in missing.values()) and "not offered at batch 2" in shown
    entry = report["summary"]["batches"]["1"]
    assert entry["speculative_vs_plain"] == rows["speculative"]["speedup_vs_plain"]
    assert entry["faster_assisted"] in ("hf_assisted", "hf_assisted_constant")
    assert entry["forecast_g"] == report["forecast"]["batches"]["1"]["g"]
    assert report["forecast"]["batches"]["2"]["costs"]["batch"] == 2
    assert "Break-even batch, measured" in shown and "2 repetitions are too few" in said


def test_the_same_network_as_draft_is_always_accepted(folder: Path) -> None:
    engine = load_engine(folder / "target")
    prompts = [Prompt((i, 7, 9)) for i in range(2, 6)]
    report = bench.run(Parts(engine, engine), prompts, BenchSettings(max_new_tokens=16, repetitions=1, g=3))
    rows = {row["name"]: row for row in report["batches"][0]["rows"]}
    assert report["forecast"]["acceptance"]["alpha"]["value"] == 1.0
    assert rows["speculative"]["acceptance"]["accepted_rate"]["value"] == 1.0
    assert rows["speculative"]["acceptance"]["tau"]["value"] == 4.0  # 16 tokens in 4 calls of 3 + 1


def test_the_forecast_is_frozen_before_the_measurement_and_from_other_prompts(folder: Path) -> None:
    engine, draft = load_engine(folder / "target"), load_engine(folder / "draft")
    prompts = [Prompt((i, i, i)) for i in range(2, 12)]
    held_out, measured = bench.split_prompts(prompts)
    assert not set(held_out) & set(measured) and sorted(p.ids for p in held_out + measured) == [p.ids for p in prompts]
    frozen: list[str] = []
    order: list[str] = []

    def freeze(predicted: dict[str, Any]) -> None:
        frozen.append(json.dumps(predicted))
        order.append("frozen")

    def progress(share: float, what: str) -> None:
        if "repetition" in what or "warm-up" in what:
            order.append("measured")

    settings = BenchSettings(max_new_tokens=8, repetitions=1, temperature=1.0)
    report = bench.run(Parts(engine, draft), prompts, settings, on_forecast=freeze, progress=progress)
    assert order[0] == "frozen" and order.count("frozen") == 1 and "measured" in order
    assert json.dumps(report["forecast"]) == frozen[0]
    assert "same_as_plain" not in report["batches"][0]["rows"][0]  # sampled outputs are not compared


def test_held_out_prompts_cover_a_sorted_file_and_stay_few() -> None:
    prompts = [Prompt((i,), "code" if i < 100 else "prose") for i in range(200)]
    held_out, measured = bench.split_prompts(prompts)
    assert len(held_out) <= bench.MOST_HELD_OUT and len(held_out) + len(measured) == 200
    assert sum(p.tag == "code" for p in held_out) == len(held_out) / 2
    assert [len(part) for part in bench.split_prompts(prompts[:2])] == [1, 1]
    with pytest.raises(InvalidValue, match="one prompt is not enough"):
        bench.split_prompts(prompts[:1])


def test_rows_are_interleaved_in_rotated_order() -> None:
    calls: list[str] = []

    def row(name: str) -> Contestant:
        def decode(requests: Sequence[TokenRequest], seed: int) -> tuple[list[list[int]], RoundStats | None]:
            calls.append(name)
            return [[1]] * len(requests), None

        return Contestant(name, name, True, decode)

    settings = BenchSettings(repetitions=3, temperature=1.0)
    parts = Parts(markov(6, 1))
    bench.measure_batch(parts, [Prompt((1,)), Prompt((2,))], settings, 1, [row("plain"), row("b"), row("c")], _silent)
    warm, timed = calls[:3], calls[3:]
    assert warm == ["plain", "b", "c"]
    turns = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert len(turns) == 6 and all(sorted(turn) == ["b", "c", "plain"] for turn in turns)
    assert [turn[0] for turn in turns] == ["plain", "b", "b", "c", "c", "plain"]
    assert {timed.index(name) for name in ("plain", "b", "c")} == {0, 1, 2}


def test_every_call_has_the_full_batch() -> None:
    sizes: list[int] = []

    def decode(requests: Sequence[TokenRequest], seed: int) -> tuple[list[list[int]], RoundStats | None]:
        sizes.append(len(requests))
        assert len({request.row_id for request in requests}) == len(requests)
        return [[1]] * len(requests), None

    prompts = [Prompt((i,)) for i in range(1, 6)]
    settings = BenchSettings(repetitions=1, temperature=1.0)
    plain = Contestant("plain", "plain", True, decode)
    block = bench.measure_batch(Parts(markov(9, 1)), prompts, settings, 4, [plain], _silent)
    assert sizes == [4, 4, 4] and block["requests"] == 8 and block["distinct_prompts"] == 5


def on_a_clock(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Contestant], list[tuple[str, tuple[int, ...]]]]:
    """Rows whose seconds and rounds follow from the prompt alone, and what they were asked to decode (warm-up too).

    A target call takes a second. `copies` gets 8 tokens a call where the prompt's first token is odd, else 1.
    """
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    asked: list[tuple[str, tuple[int, ...]]] = []

    def row(name: str, per_call: int) -> Contestant:
        def decode(requests: Sequence[TokenRequest], seed: int) -> tuple[list[list[int]], RoundStats | None]:
            rounds, calls = RoundStats(), []
            for i, request in enumerate(requests):
                asked.append((name, tuple(request.prompt)))
                gain = per_call if request.prompt[0] % 2 else 1
                calls.append(request.max_new_tokens // gain)
                for _ in range(calls[-1]):
                    rounds.append(i, gain - 1, gain - 1, gain, float(gain - 1), 1.0)
            now[0] += max(calls)  # the slowest row of the batch sets the pace
            return [[1] * r.max_new_tokens for r in requests], rounds

        return Contestant(name, name, False, decode)

    return [row("plain", 1), row("copies", 8)], asked


def test_further_rows_of_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoders of any kind beside the usual rows, with their parts and settings, forecast before they are measured."""
    tree = f"tree@{folder / 'draft'},policy=chain,nodes=3,depth=3"
    wanted = ["suffix", "suffix_hybrid", "aded,nodes=8", "tree,policy=eagle2,nodes=6,depth=3", tree]
    more = [word for text in wanted for word in ("--decoder", text)]
    out = tmp_path / "bench.json"
    line = command_line(folder, "--no-peers", "--json", str(out), *more)
    assert command.main(line) == 0
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    rows = {row["name"]: row for row in report["batches"][0]["rows"]}
    assert set(report["forecast"]["rows"]["1"]) == set(wanted) <= set(rows)
    for text in wanted:
        assert rows[text]["same_as_plain"]["equal"] == rows[text]["same_as_plain"]["of"] and f"x by {text}" in shown
    assert rows[tree]["acceptance"]["tau"] == rows["speculative"]["acceptance"]["tau"]  # a chain of three, both of them


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("trees", "decoder of a further row"),
        ("tree", "decoder 'tree' needs a draft: write --decoder tree@DIR, or add --draft DIR"),
        ("suffix@x", "decoder 'suffix' takes no draft"),
        ("suffix,nodes", "--decoder wants KEY=VALUE, got 'nodes'"),
        ("suffix,nods=3", "setting of decoder 'suffix'"),
        ("prompt_lookup", "the row 'prompt_lookup' is there already"),
    ],
)
def test_a_further_row_that_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str], text: str, why: str) -> None:
    line = command_line(folder, "--no-peers", "--decoder", text, draft=False)
    assert run_main(command.main, line, "draftsmith bench") == 2
    assert why in capsys.readouterr().err


def test_a_forecast_of_its_own_prompts_for_every_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the prompts differ by is in it: half of them gain 8, and the forecast is of all of them together."""
    table, asked = on_a_clock(monkeypatch)
    settings = BenchSettings(max_new_tokens=8, repetitions=4, temperature=1.0)
    held_out = [Prompt((i, 5)) for i in range(2, 18)]
    parts = Parts(markov(20, 1))
    found = bench.pilot(parts, held_out, settings, 1, table)
    timed = [prompt for name, prompt in asked if name == "copies"][1:]  # behind the warm-up
    assert sorted(timed) == [p.ids for p in held_out]  # each of them once
    gain = pytest.approx(16 * 8 / (8 * 8 + 8 * 1))  # of all shares, though each of them is all odd or all even
    assert found == {"copies": {"tau": gain, "speedup": gain}, "plain": {"tau": 1.0, "speedup": 1.0}}
    with pytest.raises(InvalidValue, match="4 repetitions on prompts of their own need as many prompts, got 3"):
        bench.pilot(parts, held_out[:3], settings, 1, table)


def test_the_forecast_of_a_batch_knows_that_its_slowest_row_sets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = on_a_clock(monkeypatch)
    settings = BenchSettings(max_new_tokens=8, repetitions=2, temperature=1.0)
    mixed = [Prompt((i, 5)) for i in (1, 1, 2, 2, 1, 1, 3, 3)]  # dealt out: (1, 2, 1, 3) twice
    found = bench.pilot(Parts(markov(20, 1)), mixed, settings, 4, table)
    assert found["copies"]["speedup"] == 1.0 and found["copies"]["tau"] > 2.0
    alone = bench.pilot(Parts(markov(20, 1)), mixed, settings, 1, table)
    assert alone["copies"]["speedup"] == pytest.approx(4 * 8 / (8 + 3 * 1))


def test_compare_finds_a_planted_difference_and_its_gap() -> None:
    """Negative control: one wrong token and one that is cut short must be reported, at the right place."""
    engine = markov(8, 1, seed=3)
    prompts = [Prompt((1, 2)), Prompt((3,)), Prompt((4, 4))]
    table = engine.table
    reference = []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(6):
            ids.append(int(table[ids[-1]].argmax()))
        reference.append(ids[len(prompt.ids) :])
    assert bench.compare(engine, prompts, reference, reference)["equal"] == 3
    wrong = [list(row) for row in reference]
    wrong[1][4] = (wrong[1][4] + 1) % 8
    wrong[2] = wrong[2][:5]
    found = bench.compare(engine, prompts, reference, wrong)
    assert found["equal"] == 1 and found["of"] == 3
    assert [(d["request"], d["position"]) for d in found["first_differences"]] == [(1, 4), (2, 5)]
    top = table[reference[1][3]].topk(2).values
    assert found["first_differences"][0]["top2_gap"] == pytest.approx(float(top[0] - top[1]))


def test_sampled_decoding_draws_anew_in_each_repetition() -> None:
    seen: list[int] = []

    def decode(requests: Sequence[TokenRequest], seed: int) -> tuple[list[list[int]], RoundStats | None]:
        seen.extend(request.row_id for request in requests)
        return [[1]] * len(requests), None

    settings = BenchSettings(repetitions=3, temperature=1.0)
    row = Contestant("plain", "plain", True, decode)
    bench.measure_batch(Parts(markov(9, 1)), [Prompt((1,)), Prompt((2,))], settings, 2, [row], _silent)
    assert len(set(seen[2:])) == 6  # two warm-up rows, then three repetitions of two


def test_markov_pair_at_a_temperature() -> None:
    """Works on any engine; the measured alpha of a context-free pair is 1 - TV, as the forecast saw it."""
    target = markov(12, 0, seed=1)
    draft = near(target, noise=1.0)
    p, q = target.table.softmax(-1), draft.table.softmax(-1)
    alpha = float(torch.minimum(p, q).sum())
    prompts = [Prompt((i,)) for i in range(1, 9)]
    settings = BenchSettings(max_new_tokens=24, batches=(2,), temperature=1.0, repetitions=1, g=4)
    report = bench.run(Parts(target, draft), prompts, settings)
    assert report["forecast"]["acceptance"]["alpha"]["value"] == pytest.approx(alpha, abs=1e-5)
    rows = {row["name"]: row for row in report["batches"][0]["rows"]}
    assert rows["speculative"]["acceptance"]["alpha"]["value"] == pytest.approx(alpha, abs=1e-5)
    assert rows["speculative_auto"]["plain_round_share"] <= 1.0


def block_of(batch: int, **speeds: float) -> dict[str, Any]:
    """A measured block with two repetitions of equal speed."""
    rows = [
        {
            "name": name,
            "label": name,
            "peer": name.startswith("hf"),
            "offered": True,
            "tokens": [100, 100],
            "seconds": [100 / speed, 100 / speed],
            "tokens_per_second": {"value": speed, "low": None, "high": None},
            "speedup_vs_plain": {"value": speed / speeds["plain"], "low": None, "high": None},
        }
        for name, speed in speeds.items()
    ]
    return {"batch": batch, "rows": rows}


def test_summary_counts_against_the_faster_assisted_peer() -> None:
    block = block_of(1, plain=100.0, speculative=200.0, hf_generate=80.0, hf_assisted=50.0, hf_assisted_constant=125.0)
    entry = bench_report.summary({"batches": {}}, [block], 0)["batches"]["1"]
    assert entry["faster_assisted"] == "hf_assisted_constant"
    assert entry["speculative_vs_transformers_assisted"]["value"] == pytest.approx(1.6)
    assert entry["speculative_vs_transformers_generate"]["value"] == pytest.approx(2.5)
    assert entry["plain_vs_transformers_generate"]["value"] == pytest.approx(1.25)


def test_measured_break_even_uses_the_best_constant_row() -> None:
    blocks = [
        block_of(1, plain=100.0, speculative=50.0, speculative_best=200.0),
        block_of(8, plain=400.0, speculative=300.0, speculative_best=200.0),
    ]
    found = bench_report.summary({"batches": {}}, blocks, 0)["break_even_batch"]
    assert found["value"] == pytest.approx(4.0)
    above = bench_report.summary({"batches": {}}, blocks[:1], 0)["break_even_batch"]
    assert above == {"value": None, "text": "above 1, the largest batch measured"}
    below = bench_report.summary({"batches": {}}, blocks[1:], 0)["break_even_batch"]
    assert below["text"].startswith("none")
    assert bench_report.summary({"batches": {}}, [block_of(1, plain=1.0)], 0)["break_even_batch"] is None


def test_warnings_say_when_plain_is_faster() -> None:
    slow = block_of(8, plain=100.0, speculative=80.0, speculative_auto=95.0)
    lines = bench_report.warnings([slow, block_of(1, plain=100.0, speculative=150.0)], 7, 7)
    assert len(lines) == 2
    assert "plain decoding is faster at batch 8" in lines[0] and "0.95x" in lines[0]
    assert "automatic mode is below 0.97x" in lines[1]
    assert "too few" in bench_report.warnings([], 3, 7)[0]


def test_ratios_are_taken_pair_by_pair() -> None:
    """A machine that slows down in the second repetition changes both rows, and no ratio."""
    row = {"tokens": [10, 10, 10], "seconds": [1.0, 5.0, 1.0]}
    other = {"tokens": [10, 10, 10], "seconds": [2.0, 10.0, 2.0]}
    assert bench_report.ratio(row, other) == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert bench_report.ratio(row, None) is None


def test_break_even_tokens_from_the_training_time() -> None:
    from draftsmith.inference.costs import CostCurve

    curve = CostCurve.textbook(0.05)
    found = bench_report.break_even(0.6, [curve], 100.0)
    assert found["break_even_tokens"]["1"] > 100 and found["break_even_batch"]["value"] is None
    assert bench_report.break_even(0.6, [curve], None)["break_even_tokens"] == {}
    assert math.isfinite(found["break_even_tokens"]["1"])


def test_without_a_draft_and_without_peers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(command_line(folder, "--no-peers", draft=False)) == 0
    shown = capsys.readouterr().out
    assert "none: no draft was given" in shown and "draftsmith prompt lookup" in shown
    assert "speculative" not in shown and "transformers" not in shown


def test_the_missing_picture_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    line = command_line(folder, "--no-peers", "--png", str(tmp_path / "x.png"), draft=False)
    assert command.main(line) == 0
    said = capsys.readouterr().err.splitlines()
    assert [x for x in said if "PNG" in x] == [
        "no PNG: pictures need the training extra: pip install 'draftsmith[train]'"
    ]
    assert not (tmp_path / "x.png").exists()


def _silent(share: float, what: str) -> None:
    pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch", "0"], "batch sizes are different numbers from 1 on"),
        (["--batch", "2,2"], "batch sizes are different numbers"),
        (["--batch", "a"], "batch sizes are numbers such as 8 or 1,8,16, got 'a'"),
        (["--g", "0"], "g must be at least 1, got 0"),
        (["--repetitions", "0"], "repetitions must be at least 1"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--num-prompts", "1"], "one prompt is not enough"),
        (["--json", "/nowhere/out.json"], "there is no folder /nowhere"),
        (["--draft", "/nowhere"], "no such directory: /nowhere"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--max-new-tokens", "1"], "nothing was drafted on the held-out prompts"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--repetition", "3"], "unknown argument '--repetition'; did you mean --repetitions?"),
    ],
)
def test_bad_input_is_one_line(folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(command.main, command_line(folder, "--no-peers", *more), "draftsmith bench") == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.startswith("error: ") and "\n" not in said


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt_ids": [1]}\nnot json\n', "bad.jsonl:2: not valid JSON"),
        ('{"prompt_ids": [1]}\n{"tag": "x"}\n', "bad.jsonl:2: wants an object"),
        ('{"prompt_ids": [1]}\n{"prompt_ids": ["a"]}\n', "bad.jsonl:2: 'prompt_ids' must be a list of token ids"),
        ('{"prompt": "text"}\n{"prompt": "more"}\n', "no tokenizer"),
    ],
)
def test_bad_prompts_are_one_line(
    folder: Path, tmp_path: Path, lines: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text(lines)
    argv = [str(folder / "target"), "--prompts", str(tmp_path / "bad.jsonl"), "--no-peers", "--quiet"]
    assert run_main(command.main, argv, "draftsmith bench") == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
