"""A real SLURM of two nodes on this machine, in a temporary directory: munged, slurmctld, two slurmd, stopped by pid.

Needs root and the packages slurm-wlm and munge; `make slurm-test` sees to both.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = ("n1", "n2")
HOSTS = Path("/etc/hosts")
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
# Nodes of a cluster in sizes that the shipped scripts ask for; nothing checks them against this machine.
GPUS = 8
SIZE = f"CPUs=64 RealMemory=1000 Gres=gpu:{GPUS}"


def missing() -> str | None:
    """Why no cluster can run here, in one line; None when it can."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"no {', '.join(lacking)} on PATH: run make slurm-test as root, which installs slurm-wlm and munge"
    if os.geteuid() != 0:
        return "the SLURM tests need root: slurmd starts jobs for others, and /etc/hosts gets the nodes' names"
    return None


def wait_until(what: str, check: Callable[[], bool], seconds: float, every: float = 0.2) -> None:
    """Wait for `check()`; an AssertionError names what did not happen."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"after {seconds} s: {what}"
        time.sleep(every)


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """The running cluster; commands are run with its SLURM_CONF."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.conf = directory / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def configure(self) -> None:
        host, here = socket.gethostname().partition(".")[0], self.directory
        control, *ports = _ports(1 + len(NODES))
        (here / "state").mkdir()
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {SIZE}"
            for node, port in zip(NODES, ports, strict=True)
        ]
        lines = [
            "ClusterName=draftsmith",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={control}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={here}/munge.socket",
            "CredType=cred/munge",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={here}/state",
            f"SlurmdSpoolDir={here}/spool-%n",
            f"SlurmctldPidFile={here}/slurmctld.pid",
            f"SlurmdPidFile={here}/slurmd-%n.pid",
            f"SlurmctldLogFile={here}/slurmctld.log",
            f"SlurmdLogFile={here}/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "ReturnToService=2",
            "JobRequeue=1",
            "MpiDefault=none",
            "SlurmdParameters=config_overrides",
            "GresTypes=gpu",
            "KillWait=10",
            "OverTimeLimit=1",  # the notice may come with the last check before the limit
            *nodes,
            f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=60 State=UP",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        devices = here / "gpu"  # a GPU needs a device file; any file is taken for one
        for i in range(GPUS):
            Path(f"{devices}{i}").touch()
        names = ",".join(NODES)
        (here / "gres.conf").write_text(f"AutoDetect=off\nNodeName={names} Name=gpu File={devices}[0-{GPUS - 1}]\n")

    def start(self) -> None:
        self.configure()
        here = self.directory
        key = here / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        private = [f"--{option}={here}/munge.{end}" for option, end in files.items()]
        # --force: the key lies in a temporary directory. A munged that runs already is left alone.
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *private)
        wait_until("munged has no socket", (here / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, "-f", str(self.conf))
        wait_until("the nodes are not idle", lambda: self.states() == {node: "idle" for node in NODES}, 60)

    def _daemon(self, *command: str) -> None:
        with (self.directory / f"{command[0]}-{len(self.daemons)}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,  # what is sent to make's process group must not end it before `stop`
                )
            )

    def stop(self) -> None:
        """End the jobs, then the daemons that we started, the last one first."""
        if len(self.daemons) == 2 + len(NODES):
            self.run("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 30
            while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        """Processes of ours that outlived their daemons: slurmstepd and jobs; they carry our SLURM_CONF."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run a command of the cluster; stdout and stderr together."""
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """State of each node: idle, mixed, drained ..."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).splitlines()
        return dict(line.split(maxsplit=1) for line in lines if len(line.split()) == 2)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of one job or task of an array: {"JobState": "RUNNING", ...}."""
        first = self.run("scontrol", "show", "job", "-o", number).splitlines()[0]
        return dict(word.split("=", 1) for word in first.split() if "=" in word)

    def wait_for(self, number: str, state: str, seconds: float = 60) -> dict[str, str]:
        """Wait until a job is in a state. Fails early when it has ended in another one."""
        ended = 0

        def reached() -> bool:
            nonlocal ended
            job = self.job(number)
            now = job["JobState"]
            # on its way back into the queue a job shows other states for a moment
            ended = ended + 1 if now in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED", "NODE_FAIL") else 0
            assert now == state or ended < 50, job
            return now == state

        wait_until(f"job {number} is not {state}: {self.job(number)}", reached, seconds)
        return self.job(number)

    def start_now(self, number: str) -> None:
        """SLURM holds a requeued job for two minutes; this lets it start as soon as its node has cleaned up.

        Started in the same second on the same node, it met the old script's leftovers and failed, five times in seven.
        """
        time.sleep(3.0)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that is stopped whatever happens within. Its logs stay when it could not start."""
    names = {name for line in HOSTS.read_text().splitlines() for name in line.partition("#")[0].split()[1:]}
    if not set(NODES) <= names:  # Lightning takes the main address from the node list
        with HOSTS.open("a") as file:
            file.write(f"127.0.0.1 {' '.join(NODES)}\n")
    directory = Path(tempfile.mkdtemp(prefix="draftsmith-slurm-"))
    made = Cluster(directory)
    try:
        made.start()
        yield made
    except BaseException:
        print(f"the cluster's logs are in {directory}")
        raise
    finally:
        made.stop()
    shutil.rmtree(directory)
