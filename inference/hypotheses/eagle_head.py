"""An EAGLE drafter as a subject of diagnosis: its law under any couplings, unrolled on its own states, true tokens.

The pass is written out with every coupling as a value, apart from the served net, so that wrong ones can be tried; with
the right ones it is `EagleHead` (a test compares them). Row j pairs the target's state of token j with token j+1 and
predicts token j+2; step k of a row reads its own output of step k-1 and token j+1+k. The rows of steps 1.. see the
keys of step 0 up to their own row, and one key of each earlier step of that row.
Shape letters: c samples, T time, N anchors, K steps, H width, a aux states, W rows of the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftsmith.inference.formats.record import EMBEDDING, DrafterRecord
from draftsmith.inference.hypotheses import FAMILIES
from draftsmith.inference.hypotheses.base import Facts, Family
from draftsmith.inference.hypotheses.served_law import ALL, LawFilter, filtered
from draftsmith.inference.hypotheses.template import GIVEN
from draftsmith.inference.nets.eagle_head import EagleConfig
from draftsmith.inference.nets.rope import rope_frequencies
from draftsmith.inference.nets.transformer import activation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYER = "layers.0."


@dataclass(frozen=True)
class EagleCouplings:
    """Everything that ties an EAGLE drafter to its target and its decoder, as values."""

    version: int
    aux_layers: tuple[int, ...]
    rope: Mapping[str, Any]
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    embedding: str  # "own", "target"
    head: str  # "own", "target", "embedding"
    map: str = "offset"  # a key of vocabulary_map.KINDS
    hidden_norm: bool = True
    final_norm: bool = True
    final_state_normed: bool = True  # the target's last state, where it is read, is the one after its final norm
    feature_shift: int = 0  # row j reads the state of token j + this
    token_shift: int = 0  # row j reads token j + 1 + this
    step_offset: int = 0  # drafted tokens stand at position j + k + this
    interleaved: bool = False  # rotary pairs are neighbours, not halves
    features: str = "float32"  # dtype of the target's states
    swapped: str = ""  # "gate_up", "k_v", "q_k"
    windows: tuple[int | None, ...] = (None,)  # of the one layer: positions back that it sees, itself included
    rotary_share: float = 1.0  # of a head's dimensions are turned, the first ones
    law_filter: LawFilter = ALL  # top-k and top-p that drafts are drawn with
    rendering: str = GIVEN  # of the contexts' prompts


@dataclass
class EagleSubject:
    """See `base.Subject`. target: "embedding" and "head" of the target, [V, Ht] each, where they could be used."""

    record: DrafterRecord
    target: Mapping[str, Tensor]
    facts: Facts
    couplings: EagleCouplings
    families: tuple[Family, ...] = field(default=FAMILIES)

    @property
    def config(self) -> EagleConfig:
        assert isinstance(self.record.fields, EagleConfig)
        return self.record.fields

    def logits(self, couplings: EagleCouplings, contexts: Any, chunk: slice) -> tuple[Tensor, Tensor]:
        """(logits [c, N, K, W], int64 [W] target ids of the W columns, -1 for none)."""
        c = couplings
        states = [contexts.state(i, chunk, normed=c.final_state_normed) for i in c.aux_layers]
        features = torch.cat(states, -1).to(DTYPES[c.features]).float()
        out = self._unroll(c, features, contexts.tokens[chunk], contexts.rows[chunk], contexts.steps)
        if c.version == 3 and c.final_norm:
            out = _norm(out, self._weight("norm.weight", out), self.config.norm_eps)
        ids = self._ids(c)
        return filtered(F.linear(out, self._head(c, ids)), c.law_filter), ids

    # --- weights under couplings

    def _weight(self, name: str, like: Tensor) -> Tensor:
        """A tensor in float32; ones where the checkpoint lacks a norm that a hypothesis switches on."""
        found = self.record.tensors.get(name)
        return torch.ones(like.shape[-1]) if found is None else found.float()

    def _matrix(self, name: str, c: EagleCouplings) -> Tensor:
        pair = {"gate_up": ("mlp.gate_proj", "mlp.up_proj"), "k_v": ("self_attn.k_proj", "self_attn.v_proj")}
        pair["q_k"] = ("self_attn.q_proj", "self_attn.k_proj")
        if c.swapped and name in pair[c.swapped]:
            first, second = pair[c.swapped]
            name = second if name == first else first
        return self.record.tensors[f"{LAYER}{name}.weight"].float()

    def _linear(self, x: Tensor, name: str, c: EagleCouplings) -> Tensor:
        bias = self.record.tensors.get(f"{LAYER}{name}.bias")
        return F.linear(x, self._matrix(name, c), None if bias is None else bias.float())

    def _embedding(self, source: str) -> Tensor:
        table = self.record.tensors[EMBEDDING] if source == "own" else self.target["embedding"]
        return table.float()

    def _ids(self, c: EagleCouplings) -> Tensor:
        rows = torch.arange(self.config.draft_vocab_size)
        d2t, t2d = self.record.tensors.get("d2t"), self.record.tensors.get("t2d")
        if d2t is None or c.map == "identity":
            ids = rows
        elif c.map == "t2d" and t2d is not None:
            marked = t2d.nonzero().flatten()[: len(rows)]
            ids = F.pad(marked, (0, len(rows) - len(marked)), value=-1)
        else:
            ids = d2t + rows if c.map == "offset" else d2t
        return torch.where((ids >= 0) & (ids < self.config.vocab_size), ids, -1)

    def _head(self, c: EagleCouplings, ids: Tensor) -> Tensor:
        if c.head == "own":
            return self.record.tensors["lm_head.weight"].float()
        table = self.target["head"].float() if c.head == "target" else self._embedding(c.embedding)
        return table[ids.clamp_min(0)]

    # --- the pass

    def _project(self, c: EagleCouplings, features: Tensor) -> Tensor:
        if c.version == 1:
            return features
        eps, count = self.config.norm_eps, len(c.aux_layers)
        if c.norm_before_fc:
            features = _norm(features, self._weight("input_norm.weight", features), eps)
        if c.fc_norm:
            parts = features.chunk(count, -1)
            named = [self._weight(f"fc_norm.{i}.weight", part) for i, part in enumerate(parts)]
            features = torch.cat([_norm(part, w, eps) for part, w in zip(parts, named, strict=True)], -1)
        return self._fc(features)

    def _fc(self, x: Tensor) -> Tensor:
        bias = self.record.tensors.get("fc.bias")
        return F.linear(x, self.record.tensors["fc.weight"].float(), None if bias is None else bias.float())

    def _enter(self, c: EagleCouplings, embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """(what attention reads, the residual)."""
        if c.version == 1:
            both = self._fc(torch.cat((embeds, states), -1))
            return both, both
        eps = self.config.norm_eps
        normed = _norm(states, self._weight(f"{LAYER}hidden_norm.weight", states), eps) if c.hidden_norm else states
        embeds = _norm(embeds, self._weight(f"{LAYER}input_layernorm.weight", embeds), eps)
        return torch.cat((embeds, normed), -1), normed if c.norm_before_residual else states

    def _heads(self, c: EagleCouplings, x: Tensor, name: str, positions: Tensor | None) -> Tensor:
        """A projection, cut into heads [c, n, heads, hd], normed (qwen3) and turned to its positions."""
        config = self.config
        out = self._linear(x, f"self_attn.{name}_proj", c)
        out = out.view(*x.shape[:2], -1, config.head_dim)
        if config.family == "qwen3" and name in "qk":
            out = _norm(out, self._weight(f"{LAYER}self_attn.{name}_norm.weight", out), config.norm_eps)
        return out if positions is None else self._turn(c, out, positions)

    def _turn(self, c: EagleCouplings, x: Tensor, positions: Tensor) -> Tensor:
        config, size = self.config, 2 * round(c.rotary_share * self.config.head_dim / 2)
        x, rest = x[..., :size], x[..., size:]
        rope = {name: value for name, value in c.rope.items() if name != "partial_rotary_factor"}
        frequencies, factor = rope_frequencies(rope, size, config.max_positions, config.max_positions)
        angle = positions.unsqueeze(-1).float().unsqueeze(-1) * frequencies  # [c, n, 1, hd/2]
        cos, sin = angle.cos() * factor, angle.sin() * factor
        if c.interleaved:
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.cat((torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2), rest), -1)
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), -1)

    def _leave(self, c: EagleCouplings, residual: Tensor, attended: Tensor) -> Tensor:
        x = residual + self._linear(attended, "self_attn.o_proj", c)
        normed = _norm(x, self._weight(f"{LAYER}post_attention_layernorm.weight", x), self.config.norm_eps)
        act = activation(self.config.activation)
        gated = act(self._linear(normed, "mlp.gate_proj", c)) * self._linear(normed, "mlp.up_proj", c)
        return x + self._linear(gated, "mlp.down_proj", c)

    def _unroll(self, c: EagleCouplings, features: Tensor, tokens: Tensor, rows: Tensor, steps: int) -> Tensor:
        """Output states [c, N, K, H] of the rows [c, N]; features [c, T, a*Ht], tokens [c, T]."""
        config, (count, length) = self.config, tokens.shape
        groups = config.num_kv_heads
        table = self._embedding(c.embedding)
        every = torch.arange(length - 1).expand(count, -1)
        projected = self._project(c, _shift(features, c.feature_shift)[:, :-1])
        embeds = F.embedding(_at(tokens, every + 1 + c.token_shift), table)
        inputs, residual = self._enter(c, embeds, projected)
        keys = self._heads(c, inputs, "k", every)
        values = self._heads(c, inputs, "v", None)
        window = c.windows[0] or length
        back = rows.unsqueeze(2) - every.unsqueeze(1)  # [c, N, T-1]
        keys, values = (x.permute(0, 2, 1, 3).unsqueeze(2) for x in (keys, values))  # [c, G, 1, T-1, hd]
        own_keys: list[Tensor] = []
        own_values: list[Tensor] = []
        outs: list[Tensor] = []
        inputs, residual = _rows(inputs, rows), _rows(residual, rows)
        for k in range(steps):
            if k:
                state = outs[-1]
                if c.norm_output and c.version == 3:
                    state = _norm(state, self._weight("norm.weight", state), config.norm_eps)
                fed = F.embedding(_at(tokens, rows + 1 + k + c.token_shift), table)
                inputs, residual = self._enter(c, fed, state)
            positions = rows + k + (c.step_offset if k else 0)
            q = self._heads(c, inputs, "q", positions).permute(0, 2, 1, 3)  # [c, heads, N, hd]
            q = q.reshape(count, groups, -1, rows.shape[1], config.head_dim)
            if k:
                own_keys.append(self._heads(c, inputs, "k", positions).permute(0, 2, 1, 3).unsqueeze(2))
                own_values.append(self._heads(c, inputs, "v", None).permute(0, 2, 1, 3).unsqueeze(2))
            unseen = torch.where((back >= 0) & (back + k < window), 0.0, float("-inf"))
            near = max(0, k - window)  # own keys before it are out of the window
            attended = _attend(q, keys, values, own_keys[near:], own_values[near:], unseen)
            outs.append(self._leave(c, residual, attended))
        return torch.stack(outs, 2)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(x, weight.shape, weight, eps)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _at(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.gather(1, places.clamp(0, tokens.shape[1] - 1))


def _shift(features: Tensor, by: int) -> Tensor:
    """Row j becomes row j + by; rows that are not there are zero."""
    if by == 0:
        return features
    return F.pad(features, (0, 0, -by, 0))[:, : features.shape[1]] if by < 0 else F.pad(features[:, by:], (0, 0, 0, by))


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, own_keys: list[Tensor], own_values: list[Tensor], unseen: Tensor
) -> Tensor:
    """[c, N, heads * hd]: one softmax over the keys of step 0 and the row's own later keys."""
    size = q.shape[-1]
    scores = q @ keys.transpose(-1, -2) * size**-0.5 + unseen[:, None, None]
    own = [(q * key).sum(-1, keepdim=True) * size**-0.5 for key in own_keys]
    laws = torch.cat((scores, *own), -1).softmax(-1)
    first = scores.shape[-1]
    out = laws[..., :first] @ values
    for i, value in enumerate(own_values):
        out = out + laws[..., first + i : first + i + 1] * value
    return out.flatten(1, 2).transpose(1, 2).flatten(2)
