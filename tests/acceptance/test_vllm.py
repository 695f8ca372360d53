"""Our exports in vLLM on the CPU (make vllm-test): the same greedy tokens, the same accepted counts at each position;
and the loop from the served log back to a better draft.

vLLM pins other versions of the libraries, so it runs in an environment of its own (.venv-vllm) as a subprocess; without
that environment the tests are skipped. Its CPU kernels need heads of 32 or more, so the pair is trained here: about
five minutes on one core with the engine's starts.
"""

import json
import os
import string
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.data.request_logs import RequestLog
from draftsmith.data.tokenizer import MIN_VOCAB, load_tokenizer, train_bpe
from draftsmith.inference import registry
from draftsmith.inference.drafters.eagle import EagleTreeDrafter
from draftsmith.inference.formats import convert, read_drafter
from draftsmith.inference.formats.record import EagleConfig
from draftsmith.inference.loader import LoadedPart, load
from draftsmith.inference.nets.eagle_head import EagleHead, load_tensors
from draftsmith.inference.requests import DecodeResult, TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree_policies.chain import ChainPolicy
from tests import trained_eagles, word_grammar
from tests.figures import ROOT, record
from tests.vllm_server import ENVIRONMENT, PYTHON, SECONDS, Server

SLUG = "vllm"
FILES = ("inference/formats/*.py", "inference/decoders/*.py", "inference/drafters/*.py", "inference/nets/*.py")
LEARNING = ("modules/osd_drafter.py", "data/corpus.py", "data/text.py", "data/*log*.py", "trainers/export.py")
DRAFT, NEW, PROMPTS = 4, 48, 24
TRAFFIC = 192  # requests of the log
LETTERS = string.ascii_letters + string.digits + "+/"  # the grammar's ids as text

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed: make vllm-test puts it into .venv-vllm"),
]
GREEDY = SamplingParams(temperature=0.0)
# Over osd/offline: a pair and a log of this size.
SMALL = """
trainer:
  accelerator: cpu
  max_epochs: 16
  accumulate_grad_batches: 1
  check_val_every_n_epoch: 8
  val_check_interval: 1.0
  callbacks:
    - class_path: draftsmith.trainers.callbacks.acceptance.AcceptanceEval
      init_args: {requests: 8, prompt_length: 16, max_new_tokens: 32, temperature: 0.0}
model:
  init_args:
    draft: {path: draft}
    teacher: {path: target}
    optim: {lr: 3.0e-3, warmup_steps: 5}
data:
  init_args:
    corpus: {sources: ["log:served.jsonl"], dedup: null, val_fraction: 0.1}
    text: {tokenizer: target, length: 64, batch_size: 16}
checkpoint: {every_n_steps: 1000}
"""


def trained_lm(out: Path, layers: int, width: int, steps: int, seed: int, tokenizer: Any = None) -> Path:
    """A Llama of heads of 32 on the word grammar, as a Hugging Face directory; with a tokenizer, on its text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=word_grammar.VOCAB if tokenizer is None else len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=word_grammar.PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, word_grammar.PEAK, total_steps=steps)
    grammar = word_grammar.Grammar()
    letters = None if tokenizer is None else torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS)))
    for step in range(steps):
        ids = word_grammar.batch(grammar, step)
        ids = ids if letters is None else letters[ids]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedPart:
    return load(trained_lm(tmp_path_factory.mktemp("vllm") / "target", layers=8, width=64, steps=300, seed=0))


@cache
def prompts() -> list[list[int]]:
    return word_grammar.Grammar().sample(PROMPTS, 16, seed=77)


def serve(target: Path, draft: Path | None, method: str | None) -> dict[str, Any]:
    """What vLLM makes of the prompts."""
    asked = {
        "target": str(target),
        "draft": None if draft is None else str(draft),
        "method": method,
        "tokens": DRAFT,
        "prompts": prompts(),
        "max_new_tokens": NEW,
        "max_model_len": 128,
    }
    done = subprocess.run(
        [str(PYTHON), "-P", str(ROOT / "tests" / "vllm_serve.py")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"tokens"')))
    return found


def ours(decoder: Any) -> DecodeResult:
    requests = [TokenRequest(ids, NEW, row_id=i) for i, ids in enumerate(prompts())]
    found: DecodeResult = decoder.decode(requests)
    return found


def compare(name: str, theirs: dict[str, Any], mine: DecodeResult, plain: DecodeResult) -> None:
    """Same tokens; at each position the accepted shares within the intervals of both."""
    assert mine.output == plain.output
    same = [a == b for a, b in zip(theirs["tokens"], mine.output, strict=True)]
    metrics = theirs["metrics"]
    whole = [(n, k) for n, k in zip(mine.rounds.drafted, mine.rounds.accepted, strict=True) if n == DRAFT]
    figures: dict[str, Any] = {f"{name}: equal greedy texts": {"value": sum(same) / len(same), "need": "== 1"}}
    gaps = []
    for place in range(DRAFT):
        a, b = int(metrics["num_accepted_tokens_per_pos"][place]), sum(k > place for _, k in whole)
        one, two = a / metrics["num_drafts"], b / len(whole)
        spread = 1.96 * sum(p * (1 - p) / n for p, n in ((one, metrics["num_drafts"]), (two, len(whole)))) ** 0.5
        figures[f"{name}: accepted at position {place + 1}, vLLM"] = one
        figures[f"{name}: accepted at position {place + 1}, ours"] = two
        gaps.append(abs(one - two) - spread)
    figures[f"{name}: positions outside the interval"] = {"value": sum(gap > 0 for gap in gaps), "need": "== 0"}
    print(figures, metrics["num_drafts"], len(whole))
    record(SLUG, figures, (0,), FILES)
    assert all(same), f"{len(same) - sum(same)} of {len(same)} texts differ"
    assert max(gaps) <= 0, figures


@pytest.fixture(scope="module")
def plain(target: LoadedPart) -> DecodeResult:
    return ours(registry.build("autoregressive", {"target": target}, sampling=GREEDY))


def test_language_model_draft(target: LoadedPart, plain: DecodeResult, tmp_path: Path) -> None:
    trained = trained_lm(tmp_path / "draft", layers=2, width=32, steps=150, seed=1)
    convert(trained, tmp_path / "out", "hf", measured={"draft_length": DRAFT})
    theirs = serve(target.path, tmp_path / "out", "draft_model")
    parts = {"target": target, "draft": load(tmp_path / "out")}
    settings = {"draft_length": DRAFT, "fallback": "never"}
    mine = ours(registry.build("speculative", parts, sampling=GREEDY, settings=settings))
    compare("LM draft", theirs, mine, plain)


def test_eagle3_export(target: LoadedPart, plain: DecodeResult, tmp_path: Path) -> None:
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
    trained = trained_eagles.train(trained_eagles.Recipe(loss="kl", steps=150, net=heads), target)
    (tmp_path / "head").mkdir()
    trained_eagles.write(trained, tmp_path / "head", target.path)
    theirs = serve(target.path, tmp_path / "head", "eagle3")
    found = read_drafter(tmp_path / "head")
    assert isinstance(found.fields, EagleConfig)
    head = EagleHead(found.fields)
    load_tensors(head, found.tensors, "the export")
    head.eval().requires_grad_(False).fuse()
    drafter = EagleTreeDrafter(head, ChainPolicy(DRAFT), target=target.part)
    parts = {"target": target, "draft": drafter}
    mine = ours(
        registry.build("tree", parts, sampling=GREEDY, settings={"policy": "chain", "nodes": DRAFT, "depth": DRAFT})
    )
    compare("EAGLE-3", theirs, mine, plain)


def texts(count: int, seed: int) -> list[str]:
    """Prompts as text, one letter per token of the grammar."""
    return ["".join(LETTERS[i] for i in ids) for ids in word_grammar.Grammar().sample(count, 16, seed=seed)]


def draftsmith(place: Path, *words: str) -> None:
    """A command as a user types it, in `place`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DRAFTSMITH_CACHE": str(place / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "draftsmith.inference.cli", *words],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_log_of_the_server_teaches_the_draft_and_its_export_goes_back(tmp_path: Path) -> None:
    """The loop of docs/interop.md: serve with a poor draft, distil it on the served log, export, serve with the export.

    Accepted shares are those of requests that are not in the log.
    """
    letters = train_bpe([LETTERS], MIN_VOCAB)  # no merges: a letter is a token
    target = trained_lm(tmp_path / "target", layers=8, width=64, steps=200, seed=0, tokenizer=letters)
    draft = trained_lm(tmp_path / "draft", layers=2, width=32, steps=40, seed=1, tokenizer=letters)
    asked, log = texts(PROMPTS, seed=77), tmp_path / "served.jsonl"
    with Server(target, draft, DRAFT, tmp_path / "before.log") as server:
        first = server.complete(asked, NEW)
        before = server.counts()
        rows = server.complete(texts(TRAFFIC, seed=78), NEW)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    choices = [row["choices"][0] for row in rows]
    served = [(tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"])) for choice in choices]
    source = RequestLog([log], load_tokenizer(target), max_length=256)
    assert [(item.request.prompt, item.answer) for item in source.read()] == served  # token by token

    (tmp_path / "small.yaml").write_text(SMALL, "utf-8")
    draftsmith(tmp_path, "fit", "-c", "osd/offline", "-c", "small.yaml", "--run", "runs/loop")
    draftsmith(tmp_path, "export", "runs/loop", "new")
    with Server(target, tmp_path / "new", DRAFT, tmp_path / "after.log") as server:
        second = server.complete(asked, NEW)
        after = server.counts()

    figures: dict[str, Any] = {}
    for name, (rounds, accepted) in (("before", before), ("after", after)):
        for place, count in enumerate(accepted, 1):
            figures[f"loop: accepted at position {place}, {name}"] = count / rounds
    old, new = (figures[f"loop: accepted at position 1, {name}"] for name in ("before", "after"))
    spread = 1.96 * sum(p * (1 - p) / n for p, n in ((old, before[0]), (new, after[0]))) ** 0.5
    tokens = [[row["choices"][0]["token_ids"] for row in answered] for answered in (first, second)]
    same = [a == b for a, b in zip(*tokens, strict=True)]
    figures["loop: equal greedy texts"] = {"value": sum(same) / len(same), "need": "== 1"}
    figures["loop: rise at position 1"] = {"value": new - old, "low": new - old - spread, "high": new - old + spread}
    figures["loop: low end of the rise at position 1"] = {"value": new - old - spread, "need": "> 0"}
    figures["loop: requests in the log"] = len(rows)
    print(figures, before, after)
    record(SLUG, figures, (0,), (*FILES, *LEARNING, "configs/osd/offline.yaml"))
    assert all(same), f"{len(same) - sum(same)} of {len(same)} texts differ"
    assert new - old > spread, figures
