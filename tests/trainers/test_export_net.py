"""Networks of our own through the exporter: what is written loads, and the seal of a broken path fails."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from draftsmith.inference import load
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.portable import PortableNet
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.trainers import export
from tests import images

NETS = {"image-ar": images.raster, "image-tokenizer": lambda: images.tokenizer((1, 2, 4))}


@pytest.mark.parametrize("kind", sorted(NETS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_exported_is_what_trained(kind: str, dtype: str, tmp_path: Path) -> None:
    net = NETS[kind]()
    assert isinstance(net, PortableNet)
    manifest = export.write(ExportSpec(kind, net, None), tmp_path / "out", dtype=dtype)
    assert manifest.seal is not None
    checks = {check.compute_dtype: check for check in manifest.seal.checks}
    assert set(checks) == {"float32", dtype} and checks["float32"].max_abs_difference < 1e-4
    loaded = load(tmp_path / "out", dtype="float32").part
    assert type(loaded) is type(net) and loaded.config == net.config and not loaded.training
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.to(getattr(torch, dtype)).float())


def test_a_served_path_that_differs_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is another function: the fresh process, which has the right one, must notice."""
    net = images.raster()
    monkeypatch.setattr(type(net), "seal_reference", lambda self, inputs: self.logits(**inputs) + 0.01)
    with pytest.raises(InvalidState, match="the export differs from ImageAR as trained"):
        export.write(ExportSpec("image-ar", net, None), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class TestBadFiles:
    @pytest.fixture
    def out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(export, "run_seal", lambda directory, inputs: None)
        export.write(ExportSpec("image-ar", images.raster(), None), tmp_path / "out")
        return tmp_path / "out"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sides": 4}, "unknown key in .*'sides'.*did you mean 'side'"),
            ({"side": None}, r"lacks side: it does not describe a raster image model"),
            ({"num_classes": 5}, r"class_embedding.weight is \[4, 32\], must be \[6, 32\]"),
            ({"num_layers": 3}, "lacks layers.2"),
            ({"num_layers": 1}, "holds unknown layers.1"),
        ],
    )
    def test_a_config_that_is_not_the_weights(self, out: Path, change: dict[str, object], message: str) -> None:
        from draftsmith.inference.load_image import load_image_ar

        config = json.loads((out / "config.json").read_text())
        config["net"] |= change
        config["net"] = {name: value for name, value in config["net"].items() if name != "side" or value is not None}
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(InvalidValue, match=message):
            load_image_ar(out)

    def test_weights_that_are_no_numbers(self, tmp_path: Path) -> None:
        net = images.raster()
        with torch.no_grad():
            net.norm.weight[0] = float("nan")
        with pytest.raises(InvalidValue, match=r"norm\.weight holds NaN"):
            export.write(ExportSpec("image-ar", net, None), tmp_path / "out")

    def test_a_net_that_offers_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidValue, match="from a transformers model or a net of ours, got Linear"):
            export.write(ExportSpec("image-ar", nn.Linear(2, 2), None), tmp_path / "out")
