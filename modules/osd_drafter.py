"""OSD: distils a draft for a target, offline on text (teacher's, its own, or mixed) or online on recorded laws.

Source: "Online Speculative Decoding" (arXiv 2310.07177), section 3 (losses, sample sources) and the online algorithm;
contract 13. What the batch is decides: `TokenBatch` is text to distil on with a live teacher, `OnlineBatch` holds the
laws that serving recorded. In both the body runs on whole contexts and the head on the counted rows alone.

Alignment: the law of the token at index j is predicted by the network's row j - 1, in both cases.
Shape letters: B batch, T time, R records, M marked positions, D width, V vocabulary.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from draftsmith.data.batches import OnlineBatch, TokenBatch
from draftsmith.inference import manifest
from draftsmith.inference.errors import InvalidState, InvalidValue, UnknownKey, unknown_choice
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.hf_model import FrozenTeacher, HFModel, last_hidden, output_head, set_special_ids, special_ids
from draftsmith.modules.losses.chunked_head import HeadLoss, chunked_head
from draftsmith.modules.losses.costs import TokenCosts
from draftsmith.modules.losses.divergence import NEEDS_FULL_SUPPORT, ROW_LOSSES, RowLoss, row_loss
from draftsmith.modules.losses.emo import EMO
from draftsmith.modules.metrics import LawMeans
from draftsmith.modules.optim import FiniteGuard, OptimConfig, lr_factor, parameter_groups, spoilt
from draftsmith.modules.osd_sources import SOURCES, rewrite
from draftsmith.modules.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_META = "draftsmith"  # key of our own entry in a checkpoint
ONLY = "draft"  # the key of a single draft
DEFINITIONS = {
    "val/loss": "mean row loss per label token of the validation text, against the live teacher",
    "val/alpha": "mean sum_v min(p_v, q_v) over the label tokens of the validation text (teacher forced)",
    "val/agree": "share of label tokens at which draft and target have the same most likely token",
    "val/alpha_decode": "acceptance (Rao-Blackwell) of really decoding validation prompts with the served form",
    "val/tau": "tokens per target call, bonus included, of the same decoding",
    "online/alpha_ema": "exponential mean of the acceptance of the requests served online",
}


class OSDDrafter(pl.LightningModule):
    """Trains one draft, or several routed ones, towards a frozen target.

    A step whose loss is not finite on any rank is skipped on all of them, counted, and ten in a row end the run
    (InvalidState). Drafts that a step does not concern keep their weights and moments.
    """

    def __init__(
        self,
        draft: HFModel | None = None,
        drafts: dict[str, HFModel] | None = None,
        teacher: HFModel | None = None,
        loss: str = "forward_kl",
        jsd_beta: float = 0.5,
        forward_kl_steps: int = 0,
        source: str = "teacher",
        student_share: float = 0.5,
        temperature: float = 1.0,
        sample_temperature: float = 1.0,
        prompt_length: int = 32,
        seed: int = 0,
        optim: OptimConfig | None = None,
        gradient_checkpointing: bool = False,
        chunk_rows: int | None = None,
    ) -> None:
        """Plain settings only; networks are built in `configure_model`.

        Args:
            draft: the draft, by path (warm start) or by sizes.
            drafts: several drafts instead, by the keys of the router; for online learning.
            teacher: the target, for text; online learning has its laws in the batches and needs none.
            loss: ce (label fine-tuning), forward_kl, reverse_kl, jsd, fkl_rkl_mix, tvd, or emo (forward KL and a bound
                of the transport cost between the laws, token costs from the target's head).
            jsd_beta: weight of KL(p || m) in jsd.
            forward_kl_steps: optimizer steps with forward_kl before `loss` begins (tvd needs such a warm-up).
            source: who writes the text: teacher (the data as it is), student, mix_request, mix_token. All but
                teacher decode in the training step: about one pass of the writer per token.
            student_share: share of requests or tokens that the student writes in the two mixtures.
            temperature: at which teacher and student are compared on text (recorded laws bring their own).
            sample_temperature: at which student and mixtures write; 0 is greedy.
            prompt_length: of text without a marked answer, so many tokens are taken as the prompt.
            seed: of what is written.
            optim: AdamW and its schedule.
            gradient_checkpointing: recompute activations in backward: about 30% more time, far less memory.
            chunk_rows: positions that go through the head at once; null chooses.
        """
        super().__init__()
        if (draft is None) == (not drafts):
            raise InvalidValue("give exactly one of model.draft and model.drafts (several drafts by router key)")
        specs = {ONLY: draft} if draft is not None else dict(drafts or {})
        self.specs = {key: HFModel.of(spec) for key, spec in specs.items()}
        self.teacher_spec = None if teacher is None else HFModel.of(teacher)
        self.optim = OptimConfig.of(optim or OptimConfig())
        self.row_loss = _check_loss(loss, jsd_beta, forward_kl_steps)
        if source not in SOURCES:
            raise unknown_choice("source", source, SOURCES)
        if not 0 < student_share < 1:
            raise InvalidValue(
                f"student_share must lie strictly between 0 and 1, got {student_share}: else use a source"
            )
        if temperature <= 0:
            raise InvalidValue(f"temperature must be above 0 (laws are compared at it), got {temperature}")
        if sample_temperature < 0 or prompt_length < 1:
            raise InvalidValue(
                f"sample_temperature must be at least 0 and prompt_length at least 1, got {sample_temperature} and "
                f"{prompt_length}"
            )
        for spec in self.specs.values():
            check_vocabulary(spec, self.teacher_spec)
        self.loss_name, self.forward_kl_steps = loss, forward_kl_steps
        self.source, self.student_share = source, student_share
        self.temperature, self.sample_temperature = temperature, sample_temperature
        self.prompt_length, self.seed = prompt_length, seed
        self.gradient_checkpointing, self.chunk_rows = gradient_checkpointing, chunk_rows
        self.save_hyperparameters(
            {
                "draft": None if draft is None else dataclasses.asdict(self.specs[ONLY]),
                "drafts": None if draft is not None else {k: dataclasses.asdict(s) for k, s in self.specs.items()},
                "teacher": None if self.teacher_spec is None else dataclasses.asdict(self.teacher_spec),
                "loss": loss,
                "jsd_beta": jsd_beta,
                "forward_kl_steps": forward_kl_steps,
                "source": source,
                "student_share": student_share,
                "temperature": temperature,
                "sample_temperature": sample_temperature,
                "prompt_length": prompt_length,
                "seed": seed,
                "optim": dataclasses.asdict(self.optim),
                "gradient_checkpointing": gradient_checkpointing,
                "chunk_rows": chunk_rows,
            }
        )
        self.nets = nn.ModuleList()  # one per key of `specs`, in that order
        self.teacher: FrozenTeacher | None = None
        self._emo: EMO | None = None  # made when first needed: the target is there by then, on its device
        self.val_means, self.test_means = LawMeans(), LawMeans()
        self.lr_start = 0  # optimizer step at which the schedule last began
        self._finite = FiniteGuard()
        self._skip = False
        self._active = 0  # the draft of the current step
        self._engines: dict[int, HFEngine] = {}  # by id of a network: adapters over the training networks themselves
        self._meta: dict[str, Any] = {}

    # --- networks

    @property
    def draft_keys(self) -> list[str]:
        return list(self.specs)

    def net(self, index: int) -> "PreTrainedModel":
        """The network of a draft. Raises InvalidState before `configure_model`."""
        if not len(self.nets):
            raise InvalidState("the network is not built yet: call configure_model() first (the trainer does)")
        return self.nets[index]

    def configure_model(self) -> None:
        """Build drafts and teacher (once)."""
        if len(self.nets):
            return
        for spec in self.specs.values():
            net = spec.build_trained()
            if self.gradient_checkpointing:
                net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.nets.append(net)
        if self.teacher_spec is not None and self.teacher is None:
            self.use_teacher(FrozenTeacher.load(self.teacher_spec))

    def use_teacher(self, teacher: FrozenTeacher) -> None:
        """Set the target to learn from. It stays outside module registration."""
        self.teacher = teacher

    def configure_optimizers(self) -> Any:
        """One AdamW; the groups of all drafts, so that a step moves the groups whose gradients exist."""
        config = self.optim
        total = self.trainer.estimated_stepping_batches if config.total_steps is None else config.total_steps
        groups = [group for net in self.nets for group in parameter_groups(net.named_parameters(), config.weight_decay)]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(max(0, step - self.lr_start), config, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def restart_schedule(self) -> None:
        """Begin the learning-rate schedule again from the next step on (a domain switch)."""
        self.lr_start = self.global_step

    # --- losses

    def online_loss(self, batch: OnlineBatch, statistics: bool = True) -> HeadLoss:
        """Loss at the marked positions only: body on the contexts, gather, head on the M rows."""
        if batch.processed and self.loss_name in NEEDS_FULL_SUPPORT:
            raise InvalidValue(
                f"{self.loss_name} is infinite against laws after top-k or top-p: record law 'raw' or take another loss"
            )
        net = self.net(batch.draft)
        batch = batch.within(getattr(net.config, "max_position_embeddings", None))
        hidden = last_hidden(net, batch.contexts)
        weight, bias = output_head(net)
        return chunked_head(
            hidden[batch.row, batch.position - 1],
            weight,
            batch.labels() if self.loss_name == "ce" else batch.law(),
            row_loss=self._row_loss_now(),
            bias=bias,
            chunk_rows=self.chunk_rows,
            statistics=statistics,
        )

    def text_loss(self, batch: TokenBatch, statistics: bool = True) -> HeadLoss:
        """Loss over the label tokens of text, against the live teacher or, with ce, the labels."""
        net = self.net(0)
        apart = batch.separate
        positions, mask = (batch.positions(), batch.visible()) if apart else (None, None)
        labelled = batch.loss_mask[:, 1:].bool()
        if apart:  # a document's first token has no row of its own document before it
            labelled = labelled & (batch.document[:, 1:] == batch.document[:, :-1])
        target: Any = batch.ids[:, 1:].flatten()
        if self.loss_name != "ce" or not self.training:
            teacher = self._teacher()
            seen = teacher.hidden(batch.ids, positions, mask)[:, :-1].flatten(0, 1)
            target = teacher.head(seen, self.temperature)
        weight, bias = output_head(net)
        return chunked_head(
            last_hidden(net, batch.ids, positions, mask)[:, :-1].flatten(0, 1),  # row t predicts token t + 1
            weight,
            target,
            row_loss=self._row_loss_now(),
            example_weight=labelled.flatten(),
            bias=bias,
            chunk_rows=self.chunk_rows,
            statistics=statistics,
        )

    def _row_loss_now(self) -> RowLoss:
        warm = self.training and self.trainer_step < self.forward_kl_steps
        return ROW_LOSSES["forward_kl"] if warm else self.row_loss or self._emo_loss()

    def _emo_loss(self) -> EMO:
        if self._emo is None:
            head = output_head(self._teacher().model)[0]
            sizes = [self.net(i).config.vocab_size for i in range(len(self.nets))]
            common = min(len(head), *sizes)  # the chunked head cuts padded rows, too
            self._emo = EMO(TokenCosts.of(head[:common]))
        return self._emo

    @property
    def trainer_step(self) -> int:
        """Optimizer steps so far; 0 without a trainer."""
        return 0 if self._trainer is None else self.global_step

    def _teacher(self) -> FrozenTeacher:
        if self.teacher is None:
            raise InvalidState("distilling on text needs the target: set model.teacher.path")
        return self.teacher

    def rewrite(self, batch: TokenBatch) -> TokenBatch:
        """The batch with its answers written by `source` (see `osd_sources.rewrite`)."""
        if self.source == "teacher":
            return batch
        net = self.net(0)
        teacher = self._writer(self._teacher().model) if self.source == "mix_token" else None
        writer = self._writer(net)
        net.eval()
        try:
            return rewrite(
                batch,
                self.source,
                student=writer,
                teacher=teacher,
                share=self.student_share,
                prompt_length=self.prompt_length,
                temperature=self.sample_temperature,
                seed=self.seed * 1_000_003 + self.trainer_step,  # another answer at another visit
                stop_ids=_stop_ids(net),
            )
        finally:
            net.train()

    def _writer(self, net: Any) -> HFEngine:
        if id(net) not in self._engines:
            self._engines[id(net)] = HFEngine(net)
        return self._engines[id(net)]

    # --- steps

    def training_step(self, batch: OnlineBatch | TokenBatch, batch_idx: int) -> Tensor:
        if isinstance(batch, OnlineBatch):
            self._active, size = batch.draft, len(batch.lengths)
            out = self.online_loss(batch)
        else:
            if len(self.specs) > 1:
                raise InvalidValue("several drafts learn online only: text does not say whose it is; give model.draft")
            self._active, size = 0, len(batch.ids)
            out = self.text_loss(self.rewrite(batch))
        assert out.stats is not None
        sums = torch.stack([out.total.detach().double(), out.weight.double(), out.stats.alpha.double().sum()])
        total, count, alpha = cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum"))
        count = count.clamp_min(1)
        # gradients may be accumulated: one bad batch spoils the whole step
        self._skip = not self._finite(total) or self._skip
        self.log("train/loss", (total / count).float(), prog_bar=True, batch_size=size)
        if self.loss_name != "ce":
            self.log("train/alpha", (alpha / count).float(), prog_bar=True, batch_size=size)
        self.log("train/skipped", float(self._finite.skipped), batch_size=size)
        # the strategy averages gradients over ranks: this makes the average the gradient of the global mean
        scale: Tensor = self.trainer.world_size / count
        return out.total * (spoilt(scale) if self._skip else scale).float()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for index, net in enumerate(self.nets):
            if (
                self._skip or index != self._active
            ):  # AdamW leaves parameters without a gradient, and their moments, alone
                for p in net.parameters():
                    p.grad = None
        self._skip = False

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        if self.teacher is not None:
            self._measure(batch, self.val_means)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self._measure(batch, self.test_means)

    def _measure(self, batch: TokenBatch, means: LawMeans) -> None:
        stats = self.text_loss(batch).stats
        assert stats is not None
        means.update(stats)

    def on_validation_epoch_end(self) -> None:
        if self.teacher is not None:
            self._log_means("val", self.val_means)

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.test_means)

    def _log_means(self, stage: str, means: LawMeans) -> None:
        for name, value in means.compute().items():
            if name != "entropy":
                self.log(f"{stage}/{name}", value.float(), prog_bar=name == "alpha", sync_dist=True)
        means.reset()

    # --- what checkpoints and exports say

    def on_fit_start(self) -> None:
        self._begin()

    def on_validation_start(self) -> None:
        self._begin()

    def on_test_start(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Move the teacher beside the drafts, and note once what the data says of itself."""
        if self.teacher is not None:
            self.teacher.to(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if data is None or "tokenizer_dir" in self._meta:
            return
        if hasattr(data, "data_fingerprint"):
            self._meta["data_fingerprint"] = data.data_fingerprint()
        directory, target = getattr(data, "tokenizer_dir", None), getattr(data, "target_dir", None)
        self._meta["tokenizer_dir"] = None if directory is None else str(directory)
        self._meta["target_dir"] = str(target) if target else self.teacher_spec and self.teacher_spec.path
        if directory is not None:
            self._meta["special_ids"] = special_ids(directory)
            self._set_special_ids()

    def _set_special_ids(self) -> None:
        """Networks made from sizes know only their family's special tokens: give them the tokenizer's."""
        for net, spec in zip(self.nets, self.specs.values(), strict=False):  # no nets before configure_model
            if spec.arch is not None:
                set_special_ids(net, self._meta.get("special_ids", {}))

    def note(self, **values: Any) -> None:
        """Keep plain values that an export should state (the router, the tags of the drafts, running acceptance)."""
        self._meta.update(values)

    @property
    def router(self) -> dict[str, Any] | None:
        """State of the router that served the drafts, as noted; None before they were served."""
        state: dict[str, Any] | None = self._meta.get("router")
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        values = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k in DEFINITIONS}
        seed = os.environ.get("PL_GLOBAL_SEED")  # where lightning.seed_everything leaves it
        own = {"metrics": values, "seed": None if seed is None else int(seed), "lr_start": self.lr_start}
        checkpoint[_META] = {**self._meta, **own, "skipped": self._finite.skipped}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self._meta = {**checkpoint.get(_META, {}), "steps": checkpoint.get("global_step")}
        self.lr_start = self._meta.get("lr_start", 0)
        self._finite.skipped = self._meta.get("skipped", 0)
        self._set_special_ids()

    def export_spec(self, draft: str | None = None) -> ExportSpec:
        """What `draftsmith export` writes of a draft; its key may be left out when there is one draft.

        Raises UnknownKey for another key, InvalidState before `configure_model`.
        """
        keys = self.draft_keys
        if draft is None and len(keys) > 1:
            raise UnknownKey(f"which draft? This run has {', '.join(keys)}: each is exported to a folder of its own")
        key = keys[0] if draft is None else draft
        if key not in keys:
            raise UnknownKey(f"no draft {key!r} in this run: known are {', '.join(keys)}")
        net, meta = self.net(keys.index(key)), self._meta
        metrics = dict(meta.get("metrics", {}))
        running = meta.get("alpha_ema", {}).get(key)
        if running is not None:
            metrics["online/alpha_ema"] = running
        trained = {"max_length": getattr(net.config, "max_position_embeddings", None), "loss": self.loss_name}
        if len(keys) > 1:
            trained["tag"] = key
        if "positions" in meta:
            trained["positions"] = meta["positions"]
        else:
            trained["source"] = self.source
        return ExportSpec(
            kind="drafter",
            model=net,
            tokenizer_dir=meta.get("tokenizer_dir") or self.specs[key].path,
            target_dir=meta.get("target_dir") or (self.teacher_spec.path if self.teacher_spec else None),
            trained=trained,
            metrics={k: manifest.Metric(v, DEFINITIONS[k]) for k, v in metrics.items()},
            data_fingerprint=meta.get("data_fingerprint"),
            seed=meta.get("seed"),
            steps=meta.get("steps"),
        )


def _check_loss(name: str, jsd_beta: float, forward_kl_steps: int) -> RowLoss | None:
    """The row loss of that name; None for emo, whose costs need the target."""
    if name not in (*ROW_LOSSES, "emo"):
        raise unknown_choice("loss", name, (*ROW_LOSSES, "emo"))
    found = None if name == "emo" else row_loss(name, jsd_beta)
    if forward_kl_steps < 0:
        raise InvalidValue(f"forward_kl_steps must be at least 0, got {forward_kl_steps}")
    if name == "ce" and forward_kl_steps:
        raise InvalidValue("ce learns from labels and needs no forward-KL warm-up: set forward_kl_steps to 0")
    return found


def _stop_ids(net: "PreTrainedModel") -> Sequence[int]:
    found = net.config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)
