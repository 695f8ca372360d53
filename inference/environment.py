"""What a measurement ran on: processor, threads, library versions, the commit. Reports and figures carry it."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "draftsmith",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "lightning",
    "deepspeed",
    "scikit-learn",
    "mauve-text",
)


def cpu_model() -> str:
    """The processor's marketing name; the machine type (x86_64, arm64) where the system does not tell it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, operating system. JSON-ready."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": cpu_model(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def versions() -> dict[str, str]:
    """Python and the installed ones of LIBRARIES, without importing any."""
    found = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an optional extra
    return found


def git(root: Path, *arguments: str) -> str | None:
    """The output of one git command in `root`; None where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def blob_hash(path: Path) -> str:
    """The name that git gives to the file's content (SHA-1 of a blob), without asking git."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
