"""`draftsmith decode`: streams the very text of the plain decoder, reports acceptance, and refuses in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.inference import load, registry
from draftsmith.inference.cli import main
from draftsmith.inference.couplings import target_fingerprint, tokenizer_identity
from draftsmith.inference.manifest import TargetCoupling
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from tests import tiny

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.write_lm(tmp_path_factory.mktemp("decode") / "target")
    tiny.add_manifest(directory)
    return directory


@pytest.fixture(scope="module")
def draft(target: Path) -> Path:
    """A drafter for the target, with the target's own weights (so that it is accepted), and a setting that it wants."""
    directory = Path(shutil.copytree(target, target.parent / "draft"))
    coupling = TargetCoupling(target_fingerprint(target), "target")
    tiny.add_manifest(directory, "drafter", target=coupling, decode_defaults={"draft_length": 3})
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": PROMPT, "tag": "code"}, {"prompt_ids": [5, 6, 7]}, {"prompt": "naïve 😀"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, str]:
    assert main(["decode", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr of a call that must end with exit code 2 and print nothing else."""
    assert main(["decode", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def plain_text(target: Path, prompt: str, n: int, **request: Any) -> str:
    """The whole text by the library, without streaming."""
    part = load(target)
    assert part.tokenizer is not None
    decoder = registry.build(
        "autoregressive",
        {"target": part.part},
        sampling=SamplingParams(),
        settings=None,
        seed=0,
        tokenizer=part.tokenizer,
        vocab_size=part.vocab_size,
    )
    stops = {"stop_ids": part.stop_ids} | request
    result = decoder.decode([TokenRequest(part.tokenizer.encode(prompt), max_new_tokens=n, **stops)])
    assert result.text is not None
    return result.text[0]


class TestText:
    def test_streams_the_text_of_the_plain_decoder(
        self, target: Path, draft: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected = plain_text(target, PROMPT, 40) + "\n"
        out, err = run(capsys, target, "--prompt", PROMPT, "--max-new-tokens", 40)
        assert out == expected
        assert err.startswith("autoregressive: 40 tokens in ") and "40 target calls" in err and "alpha" not in err
        out, err = run(capsys, target, "--draft", draft, "--prompt", PROMPT, "--max-new-tokens", 40)
        assert out == expected
        assert err.startswith("speculative: 40 tokens in ") and "alpha 1.000" in err and "tokens/s" in err
        assert "draft calls" in err and err.count("\n") == 1

    def test_the_draft_length_that_the_manifest_chose_and_the_one_that_the_user_chose(
        self, target: Path, draft: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The draft is the target, so every round commits draft_length + 1 tokens."""
        base = (target, "--draft", draft, "--prompt", PROMPT, "--max-new-tokens", 24, "--json", "--ignore-eos")
        base = (*base, "--set", "fallback=never")
        for extra, per_round in (((), 4), (("--set", "draft_length=5"), 6)):
            document = json.loads(run(capsys, *base, *extra)[0])
            histogram = document["acceptance"]["histogram"]
            assert max(map(int, histogram)) == per_round - 1

    def test_stop_string_ends_the_text_before_it(self, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
        whole = plain_text(target, PROMPT, 40, stop_ids=())
        stop = whole[10:12]
        out, _ = run(capsys, target, "--prompt", PROMPT, "--max-new-tokens", 40, "--stop", stop, "--ignore-eos")
        assert out == whole[: whole.index(stop)] + "\n"

    def test_prompts_in_batches_come_out_in_their_order(
        self, target: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = (target, "--prompts", prompts, "--max-new-tokens", 12, "--temperature", 0.9, "--seed", 3)
        alone, _ = run(capsys, *argv)
        together, err = run(capsys, *argv, "--batch", 3)
        assert together == alone and alone.count("\n") >= 3
        document = json.loads(run(capsys, *argv, "--batch", 2, "--json")[0])
        assert "".join(row["text"] + "\n" for row in document["outputs"]) == alone
        assert err.startswith("autoregressive: 36 tokens") or "tokens in" in err

    def test_json(self, target: Path, draft: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, err = run(capsys, target, "--draft", draft, "--prompts", prompts, "--max-new-tokens", 8, "--json")
        document = json.loads(out)
        assert document["decoder"] == "speculative" and document["sampling"]["temperature"] == 0.0
        assert [row["tag"] for row in document["outputs"]] == ["code", "", ""]
        assert document["outputs"][1]["prompt_ids"] == [5, 6, 7]
        for row in document["outputs"]:
            assert len(row["output_ids"]) == 8 or row["stop"] == "stop_id"
        assert document["acceptance"]["alpha"]["value"] == pytest.approx(1.0)
        assert document["nfe"]["target"] > 0 and document["tokens_per_second"] > 0
        assert err.startswith("speculative: ")

    def test_accepted_tokens_are_green_and_the_text_is_the_same(
        self, target: Path, draft: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = (target, "--draft", draft, "--prompt", PROMPT, "--max-new-tokens", 30)
        bare, _ = run(capsys, *argv)  # stdout is no terminal: no colour
        colored, _ = run(capsys, *argv, "--color", "always")
        assert "\x1b[32m" not in bare and colored.count("\x1b[32m") == colored.count("\x1b[0m") > 3
        assert colored.replace("\x1b[32m", "").replace("\x1b[0m", "") == bare

    def test_without_a_tokenizer_ids_are_printed(
        self, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bare = tiny.write_lm(tmp_path / "bare", tokenizer=False, width=16)
        prompts.write_text('{"prompt_ids": [1, 2, 3]}')
        out, _ = run(capsys, bare, "--prompts", prompts, "--max-new-tokens", 4, "--ignore-eos")
        assert len([int(word) for word in out.split()]) == 4
        assert "no tokenizer" in fails(capsys, bare, "--prompt", "text")

    def test_prompt_lookup_needs_no_draft(self, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, err = run(capsys, target, "--decoder", "prompt_lookup", "--prompt", PROMPT * 3, "--max-new-tokens", 20)
        assert out == plain_text(target, PROMPT * 3, 20) + "\n" and err.startswith("prompt_lookup: ")

    def test_half_precision_and_the_adapter(self, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
        expected = plain_text(target, PROMPT, 10) + "\n"
        assert run(capsys, target, "--prompt", PROMPT, "--max-new-tokens", 10, "--engine", "hf")[0] == expected
        run(capsys, target, "--prompt", PROMPT, "--max-new-tokens", 10, "--dtype", "bfloat16")


class TestRefused:
    def test_unknown_decoder(self, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
        said = fails(capsys, target, "--prompt", "x", "--decoder", "speculativ")
        assert "unknown decoder 'speculativ': choose one of aded, any_subset," in said
        assert "did you mean 'speculative'?" in said

    def test_a_draft_with_another_tokenizer(
        self, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = tiny.write_lm(tmp_path / "other", text="zzz yyy zzz yyy " * 9, width=8)
        argv = (target, "--draft", other, "--prompt", "x")
        ours, theirs = tokenizer_identity(target), tokenizer_identity(other)
        assert ours is not None and theirs is not None
        for extra in ((), ("--allow-mismatch",)):  # two meanings of an id are never let through
            said = fails(capsys, *argv, *extra)
            assert "draft and target vocabularies differ: the first differing id is" in said
            assert ours.vocab_map_hash in said and theirs.vocab_map_hash in said
            assert "use a draft trained with the target's tokenizer" in said

    @pytest.mark.filterwarnings("always::draftsmith.inference.couplings.MismatchWarning")  # as outside the tests
    def test_a_draft_for_another_target(
        self, target: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = tiny.write_lm(tmp_path / "other", seed=4)
        argv = (other, "--draft", draft, "--prompt", PROMPT, "--max-new-tokens", 12)
        said = fails(capsys, *argv)
        assert target_fingerprint(target) in said and target_fingerprint(other) in said and "--allow-mismatch" in said
        out, err = run(capsys, *argv, "--allow-mismatch", "--set", "fallback=never")
        assert out == plain_text(other, PROMPT, 12) + "\n"  # still the target's own text
        warning, figures = err.splitlines()
        assert warning.startswith("warning: ") and target_fingerprint(other) in warning
        assert figures.startswith("speculative: ")

    def test_damaged_weights_and_manifests(
        self, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = Path(shutil.copytree(target, tmp_path / "copy"))
        argv = (copy, "--prompt", "x")
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(5000)
            byte = file.read(1)
            file.seek(5000)
            file.write(bytes([byte[0] ^ 1]))
        assert "model.safetensors is damaged or was changed: expected sha256" in fails(capsys, *argv)
        run(capsys, *argv, "--no-verify", "--max-new-tokens", 1)  # a flipped bit does not change a size
        with (copy / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        assert "(5000 bytes)" in fails(capsys, *argv, "--no-verify")
        (copy / "manifest.json").write_text('{"schema_version": 2}')
        assert "schema version 2, this draftsmith reads version 1" in fails(capsys, *argv)
        (copy / "manifest.json").unlink()
        assert "is truncated or damaged" in fails(capsys, *argv)

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            ((), "one of the arguments --prompt --prompts --infill is required"),
            (("--prompt", ""), "empty prompt"),
            (("--prompts", "nowhere.jsonl"), "cannot read prompts from nowhere.jsonl: No such file or directory"),
            (("--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens must be at least 1, got 0"),
            (("--prompt", "x", "--batch", "0"), "--batch must be at least 1, got 0"),
            (("--prompt", "x", "--temperature", "-1"), "temperature must be 0 (greedy) or more, got -1.0"),
            (("--prompt", "x", "--top-p", "0"), "top_p must be above 0"),
            (("--prompt", "x", "--set", "draft_length"), "--set wants KEY=VALUE, got 'draft_length'"),
            (("--prompt", "x", "--set", "colour=1"), "'colour'"),
            (
                ("--prompt", "x", "--decoder", "prompt_lookup", "--set", "draft_length=five"),
                "must be of type int, got 'five'",
            ),
            (
                ("--prompt", "x", "--decoder", "prompt_lookup", "--set", "draft_length=2.5"),
                "must be of type int, got 2.5",
            ),
            (
                ("--prompt", "x", "--decoder", "prompt_lookup", "--set", "draft_length=0"),
                "draft_length must be at least 1",
            ),
            (("--prompt", "x", "--device", "warp"), "device 'warp' cannot be used here"),
            (("--prompt", "x", "--decoder", "speculative"), "needs a draft: add --draft DIR"),
            (("--prompt", "x", "--dtype", "int4"), "invalid choice: 'int4'"),
            (("--prompt", "x", "--engine", "vllm"), "unknown engine 'vllm'"),
            (("--prompt", "x", "--stop", ""), "empty stop string"),
            (("--prompt", "x", "--temprature", "1"), "did you mean --temperature?"),
            (("--prompt", "x", "--draft", "nowhere"), "no such directory: nowhere"),
        ],
    )
    def test_bad_options(
        self, target: Path, argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert said in fails(capsys, target, *argv)

    def test_a_draft_where_none_is_used(self, target: Path, draft: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = (target, "--prompt", "x", "--draft", draft, "--decoder", "autoregressive")
        assert "takes no draft" in fails(capsys, *argv)

    def test_roles(self, target: Path, draft: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "can be draft, not target" in fails(capsys, draft, "--prompt", "x")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "holds no prompts"),
            ("{", "prompts.jsonl:1: not valid JSON"),
            ('{"prompt": "a"}\n[1]', "prompts.jsonl:2: wants an object"),
            ('{"text": "a"}', "prompts.jsonl:1: wants an object with a key 'prompt'"),
            ('{"prompt": "a", "prompt_ids": [1]}', "prompts.jsonl:1: wants an object"),
            ('{"prompt": ""}', "'prompt' must be text that is not empty"),
            ('{"prompt_ids": [1, -2]}', "'prompt_ids' must be a list of token ids"),
            ('{"prompt_ids": []}', "'prompt_ids' must be a list of token ids"),
            ('{"prompt": "a", "tag": 3}', "'tag' must be text, got 3"),
        ],
    )
    def test_bad_prompt_files(
        self, target: Path, prompts: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompts.write_text(text)
        assert said in fails(capsys, target, "--prompts", prompts)

    def test_a_prompt_file_that_is_not_text(
        self, target: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompts.write_bytes(b"\xff\xfe\x00")
        assert "it is not UTF-8 text" in fails(capsys, target, "--prompts", prompts)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example:\n  draftsmith decode exports/target" in out and "--top-p" in out
