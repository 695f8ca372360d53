"""vLLM's speed on the table's pair: its plain decoding, our EAGLE-3 export, our draft, and its n-gram lookup.

vLLM pins other versions of the libraries, so this file is also the script that its own environment's Python runs
(`make vllm-test` makes .venv-vllm): then it reads one JSON object from standard input, prints one on a line of its own,
and imports neither draftsmith nor torch. Timed apart from the table, in its own processes, one start for each way
of drafting, on prompts of the table, with its lengths and repetitions.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARK = "VLLM-ROWS "
FEW = 4  # prompts of a repetition at batch 1
SECONDS = 420  # one start and its runs
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def time_rows(
    python: Path,
    target: Path,
    speculative: dict[str, Any] | None,
    prompts: Sequence[Sequence[Sequence[int]]],  # of every repetition
    tokens: int,
    runs: Sequence[tuple[float, int]],  # (temperature, batch)
) -> dict[str, Any]:
    """{"temperature-batch": {"tokens": per repetition, "seconds": the same}}; {"why": what it said} where it cannot."""
    asked = {
        "target": str(target),
        "speculative": speculative,
        "prompts": [[list(ids) for ids in share] for share in prompts],
        "max_new_tokens": tokens,
        "runs": list(runs),
    }
    done = subprocess.run(
        [str(python), "-P", __file__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **ENVIRONMENT},
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    said = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
    return {"why": said[-1].strip()[:200] if said else f"exit code {done.returncode}"}


def serve() -> None:
    """In vLLM's environment."""
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]  # of another environment

    llm = LLM(
        model=asked["target"],
        dtype="float32",
        max_model_len=128,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # the same prompts come again
        speculative_config=asked["speculative"],
        seed=0,
    )
    found = {}
    for temperature, batch in asked["runs"]:
        sampling = SamplingParams(
            temperature=temperature, max_tokens=asked["max_new_tokens"], ignore_eos=True, detokenize=False
        )
        tokens, seconds = [], []
        for share in (asked["prompts"][0][:batch], *asked["prompts"]):  # the first one warms up
            share = share[: max(FEW, batch)]
            made, begin = 0, time.perf_counter()
            for first in range(0, len(share), batch):
                some = [{"prompt_token_ids": ids} for ids in share[first : first + batch]]
                made += sum(len(out.outputs[0].token_ids) for out in llm.generate(some, sampling, use_tqdm=False))
            tokens.append(made)
            seconds.append(time.perf_counter() - begin)
        found[f"{temperature:g}-{batch}"] = {"tokens": tokens[1:], "seconds": seconds[1:]}
    print(f"\n{MARK}{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    serve()
