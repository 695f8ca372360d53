"""vLLM's OpenAI server out of its own environment (make vllm-test): started, asked, counted and ended by the tests."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.figures import ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
SECONDS = 420


class Server:
    """vLLM's OpenAI server on this machine, with the draft; a context manager."""

    def __init__(self, target: Path, draft: Path, length: int, log: Path) -> None:
        """length: tokens drafted per round. log: a file for what the server says."""
        self.length = length
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        speculative = {"model": str(draft), "num_speculative_tokens": length, "method": "draft_model"}
        words = ["--model", str(target), "--served-model-name", "target", "--host", "127.0.0.1", "--port", port]
        words += ["--max-model-len", "128", "--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"]
        words += ["--speculative-config", json.dumps(speculative)]
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [str(PYTHON), "-P", "-m", "vllm.entrypoints.openai.api_server", *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # its engine is a process of its own: both end together
            )

    def __enter__(self) -> "Server":
        until = time.monotonic() + SECONDS
        try:
            while True:
                try:
                    self.get("/health")
                    return self
                except OSError:
                    assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-2000:]
                    time.sleep(0.5)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):  # what is left is killed below
            self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def get(self, path: str) -> str:
        with self.opener.open(self.url + path, timeout=60) as reply:
            return str(reply.read().decode())

    def complete(self, prompts: list[str], tokens: int) -> list[dict[str, Any]]:
        """Greedy answers of `tokens` tokens; each request with its reply in one object, as a line of a log."""

        def one(prompt: str) -> dict[str, Any]:
            ask = {"model": "target", "prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
            body = json.dumps({**ask, "return_token_ids": True}).encode()
            wanted = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
            with self.opener.open(wanted, timeout=SECONDS) as reply:
                row: dict[str, Any] = ask | json.load(reply)
                return row

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(one, prompts))

    def counts(self) -> tuple[int, list[int]]:
        """(rounds, accepted at each position) since the start, as the server counts them."""
        time.sleep(1)  # the last step is counted behind its reply
        found = re.findall(
            r"^vllm:spec_decode_(num_drafts|num_accepted_tokens_per_pos)_total(\{.*\}) (\S+)$",
            self.get("/metrics"),
            re.M,
        )
        places = {
            re.findall(r'position="(\d+)"', labels)[0]: value for name, labels, value in found if name != "num_drafts"
        }
        (rounds,) = (value for name, _, value in found if name == "num_drafts")
        return int(float(rounds)), [int(float(places[str(place)])) for place in range(self.length)]
