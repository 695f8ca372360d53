"""Acceptance of block verification: its Small-scale items 1 (enumeration) and 2 (a trained pair), with figures.

Item 2's drafts come from a one-layer language model and not from a block drafter, which is another system: each draft
is then conditioned on the drafted tokens before it. Alone about three minutes on one core, most of it training.
"""

import itertools
import math
import random
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from draftsmith.inference import registry
from draftsmith.inference.acceptance import verify
from draftsmith.inference.block_verification import expected_accepted, verify_block
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.requests import RoundView, TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.traversal_verification import verify_traversal
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_verification import verify_tree
from tests import exact_rules as exact
from tests.acceptance.test_speculative_sampling import library_text
from tests.figures import DECODING, record

SLUG = "block-verification"
FILES = (*DECODING, "inference/block_verification.py", "inference/traversal_verification.py", "inference/tree*.py")
PAIRS, CONTEXTS, DRAFTED = 60, 1024, 5

pytestmark = pytest.mark.acceptance


def expected_weight(p: exact.Table, q: exact.Table, vocab: int, g: int) -> Fraction:
    """sum_i E_q[w_i]."""
    total = Fraction(0)
    for x in itertools.product(range(vocab), repeat=g):
        drafted = Fraction(1)
        for i, t in enumerate(x):
            drafted *= q[x[:i]][t]
        if drafted:
            total += drafted * sum(exact.weights_of(x, p, q)[1:])
    return total


def height(shape: exact.Shape, v: int = 0) -> int:
    return max((1 + height(shape, c) for c in shape.get(v, [])), default=0)


def test_enumeration() -> None:
    """Guarantees 1 to 5 and the negative controls, in rationals."""
    begin = time.perf_counter()
    rng = random.Random(0)
    wrong, gains, equal_at_one = 0, [], 0
    for _ in range(PAIRS):
        vocab = rng.choice((2, 3))
        g = rng.randint(1, 4)
        p, q = exact.random_table(rng, vocab, g), exact.random_table(rng, vocab, g)
        emitted, length = exact.block_rule(p, q, vocab, g)
        token = exact.token_rule_length(p, q, vocab, g)
        wrong += exact.completed(emitted, p, vocab, g + 1) != exact.string_law(p, vocab, g + 1)
        wrong += length != expected_weight(p, q, vocab, g) or length < token or (g == 1 and length != token)
        equal_at_one += g == 1
        if token:
            gains.append(float(length / token))
    one_hot = 0
    for _ in range(20):
        p = exact.random_table(rng, 3, 3)
        q = {x: exact.normalised([Fraction(v == t) for v in range(3)]) for x in p for t in [rng.randrange(3)]}
        one_hot += exact.block_rule(p, q, 3, 3)[1] == exact.token_rule_length(p, q, 3, 3)
    detected = dict.fromkeys(exact.MUTANTS, 0)
    for _ in range(30):
        p, q = exact.random_table(rng, 3, 3), exact.random_table(rng, 3, 3)
        for mutant in exact.MUTANTS:
            emitted, _ = exact.block_rule(p, q, 3, 3, mutant)
            detected[mutant] += exact.completed(emitted, p, 3, 4) != exact.string_law(p, 3, 4)
    trees, tree_wrong, tree_gains = 0, 0, []
    for (name, shape), replace in itertools.product(exact.SHAPES.items(), (True, False)):
        done = 0
        while done < 6:
            deep = height(shape)
            p, q = exact.random_table(rng, 2, deep), exact.random_table(rng, 2, deep)
            emitted, length = exact.tree_rule(exact.traversal_rule, shape, p, q, 2, replace)
            if emitted is None:
                continue
            done, trees = done + 1, trees + 1
            _, token = exact.tree_rule(exact.recursive_rule, shape, p, q, 2, replace)
            tree_wrong += exact.completed(emitted, p, 2, deep + 1) != exact.string_law(p, 2, deep + 1)
            tree_wrong += length < token
            if token:
                tree_gains.append(float(length / token))
        assert name
    seconds = time.perf_counter() - begin
    record(
        SLUG,
        {
            f"enumeration, {PAIRS} pairs: mismatches": {"value": wrong, "need": "== 0"},
            "enumeration: mean length, block over token": sum(gains) / len(gains),
            "enumeration: largest length, block over token": max(gains),
            "one-hot drafts: pairs of 20 with equal length": {"value": one_hot, "need": "== 20"},
            f"trees, {trees} laws: mismatches": {"value": tree_wrong, "need": "== 0"},
            "trees: mean length, traversal over token": sum(tree_gains) / len(tree_gains),
            "trees: smallest length, traversal over token": {"value": min(tree_gains), "need": ">= 1"},
            "enumeration: time": {"value": seconds, "unit": "s"},
            **{
                f"negative control, {name}: pairs of 30 detected": {"value": count, "need": ">= 15"}
                for name, count in detected.items()
            },
        },
        [0],
        FILES,
    )
    assert wrong == tree_wrong == 0 and one_hot == 20 and min(tree_gains) >= 1
    assert min(detected.values()) >= 15


def byte_model(layers: int, width: int, steps: int, seed: int, texts: list[bytes]) -> Any:
    """A byte-level Llama trained on the standard library."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng = random.Random(seed)
    for _ in range(steps):
        rows = []
        for _ in range(16):
            text = rng.choice(texts)
            at = rng.randrange(len(text) - 96)
            rows.append(list(text[at : at + 96]))
        ids = torch.tensor(rows)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def test_a_trained_pair() -> None:
    """T=1, g=5, 1024 contexts: paired expected lengths, and the real decoder against sum E[w_i]."""
    texts = [text.encode() for text in library_text()]
    texts = [text for text in texts if len(text) > 2000]
    train, held_out = texts[::2], texts[1::2]
    target = HFEngine(byte_model(4, 128, 400, 0, train))
    draft = HFEngine(byte_model(1, 64, 400, 1, train))
    rng = random.Random(2)
    requests = []
    for i in range(CONTEXTS):
        text = rng.choice(held_out)
        at = rng.randrange(len(text) - 40)
        requests.append(TokenRequest(list(text[at : at + 32]), DRAFTED + 1, row_id=i))
    figures: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for rule in ("block", "token"):
        seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def look(view: RoundView, seen: list[Any] = seen) -> None:
            if max(view.num_drafted) == DRAFTED and len(view.context[0]) == 32:  # the first round of its contexts
                assert view.target_law is not None and view.draft_law is not None
                at = view.drafted.unsqueeze(-1)
                p_x = view.target_law[:, :DRAFTED].gather(-1, at).squeeze(-1)
                q_x = view.draft_law.gather(-1, at).squeeze(-1)
                seen.append((*expected_accepted(p_x, q_x), torch.tensor(view.accepted)))

        decoder = registry.build(
            "speculative",
            {"target": target, "draft": draft},
            sampling=SamplingParams(temperature=1.0),
            settings={"draft_length": DRAFTED, "fallback": "never", "verification": rule},
            seed=3,
            recorder=look,
        )
        for first in range(0, CONTEXTS, 128):
            decoder.decode(requests[first : first + 128])
        figures[rule] = tuple(torch.cat([s[i] for s in seen]).double() for i in range(3))
    block, token, k_block = figures["block"]
    assert len(block) == CONTEXTS
    ratio = float(block.mean() / token.mean())
    pick = torch.randint(CONTEXTS, (2000, CONTEXTS), generator=torch.Generator().manual_seed(0))
    resampled = (block[pick].mean(1) / token[pick].mean(1)).sort().values
    low, high = float(resampled[50]), float(resampled[1949])
    off = float((k_block - block).mean().abs() / ((k_block - block).std() / math.sqrt(CONTEXTS)))
    record(
        SLUG,
        {
            "trained pair: expected accepted length, token": float(token.mean()),
            "trained pair: expected accepted length, block": float(block.mean()),
            "trained pair: block over token": {"value": ratio, "low": low, "high": high, "need": ">= 1.03"},
            "trained pair: measured accepted length, block": float(k_block.mean()),
            "trained pair: measured accepted length, token": float(figures["token"][2].mean()),
            "trained pair: measured minus sum E[w_i], standard errors": {"value": off, "need": "<= 3"},
        },
        [0, 1, 2, 3],
        FILES,
    )
    assert ratio >= 1.03 and low > 1.0 and off <= 3


def median_ms(call: Callable[[], object], rounds: int = 30) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times)[rounds // 2]


def test_time_of_a_verification() -> None:
    """V=32k in float32: a chain of 5, and a tree of 15 nodes below its root, of fixed widths 3-2-1."""
    vocab, g = 32_000, 5
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, Any] = {}
    for batch in (1, 8):
        p = (2 * torch.randn(batch, g + 1, vocab, generator=generator)).softmax(-1)
        q = (p[:, :g].log() + 0.5 * torch.randn(batch, g, vocab, generator=generator)).softmax(-1)
        x = torch.multinomial(q.view(-1, vocab), 1, generator=generator).view(batch, g)
        u = torch.rand(batch, g + 1, generator=generator, dtype=torch.float64)
        given = (x, q, p, torch.full((batch,), g), u[:, :g], u[:, g])
        for name, rule in (("token", verify), ("block", verify_block)):
            figures[f"time, chain of {g}, batch {batch}, {name}"] = median_ms(
                lambda rule=rule, given=given: rule(*given)
            )
    parent = [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    laws = (2 * torch.randn(16, vocab, generator=generator)).softmax(-1)
    drafts = (laws.log() + 0.5 * torch.randn(16, vocab, generator=generator)).softmax(-1)
    tokens = [0]
    for node in range(1, 16):
        law = drafts[parent[node]].clone()
        law[[tokens[c] for c in range(1, node) if parent[c] == parent[node]]] = 0
        tokens.append(int(torch.multinomial(law, 1, generator=generator)))
    rows = [list(range(16))]
    tree = Tree.from_rows([tokens], [parent], torch.device("cpu"), drafts[None], rows)
    u = torch.rand(1, 16, generator=generator, dtype=torch.float64)
    for name, walk in (("token", verify_tree), ("traversal", verify_traversal)):
        figures[f"time, tree of 15, batch 1, {name}"] = median_ms(lambda walk=walk: walk(tree, lambda i: laws[i], u))
    record(SLUG, {name: {"value": value, "unit": "ms"} for name, value in figures.items()}, [0], FILES)
