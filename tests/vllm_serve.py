"""Run by the vLLM environment's own Python (make vllm-test): serve a target with a draft, print tokens and counts.

Reads one JSON object from standard input: target, draft (or null), method, tokens (draft length), prompts (token ids or
texts), max_new_tokens, max_model_len, traffic (texts) and log (a file) or null: requests served behind the prompts and
logged as the completions endpoint answers them. Prints one JSON object on a line of its own, among the engine's; its
metrics count the prompts alone. Imports neither draftsmith nor tests.
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
    text = isinstance(asked["prompts"][0], str)
    llm = LLM(
        model=asked["target"],
        dtype="float32",
        max_model_len=asked["max_model_len"],
        enforce_eager=True,
        skip_tokenizer_init=not text,
        enable_prefix_caching=False,
        speculative_config=speculative,
        disable_log_stats=False,
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=asked["max_new_tokens"], ignore_eos=True, detokenize=text)
    began = time.perf_counter()
    outputs = llm.generate(
        [{"prompt" if text else "prompt_token_ids": prompt} for prompt in asked["prompts"]], sampling, use_tqdm=False
    )
    seconds = time.perf_counter() - began
    found = {"tokens": [list(out.outputs[0].token_ids) for out in outputs], "seconds": seconds, "metrics": {}}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            found["metrics"][metric.name.removeprefix("vllm:spec_decode_")] = getattr(
                metric, "values", getattr(metric, "value", None)
            )
    if asked["log"] is not None:
        served = llm.generate([{"prompt": prompt} for prompt in asked["traffic"]], sampling, use_tqdm=False)
        found["traffic"] = [[list(out.prompt_token_ids), list(out.outputs[0].token_ids)] for out in served]
        with open(asked["log"], "w", encoding="utf-8") as file:
            for out in served:
                choice = {"index": 0, "text": out.outputs[0].text, "finish_reason": out.outputs[0].finish_reason}
                file.write(json.dumps({"prompt": out.prompt, "choices": [choice]}) + "\n")
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
