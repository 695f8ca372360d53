"""Real `draftsmith fit` runs of seconds, in processes of their own."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "draftsmith.inference.cli"]
TIMEOUT = 240
ARCH = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make_place(place: Path, steps: int) -> Path:
    """A working directory with a small corpus, a config for it (tiny.yaml), and a data cache of its own."""
    (place / "text").mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(120)]
    for i in range(24):
        (place / "text" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=300)))
    (place / "tiny.yaml").write_text(yaml.safe_dump(tiny(place, steps)))
    return place


def tiny(place: Path, steps: int) -> dict[str, Any]:
    """A one-layer model on that corpus, seconds to train."""
    corpus = {"sources": [str(place / "text")], "dedup": None, "val_fraction": 0.2}
    text = {"tokenizer": "bpe:300", "length": 32, "batch_size": 4, "cache_dir": str(place / "cache")}
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "val_check_interval": 6,
            "limit_val_batches": 2,
            "log_every_n_steps": 1,
        },
        "model": {
            "class_path": "draftsmith.modules.lm.LM",
            "init_args": {"model": {"arch": dict(ARCH)}, "optim": {"lr": 0.01, "warmup_steps": 3}},
        },
        "data": {
            "class_path": "draftsmith.data.text.TextDataModule",
            "init_args": {"corpus": corpus, "text": text},
        },
        "checkpoint": {"every_n_steps": 5},
    }


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """`draftsmith ARGUMENTS` in `place`, as the leader of a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_JOB_ID"):
        environment.pop(name, None)
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Its (stdout, stderr) once it has ended with exit code `code`."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err
