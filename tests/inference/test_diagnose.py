"""Diagnosis on random networks: hypotheses are exact changes, verdicts, corrected files, exit codes."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.inference import cli
from draftsmith.inference import diagnose as dg
from draftsmith.inference.commands.diagnose import docstrings
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats import read_drafter, speculators
from draftsmith.inference.hypotheses.base import Facts, Hypothesis, key
from draftsmith.inference.hypotheses.contexts import Contexts, draw
from draftsmith.inference.hypotheses.eagle_head import EagleSubject
from draftsmith.inference.hypotheses.served_law import filtered
from draftsmith.inference.hypotheses.subjects import corrected, eagle_subject, load_subject
from draftsmith.inference.loader import LoadedPart, load
from tests.eagles import VARIANTS, toy_config, toy_record, write_target

SAMPLES, STEPS = 16, 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedPart:
    return load(write_target(tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 64, (n,), generator=generator).tolist() for n in (3, 5, 9, 4) * 4]


@pytest.fixture(scope="module")
def contexts(target: LoadedPart, prompts: list[list[int]]) -> Contexts:
    return draw(target, prompts, SAMPLES, length=16, anchors=4, steps=STEPS)


def all_hypotheses(subject: Any, couplings: Any) -> list[Hypothesis]:
    return [h for family in subject.families for h in family(couplings, subject.facts)]


@pytest.mark.parametrize("name", ["plain", "residual normed, one norm, normed output", "eagle1"])
def test_every_hypothesis_is_undone_by_its_inverse(name: str, target: LoadedPart, contexts: Contexts) -> None:
    subject = eagle_subject(target, toy_record(VARIANTS[name]))
    tried = all_hypotheses(subject, subject.couplings)
    assert len({h.name for h in tried}) == len(tried) >= (12 if name == "eagle1" else 30)
    before = subject.logits(subject.couplings, contexts, slice(0, 2))[0]
    for hypothesis in tried:
        changed = hypothesis.apply(subject.couplings)
        assert key(changed) != key(subject.couplings)
        subject.logits(changed, contexts, slice(0, 2))  # every one can be computed
        back = hypothesis.inverse(subject.couplings).apply(changed)
        assert key(back) == key(subject.couplings)
        assert torch.equal(subject.logits(back, contexts, slice(0, 2))[0], before)
        assert hypothesis.fixes and hypothesis.explain


def test_statistic_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    logits = torch.tensor([[0.0, 0.0]])  # q = 1/2, 1/2
    assert dg.overlap(logits, torch.tensor([0, 2]), p, 1.0).item() == pytest.approx(0.7)
    assert dg.overlap(logits, torch.tensor([2, 2]), p, 1.0).item() == pytest.approx(0.2)  # masses on one id add
    assert dg.overlap(logits, torch.tensor([0, -1]), p, 1.0).item() == pytest.approx(0.5)  # a row that means no id
    sharp = torch.tensor([[2.0, 0.0]])
    assert dg.overlap(sharp, torch.tensor([0, 1]), p, 1.0) < dg.overlap(sharp, torch.tensor([0, 1]), p, 1.7)
    assert dg.overlap(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0, 1]), p, 1.0).item() == 0.0
    alpha = torch.tensor([[[0.5, 0.5], [1.0, 0.2]]])  # (0.5 + 0.25 + 1 + 0.2) / 2
    assert dg.accepted(alpha).item() == pytest.approx(0.975)


def test_bootstrap_is_seeded_and_ordered() -> None:
    values = torch.arange(32, dtype=torch.float64)
    assert dg.bootstrap(values, 0.05) == dg.bootstrap(values, 0.05)
    assert dg.bootstrap(values, 0.001) < dg.bootstrap(values, 0.05) < 15.5 < dg.bootstrap(values, 0.95)


def swapped_lm(target: LoadedPart, out: Path) -> Path:
    """The target itself as a draft, its gate and up projections exchanged in every layer."""
    out.mkdir()
    tensors = load_file(target.path / "model.safetensors")
    for name in [name for name in tensors if "gate_proj" in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((target.path / "config.json").read_text())
    return out


def test_windows_and_filters_of_a_language_model_are_named(target: LoadedPart, contexts: Contexts) -> None:
    """The target as its own draft, served with a window or with filtered drafts that nobody asked for."""
    whole, _, _ = load_subject(target, target.path)
    for changes, name in (
        ({"windows": (2,) * 8}, "no sliding window"),
        ({"law_filter": (1, 1.0)}, "drafts unfiltered"),
        ({"law_filter": (0, 0.1)}, "drafts unfiltered"),
    ):
        subject, _, _ = load_subject(target, target.path)
        subject.couplings = dataclasses.replace(subject.couplings, **changes)
        verdict = dg.diagnose(subject, contexts)
        assert [found.hypothesis.name for found in verdict.findings] == [name], changes
        assert verdict.final == pytest.approx(STEPS, abs=1e-4) and key(verdict.couplings) == key(whole.couplings)


def test_a_filtered_target_wants_filtered_drafts(target: LoadedPart, prompts: list[list[int]]) -> None:
    served = (8, 0.9)
    contexts = draw(target, prompts, SAMPLES, length=16, anchors=4, steps=STEPS, law_filter=served)
    assert int((contexts.law(slice(0, 4)) > 0).sum(-1).max()) <= 8
    subject, _, _ = load_subject(target, target.path, served=(served, (0, 1.0)))
    verdict = dg.diagnose(subject, contexts)
    assert [found.hypothesis.name for found in verdict.findings] == ["drafts filtered as the target's law"]
    assert verdict.final == pytest.approx(STEPS, abs=1e-4)
    healthy, _, _ = load_subject(target, target.path, served=(served, served))
    assert dg.diagnose(healthy, contexts).status == "healthy"


def test_filters_by_hand() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert filtered(logits, (2, 1.0)).softmax(-1).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert filtered(logits, (0, 0.65)).softmax(-1).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert filtered(logits, (0, 0.75)).softmax(-1).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert torch.equal(filtered(logits, (0, 1.0)), logits)


def test_a_window_hides_what_is_further_back(target: LoadedPart, contexts: Contexts) -> None:
    """A window of one: a step sees its own pair alone; one that holds the whole text changes nothing."""
    subject = eagle_subject(target, toy_record())
    logits = {
        size: subject.logits(dataclasses.replace(subject.couplings, windows=(size,)), contexts, slice(0, 4))[0]
        for size in (None, contexts.tokens.shape[1] + STEPS, 1)
    }
    full, wide, own = logits.values()
    assert torch.equal(full, wide) and not torch.allclose(full, own)
    other = dataclasses.replace(contexts, tokens=contexts.tokens.clone())
    other._states, other._final = contexts._states, contexts._final
    rows = contexts.rows[0].tolist()
    other.tokens[0, : rows[0] + 1] = 5  # tokens behind the first anchor's own pair
    for size, same in ((1, True), (None, False)):
        changed = dataclasses.replace(subject.couplings, windows=(size,))
        got = subject.logits(changed, other, slice(0, 4))[0]
        assert torch.allclose(got[0, 0], logits[size][0, 0]) is same


def test_a_part_of_each_head_is_turned(target: LoadedPart) -> None:
    """Half of a head of 8: dimensions 0..3 as a head of 4, the others as they are (partial_rotary_factor)."""
    subject = eagle_subject(target, toy_record())
    x = torch.randn(1, 3, 4, subject.config.head_dim)
    at = torch.arange(3).unsqueeze(0)
    half = subject._turn(dataclasses.replace(subject.couplings, rotary_share=0.5), x, at)
    size = subject.config.head_dim // 2
    angle = torch.arange(3).view(1, 3, 1, 1) * 10000.0 ** -(torch.arange(0, size, 2) / size)
    low, high = x[..., : size // 2], x[..., size // 2 : size]
    want = torch.cat(
        (low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin(), x[..., size:]), -1
    )
    assert torch.allclose(half, want, atol=1e-6)


def write_prompts(path: Path, prompts: list[list[int]]) -> Path:
    path.write_text("\n".join(json.dumps({"prompt_ids": ids}) for ids in prompts))
    return path


SIZES = ["--samples", str(SAMPLES), "--length", "16", "--anchors", "4", "--steps", str(STEPS)]


def test_a_language_model_with_exchanged_weights_is_named(
    target: LoadedPart, prompts: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", prompts)
    draft = swapped_lm(target, tmp_path / "draft")
    argv = ["diagnose", str(target.path), str(draft), "--prompts", str(file), *SIZES]
    assert cli.main([*argv, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "named"
    assert [one["name"] for one in found["findings"]] == ["gate_proj and up_proj exchanged"]
    assert found["final"] == pytest.approx(STEPS, abs=1e-4)  # it is the target
    before, after = (found["confirmed"]["decoding"][side] for side in ("before", "after"))
    assert before["equals_plain_greedy"] and after["equals_plain_greedy"]
    assert after["tau"][0] == pytest.approx(STEPS + 1, rel=0.2) and before["tau"][0] < after["tau"][0] - 1
    assert cli.main(argv) == 1
    text = capsys.readouterr().out
    assert "gate_proj and up_proj stand in each other's place" in text and "fix       any engine:" in text
    assert cli.main(["diagnose", str(target.path), str(target.path), "--prompts", str(file), *SIZES]) == 0
    assert "healthy" in capsys.readouterr().out


def test_a_random_head_is_not_explained_and_not_changed(
    target: LoadedPart, prompts: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head"
    out.mkdir()
    speculators.write(toy_record(), out, verifier=target.path)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    file = write_prompts(tmp_path / "p.jsonl", prompts)
    argv = ["diagnose", str(target.path), str(out), "--prompts", str(file), *SIZES]
    assert cli.main([*argv, "--write-fixed", str(tmp_path / "fixed"), "--deep"]) == 2
    assert "no coupling explains it" in capsys.readouterr().out
    assert hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() == digest


def test_same_seed_same_verdict_whatever_the_order(
    target: LoadedPart, contexts: Contexts, prompts: list[list[int]]
) -> None:
    subject = eagle_subject(target, toy_record())
    before = {name: t.clone() for name, t in subject.record.tensors.items()}
    first, second = dg.diagnose(subject, contexts), dg.diagnose(subject, contexts)
    assert first.table == second.table and first.deployed == second.deployed
    assert all(torch.equal(before[name], t) for name, t in subject.record.tensors.items())
    order = torch.randperm(contexts.count, generator=torch.Generator().manual_seed(1))
    again = draw(target, prompts, SAMPLES, length=16, anchors=4, steps=STEPS)
    assert torch.equal(again.tokens, contexts.tokens) and torch.equal(again.rows, contexts.rows)
    mixed = dataclasses.replace(contexts, tokens=contexts.tokens[order], rows=contexts.rows[order])
    mixed._states, mixed._final = {}, None
    scored = dg.score(subject, subject.couplings, mixed, dg.TEMPERATURES)
    assert scored.mean == pytest.approx(first.deployed, abs=1e-6)


def test_expected_score_ends_at_once(target: LoadedPart, contexts: Contexts) -> None:
    subject = eagle_subject(target, toy_record())
    deployed = dg.diagnose(subject, contexts).deployed
    early = dg.diagnose(subject, contexts, expected=deployed)
    assert early.status == "healthy" and early.tried == 0
    short = dg.diagnose(subject, contexts, expected=2 * deployed)
    assert short.status == "unexplained" and short.exit_code == 2


def test_corrected_files_state_what_was_found(target: LoadedPart, contexts: Contexts) -> None:
    record = toy_record(toy_config(own_embedding=True))
    subject = eagle_subject(target, record)
    for changes in (
        {"aux_layers": (1, 3, 4)},
        {"norm_before_residual": True, "norm_output": True},
        {"norm_before_fc": True},
        {"fc_norm": True},
        {"interleaved": True},
        {"swapped": "k_v"},
        {"swapped": "gate_up"},
        {"head": "target"},
        {"embedding": "target"},
        {"rope": {"rope_type": "default", "rope_theta": 500000.0}},
        {"map": "identity"},
    ):
        changed = dataclasses.replace(subject.couplings, **changes)
        want, ids = subject.logits(changed, contexts, slice(0, 4))
        fixed = eagle_subject(target, corrected(subject, changed))
        got, new = fixed.logits(fixed.couplings, contexts, slice(0, 4))
        assert torch.equal(new, ids.sort().values)
        assert torch.allclose(got, want[..., ids.argsort()], atol=1e-5), changes
    for changes in ({"feature_shift": -1}, {"final_norm": False}, {"step_offset": 1}):
        with pytest.raises(InvalidValue, match="fix the engine"):
            corrected(subject, dataclasses.replace(subject.couplings, **changes))


def test_broken_maps_are_said_at_once_and_searched_all_the_same(target: LoadedPart, tmp_path: Path) -> None:
    out = tmp_path / "head"
    out.mkdir()
    record = toy_record()
    speculators.write(record, out, verifier=target.path)
    tensors = load_file(out / "model.safetensors")
    tensors["d2t"] = tensors["d2t"] + torch.arange(16)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidValue, match="holds offsets, not ids"):
        read_drafter(out)
    subject, certain, _ = load_subject(target, out)
    assert any("holds offsets, not ids" in text for text in certain)
    assert isinstance(subject, EagleSubject)
    absolute = dataclasses.replace(subject.couplings, map="absolute")
    fixed = corrected(subject, absolute)
    assert torch.equal(fixed.tensors["d2t"], record.tensors["d2t"])


def test_what_cannot_be_computed_is_certain(
    target: LoadedPart, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head"
    out.mkdir()
    speculators.write(toy_record(), out, verifier=target.path)
    tensors = load_file(out / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, out / "model.safetensors")
    assert cli.main(["diagnose", str(target.path), str(out)]) == 1
    assert "fc.weight is missing, it should be [32, 96]" in capsys.readouterr().out
    assert cli.main(["diagnose", str(target.path), str(tmp_path / "nowhere")]) == 2


def test_bad_input_is_one_line(
    target: LoadedPart, prompts: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", prompts)
    base = ["diagnose", str(target.path), str(target.path), "--prompts", str(file)]
    for extra, said in (
        (["--samples", "7"], "7 samples are too few"),
        (["--length", "6"], "between 7 and"),
        (["--top-p", "0"], "top-p above 0"),
        (["--draft-top-k", "-1"], "top-k is at least 0"),
    ):
        assert cli.main([*base, *extra]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert cli.main(base[:3]) == 2
    assert "give prompts as token ids" in capsys.readouterr().err


def test_short_answers_are_refused(target: LoadedPart) -> None:
    part = dataclasses.replace(target)
    part.__dict__["stop_ids"] = tuple(range(64))  # every answer ends at once
    with pytest.raises(InvalidValue, match=r"only 0 of 16 answers have the 5 tokens"):
        draw(part, [[3, 4]], 16, length=16, anchors=4, steps=STEPS)


def test_a_new_family_is_one_more_entry(target: LoadedPart, contexts: Contexts) -> None:
    def mirrored(c: Any, facts: Facts) -> Any:
        yield Hypothesis(
            "mine", "ids mirrored", {"aux_layers": tuple(facts.target_layers - i for i in c.aux_layers)}, ""
        )

    subject = eagle_subject(target, toy_record())
    subject.families = (*subject.families, mirrored)
    names = [h.name for h, _ in dg.Search(subject, contexts).hypotheses(subject.couplings)]
    assert "ids mirrored" in names


def test_default_prompts_are_real_text() -> None:
    texts = docstrings(24)
    assert len(texts) == 24 == len(set(texts)) and all(len(text) > 80 for text in texts)


def test_memory_limit_recomputes_the_same(target: LoadedPart, prompts: list[list[int]], contexts: Contexts) -> None:
    lean = dataclasses.replace(contexts, keep=False)
    lean._states, lean._final = {}, None
    for layer in (0, 3, 8):
        assert torch.equal(lean.state(layer, slice(2, 6)), contexts.state(layer, slice(2, 6)))
    raw = contexts.state(8, slice(0, 2), normed=False)
    assert not torch.equal(raw, contexts.state(8, slice(0, 2)))
    assert torch.equal(lean.law(slice(0, 8)), contexts.law(slice(0, 8)))
