"""The adapter: any other Hugging Face causal language model behind the engine protocol.

The model writes its keys and values into our `StaticCache` through a transformers `Cache`; it is told every token's
position and, where it matters, every mask. Whether a model really obeys is not taken from its name: at construction a
probe compares ragged, rolled-back and tree-shaped passes with plain calls of the model, and refuses it otherwise.

This file imports transformers and is itself imported only where a model is at hand.
Shape letters: B batch, n new tokens, C cache slots up to the longest row, D width, V vocabulary, T probe length.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.engine import EngineSpec, check_capacity, check_inputs, out_of_vocabulary
from draftsmith.inference.errors import InvalidState, InvalidType
from draftsmith.inference.nets.masks import additive, beyond_window, check_mask, unseen

_UNBOUNDED = 1 << 30  # positions without a table and without a stated limit
# What a model's forward raises when it is given masks, positions or a cache in a form that it does not know.
_MODEL_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not type-checked
    """One layer's window onto a StaticCache, for the length of one pass."""

    def __init__(self, store: StaticCache, layer: int, slots: Tensor | None) -> None:
        super().__init__()
        self.store, self.layer, self.slots = store, layer, slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the storage exists."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.store.write(self.layer, key_states, value_states, self.slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.longest + query_length, 0

    def get_seq_length(self) -> int:
        return self.store.longest

    def get_max_length(self) -> int:
        return self.store.capacity


class HFEngine:
    """Serves a transformers causal language model whose whole state is keys and values.

    Raises InvalidType, with the reason, for encoder-decoders, recurrent, state-space and hybrid models (their state
    cannot be rolled back), for layers that share or index keys, for attention kernels without masks, and for models
    that fail the probe: logits that are not a function of the last hidden state alone, positions or masks that the
    model ignores. Models that ignore positions in a tree only (ALiBi by slot) refuse a `mask`, nothing else.
    Limits: `longrope` texts are limited to original_max_position_embeddings and `dynamic` RoPE to
    max_position_embeddings: beyond, such a model changes its frequencies in the middle of a text.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._name = type(model).__name__
        self._config = model.config.get_text_config(decoder=True)
        self._base = model.base_model
        self._check_kind()
        self._output = model.get_output_embeddings()
        parameters = inspect.signature(self._base.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._windows = self._layer_windows()
        self._trees = True
        self._tree_reason = ""
        training = model.training
        try:
            model.eval()
            self._shapes, hidden_size = self._discover()
            self._spec = EngineSpec(
                family=model.config.model_type,
                vocab_size=self._output.weight.shape[0],
                hidden_size=hidden_size,
                num_layers=self._config.num_hidden_layers,
                max_length=_max_length(self._config),
            )
            self._probe()
        finally:
            model.train(training)

    # -----------------------------------------------------------------------------------------------------------------
    # The protocol

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def training(self) -> bool:
        return bool(self.model.training)

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        """An empty cache. Raises InvalidValue when `capacity` exceeds `spec.max_length`."""
        check_capacity(self._spec, capacity)
        heads, key_dims, value_dims = zip(*self._shapes, strict=True)
        return StaticCache(
            len(self._shapes), batch, heads, key_dims, capacity, self.dtype, self.device, value_dim=value_dims
        )

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        cache: StaticCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        aux_layers: Sequence[int] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `engine.Engine.forward`. `embeds` are rows of the input embedding, before any scaling by the model."""
        if self.model.training:
            raise InvalidState("the network is in train mode: call eval() (dropout breaks exactness)")
        check_inputs(self._spec, tokens, embeds, cache, aux_layers)
        if mask is not None and not self._trees:
            raise InvalidType(f"{self._name} takes no tree masks: {self._tree_reason}")
        batch, n = (tokens if tokens is not None else embeds[..., 0]).shape  # type: ignore[index]  # one is given
        if cache is not None:
            cache.reserve(n)
        start = 0 if cache is None else cache.longest
        slots = None if cache is None or cache.even else cache.positions(n)
        arguments: dict[str, Any] = {"use_cache": cache is not None, "output_hidden_states": bool(aux_layers)}
        arguments["input_ids" if tokens is not None else "inputs_embeds"] = tokens if tokens is not None else embeds
        if cache is not None:
            arguments["past_key_values"] = Cache(layers=[_Layer(cache, i, slots) for i in range(self._spec.num_layers)])
        at = positions
        if at is None and cache is not None:
            at = cache.positions(n) if slots is None else slots
        if at is not None and self._takes_positions:
            arguments["position_ids"] = at
        masks = self._masks(start, start + n, slots, positions, mask)
        if masks is not None:
            if isinstance(masks, dict):
                arguments["attention_mask"] = {kind: m.expand(batch, -1, -1, -1) for kind, m in masks.items()}
            else:
                arguments["attention_mask"] = masks.expand(batch, -1, -1, -1)
        try:
            with torch.no_grad():
                out = self._base(**arguments)
        except IndexError:  # the embedding's own check
            error = None if tokens is None else out_of_vocabulary(tokens, self._input_size())
            if error is None:
                raise
            raise error from None
        if cache is not None:
            cache.advance(n)
        hidden: Tensor = out.last_hidden_state
        if not aux_layers:
            return hidden, ()
        states = out.hidden_states
        if states is None or len(states) != self._spec.num_layers + 1:
            raise InvalidType(f"{self._name} does not give the hidden states of its {self._spec.num_layers} layers")
        states = (*states[:-1], hidden)
        return hidden, tuple(states[i] for i in aux_layers)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], with the model's own scale and soft cap."""
        config = self._config
        with torch.no_grad():
            logits: Tensor = self._output(hidden)
            if getattr(config, "logit_scale", None) is not None:  # cohere
                logits = logits * config.logit_scale
            if getattr(config, "logits_scaling", None) is not None:  # granite
                logits = logits / config.logits_scaling
            cap = getattr(config, "final_logit_softcapping", None)  # gemma2
            return logits if cap is None else torch.tanh(logits / cap) * cap

    # -----------------------------------------------------------------------------------------------------------------
    # Masks

    def _masks(
        self, start: int, end: int, slots: Tensor | None, positions: Tensor | None, mask: Tensor | None
    ) -> Tensor | dict[str, Tensor] | None:
        """Additive masks [B or 1, 1, n, C], one per kind of layer where there are several; None: the model's own do."""
        limits = {kind: None if w is None or w >= end else w for kind, w in self._windows.items()}
        if mask is not None:
            check_mask(mask, end - start, end)
        elif slots is None and positions is None and not any(limits.values()) and (start == 0 or end - start == 1):
            return None
        device, dtype = self.device, self.dtype
        low = torch.finfo(dtype).min  # as transformers: some models do arithmetic with the mask, which -inf breaks
        masks = {}
        for kind, limit in limits.items():
            if mask is None:
                masks[kind] = additive(unseen(limit, start, end, slots, 0, device), dtype, low)
            else:
                given = mask.to(dtype).clamp_min(low)
                if limit is not None:
                    given = given.masked_fill(beyond_window(limit, start, end, slots, positions, device), low)
                masks[kind] = given
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _layer_windows(self) -> dict[str, int | None]:
        """The window of each kind of layer. Windows that the library does not declare are longer than the probe."""
        for name, value in self._config.to_dict().items():
            if name.endswith(("window", "window_size")) and name != "sliding_window" and type(value) is int:
                raise InvalidType(self._refusal(f"its configuration has {name}={value}, a rule that is not known here"))
        kinds, settings = get_layer_types_and_kwargs(self._config)
        windows: dict[str, int | None] = {}
        for kind, setting in zip(kinds, settings, strict=True):
            if kind not in ("full_attention", "sliding_attention"):
                raise InvalidType(self._refusal(f"it has layers of type {kind!r}, whose state cannot be rolled back"))
            window = setting.get("sliding_window")
            if windows.setdefault(kind, window) != window:
                raise InvalidType(self._refusal("its layers have windows of different sizes"))
        return windows

    # -----------------------------------------------------------------------------------------------------------------
    # What the model is

    def _refusal(self, reason: str) -> str:
        return f"{self._name} cannot be served exactly: {reason}"

    def _input_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _check_kind(self) -> None:
        config = self._config
        if self.model.config.is_encoder_decoder:
            raise InvalidType(self._refusal("it is an encoder-decoder, not a causal language model"))
        if self._base is self.model or self.model.get_output_embeddings() is None:
            raise InvalidType(self._refusal("it has no head apart from its base model"))
        kernel = getattr(config, "_attn_implementation", "eager")
        if kernel not in ("eager", "sdpa"):
            raise InvalidType(
                self._refusal(f"attention {kernel!r} takes no masks: load it with attn_implementation='sdpa'")
            )

    def _discover(self) -> tuple[list[tuple[int, int, int]], int]:
        """(key/value heads, key width, value width) of each layer, and D, from a pass over two tokens."""
        tokens = torch.arange(2, device=self.device).unsqueeze(0) % self._input_size()
        try:
            with torch.no_grad():
                out = self._base(input_ids=tokens, use_cache=True)
        except _MODEL_ERRORS as error:
            raise InvalidType(self._refusal(f"a plain call of it fails ({_line(error)})")) from error
        past = getattr(out, "past_key_values", None)
        if not isinstance(past, Cache):
            held = [v for k, v in out.items() if k != "last_hidden_state" and v is not None]
            kept = (
                f"keeps its state in a {type(held[0]).__name__}, which cannot be rolled back" if held else "keeps none"
            )
            raise InvalidType(self._refusal(f"instead of a key/value cache it {kept}"))
        for layer in past.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
                raise InvalidType(
                    self._refusal(f"it keeps a {type(layer).__name__}, which is more or less than keys and values")
                )
        if len(past.layers) != self._config.num_hidden_layers:
            raise InvalidType(
                self._refusal(f"{len(past.layers)} of its {self._config.num_hidden_layers} layers keep keys and values")
            )
        shapes = [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3]) for x in past.layers]
        return shapes, out.last_hidden_state.shape[-1]

    # -----------------------------------------------------------------------------------------------------------------
    # The probe

    def _probe(self) -> None:
        """Compare passes of every shape that decoders make with plain calls; raises InvalidType where they differ."""
        small = [w for w in self._windows.values() if w is not None and w <= 48]
        length = min(max([10, *(w + 6 for w in small)]), self._spec.max_length)
        if length < 10:
            raise InvalidType(self._refusal(f"its positions end at {length}, too short to be probed"))
        # spread over the vocabulary, the same on each machine; two rows that differ everywhere
        ids = torch.arange(2 * length, device=self.device).view(2, length) * 7919 + 11
        ids %= self._spec.vocab_size
        try:
            with torch.no_grad():
                plain = torch.cat([self.model(input_ids=row.unsqueeze(0)).logits for row in ids])
            self._probe_chain(ids, plain)
        except _MODEL_ERRORS as error:
            if isinstance(error, InvalidType):
                raise
            raise InvalidType(self._refusal(f"with given positions and masks it fails ({_line(error)})")) from error
        if not self._takes_positions:  # in half precision a neighbour's position can hide in the rounding
            self._trees, self._tree_reason = (
                False,
                "it takes no positions, so a token's place in memory is its position",
            )
            return
        try:
            self._probe_tree(ids, plain)
        except _MODEL_ERRORS as error:
            self._trees, self._tree_reason = False, _line(error)

    def _probe_chain(self, ids: Tensor, plain: Tensor) -> None:
        compare = self._comparison("")
        length = ids.shape[1]
        compare("the head on the last hidden state", self.forward(ids)[0], plain)
        at = length - 6
        cache = self.new_cache(2, length)
        compare("a prefill", self.forward(ids[:, :at], cache=cache)[0], plain[:, :at])
        compare("the next token", self.forward(ids[:, at : at + 1], cache=cache)[0], plain[:, at : at + 1])
        lengths = [at, at - 3]
        for n, kept in ((1, 1), (3, 1), (2, 2)):  # roll-back in between: two of three tokens are dropped again
            cache.truncate(lengths)
            rows = [ids[b, t : t + n] for b, t in enumerate(lengths)]
            want = torch.stack([plain[b, t : t + n] for b, t in enumerate(lengths)])
            compare(f"{n} tokens in rows of different lengths", self.forward(torch.stack(rows), cache=cache)[0], want)
            lengths = [t + kept for t in lengths]
        cache.truncate([at - 2, at - 2])
        many = ids[:, at - 2 : at + 2]
        compare("several tokens after a roll-back", self.forward(many, cache=cache)[0], plain[:, at - 2 : at + 2])

    def _probe_tree(self, ids: Tensor, plain: Tensor) -> None:
        """A token and two siblings after it, the second of which is the row's own; then the path to it is kept."""
        compare = self._comparison("the positions of a tree are not obeyed: ")
        at = ids.shape[1] - 4
        cache = self.new_cache(2, ids.shape[1])
        self.forward(ids[:, :at], cache=cache)
        nodes = torch.stack((ids[:, at], ids[:, 0], ids[:, at + 1]), 1)
        mask = torch.zeros(1, 1, 3, at + 3, device=self.device, dtype=self.dtype)
        mask[..., 0, at + 1 :] = mask[..., 1, at + 2 :] = mask[..., 2, at + 1] = float("-inf")
        positions = torch.tensor([[at, at + 1, at + 1]] * 2, device=self.device)
        hidden, _ = self.forward(nodes, cache=cache, positions=positions, mask=mask)
        compare("the sibling", hidden[:, 2:], plain[:, at + 1 : at + 2])
        cache.keep(torch.tensor([[0, 2]] * 2, device=self.device), [at, at])
        compare("a token after a kept path", self.forward(ids[:, at + 2 : at + 4], cache=cache)[0], plain[:, at + 2 :])

    def _comparison(self, prefix: str) -> Callable[[str, Tensor, Tensor], None]:
        """compare(what, hidden [2, n, D], logits [2, n, V]): raises InvalidType when the head gives other logits.

        In float32 no logit may differ by more than 1e-4 of the largest. Half precision rounds differently in passes of
        different shapes, and a router may tip: there each row's median position may err by 10% (root mean square over
        the logits' spread).
        """

        def compare(what: str, hidden: Tensor, want: Tensor) -> None:
            got, want = self.head(hidden).float(), want.float()
            if want.dtype == self.dtype:
                error, limit = float((got - want).abs().max()), 1e-4 * max(1.0, float(want.abs().max()))
            else:
                spread = want.std(-1).clamp_min(1e-6)
                error, limit = float(((got - want).pow(2).mean(-1).sqrt() / spread).median(1).values.max()), 0.1
            if not error <= limit:  # NaN fails too
                raise InvalidType(self._refusal(f"{prefix}{what} differs from a plain call by {error:.2g}"))

        return compare


def _line(error: BaseException) -> str:
    """An error as one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _max_length(config: Any) -> int:
    """The longest text for which the model's positions are one fixed function of the position."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or _UNBOUNDED
    rope = getattr(config, "rope_parameters", None) or {}
    variants = [v for v in rope.values() if isinstance(v, dict)] or [rope]
    for variant in variants:
        if variant.get("rope_type") == "longrope":
            limit = min(limit, variant["original_max_position_embeddings"])
    return int(limit)
