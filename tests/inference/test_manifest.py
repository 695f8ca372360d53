"""The manifest: round trip, and every way in which a file may be wrong gives one line."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.inference import manifest as manifests
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.manifest import (
    KINDS,
    AuxLayers,
    Couplings,
    FileEntry,
    Manifest,
    Metric,
    Provenance,
    Seal,
    SealCheck,
    TargetCoupling,
)

HASH = "0123456789abcdef" * 4
OVER_TOLERANCE = {"compute_dtype": "float32", "reference": "x", "max_abs_difference": 2.0, "tolerance": 1.0}


def example() -> Manifest:
    return Manifest(
        kind="drafter",
        net="LlamaForCausalLM",
        config={"hidden_size": 32, "rope": {"theta": 1e4}},
        dtype="float32",
        files={"model.safetensors": FileEntry(HASH, 10), "tokenizer.json": FileEntry(HASH, 3)},
        couplings=Couplings(
            vocab_size=300,
            tokenizer_hash=HASH,
            vocab_map_hash=HASH,
            target=TargetCoupling(HASH, "big"),
            trained={"max_length": 256},
            decode_defaults={"draft_length": 5},
        ),
        provenance=Provenance("draftsmith fit", "2026-01-01T00:00:00Z", "2 cores", {"torch": "2.13.0"}, seed=0),
        metrics={"alpha": Metric(0.8, "mean of 1 - TV(p, q) over the examined positions")},
        seal=Seal(HASH, 2, 32, 7.5, (SealCheck("float32", "LlamaForCausalLM", 3e-6, 1e-4),)),
    )


def edited(**changes: Any) -> str:
    """The example's JSON with keys ("a.b.c") set; the value `...` removes a key."""
    raw = json.loads(example().to_json())
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = raw
        for key in path:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return json.dumps(raw)


def one_line(text: str) -> str:
    with pytest.raises(InvalidValue) as caught:
        manifests.loads(text, "x/manifest.json")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("x/manifest.json")
    return message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(), json_values, max_size=3)
hashes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
numbers = st.floats(allow_nan=False, allow_infinity=False)
file_names = st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), min_size=1, max_size=3).map("/".join)
vocabularies = st.tuples(hashes, hashes) | st.just((None, None))


@st.composite
def manifest_values(draw: st.DrawFn) -> Manifest:
    tokenizer_hash, map_hash = draw(vocabularies)
    kind = draw(st.sampled_from(sorted(KINDS)))
    states = st.builds(AuxLayers, st.lists(st.integers(0, 99), max_size=3).map(tuple), st.text())
    files = draw(st.dictionaries(file_names, st.builds(FileEntry, hashes, st.integers(0, 2**60)), max_size=3))
    differences = draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=2))
    return Manifest(
        kind=kind,
        net=draw(st.text()),
        config=draw(objects),
        dtype=draw(st.sampled_from(manifests.DTYPES)),
        files={name: entry for name, entry in files.items() if not name.startswith("tokenizer")},
        couplings=Couplings(
            draw(st.integers(1, 2**40)),
            tokenizer_hash,
            map_hash,
            draw(st.builds(TargetCoupling, hashes, st.text())),
            draw(states if "aux_layers" in KINDS[kind].couplings else st.none() | states),
            draw(objects),
            draw(objects),
        ),
        provenance=draw(
            st.builds(
                Provenance,
                st.text(),
                st.text(),
                st.text(),
                st.dictionaries(st.text(), st.text(), max_size=3),
                st.none() | st.text(),
                st.none() | st.booleans(),
                st.none() | st.integers(),
                st.none() | st.integers(0),
                st.none() | st.text(),
                st.none() | numbers,
            )
        ),
        metrics=draw(st.dictionaries(st.text(), st.builds(Metric, numbers, st.text()), max_size=3)),
        seal=draw(
            st.none()
            | st.builds(
                Seal,
                hashes,
                st.integers(1, 9),
                st.integers(1, 99),
                numbers,
                st.just(tuple(SealCheck("float32", "x", d, 2 * d) for d in differences)),
            )
        ),
    )


@given(manifest_values())
def test_round_trip_gives_an_equal_manifest(manifest: Manifest) -> None:
    assert manifests.loads(manifest.to_json()) == manifest


@given(st.text() | json_values.map(json.dumps) | st.binary().map(lambda b: b.decode("latin-1")))
def test_any_other_text_gives_one_line(text: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        manifests.loads(text)
    assert len(str(caught.value).splitlines()) == 1


@given(st.data())
def test_a_value_of_another_type_is_refused_or_means_the_same(data: st.DataObject) -> None:
    """Replace one leaf by any JSON value: the reader refuses, or what it reads writes itself back unchanged."""
    raw = json.loads(example().to_json())
    node, key = raw, data.draw(st.sampled_from(sorted(raw)))
    while isinstance(node[key], dict) and node[key]:
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node)))
    node[key] = data.draw(json_values)
    text = json.dumps(raw)
    try:
        manifest = manifests.loads(text)
    except InvalidValue as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert json.loads(manifest.to_json()) == raw


def test_every_kind_loads_by_a_name_that_can_be_parsed_and_states_known_couplings() -> None:
    fields = {f.name for f in dataclasses.fields(Couplings)}
    for name, kind in KINDS.items():
        assert name == kind.name and kind.roles and set(kind.couplings) <= fields
        module, _, function = kind.load.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_another_schema_version(version: object) -> None:
    message = one_line(edited(schema_version=version))
    assert repr(version) in message and "reads version 1" in message and "export the run again" in message


def test_a_missing_version_is_another_version() -> None:
    assert "schema version None" in one_line(edited(schema_version=...))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"couplings__tokeniser_hash": HASH}, "did you mean 'couplings.tokenizer_hash'?"),
        ({"kind": ...}, "missing key 'kind'"),
        ({"couplings__trained": ...}, "missing key 'couplings.trained'"),
        ({"kind": "draftor"}, "ngram-table; did you mean 'drafter'?"),
        ({"kind": "filler"}, "unknown manifest kind 'filler'"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"couplings__vocab_size": "300"}, "couplings.vocab_size must be an integer, got '300'"),
        ({"couplings__vocab_size": True}, "couplings.vocab_size must be an integer, got True"),
        ({"couplings__vocab_size": 0}, "couplings.vocab_size must be at least 1"),
        ({"couplings__target": None}, "kind 'drafter' must state target"),
        ({"kind": "eagle"}, "kind 'eagle' must state aux_layers"),
        ({"couplings__vocab_map_hash": None}, "stated together"),
        ({"couplings__tokenizer_hash": None, "couplings__vocab_map_hash": None}, "does not state tokenizer_hash"),
        ({"couplings__aux_layers": {"layers": [1, "2"], "convention": "after"}}, "aux_layers.layers[1] must be"),
        ({"files": {"../x": {"sha256": HASH, "bytes": 1}}}, "'../x' is not a plain path"),
        ({"files": {"/etc/x": {"sha256": HASH, "bytes": 1}}}, "'/etc/x' is not a plain path"),
        ({"files": {"a//b": {"sha256": HASH, "bytes": 1}}}, "'a//b' is not a plain path"),
        ({"files": {"": {"sha256": HASH, "bytes": 1}}}, "'' is not a plain path"),
        ({"files": {"manifest.json": {"sha256": HASH, "bytes": 1}}}, "'manifest.json' is not a plain path"),
        ({"files": {"pytorch_model.bin": {"sha256": HASH, "bytes": 1}}}, "is a pickle"),
        ({"files": {"a": {"sha256": HASH[:-1], "bytes": 1}}}, "64 hexadecimal digits"),
        ({"metrics__alpha__value": "high"}, "metrics.alpha.value must be a number"),
        ({"seal__checks": []}, "seal: holds no comparison"),
        ({"seal__checks": [OVER_TOLERANCE]}, "over its tolerance"),
        ({"provenance__versions": []}, "provenance.versions must be an object"),
    ],
)  # fmt: skip
def test_bad_contents(changes: dict[str, Any], said: str) -> None:
    assert said in one_line(edited(**changes))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[1]", "must be a JSON object, got list"),
        ("[" * 100_000, "not valid JSON"),
        (example().to_json()[:-20], "not valid JSON"),
        (example().to_json().replace('"dtype"', '"kind"', 1), "key 'kind' occurs twice"),
        (example().to_json().replace("0.8", "NaN"), "NaN is not a JSON number"),
        (example().to_json().replace("0.8", "1e999"), "metrics.alpha.value must be a finite number"),
    ],
)
def test_damaged_text(text: str, said: str) -> None:
    assert said in one_line(text)


def test_a_manifest_cannot_be_built_wrong_either() -> None:
    with pytest.raises(InvalidValue, match="must state target"):
        dataclasses.replace(example(), couplings=Couplings(vocab_size=3))
    with pytest.raises(ValueError):
        dataclasses.replace(example(), metrics={"alpha": Metric(float("nan"), "")}).to_json()


def test_read_says_none_where_there_is_no_manifest_and_names_the_file_otherwise(tmp_path: Path) -> None:
    assert manifests.read(tmp_path) is None
    path = tmp_path / "manifest.json"
    path.write_text(example().to_json(), encoding="utf-8")
    assert manifests.read(tmp_path) == example()
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InvalidValue, match="not UTF-8") as caught:
        manifests.read(tmp_path)
    assert str(path) in str(caught.value)
