"""Masked diffusion: trains a bidirectional transformer to fill random masks at every masking rate.

Source: LLaDA (arXiv 2502.09992), equations 3 (1/t weight), 5 (answers alone are masked) and 14 (exact counts). Both
objectives have the same expectation, an upper bound of -log p(answer | prompt) divided by the answer's length.
Shape letters: B batch, L canvas, n maskable positions of a row, M masked positions, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics import Metric

from draftsmith.data.batches import CanvasBatch
from draftsmith.inference.checkpoint import read_json, weight_files
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.likelihood_bound import exact_count_mask, likelihood_bound
from draftsmith.inference.load_masked import load_masked_lm
from draftsmith.inference.nets.masked_lm import MaskedLM, MaskedLMConfig
from draftsmith.inference.rng import NUM_STREAMS, Stream, uniform
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.learned_part import LearnedPart, on_meta
from draftsmith.modules.losses.chunked_head import HeadLoss, chunked_head
from draftsmith.modules.losses.divergence import ROW_LOSSES
from draftsmith.modules.optim import OptimConfig, build_optimizer

OBJECTIVES = ("exact_count", "inverse_t")
DEFAULT_OPTIM = OptimConfig()
CAUSAL = ("llama", "mistral", "qwen2")  # model types that `init_from` can turn into a bidirectional network
_NEVER = -1e30  # the mask id's logit in the loss: finite, since 0 * infinity would be NaN in a gradient
_NOISE, _LEVEL, _CROP = (int(Stream.DATA) + NUM_STREAMS * i for i in range(3))


@dataclass(frozen=True)
class DiffusionConfig:
    """What is masked, and how it is weighted."""

    objective: str = "exact_count"  # l of n positions, weight n/l; "inverse_t": each with probability t, weight 1/t
    crop_share: float = 0.01  # of rows that are cut to a random length; more where canvases will vary
    epsilon: float = 1e-3  # least masking probability of "inverse_t"
    val_draws: int = 4  # masks per validation sample; time grows with it
    block_length: int = 32  # the decoder's default, goes into the export

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown_choice("diffusion.objective", self.objective, OBJECTIVES)
        if not 0 <= self.crop_share <= 1:
            raise InvalidValue(f"diffusion.crop_share must lie in [0, 1], got {self.crop_share}")
        if not 0 <= self.epsilon < 1:
            raise InvalidValue(f"diffusion.epsilon must lie in [0, 1), got {self.epsilon}")
        if self.val_draws < 1 or self.block_length < 1:
            raise InvalidValue(
                f"diffusion.val_draws and diffusion.block_length must be at least 1, got {self.val_draws}, "
                f"{self.block_length}"
            )


DEFAULT_DIFFUSION = DiffusionConfig()


@dataclass(frozen=True)
class Corruption:
    """What a step masks."""

    lengths: Tensor  # int64 [B]; after the crop
    masked: Tensor  # bool [B, L]
    weight: Tensor  # float32 [B, L]; of each masked position's cross-entropy: its row's sum estimates the bound / n
    rows: Tensor  # int64; how many rows have a position that may be masked


def corrupt(batch: CanvasBatch, config: DiffusionConfig, seed: int, step: int, rank: int = 0, ranks: int = 1) -> (
    Corruption
):  # fmt: skip
    """Crop and mask a batch, in fp32, by numbers of (seed, step, row over all ranks, position) alone.

    Masking rates are stratified over the rows of all ranks: row b of B has a rate in [b / B, (b + 1) / B).
    """
    device, size = batch.ids.device, batch.ids.shape[1]
    place = torch.arange(len(batch.ids), device=device) * ranks + rank
    row = step * len(batch.ids) * ranks + place
    positions = torch.arange(size, device=device)
    crop = uniform(seed, row, 0, _CROP, device)
    room = batch.length - batch.least + 1
    cut = batch.least + (crop / max(config.crop_share, 1e-12) * room).long()
    lengths = torch.where(crop < config.crop_share, cut, batch.length)
    maskable = (positions >= batch.prompt.unsqueeze(1)) & (positions < lengths.unsqueeze(1))
    n = maskable.sum(1)
    level = (place + uniform(seed, step, 0, _LEVEL, device)) / (len(batch.ids) * ranks)
    noise = uniform(seed, row.unsqueeze(1), positions, _NOISE, device)
    if config.objective == "exact_count":
        count = 1 + (level * n).long().clamp_max((n - 1).clamp_min(0))
        masked = exact_count_mask(noise, maskable, count)
        weight = 1.0 / count.double()
    else:
        chance = (1 - config.epsilon) * level + config.epsilon
        masked = (noise < chance.unsqueeze(1)) & maskable
        weight = 1.0 / (chance * n.clamp_min(1))
    return Corruption(lengths, masked, (masked * weight.unsqueeze(1)).float(), (n > 0).sum())


@torch.no_grad()
def from_causal(net: MaskedLM, path: Path) -> None:
    """Fill `net` with the weights of an autoregressive Llama-like model, which keeps predicting one position further.

    Ids that the model does not have (the mask) begin as the mean of those that it has. Raises InvalidValue for a
    network that is not of the same sizes, has learned positions, or does not shift its logits.
    """
    if not net.config.logit_shift or net.config.positions != "rope":
        raise InvalidValue(
            f"{path} is autoregressive: its state at a position predicts the next one; set model.net.logit_shift true "
            "and model.net.positions rope"
        )
    tensors = {k.removeprefix("model."): v for file in weight_files(path) for k, v in load_file(file).items()}
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    for name, place in net.state_dict().items():
        if name not in tensors:
            raise InvalidValue(f"{path} lacks {name}: it is of another architecture than model.net")
        given = tensors[name].float()
        if name in ("embed_tokens.weight", "lm_head.weight") and len(given) <= len(place):
            given = torch.cat((given, given.mean(0, keepdim=True).expand(len(place) - len(given), -1)))
        if given.shape != place.shape:
            raise InvalidValue(f"{path}: {name} is {list(given.shape)}, this run's {list(place.shape)}: see model.net")
        place.copy_(given)


class BoundMeans(Metric):
    """Mean bound, bound per token and accuracy over the samples of all batches and ranks."""

    bound: Tensor
    per_token: Tensor
    hits: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("bound", "per_token", "hits", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, bound: Tensor, right: Tensor, sizes: Tensor) -> None:
        """bound, right, sizes: [B], the maskable positions last; rows without any do not count."""
        real = sizes > 0
        self.bound += bound[real].sum()
        self.per_token += (bound[real] / sizes[real]).sum()
        self.hits += right[real].sum()
        self.samples += real.sum()

    def compute(self) -> dict[str, Tensor]:
        count = self.samples.clamp_min(1)
        return {"loss": self.per_token / count, "bound": self.bound / count, "accuracy": self.hits / count}


class MaskedDiffusion(LearnedPart):
    """Trains a `MaskedLM` on `CanvasBatch`es.

    Gradients are those of the mean over all rows of the global batch, so the number of ranks does not change the
    training. A step whose loss is not finite is skipped, ten in a row end the run (InvalidState).
    """

    DEFINITIONS: ClassVar[Mapping[str, str]] = {
        "val/loss": "upper bound of -log p(answer | prompt) over the answer's tokens, mean over samples, in nats per "
        "token",
        "val/bound": "upper bound of -log p(answer | prompt), mean over validation samples, in nats",
        "val/accuracy": "share of masked tokens that were the most likely ones, over all masking rates",
    }

    def __init__(
        self,
        net: MaskedLMConfig,
        diffusion: DiffusionConfig = DEFAULT_DIFFUSION,
        optim: OptimConfig = DEFAULT_OPTIM,
        init_from: str | None = None,
        chunk_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        """Plain settings only; the network is built in `configure_model`.

        Args:
            net: the network's sizes and special ids.
            diffusion: what is masked, and how it is weighted.
            optim: AdamW and its schedule.
            init_from: weights to start from, of the same sizes: an export, LLaDA's or Dream's directory, or an
                autoregressive Llama-like model (then with `logit_shift`, as Dream was made).
            chunk_rows: positions that go through the head at once; null chooses.
            seed: of crops and masks.
        """
        super().__init__()
        self.config = net if isinstance(net, MaskedLMConfig) else MaskedLMConfig(**cast(Mapping[str, Any], net))
        self.diffusion = diffusion if isinstance(diffusion, DiffusionConfig) else DiffusionConfig(**diffusion)
        self.optim = OptimConfig.of(optim)
        if chunk_rows is not None and chunk_rows < 1:
            raise InvalidValue(f"chunk_rows must be at least 1, got {chunk_rows}")
        self.init_from, self.chunk_rows, self.seed = init_from, chunk_rows, seed
        self.save_hyperparameters(
            {
                "net": dataclasses.asdict(self.config),
                "diffusion": dataclasses.asdict(self.diffusion),
                "optim": dataclasses.asdict(self.optim),
                "init_from": init_from,
                "chunk_rows": chunk_rows,
                "seed": seed,
            }
        )
        self.net: MaskedLM | None = None
        self.val_means, self.test_means = BoundMeans(), BoundMeans()

    def build(self) -> MaskedLM:
        return MaskedLM(self.config)

    def positions(self, data: Any) -> int:
        length: int = getattr(data, "row_length", self.config.max_length)  # what is made on the fly is never longer
        return length

    def plan_batch(self, data: Any) -> CanvasBatch:
        return CanvasBatch(on_meta(data.rows, self.positions(data)), *(on_meta(data.rows) for _ in range(4)))

    def plan_loss(self, batch: CanvasBatch) -> Tensor:
        return self.loss(batch, corrupt(batch, self.diffusion, 0, 0)).total

    def configure_model(self) -> None:
        """Build the network (once), inside the strategy's context so that sharding strategies shard at birth."""
        if self.net is not None:
            return
        net = self.build()
        if self.init_from is not None and net.device.type != "meta":
            self._start_from(net, self.init_from)
        self.net = net

    def _start_from(self, net: MaskedLM, path: str) -> None:
        """Raises InvalidValue for a network of other sizes, and under ZeRO-3, where parameters are in pieces by now."""
        if getattr(self._trainer, "strategy", None) is not None and getattr(self.trainer.strategy, "stage", 0) == 3:
            raise InvalidValue("model.init_from cannot fill parameters that ZeRO-3 has cut: take zero2")
        if read_json(Path(path) / "config.json").get("model_type") in CAUSAL:
            from_causal(net, Path(path))
            return
        found = load_masked_lm(path, dtype="float32", frozen=False)
        for name in (field.name for field in dataclasses.fields(MaskedLMConfig)):
            mine, theirs = getattr(self.config, name), getattr(found.config, name)
            if mine != theirs and name not in ("max_length", "norm_eps"):
                raise InvalidValue(f"{path} has {name} {theirs}, this run {mine}: set model.net.{name} to {theirs}")
        state = found.state_dict()
        table = state.get("embed_positions.weight")
        if table is not None and len(table) != self.config.max_length:
            raise InvalidValue(
                f"{path} has {len(table)} learned positions, this run {self.config.max_length}: set "
                f"model.net.max_length to {len(table)}"
            )
        net.load_state_dict(state)

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.named_parameters(), self.optim, self.trainer.estimated_stepping_batches)

    # --- steps

    def loss(self, batch: CanvasBatch, drawn: Corruption, statistics: bool = False) -> HeadLoss:
        """Weighted cross-entropy of the masked positions, summed over the rows. Raises InvalidValue for rows too long.

        A batch that drew no mask has loss 0 and zero gradients.
        """
        net = self._built()
        if batch.ids.shape[1] > self.config.max_length:
            raise InvalidValue(
                f"canvases of {batch.ids.shape[1]} tokens, but the network has {self.config.max_length} positions: "
                "shorten the data's length or raise model.net.max_length"
            )
        lengths = drawn.lengths.clamp_min(1)  # a row that only fills the batch: one position, without weight
        hidden = net(batch.ids.masked_fill(drawn.masked, self.config.mask_id), lengths)
        weight = net.lm_head.weight
        bias = torch.zeros(weight.shape[0], device=weight.device, dtype=torch.float32)
        bias[self.config.mask_id] = _NEVER
        return chunked_head(
            hidden.flatten(0, 1),
            weight,
            batch.ids.flatten(),
            row_loss=ROW_LOSSES["ce"],
            example_weight=drawn.weight.flatten(),
            bias=bias,
            chunk_rows=self.chunk_rows,
            statistics=statistics,
        )

    def training_step(self, batch: CanvasBatch, batch_idx: int) -> Tensor:
        drawn = corrupt(batch, self.diffusion, self.seed, self.step_number, self.global_rank, self.trainer.world_size)
        return self.global_mean(self.loss(batch, drawn).total, drawn.rows, len(batch.ids))

    def bound(self, batch: CanvasBatch, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """(bound [B], accuracy [B], maskable positions [B]) of uncropped samples, by their sample ids alone."""
        positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        maskable = (positions >= batch.prompt.unsqueeze(1)) & (positions < batch.length.unsqueeze(1))
        sizes = maskable.sum(1)
        if not bool(sizes.any()):
            zero = sizes.double()
            return zero, zero, sizes
        bound, right = likelihood_bound(
            self._built(),
            batch.ids,
            maskable,
            mask_id=self.config.mask_id,
            lengths=batch.length.clamp_min(1),
            draws=draws,
            seed=self.seed,
            row_ids=batch.sample_id,
        )
        return bound, right, sizes

    def validation_step(self, batch: CanvasBatch, batch_idx: int) -> None:
        self.val_means.update(*self.bound(batch, self.diffusion.val_draws))

    def test_step(self, batch: CanvasBatch, batch_idx: int) -> None:
        self.test_means.update(*self.bound(batch, self.diffusion.val_draws))

    def on_validation_epoch_end(self) -> None:
        self._log_means("val", self.val_means)

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.test_means)

    def _log_means(self, stage: str, means: BoundMeans) -> None:
        for name, value in means.compute().items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
        means.reset()

    # --- what checkpoints and exports say

    def on_fit_start(self) -> None:
        self._begin()

    def on_validation_start(self) -> None:
        self._begin()

    def on_test_start(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Note, once, what the data says of itself. Raises InvalidValue when its ids are not the network's."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or "data_fingerprint" in self._meta:
            return
        size, directory = getattr(data, "vocab_size", None), getattr(data, "tokenizer_dir", None)
        if size is not None and size > self.config.vocab_size:
            raise InvalidValue(
                f"the data has {size} ids and the network only {self.config.vocab_size} rows: raise "
                "model.net.vocab_size"
            )
        for name, value in getattr(data, "special_ids", {}).items():
            if getattr(self.config, name) not in (value, None):
                raise InvalidValue(
                    f"model.net.{name} is {getattr(self.config, name)}, but the data has {value}: set it to {value}"
                )
        if directory is not None and size is not None and self.config.mask_id < size:
            raise InvalidValue(
                f"model.net.mask_id {self.config.mask_id} is one of the tokenizer's {size} ids: take one above them, "
                f"for example {size}, and a vocab_size that holds it"
            )
        if hasattr(data, "data_fingerprint"):
            self._meta["data_fingerprint"] = data.data_fingerprint()
        self._meta["tokenizer_dir"] = None if directory is None else str(directory)

    def export_spec(self) -> ExportSpec:
        """What `draftsmith export` writes. Raises InvalidState before `configure_model`."""
        return self.spec_of(
            "masked-lm",
            self._built(),
            trained={
                "max_length": self.config.max_length,
                "lengths_varied": self.diffusion.crop_share > 0,
                "objective": self.diffusion.objective,
            },
            decode_defaults={"block_length": self.diffusion.block_length},
        )

    def _built(self) -> MaskedLM:
        if self.net is None:
            raise self.not_built()
        return self.net
