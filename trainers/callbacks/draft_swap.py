"""The gate between the draft that learns and its served copy (contract 13).

After every update the new weights are compared with the served ones on recent held-out records, pairwise: per record
d = alpha(new) - alpha(served), both from the stored laws. Unless the confidence interval of mean(d) lies wholly below
zero, the new weights serve from the next request on. Otherwise they are rolled back, the draft's moments are forgotten,
and the rollback is counted. All ranks see the same sums and so decide alike.

After each decision training weights and served weights are equal, so a checkpoint needs no second copy of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from draftsmith.data.batches import OnlineBatch
from draftsmith.data.online_data import OnlineDataModule
from draftsmith.data.online_stream import OnlineStream
from draftsmith.data.served_log import NAME, Served, append, cut
from draftsmith.inference.couplings import Side, shared_vocabulary, tokenizer_identity
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.laws import Record, TeacherLaw
from draftsmith.inference.served_draft import ServedDraft, engine_of, network_of
from draftsmith.modules.hf_model import HFModel, head_rows
from draftsmith.modules.losses.divergence import aligned, overlap
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.modules.vocabulary import check_vocabulary
from draftsmith.trainers.strategies import gathered, roll_back

HISTOGRAM_EVERY = 20  # updates between two histograms of accepted lengths


@dataclass(frozen=True)
class Verdict:
    """The gate's comparison of a new draft with the served one."""

    records: int  # over all ranks
    mean: float  # of alpha(new) - alpha(served); NaN without records
    low: float
    high: float
    swap: bool
    tested: bool  # False: too few records to tell, so the new draft was let through


def judge(count: float, total: float, squares: float, *, min_records: int, z: float) -> Verdict:
    """The verdict from n, sum d and sum d^2 of the paired differences."""
    n = round(count)
    if n < max(2, min_records):
        return Verdict(n, total / n if n else math.nan, -math.inf, math.inf, swap=True, tested=False)
    mean = total / n
    error = math.sqrt(max(0.0, squares / n - mean * mean) * n / (n - 1) / n)
    low, high = mean - z * error, mean + z * error
    # written so that NaN (a draft that diverged) is worse
    return Verdict(n, mean, low, high, swap=high >= 0.0, tested=True)


@torch.no_grad()
def held_out_alpha(engine: Engine, records: Sequence[Record]) -> Tensor:
    """Mean sum min(p, q) over each record's positions, from the stored laws: float64 [R].

    With a tail these are upper bounds of the true values; the gate compares two drafts by them, on the same positions.
    """
    if not records:
        return torch.zeros(0, dtype=torch.float64)
    ids = torch.zeros(len(records), max(len(r.ids) for r in records), dtype=torch.int64)
    for row, record in enumerate(records):
        ids[row, : len(record.ids)] = record.ids
    counts = torch.tensor([len(r.positions) for r in records])
    rows = torch.arange(len(records)).repeat_interleave(counts)
    hidden, _ = engine.forward(ids.to(engine.device))
    at = torch.cat([r.positions for r in records]) - 1  # the row that predicts the position
    logits = engine.head(hidden[rows.to(engine.device), at.to(engine.device)])
    law = TeacherLaw.cat([r.law for r in records]).to(engine.device)
    alpha = overlap(*aligned(logits, law)).double().cpu()
    return torch.zeros(len(records), dtype=torch.float64).index_add(0, rows, alpha) / counts


@dataclass
class _Running:
    """Exponential mean of the acceptance of served requests, and its highest value since the schedule began."""

    mean: float = math.nan
    peak: float = -math.inf

    def add(self, alpha: float, requests: int, decay: float) -> None:
        kept = 0.0 if math.isnan(self.mean) else decay**requests
        self.mean = alpha if kept == 0.0 else kept * self.mean + (1.0 - kept) * alpha
        self.peak = max(self.peak, self.mean)


class DraftSwap(Callback):
    """Binds the stream's engines, gates every new draft into its served copy, and logs what serving measured.

    Without it an `OnlineDataModule` does not run. Writes `served.jsonl` (raw rounds, no text) into the run folder.
    """

    def __init__(
        self,
        gate: bool = True,
        min_records: int = 4,
        z: float = 1.96,
        ema_requests: int = 50,
        restart_drop: float | None = None,
    ) -> None:
        """Args:
        gate: False lets every new draft serve. The gate needs held-out records: data.buffer.holdout above 0.
        min_records: with fewer held-out records a new draft is let through untested.
        z: half-width of the interval in standard errors; 1.96 is 95%.
        ema_requests: how many requests the exponential mean of acceptance reaches back.
        restart_drop: begin the learning-rate schedule again when that mean falls so far below its peak (0.15 is
            usual: a domain switch); null: never.
        """
        if min_records < 2 or z <= 0 or ema_requests < 1:
            raise InvalidValue(
                f"DraftSwap wants min_records >= 2, z > 0 and ema_requests >= 1, got {min_records}, {z}, {ema_requests}"
            )
        if restart_drop is not None and not 0 < restart_drop < 1:
            raise InvalidValue(f"restart_drop must lie between 0 and 1 (0.15 is usual), got {restart_drop}")
        self.gate, self.min_records, self.z = gate, min_records, z
        self.decay, self.restart_drop = math.exp(-1.0 / ema_requests), restart_drop
        self.counts = {"swaps": 0, "rollbacks": 0, "untested": 0, "restarts": 0}
        self.running: dict[str, _Running] = {}  # by draft key
        self.drafts: list[ServedDraft] = []
        self._learning: set[int] = set()  # drafts in the middle of an update: they differ from what serves
        self._loaded: dict[str, Any] | None = None
        self._log_path: Path | None = None
        self._accepted: list[int] = []

    # --- set-up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the parts fit. Raises InvalidType or InvalidValue otherwise."""
        data = _data(trainer)
        if not isinstance(pl_module, OSDDrafter):
            raise InvalidType(f"DraftSwap trains an OSDDrafter, got {type(pl_module).__name__}")
        if trainer.accumulate_grad_batches != 1:
            raise InvalidValue("online updates are single steps: set trainer.accumulate_grad_batches to 1")
        keys = list(data.router_config.drafts)
        if len(pl_module.draft_keys) > 1 and keys != pl_module.draft_keys:
            raise InvalidValue(
                f"data.router.drafts are {', '.join(keys) or 'empty'} and model.drafts are "
                f"{', '.join(pl_module.draft_keys)}: give the same keys in the same order"
            )
        if len(pl_module.draft_keys) == 1 and len(keys) > 1:
            raise InvalidValue(f"data.router.drafts names {len(keys)} drafts, but there is one: give model.drafts")
        if self.gate and data.buffer.holdout == 0:
            raise InvalidValue(
                "the gate needs held-out records: set data.buffer.holdout (0.1 is usual) or gate to false"
            )
        for spec in pl_module.specs.values():  # before anything is built
            check_vocabulary(spec, HFModel(path=data.target_dir))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make served copies of the weights as they are now (a checkpoint is loaded by then), and bind the stream."""
        data, module = _data(trainer), cast(OSDDrafter, pl_module)
        stream = _stream(trainer)
        vocab = min(_vocabulary(data, module, i) for i in range(len(module.nets)))
        self.drafts = []
        for net in module.nets:
            with gathered(trainer, net):
                self.drafts.append(ServedDraft(lambda net=net: engine_of(net)))  # type: ignore[misc]  # the default binds the loop variable
        state, self._loaded = self._loaded, None
        if state is not None:
            for draft, version in zip(self.drafts, state["versions"], strict=True):
                draft.version = version
            for index, weights in state["served"].items():  # a checkpoint from the middle of an update
                self.drafts[int(index)].prepare(weights)
                self.drafts[int(index)].swap()
                self.drafts[int(index)].version -= 1
                self._learning.add(int(index))
        reduce = None
        if trainer.world_size > 1:
            reduce = _summing(trainer, module.device)
        stream.bind(data.target.part, self.drafts, reduce=reduce, vocab_size=vocab)
        rank = trainer.global_rank
        name = NAME if rank == 0 else NAME.replace(".", f"-rank-{rank}.")
        self._log_path = Path(trainer.default_root_dir) / name
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        cut(self._log_path, before=stream.served)
        module.note(positions=data.recorder.positions)
        if stream.router is not None:
            module.note(router=stream.router.state_dict())

    # --- after each step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: OnlineBatch, batch_idx: int
    ) -> None:
        module, stream = cast(OSDDrafter, pl_module), _stream(trainer)
        values = self._take_log(trainer, module, stream)
        if batch.step < batch.steps - 1:
            self._learning.add(batch.draft)
        else:
            self._learning.discard(batch.draft)
            verdict = self.decide(trainer, module, stream, batch.draft)
            if verdict.tested:
                values |= {"gate/diff": verdict.mean, "gate/low": verdict.low, "gate/high": verdict.high}
            values |= {f"online/{name}": float(n) for name, n in self.counts.items()}
            values |= {f"buffer/{name}": float(n) for name, n in stream.counters().items()}  # of all ranks
            values |= {"online/served": float(stream.served), "online/updates": float(stream.updates)}
        module.log_dict(values, batch_size=1)

    def decide(self, trainer: pl.Trainer, module: OSDDrafter, stream: OnlineStream, index: int) -> Verdict:
        """Swap the new weights of a draft in, or roll them back."""
        net, served = module.net(index), self.drafts[index]
        with gathered(trainer, net):
            candidate = served.prepare(net.state_dict())
        verdict = Verdict(0, math.nan, -math.inf, math.inf, swap=True, tested=False)
        if self.gate:
            records = list(stream.buffers[index].heldout)
            d = held_out_alpha(candidate, records) - held_out_alpha(served.active, records)
            sums = torch.stack([torch.tensor(float(len(d)), dtype=torch.float64), d.sum(), d.square().sum()])
            n, total, squares = stream.reduce(sums).tolist()
            verdict = judge(n, total, squares, min_records=self.min_records, z=self.z)
            self.counts["untested"] += not verdict.tested
        if verdict.swap:
            served.swap()
            self.counts["swaps"] += 1
        else:
            roll_back(trainer, net, network_of(served.active).state_dict())
            self.counts["rollbacks"] += 1
        return verdict

    # --- what serving measured

    def _take_log(self, trainer: pl.Trainer, module: OSDDrafter, stream: OnlineStream) -> dict[str, float]:
        """Write the served requests out, and turn them into scalars (the same on all ranks)."""
        entries = list(stream.log)
        stream.log.clear()
        assert self._log_path is not None
        append(self._log_path, entries)
        sums: dict[str, dict[str, list[float]]] = {"draft": {}, "tag": {}}
        for entry in entries:
            for kind, key in (("draft", module.draft_keys[entry.draft]), ("tag", entry.tag)):
                _add(sums[kind], key, _sums(entry))
        sums = _merge(_gather(sums, trainer.world_size))
        total = [sum(column) for column in zip(*sums["draft"].values(), strict=True)]
        values: dict[str, float] = {}
        if total and total[1]:
            values["online/alpha"] = total[0] / total[1]
            values |= {
                f"online/alpha/{tag}": beta / seen for tag, (beta, seen, *_) in sums["tag"].items() if tag and seen
            }
        if total and total[4]:
            values["online/tau"] = total[3] / total[4]
        for key, (beta, seen, requests, *_) in sums["draft"].items():
            if seen:
                self.running.setdefault(key, _Running()).add(beta / seen, int(requests), self.decay)
        if self.running:
            means = {key: running.mean for key, running in self.running.items()}
            values["online/alpha_ema"] = sum(means.values()) / len(means)
            if len(means) > 1:
                values |= {f"online/alpha_ema/{key}": mean for key, mean in means.items()}
            module.note(alpha_ema=means)
            self._maybe_restart(module)
        self._histogram(trainer, entries, stream.updates)
        return values

    def _maybe_restart(self, module: OSDDrafter) -> None:
        if self.restart_drop is None:
            return
        fallen = [r for r in self.running.values() if r.peak - r.mean > self.restart_drop]
        if fallen:
            module.restart_schedule()
            self.counts["restarts"] += 1
            for running in fallen:
                running.peak = running.mean

    def _histogram(self, trainer: pl.Trainer, entries: Sequence[Served], updates: int) -> None:
        self._accepted += [k for e in entries for n, k in zip(e.rounds.drafted, e.rounds.accepted, strict=True) if n]
        board: Any = getattr(trainer.logger, "experiment", None)
        if updates % HISTOGRAM_EVERY or not self._accepted or not hasattr(board, "add_histogram"):
            return
        board.add_histogram("online/accepted_length", torch.tensor(self._accepted), trainer.global_step)
        self._accepted = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was served last may have left nothing to learn from: it is logged all the same."""
        pl_module.log_dict(self._take_log(trainer, cast(OSDDrafter, pl_module), _stream(trainer)))

    # --- state

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "running": {key: [r.mean, r.peak] for key, r in self.running.items()},
            "versions": [draft.version for draft in self.drafts],
            "served": {str(i): dict(network_of(self.drafts[i].active).state_dict()) for i in sorted(self._learning)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = dict(state_dict["counts"])
        self.running = {key: _Running(*values) for key, values in state_dict["running"].items()}
        self._loaded = state_dict


def _data(trainer: pl.Trainer) -> OnlineDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, OnlineDataModule):
        raise InvalidType(f"DraftSwap serves the requests of an OnlineDataModule, got {type(data).__name__}")
    return data


def _stream(trainer: pl.Trainer) -> OnlineStream:
    stream = _data(trainer).stream
    assert stream is not None
    return stream


def _vocabulary(data: OnlineDataModule, module: OSDDrafter, index: int) -> int:
    """Ids that target and draft share. Raises InvalidValue when an id means two tokens."""
    spec, net = module.specs[module.draft_keys[index]], module.net(index)
    rows = head_rows(net)
    directory = Path(spec.path) if spec.path is not None else None
    tokenizer = tokenizer_identity(directory) if directory is not None and directory.is_dir() else None
    if tokenizer is None:  # made from sizes: it learns the target's tokenizer
        tokenizer = data.target.identity
    return shared_vocabulary(data.target.side, Side(directory or Path("model.draft"), None, rows, tokenizer))


def _summing(trainer: pl.Trainer, device: torch.device) -> Callable[[Tensor], Tensor]:
    def reduce(x: Tensor) -> Tensor:
        total = cast(Tensor, trainer.strategy.reduce(x.clone().to(device), reduce_op="sum"))
        return total.cpu()

    return reduce


def _sums(entry: Served) -> list[float]:
    """Sum of betas, examined, requests, committed, target calls."""
    beta = entry.alpha * entry.examined if entry.examined else 0.0
    return [beta, float(entry.examined), 1.0, float(sum(entry.rounds.committed)), float(len(entry.rounds))]


def _add(sums: dict[str, list[float]], key: str, values: Sequence[float]) -> None:
    sums[key] = [a + b for a, b in zip(sums.get(key, [0.0] * len(values)), values, strict=True)]


def _merge(ranks: Sequence[Mapping[str, Mapping[str, list[float]]]]) -> dict[str, dict[str, list[float]]]:
    merged: dict[str, dict[str, list[float]]] = {"draft": {}, "tag": {}}
    for rank in ranks:
        for kind, table in rank.items():
            for key, values in table.items():
                _add(merged[kind], key, values)
    return merged


def _gather(own: Any, world_size: int) -> list[Any]:
    """Every rank's, in order of rank (a collective call where there are several)."""
    if world_size == 1:
        return [own]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, own)
    return gathered
