"""The training-time test of EAGLE-3: K steps of a head on its own states, all positions of a text at once.

Source: EAGLE-3 (arXiv 2503.01840), section 3.2. In step 0 row t reads the pair (target's state of token t, token t+1);
in step k it reads its own output of step k-1 and token t+k+1, at position t+k. Row t of step k sees the keys of step 0
at rows j <= t of its document and, of every later step, only the key at its own row: what an incremental rollout from
row t would have in its cache. So one causal product and k products of single keys, under one softmax.

Shape letters: B batch, T rows, D width, H query heads, G key/value heads, d head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.nets.eagle_head import EagleHead
from draftsmith.inference.nets.masks import additive
from draftsmith.inference.nets.transformer import Weights
from draftsmith.inference.rng import NUM_STREAMS, Stream, uniform


def rollout(
    head: EagleHead,
    embeds: Tensor,  # [B, T + 1, D] of the text's tokens, from `head.embed`; row t starts with token t + 1
    states: Tensor,  # [B, T, D], from `head.project`
    steps: int,
    positions: Tensor | None = None,  # int64 [B, T]; default 0, 1, 2, ...
    visible: Tensor | None = None,  # bool [B, 1, T, T]; default: causal
) -> Iterator[Tensor]:
    """Output states [B, T, D] of steps 0..steps-1, differentiable. Rows whose text ends before the step hold garbage.

    What row t of step k predicts is token t + k + 2.
    """
    batch, rows, width = states.shape
    if positions is None:
        positions = torch.arange(rows, device=states.device).expand(batch, -1)
    if visible is None:
        visible = torch.ones(rows, rows, dtype=torch.bool, device=states.device).tril().view(1, 1, rows, rows)
    hidden = additive(~visible, torch.float32).unsqueeze(1)  # [B or 1, 1, 1, T, T]
    layer = head.layer
    weights = layer.current()
    first: tuple[Tensor, Tensor] | None = None
    later: list[tuple[Tensor, Tensor]] = []
    for k in range(steps):
        fed = _shifted(embeds, k + 1, rows)
        flat = fed.reshape(-1, width)
        inputs, residual = layer.enter(weights, flat, head.merge(flat, states.reshape(-1, width)))
        q, key, value = _qkv(head, weights, inputs, positions + k)
        if first is None:
            first = key, value
        else:
            later.append((key, value))
        attended = _attend(q, first, later, hidden)
        out = layer.leave(weights, residual, attended.reshape(batch * rows, -1)).view(batch, rows, width)
        yield out
        states = head.feedback(out)


def trained_rows(batch: TokenBatch, steps: int) -> Tensor:
    """bool [K, B, T - 1]: rows t of step k that are trained, iff token t + k + 2 is a label of row t's document."""
    rows = batch.ids.shape[1] - 1
    mask = torch.zeros(steps, len(batch.ids), rows, dtype=torch.bool, device=batch.ids.device)
    for k, shift in enumerate(range(2, steps + 2)):
        label = batch.loss_mask[:, shift:].bool() & (batch.document[:, shift:] == batch.document[:, :-shift])
        mask[k, :, : label.shape[1]] = label
    return mask


def goal_rows(batch: TokenBatch, steps: int) -> Tensor:
    """int64 [K, B, T - 1] into the B * T rows of the target: the one that predicts the token of row t, step k."""
    size, time = batch.ids.shape
    device = batch.ids.device
    k, b, t = (torch.arange(n, device=device) for n in (steps, size, time - 1))
    return b.view(1, -1, 1) * time + (t + k.view(-1, 1, 1) + 1).clamp_max(time - 1)


def state_noise(sample_id: Tensor, states: Tensor, size: float, seed: int, step: int) -> Tensor:
    """Uniform in (-size, size), of the shape and dtype of `states` [B, T, F], by (seed, sample, step) alone."""
    place = torch.arange(states[0].numel(), device=states.device).view(1, *states.shape[1:])
    u = uniform(seed, sample_id.view(-1, 1, 1), step, Stream.DATA + NUM_STREAMS * place, states.device)
    return ((u * 2 - 1) * size).to(states.dtype)


def _shifted(x: Tensor, by: int, rows: int) -> Tensor:
    """Rows by .. by+rows-1 of x [B, n, D]; zeros behind its end."""
    part = x[:, by : by + rows]
    lack = rows - part.shape[1]
    return part if lack == 0 else torch.cat((part, part.new_zeros(part.shape[0], lack, part.shape[2])), 1)


def _qkv(head: EagleHead, weights: Weights, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, G, H/G, T, d], k, v [B, G, 1, T, d], turned to their positions."""
    config = head.config
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
    batch, rows = positions.shape
    joint = weights.qkv(inputs).view(batch, rows, heads + 2 * groups, size)
    q, k, v = torch.split(joint, [heads, groups, groups], 2)
    if weights.q_norm is not None and weights.k_norm is not None:
        q = torch.rms_norm(q, (size,), weights.q_norm, config.norm_eps)
        k = torch.rms_norm(k, (size,), weights.k_norm, config.norm_eps)
    cos, sin = head.rope.at(positions.unsqueeze(2), q.dtype)
    q, k = (x * cos + x.roll(size // 2, -1) * sin for x in (q, k))
    q = q.view(batch, rows, groups, heads // groups, size).permute(0, 2, 3, 1, 4)
    return q, k.transpose(1, 2).unsqueeze(2), v.transpose(1, 2).unsqueeze(2)


def _attend(q: Tensor, first: tuple[Tensor, Tensor], later: list[tuple[Tensor, Tensor]], hidden: Tensor) -> Tensor:
    """[B, T, H*d]: one softmax over the keys of step 0 and one key of each later step."""
    rows = q.shape[-2]
    q = q * q.shape[-1] ** -0.5
    scores = (q @ first[0].transpose(-1, -2)).float() + hidden
    if later:
        own = torch.stack([(q * key).sum(-1) for key, _ in later], -1).float()
        scores = torch.cat((scores, own), -1)
    laws = scores.softmax(-1).to(q.dtype)
    out = laws[..., :rows] @ first[1]
    for i, (_, value) in enumerate(later):
        out = out + laws[..., rows + i : rows + i + 1] * value
    return out.permute(0, 3, 1, 2, 4).flatten(2)
