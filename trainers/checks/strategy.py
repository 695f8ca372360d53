"""Checks of how the ranks share the state: the strategy, DeepSpeed's config, number formats, the port they meet at."""

import socket

from draftsmith.inference.errors import UserError
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.trainers import networks
from draftsmith.trainers.checks.finding import Finding, error, ok, warning
from draftsmith.trainers.checks.subject import Subject
from draftsmith.trainers.strategies import check as check_strategy
from draftsmith.trainers.strategies import need_deepspeed

# Families whose published weights were trained in float16 or are known to stay within its range.
_FP16_SAFE = frozenset({"gpt2", "opt", "gpt_neox", "gptj", "bloom", "codegen"})
_PORT_BASE = 15000  # Lightning's port under SLURM is this plus the last four digits of the job


def checks(subject: Subject) -> list[Finding]:
    """All of them."""
    return [strategy(subject), *deepspeed(subject), *precision(subject), port(subject)]


def strategy(subject: Subject) -> Finding:
    """A strategy that exists, for as many ranks as there are."""
    asked, world = subject.trainer.strategy, subject.world_size
    if not isinstance(asked, str):
        if subject.strategy == "DeepSpeedStrategy":
            return error(
                "strategy",
                "trainer.strategy is Lightning's own DeepSpeedStrategy, whose checkpoints cannot be resumed or "
                "exported here: write zero1, zero2 or zero3, or the class draftsmith.trainers.strategies.ZeRO",
            )
        return ok("strategy", f"{subject.strategy}")
    try:
        check_strategy(asked, subject.trainer.accelerator, "32-true")
    except UserError as e:
        return error("strategy", str(e))
    if asked.startswith("single") and (world or 1) > 1:
        return error(
            "strategy", f"trainer.strategy {asked!r} is for one process and there are {world}: choose ddp or zero2"
        )
    return ok("strategy", f"{asked}, {'an unknown number of' if world is None else world} ranks")


def deepspeed(subject: Subject) -> list[Finding]:
    """The extra is there, and the config has no keys that fight the trainer. Nothing for other strategies."""
    try:
        config = subject.deepspeed
        if config is None:
            return []
        need_deepspeed(f"trainer.strategy {subject.strategy}")
    except UserError as e:
        return [error("deepspeed", str(e))]
    zero = config["zero_optimization"]
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        return [
            error(
                "deepspeed",
                f"offload_optimizer to {offload} with torch's AdamW, which DeepSpeed refuses: set "
                '"zero_force_ds_cpu_optimizer": false in the DeepSpeed config',
            )
        ]
    if (zero.get("offload_param") or {}).get("device", "none") != "none" and zero["stage"] != 3:
        return [error("deepspeed", f"offload_param works in stage 3 only, and the stage is {zero['stage']}: remove it")]
    if subject.trainer.gradient_clip_algorithm == "value" and subject.trainer.gradient_clip_val:
        return [
            error("deepspeed", "DeepSpeed clips by norm only: set trainer.gradient_clip_algorithm to norm (or null)")
        ]
    drafts = getattr(subject.module, "draft_keys", ())
    if len(drafts) > 1:
        return [error("deepspeed", f"{len(drafts)} drafts cannot train under DeepSpeed: set trainer.strategy to ddp")]
    fault = (_third_stage(subject) if zero["stage"] == 3 else None) or _partitioned_teacher(subject, zero["stage"])
    if fault is not None:
        return [error("deepspeed", fault)]
    return [ok("deepspeed", f"ZeRO stage {zero['stage']}" + (f", optimizer on {offload}" if offload != "none" else ""))]


def _third_stage(subject: Subject) -> str | None:
    """What ZeRO-3 cannot train."""
    if isinstance(subject.module, EagleDrafter):
        return "an EAGLE head is small and runs many times a step, which ZeRO-3 cannot: set trainer.strategy to zero2"
    source = getattr(subject.module, "source", "teacher")
    if source != "teacher":
        return (
            f"model.source {source} decodes in the training step, which ZeRO-3 cannot: set trainer.strategy to zero2, "
            "or model.source to teacher"
        )
    return None


def _partitioned_teacher(subject: Subject, stage: int) -> str | None:
    """Why a teacher cannot be shared among the ranks."""
    if not subject.partition_teacher:
        return None
    if stage < 3:
        return f"partition_teacher needs ZeRO-3 and the stage is {stage}: take deepspeed/zero3, or set it to false"
    if getattr(subject.module, "teacher_spec", None) is None:
        return f"partition_teacher is set and {type(subject.module).__name__} has no teacher: set it to false"
    if subject.has_callback("AcceptanceEval"):
        return (
            "AcceptanceEval decodes with the teacher, which one in pieces cannot: remove the callback, or set "
            "partition_teacher to false"
        )
    return None


def precision(subject: Subject) -> list[Finding]:
    """A number format that the networks bear."""
    asked = str(subject.trainer.precision or "32-true")
    families = sorted({networks.family(net) for net in subject.nets.values()})
    if asked.startswith("16"):
        unsafe = [name for name in families if name not in _FP16_SAFE]
        if unsafe:
            return [
                error(
                    "precision",
                    f"trainer.precision {asked}: {', '.join(unsafe)} are trained in bfloat16 and overflow float16 "
                    "(largest number 65504); set bf16-mixed, or 32-true",
                )
            ]
    found = [ok("precision", f"{asked} for {', '.join(families)}")]
    for prefix, net in subject.nets.items():
        for dtype in sorted({str(p.dtype).removeprefix("torch.") for p in networks.trained_parameters(net)}):
            if dtype != "float32":
                fix = "set its dtype to float32 and trainer.precision to bf16-mixed"
                text = f"{prefix.rstrip('.')} keeps its weights in {dtype}: AdamW's small steps vanish in it; {fix}"
                found.append((error if dtype == "float16" else warning)("weights", text))
    return found


def port(subject: Subject) -> Finding:
    """Several ranks meet at a port of the first one's host."""
    if subject.world_size == 1:
        return ok("port", "one rank meets nobody")
    given, number = subject.env.get("MASTER_PORT"), None if subject.job is None else subject.job.number
    if given is not None and not given.isdecimal():
        return error("port", f"MASTER_PORT is {given!r}, must be a number from 1024 to 65535: unset it or choose one")
    if given is None and number is None:
        return ok("port", "MASTER_PORT is not set: a free one is chosen")
    at = int(given) if given is not None else _PORT_BASE + int(number[-4:]) if number else 0
    if not 1 <= at <= 65535:
        return error("port", f"MASTER_PORT is {at}, must be from 1024 to 65535: unset it or choose one")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that is only waiting to close is free
        try:
            probe.bind(("", at))
        except OSError as e:
            return error(
                "port",
                f"port {at} of this host cannot be used ({e.strerror}): set MASTER_PORT to a free one, 1024 to 65535",
            )
    return ok("port", f"{at} is free on this host")
