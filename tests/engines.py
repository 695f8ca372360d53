"""Tiny random transformers models, and what every engine over one must satisfy: the same checks for all engines.

Imports inference and transformers only. Shape letters: B batch, T tokens, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.engine import Engine

TOLERANCE = 1e-4  # on logits, float32 (issue 2)
VOCAB = 101
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def tiny_hf(family: str, seed: int = 0, **fields: Any) -> Any:
    """A transformers causal language model with every parameter random: biases and norms too, so that none can hide."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.dim() == 1 and name.endswith("weight") else 0.2 * noise)
    return model.requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """int64 [B, T] without id 0 (some models treat their padding id in their own way)."""
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain(model: Any, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of single rows, without cache, mask or positions."""
    with torch.no_grad():
        return torch.cat([model(input_ids=row.unsqueeze(0), use_cache=False).logits for row in ids])


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def logits(engine: Engine, ids: Tensor, **kwargs: Any) -> Tensor:
    return engine.head(engine.forward(ids, **kwargs)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The checks; each takes (engine, model)


def without_cache(engine: Engine, model: Any) -> None:
    ids = tokens(3, 21)
    close(logits(engine, ids), plain(model, ids))


def one_token_at_a_time(engine: Engine, model: Any) -> None:
    ids = tokens(1, 16)
    cache = engine.new_cache(1, 16)
    close(torch.cat([logits(engine, ids[:, i : i + 1], cache=cache) for i in range(16)], 1), plain(model, ids))


def chunks_of_random_sizes(engine: Engine, model: Any) -> None:
    ids, want = tokens(2, 40), None
    want = plain(model, ids)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        cache, got = engine.new_cache(2, 64), []
        while cache.longest < 40:
            n = min(int(torch.randint(1, 9, (1,), generator=generator)), 40 - cache.longest)
            got.append(logits(engine, ids[:, cache.longest : cache.longest + n], cache=cache))
        close(torch.cat(got, 1), want)


def ragged_rows(engine: Engine, model: Any) -> None:
    """Right-padded prefill, truncate, then chunks: each row as if it were alone; then rows leave and are repeated."""
    ids, want, lengths = tokens(4, 40), None, [13, 1, 9, 4]
    want = plain(model, ids)
    cache = engine.new_cache(4, 48)
    padded = ids[:, :13].clone()
    for b, length in enumerate(lengths):
        padded[b, length:] = 7  # any id: nothing behind a row's length is ever seen
    first = logits(engine, padded, cache=cache)
    for b, length in enumerate(lengths):
        close(first[b, :length], want[b, :length])
    cache.truncate(lengths)
    which = [0, 1, 2, 3]
    for step, n in enumerate((1, 5, 1, 3, 2, 1)):
        rows = torch.stack([ids[which[i], t : t + n] for i, t in enumerate(cache.lengths)])
        expected = torch.stack([want[which[i], t : t + n] for i, t in enumerate(cache.lengths)])
        close(logits(engine, rows, cache=cache), expected)
        if step == 1:  # uneven roll-back
            cache.truncate([t - back for t, back in zip(cache.lengths, (4, 0, 2, 1), strict=True)])
        if step == 2:
            cache.select([2, 0])
            which = [2, 0]
        if step == 3:
            cache.expand(2)
            which = [2, 2, 0, 0]


def rolled_back(engine: Engine, model: Any) -> None:
    """The speculative round: wrong tokens are written, dropped, and the right ones continue; every k from 0 to g."""
    ids = tokens(1, 30)
    want = plain(model, ids)
    for kept in range(5):
        cache = engine.new_cache(1, 32)
        logits(engine, ids[:, :10], cache=cache)
        wrong = torch.cat((ids[:, 10 : 10 + kept], tokens(1, 5 - kept, seed=9)), 1)
        logits(engine, wrong, cache=cache)
        cache.truncate([10 + kept])
        close(logits(engine, ids[:, 10 + kept : 15 + kept], cache=cache), want[:, 10 + kept : 15 + kept])


def aux_states(engine: Engine, model: Any) -> None:
    """Each is transformers' hidden state of that index, with and without a cache, in the order asked for."""
    ids = tokens(2, 12)
    with torch.no_grad():
        want = model(input_ids=ids, output_hidden_states=True).hidden_states
    layers = [3, 0, 2, 1]
    for cache in (None, engine.new_cache(2, 16)):
        hidden, aux = engine.forward(ids, cache=cache, aux_layers=layers)
        assert len(aux) == len(layers)
        for layer, state in zip(layers, aux, strict=True):
            close(state, want[layer])
        close(hidden, want[-1])


def embeddings_as_input(engine: Engine, model: Any) -> None:
    ids = tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    table = model.get_input_embeddings().weight
    if not torch.equal(embeds, table[ids]):  # gemma3 scales inside its embedding
        embeds = table[ids]
    before = embeds.clone()
    with torch.no_grad():
        want = model(inputs_embeds=embeds).logits
    close(engine.head(engine.forward(embeds=embeds, cache=engine.new_cache(2, 9))[0]), want)
    assert torch.equal(embeds, before)


def tree(engine: Engine, model: Any) -> None:
    """Two branches in one pass: each node sees what it would see on its own path; the kept path then goes on.

    Rows are ragged. Nodes: root, a, b (after root), c (after a), d (after b); row 0 keeps root-a-c, row 1 root-b-d.
    """
    parents = [-1, 0, 0, 1, 2]
    depth = torch.tensor([0, 1, 1, 2, 2])
    nodes = tokens(2, 5, seed=3)
    context, lengths = tokens(2, 11, seed=4), [11, 8]
    cache = engine.new_cache(2, 32)
    logits(engine, context, cache=cache)
    cache.truncate(lengths)
    visible = torch.zeros(2, 1, 5, 16, dtype=torch.bool)
    for b, length in enumerate(lengths):
        visible[b, :, :, :length] = True
        for i in range(5):
            j = i
            while j >= 0:
                visible[b, 0, i, length + j] = True
                j = parents[j]
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    positions = torch.tensor(lengths)[:, None] + depth
    got = logits(engine, nodes, cache=cache, positions=positions, mask=mask)
    for b, path in enumerate(([0, 1, 3], [0, 2, 4])):
        for other in ([0, 1, 3], [0, 2, 4]):
            straight = torch.cat((context[b, : lengths[b]], nodes[b, other])).unsqueeze(0)
            close(got[b, other], plain(model, straight)[0, lengths[b] :])
        after = torch.cat((context[b, : lengths[b]], nodes[b, path], tokens(2, 4, seed=5)[b])).unsqueeze(0)
        paths = torch.tensor([[0, 1, 3], [0, 2, 4]])
        if b == 0:
            cache.keep(paths, lengths)
            assert cache.lengths == [14, 11]
            continued = logits(engine, tokens(2, 4, seed=5), cache=cache)
        close(continued[b], plain(model, after)[0, lengths[b] + 3 :])


CHECKS: list[Callable[[Engine, Any], None]] = [
    without_cache,
    one_token_at_a_time,
    chunks_of_random_sizes,
    ragged_rows,
    rolled_back,
    aux_states,
    embeddings_as_input,
    tree,
]
