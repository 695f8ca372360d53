"""Run by the vLLM environment's own Python (make vllm-test): serve a target with a draft, print tokens and counts.

Reads one JSON object from standard input: target, draft (or null), method, tokens (draft length), prompts (token ids),
max_new_tokens, max_model_len. Prints one JSON object on a line of its own, among the engine's.
Imports neither draftsmith nor tests.
"""

import json
import sys
import time


def main() -> None:
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    speculative = None
    if asked["draft"] is not None:
        speculative = {"model": asked["draft"], "num_speculative_tokens": asked["tokens"], "method": asked["method"]}
    llm = LLM(
        model=asked["target"],
        dtype="float32",
        max_model_len=asked["max_model_len"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        speculative_config=speculative,
        disable_log_stats=False,
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=asked["max_new_tokens"], ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    found = {"tokens": [list(out.outputs[0].token_ids) for out in outputs], "seconds": seconds, "metrics": {}}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            found["metrics"][metric.name.removeprefix("vllm:spec_decode_")] = getattr(
                metric, "values", getattr(metric, "value", None)
            )
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
