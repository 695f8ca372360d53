"""Checks of the SLURM job: tasks, srun, name, requeue, and the time that a save has."""

import shutil

from draftsmith.trainers.checks.finding import Finding, error, ok, warning
from draftsmith.trainers.checks.job import Job
from draftsmith.trainers.checks.storage import save_seconds
from draftsmith.trainers.checks.subject import Subject

_MARGIN = 2.0  # a save may take so many times the estimate before the grace time counts as short


def checks(subject: Subject) -> list[Finding]:
    """All of them; one line outside of SLURM."""
    job = subject.job
    if job is None:
        return [ok("slurm", "no SLURM job around, and no --script given: tasks, srun and signals are not checked")]
    if job.interactive:
        return [name(subject, job)]  # what SLURM has is not what starts here
    return [tasks(subject, job), srun(subject, job), name(subject, job), requeue(job), grace(subject, job)]


def tasks(subject: Subject, job: Job) -> Finding:
    """One task for each rank, the same number on every node."""
    devices, nodes = subject.devices, subject.nodes
    if devices is None:
        return warning(
            "slurm tasks",
            f"trainer.devices is {subject.trainer.devices!r}, which only a machine with the GPUs can count: write the "
            "number of tasks per node",
        )
    wanted, total, per_node = devices * nodes, job.total, job.tasks_per_node
    fix = f"set --ntasks-per-node={devices} --nodes={nodes}, or trainer.devices and trainer.num_nodes to what SLURM has"
    if total is None:
        if wanted == 1:
            return ok("slurm tasks", "one task, one rank")
        return error("slurm tasks", f"the job names no tasks and the config wants {wanted} ranks: {fix}")
    if total != wanted:
        shape = f"{devices} devices x {nodes} nodes = {wanted}"
        return error("slurm tasks", f"SLURM has {total} tasks and the config wants {shape}: {fix}")
    if per_node is None and wanted > 1:
        return error(
            "slurm tasks",
            f"--ntasks={total} without --ntasks-per-node, which Lightning refuses: set --ntasks-per-node={devices}",
        )
    if per_node is not None and per_node != devices:
        return error(
            "slurm tasks", f"SLURM has {per_node} tasks per node and trainer.devices is {devices}, must be equal: {fix}"
        )
    if job.nodes is not None and job.nodes != nodes:
        return error("slurm tasks", f"SLURM has {job.nodes} nodes and trainer.num_nodes is {nodes}: {fix}")
    return ok("slurm tasks", f"{total} tasks for {devices} devices x {nodes} nodes")


def srun(subject: Subject, job: Job) -> Finding:
    """Several ranks are started by srun."""
    several = (subject.world_size or 2) > 1
    if not several:
        return ok("srun", "one rank needs no srun")
    if job.inside and shutil.which("srun") is None:
        return error(
            "srun",
            "no srun on PATH, and only srun starts the other tasks: mount the host's SLURM programs into the "
            "container, or call srun outside of it",
        )
    if subject.starting and not job.in_step:
        return warning(
            "srun", f"not started by srun: write 'srun draftsmith fit ...', so that all {subject.world_size} ranks run"
        )
    return ok("srun", "found" if job.inside else "is the script's business: it must call 'srun draftsmith fit ...'")


def name(subject: Subject, job: Job) -> Finding:
    """A job called bash or interactive is a shell to Lightning and to us."""
    if not job.interactive:
        return ok("slurm name", f"job name {job.name!r}" if job.name else "no job name: SLURM takes the script's")
    text = (
        f"job name {job.name!r} means a shell: SLURM's tasks are not used and nothing is requeued; choose another "
        "--job-name"
    )
    return (error if (subject.world_size or 2) > 1 else warning)("slurm name", text)


def requeue(job: Job) -> Finding:
    """A preempted run goes back into the queue by itself."""
    if not job.script_known:
        return warning(
            "requeue",
            "the job's script cannot be read (no scontrol, or no batch script): make sure that it has --requeue and "
            "--signal=SIGUSR1@SECONDS",
        )
    if job.requeue is False:
        return warning("requeue", "--no-requeue: a preempted run stays away; use --requeue")
    if job.requeue is None:
        return warning("requeue", "no --requeue in the script, so the cluster's rule decides: add #SBATCH --requeue")
    if job.inside and shutil.which("scontrol") is None:
        return warning(
            "requeue",
            "no scontrol on PATH, and the run requeues itself by it: mount the host's into the container; without it a "
            "preempted run saves and ends",
        )
    return ok("requeue", "--requeue is set" + (", scontrol is there" if job.inside else ""))


def grace(subject: Subject, job: Job) -> Finding:
    """SIGUSR1 comes to every task, early enough for a save."""
    check = "signal"
    if not job.script_known:
        return warning(check, "the job's signal cannot be read: add #SBATCH --signal=SIGUSR1@SECONDS")
    if job.signal is None:
        return warning(
            check, "no --signal: at the time limit the run dies unsaved; add #SBATCH --signal=SIGUSR1@120 (or more)"
        )
    if job.signal_name not in ("USR1", "10"):
        return error(
            check, f"--signal={job.signal}: fit saves and requeues on SIGUSR1 alone; write --signal=SIGUSR1@{job.grace}"
        )
    if "B" in job.signal.rpartition(":")[0]:
        return error(
            check,
            f"--signal={job.signal}: with B: only the batch shell gets it, no task does; write SIGUSR1@{job.grace}",
        )
    needed, how = save_seconds(subject)
    assert job.grace is not None
    if job.grace < needed:
        fix = f"write --signal=SIGUSR1@{int(_MARGIN * needed) + 30}"
        return error(check, f"{job.grace} s of grace, and a save takes about {needed:.0f} s ({how}): {fix}")
    if job.grace < _MARGIN * needed:
        return warning(
            check, f"{job.grace} s of grace is little for a save of about {needed:.0f} s ({how}): give twice as much"
        )
    return ok(check, f"SIGUSR1, {job.grace} s of grace for a save of about {needed:.1f} s ({how})")
