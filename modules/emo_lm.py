"""EMO for a causal language model: continues a pretrained one so that its samples stay where the text is.

Source: "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling" (ICLR 2024, arXiv 2310.04691).
Data, network, checkpoints and export are those of `LM`; only the row loss differs, and validation still measures
likelihood. The token costs are kept out of module registration: a buffer would be broadcast by DDP in every step, cast
by DeepSpeed's bf16, and saved.

Shape letters: V vocabulary, m width of the cost embedding.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.hf_model import DTYPES, HFModel, head_rows, output_head, whole_head
from draftsmith.modules.lm import DEFAULT_OPTIM, LM
from draftsmith.modules.lora import LoRAConfig, inject, merged
from draftsmith.modules.losses.chunked_head import HeadLoss, HeadStats
from draftsmith.modules.losses.costs import TokenCosts
from draftsmith.modules.losses.emo import EMO, Mix
from draftsmith.modules.optim import OptimConfig

_ADAPTIVE_BYTES = 10**9  # a copy of the head in every step; larger ones only when forced
_COSTS = "draftsmith_emo_costs"  # key of costs that cannot be made again, in a checkpoint


@dataclass(frozen=True)
class EMOConfig:
    """The mix and the token costs."""

    mode: str = "mle_anchored"  # for domain and instruction tuning; emo_anchored: sharper, for light continuation
    ratio: str = "plain"  # "shift" adds the label's own mass to the cost before the ratio is taken
    limit: float | None = None  # of the ratio; null: 3 in mle_anchored, 10 in emo_anchored
    costs: str = "head"  # "head": the head before training; "adaptive": the head of each step; else a model's directory
    center: bool = False  # subtract the mean embedding: where the mean cost is below 0.05
    project: int | None = None  # principal directions kept (128 to 256): the costs' work falls by project / width
    cost_dtype: str = "float32"  # bfloat16: half the memory
    force_adaptive: bool = False  # adaptive costs whose copy of the head takes more than 1 GB

    def __post_init__(self) -> None:
        self.mix()
        if self.cost_dtype not in DTYPES:
            raise unknown_choice("emo.cost_dtype", self.cost_dtype, DTYPES)
        if self.project is not None and self.costs == "adaptive":
            raise InvalidValue("adaptive costs are made in every step, too often for a projection: leave project out")

    @classmethod
    def of(cls, config: "EMOConfig | Mapping[str, Any]") -> "EMOConfig":
        """From itself, or from the plain dict that a checkpoint's hyper-parameters hold."""
        return config if isinstance(config, EMOConfig) else cls(**config)

    def mix(self) -> Mix:
        """The mixing rule. Raises InvalidValue for settings outside what is allowed."""
        return Mix(self.mode, self.ratio, self.limit)


DEFAULT_EMO = EMOConfig()


class CostMean(Metric):
    """Mean transport cost per label token over all batches and ranks; 0 when there was no label."""

    cost: Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("cost", "labels"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, stats: HeadStats) -> None:
        cost = _cost(stats)
        self.cost += cost.double().sum()
        self.labels += len(cost)

    def compute(self) -> Tensor:
        return self.cost / self.labels.clamp_min(1)


class EMOLM(LM):
    """Trains a Hugging Face causal language model by EMO; everything else is as in `LM`."""

    def __init__(
        self,
        model: HFModel,
        emo: EMOConfig = DEFAULT_EMO,
        optim: OptimConfig = DEFAULT_OPTIM,
        gradient_checkpointing: bool = False,
        chunk_rows: int | None = None,
        lora: LoRAConfig | None = None,
    ) -> None:
        """Plain settings only; network and costs are built in `configure_model`.

        Args:
            model: which network; by path, since EMO needs trained embeddings.
            emo: the mix and the token costs.
            optim: AdamW and its schedule.
            gradient_checkpointing: recompute the body's activations and the head in backward: about 30% more time, far
                less memory.
            chunk_rows: positions that go through the head at once; null chooses. More is faster and takes
                chunk_rows x vocabulary x 8 bytes.
            lora: train adapters of this size instead of the weights (extra `lora`); the export has them merged, or is
                the adapter alone (`--adapter`).
        """
        super().__init__(model, optim, gradient_checkpointing, chunk_rows)
        self.emo = EMOConfig.of(emo)
        self.lora = LoRAConfig.of(lora)
        adapters = None if self.lora is None else dataclasses.asdict(self.lora)
        self.save_hyperparameters({**self.hparams, "emo": dataclasses.asdict(self.emo), "lora": adapters})
        self.costs: TokenCosts | None = None  # None: adaptive
        self.val_cost, self.test_cost = CostMean(), CostMean()
        self._step: HeadStats | None = None

    def configure_model(self) -> None:
        """Build the network and, from weights that are not trained yet, the costs (once)."""
        if self.net is not None:
            return
        super().configure_model()
        if self.lora is not None:
            inject(self._built(), self.lora)
            if self.gradient_checkpointing:  # the embedding is frozen: without this nothing would ask for a gradient
                self._built().enable_input_require_grads()
        if self.emo.costs == "adaptive":
            size = head_rows(self._built()) * self._built().config.hidden_size * 4
            if size > _ADAPTIVE_BYTES and not self.emo.force_adaptive:
                raise InvalidValue(
                    f"adaptive costs copy the head in every step ({size / 1e9:.1f} GB, allowed is 1 GB): take "
                    "emo.costs head, or set emo.force_adaptive"
                )
            return
        if self.emo.costs == "head":
            rows = whole_head(self._built())
        else:
            rows = output_head(HFModel(path=self.emo.costs).build())[0]
            if len(rows) != head_rows(self._built()):
                raise InvalidValue(
                    f"cost embedding has {len(rows)} rows, logits have {head_rows(self._built())}: see emo.costs"
                )
        dtype = DTYPES[self.emo.cost_dtype]
        self.costs = TokenCosts.of(
            rows.detach(),
            center=self.emo.center,
            project=self.emo.project,
            dtype=None if dtype == torch.float32 else dtype,
            pretrained=self.spec.path is not None or self.emo.costs != "head",
        )

    def on_train_start(self) -> None:
        if self.costs is not None:
            self.log("emo/mean_cost", self.costs.mean)
            self.log("emo/projection_error", self.costs.projection_error)

    def row_loss(self) -> EMO:
        """The row loss of this step. Raises InvalidState before `configure_model`."""
        head = output_head(self._built())[0]
        if self.emo.costs == "adaptive":
            return EMO(TokenCosts.of(head, center=self.emo.center, judge=False), self.emo.mix())
        if self.costs is None:
            raise InvalidState("the costs are not built yet: call configure_model() first (the trainer does)")
        if self.costs.unit.device != head.device:
            self.costs = self.costs.to(head.device)
        return EMO(self.costs, self.emo.mix())

    def loss(self, batch: TokenBatch, statistics: bool) -> HeadLoss:
        """EMO of a batch, summed over its label tokens; the statistics' loss is the likelihood's."""
        out = self.head_loss(batch, self.row_loss(), statistics=True)
        assert out.stats is not None
        stats = replace(out.stats, loss=out.stats.more.get("nll", out.stats.loss))  # none in an empty batch
        self._step = stats
        return replace(out, stats=stats if statistics else None)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        stats = self._seen()
        parts = [stats.loss, _cost(stats), torch.ones_like(stats.loss)]
        sums = torch.stack([part.double().sum() for part in parts])
        nll, cost, count = cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum"))
        for name, value in (("nll", nll), ("cost", cost)):
            self.log(f"train/{name}", (value / count.clamp_min(1)).float(), batch_size=len(batch.ids))
        return loss

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.val_cost.update(self._seen())

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.test_cost.update(self._seen())

    def _seen(self) -> HeadStats:
        assert self._step is not None
        return self._step

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._log_cost("val", self.val_cost)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._log_cost("test", self.test_cost)

    def _log_cost(self, stage: str, mean: CostMean) -> None:
        self.log(f"{stage}/cost", mean.compute().float(), sync_dist=True)
        mean.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.costs is not None and self.spec.arch is not None and self.emo.costs == "head":
            checkpoint[_COSTS] = self.costs.unit.cpu()  # of random weights: nothing could make them again

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.costs is not None and _COSTS in checkpoint:
            self.costs = replace(self.costs, unit=checkpoint[_COSTS])

    def export_spec(self, adapter: bool = False) -> ExportSpec:
        """As `LM.export_spec`, with the objective noted; the costs are not exported.

        Args: adapter: of a run with LoRA the adapters alone (kind "adapter"), not merged into the weights.
        Raises InvalidValue when there is no adapter, or no base model that it could be put onto.
        """
        spec = super().export_spec()
        said = {key: getattr(self.emo, key) for key in ("mode", "ratio", "limit", "costs")}
        if os.path.isabs(said["costs"]):
            said["costs"] = os.path.basename(said["costs"])  # an export says no paths of the machine that trained it
        spec = replace(spec, trained={**spec.trained, "emo": said})
        if self.lora is None and adapter:
            raise InvalidValue("--adapter: the run has no model.lora, its weights are whole: leave --adapter out")
        if adapter and self.spec.path is None:
            raise InvalidValue("--adapter: the run's base has random weights and no directory: leave --adapter out")
        if adapter:
            return replace(spec, kind="adapter", target_dir=self.spec.path)
        return spec if self.lora is None else replace(spec, model=merged(spec.model))


def _cost(stats: HeadStats) -> Tensor:
    return stats.more.get("cost", stats.loss)
