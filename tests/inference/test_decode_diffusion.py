"""`draftsmith decode` with a masked diffusion model: chosen by its kind, streamed in order, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.commands.decode import main
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionDecoder, ParallelDiffusionSettings
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.loader import kind_of, load
from tests.engines import SIZES, tiny_hf
from tests.inference.test_masked_lm import MASK, llada


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaDA directory without a tokenizer."""
    path = tmp_path_factory.mktemp("llada")
    llada(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt_ids": [5, 6, 7]}\n{"prompt_ids": [9, 4, 4, 8, 1], "tag": "b"}\n')
    return file


def wanted(model: Path, **settings: Any) -> Any:
    net: Any = load(model).part
    requests = [
        CanvasRequest([*ids, *[MASK] * 16], range(len(ids), len(ids) + 16), row_id=i)
        for i, ids in enumerate(([5, 6, 7], [9, 4, 4, 8, 1]))
    ]
    return ParallelDiffusionDecoder(net, ParallelDiffusionSettings(**settings)).decode(requests)


def test_the_kind_chooses_the_decoder(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON: the outputs of the decoder from Python, in any batch; passes beside them."""
    assert kind_of(model) == "masked-lm"
    words = ["--prompts", str(prompts), "--max-new-tokens", "16", "--json"]
    want = wanted(model, block_length=8, rule="factor")
    for batch in ("1", "2"):
        chosen = ["--set", "block_length=8", "--set", "rule=factor", "--batch", batch]
        assert main([str(model), *words, *chosen]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["decoder"] == "parallel_diffusion"
        assert [row["output_ids"] for row in document["outputs"]] == want.output
        assert [row["passes"] for row in document["outputs"]] == want.notes["passes"]
        assert document["outputs"][1]["prompt_ids"] == [9, 4, 4, 8, 1] and document["outputs"][1]["tag"] == "b"


@pytest.mark.parametrize("rule", ["low_confidence", "factor"])
def test_text_comes_in_order(model: Path, prompts: Path, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Committed out of order, printed from left to right, a row a line; figures on stderr."""
    words = ["--prompts", str(prompts), "--max-new-tokens", "16", "--batch", "2", "--decoder", "parallel_diffusion"]
    assert main([str(model), *words, "--set", "block_length=8", "--set", f"rule={rule}"]) == 0
    out, err = capsys.readouterr()
    rows = [[int(word) for word in line.split()] for line in out.splitlines()]
    assert rows == wanted(model, block_length=8, rule=rule).output
    assert "tokens per pass of a row" in err and "target calls" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "20"], "20 tokens to fill are no multiple of block_length 32"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--ignore-eos"], "set eos=forbid"),
        (["--stop", "x"], "--stop looks at text in order"),
        (["--engine", "hf"], "no transformers class"),
        (["--set", "rule=luck"], "unknown rule 'luck'"),
        (["--set", "rule=learned_filter"], "needs a filter"),
        (["--max-new-tokens", "64"], "exceed this network's canvas of 64"),
        (["--draft", "somewhere"], "takes no draft"),
    ],
)
def test_bad_input(model: Path, prompts: Path, words: list[str], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        main([str(model), "--prompts", str(prompts), *words])


def test_the_wrong_model_for_a_decoder(model: Path, prompts: Path, tmp_path: Path) -> None:
    """A causal model fills no canvas, a diffusion model continues no text, and a filter goes with the latter alone."""
    tiny_hf("llama", 3, **SIZES).save_pretrained(tmp_path / "causal")
    with pytest.raises(InvalidType, match="is of kind 'lm': decoder 'parallel_diffusion' needs"):
        main([str(tmp_path / "causal"), "--prompts", str(prompts), "--decoder", "parallel_diffusion"])
    with pytest.raises(InvalidType, match="no causal language model"):
        main([str(model), "--prompts", str(prompts), "--decoder", "autoregressive"])
    with pytest.raises(InvalidValue, match="--filter belongs to decoder parallel_diffusion"):
        main([str(tmp_path / "causal"), "--prompts", str(prompts), "--filter", str(model)])
