"""The gate between the learning draft and its served copy: verdicts by hand, rollback, logs, resume, set-up errors."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from draftsmith.data.online_buffer import BufferSettings
from draftsmith.data.online_data import OnlineDataModule, RouterConfig, TrafficConfig
from draftsmith.data.online_stream import ServeSettings
from draftsmith.data.served_log import read
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.laws import Record, TeacherLaw
from draftsmith.inference.recorder import RecorderSettings
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.served_draft import network_of
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.optim import OptimConfig
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers.callbacks.draft_swap import DraftSwap, _Running, held_out_alpha, judge
from tests.fakes import markov
from tests.tiny import write_lm

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")

# --- the verdict


def test_verdict_by_hand() -> None:
    d = [0.1, 0.3, -0.1, 0.1]  # mean 0.1, variance 0.08 / 3, standard error 0.0816
    verdict = judge(4, sum(d), sum(x * x for x in d), min_records=4, z=2.0)
    assert verdict.mean == pytest.approx(0.1)
    assert (verdict.low, verdict.high) == (pytest.approx(0.1 - 2 * 0.08164966), pytest.approx(0.1 + 2 * 0.08164966))
    assert verdict.swap and verdict.tested


@pytest.mark.parametrize(
    ("d", "swap"),
    [
        ([-0.3, -0.31, -0.29, -0.3], False),  # certainly worse
        ([-0.3, 0.28, -0.31, 0.3], True),  # nobody can tell
        ([0.2, 0.2, 0.2, 0.2], True),
        ([0.0, 0.0, 0.0, 0.0], True),  # the same draft is not worse
        ([-1e-9] * 4, False),
        ([math.nan] * 4, False),  # a draft that diverged
    ],
)
def test_only_a_draft_that_is_certainly_worse_is_rolled_back(d: list[float], swap: bool) -> None:
    verdict = judge(len(d), sum(d), sum(x * x for x in d), min_records=4, z=1.96)
    assert verdict.swap == swap and verdict.tested


@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_records_let_a_draft_through_untested(n: int) -> None:
    verdict = judge(n, -1.0 * n, 1.0 * n, min_records=4, z=1.96)
    assert verdict.swap and not verdict.tested


def test_ranks_that_add_their_sums_judge_as_one() -> None:
    d = torch.randn(20, dtype=torch.float64)
    parts = [torch.stack([torch.tensor(float(len(x))).double(), x.sum(), x.square().sum()]) for x in (d[:7], d[7:])]
    both = judge(*(parts[0] + parts[1]).tolist(), min_records=4, z=1.96)
    alone = judge(20, float(d.sum()), float(d.square().sum()), min_records=4, z=1.96)
    assert both.mean == pytest.approx(alone.mean) and both.low == pytest.approx(alone.low)


def test_acceptance_on_records_by_hand() -> None:
    target, draft = markov(5, 1, seed=1), markov(5, 1, seed=2)
    records = []
    for ids, at in (([0, 1, 2, 3], [1, 3]), ([4, 4], [1])):
        index = torch.tensor(at)
        law = TeacherLaw.from_logits(target.table[torch.tensor(ids)[index - 1]], 5)
        records.append(Record(torch.tensor(ids), index, law))
    p, q = target.table.softmax(-1), draft.table.softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    expected = torch.stack([(overlap[0] + overlap[2]) / 2, overlap[4]])
    assert torch.allclose(held_out_alpha(draft, records).float(), expected, atol=1e-6)
    assert torch.allclose(held_out_alpha(target, records), torch.ones(2).double(), atol=1e-6)
    assert held_out_alpha(draft, []).shape == (0,)


def test_running_mean_forgets_by_requests() -> None:
    running = _Running()
    running.add(0.8, 16, decay=0.9)
    assert running.mean == 0.8
    running.add(0.2, 1, decay=0.9)
    assert running.mean == pytest.approx(0.9 * 0.8 + 0.1 * 0.2)
    running.add(0.2, 100, decay=0.9)
    assert running.mean == pytest.approx(0.2, abs=1e-3) and running.peak == 0.8


# --- a run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target, a tiny draft, and prompts of two tags."""
    place = tmp_path_factory.mktemp("online")
    write_lm(place / "target", seed=1, max_length=64)
    write_lm(place / "draft", seed=2, layers=1, width=16, max_length=64)
    with (place / "prompts.jsonl").open("w") as file:
        for i in range(40):
            tag, text = ("code", "def add(a, b)") if i % 3 else ("prose", "The quick brown")
            file.write(json.dumps({"prompt": f"{text} {i}", "tag": tag}) + "\n")
    return place


def data_of(place: Path, **changes: Any) -> OnlineDataModule:
    arguments: dict[str, Any] = {
        "target": str(place / "target"),
        "traffic": TrafficConfig(prompts=(str(place / "prompts.jsonl"),), max_new_tokens=10),
        "serve": ServeSettings(
            in_flight=4, steps=2, sampling=SamplingParams(temperature=1.0), decoder={"draft_length": 3}
        ),
        "recorder": RecorderSettings(top_k=16),
        "buffer": BufferSettings(interval=4, holdout=0.3, holdout_size=8),
    } | changes
    return OnlineDataModule(**arguments)


def module_of(place: Path, **changes: Any) -> OSDDrafter:
    arguments: dict[str, Any] = {
        "draft": HFModel(path=str(place / "draft")),
        "optim": OptimConfig(lr=3e-3, schedule="constant", weight_decay=0.0),
    } | changes
    return OSDDrafter(**arguments)


def trainer_of(folder: Path, *callbacks: pl.Callback, **changes: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **changes,
    )


def flat(net: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for _, p in sorted(net.named_parameters())]).clone()


def test_every_update_reaches_the_served_copy(place: Path, tmp_path: Path) -> None:
    swap, module, data = DraftSwap(), module_of(place), data_of(place)
    trainer = trainer_of(tmp_path, swap)
    trainer.fit(module, datamodule=data)
    assert data.stream is not None
    assert swap.counts["swaps"] == data.stream.updates > 4 and swap.counts["rollbacks"] == 0
    assert swap.counts["untested"] < swap.counts["swaps"]
    assert torch.equal(flat(network_of(swap.drafts[0].active)), flat(module.net(0)))
    assert swap.drafts[0].version == swap.counts["swaps"]
    start = module_of(place)
    start.configure_model()
    assert not torch.equal(flat(module.net(0)), flat(start.net(0)))
    metrics = trainer.callback_metrics
    assert metrics["online/swaps"] == swap.counts["swaps"] and 0 <= metrics["online/alpha"] <= 1
    assert metrics["buffer/held_out"] > 0 and "gate/low" in metrics
    assert {"online/alpha/code", "online/alpha/prose"} <= set(metrics)


def test_the_log_of_served_requests(place: Path, tmp_path: Path) -> None:
    swap, data = DraftSwap(), data_of(place)
    trainer_of(tmp_path, swap).fit(module_of(place), datamodule=data)
    served = read(tmp_path / "served.jsonl")
    assert [s.number for s in served] == list(range(40))
    assert {s.tag for s in served} == {"code", "prose"} and all(s.tokens == 10 for s in served)
    versions = [s.version for s in served]
    assert versions == sorted(versions) and versions[0] == 0 and versions[-1] > 3
    assert "prompt" not in (tmp_path / "served.jsonl").read_text()


class Ruin(pl.Callback):
    """Spoils the draft after a step, before the gate sees it."""

    def __init__(self, update: int, how: Callable[[Tensor], Tensor]) -> None:
        self.update, self.how = update, how
        self.served = torch.zeros(0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2 * self.update:
            swap = next(c for c in trainer.callbacks if isinstance(c, DraftSwap))
            self.served = flat(network_of(swap.drafts[0].active))
            with torch.no_grad():
                for p in pl_module.net(0).parameters():
                    p.copy_(self.how(p))


class Look(pl.Callback):
    """Notes the draft's weights after the gate."""

    def __init__(self, update: int) -> None:
        self.update = update
        self.after = torch.zeros(0)
        self.moments = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 2 * self.update:
            self.after = flat(pl_module.net(0))
            self.moments = len(trainer.optimizers[0].state)


@pytest.fixture(scope="module")
def good_draft(place: Path) -> Path:
    """The target itself as the draft: any harm to it shows."""
    folder = place / "good"
    shutil.copytree(place / "target", folder)
    return folder


RUINS = {
    "noise": lambda p: p + torch.randn_like(p),
    "NaN": lambda p: p * math.nan,
}


@pytest.mark.parametrize("how", RUINS)
def test_a_worse_draft_is_rolled_back_and_counted(place: Path, good_draft: Path, tmp_path: Path, how: str) -> None:
    ruin, swap, look = Ruin(5, RUINS[how]), DraftSwap(), Look(5)
    module = module_of(place, draft=HFModel(path=str(good_draft)))
    trainer_of(tmp_path, ruin, swap, look).fit(module, datamodule=data_of(place))
    assert swap.counts["rollbacks"] == 1
    assert torch.equal(look.after, ruin.served)  # the training weights went back to what serves
    assert look.moments == 0  # and the moments that led astray were forgotten
    assert min(s.alpha for s in read(tmp_path / "served.jsonl")) > 0.5  # nobody was served by the ruin


def test_without_the_gate_a_ruined_draft_serves(place: Path, good_draft: Path, tmp_path: Path) -> None:
    """The negative control."""
    ruin, swap = Ruin(5, RUINS["noise"]), DraftSwap(gate=False)
    module = module_of(place, draft=HFModel(path=str(good_draft)))
    trainer_of(tmp_path, ruin, swap).fit(module, datamodule=data_of(place))
    assert swap.counts["rollbacks"] == 0
    assert min(s.alpha for s in read(tmp_path / "served.jsonl")) < 0.3


def test_a_fall_of_acceptance_restarts_the_schedule(place: Path, good_draft: Path, tmp_path: Path) -> None:
    ruin, swap = Ruin(3, RUINS["noise"]), DraftSwap(gate=False, ema_requests=4, restart_drop=0.15)
    module = module_of(place, draft=HFModel(path=str(good_draft)))
    trainer_of(tmp_path, ruin, swap).fit(module, datamodule=data_of(place))
    assert swap.counts["restarts"] >= 1 and module.lr_start >= 6
    calm = DraftSwap(gate=False, ema_requests=4, restart_drop=0.15)
    module = module_of(place, draft=HFModel(path=str(good_draft)))
    trainer_of(tmp_path, calm).fit(module, datamodule=data_of(place))
    assert calm.counts["restarts"] == 0 and module.lr_start == 0


def test_routed_drafts_learn_and_swap_apart(place: Path, tmp_path: Path) -> None:
    keys = ("code", "prose")
    module = module_of(place, draft=None, drafts={key: HFModel(path=str(place / "draft")) for key in keys})
    swap, data = DraftSwap(), data_of(place, router=RouterConfig(drafts=keys))
    trainer_of(tmp_path, swap).fit(module, datamodule=data)
    assert [draft.version > 0 for draft in swap.drafts] == [True, True]
    assert not torch.equal(flat(module.net(0)), flat(module.net(1)))
    for index in range(2):
        assert torch.equal(flat(network_of(swap.drafts[index].active)), flat(module.net(index)))
    assert {(s.tag, s.draft) for s in read(tmp_path / "served.jsonl")} == {("code", 0), ("prose", 1)}
    assert module.router == {"schema": 1, "keys": ["code", "prose"], "fallback": None, "by": "tag"}
    assert set(module._meta["alpha_ema"]) == {"code", "prose"}


@pytest.mark.parametrize("by", ["centroid", "function"])
def test_other_routers_of_the_data_module(place: Path, tmp_path: Path, by: str) -> None:
    keys = ("code", "prose")
    function = f"{__name__}:kind_of" if by == "function" else ""
    module = module_of(place, draft=None, drafts={key: HFModel(path=str(place / "draft")) for key in keys})
    data = data_of(place, router=RouterConfig(drafts=keys, by=by, function=function, examples=4))
    trainer_of(tmp_path, DraftSwap()).fit(module, datamodule=data)
    routed = {(s.tag, s.draft) for s in read(tmp_path / "served.jsonl")}
    assert routed == {("code", 0), ("prose", 1)}


def kind_of(text: str) -> str:
    return "code" if text.startswith("def") else "prose"


# --- resume


class SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def resumed_equals_straight(place: Path, folder: Path, step: int, **changes: Any) -> None:
    """Stop at `step`, resume, and compare weights and served requests with an uninterrupted run."""
    gate = changes["buffer"].holdout > 0
    straight = module_of(place)
    trainer_of(folder / "straight", DraftSwap(gate=gate)).fit(straight, datamodule=data_of(place, **changes))
    first = module_of(place)
    trainer_of(folder / "split", DraftSwap(gate=gate), SaveAt(step, folder / "x.ckpt")).fit(
        first, datamodule=data_of(place, **changes)
    )
    second = module_of(place)
    trainer_of(folder / "split", DraftSwap(gate=gate)).fit(
        second, datamodule=data_of(place, **changes), ckpt_path=folder / "x.ckpt"
    )
    assert not torch.equal(flat(first.net(0)), flat(straight.net(0)))
    assert torch.equal(flat(second.net(0)), flat(straight.net(0)))
    strip = [
        [replace(s, rounds=replace(s.rounds, seconds=[])) for s in read(folder / name / "served.jsonl")]
        for name in ("straight", "split")
    ]
    assert strip[0] == strip[1]


def test_resume_without_stored_text_is_exact_at_an_empty_buffer(place: Path, tmp_path: Path) -> None:
    resumed_equals_straight(place, tmp_path, 4, buffer=BufferSettings(interval=4))
    assert not (tmp_path / "split" / "buffer").exists()  # no private text on disk


@pytest.mark.parametrize("step", [3, 6])  # in the middle of an update, and after one
def test_resume_with_stored_records_is_exact_anywhere(place: Path, tmp_path: Path, step: int) -> None:
    buffer = BufferSettings(interval=4, holdout=0.3, holdout_size=8, replay=0.2, persist=True)
    resumed_equals_straight(place, tmp_path, step, buffer=buffer)
    assert list((tmp_path / "split" / "buffer").glob("*.safetensors"))


# --- set-up


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"trainer": {"accumulate_grad_batches": 2}}, InvalidValue, "accumulate_grad_batches to 1"),
        ({"data": {"buffer": BufferSettings()}}, InvalidValue, "holdout"),
        ({"data": {"router": RouterConfig(drafts=("a", "b"))}}, InvalidValue, "names 2 drafts"),
        (
            {"module": {"draft": None, "drafts": "ab"}},
            InvalidValue,
            r"router\.drafts are empty and model.drafts are a, b",
        ),
        (
            {"module": {"draft": None, "drafts": "ab"}, "data": {"router": RouterConfig(drafts=("b", "a"))}},
            InvalidValue,
            "the same keys in the same order",
        ),
        ({"module": {"draft": "short"}}, InvalidValue, "vocabularies differ"),
    ],
)
def test_parts_that_do_not_fit(place: Path, tmp_path: Path, change: Any, error: Any, message: str) -> None:
    changes = dict(change.get("module", {}))
    spec = HFModel(path=str(place / "draft"))
    if changes.get("drafts"):
        changes["drafts"] = dict.fromkeys(changes["drafts"], spec)
    if changes.get("draft") == "short":
        arch = {"model_type": "llama", "vocab_size": 99, "hidden_size": 16, "intermediate_size": 32}
        changes["draft"] = HFModel(arch=arch | {"num_hidden_layers": 1, "num_attention_heads": 2})
    trainer = trainer_of(tmp_path, DraftSwap(), **change.get("trainer", {}))
    with pytest.raises(error, match=message) as raised:
        trainer.fit(module_of(place, **changes), datamodule=data_of(place, **change.get("data", {})))
    assert "\n" not in str(raised.value)


def test_other_modules_and_other_data_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidType, match="OSDDrafter"):
        trainer_of(tmp_path, DraftSwap()).fit(Other(), datamodule=data_of(place))
    with pytest.raises(InvalidType, match="OnlineDataModule"):
        loader = torch.utils.data.DataLoader([1])  # type: ignore[arg-type]
        trainer_of(tmp_path, DraftSwap()).fit(module_of(place), loader)


class Other(pl.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> None: ...


def test_without_the_callback_the_run_says_what_is_missing(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="DraftSwap callback"):
        trainer_of(tmp_path).fit(module_of(place), datamodule=data_of(place))


@pytest.mark.parametrize(
    "changes", [{"min_records": 1}, {"z": 0.0}, {"ema_requests": 0}, {"restart_drop": 0.0}, {"restart_drop": 1.5}]
)
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        DraftSwap(**changes)
