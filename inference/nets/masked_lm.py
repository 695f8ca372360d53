"""A bidirectional transformer that fills masks: LLaDA's and Dream's layers, and small ones of our own.

Source: LLaDA (arXiv 2502.09992, section 2.2): a Llama-style network without causal mask and without time input; Dream
(arXiv 2508.15487) is such a network that came from an autoregressive one and predicts one position further
(`logit_shift`). Parameters have transformers' Llama names.
`CanvasCache` holds keys and values by absolute canvas position, for the block sampler's approximate caches.

Shape letters: B batch, L canvas, n positions fed, D width, H query heads, G key/value heads, d head width,
V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.nets.config_json import read_config
from draftsmith.inference.nets.matrices import Matrix, matrix, packed, suits_one_dnn
from draftsmith.inference.nets.rope import RopeTable, rope_frequencies
from draftsmith.inference.nets.transformer import Block, BlockConfig, RMSNorm
from draftsmith.inference.rng import uniform

POSITIONS = ("learned", "rope")


@dataclass(frozen=True)
class MaskedLMConfig:
    """Everything that decides the network's function. Raises InvalidValue, one line, for what cannot be."""

    vocab_size: int  # V, the mask id included
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_length: int  # longest canvas
    mask_id: int
    eos_id: int | None = None  # ends an answer (EoT); None: answers have no end of their own
    eot_id: int | None = None  # a second id that ends an answer (LLaDA: end of turn)
    pad_id: int | None = None
    logit_shift: bool = False  # the state at position i predicts i + 1 (nets that came from autoregressive ones)
    positions: str = "learned"  # see POSITIONS
    rope_theta: float = 10000.0
    num_kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    norm_eps: float = 1e-5
    activation: str = "silu"
    qkv_bias: bool = False
    attention_bias: bool = False  # of the output projection
    mlp_bias: bool = False
    tied: bool = False  # the head is the embedding

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise InvalidValue(f"{self.num_heads} heads do not divide a width of {self.hidden_size}: give head_dim")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise InvalidValue(f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.positions not in POSITIONS:
            raise unknown_choice("positions", self.positions, POSITIONS)
        for name in ("mask_id", "eos_id", "eot_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise InvalidValue(f"{name} {value} is outside the vocabulary 0..{self.vocab_size - 1}")
            if name != "mask_id" and value == self.mask_id:
                raise InvalidValue(f"{name} and mask_id are both {value}: a mask must not mean anything else")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return tuple(dict.fromkeys(i for i in (self.eos_id, self.eot_id) if i is not None))

    @property
    def block(self) -> BlockConfig:
        """The layers, as the shared blocks describe one."""
        return BlockConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            norm_eps=self.norm_eps,
            activation=self.activation,
            qkv_bias=self.qkv_bias,
            o_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a config.json."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any], where: str = "config.json") -> "MaskedLMConfig":
        """The reverse of `to_json`. Raises InvalidValue for keys that are unknown or missing."""
        return read_config(MaskedLMConfig, fields, "a masked language model", where)


class CanvasCache:
    """Keys and values of every layer by canvas position, [B, L + 1, G, d] each; the last column is nobody's.

    A pass writes the columns that it feeds and sees all columns below a row's length: what was not fed is as old as the
    last pass that fed it. That is all that the prefix cache (feeds from the block's start on) and the dual cache (feeds
    the block alone) of Fast-dLLM (arXiv 2505.22618, section 3.1) are.
    """

    def __init__(
        self, config: MaskedLMConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        block = config.block
        shape = (batch, length + 1, block.num_kv_heads, block.head_dim)
        self.length = length
        # zeros, not empty: NaN * 0 in a masked column is NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows [any], in this order."""
        self.keys = [x.index_select(0, rows) for x in self.keys]
        self.values = [x.index_select(0, rows) for x in self.values]


@dataclass(slots=True)
class CanvasStep:
    """What all layers of one pass share."""

    batch: int
    n: int
    cos: Tensor | None  # [n, 1, d] or [B, n, 1, d]; None: positions are learned
    sin: Tensor | None
    mask: Tensor | None  # bool [B, 1, 1, keys], true where visible; None: everything is
    cache: CanvasCache | None
    end: int  # columns of the cache that any row sees
    rows: Tensor | None  # int64 [B] rows of the cache; None: all
    columns: Tensor | None  # int64 [B, n] canvas positions fed; None: 0..n-1

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write this pass's keys and values [B, n, G, d] of a layer; all that its queries see [B, keys, G, d]."""
        if self.cache is None:
            return keys, values
        found = []
        for held, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            if self.rows is None and self.columns is None:
                held[:, : self.n] = new
            elif self.columns is None:
                held[self.rows, : self.n] = new
            else:
                rows = torch.arange(self.batch, device=new.device) if self.rows is None else self.rows
                held[rows.unsqueeze(1), self.columns] = new
            found.append((held if self.rows is None else held.index_select(0, self.rows))[:, : self.end])
        return found[0], found[1]


class BidirectionalBlock(Block):
    """A `Block` whose queries see the whole canvas."""

    def forward(self, x: Tensor, step: CanvasStep) -> Tensor:  # type: ignore[override]  # another kind of pass
        """x [B*n, D] -> [B*n, D]"""
        weights = None if torch.is_grad_enabled() and not self.packed else self.weights
        normed = self.input_layernorm(x)
        a, m = self.self_attn, self.mlp
        if weights is None:  # through the modules, which is where ZeRO-3 gathers parameters
            qkv = torch.cat((a.q_proj(normed), a.k_proj(normed), a.v_proj(normed)), -1)
            x = x + a.o_proj(self._look(qkv, step))
            normed = self.post_attention_layernorm(x)
            down: Tensor = m.down_proj(self.act(m.gate_proj(normed)) * m.up_proj(normed))
            return x + down
        x = weights.out.plus(x, self._look(weights.qkv(normed), step))
        gate, up = weights.gate_up(self.post_attention_layernorm(x)).chunk(2, -1)
        return weights.down.plus(x, self.act(gate) * up)

    def _look(self, qkv: Tensor, step: CanvasStep) -> Tensor:
        """Attention: qkv [B*n, (H + 2G) * d] -> [B*n, H*d]."""
        config, batch, n = self.config, step.batch, step.n
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        turned = heads + kv_heads
        qkv = qkv.view(batch, n, turned + kv_heads, width)
        qk = qkv.narrow(2, 0, turned)
        if step.cos is not None and step.sin is not None:
            qk = (qk * step.cos + qk.roll(width // 2, -1) * step.sin).to(qkv.dtype)  # autocast: cos is float32
        keys, values = step.exchange(self.layer, qk.narrow(2, heads, kv_heads), qkv.narrow(2, turned, kv_heads))
        # the queries that share a key head are the rows of one attention: no key is repeated in memory
        q = qk.narrow(2, 0, heads).reshape(batch, n, kv_heads, heads // kv_heads, width)
        q = q.permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)
        out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), step.mask)
        out = out.view(batch, kv_heads, heads // kv_heads, n, width).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * n, heads * width)


class MaskedLM(nn.Module):
    """Predicts every position of a canvas from all the others; what is trained is what is served."""

    WHAT: ClassVar[str] = "a masked language model"

    def __init__(self, config: MaskedLMConfig) -> None:
        super().__init__()
        self.config = config
        block = config.block
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_length, config.hidden_size) if config.positions == "learned" else None
        )
        self.layers = nn.ModuleList(BidirectionalBlock(block, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.output: Matrix | None = None  # the head, after `fuse` or `pack`
        self.packed = False
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        self._rope = RopeTable(partial(rope_frequencies, rope, block.head_dim, config.max_length, config.max_length))
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings of length about 1; linears as torch makes them, those that write to the stream less by depth."""
        width = self.config.hidden_size**-0.5
        with torch.no_grad():
            for table in (self.embed_tokens, self.embed_positions):
                if table is not None:
                    nn.init.normal_(table.weight, std=width)
            for layer in self.layers:
                for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):  # type: ignore[union-attr]
                    linear.weight.mul_((2 * self.config.num_layers) ** -0.5)  # type: ignore[union-attr,operator]

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def fuse(self) -> None:
        """Make the projections that read the same input views of one weight each, for serving (see `Block.fuse`)."""
        for layer in self.layers:
            layer.fuse()  # type: ignore[operator]  # a ModuleList is typed as a list of Module
        self.output = matrix(self.lm_head.weight, None)

    def pack(self) -> None:
        """Fuse, and on the CPU in float32 re-lay the large matrices for oneDNN, in place of their parameters.

        From then on the network can be run, but its weights can be neither read nor changed.
        """
        for layer in self.layers:
            layer.pack()  # type: ignore[operator]
            self.packed = self.packed or bool(layer.packed)
        if not self.config.tied and suits_one_dnn(self.lm_head.weight):
            self.output = packed(self.lm_head.weight, None)
            self.lm_head.register_parameter("weight", None)
            self.packed = True
        else:  # a tied head is the embedding, which has to stay readable
            self.output = matrix(self.lm_head.weight, None)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module. Raises InvalidState for a packed network."""
        self._check_readable()
        return super().state_dict(*args, **kwargs)

    def _check_readable(self) -> None:
        if self.packed:
            raise InvalidState("this network is packed for serving and has no readable weights: load with frozen=False")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskedLM":
        self._check_readable()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        if self.output is not None:  # the parameters' storage was replaced
            self.fuse()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a copy's parameters are its own, so it has to fuse anew."""
        self._check_readable()
        return self.__dict__ | {"output": None}

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] of which number i predicts token i, of canvases int64 [B, L].

        lengths: int64 [B], positions of each row that are there (rows are padded on the right); None: all of them.
        Raises InvalidValue for a canvas longer than the network's.
        """
        hidden = self.states(tokens, lengths)
        return torch.cat((hidden[:, :1], hidden[:, :-1]), 1) if self.config.logit_shift else hidden

    def states(
        self,
        tokens: Tensor,  # int64 [B, n]
        lengths: Tensor | None = None,  # int64 [B]
        cache: CanvasCache | None = None,
        columns: Tensor | None = None,  # int64 [B, n]
        rows: Tensor | None = None,  # int64 [B]
    ) -> Tensor:
        """Hidden states [B, n, D] as the layers leave them: with `logit_shift` number i predicts token i + 1.

        Args: cache: keys and values are written to it, and its other columns are seen. columns: the positions fed,
        in a canvas whose rest the cache holds; None: the canvas from 0 on. rows: of the cache; None: all of them.
        """
        batch, n = tokens.shape
        if n > self.config.max_length:
            raise InvalidValue(f"a canvas of {n} positions exceeds this network's {self.config.max_length}: shorten it")
        x = self.embed_tokens(tokens)
        cos = sin = None
        if self.embed_positions is not None:
            # the column behind a full canvas is padding: any position will do
            at = (
                torch.arange(n, device=tokens.device)
                if columns is None
                else columns.clamp_max(self.config.max_length - 1)
            )
            x = x + self.embed_positions(at)
        else:
            longest = n if cache is None else cache.length + 1
            cos, sin = self._rope.upto(longest, x.dtype, x.device)
            cos, sin = (cos[:n], sin[:n]) if columns is None else (cos[columns], sin[columns])
        end = n if columns is None or cache is None else cache.length
        mask = None
        if lengths is not None:
            mask = (torch.arange(end, device=tokens.device) < lengths.unsqueeze(1))[:, None, None, :]
        step = CanvasStep(batch, n, cos, sin, mask, cache, end, rows, columns)
        x = x.view(batch * n, -1)
        for layer in self.layers:
            x = layer(x, step)
        hidden: Tensor = self.norm(x)
        return hidden.view(batch, n, -1)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]; the mask's is -inf: it is never an answer."""
        if self.output is None or (torch.is_grad_enabled() and not self.packed):
            logits: Tensor = self.lm_head(hidden)
        else:
            logits = self.output(hidden)
        logits[..., self.config.mask_id] = float("-inf")
        return logits

    # --- as an export (inference.portable)

    @property
    def spec(self) -> EngineSpec:
        """What couplings and decoders ask of the sizes."""
        c = self.config
        return EngineSpec("masked-lm", c.vocab_size, c.hidden_size, c.num_layers, c.max_length)

    def seal_inputs(self) -> dict[str, Tensor]:
        """Ragged canvases [3, L] of which about half are masks, and their lengths [3]."""
        length = min(24, self.config.max_length)
        rows, places = torch.arange(3).unsqueeze(1), torch.arange(length)
        ids = (uniform(0, rows, places, 0) * self.config.vocab_size).long()
        ids[uniform(0, rows, places, 1) < 0.5] = self.config.mask_id
        return {"tokens": ids, "lengths": (length - torch.arange(3)).clamp_min(1)}

    def seal_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [3, L, V] of one pass over the canvases."""
        tokens, lengths = inputs["tokens"].to(self.device), inputs["lengths"].to(self.device)
        return self._comparable(self(tokens, lengths), lengths)

    def seal_replay(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same from the cache: a pass that fills it, then block after block over what it holds of the others."""
        tokens, lengths = inputs["tokens"].to(self.device), inputs["lengths"].to(self.device)
        batch, length = tokens.shape
        cache = CanvasCache(self.config, batch, length, self.dtype, self.device)
        self.states(tokens, lengths, cache)
        blocks = []
        for start in range(0, length, 5):
            columns = torch.arange(start, min(start + 5, length), device=self.device).expand(batch, -1)
            blocks.append(self.states(tokens.gather(1, columns), lengths, cache, columns))
        hidden = torch.cat(blocks, 1)
        if self.config.logit_shift:
            hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), 1)
        return self._comparable(hidden, lengths)

    def _comparable(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Logits, 0 for the mask (which is never an answer) and where a row has no position."""
        logits = self.head(hidden)
        logits[..., self.config.mask_id] = 0.0
        there = torch.arange(logits.shape[1], device=logits.device) < lengths.unsqueeze(1)
        return logits * there.unsqueeze(-1)


def refuse_causal(net: MaskedLM) -> None:
    """Raises InvalidValue when a later token changes no earlier state: such a network cannot fill holes.

    The probe is a canvas of masks whose last token takes a few values. Works for any network with `states`.
    """
    config = net.config
    length = min(4, config.max_length)
    others = [i for i in range(config.vocab_size) if i != config.mask_id][:4]
    if length < 2 or len(others) < 2:
        return
    canvas = torch.full((len(others), length), config.mask_id, device=net.device)
    canvas[:, -1] = torch.tensor(others, device=net.device)
    with torch.no_grad():
        early = net.states(canvas)[:, : length - 1]
    if bool((early == early[:1]).all()):
        raise InvalidValue(
            "this network is causal: changing the last token of a canvas changes no earlier state; masked diffusion "
            "needs a bidirectional one"
        )
