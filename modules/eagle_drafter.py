"""EAGLE: trains a head on the target's own states, for several steps of its own rollout (EAGLE-3) or one (EAGLE-1).

Source: EAGLE (arXiv 2401.15077), sections 3 and 4; EAGLE-3 (arXiv 2503.01840), section 3. Where the reference trainers
are known to be wrong this one is not: row t of step k is trained iff token t+k+2 is a label of row t's document, and a
step's loss is divided by the number of its rows (EAGLE divides by all positions, SpecForge issue 885 shifts the mask).

Shape letters: B batch, T time, K steps, M trained rows of all steps, D width, F width of the states read, V vocabulary
of the target, Vd of the draft.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.data.batches import TokenBatch
from draftsmith.inference import manifest
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.nets.eagle_head import EagleHead
from draftsmith.modules.eagle_build import initialise, lend, warm_start
from draftsmith.modules.eagle_laws import TopLaws
from draftsmith.modules.eagle_metrics import StepMeans, Unrolled, by_step
from draftsmith.modules.eagle_rollout import goal_rows, rollout, state_noise, trained_rows
from draftsmith.modules.eagle_target import EagleSizes, EagleTarget, Observed
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.losses.chunked_head import HeadLoss, TeacherHead, chunked_head
from draftsmith.modules.losses.divergence import ROW_LOSSES
from draftsmith.modules.losses.draft_laws import (
    DRAFT_LOSSES,
    DraftLaws,
    draft_laws,
    draft_loss,
    draft_vocabulary,
    needs_argmax_inside,
)
from draftsmith.modules.optim import FiniteGuard, OptimConfig, build_optimizer, spoilt

DEFAULT_SIZES = EagleSizes()
DEFAULT_OPTIM = OptimConfig(lr=1e-4, weight_decay=0.0)
_META = "draftsmith"  # key of our own entry in a checkpoint
_CE_SHARE = 0.1  # of cross-entropy in EAGLE-1's loss
_CHUNK_ELEMENTS, _CHUNK_ROWS = 2**20, 256  # of logits on a CPU
DEFINITIONS = {
    "val/loss": "mean over the steps, weighted by the decay, of the mean row loss at the validation labels",
    "val/accuracy": "share of rows of step 0 whose most likely draft token is the target's",
    "val/alpha": "mean sum_v min(p_v, q_v) of step 0 at the validation labels, of the whole vocabulary",
    "val/tau_simulated": "1 + sum over the steps of the product of the accuracies up to each (teacher's tokens)",
    "val/alpha_decode": "acceptance of really decoding validation prompts with the served form",
    "val/tau": "tokens per target call, bonus included, of the same decoding",
    "vocabulary/covered": "share of the training labels whose token is in the draft vocabulary",
}


class EagleDrafter(pl.LightningModule):
    """Trains one EAGLE head on `TokenBatch`es (the target runs in process) or `StateBatch`es (its states were cached).

    A step whose loss is not finite on any rank is skipped on all of them, ten in a row end the run (InvalidState).
    Batches without a single label are left out and counted; a run that saw nothing else ends (InvalidValue).
    Limits: strategies up to ZeRO-2 (a head is small; ZeRO-3 would cut its parameters between the steps of a rollout).
    """

    def __init__(
        self,
        teacher: HFModel,
        head: EagleSizes = DEFAULT_SIZES,
        steps: int = 7,
        decay: float = 0.8,
        loss: str = "ce",
        noise: float = 0.0,
        init_from: str | None = None,
        init_head: bool = True,
        cached: bool = False,
        optim: OptimConfig = DEFAULT_OPTIM,
        chunk_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        """Plain settings only; networks are built in `configure_model`.

        Args:
            teacher: the target, by path or by sizes.
            head: the head; what is null there is the target's.
            steps: K of the training-time test; time and memory grow with it. EAGLE-1 has 1.
            decay: weight of step k is decay^k.
            loss: ce, kl, rkl, jsd (laws over the draft vocabulary), tv, nla, lk_hybrid (acceptance itself). EAGLE-1
                always takes SmoothL1 on the states + 0.1 cross-entropy.
            noise: uniform in (-noise, noise) on the states that are read; EAGLE-1's paper has 0.1.
            init_from: a directory of a head in any format that `draftsmith` reads; its own sizes hold.
            init_head: start lm_head as the target's rows, where the widths agree.
            cached: batches bring the states (data.teacher_states): only the target's embedding and head are loaded.
            optim: AdamW and its schedule.
            chunk_rows: rows that go through the head at once; null chooses.
            seed: of the noise.
        """
        super().__init__()
        self.teacher_spec, self.sizes, self.optim = HFModel.of(teacher), EagleSizes.of(head), OptimConfig.of(optim)
        if steps < 1 or (self.sizes.version == 1 and steps != 1):
            raise InvalidValue(f"steps must be at least 1, and 1 for EAGLE-1; got {steps}: set model.steps")
        if not 0 < decay <= 1:
            raise InvalidValue(f"decay must lie in (0, 1], got {decay}")
        if loss not in DRAFT_LOSSES:
            raise unknown_choice("loss", loss, DRAFT_LOSSES)
        if self.sizes.version == 1 and loss != "ce":
            raise InvalidValue(f"EAGLE-1 has its own loss (SmoothL1 and cross-entropy), got {loss!r}: leave model.loss")
        if noise < 0:
            raise InvalidValue(f"noise must be at least 0, got {noise}")
        self.steps, self.decay, self.loss_name, self.noise = steps, decay, loss, noise
        self.init_from, self.init_head, self.cached, self.chunk_rows = init_from, init_head, cached, chunk_rows
        self.seed = seed
        self.save_hyperparameters(
            {
                "teacher": dataclasses.asdict(self.teacher_spec),
                "head": dataclasses.asdict(self.sizes),
                "steps": steps,
                "decay": decay,
                "loss": loss,
                "noise": noise,
                "init_from": init_from,
                "init_head": init_head,
                "cached": cached,
                "optim": dataclasses.asdict(self.optim),
                "chunk_rows": chunk_rows,
                "seed": seed,
            }
        )
        self.net: EagleHead | None = None
        self.target: EagleTarget | None = None
        self.val_means, self.test_means = StepMeans(steps), StepMeans(steps)
        self._rows: tuple[Tensor, Tensor] | None = None  # draft ids, and the target head's rows of them
        self._finite = FiniteGuard()
        self._skip = False
        self._labels_seen, self._empty = False, 0
        self._meta: dict[str, Any] = {}

    # --- networks

    def configure_model(self) -> None:
        """Build the head and load the target (once). The draft vocabulary is counted from the trainer's data."""
        if self.net is not None:
            return
        if self.target is None:
            self.use_target((EagleTarget.tables if self.cached else EagleTarget.load)(self.teacher_spec))
        target = self._target()
        if self.init_from is None:
            net = EagleHead(self.sizes.config(target.config))
            if net.config.reduced:
                self._choose_vocabulary(net)
            initialise(net, target, output=self.init_head)
        else:
            net = warm_start(self.init_from, self.sizes, target)
        lend(net, target)
        self.net = net

    def use_target(self, target: EagleTarget) -> None:
        """Set the target to learn from. It stays outside module registration."""
        self.target = target

    def _choose_vocabulary(self, net: EagleHead) -> None:
        """From the data's label counts; without data (an export) the checkpoint brings the tables."""
        data = getattr(self._trainer, "datamodule", None)
        if data is None:
            return
        if not hasattr(data, "label_counts"):
            raise InvalidValue(
                f"{type(data).__name__} cannot count its labels, which a draft vocabulary needs: set "
                "model.head.draft_vocab_size to null"
            )
        config = net.config
        ids, covered = draft_vocabulary(data.label_counts(config.vocab_size), config.draft_vocab_size)
        net.set_draft_vocabulary(ids)
        self._meta["covered"] = covered

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.named_parameters(), self.optim, self.trainer.estimated_stepping_batches)

    # --- losses

    def observe(self, batch: TokenBatch) -> Observed:
        """The target's states of a batch: run, or taken from the batch that brings them."""
        brought = getattr(batch, "observed", None)
        if brought is None:
            return self._target().observe(batch, self._built().config.aux_layers)
        features, last = brought()
        return Observed(features, last, batch.laws())  # type: ignore[attr-defined]  # a StateBatch

    def unroll(self, batch: TokenBatch, statistics: bool) -> Unrolled:
        """Loss of a batch, and the statistics of its rows. Raises InvalidValue for rows too long for the head."""
        net = self._built()
        rows = batch.ids.shape[1] - 1
        if rows + self.steps > net.config.max_positions:
            raise InvalidValue(
                f"texts of {rows + 1} tokens and {self.steps} steps, but the head has {net.config.max_positions} "
                "positions: shorten data.text.length"
            )
        seen = self.observe(batch)
        features = seen.features[:, :-1].to(net.dtype)
        if self.training and self.noise:
            step = 0 if self._trainer is None else self.trainer.global_step
            features = features + state_noise(batch.sample_id, features, self.noise, self.seed, step)
        trained, goals = trained_rows(batch, self.steps).flatten(1), goal_rows(batch, self.steps).flatten(1)
        laws, slot = self._laws(seen, trained, goals)
        inside = torch.ones_like(laws.argmax, dtype=torch.bool) if net.t2d is None else net.t2d[laws.argmax]
        if needs_argmax_inside(self.loss_name):
            trained = trained & inside[slot[goals]]
        if isinstance(laws, TopLaws):
            trained = trained & laws.known[slot[goals]]
        scale = self.decay ** torch.arange(self.steps, device=features.device) / self._counts(trained).clamp_min(1)
        outs = rollout(
            net,
            net.embed(batch.ids),
            net.project(features),
            self.steps,
            batch.positions()[:, :-1] if batch.separate else None,
            batch.visible()[:, :, :-1, :-1] if batch.separate else None,
        )
        where = trained.flatten().nonzero().squeeze(1)  # of all steps at once
        picked = torch.stack(list(outs)).flatten(0, 2)[where]
        at, step, place = goals.flatten()[where], where // trained.shape[1], where % trained.shape[1]
        weight, extra = scale[step], scale.new_zeros(())
        last = None
        if net.config.version == 1:
            assert seen.last is not None  # _laws saw to it
            last = seen.last.flatten(0, 1)[at]
            gaps = F.smooth_l1_loss(picked, last.to(picked.dtype), reduction="none").mean(-1)
            extra = (gaps * weight).sum()
            weight = weight * _CE_SHARE
        head = self._head(net.ready(picked), laws.at(slot[at]), last, weight, statistics)
        return Unrolled(head.total + extra, head.stats, step, place, inside[slot[at]])

    def _head(
        self, hidden: Tensor, laws: DraftLaws | TopLaws, last: Tensor | None, weight: Tensor, statistics: bool
    ) -> HeadLoss:
        net, target = self._built(), self._target()
        if net.config.version == 1:
            assert last is not None
            bias = target.head_bias
            goal: Any = TeacherHead(last, target.head_weight, 1.0, bias)
            matrix, row_loss = target.head_weight, ROW_LOSSES["ce"]
        else:
            goal, matrix, bias = laws, net.lm_head.weight, None
            row_loss = draft_loss(self.loss_name, net.config.reduced or isinstance(laws, TopLaws))
        return chunked_head(
            hidden,
            matrix,
            goal,
            row_loss=row_loss,
            example_weight=weight,
            bias=bias,
            chunk_rows=self.chunk_rows or cached_rows(matrix),
            statistics=statistics,
        )

    def _laws(self, seen: Observed, trained: Tensor, goals: Tensor) -> tuple[DraftLaws | TopLaws, Tensor]:
        """(laws at the N rows of the target that any step needs, int64 [B * T]: which of them a row is).

        Raises InvalidValue for laws of a few tokens where whole ones, or the last states, are needed.
        """
        net, target = self._built(), self._target()
        needed = torch.zeros(seen.features.shape[:2].numel(), dtype=torch.bool, device=seen.features.device)
        needed[0] = True  # of a batch without a label too, so that no table is empty
        needed[goals[trained]] = True
        slot = (needed.cumsum(0) - 1).clamp_min(0)
        if seen.laws is not None:
            if net.config.version == 1 or self.loss_name == "rkl":
                what = "EAGLE-1 learns the last states" if net.config.version == 1 else "rkl needs whole laws"
                raise InvalidValue(f"{what}, and of each law only the likeliest tokens were kept: set states.laws to 0")
            tokens, logp = (x.flatten(0, 1)[needed] for x in seen.laws)
            return TopLaws.of(tokens, logp, net.t2d, net.config.draft_vocab_size), slot
        assert seen.last is not None
        last = seen.last.flatten(0, 1)
        ids, rows = None, None
        if net.d2t is not None:
            if self._rows is None or not torch.equal(self._rows[0], net.draft_ids()):
                self._rows = net.draft_ids(), target.head_weight[net.draft_ids()]
            ids, rows = self._rows
        return draft_laws(last[needed], target.head_weight, target.head_bias, ids, rows), slot

    def _counts(self, trained: Tensor) -> Tensor:
        """float32 [K]: rows of each step on all ranks, divided by the ranks (the strategy averages gradients)."""
        counts = trained.sum(1).float()
        if self._trainer is None:
            return counts
        total: Tensor = cast(Tensor, self.trainer.strategy.reduce(counts, reduce_op="sum"))
        share: Tensor = total / self.trainer.world_size
        return share

    # --- steps

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        out = self.unroll(batch, statistics=False)
        sums = torch.stack([out.total.detach().double(), out.total.new_tensor(len(out.step)).double()])
        total, count = cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum"))
        self._skip = not self._finite(total) or self._skip  # of accumulated batches one bad one spoils the whole step
        self._note_labels(bool(count > 0))
        size = len(batch.ids)
        self.log("train/loss", (total / self.trainer.world_size).float(), prog_bar=True, batch_size=size)
        self.log("train/skipped", float(self._finite.skipped), batch_size=size)
        self.log("train/empty", float(self._empty), batch_size=size)
        loss: Tensor = out.total * spoilt(out.total.detach()) if self._skip else out.total
        return loss

    def _note_labels(self, some: bool) -> None:
        """Raises InvalidValue after ten batches without a label when there never was one."""
        self._labels_seen = self._labels_seen or some
        self._empty += not some
        if not self._labels_seen and self._empty >= self._finite.patience:
            raise InvalidValue(
                f"{self._empty} batches in a row have no label that a head could learn (loss masks are empty): check "
                "data.text.answers_only and the chat template"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._skip:
            for p in self.parameters():
                p.grad = None  # AdamW leaves parameters without a gradient, and their moments, alone
        self._skip = False

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.val_means.update(self.unroll(batch, statistics=True), batch.ids.numel())

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.test_means.update(self.unroll(batch, statistics=True), batch.ids.numel())

    def on_validation_epoch_end(self) -> None:
        self._log_means("val", self.val_means)

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.test_means)

    def _log_means(self, stage: str, means: StepMeans) -> None:
        values = means.compute()
        for name in ("accuracy", "conditional", "alpha"):
            for k, value in enumerate(by_step(values, name)):
                self.log(f"{stage}_step/{name}_{k}", value.float(), sync_dist=True)
        losses = torch.stack(by_step(values, "loss"))
        weight = self.decay ** torch.arange(self.steps, dtype=losses.dtype, device=losses.device)
        loss = (losses * weight).sum() / weight.sum()
        self.log(f"{stage}/loss", loss.float(), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/accuracy", by_step(values, "accuracy")[0].float(), sync_dist=True)
        self.log(f"{stage}/alpha", by_step(values, "alpha")[0].float(), sync_dist=True)
        self.log(f"{stage}/tau_simulated", values["tau_simulated"].float(), prog_bar=True, sync_dist=True)
        means.reset()

    # --- what checkpoints and exports say

    def on_fit_start(self) -> None:
        if getattr(self.trainer.strategy, "stage", 0) == 3:
            raise InvalidValue("an EAGLE head is small and runs many times a step: take zero2, not zero3")
        self._begin()

    def on_validation_start(self) -> None:
        self._begin()

    def on_test_start(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Move the target beside the head, and note once what the data says of itself."""
        self._target().to(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if data is None or "data_fingerprint" in self._meta:
            return
        size = getattr(data, "vocab_size", None)
        rows = self._target().vocab_size
        if size is not None and size > rows:
            raise InvalidValue(f"the tokenizer has {size} ids, the target only {rows} rows: it is of another target")
        self._check_states(data)
        if hasattr(data, "data_fingerprint"):
            self._meta["data_fingerprint"] = data.data_fingerprint()
        directory = getattr(data, "tokenizer_dir", None)
        self._meta["tokenizer_dir"] = None if directory is None else str(directory)

    def _check_states(self, data: Any) -> None:
        """Raises InvalidValue for cached states of another target or other layers, and for batches without them."""
        if not self.cached:
            return
        layers, directory = getattr(data, "aux_layers", None), getattr(data, "target_dir", None)
        if layers is None or directory is None:
            raise InvalidValue(f"model.cached wants data.teacher_states.TeacherStatesModule, got {type(data).__name__}")
        if tuple(layers) != self._built().config.aux_layers:
            raise InvalidValue(
                f"the cached states are those after layers {list(layers)}, the head reads "
                f"{list(self._built().config.aux_layers)}: set data.states.aux_layers and model.head.aux_layers alike"
            )
        if target_fingerprint(Path(directory)) != target_fingerprint(Path(str(self.teacher_spec.path))):
            raise InvalidValue(
                f"the cached states are those of {directory}, model.teacher is {self.teacher_spec.path}: another target"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        values = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k in DEFINITIONS}
        seed = os.environ.get("PL_GLOBAL_SEED")  # where lightning.seed_everything leaves it
        own = {"metrics": values, "seed": None if seed is None else int(seed), "skipped": self._finite.skipped}
        checkpoint[_META] = {**self._meta, **own, "empty": self._empty}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self._meta = {**checkpoint.get(_META, {}), "steps": checkpoint.get("global_step")}
        self._finite.skipped = self._meta.get("skipped", 0)
        self._empty = self._meta.get("empty", 0)

    def export_spec(self) -> ExportSpec:
        """What `draftsmith export` writes. Raises InvalidState before `configure_model`."""
        net, meta = self._built(), self._meta
        metrics = dict(meta.get("metrics", {}))
        if "covered" in meta:
            metrics["vocabulary/covered"] = meta["covered"]
        return ExportSpec(
            kind="eagle",
            model=net,
            tokenizer_dir=meta.get("tokenizer_dir") or self.teacher_spec.path,
            target_dir=self.teacher_spec.path,
            aux_layers=manifest.AuxLayers(net.config.aux_layers, "after"),
            trained={
                "max_length": net.config.max_positions,
                "loss": "eagle1" if net.config.version == 1 else self.loss_name,
                "steps": self.steps,
                "decay": self.decay,
            },
            metrics={k: manifest.Metric(v, DEFINITIONS[k]) for k, v in metrics.items()},
            data_fingerprint=meta.get("data_fingerprint"),
            seed=meta.get("seed"),
            steps=meta.get("steps"),
        )

    def _built(self) -> EagleHead:
        if self.net is None:
            raise InvalidState("the network is not built yet: call configure_model() first (the trainer does)")
        return self.net

    def _target(self) -> EagleTarget:
        if self.target is None:
            raise InvalidState("the target is not loaded yet: call configure_model() first (the trainer does)")
        return self.target


def cached_rows(weight: Tensor) -> int | None:
    """Rows of a chunk of logits that a CPU works on within its caches; None elsewhere: the chunked head chooses.

    At least 256, since every chunk goes over the whole gradient of the head. weight: [V, D].
    """
    if weight.device.type != "cpu" or weight.shape[0] * _CHUNK_ROWS > 2**24:
        return None
    return max(_CHUNK_ROWS, _CHUNK_ELEMENTS // weight.shape[0])
