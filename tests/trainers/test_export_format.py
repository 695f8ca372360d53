"""An EAGLE head exported with its seal, then in every format: it loads, drafts alike, starts a training unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference import load, registry
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats import convert, read_drafter
from draftsmith.inference.manifest import AuxLayers
from draftsmith.inference.nets.eagle_head import EagleHead, load_tensors
from draftsmith.inference.requests import TokenRequest
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.hf_model import HFModel
from draftsmith.trainers import export, export_format
from draftsmith.trainers.provenance import collect
from tests.eagles import toy_config, toy_tensors, write_target

FORMATS = ("speculators", "specforge", "eagle")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("pair") / "target")


@pytest.fixture(scope="module")
def sealed(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of ours with manifest and seal."""
    config = toy_config()
    head = EagleHead(config)
    load_tensors(head, toy_tensors(config, seed=2), "the toy")
    aux = AuxLayers(config.aux_layers, "after")
    spec = ExportSpec("eagle", head.eval(), None, str(target), decode_defaults={"draft_length": 4}, aux_layers=aux)
    out = tmp_path_factory.mktemp("own") / "head"
    export.write(spec, out, provenance=export._provenance(collect(None)))
    return out


def drafted(draft: Path, target: Path) -> list[list[int]]:
    """Tokens accepted in every round of a greedy chain."""
    parts = {"target": load(target), "draft": load(draft)}
    decoder = registry.build("tree", parts, settings={"policy": "chain", "nodes": 3, "depth": 3})
    result = decoder.decode([TokenRequest([3, 4, 5], 16), TokenRequest([9, 2], 16)])
    return [*result.output, result.rounds.accepted]


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_of_a_sealed_export_loads_and_drafts_alike(
    to: str, sealed: Path, target: Path, tmp_path: Path
) -> None:
    convert(sealed, tmp_path / "out", to, target=target)
    found = load(tmp_path / "out")
    assert found.kind == "eagle" and found.manifest is not None and found.manifest.seal is not None
    assert drafted(tmp_path / "out", target) == drafted(sealed, target)
    assert "draft_length" in found.manifest.couplings.decode_defaults


def test_a_head_without_a_manifest_is_known_by_its_config(sealed: Path, target: Path, tmp_path: Path) -> None:
    convert(sealed, tmp_path / "out", "speculators", target=target)
    (tmp_path / "out" / "manifest.json").unlink()
    assert load(tmp_path / "out").kind == "eagle"
    assert drafted(tmp_path / "out", target) == drafted(sealed, target)


@pytest.mark.parametrize("to", FORMATS)
def test_a_warm_start_from_every_format_is_the_source(to: str, sealed: Path, target: Path, tmp_path: Path) -> None:
    """Bit-equal weights under one network: the same accuracy before the first step."""
    convert(sealed, tmp_path / "out", to, target=target)
    module = EagleDrafter(HFModel(path=str(target)), init_from=str(tmp_path / "out"), steps=2)
    module.configure_model()
    assert module.net is not None
    source = read_drafter(sealed)
    assert module.net.config == source.fields
    found = module.net.state_dict()
    assert found.keys() == source.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.tensors.items())


def test_export_writes_a_format_at_once(
    sealed: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_run(run: str, out: Path, **options: Any) -> dict[Path, Any]:
        convert_own(sealed, out)
        return {out: None}

    def convert_own(source: Path, out: Path) -> None:
        import shutil

        shutil.copytree(source, out)

    monkeypatch.setattr(export, "export_run", export_run)
    made = export_format.export_as("a-run", tmp_path / "out", "speculators", target=str(target))
    assert list(made) == [tmp_path / "out"]
    assert read_drafter(tmp_path / "out").fields == read_drafter(sealed).fields
    with pytest.raises(InvalidValue, match="name the target with --target"):
        export_format.export_as("a-run", tmp_path / "other", "speculators")
    monkeypatch.setattr(export, "export_run", lambda *a, **o: {Path("a"): None, Path("b"): None})
    with pytest.raises(InvalidValue, match="this run has 2"):
        export_format.export_as("a-run", tmp_path / "other", "speculators", target=str(target))
    assert not (tmp_path / "other").exists()
