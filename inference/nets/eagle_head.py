"""EAGLE heads: one decoder layer that continues the target's own hidden states (EAGLE-1/2 and EAGLE-3).

Source: EAGLE (arXiv 2401.15077), EAGLE-3 (arXiv 2503.01840); tensor names and switches are those of `speculators`.
What a head reads at slot j is the pair (state of token j, token j+1); it predicts token j+2, at position j. While
drafting, the state of a drafted token is the head's own output (`feedback`), since the target has not read it yet.
`embed`, `project`, `forward`, `feedback`, `logits` are the five pieces that training and decoding share.

Shape letters: B batch, n new pairs, C cache slots up to the longest row, D width of the head, Dt width of the target,
a auxiliary layers, V vocabulary of the target, Vd of the draft.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.nets.config_json import read_config
from draftsmith.inference.nets.matrices import Matrix, joined, matrix
from draftsmith.inference.nets.rope import RopeTable, rope_frequencies
from draftsmith.inference.nets.transformer import Block, BlockConfig, RMSNorm, Step, Weights, plan_step

VERSIONS = (1, 3)
FAMILIES = ("llama", "qwen3")  # of the head's layer; qwen3 norms each query and key head


@dataclass(frozen=True)
class EagleConfig:
    """Everything that decides a head's function. Raises InvalidValue, one line, for what no head can be.

    EAGLE-1 (version 1; EAGLE-2 differs in the tree alone): fc over [embedding; state], a layer without
    input_layernorm, no final norm, the target's own head. EAGLE-3: fc over the auxiliary states, a layer over
    [embedding; state], own norm and head over the draft vocabulary.
    """

    hidden_size: int  # D
    target_hidden_size: int  # Dt
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # V: rows of the embedding, ids that may be fed
    draft_vocab_size: int  # Vd <= V: rows of the head
    aux_layers: tuple[int, ...]  # target states read: index of transformers' hidden_states ("after"; 0: embeddings)
    max_positions: int
    rope: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )  # transformers' rope_parameters
    version: int = 3
    family: str = "llama"
    norm_eps: float = 1e-6
    activation: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = False
    norm_before_residual: bool = False  # the residual is the normed state
    norm_before_fc: bool = False  # one norm over all auxiliary states (input_norm)
    fc_norm: bool = False  # one norm for each auxiliary state (fc_norm.{i})
    norm_output: bool = False  # the state fed back is the normed one
    own_embedding: bool = True  # False: the target's embedding is read (`use_embedding`)
    num_layers: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "aux_layers", tuple(self.aux_layers))  # a parsed config.json brings a list
        self._check()

    def _check(self) -> None:
        if self.version not in VERSIONS:
            raise unknown_choice("EAGLE version", str(self.version), map(str, VERSIONS))
        if self.family not in FAMILIES:
            raise unknown_choice("family of an EAGLE head", self.family, FAMILIES)
        if self.num_layers != 1:
            raise InvalidValue(f"an EAGLE head has exactly one layer, got num_layers {self.num_layers}")
        for name in ("hidden_size", "target_hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidValue(f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise InvalidValue(
                f"draft_vocab_size must lie in 1..vocab_size ({self.vocab_size}), got {self.draft_vocab_size}"
            )
        if not self.aux_layers or min(self.aux_layers) < 0 or len(set(self.aux_layers)) != len(self.aux_layers):
            raise InvalidValue(f"aux_layers must be different layers from 0 on, got {list(self.aux_layers)}")
        if not self.own_embedding and self.hidden_size != self.target_hidden_size:
            raise InvalidValue(
                f"a head of width {self.hidden_size} cannot read the embedding of a target of width "
                f"{self.target_hidden_size}: set own_embedding"
            )
        if self.version == 1:
            self._check_first()

    def _check_first(self) -> None:
        flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        wrong = [name for name in flags if getattr(self, name)]
        if wrong:
            raise InvalidValue(f"EAGLE-1 has no {wrong[0]}: leave it false, or take version 3")
        if self.hidden_size != self.target_hidden_size or self.draft_vocab_size != self.vocab_size:
            raise InvalidValue("EAGLE-1 uses the target's head: its width and vocabulary must be the target's")
        if len(self.aux_layers) != 1:
            raise InvalidValue(f"EAGLE-1 reads one state, the target's last; got aux_layers {list(self.aux_layers)}")

    @property
    def block(self) -> BlockConfig:
        """The layer, as the shared blocks describe one."""
        return BlockConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_eps=self.norm_eps,
            activation=self.activation,
            qkv_bias=self.attention_bias,
            o_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=self.family == "qwen3",
        )

    @property
    def feature_size(self) -> int:
        """Width of what is read of the target at each token: a * Dt."""
        return len(self.aux_layers) * self.target_hidden_size

    @property
    def fc_inputs(self) -> int:
        """Columns of fc.weight."""
        return 2 * self.hidden_size if self.version == 1 else self.feature_size

    @property
    def reduced(self) -> bool:
        """Whether the draft vocabulary is smaller than the target's (d2t and t2d are there)."""
        return self.draft_vocab_size < self.vocab_size

    @property
    def max_length(self) -> int:
        """Longest text: as `CausalLMConfig.from_hf` has it for longrope."""
        if self.rope["rope_type"] == "longrope":
            return min(int(self.rope["original_max_position_embeddings"]), self.max_positions)
        return self.max_positions

    def to_json(self) -> dict[str, Any]:
        """Plain values for a config.json."""
        return {**dataclasses.asdict(self), "aux_layers": list(self.aux_layers), "rope": dict(self.rope)}

    @staticmethod
    def from_json(fields: Mapping[str, Any], where: str = "config.json") -> "EagleConfig":
        """The reverse of `to_json`. Raises InvalidValue for keys that are unknown or missing."""
        return read_config(EagleConfig, fields, "an EAGLE head", where)


def default_aux_layers(num_layers: int, version: int = 3) -> tuple[int, ...]:
    """The states read by default: 2, L/2 and L-3 (clamped to 1..L-1 and without repeats), for EAGLE-1 the last one."""
    if num_layers < 1:
        raise InvalidValue(f"a target has at least one layer, got {num_layers}")
    if version == 1:
        return (num_layers,)
    top = max(1, num_layers - 1)
    return tuple(dict.fromkeys(min(max(1, i), top) for i in (2, num_layers // 2, num_layers - 3)))


class EagleLayer(Block):
    """The one layer of a head; a `Block` whose input is [embedding; state] (EAGLE-3), or fc of both (EAGLE-1)."""

    def __init__(self, config: EagleConfig) -> None:
        block = config.block
        super().__init__(block, layer=0)
        self.version, self.norm_before_residual = config.version, config.norm_before_residual
        if config.version == 1:
            del self.input_layernorm
            return
        for name in ("q_proj", "k_proj", "v_proj"):
            plain: nn.Linear = getattr(self.self_attn, name)
            wide = nn.Linear(2 * block.hidden_size, plain.out_features, bias=block.qkv_bias)
            setattr(self.self_attn, name, wide)
        self.hidden_norm = RMSNorm(block.hidden_size, block.norm_eps)

    def _record(self, make: Callable[[list[nn.Linear]], Matrix]) -> Weights:
        qkv, out, gate_up, down = (make(linears) for linears in self._groups())
        attention, normed = self.self_attn, self.config.qk_norm
        after = self.post_attention_layernorm.weight
        return Weights(
            attention_norm=after if self.version == 1 else self.input_layernorm.weight,  # EAGLE-1 reads none here
            qkv=qkv,
            q_norm=attention.q_norm.weight if normed else None,
            k_norm=attention.k_norm.weight if normed else None,
            out=out,
            mlp_norm=after,
            gate_up=gate_up,
            down=down,
        )

    def current(self) -> Weights:
        """The parameters as a pass reads them: the fused ones when serving, differentiable ones under autograd."""
        if self.weights is None or (torch.is_grad_enabled() and not self.packed):
            return self._record(joined)
        return self.weights

    def enter(self, weights: Weights, embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """(what attention reads, the residual) of embeds, states [N, D]; EAGLE-1: `states` is fc of both already."""
        if self.version == 1:
            return states, states
        eps, shape = self.config.norm_eps, weights.attention_norm.shape
        normed = torch.rms_norm(states, shape, self.hidden_norm.weight, eps)
        inputs = torch.cat((torch.rms_norm(embeds, shape, weights.attention_norm, eps), normed), -1)
        return inputs, normed if self.norm_before_residual else states

    def leave(self, weights: Weights, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output [N, D] from what attention gave [N, H*d]."""
        x = weights.out.plus(residual, attended)
        normed = torch.rms_norm(x, weights.mlp_norm.shape, weights.mlp_norm, self.config.norm_eps)
        gate, up = weights.gate_up(normed).chunk(2, -1)
        return weights.down.plus(x, self.act(gate) * up)

    def forward(self, embeds: Tensor, states: Tensor, step: Step) -> Tensor:  # type: ignore[override]  # two inputs
        """embeds, states [B*n, D] -> [B*n, D]; writes keys and values into the step's cache."""
        weights = self.current()
        inputs, residual = self.enter(weights, embeds, states)
        return self.leave(weights, residual, self._attend(weights, inputs, step))


class EagleHead(nn.Module):
    """A head; its state dict has the names and shapes of the speculators format (embed_tokens only where it is own).

    `use_embedding` (and for EAGLE-1 `use_output`) lend it what belongs to the target; what is lent is never registered,
    saved or trained.
    """

    d2t: Tensor | None  # int64 [Vd]: target id = index + d2t[index]
    t2d: Tensor | None  # bool [V]: ids that the draft has

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.norm_eps
        self.fc = nn.Linear(config.fc_inputs, width, bias=config.fc_bias)
        self.layers = nn.ModuleList([EagleLayer(config)])
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.version == 3:
            self.norm = RMSNorm(width, eps)
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        if config.norm_before_fc:
            self.input_norm = RMSNorm(config.feature_size, eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(config.target_hidden_size, eps) for _ in config.aux_layers)
        reduced = config.reduced
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64) if reduced else None)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool) if reduced else None)
        self.rope = RopeTable(
            partial(rope_frequencies, config.rope, config.head_dim, config.max_positions, config.max_length)
        )
        self._embedding: Callable[[], Tensor] | None = None  # lent, [V, D]
        self._output: Callable[[Tensor], Tensor] | None = None  # lent, [..., D] -> [..., V]
        self._served: Matrix | None = None  # lm_head after `fuse`

    @property
    def layer(self) -> EagleLayer:
        layer = self.layers[0]
        assert isinstance(layer, EagleLayer)
        return layer

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    # --- what the target lends

    def use_embedding(self, table: Callable[[], Tensor]) -> None:
        """Read the target's input embedding [V, D], asked for at each pass."""
        if self.config.own_embedding:
            raise InvalidState("this head has its own embedding: nothing to lend")
        self._embedding = table

    def use_output(self, output: Callable[[Tensor], Tensor]) -> None:
        """EAGLE-1: the target's head, states [..., D] -> logits [..., V]."""
        if self.config.version != 1:
            raise InvalidState("an EAGLE-3 head has its own lm_head: nothing to lend")
        self._output = output

    # --- the draft vocabulary

    def set_draft_vocabulary(self, ids: Tensor) -> None:
        """Make `ids` (int64 [Vd], strictly increasing) the draft vocabulary. Raises InvalidValue for other ids."""
        config = self.config
        if not config.reduced:
            raise InvalidState(f"the draft vocabulary is the whole one ({config.vocab_size} ids): nothing to choose")
        check_draft_ids(ids, config.draft_vocab_size, config.vocab_size)
        assert self.d2t is not None and self.t2d is not None
        ids = ids.to(self.d2t.device)
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_()[ids] = True

    def draft_ids(self) -> Tensor:
        """int64 [Vd]: the target's id of each row of the head."""
        rows = torch.arange(self.config.draft_vocab_size, device=self.device)
        return rows if self.d2t is None else rows + self.d2t

    def check(self) -> None:
        """Raises InvalidValue, one line, for tables or weights that cannot be right (d2t, t2d, NaN)."""
        if self.d2t is not None and self.t2d is not None:
            ids = self.draft_ids()
            check_draft_ids(ids, self.config.draft_vocab_size, self.config.vocab_size)
            if int(self.t2d.sum()) != len(ids) or not bool(self.t2d[ids].all()):
                raise InvalidValue("t2d does not mark exactly the ids of d2t: the two tables are of different heads")
        for name, parameter in self.named_parameters():
            if not parameter.isfinite().all():
                raise InvalidValue(f"{name} holds NaN or infinity: these weights were never loaded, or are broken")

    # --- passes

    def fuse(self) -> None:
        """For serving: projections that read one input become one product (see `Block.fuse`)."""
        self.layer.fuse()
        if self.config.version == 3:
            self._served = matrix(self.lm_head.weight, None)

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        """An empty cache of pairs."""
        config = self.config
        return StaticCache(1, batch, config.num_kv_heads, config.head_dim, capacity, self.dtype, self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """[..., D] of int64 [...]. Raises InvalidState when the target has not lent its embedding."""
        if self.config.own_embedding:
            table: Tensor = self.embed_tokens.weight
        elif self._embedding is None:
            raise InvalidState("this head reads its target's embedding: lend it with use_embedding() first")
        else:
            table = self._embedding()
        return F.embedding(tokens, table).to(self.dtype)

    def project(self, features: Tensor) -> Tensor:
        """The target's states [..., a*Dt] as the layer reads them, [..., D]. EAGLE-1 reads them as they are."""
        if features.shape[-1] != self.config.feature_size:
            raise InvalidValue(
                f"features of width {features.shape[-1]}, this head reads {len(self.config.aux_layers)} states of "
                f"width {self.config.target_hidden_size}: {self.config.feature_size} in all"
            )
        if self.config.version == 1:
            return features
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.config.aux_layers), -1)
            features = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], -1)
        out: Tensor = self.fc(features)
        return out

    def merge(self, embeds: Tensor, states: Tensor) -> Tensor:
        """The states as the layer takes them, [..., D]: in EAGLE-1 fc of both, in EAGLE-3 `states` itself."""
        if self.config.version == 3:
            return states
        merged: Tensor = self.fc(torch.cat((embeds, states), -1))
        return merged

    def forward(
        self,
        embeds: Tensor,  # [B, n, D], of the tokens j+1
        states: Tensor,  # [B, n, D], from `project` at tokens j that the target has read, else from `feedback`
        *,
        cache: StaticCache | None = None,
        positions: Tensor | None = None,  # int64 [B, n]; default: cache.lengths[b] + 0..n-1
        mask: Tensor | None = None,  # additive, broadcastable to [B, 1, n, C]; replaces the causal rule (trees)
    ) -> Tensor:
        """Output states [B, n, D] of n pairs, before the final norm. Writes the cache and advances it by n."""
        config = self.config
        batch, n, width = embeds.shape
        step = plan_step(
            self.rope,
            (None,),
            config.num_heads // config.num_kv_heads,
            batch,
            n,
            embeds.dtype,
            embeds.device,
            cache,
            positions,
            mask,
        )
        embeds = embeds.reshape(-1, width)
        out: Tensor = self.layer(embeds, self.merge(embeds, states.reshape(-1, width)), step)
        if cache is not None:
            cache.advance(n)
        return out.view(batch, n, width)

    def feedback(self, out: Tensor) -> Tensor:
        """What stands for the target's state of the token drafted from `out` [..., D]."""
        normed: Tensor = self.norm(out) if self.config.norm_output else out
        return normed

    def ready(self, out: Tensor) -> Tensor:
        """[..., D] of `out`: what the head's matrix is applied to. EAGLE-1: `out` itself."""
        normed: Tensor = self.norm(out) if self.config.version == 3 else out
        return normed

    def logits(self, out: Tensor) -> Tensor:
        """Logits [..., Vd] of output states [..., D]. Raises InvalidState for an EAGLE-1 head without its target."""
        if self.config.version == 3:
            ready = self.ready(out)
            if self._served is None or torch.is_grad_enabled():
                return F.linear(ready, self.lm_head.weight)
            return self._served(ready)
        if self._output is None:
            raise InvalidState("an EAGLE-1 head uses its target's head: lend it with use_output() first")
        return self._output(out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EagleHead":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        if self._served is not None:  # the parameters may be new ones
            self.fuse()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a copy's parameters are its own, so it has to fuse anew."""
        return self.__dict__ | {"_served": None}


def check_draft_ids(ids: Tensor, count: int, vocab_size: int) -> None:
    """Raises InvalidValue unless `ids` are `count` strictly increasing ids of 0..vocab_size-1."""
    if ids.dtype != torch.int64 or ids.shape != (count,):
        raise InvalidValue(f"a draft vocabulary must be int64 [{count}], got {ids.dtype} {list(ids.shape)}")
    if bool((ids[1:] <= ids[:-1]).any()) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise InvalidValue(
            f"the ids of a draft vocabulary (index + d2t) must rise strictly within 0..{vocab_size - 1}: "
            "d2t is damaged, or holds ids instead of offsets"
        )


def shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of such a head, without making one."""
    with torch.device("meta"):
        state = EagleHead(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load_tensors(head: EagleHead, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill `head`, every tensor by its name. Raises InvalidValue that names what is missing, unknown or misshapen."""
    config = head.config
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if config.reduced and ("d2t" not in tensors or "t2d" not in tensors):
        raise InvalidValue(
            f"{where} has no d2t or t2d, but its draft vocabulary ({config.draft_vocab_size}) is smaller than the "
            f"target's ({config.vocab_size}): export it again with both tables"
        )
    _refuse_names("lacks", sorted(set(wanted) - set(tensors)), where)
    _refuse_names("holds unknown", sorted(set(tensors) - set(wanted)), where)
    found = tuple(tensors["fc.weight"].shape)
    if found != wanted["fc.weight"]:
        raise InvalidValue(
            f"{where}: fc.weight is {list(found)}, must be {list(wanted['fc.weight'])} (states read: "
            f"{list(config.aux_layers)} of width {config.target_hidden_size})"
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise InvalidValue(f"{where}: {name} is {list(tensors[name].shape)}, must be {list(shape)}")
    head.load_state_dict(dict(tensors))
    try:
        head.check()
    except InvalidValue as error:
        raise InvalidValue(f"{where}: {error}") from None


def _refuse_names(what: str, names: Iterable[str], where: str) -> None:
    listed = list(names)
    if listed:
        more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
        raise InvalidValue(f"{where} {what} {', '.join(listed[:4])}{more}: not the tensors of this EAGLE head")
