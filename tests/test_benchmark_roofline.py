"""The facts of benchmarks/roofline.py against the sizes that the models' names state, and reading the table of rows."""

from pathlib import Path

import pytest

from benchmarks import roofline
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.roofline import sizes_of

HEADER = (
    "target,draft,dataset,batch_size,steps,topk,num_draft_tokens,accept_length,output_throughput,baseline_throughput"
)
LINE = "Llama-3.1-8B-Instruct,some/draft,gsm8k,1,3,1,4,2.5,300.0,200.0"


@pytest.mark.parametrize(
    ("target", "total", "active"),
    [  # in billions, as their authors state them; Scout's without what reads images
        ("Llama-3.1-8B-Instruct", 8.03, 8.03),
        ("Llama-4-Scout-17B-16E-Instruct", 109, 17),
        ("Ling-flash-2.0", 100, 6.1),
        ("Qwen3-235B-A22B-Instruct-2507", 235, 22),
        ("Qwen3-Coder-30B-A3B-Instruct", 30.5, 3.3),
        ("Qwen3-Coder-480B-A35B-Instruct", 480, 35),
        ("Qwen3-Next-80B-A3B-Instruct-FP8", 80, 3.9),
    ],
)
def test_the_facts_add_up_to_the_stated_parameters(target: str, total: float, active: float) -> None:
    config = roofline.TARGETS[target]
    sizes, embedding = sizes_of(config), config["hidden_size"] * config["vocab_size"]
    routed = sizes.routed_layers * sizes.expert
    assert (sizes.always + embedding + routed * sizes.experts) / 1e9 == pytest.approx(total, rel=0.03)
    assert (sizes.always + embedding + routed * sizes.chosen) / 1e9 == pytest.approx(active, rel=0.06)
    assert sizes.number_bytes == (1 if "FP8" in target else 2)


def test_every_target_has_a_draft_that_is_small_beside_it() -> None:
    assert set(roofline.DRAFTS) == set(roofline.TARGETS)
    for target, config in roofline.TARGETS.items():
        draft = roofline.draft_sizes(target)
        assert draft.layers == 1
        assert draft.bytes(8) < 0.1 * sizes_of(config).bytes(8)


def test_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{HEADER}\n{LINE}\n")
    (row,) = roofline.read_rows(tmp_path / "rows.csv")
    assert (row.target, row.accepted_length, row.speedup) == ("Llama-3.1-8B-Instruct", 2.5, 1.5)
    assert (row.plan.batch, row.plan.steps, row.plan.topk, row.plan.num_draft_tokens) == (1, 3, 1, 4)
    assert row.terms.verify == pytest.approx(1.0)  # four tokens of a dense target are bound by its bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not the table"),
        (HEADER + "\n", "holds no row"),
        ("target,steps\nLlama-3.1-8B-Instruct,3\n", "batch_size"),
        (f"{HEADER}\n{LINE.replace('Llama-3.1-8B', 'Llama-3.1-9B')}\n", "did you mean 'Llama-3.1-8B-Instruct'"),
        (f"{HEADER}\n{LINE.replace('200.0', '0')}\n", "not the table"),
        (f"{HEADER}\n{LINE.replace(',1,4,', ',1,5,')}\n", "chain of 3 steps"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InvalidValue, match=message):
        roofline.read_rows(tmp_path / "rows.csv")
