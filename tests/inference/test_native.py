"""The native network against transformers: four families, every switch, every way of feeding a cache."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import FAMILIES, CausalLM, CausalLMConfig
from tests.engines import CHECKS, SIZES, TOLERANCE, VOCAB, close, logits, plain, tiny_hf, tokens

WINDOW = {"sliding_window": 6}
MIXED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "llama with biases": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama, as many key heads": ("llama", SIZES | {"num_key_value_heads": 4}),
    "llama, one key head": ("llama", SIZES | {"num_key_value_heads": 1}),
    "llama, wide heads, gelu": ("llama", SIZES | {"head_dim": 12, "hidden_act": "gelu"}),
    "mistral": ("mistral", SIZES | {"sliding_window": None}),
    "mistral with a window": ("mistral", SIZES | WINDOW),
    "mistral tied, wide heads": ("mistral", SIZES | WINDOW | {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", SIZES),
    "qwen2 tied, windows from layer 1": ("qwen2", SIZES | MIXED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 12}),
    "qwen3 tied with biases": ("qwen3", SIZES | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3, mixed layers": (
        "qwen3",
        SIZES | MIXED | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}


def native(model: Any, max_length: int | None = None) -> NativeEngine:
    net = CausalLM(CausalLMConfig.from_hf(model.config, max_length))
    net.load_state_dict(model.state_dict())
    return NativeEngine(net.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def pairs() -> Callable[[str], tuple[NativeEngine, Any]]:
    made: dict[str, tuple[NativeEngine, Any]] = {}

    def pair(case: str) -> tuple[NativeEngine, Any]:
        if case not in made:
            family, fields = CASES[case]
            model = tiny_hf(family, **fields)
            made[case] = native(model), model
        return made[case]

    return pair


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, check: Callable[[Engine, Any], None], pairs: Any) -> None:
    check(*pairs(case))


def test_every_family_is_covered() -> None:
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", ["llama", "mistral with a window", "qwen2", "qwen3"])
def test_a_shift_of_one_position_is_far_above_the_tolerance(case: str, pairs: Any) -> None:
    """Negative control: relative positions matter, so a chunk placed one position late must not pass."""
    engine, model = pairs(case)
    ids = tokens(1, 12)
    cache = engine.new_cache(1, 16)
    logits(engine, ids[:, :6], cache=cache)
    late = torch.arange(7, 13).unsqueeze(0)
    got = logits(engine, ids[:, 6:], cache=cache, positions=late)
    assert (got - plain(model, ids)[:, 6:]).abs().max() > 100 * TOLERANCE


def test_a_stale_slot_is_far_above_the_tolerance(pairs: Any) -> None:
    """Negative control: rows that are read one slot too far see garbage."""
    engine, model = pairs("llama")
    ids = tokens(1, 12)
    cache = engine.new_cache(1, 16)
    logits(engine, torch.cat((ids[:, :6], ids[:, :1]), 1), cache=cache)  # a seventh, wrong token is not rolled back
    got = logits(engine, ids[:, 6:], cache=cache)
    assert (got - plain(model, ids)[:, 6:]).abs().max() > 100 * TOLERANCE


def test_the_window_is_needed(pairs: Any) -> None:
    """Negative control: the same weights without the window differ, but only behind its end."""
    engine, _ = pairs("mistral with a window")
    config = engine.net.config
    wide = CausalLM(CausalLMConfig(**(vars(config) | {"windows": (None,) * config.num_layers})))
    wide.load_state_dict(engine.net.state_dict())
    ids = tokens(1, 12)
    error = (logits(NativeEngine(wide.eval()), ids) - logits(engine, ids)).abs().amax((0, 2))
    assert error[:6].max() < TOLERANCE
    assert error[6:].min() > 100 * TOLERANCE


def test_greedy_text_equals_generate(pairs: Any) -> None:
    engine, model = pairs("qwen3")
    ids = tokens(1, 5)
    want = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:]
    cache, new, got = engine.new_cache(1, 45), ids, []
    for _ in range(40):
        new = logits(engine, new, cache=cache)[:, -1:].argmax(-1)
        got.append(int(new))
    assert got == want.tolist()


def test_explicit_causal_mask_and_positions_change_nothing(pairs: Any) -> None:
    for case in ("llama", "qwen3, mixed layers", "llama, as many key heads"):
        engine, _ = pairs(case)
        ids = tokens(2, 14)
        want = logits(engine, ids)
        mask = torch.full((14, 14), float("-inf")).triu(1)[None, None]
        close(logits(engine, ids, mask=mask), want)
        close(logits(engine, ids, positions=torch.arange(14).expand(2, -1)), want)


@pytest.mark.parametrize("case", ["llama with biases", "qwen3", "mistral with a window"])
def test_half_precision_follows_transformers(case: str, pairs: Any) -> None:
    """bfloat16: the differences are roundings; transformers in bfloat16 is as far from its own float32."""
    engine, model = pairs(case)
    ids = tokens(2, 20)
    exact = plain(model, ids)
    theirs = plain(copy.deepcopy(model).to(torch.bfloat16), ids).float()
    half = NativeEngine(copy.deepcopy(engine.net).to(torch.bfloat16))
    cache = half.new_cache(2, 32)
    assert (half.dtype, cache.keys[0].dtype) == (torch.bfloat16, torch.bfloat16)
    ours = torch.cat([logits(half, ids[:, :9], cache=cache), logits(half, ids[:, 9:], cache=cache)], 1)
    assert ours.dtype == torch.bfloat16
    noise = (theirs - exact).pow(2).mean().sqrt()
    assert (ours.float() - exact).pow(2).mean().sqrt() < 2 * noise


# ---------------------------------------------------------------------------------------------------------------------
# The network as a module


def test_fused_projections_keep_names_values_and_memory(pairs: Any) -> None:
    _, model = pairs("qwen2")
    net = CausalLM(CausalLMConfig.from_hf(model.config))
    net.load_state_dict(model.state_dict())
    before = {name: x.clone() for name, x in net.state_dict().items()}
    net.fuse()
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    block = net.blocks[0]
    attention, weights = block.self_attn, block.weights
    assert weights is not None and weights.qkv.bias is not None
    assert attention.k_proj.weight.data_ptr() == weights.qkv.weight[32:].data_ptr()
    assert attention.v_proj.bias.data_ptr() == weights.qkv.bias[48:].data_ptr()
    assert block.mlp.up_proj.weight.data_ptr() == weights.gate_up.weight[56:].data_ptr()


def test_in_place_changes_reach_the_fused_weights(pairs: Any) -> None:
    """How a served draft gets new weights while it serves."""
    engine, model = pairs("qwen2")
    served = NativeEngine(copy.deepcopy(engine.net))
    other = tiny_hf("qwen2", seed=5, **SIZES)
    with torch.no_grad():
        for name, p in served.net.named_parameters():
            p.copy_(other.state_dict()[name])
    ids = tokens(1, 8)
    close(logits(served, ids), plain(other, ids))
    close(logits(engine, ids), plain(model, ids))  # the original is untouched


@pytest.mark.parametrize("case", ["qwen2", "llama tied"])
def test_copies_conversions_and_loads_keep_fusion_and_ties(case: str, pairs: Any) -> None:
    engine, model = pairs(case)
    ids, want = tokens(1, 8), None
    want = plain(model, ids)
    copied = copy.deepcopy(engine)
    close(logits(copied, ids), want)
    with torch.no_grad():
        copied.net.blocks[1].self_attn.v_proj.weight.zero_()
    assert (logits(copied, ids) - want).abs().max() > 100 * TOLERANCE
    close(logits(engine, ids), want)
    copied.net.load_state_dict(model.state_dict(), assign=True)
    close(logits(copied, ids), want)
    copied.net.double().float()
    for block in copied.net.blocks:
        assert block.weights is not None
        assert block.weights.qkv.weight.data_ptr() == block.self_attn.q_proj.weight.data_ptr()
    assert (copied.net.lm_head.weight is copied.net.model.embed_tokens.weight) == ("tied" in case)
    close(logits(copied, ids), want)


def test_state_dict_goes_through_safetensors(pairs: Any, tmp_path: Any) -> None:
    """Views of one storage are saved as the tensors that they are."""
    from safetensors.torch import load_file, save_file

    engine, _ = pairs("qwen2")
    save_file(engine.net.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], x) for name, x in engine.net.state_dict().items())


def test_blocks_can_be_trained(pairs: Any) -> None:
    """Under autograd the named parameters are used, and their gradients are those of the HF class."""
    for case in ("qwen3 tied with biases", "llama"):
        _, model = pairs(case)
        theirs = copy.deepcopy(model).requires_grad_(True)
        net = CausalLM(CausalLMConfig.from_hf(model.config))
        net.load_state_dict(model.state_dict())
        net.fuse()
        ids = tokens(2, 9)
        net.head(net(ids)[0]).logsumexp(-1).sum().backward()
        theirs(input_ids=ids).logits.logsumexp(-1).sum().backward()
        wanted = dict(theirs.named_parameters())
        for name, p in net.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(p.grad, wanted[name].grad, atol=2e-3, rtol=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The engine at the door


def test_spec_and_kind_of_outputs(pairs: Any) -> None:
    engine, _ = pairs("llama")
    spec = engine.spec
    assert (spec.family, spec.vocab_size, spec.hidden_size, spec.num_layers, spec.max_length) == (
        "llama",
        101,
        32,
        3,
        128,
    )
    hidden, aux = engine.forward(tokens(1, 3), aux_layers=[1])
    head = engine.head(hidden)
    assert not any(x.is_inference() or x.requires_grad for x in (hidden, head, *aux))
    (hidden * torch.ones(32, requires_grad=True)).sum().backward()  # may be saved for a backward pass


class Syncs(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["llama", "qwen3, mixed layers"])
def test_no_pass_waits_for_the_device(case: str, pairs: Any) -> None:
    engine, _ = pairs(case)
    cache = engine.new_cache(2, 64)
    with Syncs() as syncs:
        for n in (9, 1, 4):
            engine.head(engine.forward(tokens(2, n), cache=cache)[0])
        cache.truncate([14, 11])
        for n in (1, 3):
            engine.forward(tokens(2, n), cache=cache)
        nodes = cache.positions(2)
        engine.forward(tokens(2, 2), cache=cache, positions=nodes, mask=torch.zeros(2, 1, 2, cache.longest + 2))
        cache.keep(torch.tensor([[1], [0]]), [18, 15])
        cache.select([1, 0])
    assert syncs.seen == []
    with Syncs() as control:
        float(torch.ones(1)[0])
    assert control.seen == ["_local_scalar_dense"]


def test_train_mode_is_refused(pairs: Any) -> None:
    engine = copy.deepcopy(pairs("llama")[0])
    assert not engine.training
    engine.net.train()
    assert engine.training
    with pytest.raises(InvalidState, match=r"call eval\(\)"):
        engine.forward(tokens(1, 2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda e: e.forward(torch.tensor([[1, VOCAB]])), f"token id {VOCAB} is outside the vocabulary 0..100"),
        (lambda e: e.forward(torch.tensor([[1, -1]])), "token id -1"),
        (lambda e: e.new_cache(1, 129), "129 tokens asked of a llama network whose positions allow 128"),
        (lambda e: e.forward(tokens(1, 129)), "129 tokens"),
        (lambda e: e.forward(), "exactly one"),
        (lambda e: e.forward(tokens(1, 2), embeds=torch.zeros(1, 2, 32)), "exactly one"),
        (lambda e: e.forward(tokens(1, 2)[0]), r"tokens must be \[B, n\]"),
        (lambda e: e.forward(torch.zeros(1, 0, dtype=torch.int64)), "none empty"),
        (lambda e: e.forward(embeds=torch.zeros(1, 2, 31)), r"embeds \[B, n, 32\]"),
        (lambda e: e.forward(tokens(2, 2), cache=e.new_cache(1, 8)), "2 rows were fed to a cache of 1"),
        (lambda e: e.forward(tokens(1, 9), cache=e.new_cache(1, 8)), "is full"),
        (lambda e: e.forward(tokens(1, 2), aux_layers=[4]), r"aux layer 4 is outside 0..3"),
        (lambda e: e.forward(tokens(1, 2), mask=torch.ones(1, 1, 2, 2, dtype=torch.bool)), "additive and float"),
        (lambda e: e.forward(tokens(1, 2), mask=torch.zeros(1, 1, 2, 3)), r"\[B or 1, 1, 2, 2\]"),
        (lambda e: e.forward(tokens(1, 2), positions=torch.arange(2)), "positions must be"),
    ],
)
def test_bad_input(act: Callable[[NativeEngine], object], message: str, pairs: Any) -> None:
    with pytest.raises(InvalidValue, match=message):
        act(pairs("llama")[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not a native family"),
        (SIZES | {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}, "cannot share 3"),
        (SIZES | {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        (
            SIZES | {"model_type": "qwen2", "layer_types": ["chunked_attention", "full_attention", "full_attention"]},
            "chunked_attention",
        ),
        (SIZES | {"model_type": "llama", "hidden_act": "sigh"}, "unknown activation 'sigh'"),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        CausalLM(CausalLMConfig.from_hf(fields))
