"""Every shipped config: opens with its command, builds, and describes a network that fits its data."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference.errors import InvalidValue
from draftsmith.modules.any_subset_lm import AnySubset
from draftsmith.trainers import shipped
from draftsmith.trainers.cli import Given
from draftsmith.trainers.one_line import one_line
from draftsmith.trainers.training import TrainingCLI

NAMES = shipped.names()
METHODS = sorted({name.partition("/")[0] for name in NAMES} - {"demo"})


def build(path: Path, *overrides: str) -> TrainingCLI:
    """Model, data and trainer as the command builds them; nothing is trained, prepared or written."""
    with one_line():
        return TrainingCLI(Given("validate", configs=[path], rest=list(overrides)), None)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_there_are_configs_of_every_size() -> None:
    assert {"lm/debug", "lm/base", "osd/debug"} <= set(NAMES)
    for method in METHODS:
        assert f"{method}/debug" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_its_command_and_says_what_knobs_cost(name: str) -> None:
    text = shipped.resolve(name).read_text()
    first, *rest = text.splitlines()
    assert re.match(rf"# draftsmith fit -c {name}\b", first), first
    assert rest[0] == "#" and rest[1].startswith("# ")
    assert re.search(r"#.*\b(cost|time|memory|seconds|minutes?|hours?)\b", text, re.IGNORECASE)


@pytest.mark.parametrize("name", NAMES)
def test_it_builds(name: str) -> None:
    cli = build(shipped.resolve(name))
    assert cli.model is not None and cli.datamodule is not None
    spec = getattr(cli.model, "spec", None)
    if spec is not None and spec.arch is not None:  # networks given by sizes are built too, without memory
        with torch.device("meta"):
            cli.model.configure_model()
        net: Any = cli.model.net
        text = cli.datamodule.text
        assert text.length <= net.config.max_position_embeddings
        assert text.bpe_size is None or text.bpe_size <= net.config.vocab_size
    if isinstance(cli.model, AnySubset) and cli.model.config is not None:
        text, config = cli.datamodule.text, cli.model.config
        assert text.length <= config.max_length
        assert text.bpe_size is None or text.bpe_size <= config.mask_id < config.vocab_size
    assert not os.listdir()


def test_an_unknown_key_would_be_noticed(tmp_path: Path) -> None:
    text = shipped.resolve("lm/debug").read_text().replace("warmup_steps", "warmup_stepz")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InvalidValue, match="warmup_steps"):
        build(tmp_path / "c.yaml")


def test_documented_figures_of_lm_base() -> None:
    cli = build(shipped.resolve("lm/base"))
    with torch.device("meta"):
        cli.model.configure_model()
    assert 25e6 < sum(p.numel() for p in cli.model.parameters()) < 35e6  # "about 30M parameters"
