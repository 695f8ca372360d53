"""What speculative decoding gains, from sizes alone: the bytes and arithmetic of every call; nothing is timed.

A call on n tokens takes the longer of reading its weights and doing its arithmetic (the roofline), plus an overhead
that does not depend on n (launches, synchronisation between GPUs, the host). A plain step of B rows is one target call
on B tokens; a speculative round is one target call on B * num_draft_tokens tokens, `steps` draft calls and bookkeeping:

    speed-up = accepted length * plain step / round

The accepted length goes in: this forecasts the speed-up that comes of it, not how well a draft guesses. A target with
routed experts reads those that its tokens touch, more of them the more tokens it verifies: for such targets this is
most of what a verification costs.
Times are multiples of the roofline time of a plain step, overheads too. What carries over from one target to another is
then an overhead's share of a plain step, not its seconds: whoever serves a larger target spreads it over more GPUs, so
that its bytes take about as long. The number of GPUs, and what share of their bandwidth is reached, cancel.
Left out: the cache that attention reads (the context is not known here) and the bytes of activations.
Shape letters: B batch, n tokens of a call.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftsmith.inference.errors import InvalidValue, unknown_choice

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
MATRICES = 3  # of a gated MLP


@dataclass(frozen=True)
class Gpu:
    """Nominal rates of one accelerator, from its maker's data sheet."""

    bandwidth: float  # bytes per second
    flops: float  # of dense 16-bit matrix products, per second


GPUS: dict[str, Gpu] = {  # NVIDIA's data sheets, SXM forms
    "a100": Gpu(2.039e12, 312e12),
    "h100": Gpu(3.35e12, 989e12),
    "h200": Gpu(4.8e12, 989e12),
    "b200": Gpu(8.0e12, 2250e12),
}


@dataclass(frozen=True)
class Sizes:
    """Weights of a network that a call may read, in numbers (not bytes), and how many layers it passes."""

    layers: int
    always: float  # read by every call: attention, dense MLPs, shared experts, routers, the head; not the embedding
    expert: float = 0.0  # one routed expert of one layer
    experts: int = 0  # routed ones of a layer; 0: none
    chosen: int = 0  # of them, by each token
    routed_layers: int = 0
    number_bytes: float = 2.0

    def __post_init__(self) -> None:
        if self.layers < 1 or not self.always > 0 or not self.number_bytes > 0:
            raise InvalidValue(f"a network has at least one layer and weights that are read, got {self}")
        if self.experts and not (0 < self.chosen <= self.experts and 0 < self.routed_layers <= self.layers):
            raise InvalidValue(
                f"a token chooses 1 to {self.experts} experts in 1 to {self.layers} layers, "
                f"got {self.chosen} in {self.routed_layers}"
            )

    def bytes(self, n: float) -> float:
        """Bytes of weights that a call on n tokens reads."""
        touched = experts_touched(self.experts, self.chosen, n) if self.experts else 0.0
        return self.number_bytes * (self.always + self.routed_layers * touched * self.expert)

    def flops(self, n: float) -> float:
        """Floating point operations of a call on n tokens: two for each weight that a token passes."""
        return 2.0 * n * (self.always + self.routed_layers * self.chosen * self.expert)


@dataclass(frozen=True)
class Plan:
    """How a server drafts. topk 1: a chain (num_draft_tokens = steps + 1); more: a tree of num_draft_tokens nodes."""

    batch: int
    steps: int  # draft calls of a round
    topk: int
    num_draft_tokens: int  # tokens that the target verifies for each row, the root included

    def __post_init__(self) -> None:
        if min(self.batch, self.steps, self.topk) < 1 or self.num_draft_tokens < 2:
            raise InvalidValue(f"batch, steps and topk start at 1 and num_draft_tokens at 2, got {self}")
        if self.topk == 1 and self.num_draft_tokens != self.steps + 1:
            raise InvalidValue(
                f"a chain of {self.steps} steps verifies {self.steps + 1} tokens, got {self.num_draft_tokens}: "
                f"for a tree give topk"
            )


@dataclass(frozen=True)
class Overheads:
    """What calls cost beside the roofline, in roofline times of a plain step; at least 0. These four are fitted."""

    call: float = 0.0  # of every target call, plain ones too
    draft: float = 0.0  # of every draft call
    tree: float = 0.0  # of every draft call of a tree, beside that (choosing among candidates)
    round: float = 0.0  # of every speculative round

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0:
            raise InvalidValue(f"overheads are times, at least 0; got {self}")

    def to_json(self) -> dict[str, float]:
        """JSON-ready."""
        return dict(vars(self))


@dataclass(frozen=True)
class Terms:
    """What a round costs: roofline times over that of a plain step, and calls that overheads multiply."""

    verify: float  # the target call on the drafted tokens
    draft: float  # all draft calls of a round
    draft_calls: float
    tree_calls: float


def experts_touched(experts: int, chosen: int, n: float) -> float:
    """Expected number of `experts` that n tokens touch, each choosing `chosen` uniformly: E (1 - (1 - k/E)^n)."""
    if not 0 < chosen <= experts or n < 0:
        raise InvalidValue(f"tokens choose 1 to {experts} experts each, and are not negative in number; got {chosen}")
    return float(experts * (1.0 - (1.0 - chosen / experts) ** n))


def call_seconds(sizes: Sizes, n: float, gpu: Gpu) -> float:
    """Roofline seconds of a call on n tokens on one GPU."""
    return max(sizes.bytes(n) / gpu.bandwidth, sizes.flops(n) / gpu.flops)


def terms(target: Sizes, draft: Sizes, plan: Plan, gpu: Gpu) -> Terms:
    """The terms of a configuration. A tree's draft calls after the first take topk tokens a row, a chain's one."""
    plain = call_seconds(target, plan.batch, gpu)
    first = call_seconds(draft, plan.batch, gpu)
    later = call_seconds(draft, plan.batch * plan.topk, gpu)
    return Terms(
        verify=call_seconds(target, plan.batch * plan.num_draft_tokens, gpu) / plain,
        draft=(first + (plan.steps - 1) * later) / plain,
        draft_calls=plan.steps,
        tree_calls=plan.steps if plan.topk > 1 else 0,
    )


def plain_step(o: Overheads) -> float:
    """In roofline times of itself."""
    return 1.0 + o.call


def whole_round(t: Terms, o: Overheads) -> float:
    """A speculative round, in roofline times of a plain step."""
    return t.verify + o.call + t.draft + t.draft_calls * o.draft + t.tree_calls * o.tree + o.round


def speedup(accepted_length: float, t: Terms, o: Overheads) -> float:
    """Tokens a second over plain decoding's. accepted_length: tokens committed per target call, bonus included."""
    if not accepted_length >= 1.0:
        raise InvalidValue(f"a target call commits at least one token, got an accepted length of {accepted_length}")
    return accepted_length * plain_step(o) / whole_round(t, o)


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Sizes from a config.json with gated MLPs: Llama, Mistral, Qwen 2 and 3, with experts or not; EAGLE drafts too.

    Norms, biases and routers are left out (below a hundredth). A config with `draft_vocab_size` is an EAGLE-3 head: its
    attention reads two states and its head has that many rows. Raises InvalidValue where a needed key is missing.
    """
    config = {**config, **config.get("text_config", {})}
    try:
        width, layers, heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or width // heads)
        draft = config.get("draft_vocab_size") is not None
        rows = int(config["draft_vocab_size"] if draft else config["vocab_size"])
        attention = _attention(config, layers, width, heads, kv_heads, head_dim, inputs=2 if draft else 1)
        experts, chosen, inner = _experts(config)
        dense = layers if not experts else _dense_layers(config, layers)
        always = attention + width * rows
        if dense:
            wide = config.get("intermediate_size_mlp", config["intermediate_size"])
            always += dense * MATRICES * width * int(wide)
        shared = int(config.get("shared_expert_intermediate_size") or int(config.get("num_shared_experts", 0)) * inner)
        if config.get("model_type") in ("llama4", "llama4_text"):
            shared = inner  # every expert layer of Llama 4 has one shared expert
        always += (layers - dense) * MATRICES * width * shared
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValue(
            f"the config.json does not tell the sizes of a network with gated MLPs ({error!r} is missing or no number)"
        ) from None
    return Sizes(
        layers=layers,
        always=float(always),
        expert=float(MATRICES * width * inner) if experts else 0.0,
        experts=experts,
        chosen=chosen,
        routed_layers=layers - dense if experts else 0,
        number_bytes=_number_bytes(config),
    )


def _attention(
    config: Mapping[str, Any], layers: int, width: int, heads: int, kv_heads: int, head_dim: int, *, inputs: int
) -> float:
    """Weights of all attention layers; Qwen3-Next's linear ones (gated delta rule) and gated queries included."""
    gated = config.get("model_type") == "qwen3_next"  # its queries bring a gate of their size
    queries, pairs = heads * head_dim, 2 * kv_heads * head_dim
    full = inputs * width * ((2 if gated else 1) * queries + pairs) + queries * width
    if not gated:
        return float(layers * full)
    linear_key = int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
    linear_value = int(config["linear_num_value_heads"]) * int(config["linear_value_head_dim"])
    linear = width * (2 * linear_key + 2 * linear_value) + linear_value * width
    kinds = config.get("layer_types")
    fulls = kinds.count("full_attention") if kinds else layers // int(config.get("full_attention_interval", 4))
    return float(fulls * full + (layers - fulls) * linear)


def _experts(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Routed experts, how many each token chooses, width of one; (0, 0, 0) for a dense network."""
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    if experts < 2:
        return 0, 0, 0
    return (
        experts,
        int(config["num_experts_per_tok"]),
        int(config.get("moe_intermediate_size") or config["intermediate_size"]),
    )


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers of a network with experts that have an ordinary MLP all the same."""
    if config.get("moe_layers"):
        return layers - len(config["moe_layers"])
    step = int(config.get("interleave_moe_layer_step") or config.get("decoder_sparse_step") or 1)
    named = len(config.get("mlp_only_layers") or ())
    return max(int(config.get("first_k_dense_replace", 0)), named, layers - layers // step)


def _number_bytes(config: Mapping[str, Any]) -> float:
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method")
        if method != "fp8":
            raise InvalidValue(f"the bytes of weights quantized by {method!r} are not known here: only fp8")
        return float(DTYPE_BYTES["float8"])
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in DTYPE_BYTES:
        raise unknown_choice("dtype of the weights", dtype, DTYPE_BYTES)
    return float(DTYPE_BYTES[dtype])
