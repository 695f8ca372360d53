"""The table of decoders: complete, lazy, documented, and strict about names, parts and settings."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.inference import registry
from draftsmith.inference.decoders.autoregressive import AutoregressiveDecoder
from draftsmith.inference.decoders.speculative import SpeculativeDecoder, SpeculativeSettings
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.loader import LoadedPart
from tests.fakes import markov, near, requests_for

NAMES = registry.names()


def parts_for(name: str) -> dict[str, Any]:
    target = markov(12)
    parts = {"target": target, "draft": near(target)}
    return {role: parts[role] for role in registry.get(name).needs}


def test_names() -> None:
    assert NAMES[:3] == ("autoregressive", "speculative", "prompt_lookup")
    assert [registry.get(name).name for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", (*NAMES, *registry.names("canvas")))
def test_every_row_is_complete(name: str) -> None:
    entry = registry.get(name)
    assert entry.needs[0] == "target" and entry.summary and not entry.summary.endswith(".")
    kind = entry.settings_type()
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    for field in dataclasses.fields(kind):
        assert field.metadata["help"], field.name
        assert field.default is not dataclasses.MISSING, f"{field.name} needs a default"
        choices = field.metadata.get("choices")
        assert choices is None or field.default in choices
    assert set(entry.lossy_settings) <= {f.name for f in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", NAMES)
def test_every_decoder_is_built_and_decodes(name: str) -> None:
    decoder = registry.build(name, parts_for(name))
    requests = requests_for([[1], [2, 3]], 4, 6)
    result = decoder.decode(requests)
    assert [len(o) for o in result.output] == [6] * 4 and result.nfe["target"] > 0
    empty = decoder.decode([])
    assert empty.output == [] and len(empty.rounds) == 0 and set(empty.nfe) == set(result.nfe)


@pytest.mark.parametrize("name", NAMES)
def test_stream_yields_the_output_and_returns_the_result(name: str) -> None:
    decoder = registry.build(name, parts_for(name))
    requests = requests_for([[1], [2, 3]], 3, 7)
    stream = decoder.stream(requests)
    rows: list[list[int]] = [[], [], []]
    ended: list[str | None] = [None, None, None]
    while True:
        try:
            commit = next(stream)
        except StopIteration as stop:
            result = stop.value
            break
        assert ended[commit.row] is None and commit.accepted <= len(commit.tokens)
        rows[commit.row] += commit.tokens
        ended[commit.row] = commit.stop
    assert rows == result.output == registry.build(name, parts_for(name)).decode(requests).output
    assert ended == result.stop


def test_parts_may_be_loaded_parts_and_drafters() -> None:
    target = markov(12)
    loaded = LoadedPart.__new__(LoadedPart)
    object.__setattr__(loaded, "part", target)
    assert isinstance(registry.build("autoregressive", {"target": loaded}), AutoregressiveDecoder)
    drafter = ModelDrafter(target)
    assert isinstance(registry.build("speculative", {"target": loaded, "draft": drafter}), SpeculativeDecoder)


def test_lossless_only_without_a_mix() -> None:
    entry = registry.get("speculative")
    assert entry.is_lossless(SpeculativeSettings()) and entry.is_lossless(SpeculativeSettings(draft_length=9))
    assert not entry.is_lossless(SpeculativeSettings(lossy_mix=0.1))


def test_unknown_decoder_lists_the_choices_and_the_nearest() -> None:
    with pytest.raises(InvalidValue, match=r"choose one of aded, .*autoregressive, .*speculative.*'speculative'"):
        registry.get("speculativ")


def test_missing_and_superfluous_parts() -> None:
    target = markov(12)
    with pytest.raises(InvalidValue, match="needs a part in the role 'draft'"):
        registry.build("speculative", {"target": target})
    with pytest.raises(InvalidValue, match="takes no part in the role 'draft'"):
        registry.build("prompt_lookup", {"target": target, "draft": target})


@pytest.mark.parametrize("key", ["num_beams", "num_return_sequences", "draft_lenght"])
def test_unknown_settings_are_errors(key: str) -> None:
    """Beam search and several return sequences are not offered: there is no such setting."""
    with pytest.raises(InvalidValue, match=rf"unknown setting of decoder 'speculative' '{key}'.*draft_length"):
        registry.make_settings("speculative", {key: 4})
    with pytest.raises(InvalidValue, match="has no settings"):
        registry.make_settings("autoregressive", {key: 4})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("draft_length", "five", "int"),
        ("draft_length", 2.5, "int"),
        ("draft_length", True, "int"),
        ("lossy_mix", "0.5", "float"),
        ("lossy_mix", False, "float"),
        ("batching", 3, "str"),
    ],
)
def test_settings_of_another_type_are_errors(key: str, value: Any, kind: str) -> None:
    with pytest.raises(InvalidValue, match=f"{key} of decoder 'speculative' must be of type {kind}, got"):
        registry.make_settings("speculative", {key: value})


def test_settings_from_mapping_instance_and_default() -> None:
    assert registry.make_settings("speculative", {"lossy_mix": 0}).lossy_mix == 0
    given = SpeculativeSettings(draft_length=3)
    assert registry.make_settings("speculative", given) is given
    assert registry.make_settings("speculative") == SpeculativeSettings()
    with pytest.raises(InvalidType, match="must be a mapping or a SpeculativeSettings"):
        registry.make_settings("speculative", 5)


def test_the_table_imports_nothing_heavy() -> None:
    code = "import sys; from draftsmith.inference import registry; registry.names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_the_documentation_lists_every_decoder_and_setting() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "decoding.md"
    if not page.exists():
        pytest.skip("no docs beside the installed package")
    text = page.read_text(encoding="utf-8")
    for name in NAMES:
        assert f"\n| `{name}` | yes" in text or not registry.get(name).lossless
        for field in dataclasses.fields(registry.get(name).settings_type()):
            shown = f"`{field.default}`" if isinstance(field.default, str) else field.default
            assert f"\n| `{field.name}` | {shown} |" in text, field.name
            for choice in field.metadata.get("choices", ()):
                assert f"`{choice}`" in text
