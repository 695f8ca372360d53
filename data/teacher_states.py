"""Hidden states of a target on disk: what an EAGLE head learns from, read once and trained on for many epochs.

A cache belongs to one data set, tokenizer, sample length, target and set of layers; all of them are in its key, so
states of another data set are never taken by mistake. It is planned before it is made (gigabytes, quota, free disk), is
written in shards that a killed process goes on from, and is measured: the error of quantising, and a sample compared
with a plain forward pass.

Shape letters: B batch, T time, S samples of a shard, n states of a token (layers read, and the last one), D width of
the target.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.data.batches import PADDING, TokenBatch
from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.state_formats import (
    FORMATS,
    StateBatch,
    decode,
    encode,
    law_errors,
    law_gap,
    state_errors,
    top_laws,
)
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.data.token_store import PackedTokens
from draftsmith.inference.checkpoint import sha256
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.nets.eagle_head import default_aux_layers
from draftsmith.inference.nets.masks import additive

_VERSION = 1
_SHARD_BYTES = 2**28
_BATCH = 8  # samples of one pass of the target
_SAMPLE = 4  # samples that are compared with a plain pass
_INDEX = "states.json"


@dataclass(frozen=True)
class StatesConfig:
    """Which states, and where they are kept."""

    target: str = "exports/target"  # directory of the target
    aux_layers: tuple[int, ...] | None = None  # null: what an EAGLE-3 head reads by default (EAGLE-1: the last layer)
    format: str = "int8"  # one scale a state; bfloat16 takes twice the disk
    laws: int = 0  # k: of each law the k likeliest tokens are kept; 0: the last state, from which training has the law
    max_gb: float = 50.0  # a larger cache is refused before anything is written
    cache_dir: str = ""  # empty: beside the prepared text
    dtype: str = "auto"  # that the target computes in
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise unknown_choice("states.format", self.format, FORMATS)
        if self.laws < 0:
            raise InvalidValue(f"states.laws must be at least 0 (the last state is kept instead), got {self.laws}")
        if self.max_gb <= 0:
            raise InvalidValue(f"states.max_gb must be above 0, got {self.max_gb}")


@dataclass(frozen=True)
class Plan:
    """What a cache will take."""

    samples: int
    length: int  # T
    states: int  # n
    width: int  # D
    format: str
    laws: int = 0  # k

    @property
    def sample_bytes(self) -> int:
        item = 1 if self.format == "int8" else 2
        return self.length * (self.states * (self.width * item + 4) + self.laws * 6)

    @property
    def gigabytes(self) -> float:
        return self.samples * self.sample_bytes / 1e9

    @property
    def shard(self) -> int:
        """S"""
        return max(1, _SHARD_BYTES // self.sample_bytes)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard)

    def __str__(self) -> str:
        laws = f" and {self.laws} tokens of each law" if self.laws else ""
        return (
            f"{self.samples} samples of {self.length} tokens, {self.states} states of width {self.width} in "
            f"{self.format}{laws}: {self.gigabytes:.3g} GB in {self.shards} shards"
        )

    def check(self, place: Path, max_gb: float, written: float = 0.0) -> None:
        """Raises InvalidValue when it exceeds the quota or the disk. written: GB that are there already."""
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free / 1e9
        advice = "take fewer or shorter texts, format int8, or another states.cache_dir"
        if self.gigabytes > max_gb:
            raise InvalidValue(f"{self}, more than states.max_gb ({max_gb:g}): raise it, or {advice}")
        if self.gigabytes - written > free:
            raise InvalidValue(f"{self}, but {there} has {free:.1f} GB left: {advice}")


def state_layers(engine: Engine, aux_layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers that are kept: those read, and the last one. Raises InvalidValue for one that is not there."""
    read = tuple(aux_layers or default_aux_layers(engine.spec.num_layers))
    wrong = [i for i in read if not 0 <= i <= engine.spec.num_layers]
    if wrong:
        raise InvalidValue(f"states.aux_layers names layer {wrong[0]}, the target has {engine.spec.num_layers}")
    return (*read, engine.spec.num_layers)


def plain_states(engine: Engine, batch: TokenBatch, layers: Sequence[int]) -> Tensor:
    """[B, T, n, D] on the CPU, by one pass without a cache; documents apart where the batch keeps them so."""
    positions = mask = None
    if batch.separate:
        positions, mask = (
            batch.positions().to(engine.device),
            additive(~batch.visible(), engine.dtype).to(engine.device),
        )
    _, states = engine.forward(batch.ids.to(engine.device), positions=positions, mask=mask, aux_layers=layers)
    return torch.stack([x.cpu() for x in states], 2)


def write_states(
    directory: Path,
    packed: PackedTokens,
    engine: Engine,
    layers: Sequence[int],
    config: StatesConfig,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, Any]:
    """Write the shards of one split that are still missing; the measured errors of the first batch.

    Of several ranks each writes every `ranks`-th shard; the last step, `seal_states`, is for one.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    plan = plan_of(len(packed), packed.length, layers, engine, config)
    for number in range(rank, plan.shards, ranks):
        path = directory / f"{number:05d}.safetensors"
        if _whole(path):
            continue
        parts = []
        first, end = number * plan.shard, min((number + 1) * plan.shard, plan.samples)
        for start in range(first, end, _BATCH):
            batch = packed.fetch(range(start, min(start + _BATCH, end)))
            parts.append(_stored(engine, plain_states(engine, batch, layers), config))
        temporary = path.with_suffix(".tmp")
        save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        note = {"sha256": sha256(path), "bytes": path.stat().st_size, "samples": end - first}
        _write_json(path.with_suffix(".json"), note)
    states = plain_states(engine, packed.fetch(range(min(_BATCH, len(packed)))), layers)
    errors = law_errors(engine, states[:, :, -1], config.format, config.laws)
    return {"relative_rms": state_errors(_kept(states, config.laws), config.format), **errors}


def plan_of(samples: int, length: int, layers: Sequence[int], engine: Engine, config: StatesConfig) -> Plan:
    """The plan for so many samples. layers: with the last one, whose states are not kept beside laws."""
    kept = len(layers) - bool(config.laws)
    return Plan(samples, length, kept, engine.spec.hidden_size, config.format, config.laws)


def _kept(states: Tensor, laws: int) -> Tensor:
    """[B, T, n, D]: without the last state where laws are kept instead."""
    return states[:, :, :-1] if laws else states


def _stored(engine: Engine, states: Tensor, config: StatesConfig) -> dict[str, Tensor]:
    """What a shard holds of states [B, T, n, D], by the names in the file."""
    integers, scale = encode(_kept(states, config.laws), config.format)
    if not config.laws:
        return {"states": integers, "scale": scale}
    ids, logp = top_laws(engine, states[:, :, -1], config.laws)
    return {"states": integers, "scale": scale, "law_ids": ids, "law_logp": logp}


def verify(directory: Path, packed: PackedTokens, engine: Engine, layers: Sequence[int]) -> float:
    """Compare samples with plain passes of one sample each; the largest difference in steps of the stored numbers.

    Raises InvalidState when the stored states are not those of this target and text.
    """
    reader, count = StateReader(directory), len(packed)
    worst = 0.0
    for index in sorted({round(i * (count - 1) / max(1, _SAMPLE - 1)) for i in range(min(_SAMPLE, count))}):
        batch = packed.fetch([index])
        real = batch.document[0] != PADDING
        whole = plain_states(engine, batch, layers)[0][real]
        kept = {name: x[real] for name, x in reader.sample(index).items()}
        stored, scale = kept["states"], kept["scale"]
        plain = whole[:, : stored.shape[1]].float()
        if "law_ids" in kept:
            worst = max(worst, law_gap(engine, whole[:, -1], kept["law_ids"], kept["law_logp"]))
        found = decode(stored, scale)
        if stored.dtype == torch.int8:
            step = scale.view(torch.float32).unsqueeze(-1)
        else:
            step = plain.abs() * 2.0**-7 + 1e-6
        worst = max(worst, float(((found - plain).abs() / step).max()))
    if not worst <= 1.0:  # rounding alone is half a step; batches of another size add a little
        raise InvalidState(
            f"the states in {directory} differ from a plain pass of the target by {worst:.3g} steps of their format: "
            "they are of another target or text, delete the directory"
        )
    return worst


def seal_states(directory: Path, plan: Plan, key: str, layers: Sequence[int], errors: dict[str, Any]) -> None:
    """Write the index of a split whose shards are all there. Raises InvalidState when one is missing."""
    shards = {}
    for number in range(plan.shards):
        path = directory / f"{number:05d}.safetensors"
        if not _whole(path):
            raise InvalidState(f"{path} is missing or not whole: run the same command again")
        shards[path.name] = json.loads(path.with_suffix(".json").read_text("utf-8"))
    index = {"version": _VERSION, "key": key, "layers": list(layers), "shard": plan.shard, "errors": errors}
    _write_json(directory / _INDEX, {**index, **asdict(plan), "shards": shards})


def _whole(path: Path) -> bool:
    """Whether a shard and its note are there and agree in size."""
    note = path.with_suffix(".json")
    if not (path.is_file() and note.is_file()):
        return False
    return bool(json.loads(note.read_text("utf-8"))["bytes"] == path.stat().st_size)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)


class StateReader:
    """One split of a cache, opened for reading; pickles as its path."""

    def __init__(self, directory: Path, *, hashes: bool = False) -> None:
        """hashes: compare every shard's sha256. Raises InvalidState for a cache that is missing, torn or damaged."""
        self.directory = directory
        try:
            self.index: dict[str, Any] = json.loads((directory / _INDEX).read_text("utf-8"))
            if self.index["version"] != _VERSION:
                raise ValueError(f"version {self.index['version']}, this program reads {_VERSION}")
            for name, note in self.index["shards"].items():
                path = directory / name
                if path.stat().st_size != note["bytes"] or (hashes and sha256(path) != note["sha256"]):
                    raise ValueError(f"{name} is not what was written")
        except (OSError, ValueError, KeyError) as e:
            raise InvalidState(f"damaged state cache {str(directory)!r} ({e}): delete it, it is made again") from e
        self._open: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type["StateReader"], tuple[Path]]:
        return StateReader, (self.directory,)

    def sample(self, index: int) -> dict[str, Tensor]:
        """Of one sample: states [T, n, D], scale int32 [T, n]; beside kept laws law_ids int32, law_logp half [T, k]."""
        from safetensors import safe_open

        number, row = divmod(index, self.index["shard"])
        name = f"{number:05d}.safetensors"
        if name not in self._open:
            self._open[name] = safe_open(str(self.directory / name), framework="pt", device="cpu")
        file = self._open[name]
        return {key: file.get_slice(key)[row] for key in file.keys()}  # noqa: SIM118  # a file, not a dict

    def samples(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Of several samples, zeros for PADDING: as `sample`, with a batch dimension in front."""
        found = [self.sample(i) if i != PADDING else None for i in indices]
        like = next((x for x in found if x is not None), None) or self.sample(0)
        empty = {key: torch.zeros_like(x) for key, x in like.items()}
        return {key: torch.stack([(x or empty)[key] for x in found]) for key in like}


class PackedStates(PackedTokens):
    """Samples of packed tokens with their states."""

    def __init__(self, packed: PackedTokens, reader: StateReader) -> None:
        vars(self).update(vars(packed))
        self.packed, self.reader = packed, reader
        self.fingerprint = f"{packed.fingerprint}/states-{reader.index['key'][:16]}"

    def __len__(self) -> int:
        return len(self.packed)

    def fetch(self, indices: Sequence[int]) -> StateBatch:
        """The batch of these samples; an index PADDING gives a row of padding."""
        batch = self.packed.fetch(indices)
        kept = self.reader.samples([int(i) for i in indices])
        logp = kept.get("law_logp")
        return StateBatch(
            **vars(batch),
            states=kept["states"],
            scale_bits=kept["scale"],
            law_ids=kept.get("law_ids"),
            law_bits=None if logp is None else logp.view(torch.int16),
        )


_DEFAULT_CORPUS, _DEFAULT_TEXT, _DEFAULT_STATES = CorpusConfig(), TextConfig(), StatesConfig()


class TeacherStatesModule(TextDataModule):
    """Text with the target's states (`StateBatch`); the cache is made in `prepare_data`, once."""

    def __init__(
        self,
        corpus: CorpusConfig = _DEFAULT_CORPUS,
        text: TextConfig = _DEFAULT_TEXT,
        states: StatesConfig = _DEFAULT_STATES,
    ) -> None:
        """Args: corpus: which documents. text: how they become batches. states: of which target, and where."""
        super().__init__(corpus, text)
        if text.streaming:
            raise InvalidValue("states of a stream cannot be kept: set text.streaming to false")
        self.states = states
        self._with_states: dict[str, PackedStates] = {}

    @property
    def target_dir(self) -> Path:
        """The target whose states these are."""
        return Path(self.states.target)

    @property
    def states_directory(self) -> Path:
        """Where the cache lies (or will lie), by the key of everything that decides it."""
        root = Path(self.states.cache_dir).expanduser() if self.states.cache_dir else self.directory.parent
        return root / f"states-{self.states_key()[:20]}"

    def states_key(self) -> str:
        """sha256 of text, tokenizer, packing, target, layers and format. Raises InvalidValue for a missing target."""
        if not self.target_dir.is_dir():
            raise InvalidValue(f"no such target directory: {self.target_dir} (data.states.target)")
        layers = None if self.states.aux_layers is None else list(self.states.aux_layers)
        packing = [self.text.length, self.text.separate_documents, self.text.packing]
        parts = [
            _VERSION,
            self.directory.name,
            packing,
            target_fingerprint(self.target_dir),
            layers,
            self.states.format,
            self.states.laws,
        ]
        return hashlib.sha256(json.dumps([*parts, self.states.dtype]).encode()).hexdigest()

    def prepare_data(self) -> None:
        """Prepare the text, then the states that are missing; the plan is printed before anything is written."""
        super().prepare_data()
        self._open()
        self.write_states()

    def write_states(self, rank: int = 0, ranks: int = 1) -> None:
        """Write this rank's share of the shards, and the index once all are there."""
        splits = [name for name in ("train", "val") if len(TextDataModule._packed(self, name))]
        if all((self.states_directory / name / _INDEX).is_file() for name in splits):
            return
        engine = load_engine(self.target_dir, dtype=self.states.dtype, device=self.states.device)
        layers = state_layers(engine, self.states.aux_layers)
        packs = {name: TextDataModule._packed(self, name) for name in splits}
        plans = {n: plan_of(len(p), p.length, layers, engine, self.states) for n, p in packs.items()}
        total = plan_of(sum(p.samples for p in plans.values()), self.text.length, layers, engine, self.states)
        print(f"states of {self.target_dir.name} after layers {list(layers)}: {total}", file=sys.stderr)
        done = sum(f.stat().st_size for f in self.states_directory.rglob("*.safetensors")) / 1e9
        total.check(self.states_directory, self.states.max_gb, done)
        for name, packed in packs.items():
            directory = self.states_directory / name
            errors = write_states(directory, packed, engine, layers, self.states, rank=rank, ranks=ranks)
            if ranks == 1 or all(_whole(directory / f"{i:05d}.safetensors") for i in range(plans[name].shards)):
                seal_states(directory, plans[name], self.states_key(), layers, errors)
                try:
                    errors["verified_steps"] = verify(directory, packed, engine, layers)
                except InvalidState:
                    (directory / _INDEX).unlink()  # nobody is to train on it
                    raise
                print(f"states, {name}: {errors}", file=sys.stderr)

    def setup(self, stage: str | None = None) -> None:
        """Map text and states. Raises InvalidState for a damaged cache."""
        super().setup(stage)
        for name in ("train", "val"):
            packed = TextDataModule._packed(self, name)
            if len(packed):
                self._with_states[name] = PackedStates(packed, StateReader(self.states_directory / name))

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """The layers whose states the batches bring; known after `setup`."""
        return tuple(self._with_states["train"].reader.index["layers"][:-1])

    def _packed(self, name: str) -> PackedTokens:
        return self._with_states.get(name) or super()._packed(name)
