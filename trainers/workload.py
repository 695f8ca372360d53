"""What a config trains on, as far as `draftsmith plan` needs it: a batch on the meta device, tokens, steps, serving."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draftsmith.data.batches import OnlineBatch, TokenBatch
from draftsmith.data.online_data import OnlineDataModule
from draftsmith.data.state_formats import StateBatch
from draftsmith.data.teacher_states import TeacherStatesModule
from draftsmith.data.text import TextDataModule
from draftsmith.inference.decoders.speculative import SpeculativeSettings
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.hf_model import DTYPES, HFModel
from draftsmith.modules.learned_part import LearnedPart, on_meta
from draftsmith.modules.lm import LM
from draftsmith.modules.masked_lm import MaskedDiffusion
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers import networks
from draftsmith.trainers.checks.subject import Subject
from draftsmith.trainers.memory import Load, Pieces
from draftsmith.trainers.meta import StepTrace, trace_step

SERVED_TARGET = "served target"


def load(subject: Subject, device: str) -> Load:
    """What a rank carries. Builds the module on the meta device and traces one micro batch there."""
    low = str(subject.trainer.precision or "32-true").startswith(("bf16", "16"))
    learns = [p for net in subject.nets.values() for p in networks.trained_parameters(net)]
    rests = [p for net in subject.nets.values() for p in net.parameters() if not p.requires_grad]
    kept = all(p.dtype == torch.float32 for p in learns)
    true = str(subject.trainer.precision).endswith("-true") and low
    compute = 2 if low or not kept else 4
    found = Load(
        parameters=subject.parameters,
        largest=max(p.numel() for p in learns),
        trace=StepTrace(),
        weight_bytes=2 if true or not kept else 4,
        compute_bytes=compute,
        on_gpu=device != "cpu",
        frozen=networks.count(rests),
        frozen_bytes=2 * networks.count(rests) if true else networks.size(rests),
        costs=costs_bytes(subject),
        teacher=networks.size(networks.teacher_tensors(subject.module)),
        pieces=pieces(subject),
        serving=serving(subject),
    )
    # the trace comes last: it changes the networks' number format
    return replace(found, trace=trace_batch(subject, torch.bfloat16 if compute == 2 else None, device))


def costs_bytes(subject: Subject) -> int:
    """Of the token costs of EMO, which every rank keeps."""
    costs = networks.costs(subject.module)
    return 0 if costs is None else networks.size([costs.unit])


def pieces(subject: Subject) -> Pieces | None:
    """The teacher as the ranks share it; None where each has a whole one."""
    teacher = networks.teacher(subject.module)
    if not subject.partition_teacher or teacher is None:
        return None
    modules = teacher.base_model.modules()
    return Pieces(
        body=networks.parameter_count(teacher.base_model),
        head=networks.parameter_count(teacher.get_output_embeddings()),
        largest=max(networks.count(m.parameters(recurse=False)) for m in modules),
        size=teacher.dtype.itemsize,
    )


def trace_batch(subject: Subject, dtype: torch.dtype | None, device: str) -> StepTrace:
    """One micro batch through loss and backward on the meta device, in `dtype`, to which it brings the networks."""
    module, nets = subject.module, list(subject.nets.values())
    if dtype is not None:
        for net in nets:
            net.to(dtype)

    def loss() -> Tensor:
        batch = meta_batch(subject)
        if isinstance(module, LearnedPart):
            return module.plan_loss(batch)
        if isinstance(batch, OnlineBatch):
            assert isinstance(module, OSDDrafter)
            return module.online_loss(batch).total
        if isinstance(module, OSDDrafter):
            return module.text_loss(batch).total
        if isinstance(module, EagleDrafter):
            return module.unroll(batch, statistics=False).total
        assert isinstance(module, LM)
        return module.loss(batch, statistics=False).total

    # one of several drafts learns in a step
    trained = nets[:1] if isinstance(subject.data, OnlineDataModule) else nets
    costs = networks.costs(module)
    held = [*networks.teacher_tensors(module), *([] if costs is None else [costs.unit])]
    held += [t for net in nets[len(trained) :] for t in (*net.parameters(), *net.buffers())]
    teacher = networks.teacher(module)
    return trace_step(loss, trained, [*held, *([] if teacher is None else teacher.buffers())], device)


def meta_batch(subject: Subject) -> Any:
    """A full micro batch of the config, without data. Raises InvalidType for data that is not known here."""
    data = subject.data
    if isinstance(subject.module, LearnedPart) and hasattr(data, "rows"):
        return subject.module.plan_batch(data)
    if isinstance(data, TextDataModule):
        shape = (data.text.batch_size, data.text.length)
        masks = on_meta(*shape, dtype=torch.int8), on_meta(*shape, dtype=torch.int32)
        fields = (on_meta(*shape), *masks, on_meta(shape[0]), data.text.separate_documents)
        if not isinstance(data, TeacherStatesModule):
            return TokenBatch(*fields)
        head: Any = subject.nets["net."].config  # of an EAGLE head: what else reads states
        k = data.states.laws
        layers, width = len(head.aux_layers) + (not k), head.target_hidden_size
        stored = torch.int8 if data.states.format == "int8" else torch.int16
        scales = on_meta(*shape, layers, dtype=torch.int32)
        states = StateBatch(*fields, states=on_meta(*shape, layers, width, dtype=stored), scale_bits=scales)
        if not k:
            return states
        ids, bits = on_meta(*shape, k, dtype=torch.int32), on_meta(*shape, k, dtype=torch.int16)
        return replace(states, law_ids=ids, law_bits=bits)
    if isinstance(data, OnlineDataModule):
        records = data.buffer.interval + round(data.buffer.interval * data.buffer.replay)
        answer = data.traffic.max_new_tokens
        marked, kept = records * answer, data.recorder.top_k
        return OnlineBatch(
            contexts=on_meta(records, data.traffic.prompt_length + answer),
            lengths=on_meta(records),
            row=on_meta(marked),
            position=on_meta(marked),
            law_ids=on_meta(marked, kept),
            logprob_bits=on_meta(marked, kept, dtype=torch.int32),
            tail_bits=on_meta(marked, dtype=torch.int32),
            requests=on_meta(records),
        )
    raise InvalidType(f"the batches of {type(data).__name__} are not known here: plan knows text and served requests")


def tokens_per_step(subject: Subject, world_size: int) -> int:
    """Of an optimizer step, over all ranks; of served requests at most (every answer at full length)."""
    data, accumulate = subject.data, int(subject.trainer.accumulate_grad_batches)
    if isinstance(subject.module, LearnedPart):
        return int(data.rows) * subject.module.positions(data) * accumulate * world_size
    if isinstance(data, TextDataModule):
        return data.text.batch_size * data.text.length * accumulate * world_size
    assert isinstance(data, OnlineDataModule)
    return data.buffer.interval * (data.traffic.prompt_length + data.traffic.max_new_tokens) * world_size


def steps(subject: Subject, world_size: int) -> tuple[int | None, str]:
    """Optimizer steps of the run, and a line where they cannot be told."""
    trainer, data = subject.trainer, subject.data
    limit = trainer.max_steps if trainer.max_steps is not None and trainer.max_steps > 0 else None
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return (limit, "") if limit else (None, "the run has no planned end (trainer.max_steps)")
    epoch: int | None = None
    if isinstance(data, TextDataModule):
        if data.text.streaming:
            epoch = data.text.batches_per_epoch
        elif data.directory.is_dir() and (not isinstance(data, TeacherStatesModule) or data.states_directory.is_dir()):
            data.setup("fit")
            epoch = len(data.train_dataloader()) // world_size
    elif isinstance(subject.module, MaskedDiffusion):
        epoch = len(data.train_dataloader()) // world_size
    elif isinstance(data, OnlineDataModule) and data.serve.limit is not None:
        epoch = data.serve.limit // (data.buffer.interval * world_size) * data.serve.steps
    if epoch is None:
        return limit, "" if limit else "steps are left out: they follow from the data, which is not prepared yet"
    total = trainer.max_epochs * epoch // int(trainer.accumulate_grad_batches)
    return (min(total, limit) if limit else total), ""


def parameters(subject: Subject) -> dict[str, int]:
    """Parameters of every network of a run, by what it is there for."""
    found = {}
    for prefix, net in subject.nets.items():
        learns, name = networks.count(networks.trained_parameters(net)), prefix.rstrip(".")
        found[name] = learns
        if networks.parameter_count(net) > learns:
            found[f"{name}, frozen"] = networks.parameter_count(net) - learns
    teacher = networks.teacher_tensors(subject.module)
    if teacher:
        found["teacher"] = networks.count(teacher)
    if isinstance(subject.data, OnlineDataModule):
        found[SERVED_TARGET] = networks.parameter_count(_served_target(subject.data)[0])
        found["served drafts (two copies each)"] = 2 * subject.stored
    return found


def _served_target(data: OnlineDataModule) -> tuple[Any, int]:
    """The serving target on the meta device, and the bytes of one of its weights."""
    dtype = data.dtype
    if dtype is None:
        stored = networks.weightless(HFModel(path=data.target_dir)).build().config
        named = str(getattr(stored, "dtype", None) or "float32").removeprefix("torch.")
        dtype = named if named in DTYPES else "float32"
    if dtype not in DTYPES:
        raise InvalidValue(f"data.dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    return networks.weightless(HFModel(path=data.target_dir, dtype=dtype)).build(), DTYPES[dtype].itemsize


def serving(subject: Subject) -> int:
    """Bytes that decoding holds during training: target, two copies of every draft, caches of requests in flight."""
    data, module = subject.data, subject.module
    if isinstance(data, OnlineDataModule):
        target, _ = _served_target(data)
        longest = SpeculativeSettings(**{"fallback": "never", **data.serve.decoder}).longest
        length = data.traffic.prompt_length + data.traffic.max_new_tokens + longest
        drafts = list(subject.nets.values())
        caches = cache_bytes(target, data.serve.in_flight, length)
        caches += max(cache_bytes(net, data.serve.in_flight, length) for net in drafts)
        return networks.parameter_bytes(target) + caches + sum(2 * networks.parameter_bytes(net) for net in drafts)
    if isinstance(module, OSDDrafter) and module.source != "teacher" and isinstance(data, TextDataModule):
        rows, length = data.text.batch_size, data.text.length
        found = sum(cache_bytes(net, rows, length) for net in subject.nets.values())
        teacher = networks.teacher(module)
        if module.source == "mix_token" and teacher is not None:
            found += cache_bytes(teacher, rows, length)
        return found
    return 0


def cache_bytes(net: Any, rows: int, length: int) -> int:
    """Keys and values of every layer."""
    config = net.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * rows * length * groups * width * net.dtype.itemsize)
