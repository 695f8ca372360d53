"""Doctor's checks of what a run reads: labels, tokenizer, template, loader, floats."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftsmith.data.batches import TokenBatch
from draftsmith.data.online_buffer import BufferSettings
from draftsmith.data.online_data import OnlineDataModule, TrafficConfig
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.trainers.checks import batches
from draftsmith.trainers.checks.finding import ERROR, OK, WARNING
from tests.doctor_subject import elsewhere, says, subject, two  # noqa: F401  # a fixture
from tests.tiny import write_tokenizer

pytestmark = pytest.mark.usefixtures("elsewhere")


class Rows:
    """A loader of ready batches, as our own or, with less, as others."""

    def __init__(self, found: list[Any], **attributes: Any) -> None:
        self.found = found
        self.__dict__ |= attributes

    def __iter__(self) -> Iterator[Any]:
        return iter(self.found)


def batch(labels: int) -> TokenBatch:
    ids = torch.zeros(2, 50, dtype=torch.int64)
    mask = (torch.arange(50) < labels).to(torch.int8).expand(2, 50).contiguous()
    return TokenBatch(ids, mask, torch.zeros(2, 50, dtype=torch.int32), torch.arange(2))


def test_labels() -> None:
    says(batches.labels([batch(40)]), OK, "80 of the first 100")
    says(batches.labels([batch(1)]), WARNING, "2.0%")
    says(batches.labels([batch(0)]), ERROR, "no label", "generation")
    says(batches.labels([]), ERROR, "no whole batch", "batch_size")


def test_a_tokenizer_larger_than_the_head() -> None:
    says(batches.tokenizer(subject(), 301), ERROR, "301 ids", "300 rows", "vocab_size to 301")
    says(batches.tokenizer(subject(), 300), OK)


def test_a_template_without_generation_tags(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tok")
    data = TextDataModule(text=TextConfig(str(tmp_path / "tok")))
    assert batches.template(data) == []
    data.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    says(batches.template(data)[0], WARNING, "generation", "inspect")
    data.tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert batches.template(data) == []


def test_loaders() -> None:
    position = {"state_dict": lambda: {}, "load_state_dict": lambda state: None}
    says(batches.resume(Rows([], **position)), OK)
    says(batches.resume(Rows([])), ERROR, "no state_dict and no load_state_dict", "StatefulLoader")
    bare, sized = Rows([]), Rows([], batch_sampler=SimpleNamespace(batch_size=4))
    says(batches.micro_batch(subject(), bare), OK)
    says(batches.micro_batch(two(strategy="zero2"), bare), ERROR, "batch_sampler.batch_size")
    says(batches.micro_batch(two(strategy="zero2"), sized), OK, "4 rows")


def test_floats_in_a_batch() -> None:
    @dataclasses.dataclass
    class Timed:
        ids: Any
        times: Any

    floats = [Timed(torch.zeros(2, dtype=torch.int64), torch.tensor([0.999, 0.5]))]
    says(batches.floats(subject(), [batch(1)]), OK, "integers only")
    says(batches.floats(two(strategy="zero2", precision="bf16-mixed"), floats), ERROR, "times", "0.999")
    says(batches.floats(subject(), floats), WARNING, "times")


def test_served_requests_say_what_exact_resume_needs() -> None:
    for persist, verdict in ((False, WARNING), (True, OK)):
        data = OnlineDataModule("t", TrafficConfig(), buffer=BufferSettings(persist=persist))
        (found,) = batches.online(subject(data=data))
        says(found, verdict, "data.buffer.persist")
    assert batches.online(subject()) == []
