"""Image tokenizers: a convolutional autoencoder through a codebook, of one scale or of several.

Source: VQ-VAE (arXiv 1711.00937), equation 3; LlamaGen (arXiv 2406.06525); VAR (arXiv 2404.02905). At full scale LPIPS
and a patch discriminator are added to the squared error; they are not here, since they need weights to download.
Shape letters: B batch, V codes.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from draftsmith.data.batches import ImageBatch
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.config_json import read_config
from draftsmith.inference.nets.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, Quantized
from draftsmith.inference.rng import Stream, uniform
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.learned_part import LearnedPart, on_meta
from draftsmith.modules.optim import OptimConfig, build_optimizer

DEFAULT_OPTIM = OptimConfig(lr=3e-3, weight_decay=0.0)


@dataclass(frozen=True)
class CodebookConfig:
    """How the codebook learns."""

    commitment: float = 0.25  # weight of the latents' way to their codes; the codes' way to the latents has 1
    revive_at: tuple[int, ...] = (0, 50, 150, 300)  # steps at which codes that are hardly used start anew
    revive_every: int = 500  # and every so many steps; 0: never again
    revive_below: int = 8  # uses since the last time

    def __post_init__(self) -> None:
        if self.commitment < 0 or self.revive_every < 0 or self.revive_below < 0:
            raise InvalidValue(
                "codebook.commitment, revive_every and revive_below must be 0 or more, got "
                f"{self.commitment}, {self.revive_every}, {self.revive_below}"
            )


DEFAULT_CODEBOOK = CodebookConfig()


class TokenizerMeans(Metric):
    """Squared error per pixel, and how the codes are used, over all images of all batches and ranks."""

    squares: Tensor
    pixels: Tensor
    uses: Tensor

    def __init__(self, codes: int) -> None:
        super().__init__()
        for name, shape in (("squares", ()), ("pixels", ()), ("uses", (codes,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, made: Tensor, codes: Tensor) -> None:
        self.squares += (images - made).double().square().sum()
        self.pixels += images.numel()
        self.uses += codes.flatten().bincount(minlength=len(self.uses))

    def compute(self) -> dict[str, Tensor]:
        share = self.uses / self.uses.sum().clamp_min(1)
        entropy = -(share * share.clamp_min(1e-300).log()).sum()
        return {
            "mse": self.squares / self.pixels.clamp_min(1),
            "usage": (self.uses > 0).double().mean(),
            "perplexity": entropy.exp(),
        }


class ImageTokenizerPart(LearnedPart):
    """Trains an `ImageTokenizer` on `ImageBatch`es."""

    DEFINITIONS: ClassVar[Mapping[str, str]] = {
        "val/mse": "squared error per pixel of the reconstruction, pixels in [-1, 1], validation images",
        "val/usage": "share of the codes that the validation images use",
        "val/perplexity": "exp of the entropy of the codes' use on the validation images",
    }

    def __init__(
        self,
        net: ImageTokenizerConfig,
        codebook: CodebookConfig = DEFAULT_CODEBOOK,
        optim: OptimConfig = DEFAULT_OPTIM,
        seed: int = 0,
    ) -> None:
        """Plain settings only; the network is built in `configure_model`.

        Args:
            net: the network's sizes.
            codebook: how the codebook learns.
            optim: AdamW and its schedule.
            seed: of the codes that start anew.
        """
        super().__init__()
        self.config = net if isinstance(net, ImageTokenizerConfig) else _config(net)
        self.codebook = codebook if isinstance(codebook, CodebookConfig) else CodebookConfig(**codebook)
        self.optim, self.seed = OptimConfig.of(optim), seed
        self.save_hyperparameters(
            {
                "net": dataclasses.asdict(self.config),
                "codebook": dataclasses.asdict(self.codebook),
                "optim": dataclasses.asdict(self.optim),
                "seed": seed,
            }
        )
        self.net: ImageTokenizer | None = None
        self.val_means = TokenizerMeans(self.config.codes)
        self.register_buffer("uses", torch.zeros(self.config.codes, dtype=torch.int64))  # since codes last started anew

    def build(self) -> ImageTokenizer:
        return ImageTokenizer(self.config)

    def positions(self, data: Any) -> int:
        return self.config.channels * self.config.resolution**2

    def plan_batch(self, data: Any) -> ImageBatch:
        rows, side = data.rows, self.config.resolution
        pixels = on_meta(rows, self.config.channels, side, side, dtype=torch.uint8)
        return ImageBatch(pixels, on_meta(rows), on_meta(rows))

    def plan_loss(self, batch: ImageBatch) -> Tensor:
        return self.losses(batch.scaled.to(self._built().codebook.dtype))[0].sum()

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.named_parameters(), self.optim, self.trainer.estimated_stepping_batches)

    def losses(self, images: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """(loss per image [B], reconstruction, what was quantised) of images [B, C, H, W] in [-1, 1]."""
        made, found = self._built()(images)
        error = F.mse_loss(made, images, reduction="none").flatten(1).mean(1)
        return error + found.codebook + self.codebook.commitment * found.commitment, made, found

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        images = batch.scaled
        self._revive(images)
        loss, _, found = self.losses(images)
        self.uses += found.codes.flatten().bincount(minlength=len(self.uses))
        return self.global_mean(loss.sum(), torch.tensor(len(images), device=loss.device), len(images))

    @torch.no_grad()
    def _revive(self, images: Tensor) -> None:
        """Codes that are hardly used take the place of latents of this batch, drawn at random (by counter)."""
        step, config = self.global_step, self.codebook
        if self.trainer.fit_loop.epoch_loop.batch_idx % self.trainer.accumulate_grad_batches:
            return
        due = step in config.revive_at or (step > 0 and config.revive_every > 0 and step % config.revive_every == 0)
        if not due:
            return
        net = self._built()
        uses = cast(Tensor, self.trainer.strategy.reduce(self.uses.clone(), reduce_op="sum"))
        dead = (uses < config.revive_below).nonzero()[:, 0]
        latents = net.latent(images).permute(0, 2, 3, 1).flatten(0, 2)
        draw = uniform(self.seed, step, torch.arange(len(dead), device=dead.device), int(Stream.DATA), dead.device)
        fresh = latents[(draw * len(latents)).long()]
        fresh = self.trainer.strategy.broadcast(fresh, 0)  # every rank the same codes
        net.codebook[dead] = fresh.to(net.codebook)
        self.uses.zero_()
        self.log("train/revived", float(len(dead)), batch_size=len(images))

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        real = batch.sample_id >= 0
        images = batch.scaled[real]
        if len(images):
            made, found = self._built()(images)
            self.val_means.update(images, made, found.codes)

    def on_validation_epoch_end(self) -> None:
        means = self.val_means.compute()
        for name, value in means.items():
            self.log(f"val/{name}", value.float(), prog_bar=name == "mse", sync_dist=True)
        self.val_means.reset()

    def on_fit_start(self) -> None:
        self.note_data()

    def on_fit_end(self) -> None:
        usage = self.trainer.callback_metrics.get("val/usage")
        if usage is not None and float(usage) < 0.2 and self.trainer.is_global_zero:
            warnings.warn(
                f"only {float(usage):.0%} of the codes are used: let dead codes start anew more often "
                "(model.codebook.revive_every), or take fewer (model.net.codes)",
                stacklevel=2,
            )

    def export_spec(self) -> ExportSpec:
        """What `draftsmith export` writes. Raises InvalidState before `configure_model`."""
        return self.spec_of("image-tokenizer", self._built(), trained={"resolution": self.config.resolution})

    def _built(self) -> ImageTokenizer:
        if self.net is None:
            raise self.not_built()
        return self.net


def _config(fields: Mapping[str, Any]) -> ImageTokenizerConfig:
    """From the plain dictionary that a checkpoint's hyper-parameters hold."""
    return read_config(ImageTokenizerConfig, fields, "an image tokenizer", "hyper-parameters")
