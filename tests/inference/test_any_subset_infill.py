"""Joint scores of completions, text with marked holes, and `draftsmith decode --infill`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference import load, registry
from draftsmith.inference.any_subset_infill import Template, canvases, infill, parse
from draftsmith.inference.any_subset_score import rerank, score
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.cli import main
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.portable import write_net
from draftsmith.inference.sampling import SamplingParams
from tests import tiny
from tests.canvases import canvas_of, conditionals, hole_law, small_net

T1 = SamplingParams(temperature=1.0)
TEXT = "def add(a, b): [[MASK:3]] return a"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random any-subset model with a tokenizer and a setting that its manifest found best."""
    directory = tmp_path_factory.mktemp("any-subset") / "export"
    directory.mkdir()
    tokenizer = tiny.write_tokenizer(directory)
    net = small_net(len(tokenizer), max_length=64)
    write_net(net, torch.float32, directory)
    tiny.add_manifest(directory, "any-subset-lm", decode_defaults={"k": 3}, trained={"mask_rate": [0.0, 1.0]})
    return directory


# Scores --------------------------------------------------------------------------------------------------------------


def test_scores_are_the_enumerated_joint() -> None:
    net = small_net()
    requests = [canvas_of("1__2_", 4), canvas_of("_3", 4), canvas_of("12", 4)]
    outcomes = hole_law(net, requests[0], T1)
    scores = score(net, [requests[0]] * 64, outcomes.outcomes, batch=10)
    torch.testing.assert_close(
        torch.tensor([s.total for s in scores]).exp().double(), outcomes.probs, atol=1e-6, rtol=0
    )
    # ragged rows in one pass, each hole's own conditional at its position
    mixed = score(net, requests, [[3, 0, 1], [2], []])
    tokens = torch.tensor([requests[0].filled([3, 0, 1])])
    own = conditionals(net, tokens, requests[0].holes, T1)[0].log().tolist()
    assert mixed[0].by_hole == pytest.approx(own, abs=1e-5)
    assert mixed[1].total == pytest.approx(math.log(float(hole_law(net, requests[1], T1).probs[2])), abs=1e-5)
    assert mixed[2].by_hole == () and mixed[2].total == mixed[2].mean == 0.0
    assert mixed[0].mean == pytest.approx(mixed[0].total / 3)


def test_a_rank_of_ones_own_is_scored_along_it() -> None:
    """Another chain: by hand, hole after hole; and by_hole is by position, not by rank."""
    net = small_net()
    request = canvas_of("1__2", 4, rank=[0, 3, 2, 1])
    rank = torch.tensor([[0, 3, 2, 1]])
    tokens = torch.tensor([[1, 0, 3, 2]])
    logp = net.head(net(tokens, rank, torch.tensor([2]), torch.tensor([[2, 1]]))).log_softmax(-1)[0]
    expected = [float(logp[1, 0]), float(logp[0, 3])]
    assert score(net, [request], [[0, 3]])[0].by_hole == pytest.approx(expected, abs=1e-6)


def test_rerank_sorts_by_the_joint() -> None:
    net = small_net()
    request = canvas_of("1__2_", 4)
    law = hole_law(net, request, T1)
    chosen = [5, 40, 17, 63]
    order = [i for i, _ in rerank(net, request, [law.outcomes[c] for c in chosen])]
    assert [chosen[i] for i in order] == sorted(chosen, key=lambda c: -float(law.probs[c]))


def test_bad_completions() -> None:
    net, request = small_net(), canvas_of("1__2", 4)
    for completion, message in (([1], "1 tokens for 2 holes"), ([1, 4], "id 4 is no token"), ([7, 0], "id 7 is no")):
        with pytest.raises(InvalidValue, match=message):
            score(net, [request], [completion])
    with pytest.raises(InvalidValue, match="2 canvases and 1 completions"):
        score(net, [request] * 2, [[0, 0]])
    with pytest.raises(InvalidValue, match="needs one visible token or a BOS"):
        score(net, [canvas_of("__", 4)], [[0, 0]])
    with pytest.raises(InvalidState, match="train mode"):
        score(small_net().train(), [request], [[0, 0]])
    net.norm.weight.fill_(float("nan"))
    with pytest.raises(InvalidState, match="NaN"):
        score(net, [request], [[0, 0]])


# Marked text ---------------------------------------------------------------------------------------------------------


def test_parse() -> None:
    assert parse("a [[MASK:12]] b[[MASK:4-12]]") == Template(("a ", " b", ""), ((12, 12), (4, 12)))
    for text, message in (
        ("no hole", "has no hole"),
        ("a [[MASK:0]]", r"\[\[MASK:0\]\] is no hole"),
        ("a [[MASK:9-4]]", "is no hole"),
        ("a [[MASK:x]]", "is no hole"),
    ):
        with pytest.raises(InvalidValue, match=message):
            parse(text)


def test_canvases_cover_the_ranges(export: Path) -> None:
    part: Any = load(export)
    net = part.part
    made = canvases(parse("a[[MASK:1-3]]b[[MASK:2-3]]"), part.tokenizer, net, samples=2)
    assert sorted({r.tag for r in made}) == ["1,2", "1,3", "2,2", "2,3", "3,2", "3,3"]
    assert [r.row_id for r in made] == list(range(12))
    assert all(sum(map(int, r.tag.split(","))) == len(r.holes) == len(r.tokens) - 2 for r in made)
    with pytest.raises(InvalidValue, match="400 canvases"):
        canvases(parse("[[MASK:1-20]] [[MASK:1-20]]"), part.tokenizer, net)
    alone = canvases(parse("[[MASK:2]]"), part.tokenizer, net)
    assert alone[0].tokens[0] == part.tokenizer.bos_token_id and list(alone[0].holes) == [1, 2]


def test_pieces_inside_a_text_get_no_space_before_them() -> None:
    """As SentencePiece's tokenizers put one before whatever they are given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = {symbol: i for i, symbol in enumerate("\u2581abc.")}
    backend = Tokenizer(models.BPE(vocab=symbols, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.encode("b") == [0, 2], "the trap"
    made = canvases(parse("a[[MASK:1]]b c[[MASK:2]]"), tokenizer, small_net(5))
    assert made[0].tokens == [0, 1, 5, 2, 0, 3, 5, 5]


def test_infill_is_the_decoder_on_the_canvas(export: Path) -> None:
    part: Any = load(export)
    net = part.part
    decoder = registry.build_canvas("any_subset", {"target": net}, sampling=T1, seed=4)
    found, results = infill(decoder, net, part.tokenizer, "a[[MASK:1-3]]b[[MASK:2]]", samples=2, batch=4)
    assert len(found) == 6 and len(results) == 2
    means = [one.score.mean for one in found]
    assert means == sorted(means, reverse=True)
    by_sum, _ = infill(decoder, net, part.tokenizer, "a[[MASK:1-3]]b[[MASK:2]]", samples=2, compare="sum")
    assert [one.score.total for one in by_sum] == sorted((one.score.total for one in found), reverse=True)
    for one in found:
        first, second = (part.tokenizer.encode(text) for text in "ab")
        tokens = [*first, *one.tokens[: one.lengths[0]], *second, *one.tokens[one.lengths[0] :]]
        assert one.text == part.tokenizer.decode(tokens)
        holes = [1 + i for i in range(one.lengths[0])] + [2 + one.lengths[0] + i for i in range(2)]
        request = CanvasRequest(
            [net.config.mask_id if i in holes else t for i, t in enumerate(tokens)], holes, row_id=0
        )
        assert score(net, [request], [one.tokens])[0].total == pytest.approx(one.score.total, abs=1e-4)
        assert 1 <= one.calls <= len(one.tokens)
    for fields, message in (({"compare": "median"}, "unknown compare"), ({"samples": 0}, "samples must be at least 1")):
        with pytest.raises(InvalidValue, match=message):
            infill(decoder, net, part.tokenizer, TEXT, **fields)


# The command ---------------------------------------------------------------------------------------------------------


def test_decode_infill(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", str(export), "--infill", TEXT]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("def add(a, b): ") and out.endswith(" return a\n")
    assert err.startswith("any_subset: best of 1 with holes of 3 tokens, log p -") and "calls per token" in err
    argv = [
        "decode",
        str(export),
        "--infill",
        TEXT.replace("3", "2-4"),
        "--samples",
        "2",
        "--temperature",
        "1",
        "--json",
    ]
    assert main([*argv, "--batch", "4"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["candidates"]) == 6 and {tuple(c["lengths"]) for c in document["candidates"]} == {
        (2,),
        (3,),
        (4,),
    }
    means = [c["log_prob_per_token"] for c in document["candidates"]]
    assert means == sorted(means, reverse=True) and document["compare"] == "mean"
    assert document["nfe"]["target"] > 0 and document["acceptance"]["requests"] == 6
    # the batch decides nothing
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["candidates"] == document["candidates"]


def test_the_manifests_settings_hold_where_none_was_chosen(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def nfe(*more: str) -> dict[str, int]:
        argv = ["decode", str(export), "--infill", "def [[MASK:20]] b", "--temperature", "1", "--json", *more]
        assert main(argv) == 0
        found: dict[str, int] = json.loads(capsys.readouterr().out)["nfe"]
        return found

    assert nfe() == nfe("--set", "k=3") != nfe("--set", "k=2")
    assert nfe("--decoder", "any_subset_sequential") == {"target": 20}


def test_refusals(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny.write_lm(tmp_path / "lm")
    bare = tmp_path / "bare"
    bare.mkdir()
    write_net(small_net(), torch.float32, bare)
    tiny.add_manifest(bare, "any-subset-lm")
    for argv, message in (
        ((export, "--prompt", "a", "--decoder", "any_subset"), "fills holes: mark them, --infill"),
        (
            (export, "--infill", TEXT, "--decoder", "autoregressive"),
            "continues prompts: --infill takes one of any_subset",
        ),
        ((export, "--infill", "no hole"), "the text has no hole"),
        ((export, "--infill", TEXT, "--stop", "x"), "--stop belongs to --prompt"),
        ((export, "--infill", TEXT, "--max-new-tokens", "4"), "--max-new-tokens belongs to --prompt"),
        ((export, "--infill", TEXT, "--draft", plain), "takes no draft"),
        ((export, "--infill", TEXT, "--set", "k=1"), "k must be at least 2"),
        ((plain, "--infill", TEXT), "--infill needs an any-subset model"),
        ((plain, "--prompt", "a", "--samples", "2"), "--samples belongs to --infill"),
        ((bare, "--infill", TEXT), "has no tokenizer"),
        ((export, "--prompt", "a"), "is of kind 'any-subset-lm' and no causal language model"),
    ):
        assert main(["decode", *map(str, argv)]) == 2, argv
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err, err
