"""Maximum likelihood for a causal language model: targets, and drafts before any distillation.

Shape letters: B batch, T time, N = B (T - 1) positions, D width, V vocabulary.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from draftsmith.data.batches import TokenBatch
from draftsmith.inference import manifest
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.hf_model import HFModel, head_rows, last_hidden, output_head, set_special_ids, special_ids
from draftsmith.modules.losses.chunked_head import HeadLoss, chunked_head
from draftsmith.modules.losses.divergence import ROW_LOSSES, RowLoss
from draftsmith.modules.optim import FiniteGuard, OptimConfig, build_optimizer, spoilt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_OPTIM = OptimConfig()
_META = "draftsmith"  # key of our own entry in a checkpoint
DEFINITIONS = {
    "val/loss": "mean cross-entropy per label token of the validation set, in nats",
    "val/perplexity": "exp(val/loss)",
    "val/accuracy": "share of label tokens of the validation set that are the model's most likely token",
}


class TokenMeans(Metric):
    """Mean loss and accuracy per label token over all batches and ranks; both 0 when there was no label."""

    nll: Tensor
    hits: Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "hits", "labels"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, out: HeadLoss) -> None:
        assert out.stats is not None
        self.nll += out.stats.loss.double().sum()
        self.hits += out.stats.agree.sum()
        self.labels += len(out.stats.rows)

    def compute(self) -> dict[str, Tensor]:
        count = self.labels.clamp_min(1)
        return {
            "loss": self.nll / count,
            "perplexity": (self.nll / count).exp(),
            "accuracy": self.hits / count,
        }


class LM(pl.LightningModule):
    """Trains a Hugging Face causal language model on `TokenBatch`es by next-token cross-entropy.

    Gradients are those of the mean over all label tokens of the global batch, however unevenly the ranks hold them, so
    that the number of ranks does not change the training. A batch whose loss is not finite is skipped, ten in a row end
    the run (InvalidState).
    """

    def __init__(
        self,
        model: HFModel,
        optim: OptimConfig = DEFAULT_OPTIM,
        gradient_checkpointing: bool = False,
        chunk_rows: int | None = None,
    ) -> None:
        """Plain settings only; the network is built in `configure_model`.

        Args:
            model: which network, by path or by sizes.
            optim: AdamW and its schedule.
            gradient_checkpointing: recompute the body's activations in backward: about 30% more time, far less memory.
            chunk_rows: positions that go through the head at once; null chooses. More is faster and takes
                chunk_rows x vocabulary x 4 bytes a few times over.
        """
        super().__init__()
        self.spec = HFModel.of(model)
        self.optim = OptimConfig.of(optim)
        self.gradient_checkpointing = gradient_checkpointing
        self.chunk_rows = chunk_rows
        if chunk_rows is not None and chunk_rows < 1:
            raise InvalidValue(f"chunk_rows must be at least 1, got {chunk_rows}")
        self.save_hyperparameters(
            {
                "model": dataclasses.asdict(self.spec),
                "optim": dataclasses.asdict(self.optim),
                "gradient_checkpointing": gradient_checkpointing,
                "chunk_rows": chunk_rows,
            }
        )
        self.net: PreTrainedModel | None = None
        self.val_means, self.test_means = TokenMeans(), TokenMeans()
        self._finite = FiniteGuard()
        self._skip = False
        self._checked = False
        self._meta: dict[str, Any] = {}  # what the export needs to know of the data; travels in the checkpoint

    def configure_model(self) -> None:
        """Build the network (once), inside the strategy's context so that sharding strategies shard at birth."""
        if self.net is not None:
            return
        self.net = self.spec.build_trained()
        if self.gradient_checkpointing:
            name = "activation_checkpointing_enable"  # before transformers 5.2x: gradient_checkpointing_enable
            getattr(self.net, name, self.net.gradient_checkpointing_enable)()

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.named_parameters(), self.optim, self.trainer.estimated_stepping_batches)

    def loss(self, batch: TokenBatch, statistics: bool) -> HeadLoss:
        """Cross-entropy of a batch, summed over its label tokens."""
        return self.head_loss(batch, ROW_LOSSES["ce"], statistics)

    def head_loss(self, batch: TokenBatch, row_loss: RowLoss, statistics: bool) -> HeadLoss:
        """A row loss summed over the label tokens. Raises InvalidValue for rows too long for the network."""
        net = self._built()
        limit = getattr(net.config, "max_position_embeddings", None)
        if limit is not None and batch.ids.shape[1] > limit:
            raise InvalidValue(
                f"rows of {batch.ids.shape[1]} tokens, but the network has {limit} positions: shorten the data's "
                "sequence length or raise model.arch.max_position_embeddings"
            )
        apart = batch.separate
        hidden = last_hidden(net, batch.ids, batch.positions() if apart else None, batch.visible() if apart else None)
        labelled = batch.loss_mask[:, 1:].bool()
        if apart:  # a document's first token has no row of its own document before it
            labelled = labelled & (batch.document[:, 1:] == batch.document[:, :-1])
        weight, bias = output_head(net)
        return chunked_head(
            hidden[:, :-1].flatten(0, 1),  # row t predicts token t + 1
            weight,
            batch.ids[:, 1:].flatten(),
            row_loss=row_loss,
            example_weight=labelled.flatten(),
            bias=bias,
            chunk_rows=self.chunk_rows,
            statistics=statistics,
            mode="recompute" if self.gradient_checkpointing else "auto",
        )

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        out = self.loss(batch, statistics=False)
        sums = torch.stack([out.total.detach().double(), out.weight.double()])
        total, count = cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum"))
        count = count.clamp_min(1)
        self.log("train/loss", (total / count).float(), prog_bar=True, batch_size=len(batch.ids))
        # gradients may be accumulated: one bad batch spoils the whole step
        self._skip = not self._finite(total) or self._skip
        self.log("train/skipped", float(self._finite.skipped), batch_size=len(batch.ids))
        # the strategy averages gradients over ranks: this makes the average the gradient of the global mean
        scale: Tensor = self.trainer.world_size / count
        return out.total * (spoilt(scale) if self._skip else scale).float()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._skip:  # returning no loss instead is refused by Lightning on more than one rank
            for p in self.parameters():
                p.grad = None  # AdamW leaves parameters without a gradient, and their moments, alone
        self._skip = False

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.val_means.update(self.loss(batch, statistics=True))

    def on_validation_epoch_end(self) -> None:
        self._log_means("val", self.val_means)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.test_means.update(self.loss(batch, statistics=True))

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.test_means)

    def _log_means(self, stage: str, means: TokenMeans) -> None:
        for name, value in means.compute().items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
        means.reset()

    def on_fit_start(self) -> None:
        self._check_data()

    def on_validation_start(self) -> None:
        self._check_data()

    def on_test_start(self) -> None:
        self._check_data()

    def _check_data(self) -> None:
        """Note, once, what the data says of itself. Raises InvalidValue when its tokenizer does not fit the head."""
        if self._checked:
            return
        self._checked = True
        data, net = getattr(self.trainer, "datamodule", None), self._built()
        size = getattr(data, "vocab_size", None)
        rows = head_rows(net)
        if size is not None and size > rows:
            raise InvalidValue(
                f"the tokenizer has {size} ids and the network only {rows} rows: set model.arch.vocab_size to {size}"
            )
        if data is not None and hasattr(data, "data_fingerprint"):
            self._meta["data_fingerprint"] = data.data_fingerprint()
        directory = getattr(data, "tokenizer_dir", None)
        if directory is not None:
            self._meta["tokenizer_dir"] = str(directory)
            if self.spec.arch is not None:
                self._meta["special_ids"] = special_ids(directory)
                set_special_ids(net, self._meta["special_ids"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        values = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k in DEFINITIONS}
        seed = os.environ.get("PL_GLOBAL_SEED")  # where lightning.seed_everything leaves it
        checkpoint[_META] = {**self._meta, "metrics": values, "seed": None if seed is None else int(seed)}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self._meta = {**checkpoint.get(_META, {}), "steps": checkpoint.get("global_step")}
        if self.net is not None and "special_ids" in self._meta:
            set_special_ids(self.net, self._meta["special_ids"])

    def export_spec(self) -> ExportSpec:
        """What `draftsmith export` writes. Raises InvalidState before `configure_model`."""
        net, meta = self._built(), self._meta
        return ExportSpec(
            kind="lm",
            model=net,
            tokenizer_dir=meta.get("tokenizer_dir", self.spec.path),
            trained={"max_length": getattr(net.config, "max_position_embeddings", None)},
            metrics={k: manifest.Metric(v, DEFINITIONS[k]) for k, v in meta.get("metrics", {}).items()},
            data_fingerprint=meta.get("data_fingerprint"),
            seed=meta.get("seed"),
            steps=meta.get("steps"),
        )

    def _built(self) -> "PreTrainedModel":
        if self.net is None:
            raise InvalidState("the network is not built yet: call configure_model() first (the trainer does)")
        return self.net
