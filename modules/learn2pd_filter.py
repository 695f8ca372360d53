"""Learn2PD: trains a commit filter on oracle traces of a frozen masked diffusion model.

Source: Learn2PD (arXiv 2509.25188), section 3.2. What is done differently, each measured in docs/learn2pd.md: the loss
is that of masked positions alone, negatives weigh more (a false accept is permanent), the split is by prompt, and the
threshold is chosen on validation for a stated share of false accepts among all accepts.
Shape letters: B batch, W block, N bins.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from draftsmith.data.batches import TraceBatch
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.commit_filter import CommitFilter, FilterConfig, Signals
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.learned_part import LearnedPart, on_meta
from draftsmith.modules.optim import OptimConfig, build_optimizer

DEFAULT_OPTIM = OptimConfig(lr=3e-3, weight_decay=0.01)
_BINS = 1000  # of the scores: thresholds are multiples of 1 / 1000
_PLOTTED = 10  # bars of the reliability plot


class Reliability(Metric):
    """Scores by outcome over all batches and ranks: calibration, and the threshold for a budget of false accepts."""

    final: Tensor
    wrong: Tensor
    loss: Tensor
    weight: Tensor

    def __init__(self, budget: float) -> None:
        super().__init__()
        self.budget = budget
        for name in ("final", "wrong"):
            self.add_state(name, torch.zeros(_BINS, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("loss", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor, loss: Tensor, weight: Tensor) -> None:
        """logits, label: of the masked positions alone, [any]; loss, weight: their sums."""
        bins = (logits.sigmoid().double() * _BINS).long().clamp_max(_BINS - 1)
        self.final += torch.bincount(bins[label], minlength=_BINS)
        self.wrong += torch.bincount(bins[~label], minlength=_BINS)
        self.loss += loss.double()
        self.weight += weight.double()

    def compute(self) -> dict[str, Tensor]:
        final, wrong = (x.flip(0).cumsum(0).flip(0) for x in (self.final, self.wrong))  # at or above each bin
        false = wrong / (final + wrong).clamp_min(1)
        keeps = (false <= self.budget) & (final + wrong > 0)
        # the lowest score from which on all thresholds keep to the budget; none: the highest bin, nearly nothing
        first = int(keeps.nonzero()[0]) if bool(keeps.any()) else _BINS - 1
        first = max(first, 1)
        total = self.final.sum()
        share, hit, count = self.bars()
        return {
            "loss": self.loss / self.weight.clamp_min(1),
            "ece": ((share - hit).abs() * count).sum() / count.sum().clamp_min(1),
            "threshold": torch.tensor(first / _BINS),
            "false_accepts": false[first],
            "accepted": final[first] / total.clamp_min(1),
        }

    def bars(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mean score, share that was final, positions) of each of ten bins."""
        centre = (torch.arange(_BINS, dtype=torch.float64, device=self.final.device) + 0.5) / _BINS
        wide = (_PLOTTED, -1)
        count = (self.final + self.wrong).view(wide)
        total = count.sum(1).clamp_min(1)
        mean = (count * centre.view(wide)).sum(1) / total
        return mean, self.final.view(wide).sum(1) / total, count.sum(1)


class Learn2PDFilter(LearnedPart):
    """Trains a `CommitFilter` on `TraceBatch`es; the base model is not needed any more.

    A step whose loss is not finite is skipped, ten in a row end the run (InvalidState).
    """

    DEFINITIONS: ClassVar[Mapping[str, str]] = {
        "val/loss": "weighted binary cross-entropy per masked position of the validation prompts' traces, in nats",
        "val/ece": f"expected calibration error of the scores over {_PLOTTED} bins, masked positions of validation "
        "prompts",
        "val/threshold": "least score whose accepts keep to the budget of false ones on validation prompts",
        "val/false_accepts": "share of the accepts at that threshold that were not final, on validation prompts",
        "val/accepted": "share of the final predictions at masked positions that are accepted at that threshold",
    }

    def __init__(
        self,
        filter: FilterConfig,
        negative_weight: float = 4.0,
        false_accepts: float = 0.01,
        optim: OptimConfig = DEFAULT_OPTIM,
    ) -> None:
        """Plain settings only; the network is built in `configure_model`.

        Args:
            filter: which net, and what it reads.
            negative_weight: of predictions that were not final; more: fewer false accepts, and fewer accepts.
            false_accepts: budget: share of accepts that may be wrong; the exported threshold keeps to it on validation.
            optim: AdamW and its schedule.
        """
        super().__init__()
        self.config = filter if isinstance(filter, FilterConfig) else FilterConfig(**cast(Mapping[str, Any], filter))
        self.optim = OptimConfig.of(optim)
        if negative_weight <= 0:
            raise InvalidValue(f"model.negative_weight must be above 0, got {negative_weight}")
        if not 0 < false_accepts < 1:
            raise InvalidValue(f"model.false_accepts must lie between 0 and 1, got {false_accepts}")
        self.negative_weight, self.false_accepts = negative_weight, false_accepts
        self.save_hyperparameters(
            {
                "filter": dataclasses.asdict(self.config),
                "negative_weight": negative_weight,
                "false_accepts": false_accepts,
                "optim": dataclasses.asdict(self.optim),
            }
        )
        self.net: CommitFilter | None = None
        self.val_scores, self.test_scores = Reliability(false_accepts), Reliability(false_accepts)

    def build(self) -> CommitFilter:
        return CommitFilter(self.config)

    def positions(self, data: Any) -> int:
        return self.config.block_length

    def plan_batch(self, data: Any) -> TraceBatch:
        kinds = {"predicted": torch.int32, "masked": torch.uint8, "label": torch.uint8}
        kinds |= {"before_predicted": torch.int32, "before_masked": torch.uint8}
        blocks = ("confidence", "entropy", "margin", *kinds, "before_confidence")
        shape = (data.rows, self.config.block_length)
        columns = {name: on_meta(*shape, dtype=kinds.get(name, torch.int16)) for name in blocks}
        return TraceBatch(**columns, follows=on_meta(data.rows, dtype=torch.uint8), sample_id=on_meta(data.rows))

    def plan_loss(self, batch: TraceBatch) -> Tensor:
        return self.loss(batch)[0]

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.named_parameters(), self.optim, self.trainer.estimated_stepping_batches)

    # --- steps

    def loss(self, batch: TraceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the weighted losses, sum of the weights, logits [B, W]); masked positions alone."""
        logits = self._built().score(signals(batch)).float()
        label = batch.label.float()
        weight = batch.masked * torch.where(batch.label.bool(), 1.0, self.negative_weight)
        loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
        return (loss * weight).sum(), weight.sum(), logits

    def training_step(self, batch: TraceBatch, batch_idx: int) -> Tensor:
        total, weight, _ = self.loss(batch)
        return self.global_mean(total, weight, len(batch.label))

    def _see(self, scores: Reliability, batch: TraceBatch) -> None:
        total, weight, logits = self.loss(batch)
        masked = batch.masked.bool()
        scores.update(logits[masked], batch.label[masked].bool(), total, weight)

    def validation_step(self, batch: TraceBatch, batch_idx: int) -> None:
        self._see(self.val_scores, batch)

    def test_step(self, batch: TraceBatch, batch_idx: int) -> None:
        self._see(self.test_scores, batch)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self.val_scores)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test", self.test_scores)

    def _log_scores(self, stage: str, scores: Reliability) -> None:
        for name, value in scores.compute().items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
        board: Any = getattr(self.logger, "experiment", None)
        if hasattr(board, "add_figure") and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            board.add_figure(f"{stage}/reliability", reliability_plot(*scores.bars()), self.trainer.global_step)
        scores.reset()

    # --- what checkpoints and exports say

    def on_fit_start(self) -> None:
        self._begin()

    def on_validation_start(self) -> None:
        self._begin()

    def on_test_start(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Note, once, what the traces are of. Raises InvalidValue for blocks of another length than the filter's."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "traced") or "base" in self._meta:
            return
        traced = data.traced
        if traced["block_length"] != self.config.block_length:
            raise InvalidValue(
                f"the traces have blocks of {traced['block_length']}, the filter of {self.config.block_length}: set "
                f"model.filter.block_length to {traced['block_length']}, or trace again"
            )
        kept = ("base", "fingerprint", "vocab_size", "decode")
        self._meta |= {name: traced[name] for name in kept} | {"data_fingerprint": data.data_fingerprint()}

    def export_spec(self) -> ExportSpec:
        """What `draftsmith export` writes.

        Raises InvalidState before `configure_model`, and when the base is not the one that was traced any more.
        """
        net, meta = self._built(), self._meta
        if "base" not in meta:
            raise InvalidState("this filter has seen no traces: train it with 'draftsmith fit' before it is exported")
        found = target_fingerprint(Path(meta["base"]))
        if found != meta["fingerprint"]:
            raise InvalidState(
                f"{meta['base']} is not the model that was traced (fingerprint {found:.12}, then "
                f"{meta['fingerprint']:.12}): trace again, or put the traced export back"
            )
        return self.spec_of(
            "filter",
            net,
            target_dir=meta["base"],
            trained={"block_length": self.config.block_length, "net": self.config.net, "feature": self.config.feature},
            decode_defaults={
                **meta["decode"],
                "rule": "learned_filter",
                "filter_threshold": round(meta.get("metrics", {}).get("val/threshold", 0.9), 3),
                "false_accepts": self.false_accepts,
            },
            vocab_size=meta["vocab_size"],
        )

    def _built(self) -> CommitFilter:
        if self.net is None:
            raise InvalidState("the filter is not built yet: call configure_model() first (the trainer does)")
        return self.net


def signals(batch: TraceBatch) -> Signals:
    """A batch as filters read it."""
    halves = batch.halves
    before = Signals(halves(batch.before_confidence), batch.before_masked.bool(), batch.before_predicted)
    return Signals(
        confidence=halves(batch.confidence),
        masked=batch.masked.bool(),
        predicted=batch.predicted,
        entropy=halves(batch.entropy),
        margin=halves(batch.margin),
        previous=before,
        has_previous=batch.follows.bool(),
    )


def reliability_plot(mean: Tensor, share: Tensor, count: Tensor) -> Any:
    """A matplotlib figure: of each bin of scores, the share that was final, beside the diagonal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    seen = count > 0
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.bar(mean[seen].tolist(), share[seen].tolist(), width=0.8 / _PLOTTED, alpha=0.5)
    axes.plot(mean[seen].tolist(), share[seen].tolist(), marker="o")
    axes.set(xlabel="score", ylabel="share that was final", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{int(count.sum())} masked positions of validation prompts")
    return figure
