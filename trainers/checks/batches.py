"""Checks of what a run reads: tokenizer, labels, template, loader, and floats that a number format would cut."""

from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from draftsmith.data.batches import CanvasBatch, TokenBatch
from draftsmith.data.chat import has_generation_tags
from draftsmith.data.online_data import OnlineDataModule
from draftsmith.data.text import TextDataModule
from draftsmith.inference.errors import UserError
from draftsmith.trainers import networks
from draftsmith.trainers.checks.finding import Finding, error, ok, warning
from draftsmith.trainers.checks.subject import Subject

_LOOK = 4  # batches


def online(subject: Subject) -> list[Finding]:
    """What can be said without data: whether a run over served requests resumes exactly."""
    data = subject.data
    if not isinstance(data, OnlineDataModule):
        return []
    if data.buffer.persist:
        return [ok("resume", "data.buffer.persist: buffers are part of a checkpoint, any step resumes exactly")]
    return [
        warning(
            "resume",
            "data.buffer.persist is false: a checkpoint waits until the buffers are empty, and a run killed between "
            "two serves those requests again; set it to true (requests may then be written to disk) to resume exactly "
            "at any step",
        )
    ]


def checks(subject: Subject) -> list[Finding]:
    """Those that prepare text and look at its first batches; [] for other data."""
    data = subject.data
    if not isinstance(data, TextDataModule):
        return []
    try:
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        batches = list(islice(loader, _LOOK))
        found = [tokenizer(subject, data.vocab_size), *template(data), labels(batches)]
    except UserError as e:
        return [error("data", str(e))]
    except OSError as e:
        return [error("data", f"cannot read the data: {e}; check data.corpus.sources and data.text.cache_dir")]
    return [*found, resume(loader), micro_batch(subject, loader), floats(subject, batches)]


def tokenizer(subject: Subject, vocab_size: int) -> Finding:
    """Every id has a row of the head."""
    rows = min(networks.token_rows(net) for net in subject.nets.values())
    if vocab_size > rows:
        return error(
            "tokenizer", f"the tokenizer has {vocab_size} ids and the head {rows} rows: set vocab_size to {vocab_size}"
        )
    return ok("tokenizer", f"{vocab_size} ids, {rows} rows of the head")


def template(data: TextDataModule) -> list[Finding]:
    """Of conversations, the template says what the assistant wrote."""
    if not data.text.answers_only or data.tokenizer.chat_template is None or has_generation_tags(data.tokenizer):
        return []
    return [
        warning(
            "template",
            "the chat template has no {% generation %} tags: the answers of conversations are found by rendering turn "
            "after turn; look at them with 'draftsmith inspect', or set data.text.chat_template to one with tags",
        )
    ]


def labels(batches: list[Any]) -> Finding:
    """There is something to learn."""
    texts = [batch for batch in batches if isinstance(batch, TokenBatch | CanvasBatch)]
    if not texts:
        return error(
            "labels", "the training data has no whole batch: give more text, or a smaller data.text.batch_size"
        )
    count, total = sum(_learned(b) for b in texts), sum(b.ids.numel() for b in texts)
    if count == 0:
        return error(
            "labels",
            f"no label among the {total} tokens of the first {len(texts)} batches: nothing would be learned; check the "
            "chat template's {% generation %} tags and data.text.answers_only (see 'draftsmith inspect')",
        )
    share = count / total
    if share < 0.05:
        return warning("labels", f"{100 * share:.1f}% of the first tokens are labels: most of the work teaches nothing")
    return ok("labels", f"{count} of the first {total} tokens are labels ({100 * share:.0f}%)")


def _learned(batch: TokenBatch | CanvasBatch) -> int:
    """Tokens of a batch that are, or may be masked and then are, to be predicted."""
    found = batch.length - batch.prompt if isinstance(batch, CanvasBatch) else batch.loss_mask
    return int(found.sum())


def resume(loader: object) -> Finding:
    """The loader knows its position."""
    lacking = [name for name in ("state_dict", "load_state_dict") if not hasattr(loader, name)]
    if lacking:
        return error(
            "resume",
            f"{type(loader).__name__} has no {' and no '.join(lacking)}: a resumed run would see its first samples "
            "again; use data/stateful_loader.py's StatefulLoader",
        )
    return ok("resume", f"{type(loader).__name__} keeps its position")


def micro_batch(subject: Subject, loader: object) -> Finding:
    """DeepSpeed reads the rows per rank off the loader."""
    if subject.deepspeed is None:
        return ok("micro batch", "only DeepSpeed asks the loader for it")
    rows = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if rows is None:
        return error(
            "micro batch",
            f"{type(loader).__name__} has no batch_sampler.batch_size, from which DeepSpeed infers the rows per rank: "
            "give the loader one",
        )
    return ok("micro batch", f"{rows} rows per rank")


def floats(subject: Subject, batches: list[Any]) -> Finding:
    """Low precision cuts the floats of a batch (0.999 becomes 1.0): batches carry integers."""
    low = str(subject.trainer.precision).startswith(("bf16", "16"))
    found = sorted({name for batch in batches for name in float_fields(batch)})
    if not found:
        return ok("bf16 inputs", "batches carry integers only")
    text = (
        f"{', '.join(found)} of a batch are floats: in {subject.trainer.precision} 0.999 can arrive as 1.0; send "
        "integers, or bit patterns (x.view(torch.int32)), and draw floats inside the step"
    )
    return (error if low and subject.deepspeed is not None else warning)("bf16 inputs", text)


def float_fields(batch: object) -> list[str]:
    """Names of a batch's floating tensors."""
    if not is_dataclass(batch) or isinstance(batch, type):
        return []
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return [name for name, value in values.items() if isinstance(value, Tensor) and value.is_floating_point()]
