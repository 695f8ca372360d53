"""`draftsmith doctor`: every check on a good run and on each bad one; what `fit` warns of in a SLURM job."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from draftsmith.data.batches import TokenBatch
from draftsmith.data.online_buffer import BufferSettings
from draftsmith.data.online_data import OnlineDataModule, TrafficConfig
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.inference import cli
from draftsmith.inference.errors import InvalidValue
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lm import LM
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers import doctor, runs, shards
from draftsmith.trainers.callbacks.checkpoint import CheckpointConfig
from draftsmith.trainers.checks import batches, job, slurm, storage, strategy
from draftsmith.trainers.checks.finding import ERROR, OK, WARNING, Finding, size
from draftsmith.trainers.checks.job import Job
from draftsmith.trainers.checks.subject import Subject
from draftsmith.trainers.cli import parse
from draftsmith.trainers.training import ParseCLI
from tests.tiny import write_tokenizer
from tests.tiny_run import ARCH, make_place

GOOD = Job(
    name="train", nodes=1, ntasks=2, tasks_per_node=2, signal="SIGUSR1@120", requeue=True, inside=True, in_step=True
)
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory; no job around us; the disk's speed is not measured."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SBATCH_", runs.FOLDER_VARIABLE, "MASTER_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "write_speed", lambda folder: 2.0**20)
    return tmp_path


def subject(**changes: Any) -> Subject:
    """A run of the tiny model; `changes` go to the trainer, or to the subject where it has such a field."""
    own = {f.name for f in dataclasses.fields(Subject)}
    made: dict[str, Any] = {
        "checkpoint": CheckpointConfig(),
        "module": LM(HFModel(arch=ARCH)),
        "data": TextDataModule(),
        "run": Path("runs/x"),
        "env": {},
        "job": None,
    }
    made |= {name: value for name, value in changes.items() if name in own}
    trainer = TRAINER | {name: value for name, value in changes.items() if name not in own}
    return Subject(trainer=SimpleNamespace(**trainer), **made)


def two(**changes: Any) -> Subject:
    return subject(**({"devices": 2, "strategy": "ddp"} | changes))


def says(found: Finding, verdict: str, *words: str) -> None:
    assert found.verdict == verdict, found
    for word in words:
        assert word in found.text, found
    assert "\n" not in found.text


def stub(name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is alone on PATH, with what the system has."""
    folder = Path("bin").absolute()
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


# --- SLURM


def test_tasks_that_agree() -> None:
    says(slurm.tasks(two(), GOOD), OK, "2 tasks for 2 devices x 1 nodes")
    nodes = dataclasses.replace(GOOD, nodes=2, ntasks=4)
    says(slurm.tasks(two(num_nodes=2), nodes), OK, "4 tasks")
    says(slurm.tasks(subject(), Job()), OK, "one task, one rank")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ntasks": 4, "tasks_per_node": 4}, ("SLURM has 4 tasks", "2 devices x 1 nodes = 2", "--ntasks-per-node=2")),
        ({"tasks_per_node": None}, ("without --ntasks-per-node", "--ntasks-per-node=2")),
        ({"tasks_per_node": 1}, ("1 tasks per node", "trainer.devices is 2")),
        ({"nodes": 2}, ("SLURM has 2 nodes", "trainer.num_nodes is 1")),
        ({"ntasks": None, "tasks_per_node": None}, ("names no tasks", "2 ranks")),
    ],
)
def test_tasks_that_do_not_agree(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    says(slurm.tasks(two(), dataclasses.replace(GOOD, **changes)), ERROR, *words)


def test_devices_that_only_the_gpus_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    says(slurm.tasks(two(devices="auto", accelerator="gpu"), GOOD), WARNING, "'auto'", "number of tasks per node")


@pytest.mark.parametrize(("devices", "count"), [(2, 2), ("2", 2), ([0, 1, 3], 3), ("0,1", 2), ("auto", 1)])
def test_devices_as_the_trainer_takes_them(devices: Any, count: int) -> None:
    assert subject(devices=devices).devices == count


def test_srun_is_needed_by_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    says(slurm.srun(two(), GOOD), ERROR, "no srun on PATH", "mount")
    says(slurm.srun(subject(), GOOD), OK, "one rank")
    stub("srun", "", monkeypatch)
    says(slurm.srun(two(), GOOD), OK, "found")
    batch = dataclasses.replace(GOOD, in_step=False)
    says(slurm.srun(two(), batch), OK, "found")  # doctor in a batch script, before srun
    says(slurm.srun(two(starting=True), batch), WARNING, "not started by srun", "srun draftsmith")
    says(slurm.srun(two(), dataclasses.replace(GOOD, inside=False)), OK, "script's business")


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_job_that_is_called_like_a_shell(name: str) -> None:
    shell = dataclasses.replace(GOOD, name=name)
    says(slurm.name(two(), shell), ERROR, repr(name), "--job-name")
    says(slurm.name(subject(), shell), WARNING, repr(name))
    says(slurm.name(two(), GOOD), OK)
    assert [f.check for f in slurm.checks(two(job=dataclasses.replace(shell, ntasks=9)))] == ["slurm name"]


def test_requeue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    says(slurm.requeue(GOOD), WARNING, "no scontrol on PATH")
    stub("scontrol", "", monkeypatch)
    says(slurm.requeue(GOOD), OK)
    says(slurm.requeue(dataclasses.replace(GOOD, requeue=None)), WARNING, "#SBATCH --requeue")
    says(slurm.requeue(dataclasses.replace(GOOD, requeue=False)), WARNING, "--no-requeue")
    says(slurm.requeue(dataclasses.replace(GOOD, script_known=False)), WARNING, "cannot be read")


@pytest.mark.parametrize(
    ("signal", "verdict", "words"),
    [
        ("SIGUSR1@120", OK, ("120 s of grace",)),
        ("USR1@120", OK, ("120 s",)),
        ("10@120", OK, ("120 s",)),
        (None, WARNING, ("no --signal", "SIGUSR1@120")),
        ("SIGTERM@120", ERROR, ("SIGUSR1 alone", "--signal=SIGUSR1@120")),
        ("B:SIGUSR1@120", ERROR, ("only the batch shell", "SIGUSR1@120")),
        ("SIGUSR1@1", ERROR, ("1 s of grace", "about 3 s", "--signal=SIGUSR1@")),
        ("SIGUSR1@5", WARNING, ("5 s of grace is little",)),
    ],
)
def test_the_signal_and_its_grace(signal: str | None, verdict: str, words: tuple[str, ...]) -> None:
    says(slurm.grace(subject(), dataclasses.replace(GOOD, signal=signal)), verdict, *words)


def test_the_grace_follows_the_bytes_of_a_save_and_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject()
    assert storage.save_seconds(one)[0] == pytest.approx(storage.checkpoint_bytes(one) / 2**20 + 3)
    monkeypatch.setattr(storage, "write_speed", lambda folder: storage.checkpoint_bytes(one) / 1000)
    says(slurm.grace(one, GOOD), ERROR, "120 s of grace", "1003 s", "SIGUSR1@203")


def test_without_slurm_there_is_one_line() -> None:
    (found,) = slurm.checks(subject())
    says(found, OK, "no SLURM job around")


def test_a_script_is_read_as_sbatch_reads_it(tmp_path: Path) -> None:
    script = tmp_path / "x.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --job-name=deep -N 2\n#SBATCH --ntasks-per-node 4  # each a GPU\n#SBATCH -n8\n"
        "#SBATCH --requeue --signal=B:USR1\necho '#SBATCH --nodes=9'\n"
    )
    found = job.from_script(script)
    assert (found.name, found.nodes, found.tasks_per_node, found.ntasks) == ("deep", 2, 4, 8)
    assert found.requeue is True and found.signal == "B:USR1" and found.signal_name == "USR1" and found.grace == 60
    assert not found.inside and found.total == 8
    for text, word in (("echo hi\n", "no #SBATCH line"), (None, "cannot read")):
        if text is None:
            script.unlink()
        else:
            script.write_text(text)
        with pytest.raises(InvalidValue, match=word):
            job.from_script(script)


def test_the_job_around_us_tells_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    stub("scontrol", 'echo "$@" > asked; echo "#SBATCH --signal=SIGUSR1@300"; echo "#SBATCH --requeue"', monkeypatch)
    env = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_STEP_ID": "0",
    }
    found = job.from_environment(env)
    assert found == Job("train", 2, 8, 4, "SIGUSR1@300", True, inside=True, in_step=True, number="77")
    assert Path("asked").read_text().split() == ["write", "batch_script", "77", "-"]
    stub("scontrol", "exit 1", monkeypatch)
    found = job.from_environment(env)
    assert found is not None and not found.script_known
    assert job.from_environment({}) is None


# --- strategy, DeepSpeed, precision, port


def test_strategies() -> None:
    says(strategy.strategy(subject()), OK, "auto, 1 ranks")
    says(strategy.strategy(two(strategy="zero2")), OK, "zero2")
    says(strategy.strategy(two(strategy="zero4")), ERROR, "'zero4'", "zero2")
    says(strategy.strategy(two(strategy="single_device")), ERROR, "one process", "ddp")
    own = {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy", "init_args": {}}
    says(strategy.strategy(two(strategy=own)), ERROR, "Lightning's own", "zero2")


def zero(tmp_path: Path, **content: Any) -> Subject:
    """A run under a DeepSpeed config of one's own."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | content))
    own = {"class_path": "draftsmith.trainers.strategies.ZeRO", "init_args": {"config": str(path)}}
    return two(strategy=own)


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"gradient_accumulation_steps": 4}, ("gradient_accumulation_steps", "trainer.accumulate_grad_batches")),
        ({"train_batch_size": 64}, ("train_batch_size", "batch_size")),
        ({"bf16": {"enabled": True}}, ("bf16", "trainer.precision")),
        ({"optimizer": {"type": "Adam"}}, ("optimizer", "model.optim")),
        ({"zero_optimization": OFFLOAD}, ("offload_optimizer to cpu", '"zero_force_ds_cpu_optimizer": false')),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ("stage 3 only",)),
        ({"zero_optimization": {"stage": 4}}, ("stage",)),
    ],
)
def test_deepspeed_configs_that_conflict(tmp_path: Path, content: dict[str, Any], words: tuple[str, ...]) -> None:
    (found,) = strategy.deepspeed(zero(tmp_path, **content))
    says(found, ERROR, *words)


def test_deepspeed_configs_that_do_not(tmp_path: Path) -> None:
    allowed = {"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False}
    (found,) = strategy.deepspeed(zero(tmp_path, **allowed))
    says(found, OK, "stage 2", "optimizer on cpu")
    assert strategy.deepspeed(two()) == []
    for name, stage in (("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero2-offload", 2), ("zero3-offload", 3)):
        (found,) = strategy.deepspeed(two(strategy=name))
        says(found, OK, f"stage {stage}")
    says(strategy.deepspeed(two(strategy="zero2", gradient_clip_val=1.0, gradient_clip_algorithm="value"))[0], ERROR)
    several = OSDDrafter(drafts={"a": HFModel(arch=ARCH), "b": HFModel(arch=ARCH)})
    says(strategy.deepspeed(two(strategy="zero2", module=several))[0], ERROR, "2 drafts", "ddp")


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from draftsmith.trainers import strategies

    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    (found,) = strategy.deepspeed(two(strategy="zero3"))
    says(found, ERROR, "not installed", "pip install 'draftsmith[deepspeed]'")


@pytest.mark.parametrize("asked", ["16-mixed", "16-true", "16"])
def test_float16_for_families_that_overflow(asked: str) -> None:
    (found,) = strategy.precision(subject(precision=asked))
    says(found, ERROR, "llama", "bf16-mixed", asked)
    gpt2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2}
    says(strategy.precision(subject(precision=asked, module=LM(HFModel(arch=gpt2))))[0], OK)


def test_other_number_formats() -> None:
    for asked in (None, "32-true", "bf16-mixed"):
        (found,) = strategy.precision(subject(precision=asked))
        says(found, OK, "llama")
    low = subject(module=LM(HFModel(arch=ARCH, dtype="bfloat16")))
    says(strategy.precision(low)[1], WARNING, "bfloat16", "float32")
    half = subject(module=LM(HFModel(arch=ARCH, dtype="float16")))
    says(strategy.precision(half)[1], ERROR, "float16")


def test_the_port_where_ranks_meet() -> None:
    says(strategy.port(subject()), OK, "one rank")
    says(strategy.port(two()), OK, "not set")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = taken.getsockname()[1]
        found = strategy.port(two(env={"MASTER_PORT": str(number)}))
        says(found, ERROR, f"port {number}", "set MASTER_PORT")
    says(strategy.port(two(env={"MASTER_PORT": str(number)})), OK, "free")
    says(strategy.port(two(env={"MASTER_PORT": "here"})), ERROR, "'here'")
    says(strategy.port(two(env={"MASTER_PORT": "70000"})), ERROR, "70000")


def test_slurms_own_port_is_looked_at() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for number in range(16000, 25000):
            try:
                taken.bind(("", number))
                break
            except OSError:
                continue
        taken.listen()
        here = dataclasses.replace(GOOD, number=f"98{number - 15000:04d}")
        says(strategy.port(two(job=here)), ERROR, f"port {number}")


# --- folder, disk, checkpoints


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = storage.checks(subject(run=tmp_path / "file" / "x"))
    says(found, ERROR, "file", "is no folder", "--run")
    seconds, how = storage.save_seconds(subject(run=tmp_path / "file" / "x"))
    assert seconds == 0 and "cannot be written" in how


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    says(storage.checks(subject(run=tmp_path / "x"))[0], ERROR, "read-only")


def free(count: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=int(count)))


def test_room_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject()
    count = one.parameters
    assert storage.checkpoint_bytes(one) == 12 * count
    needed = 3 * 12 * count + 2 * 4 * count  # keep 2, one more while it is written, and the best
    free(2 * needed, monkeypatch)
    says(storage.disk(one), OK, size(needed))
    free(1.1 * needed, monkeypatch)
    says(storage.disk(one), WARNING, "hardly more")
    free(needed - 1, monkeypatch)
    says(storage.disk(one), ERROR, "too little", "checkpoint.keep")
    free(100, monkeypatch)
    says(storage.disk(one), ERROR, "not even one fits")
    free(needed - 1, monkeypatch)
    says(storage.disk(subject(checkpoint=CheckpointConfig(monitor=None))), OK)


def test_what_deepspeed_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    count = subject().parameters
    assert storage.checkpoint_bytes(two(strategy="zero2", precision="bf16-mixed")) == 14 * count
    assert storage.checkpoint_bytes(two(strategy="zero2")) == 16 * count


def test_checkpoints_that_are_there_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject()
    folder = one.run / runs.CHECKPOINTS
    folder.mkdir(parents=True)
    (folder / "step-00000001.ckpt").write_bytes(bytes(24 * one.parameters))
    free(20.5 * one.parameters, monkeypatch)
    assert storage.disk(one).verdict != ERROR  # 44 P needed, 24 P of them are there


def test_a_run_in_use() -> None:
    says(storage.in_use(subject()), OK, "free")
    with runs.RunLock(Path("runs/x")):
        says(storage.in_use(subject()), OK, "ours")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        lock = runs.RunLock(Path("runs/x"))
        owner = dataclasses.asdict(runs.Owner(other.pid, socket.gethostname(), runs._started(other.pid), None))
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        lock.path.write_text(json.dumps(owner))
        says(storage.in_use(subject()), ERROR, f"process {other.pid}", "--run")
        other.communicate(b"\n")
    says(storage.in_use(subject()), OK, "which is gone")
    lock.path.write_text("{")
    says(storage.in_use(subject()), WARNING, "cannot be read")


def save(module: Any, ranks: int = 1, step: int = 7) -> Path:
    """What a run of `module` leaves."""
    module.configure_model()
    path = Path("runs/x") / runs.CHECKPOINTS / f"step-{step:08d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: {} for name in runs._NEEDED}
    states = {"RandomStates": {"ranks": [{}] * ranks}}
    torch.save({**content, "state_dict": module.state_dict(), "callbacks": states, "global_step": step}, path)
    return path


def test_a_checkpoint_that_fits() -> None:
    (found,) = storage.checkpoint(subject())
    says(found, OK, "none")
    save(LM(HFModel(arch=ARCH)))
    (found,) = storage.checkpoint(subject())
    says(found, OK, "from step 7")


def test_a_checkpoint_of_another_method() -> None:
    save(OSDDrafter(draft=HFModel(arch=ARCH)))
    (found,) = storage.checkpoint(subject())
    says(found, ERROR, "another method", "OSDDrafter", "trains LM", "--run")


@pytest.mark.parametrize(
    ("arch", "words"),
    [({"hidden_size": 32}, ("[300, 32]", "[300, 16]")), ({"num_hidden_layers": 2}, ("has no net.model.layers.1",))],
)
def test_a_checkpoint_of_other_shapes(arch: dict[str, int], words: tuple[str, ...]) -> None:
    saved, now = (ARCH | arch, ARCH) if "hidden_size" in arch else (ARCH, ARCH | arch)
    save(LM(HFModel(arch=saved)))
    (found,) = storage.checkpoint(subject(module=LM(HFModel(arch=now))))
    says(found, ERROR, *words, "--run")


def test_a_checkpoint_of_another_number_of_ranks_or_strategy() -> None:
    save(LM(HFModel(arch=ARCH)), ranks=4)
    says(storage.checkpoint(two())[0], WARNING, "4 ranks", "has 2", "random states")
    says(storage.checkpoint(two(strategy="zero2"))[0], ERROR, "single file", "ddp")


def test_a_sharded_checkpoint() -> None:
    module = LM(HFModel(arch=ARCH))
    module.configure_model()
    network = shards.network_hash((name, p.shape) for name, p in module.named_parameters())
    path = Path("runs/x") / runs.CHECKPOINTS / "step-00000009.ckpt"
    made = shards.temporary(path)
    made.mkdir(parents=True)
    (made / "state").write_text("")
    shards.publish(made, path, world_size=4, stage=2, network=network)
    says(storage.checkpoint(two())[0], ERROR, "DeepSpeed checkpoint", "ddp")
    says(storage.checkpoint(two(strategy="zero3"))[0], ERROR, "saved by zero2", "stage is 3", "--run")
    says(storage.checkpoint(two(strategy="zero2"))[0], ERROR, "4 ranks", "has 2", "--checkpoint.elastic true")
    elastic = CheckpointConfig(elastic=True)
    says(storage.checkpoint(two(strategy="zero2", checkpoint=elastic))[0], OK, "4 ranks", "step 9")
    says(storage.checkpoint(two(strategy="zero2", devices=4))[0], OK, "step 9")
    other = LM(HFModel(arch=ARCH | {"hidden_size": 32}))
    says(storage.checkpoint(two(strategy="zero2", devices=4, module=other))[0], ERROR, "another network", "--run")
    osd = OSDDrafter(draft=HFModel(arch=ARCH))
    says(storage.checkpoint(two(strategy="zero2", devices=4, module=osd))[0], ERROR, "another network (or method)")


# --- data


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


# --- the command


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path, steps=4)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["doctor", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_good_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "-c", "tiny.yaml", "--run", "x", "--json")
    found = {row["check"]: row for row in json.loads(out)}
    assert code == 0 and {row["verdict"] for row in found.values()} == {"ok"}, out
    names = {"slurm", "strategy", "precision", "port", "run folder", "disk", "checkpoint", "tokenizer", "labels"}
    assert names | {"resume", "micro batch", "bf16 inputs"} <= set(found)
    assert not Path("runs/x").exists()  # it looks and leaves nothing
    assert "preparing" in err


def test_without_data_nothing_is_prepared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "-c", "tiny.yaml", "--run", "x", "--no-data")
    assert code == 0 and "labels" not in out and not Path("cache").exists() and err == ""
    assert out.splitlines()[-1] == "0 errors, 0 warnings"


def test_errors_exit_with_2_and_overrides_count(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("-c", "tiny.yaml", "--run", "x", "--no-data", "--trainer.strategy", "zeroo")
    code, out, _ = run(capsys, *argv)
    assert code == 2 and "error    strategy" in out and "1 error, 0 warnings" in out


def test_a_script_with_the_wrong_number_of_tasks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.sbatch").write_text("#!/bin/bash\n#SBATCH --ntasks=4 --ntasks-per-node=4 --requeue --signal=USR1@600\n")
    argv = ["-c", "tiny.yaml", "--run", "x", "--no-data", "--script=x.sbatch"]
    code, out, _ = run(capsys, *argv, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert code == 2 and "SLURM has 4 tasks and the config wants 2 devices x 1 nodes = 2" in out
    code, out, _ = run(capsys, *argv, "--trainer.devices", "4", "--trainer.strategy", "ddp")
    assert code == 0, out


def test_a_head_that_is_too_small_is_found_in_the_config(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--run", "x", "--model.model.arch.vocab_size", "299")
    assert code == 2 and "the tokenizer has 300 ids and the head 299 rows" in out


def test_data_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--run", "x", "--data.corpus.sources", "[nowhere.txt]")
    assert code == 2 and "error    data" in out and "nowhere.txt" in out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ((), "nothing to check"),
        (("-c", "nothing"), "nothing"),
        (("-c", "tiny.yaml", "--script"), "--script wants a file"),
        (("-c", "tiny.yaml", "--script", "none.sbatch"), "none.sbatch"),
        (("--run", "nope"), "nope"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], word: str
) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 2 and word in err and len(err.strip().splitlines()) == 1


def test_a_config_that_fit_would_not_take_is_the_finding(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--run", "x", "--model.optim.lr", "-1")
    assert code == 2 and out.startswith("error    config") and "lr" in out


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "draftsmith doctor -c lm/base" in out


# --- inside fit


def warned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...] = (), **env: str
) -> str:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    doctor.warn_under_slurm(ParseCLI(parse("fit", ["-c", "tiny.yaml", *overrides])), Path("runs/x"))
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_fit_warns_in_a_job_and_nowhere_else(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert warned(capsys, monkeypatch) == ""
    env = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    stub("scontrol", "echo '#SBATCH --requeue'", monkeypatch)
    err = warned(capsys, monkeypatch, **env)
    assert "doctor: slurm tasks: SLURM has 2 tasks and the config wants 1 devices x 1 nodes" in err
    assert "doctor: signal: no --signal" in err
    assert all(line.startswith("doctor: ") for line in err.splitlines())
    assert not Path("cache").exists()  # no data is prepared for it


def test_fit_asks_before_anything_is_built(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(cli: Any, run: Path) -> None:
        raise InvalidValue(f"asked about {run}")

    monkeypatch.setattr(doctor, "warn_under_slurm", stop)
    assert cli.main(["fit", "-c", "tiny.yaml", "--run", "x"]) == 2
    assert "asked about runs/x" in capsys.readouterr().err


def test_yaml_of_a_strategy_class_is_understood(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(Path("tiny.yaml").read_text())
    own = {"class_path": "draftsmith.trainers.strategies.ZeRO", "init_args": {"config": "deepspeed/zero3"}}
    content["trainer"]["strategy"] = own
    Path("tiny.yaml").write_text(yaml.safe_dump(content))
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--run", "x", "--no-data")
    assert code == 0 and "ZeRO stage 3" in out
