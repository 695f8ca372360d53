"""Image models by maximum likelihood over the codes of a frozen tokenizer, in raster order.

Source: LlamaGen (arXiv 2406.06525), section 3.2. A share of the images is told no class, for classifier-free guidance.
Shape letters: B batch, N codes of an image, V codes of the codebook.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from draftsmith.data.batches import CodeBatch
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.image_ar import ImageAR, ImageARConfig
from draftsmith.inference.rng import NUM_STREAMS, Stream, uniform
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.learned_part import LearnedPart, on_meta
from draftsmith.modules.losses.chunked_head import HeadLoss, chunked_head
from draftsmith.modules.losses.divergence import ROW_LOSSES
from draftsmith.modules.optim import OptimConfig, build_optimizer

DEFAULT_OPTIM = OptimConfig(lr=2e-3, weight_decay=0.05, final_lr_ratio=0.0)
_NO_CLASS = int(Stream.DATA) + NUM_STREAMS


class ImageARPart(LearnedPart):
    """Trains an `ImageAR` on `CodeBatch`es."""

    DEFINITIONS: ClassVar[Mapping[str, str]] = {
        "val/loss": "mean cross-entropy per code of the validation images given their class, in nats"
    }

    def __init__(self, net: ImageARConfig, optim: OptimConfig = DEFAULT_OPTIM, seed: int = 0) -> None:
        """Plain settings only; the network is built in `configure_model`.

        Args:
            net: the network's sizes.
            optim: AdamW and its schedule.
            seed: of the images that are told no class.
        """
        super().__init__()
        self.optim, self.seed = OptimConfig.of(optim), seed
        self.config = net if isinstance(net, ImageARConfig) else ImageARConfig(**net)
        self.save_hyperparameters(
            {"net": dataclasses.asdict(self.config), "optim": dataclasses.asdict(self.optim), "seed": seed}
        )
        self.net: ImageAR | None = None
        self.val_mean = MeanMetric()

    def build(self) -> ImageAR:
        return ImageAR(self.config)

    def positions(self, data: Any) -> int:
        return self.config.num_tokens

    def plan_batch(self, data: Any) -> CodeBatch:
        codes = on_meta(data.rows, self.config.num_tokens, dtype=torch.int32)
        return CodeBatch(codes, on_meta(data.rows), on_meta(data.rows))

    def plan_loss(self, batch: CodeBatch) -> Tensor:
        return self.loss(batch.codes.long(), batch.classes).total

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.named_parameters(), self.optim, self.trainer.estimated_stepping_batches)

    def without_class(self, batch: CodeBatch, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """The batch's classes [B], a share of them replaced by "no class", by (seed, step, row over all ranks)."""
        config = self.config
        row = torch.arange(len(batch.codes), device=batch.codes.device) * ranks + rank
        u = uniform(self.seed, step, row, _NO_CLASS, batch.codes.device)
        return torch.where(u < config.class_dropout, config.num_classes, batch.classes)

    def loss(self, codes: Tensor, classes: Tensor, weight: Tensor | None = None) -> HeadLoss:
        """Cross-entropy summed over the codes int64 [B, N] of the rows with weight (bool [B]); of all where None."""
        net = self._built()
        hidden = net(codes, classes)
        rows = None if weight is None else weight.unsqueeze(1).expand(codes.shape).flatten()
        return chunked_head(
            hidden.flatten(0, 1),
            net.lm_head.weight,
            codes.flatten(),
            row_loss=ROW_LOSSES["ce"],
            example_weight=rows,
            statistics=False,
        )

    def training_step(self, batch: CodeBatch, batch_idx: int) -> Tensor:
        classes = self.without_class(batch, self.step_number, self.global_rank, self.trainer.world_size)
        out = self.loss(batch.codes.long(), classes)
        return self.global_mean(out.total, out.weight, len(classes))

    def validation_step(self, batch: CodeBatch, batch_idx: int) -> None:
        real = batch.sample_id >= 0
        out = self.loss(batch.codes.long(), batch.classes, real)
        self.val_mean.update(out.total / out.weight.clamp_min(1), out.weight)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_mean.compute().float(), prog_bar=True, sync_dist=True)
        self.val_mean.reset()

    def on_fit_start(self) -> None:
        self._begin()

    def on_validation_start(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Take over what only the data knows. Raises InvalidValue for codes or classes that the network has not."""
        self.note_data()
        data, config = getattr(self.trainer, "datamodule", None), self.config
        tokenizer = getattr(data, "tokenizer", None)
        if data is None or tokenizer is None:
            return
        if tokenizer.config.codes != config.codes or tokenizer.config.num_tokens != config.num_tokens:
            raise InvalidValue(
                f"the tokenizer has {tokenizer.config.codes} codes and {tokenizer.config.num_tokens} tokens an image, "
                f"model.net {config.codes} and {config.num_tokens}: set codes and side (or scales) to the tokenizer's"
            )
        if data.num_classes > config.num_classes:
            raise InvalidValue(f"the data has {data.num_classes} classes: set model.net.num_classes to it")
        self._meta["tokenizer_hash"] = data.tokenizer_hash

    def export_spec(self) -> ExportSpec:
        """What `draftsmith export` writes. Raises InvalidState before `configure_model`."""
        net = self._built()
        if "tokenizer_hash" in self._meta:  # the exported config says whose codes they are
            net.config = dataclasses.replace(net.config, tokenizer_hash=self._meta["tokenizer_hash"])
        return self.spec_of("image-ar", net, trained={"class_dropout": self.config.class_dropout})

    def _built(self) -> ImageAR:
        if self.net is None:
            raise self.not_built()
        return self.net
