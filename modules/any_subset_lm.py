"""Any-subset models: trains one network for every conditional p(token | any visible subset), along a lattice of orders.

Source: arXiv 2504.20456, training section: the teacher-forced joint E_{m,S}[-(1/(N-m)) sum_r log p(x_r | x_<r)], all
targets of a sample in one forward. Which tokens are hidden: data/orderings.py.
Shape letters: B batch, N positions, K most targets of a sample, R validation rates, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from draftsmith.data import orderings
from draftsmith.data.batches import PADDING, TokenBatch
from draftsmith.data.orderings import MaskSchedule, Ordering
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.nets.any_subset_lm import AnySubsetConfig, AnySubsetLM
from draftsmith.modules.any_subset_sample import infilled
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.learned_part import LearnedPart, on_meta
from draftsmith.modules.losses.chunked_head import HeadLoss, chunked_head
from draftsmith.modules.losses.divergence import ROW_LOSSES
from draftsmith.modules.optim import OptimConfig, build_optimizer

LOSSES, REDUCTIONS = ("joint", "parallel"), ("mean", "sum")
VAL_RATES = (0.25, 0.5, 0.75, 0.95)
DEFAULT_MASKING = MaskSchedule()
DEFAULT_OPTIM = OptimConfig(lr=1e-4, weight_decay=0.01, warmup_steps=100)
_NEVER = -1e30  # the mask id's logit in the loss: finite, since 0 * infinity would be NaN in a gradient
_VAL_SEED = 1  # validation hides the same tokens in every run


class RateMeans(Metric):
    """Mean loss and accuracy per hidden token for each of R mask rates, over all batches and ranks; 0 without any."""

    nll: Tensor
    hits: Tensor
    hidden: Tensor

    def __init__(self, rates: int) -> None:
        super().__init__()
        for name in ("nll", "hits", "hidden"):
            self.add_state(name, torch.zeros(rates, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rate: int, out: HeadLoss) -> None:
        assert out.stats is not None
        here = torch.zeros_like(self.hidden)
        here[rate] = 1  # states are replaced, not changed: validation may run in inference mode, and in fit
        self.nll = self.nll + here * out.stats.loss.double().sum()
        self.hits = self.hits + here * out.stats.agree.sum()
        self.hidden = self.hidden + here * len(out.stats.rows)

    def compute(self) -> dict[str, Tensor]:
        count = self.hidden.clamp_min(1)
        return {"loss": self.nll / count, "accuracy": self.hits / count}


class AnySubset(LearnedPart):
    """Trains an `AnySubsetLM` on `TokenBatch`es.

    Gradients are those of the mean over all samples of the global batch, however many ranks share it. A batch whose
    loss is not finite is skipped, ten in a row end the run (InvalidState).
    Limits: documents of one row see each other (data.text.separate_documents is refused).
    """

    DEFINITIONS: ClassVar[Mapping[str, str]] = {
        "val/loss": "-log p per hidden token of the validation set in nats, mean over the mask rates of "
        "model.val_rates",
        "val/accuracy": "share of hidden validation tokens that are the model's most likely one, mean over the mask "
        "rates",
    }

    def __init__(
        self,
        net: AnySubsetConfig | None = None,
        init_from: str | None = None,
        masking: MaskSchedule = DEFAULT_MASKING,
        order: str = "lattice",
        loss: str = "joint",
        reduction: str = "mean",
        val_rates: Sequence[float] = VAL_RATES,
        embedding_std: float = 0.02,
        seed: int = 0,
        optim: OptimConfig = DEFAULT_OPTIM,
        chunk_rows: int | None = None,
    ) -> None:
        """Plain settings only; the network is built in `configure_model`.

        Args:
            net: the network, by sizes; null with init_from.
            init_from: a directory whose weights are the start: XLNet's (Hugging Face), or an export of ours.
            masking: which share of a sample is hidden, and its warm-up.
            order: lattice (one order per subset), or any_permutation (N! orders; learns slower).
            loss: joint (target of rank r sees ranks below r), or parallel (all targets see the prompt alone).
            reduction: mean over the targets of a sample, or their sum, the literal joint log-likelihood.
            val_rates: validation hides these shares; the mean of their losses is val/loss.
            embedding_std: of token and position embeddings at birth; narrow networks (64 wide) learn faster from 0.2.
            seed: of what is hidden in training.
            optim: AdamW and its schedule. The paper has 1e-5 per 32 samples of the global batch, from XLNet's weights.
            chunk_rows: targets that go through the head at once; null chooses.
        """
        super().__init__()
        self.config = None if net is None else net if isinstance(net, AnySubsetConfig) else AnySubsetConfig(**net)
        self.init_from = init_from
        if (net is None) == (init_from is None):
            raise InvalidValue("give exactly one of model.net (sizes) and model.init_from (a directory of weights)")
        self.masking, self.optim = MaskSchedule.of(masking), OptimConfig.of(optim)
        for what, value, choices in (
            ("order", order, orderings.ORDERS),
            ("loss", loss, LOSSES),
            ("reduction", reduction, REDUCTIONS),
        ):
            if value not in choices:
                raise unknown_choice(what, value, choices)
        if not val_rates or not all(0 < rate < 1 for rate in val_rates):
            raise InvalidValue(f"val_rates wants mask rates strictly between 0 and 1, got {list(val_rates)}")
        if embedding_std <= 0:
            raise InvalidValue(f"embedding_std must be above 0, got {embedding_std}")
        if chunk_rows is not None and chunk_rows < 1:
            raise InvalidValue(f"chunk_rows must be at least 1, got {chunk_rows}")
        self.order, self.loss_name, self.reduction = order, loss, reduction
        self.val_rates, self.embedding_std, self.seed, self.chunk_rows = (
            tuple(val_rates),
            embedding_std,
            seed,
            chunk_rows,
        )
        self.save_hyperparameters(
            {
                "net": None if self.config is None else dataclasses.asdict(self.config),
                "init_from": init_from,
                "masking": dataclasses.asdict(self.masking),
                "order": order,
                "loss": loss,
                "reduction": reduction,
                "val_rates": list(val_rates),
                "embedding_std": embedding_std,
                "seed": seed,
                "optim": dataclasses.asdict(self.optim),
                "chunk_rows": chunk_rows,
            }
        )
        self.net: AnySubsetLM | None = None
        self.val_means, self.test_means = RateMeans(len(self.val_rates)), RateMeans(len(self.val_rates))
        self._checked = False
        self._shown: Tensor | None = None  # int64 [N]: the validation sample of the text panel

    # --- network

    def build(self) -> AnySubsetLM:
        if self.init_from is None:
            assert self.config is not None
            net = AnySubsetLM(self.config)
            for name, table in net.named_parameters():
                if name.startswith("embed_") and table.device.type != "meta":
                    nn.init.normal_(table, std=self.embedding_std)
            return net
        from draftsmith.inference.load_any_subset import read_net

        net = read_net(self.init_from).float().train().requires_grad_(True)
        self.config = net.config
        return net

    def positions(self, data: Any) -> int:
        length: int = data.row_length
        return length

    def plan_batch(self, data: Any) -> TokenBatch:
        shape = (data.rows, data.row_length)
        masks = on_meta(*shape, dtype=torch.int8), on_meta(*shape, dtype=torch.int32)
        return TokenBatch(on_meta(*shape), *masks, on_meta(data.rows))

    def plan_loss(self, batch: TokenBatch) -> Tensor:
        drawn = orderings.widest(len(batch.ids), batch.ids.shape[1], self.masking.highest)
        return self.loss(batch, drawn, statistics=False).total

    def get_output_embeddings(self) -> nn.Module:
        """The head, which the chunked loss reads outside of its own forward (ZeRO-3 gathers it for the whole step)."""
        return self._built().lm_head

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.named_parameters(), self.optim, self.trainer.estimated_stepping_batches)

    # --- losses

    def loss(self, batch: TokenBatch, ordering: Ordering, statistics: bool) -> HeadLoss:
        """Cross-entropy at the targets of a batch: summed over the means of its samples, or over all its targets.

        Raises InvalidValue for rows longer than the network's canvas.
        """
        net = self._built()
        limit = ordering.num_visible if self.loss_name == "parallel" else None
        hidden = net(batch.ids, ordering.rank, ordering.num_visible, ordering.targets, limit)
        learned = ordering.real & _labels(batch).gather(1, ordering.targets)
        weight = learned.float()
        if self.reduction == "mean":
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
        bias = torch.zeros(net.config.vocab_size, dtype=hidden.dtype, device=hidden.device)
        bias[net.config.mask_id] = _NEVER
        return chunked_head(
            hidden.flatten(0, 1),
            net.lm_head.weight,
            batch.ids.gather(1, ordering.targets).flatten(),
            row_loss=ROW_LOSSES["ce"],
            example_weight=weight.flatten(),
            bias=bias if net.lm_head.bias is None else net.lm_head.bias + bias,
            chunk_rows=self.chunk_rows,
            statistics=statistics,
        )

    def training_ordering(self, batch: TokenBatch, step: int, micro: int = 0) -> tuple[Ordering, Tensor]:
        """What a training step hides of a batch, and the rates float64 [B], stratified over ranks and micro batches."""
        trainer, size = self._trainer, len(batch.ids)
        rank, world, accumulate = (
            (0, 1, 1)
            if trainer is None
            else (trainer.global_rank, trainer.world_size, int(trainer.accumulate_grad_batches))
        )
        total = accumulate * size * world
        places = orderings.places(rank, world, size, micro % accumulate)
        rates = self.masking.rates(step, places, total, self.seed)
        length = batch.ids.shape[1]
        drawn = orderings.draw(rates, step * total + places, _lengths(batch), length, seed=self.seed, order=self.order)
        return drawn, rates

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        ordering, rates = self.training_ordering(batch, self.trainer.global_step, batch_idx)
        out = self.loss(batch, ordering, statistics=False)
        self.log("train/mask_rate", float(rates.mean()), batch_size=len(batch.ids))
        return self.global_mean(out.total, (ordering.counts > 0).sum(), len(batch.ids))

    # --- validation

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        if batch_idx == 0:
            self._shown = batch.ids[0]
        self._measure(batch, self.val_means)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self._measure(batch, self.test_means)

    def _measure(self, batch: TokenBatch, means: RateMeans) -> None:
        """The same tokens of a sample are hidden at every validation, keyed by the sample's number in its data."""
        numbers = batch.sample_id
        for index, rate in enumerate(self.val_rates):
            rates = torch.full((len(batch.ids),), rate, dtype=torch.float64)
            ordering = orderings.draw(
                rates, numbers, _lengths(batch), batch.ids.shape[1], seed=_VAL_SEED + index, order=self.order
            )
            means.update(index, self.loss(batch, ordering, statistics=True))

    def on_validation_epoch_end(self) -> None:
        self._log_means("val", self.val_means)
        self._show()

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.test_means)

    def _log_means(self, stage: str, means: RateMeans) -> None:
        values = means.compute()
        for rate, nll in zip(self.val_rates, values["loss"], strict=True):
            self.log(f"{stage}_hidden/nll_{rate:g}", nll.float(), sync_dist=True)
        for name, value in values.items():
            self.log(f"{stage}/{name}", value.mean().float(), prog_bar=name == "loss", sync_dist=True)
        means.reset()

    def _show(self) -> None:
        """A text panel: a validation sample with a filled gap. Every rank takes part (ZeRO-3 gathers as it runs)."""
        from lightning.pytorch.loggers import TensorBoardLogger

        boards = [logger for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or self._shown is None or self.trainer.sanity_checking:
            return
        text = infilled(self._built(), self._shown, getattr(self.trainer.datamodule, "tokenizer", None))
        if self.trainer.is_global_zero:
            for board in boards:
                board.experiment.add_text("val/infilled", text, self.trainer.global_step)

    # --- what checkpoints and exports say

    def on_fit_start(self) -> None:
        self._check_data()

    def on_validation_start(self) -> None:
        self._check_data()

    def on_test_start(self) -> None:
        self._check_data()

    def _check_data(self) -> None:
        """Note, once, what the data says of itself. Raises InvalidValue where it does not fit the network."""
        if self._checked:
            return
        self._checked = True
        data, config = getattr(self.trainer, "datamodule", None), self._built().config
        text = getattr(data, "text", None)
        if getattr(text, "separate_documents", False):
            raise InvalidValue("any-subset models see a whole row: set data.text.separate_documents to false")
        length = getattr(text, "length", None)
        if length is not None and length > config.max_length:
            raise InvalidValue(
                f"rows of {length} tokens, but the network has {config.max_length} positions: shorten "
                "data.text.length or raise model.net.max_length"
            )
        if data is not None and hasattr(data, "vocab_size"):
            _check_vocabulary(data, config)
        if data is not None and hasattr(data, "data_fingerprint"):
            self._meta["data_fingerprint"] = data.data_fingerprint()
        directory = getattr(data, "tokenizer_dir", None)
        if directory is not None:
            self._meta["tokenizer_dir"] = str(directory)
        if length is not None:
            self._meta["length"] = int(length)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._meta["skipped"] = self._finite.skipped
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._finite.skipped = self._meta.get("skipped", 0)

    def export_spec(self) -> ExportSpec:
        """What `draftsmith export` writes. Raises InvalidState before `configure_model`."""
        net = self._built()
        return self.spec_of(
            "any-subset-lm",
            net,
            trained={
                "order": self.order,
                "mask_rate": [self.masking.min_rate, self.masking.max_rate],
                "max_length": self._meta.get("length", net.config.max_length),
                "mask_id": net.config.mask_id,
                "loss": self.loss_name,
            },
        )

    def _built(self) -> AnySubsetLM:
        if self.net is None:
            raise self.not_built()
        return self.net


def _lengths(batch: TokenBatch) -> Tensor:
    """int64 [B]: tokens of each row before its padding."""
    return (batch.document != PADDING).sum(1)


def _labels(batch: TokenBatch) -> Tensor:
    """bool [B, N]: tokens to learn. The first of a row has none before it, but here others around it."""
    labels = batch.loss_mask.bool()
    return torch.cat([batch.document[:, :1] != PADDING, labels[:, 1:]], 1)


def _check_vocabulary(data: Any, config: AnySubsetConfig) -> None:
    """Raises InvalidValue when ids have no row, or the mask id stands for text."""
    if data.vocab_size > config.vocab_size:
        raise InvalidValue(
            f"the tokenizer has {data.vocab_size} ids and the network only {config.vocab_size} rows: set "
            f"model.net.vocab_size to {data.vocab_size + 1}, its last row for the mask"
        )
    special = set(getattr(getattr(data, "tokenizer", None), "all_special_ids", ()))
    eos = getattr(getattr(data, "tokenizer", None), "eos_token_id", None)
    if config.mask_id < data.vocab_size and (config.mask_id not in special or config.mask_id == eos):
        raise InvalidValue(
            f"mask id {config.mask_id} is a token of text: take the tokenizer's mask or another special token that "
            f"text never holds, or a row of its own (model.net.vocab_size {data.vocab_size + 1}, mask_id "
            f"{data.vocab_size})"
        )
