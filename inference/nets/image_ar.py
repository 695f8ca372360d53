"""A class-conditional causal transformer over the codes of an image in raster order (LlamaGen).

Source: "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv 2406.06525): Llama blocks
with two-dimensional rotary positions. The class stands first; the output at position i is the law of code i.

Shape letters: B batch, N codes of an image (side^2), n new codes, D width, V codes of the codebook, d head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.rope import RopeTable
from draftsmith.inference.nets.transformer import Block, BlockConfig, RMSNorm, plan_step
from draftsmith.inference.rng import uniform


@dataclass(frozen=True)
class ImageARConfig:
    """Everything that decides the network's function. Raises InvalidValue, one line, for what cannot be."""

    codes: int  # V
    side: int  # codes of a row and of a column
    num_classes: int  # class id num_classes means "no class" (guidance)
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    dropout: float = 0.1  # of embeddings and of what a layer adds
    class_dropout: float = 0.1  # share of training images that are told no class
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    zeroed_class: bool = False  # LlamaGen's weights multiply the class's query and key by zero
    tokenizer_hash: str | None = None  # sha256 of the tokenizer's weights that made the codes

    def __post_init__(self) -> None:
        check_raster(self, "an image model")
        for name in ("dropout", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidValue(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.side**2

    @property
    def block(self) -> BlockConfig:
        """The layers, as the shared blocks describe one."""
        return raster_block(self)


def check_raster(config: Any, what: str) -> None:
    """What every network over a square of codes asks of its sizes; raises InvalidValue, `what` being the network."""
    for name in ("codes", "side", "num_classes", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
        if getattr(config, name) < 1:
            raise InvalidValue(f"{name} of {what} must be at least 1, got {getattr(config, name)}")
    if config.hidden_size % config.num_heads or config.hidden_size // config.num_heads % 4:
        raise InvalidValue(
            f"a width of {config.hidden_size} over {config.num_heads} heads: two-dimensional positions need heads whose"
            " width divides by 4"
        )


def raster_block(config: Any) -> BlockConfig:
    """The layers of a network over a square of codes, as the shared blocks describe one."""
    return BlockConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        norm_eps=config.norm_eps,
    )


class GridTable(RopeTable):
    """Rotary positions of the class (0, unturned) and of a square of codes: half of a head by row, half by column."""

    def __init__(self, side: int, head_dim: int, theta: float, zeroed_class: bool) -> None:
        def frequencies() -> tuple[Tensor, float]:
            exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device="cpu") / (head_dim // 2)
            return 1.0 / theta**exponent, 1.0

        super().__init__(frequencies)
        self._side, self._zeroed = side, zeroed_class

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        place = (positions - 1).clamp_min(0)
        row_cos, row_sin = super().at(place // self._side, torch.float32)
        column_cos, column_sin = super().at(place % self._side, torch.float32)
        quarter = row_cos.shape[-1] // 2
        # halves of the table are equal but for the sign, so the first of each are what is needed
        cos = torch.cat((row_cos[..., :quarter], column_cos[..., :quarter]), -1)
        sin = -torch.cat((row_sin[..., :quarter], column_sin[..., :quarter]), -1)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        if self._zeroed:
            is_code = (positions > 0).unsqueeze(-1)
            cos, sin = cos * is_code, sin * is_code
        return cos.to(dtype), sin.to(dtype)


class ImageAR(nn.Module):
    """Class and codes in, hidden states of the codes' laws out; the head is apart (contract 2)."""

    WHAT: ClassVar[str] = "a raster image model"

    def __init__(self, config: ImageARConfig) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.codes, config.hidden_size)
        self.layers = nn.ModuleList(Block(config.block, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.codes, bias=False)
        self.rope = GridTable(config.side, config.block.head_dim, config.rope_theta, config.zeroed_class)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            if name == "lm_head.weight":
                nn.init.zeros_(parameter)

    @property
    def spec(self) -> EngineSpec:
        """Its sizes, as decoders ask for them."""
        config = self.config
        return EngineSpec("image-ar", config.codes, config.hidden_size, config.num_layers, config.num_tokens)

    @property
    def groups(self) -> tuple[int, ...]:
        """Codes that one step makes together."""
        return (1,) * self.config.num_tokens

    @property
    def no_guidance(self) -> float:
        """The guidance that changes nothing."""
        return 1.0

    def guidance_weight(self, guidance: float, group: int) -> float:
        """The w of l_u + w (l_c - l_u) at a group; 1 is no guidance."""
        return guidance

    def check_classes(self, classes: Tensor) -> None:
        """Raises InvalidValue for class ids outside [0, num_classes], of which the last means no class."""
        check_classes(classes, self.config.num_classes, self.config.class_dropout)

    def forward(self, codes: Tensor, classes: Tensor) -> Tensor:
        """Teacher forcing: codes int64 [B, N] and classes int64 [B] -> hidden [B, N, D], position i for code i."""
        x = torch.cat((self.class_embedding(classes).unsqueeze(1), self.embed_tokens(codes[:, :-1])), 1)
        return self._run(x, None)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def logits(self, codes: Tensor, classes: Tensor) -> Tensor:
        """Teacher-forced logits of all positions, [B, N, V]."""
        return self.head(self(codes, classes))

    def start(self, classes: Tensor) -> "RasterState":
        """A state in which nothing has been made. classes: int64 [B]."""
        block = self.config.block
        cache = StaticCache(
            self.config.num_layers,
            len(classes),
            block.num_kv_heads,
            block.head_dim,
            self.config.num_tokens,
            self.embed_tokens.weight.dtype,
            classes.device,
        )
        return RasterState(cache, self.class_embedding(classes).unsqueeze(1))

    def next_logits(self, state: "RasterState") -> Tensor:
        """Logits of the next code, [B, 1, V]; once per step."""
        return self.head(self._run(state.inputs, state.cache)[:, -1:])

    def advance(self, state: "RasterState", codes: Tensor) -> None:
        """The code int64 [B, 1] is this."""
        state.inputs = self.embed_tokens(codes)

    def prefilled(self, classes: Tensor, codes: Tensor) -> "RasterState":
        """A state in which the prefix codes int64 [B, n] have been made, by one pass with the causal mask."""
        state = self.start(classes)
        state.inputs = torch.cat((state.inputs, self.embed_tokens(codes)), 1)
        return state

    def seal_inputs(self) -> dict[str, Tensor]:
        """Codes and classes of three images, one of them without a class."""
        return seal_inputs(self.config.num_tokens, self.config.codes, self.config.num_classes)

    def seal_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, N, V], teacher-forced."""
        return self.logits(inputs["codes"], inputs["classes"])

    def seal_replay(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same, code by code through the cache; the second half behind a prefix that went in at once."""
        return replay_steps(self, inputs["codes"], inputs["classes"])

    def _run(self, x: Tensor, cache: StaticCache | None) -> Tensor:
        batch, n, width = x.shape
        dropout = partial(F.dropout, p=self.config.dropout, training=self.training)
        step = plan_step(self.rope, (None,), 1, batch, n, x.dtype, x.device, cache)
        x = dropout(x).reshape(batch * n, width)
        for layer in self.layers:
            x = x + dropout(layer(x, step) - x) if self.training else layer(x, step)
        if cache is not None:
            cache.advance(n)
        out: Tensor = self.norm(x).view(batch, n, width)
        return out


@dataclass
class RasterState:
    """An image on its way: what is cached, and what the next pass reads."""

    cache: StaticCache
    inputs: Tensor  # [B, n, D]


def check_classes(classes: Tensor, num_classes: int, class_dropout: float) -> None:
    """Raises InvalidValue for ids outside [0, num_classes], and for "no class" of a model that never saw it."""
    if classes.numel() == 0:
        return
    low, high = (int(v) for v in classes.aminmax())
    if low < 0 or high > num_classes:
        raise InvalidValue(f"class ids must lie in [0, {num_classes}] ({num_classes}: no class), got {low} to {high}")
    if high == num_classes and class_dropout == 0:
        raise InvalidValue("there is no unconditional row: the model was trained with class_dropout=0")


def seal_inputs(tokens: int, codes: int, num_classes: int) -> dict[str, Tensor]:
    """What an image model's parity seal feeds: codes int64 [3, N] and classes int64 [3]."""
    rows, positions = torch.arange(3).unsqueeze(1), torch.arange(tokens).unsqueeze(0)
    classes = torch.tensor([0, num_classes // 2, num_classes])
    return {"codes": (uniform(0, rows, positions, 0) * codes).long(), "classes": classes}


def replay_steps(model: Any, codes: Tensor, classes: Tensor) -> Tensor:
    """Logits [B, N, V] group by group: the first half from the start, the second behind a prefix given at once.

    model: an ImageModel (image_law.py).
    """
    half, parts = len(model.groups) // 2, []
    made = 0
    for first, last in ((0, half), (half, len(model.groups))):
        state = model.prefilled(classes, codes[:, :made]) if made else model.start(classes)
        for group in range(first, last):
            parts.append(model.next_logits(state))
            size = model.groups[group]
            if group + 1 < last:
                model.advance(state, codes[:, made : made + size])
            made += size
    return torch.cat(parts, 1)
