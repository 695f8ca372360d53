"""What a LightningModule hands to the exporter. Free of Lightning, so that any module may offer it."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from draftsmith.inference.manifest import AuxLayers, Metric


@dataclass(frozen=True)
class ExportSpec:
    """The learned part of a module, ready to be written; what its `export_spec()` returns once it holds its weights."""

    kind: str  # a row of manifest.KINDS
    model: nn.Module  # the class that trained: an HF PreTrainedModel, an EagleHead (kind "eagle"), a PortableNet
    tokenizer_dir: str | None  # its files are copied byte by byte; None: the part works on bare ids
    target_dir: str | None = None  # kinds "drafter", "eagle": the target that it was trained for
    aux_layers: AuxLayers | None = None  # kind "eagle": the target's states that it reads
    trained: dict[str, Any] = field(default_factory=dict)  # ranges seen in training (manifest couplings)
    decode_defaults: dict[str, Any] = field(default_factory=dict)  # decoder settings chosen by measurement
    metrics: dict[str, Metric] = field(default_factory=dict)
    data_fingerprint: str | None = None
    vocab_size: int | None = None  # of what it belongs to, where the net itself has no vocabulary (kind "filter")
    seed: int | None = None
    steps: int | None = None
