"""Runs of one tiny config under ZeRO on CPU ranks, for the tests of strategies, checkpoints and scale."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from draftsmith.trainers.strategies import full_size
from tests.tiny_run import finish, start


def zero(place: Path, stage: int, ranks: int, batch: int) -> list[str]:
    """Arguments for a ZeRO stage on so many ranks, `batch` rows over all of them.

    Nothing is too small to be sharded: by default ZeRO-3 keeps every parameter of a tiny network whole.
    """
    settings: dict[str, Any] = {"stage": stage}
    if stage == 3:
        settings["stage3_param_persistence_threshold"] = 0
    (place / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": settings}))
    config = place / f"zero{stage}.yaml"
    strategy = {"class_path": "draftsmith.trainers.strategies.ZeRO", "init_args": {"config": f"zero{stage}.json"}}
    config.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    return ["-c", str(config), *ranks_of(ranks, batch)]


def ranks_of(ranks: int, batch: int) -> list[str]:
    return ["--trainer.devices", str(ranks), "--data.text.batch_size", str(batch // ranks)]


def fit(place: Path, run: str, *arguments: str, code: int = 0) -> tuple[str, str]:
    """`draftsmith fit` of the tiny config in `place` to its end; (stdout, stderr)."""
    return finish(start(place, "fit", "-c", "tiny.yaml", *arguments, "--run", run), code)


def watch(place: Path, name: str, beside: Sequence[dict[str, Any]] = (), **init: Any) -> list[str]:
    """Arguments that record losses and samples of every step into `name`.jsonl (`rows` reads it).

    `beside`: the config's own callbacks, which an overlay would replace.
    """
    callback = {"class_path": "tests.zero_runs.Watch", "init_args": {"path": str(place / f"{name}.jsonl"), **init}}
    overlay = place / f"{name}-watch.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [*beside, callback]}}))
    return ["-c", str(overlay)]


def rows(place: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]


def curve(place: Path, name: str) -> list[float]:
    """train/loss by step."""
    found = {row["step"]: row["loss"] for row in rows(place, name) if row["rank"] == 0}
    return [found[step] for step in sorted(found)]


def samples(place: Path, name: str) -> dict[int, list[int]]:
    """Sample ids of each step over all ranks, sorted."""
    found: dict[int, list[int]] = {}
    for row in rows(place, name):
        found.setdefault(row["step"], []).extend(row["samples"])
    return {step: sorted(ids) for step, ids in found.items()}


class Watch(pl.Callback):
    """One line per rank and step. The loss of `bad_step` is made infinite on rank 0; after `stop_at` the run ends."""

    def __init__(self, path: str, bad_step: int | None = None, stop_at: int | None = None) -> None:
        self.path, self.bad_step, self.stop_at = Path(path), bad_step, stop_at
        self.step = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        if self.bad_step is None or self.step != self.bad_step or trainer.global_rank != 0:
            return
        whole = module.loss

        def broken(*args: Any, **kwargs: Any) -> Any:
            module.loss = whole
            out = whole(*args, **kwargs)
            return type(out)(out.total * float("inf"), out.weight, out.stats)

        module.loss = broken

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        line = {
            "step": self.step,
            "rank": trainer.global_rank,
            "loss": float(trainer.callback_metrics["train/loss"]),
            "skipped": float(trainer.callback_metrics["train/skipped"]),
            "samples": batch.sample_id.tolist() if hasattr(batch, "sample_id") else [],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.stop_at is not None and trainer.global_step >= self.stop_at:
            trainer.should_stop = True


class StateBytes(pl.Callback):
    """Writes the bytes of parameters, gradients and optimizer state that this rank holds, from the engine's tensors."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        optimizer: Any = trainer.optimizers[0]
        parts = {
            "parameters": [t for p in module.parameters() for t in (p.data, p.ds_tensor)],
            "masters": list(optimizer.fp32_partitioned_groups_flat),
            "gradients": [optimizer.grad_partitions_flat_buffer],
            "optimizer": [t for state in optimizer.optimizer.state.values() for t in state.values()],
        }
        seen: set[int] = set()
        sizes: dict[str, int] = {"elements": sum(p.ds_numel for p in module.parameters())}
        for name, tensors in parts.items():
            sizes[name] = 0
            for tensor in tensors:
                storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
                if storage is not None and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    sizes[name] += storage.nbytes()
        self.path.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(sizes))


class Births(pl.Callback):
    """Writes how many elements of its networks this rank holds right after they were built, and how many there are."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        build = module.configure_model

        def observed() -> None:
            build()
            found = {"trained": module}
            if getattr(module, "teacher", None) is not None:
                found["teacher"] = module.teacher.model
            counts = {
                name: [sum(p.numel() for p in net.parameters()), sum(full_size(p) for p in net.parameters())]
                for name, net in found.items()
            }
            self.path.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(counts))
            module.configure_model = build

        module.configure_model = observed
