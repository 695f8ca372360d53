"""Chat templates and BOS as hypotheses: renderings, recorded answers, and that the right one is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.inference import cli, registry
from draftsmith.inference import diagnose as dg
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.hypotheses.contexts import recorded
from draftsmith.inference.hypotheses.subjects import load_subject
from draftsmith.inference.hypotheses.template import GIVEN, read_answered, rendered
from draftsmith.inference.loader import LoadedPart, load
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from tests.eagles import write_target

BOS, STEPS = 60, 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedPart:
    return load(write_target(tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def draft(target: LoadedPart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target itself, but for one id that it was never trained on."""
    out = tmp_path_factory.mktemp("draft") / "draft"
    out.mkdir()
    tensors = load_file(target.path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    tensors["model.embed_tokens.weight"][BOS] = 3 * torch.randn(
        tensors["model.embed_tokens.weight"].shape[1], generator=generator
    )
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((target.path / "config.json").read_text())
    return out


def answers_to(target: LoadedPart, prompts: list[list[int]], length: int = 14) -> list[list[int]]:
    decoder = registry.build("autoregressive", {"target": target}, sampling=SamplingParams(temperature=1.0), seed=3)
    return decoder.decode([TokenRequest(p, length, row_id=i) for i, p in enumerate(prompts)]).output


def prompts_of(count: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 59, (n,), generator=generator).tolist() for n in (3, 4, 5, 3) * (count // 4)]


def write(path: Path, prompts: list[list[int]], answers: list[list[int]]) -> Path:
    rows = [{"prompt_ids": p, "answer_ids": a} for p, a in zip(prompts, answers, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_renderings_of_ids(tmp_path: Path) -> None:
    lines = read_answered(write(tmp_path / "a.jsonl", [[1, 5, 6], [1, 7]], [[8], [9, 9]]))
    found, answers = rendered(lines, None, 1)
    assert answers == [[8], [9, 9]]
    assert found == {GIVEN: [[1, 5, 6], [1, 7]], "no BOS": [[5, 6], [7]], "two BOS": [[1, 1, 5, 6], [1, 1, 7]]}
    assert list(rendered(lines, None, None)[0]) == [GIVEN], "no BOS is known"


class Chatty:
    """A tokenizer of one id a character, with a chat template."""

    bos_token_id = None
    chat_template = "... enable_thinking ..."

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def apply_chat_template(
        self, chat: Any, tokenize: bool, add_generation_prompt: bool, enable_thinking: bool | None = None
    ) -> str:
        text = "".join(f"<{m['role'][0]}>{m['content']}" for m in chat)
        return text + ("<a>" if add_generation_prompt else "") + ("/no" if enable_thinking is False else "")


def test_renderings_of_chats(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"messages": chat, "answer": "yo"}) + "\n")
    found, answers = rendered(read_answered(path), Chatty(), None)
    texts = {name: "".join(map(chr, ids[0])) for name, ids in found.items()}
    assert texts == {
        GIVEN: "<s>S<u>hi<a>",
        "no template": "S\nhi",
        "no generation prompt": "<s>S<u>hi",
        "generation prompt twice": "<s>S<u>hi<a><a>",
        "no system prompt": "<u>hi<a>",
        "thinking off": "<s>S<u>hi<a>/no",
    }
    assert answers == [[ord("y"), ord("o")]]
    path.write_text(json.dumps({"prompt": "hi", "answer": "yo"}) + "\n")
    found, _ = rendered(read_answered(path), Chatty(), None)
    assert "".join(map(chr, found["chat template"][0])) == "<u>hi<a>", "text was given bare"


def test_anchors_stand_at_the_same_tokens_in_every_rendering(target: LoadedPart) -> None:
    prompts = prompts_of(8)
    answers = answers_to(target, prompts)
    both = {GIVEN: prompts, "two BOS": [[BOS, BOS, *p] for p in prompts]}
    contexts = recorded(target, both, answers, anchors=4, steps=STEPS)
    other = contexts.rendered("two BOS")
    assert other is not contexts and contexts.rendered(GIVEN) is contexts and contexts.count == 8
    for one in (contexts, other):
        assert int((one.rows + 2 + STEPS).max()) <= one.tokens.shape[1]
    ahead = [c.tokens.gather(1, (c.rows + 2).clamp_max(c.tokens.shape[1] - 1)) for c in (contexts, other)]
    assert torch.equal(*ahead)
    assert torch.equal(contexts.first(3).rendered("two BOS").tokens, other.tokens[:3])


def test_a_wrong_rendering_is_named_and_a_right_one_draws_no_alarm(target: LoadedPart, draft: Path) -> None:
    """The answers were written behind bare prompts; served are prompts with a BOS that the draft never saw."""
    prompts = prompts_of()
    answers = answers_to(target, prompts)
    bos = [[BOS, *p] for p in prompts]
    sizes: dict[str, Any] = {"anchors": 4, "steps": STEPS}
    subject, _, _ = load_subject(target, draft)
    verdict = dg.diagnose(subject, recorded(target, {GIVEN: bos, "no BOS": prompts}, answers, **sizes))
    assert [found.hypothesis.name for found in verdict.findings] == ["prompts: no BOS"]
    assert verdict.final > 0.9 * STEPS > 1.1 * verdict.deployed  # its head never saw the id either
    subject, _, _ = load_subject(target, draft)
    right = dg.diagnose(subject, recorded(target, {GIVEN: prompts, "one BOS": bos}, answers, **sizes))
    assert right.status == "healthy" and subject.facts.renderings == ()
    # answers that were written behind the BOS: the bare prompt is kinder to the draft, and is not named
    subject, _, _ = load_subject(target, draft)
    truth = answers_to(target, bos)
    kinder = dg.diagnose(subject, recorded(target, {GIVEN: bos, "no BOS": prompts}, truth, **sizes))
    assert "no BOS" not in subject.facts.renderings and kinder.status != "named"


def test_the_command(target: LoadedPart, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((target.path / "config.json").read_text()) | {"bos_token_id": BOS}
    served = tmp_path / "target"
    served.mkdir()
    (served / "config.json").write_text(json.dumps(config))
    (served / "model.safetensors").write_bytes((target.path / "model.safetensors").read_bytes())
    prompts = prompts_of(32)
    file = write(tmp_path / "a.jsonl", [[BOS, *p] for p in prompts], answers_to(target, prompts))
    argv = ["diagnose", str(served), str(draft), "--answers", str(file), "--anchors", "4", "--steps", str(STEPS)]
    assert cli.main([*argv, "--samples", "16", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["family"] for one in found["findings"]] == ["chat template"]
    fresh = found["confirmed"]["fresh"]
    assert fresh["after"][0] > 0.9 * STEPS > 1.05 * fresh["before"][0]
    assert "another rendering" in found["confirmed"]["decoding"]["after"]["not_run"]
    assert cli.main([*argv, "--prompts", str(file)]) == 2
    assert "leave --prompts out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "holds no answers"),
        ('{"prompt": "a"}', "1: wants an object with 'prompt'"),
        ('{"prompt": "a", "prompt_ids": [1], "answer": "b"}', "one of each is needed"),
        ("{", ":1: wants an object"),
        ('{"messages": [{"role": "user"}], "answer": "b"}', ":1: wants an object"),
    ],
)
def test_bad_files(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InvalidValue, match=said):
        read_answered(tmp_path / "a.jsonl")
    with pytest.raises(InvalidValue, match="no chat template"):
        (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}], "answer_ids": [1]}')
        rendered(read_answered(tmp_path / "a.jsonl"), None, None)


def test_short_answers_are_refused(target: LoadedPart) -> None:
    with pytest.raises(InvalidValue, match="only 0 of 8 recorded answers"):
        recorded(target, {GIVEN: prompts_of(8)}, [[1, 2]] * 8, steps=STEPS)


def test_couplings_say_which_rendering(target: LoadedPart, draft: Path) -> None:
    subject, _, _ = load_subject(target, draft)
    subject.facts = dataclasses.replace(subject.facts, renderings=("no BOS",))
    names = [h.name for family in subject.families for h in family(subject.couplings, subject.facts)]
    assert "prompts: no BOS" in names and f"prompts: {GIVEN}" not in names
