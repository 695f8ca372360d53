"""Distilled decoding: a student learns the map from noise to the whole code sequence of an image model.

Source: "Distilled Decoding 1" (arXiv 2412.17153), algorithm 2: a start t is drawn from T for each row; positions before
it hold the pair's codes, those behind its noise; L = mean over them of CE(logits, code) + lambda ||vector - code||^2.
(The paper's second term is LPIPS between decoded images; that needs weights to download.)
Shape letters: B batch, N codes of an image, D code width, V codes of the codebook.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from draftsmith.data.batches import CodeBatch
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.flow_noise import noise
from draftsmith.inference.load_image import load_tokenizer
from draftsmith.inference.loader import load
from draftsmith.inference.nets.config_json import read_config
from draftsmith.inference.nets.distilled import DistilledConfig, DistilledDecoder
from draftsmith.inference.nets.image_ar import ImageAR
from draftsmith.inference.rng import NUM_STREAMS, Stream, uniform
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.learned_part import LearnedPart, on_meta
from draftsmith.modules.losses.chunked_head import HeadLoss, chunked_head
from draftsmith.modules.losses.divergence import ROW_LOSSES
from draftsmith.modules.optim import OptimConfig, build_optimizer

DEFAULT_OPTIM = OptimConfig(lr=3e-3, weight_decay=0.0, final_lr_ratio=0.0)
_START = int(Stream.DATA) + 5 * NUM_STREAMS


@dataclass(frozen=True)
class DistillConfig:
    """How the student learns from pairs."""

    vector_weight: float = 1.0  # lambda of the squared error of the vectors; 0 leaves that head untrained
    pair_seed: int = 0  # the seed that the pairs' noise was drawn with

    def __post_init__(self) -> None:
        if self.vector_weight < 0:
            raise InvalidValue(f"distill.vector_weight must be 0 or more, got {self.vector_weight}")


DEFAULT_DISTILL = DistillConfig()


class DistilledPart(LearnedPart):
    """Trains a `DistilledDecoder` on pairs (`CodeBatch`es whose sample_id keys their noise)."""

    DEFINITIONS: ClassVar[Mapping[str, str]] = {
        "val/match": "share of the codes of held-out pairs that one pass from pure noise gets right",
        "val/loss": "cross-entropy per code of held-out pairs from pure noise, in nats",
    }

    def __init__(
        self,
        net: DistilledConfig,
        teacher: str,
        tokenizer: str,
        distill: DistillConfig = DEFAULT_DISTILL,
        optim: OptimConfig = DEFAULT_OPTIM,
        init_from_teacher: bool = True,
        seed: int = 0,
    ) -> None:
        """Plain settings only; the network is built in `configure_model`.

        Args:
            net: the student's sizes; with init_from_teacher those of the teacher (it may have more layers).
            teacher: directory of the exported image model whose pairs it learns.
            tokenizer: directory of the exported image tokenizer whose codes they are.
            distill: how the student learns from pairs.
            optim: AdamW and its schedule.
            init_from_teacher: start from the teacher's layers.
            seed: of the starts drawn in the steps.
        """
        super().__init__()
        fields = net if isinstance(net, Mapping) else dataclasses.asdict(net)
        self.config = read_config(DistilledConfig, fields, "a distilled decoder", "model.net")
        self.distill = distill if isinstance(distill, DistillConfig) else DistillConfig(**distill)
        self.optim, self.seed = OptimConfig.of(optim), seed
        self.teacher_dir, self.tokenizer_dir, self.init_from_teacher = teacher, tokenizer, init_from_teacher
        self.save_hyperparameters(
            {
                "net": dataclasses.asdict(self.config),
                "teacher": teacher,
                "tokenizer": tokenizer,
                "distill": dataclasses.asdict(self.distill),
                "optim": dataclasses.asdict(self.optim),
                "init_from_teacher": init_from_teacher,
                "seed": seed,
            }
        )
        self.net: DistilledDecoder | None = None
        self.val_loss, self.val_match = MeanMetric(), MeanMetric()

    def build(self) -> DistilledDecoder:
        return DistilledDecoder(self.config)

    def positions(self, data: Any) -> int:
        return self.config.num_tokens

    def plan_batch(self, data: Any) -> CodeBatch:
        codes = on_meta(data.rows, self.config.num_tokens, dtype=torch.int32)
        return CodeBatch(codes, on_meta(data.rows), on_meta(data.rows))

    def plan_loss(self, batch: CodeBatch) -> Tensor:
        return self.loss(batch.codes.long(), batch.classes, batch.sample_id, torch.zeros_like(batch.classes)).total

    def configure_model(self) -> None:
        """Build the network (once), with the tokenizer's codebook and, if asked, the teacher's layers."""
        if self.net is not None:
            return
        self.net = self.build()
        codebook = load_tokenizer(self.tokenizer_dir)[0].vectors
        self.net.attach(codebook)
        if self.init_from_teacher:
            teacher = load(self.teacher_dir).part
            if not isinstance(teacher, ImageAR):
                raise InvalidValue(f"model.teacher {self.teacher_dir} is no image-ar export: give a raster image model")
            self.net.start_from(teacher, codebook)

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.named_parameters(), self.optim, self.trainer.estimated_stepping_batches)

    def starts(self, size: int, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """The start t of each row, int64 [B], evenly from T by (seed, step, row over all ranks); stratified."""
        row = torch.arange(size, device=self.device) * ranks + rank
        shift = uniform(self.seed, step, 0, _START, self.device)
        place = ((row + shift) / (size * ranks) * len(self.config.starts)).long().clamp_max(len(self.config.starts) - 1)
        return torch.tensor(self.config.starts, device=self.device)[place]

    def loss(
        self, codes: Tensor, classes: Tensor, numbers: Tensor, clean: Tensor, statistics: bool = False
    ) -> HeadLoss:
        """Summed over the rows: the mean over a row's positions behind its start of CE and weighted squared error.

        codes int64 [B, N], classes int64 [B], numbers int64 [B] (of the pairs; -1: a row that does not count), clean
        int64 [B].
        """
        net = self._built()
        start = noise(self.distill.pair_seed, numbers, codes.shape[1], self.config.code_dim)
        learned = torch.arange(codes.shape[1], device=codes.device) >= clean.unsqueeze(1)
        x = torch.where(learned.unsqueeze(-1), start, net.codebook[codes])
        hidden, vectors = net(x.to(net.codebook.dtype), clean, classes)
        weight = learned / learned.sum(1, keepdim=True) * (numbers >= 0).unsqueeze(1)
        out = chunked_head(
            hidden.flatten(0, 1),
            net.lm_head.weight,
            codes.flatten(),
            row_loss=ROW_LOSSES["ce"],
            example_weight=weight.flatten().float(),
            statistics=statistics,
        )
        if self.distill.vector_weight:
            error = (vectors.float() - net.codebook[codes].float()).square().sum(-1)
            out = dataclasses.replace(out, total=out.total + self.distill.vector_weight * (error * weight).sum())
        return out

    def training_step(self, batch: CodeBatch, batch_idx: int) -> Tensor:
        codes = batch.codes.long()
        clean = self.starts(len(codes), self.step_number, self.global_rank, self.trainer.world_size)
        out = self.loss(codes, batch.classes, batch.sample_id, clean)
        return self.global_mean(out.total, (batch.sample_id >= 0).sum(), len(codes))

    def validation_step(self, batch: CodeBatch, batch_idx: int) -> None:
        real = batch.sample_id >= 0
        codes, classes, numbers = batch.codes[real].long(), batch.classes[real], batch.sample_id[real]
        if not len(codes):
            return
        out = self.loss(codes, classes, numbers, torch.zeros_like(numbers), statistics=True)
        assert out.stats is not None
        self.val_loss.update(out.stats.loss.float().mean(), codes.numel())
        self.val_match.update(out.stats.agree.float().mean(), codes.numel())

    def on_validation_epoch_end(self) -> None:
        for name, metric in (("loss", self.val_loss), ("match", self.val_match)):
            self.log(f"val/{name}", metric.compute().float(), prog_bar=True, sync_dist=True)
            metric.reset()

    def on_fit_start(self) -> None:
        self._begin()

    def on_validation_start(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Take over the codebook and what the pairs were made with. Raises InvalidValue where they do not fit."""
        self.note_data()
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "pairs_made_with"):
            return
        made_with = data.pairs_made_with
        if made_with["seed"] != self.distill.pair_seed:
            raise InvalidValue(
                f"the pairs' noise was drawn with seed {made_with['seed']}: set model.distill.pair_seed to it"
            )
        if not torch.equal(data.vectors.to(self.device), self._built().codebook):
            raise InvalidValue(f"the pairs' codes are not of {self.tokenizer_dir}: give both the same tokenizer")
        self._meta["pairs"] = made_with

    def export_spec(self) -> ExportSpec:
        """What `draftsmith export` writes. Raises InvalidState before `configure_model`."""
        trained = {"starts": list(self.config.starts), "pairs": self._meta.get("pairs")}
        return self.spec_of("distilled-decoder", self._built(), trained=trained)

    def _built(self) -> DistilledDecoder:
        if self.net is None:
            raise self.not_built()
        return self.net
