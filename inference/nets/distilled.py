"""A network that maps a whole sequence of noise to the whole sequence of codes in one pass (distilled decoding).

Source: "Distilled Decoding 1: One-step Sampling of Image Auto-regressive Models with Flow Matching" (arXiv 2412.17153),
LlamaGen form: the teacher's blocks, inputs projected from code space, one embedding for noise and one for codes,
outputs not shifted (position i reads its own noise), and two heads: logits and code vectors.

Shape letters: B batch, N codes of an image, D code width, W width of the network, V codes of the codebook.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.image_ar import GridTable, ImageAR, check_classes, check_raster, raster_block
from draftsmith.inference.nets.transformer import Block, BlockConfig, RMSNorm, plan_step
from draftsmith.inference.rng import uniform


@dataclass(frozen=True)
class DistilledConfig:
    """Everything that decides the network's function, and what its pairs were made with."""

    codes: int  # V
    code_dim: int  # D
    side: int  # codes of a row and of a column
    num_classes: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    starts: tuple[int, ...] = (0,)  # T: numbers of clean codes from which the network was trained to go on; 0 first
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_raster(self, "a distilled decoder")
        if self.code_dim < 1:
            raise InvalidValue(f"code_dim of a distilled decoder must be at least 1, got {self.code_dim}")
        ascending = list(self.starts) == sorted(set(self.starts))
        if not self.starts or self.starts[0] != 0 or not ascending or self.starts[-1] >= self.num_tokens:
            raise InvalidValue(
                f"starts must ascend from 0 and stay below {self.num_tokens} tokens, got {list(self.starts)}"
            )

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.side**2

    @property
    def block(self) -> BlockConfig:
        """The layers, as the shared blocks describe one."""
        return raster_block(self)


class DistilledDecoder(nn.Module):
    """Noise (and clean codes before it) in, logits and code vectors of all positions out, in one causal pass."""

    WHAT: ClassVar[str] = "a distilled decoder"
    codebook: Tensor

    def __init__(self, config: DistilledConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.word_embed = nn.Linear(config.code_dim, width)
        self.kind_embedding = nn.Embedding(2, width)  # 0 noise, 1 code
        self.layers = nn.ModuleList(Block(config.block, i) for i in range(config.num_layers))
        self.norm = RMSNorm(width, config.norm_eps)
        self.lm_head = nn.Linear(width, config.codes, bias=False)
        self.vector_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.vector_table = nn.Parameter(torch.zeros(2, width))  # scale and shift, to which the class adds
        self.vector_class = nn.Linear(width, 2 * width)
        self.vector_head = nn.Linear(width, config.code_dim)
        self.register_buffer("codebook", torch.zeros(config.codes, config.code_dim))  # as the tokenizer decodes it
        self.rope = GridTable(config.side, config.block.head_dim, config.rope_theta, False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "vector_table":
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.vector_class.weight)

    @property
    def spec(self) -> EngineSpec:
        """Its sizes; the vocabulary are the codes."""
        config = self.config
        return EngineSpec("distilled", config.codes, config.hidden_size, config.num_layers, config.num_tokens)

    @torch.no_grad()
    def start_from(self, teacher: ImageAR, codebook: Tensor) -> None:
        """Take over the teacher's layers and heads, and a projection that makes of a code what its embedding was.

        codebook: [V, D] as the tokenizer decodes it. The projection is the least-squares one (with a constant).
        Raises InvalidValue for a teacher of other sizes.
        """
        config, theirs = self.config, teacher.config
        for name in ("codes", "side", "num_classes", "hidden_size", "num_heads", "intermediate_size"):
            if getattr(config, name) != getattr(theirs, name):
                raise InvalidValue(
                    f"a distilled decoder starts from a teacher of its own sizes: {name} is {getattr(config, name)}, "
                    f"the teacher's {getattr(theirs, name)}"
                )
        for own, given in zip(self.layers, teacher.layers, strict=False):  # more layers than the teacher start fresh
            own.load_state_dict(given.state_dict())
        for name in ("class_embedding", "norm", "lm_head"):
            getattr(self, name).load_state_dict(getattr(teacher, name).state_dict())
        self.attach(codebook)
        constant = torch.cat((codebook, torch.ones_like(codebook[:, :1])), 1).double()
        solution = torch.linalg.lstsq(constant, teacher.embed_tokens.weight.double()).solution
        self.word_embed.weight.copy_(solution[:-1].T.to(self.word_embed.weight))
        self.word_embed.bias.copy_(solution[-1].to(self.word_embed.bias))

    def attach(self, codebook: Tensor) -> None:
        """Remember the codebook [V, D]. Raises InvalidValue for another size."""
        if codebook.shape != self.codebook.shape:
            raise InvalidValue(f"the codebook is {list(codebook.shape)}, must be {list(self.codebook.shape)}")
        self.codebook.copy_(codebook.detach())

    def forward(self, x: Tensor, clean: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden [B, N, W] of the logits, vectors [B, N, D]).

        x: [B, N, D], codes' vectors at the first `clean` positions (int64 [B]), noise behind; classes: int64 [B].
        """
        batch, n, _ = x.shape
        kinds = (torch.arange(n, device=x.device) < clean.unsqueeze(1)).long()
        label = self.class_embedding(classes)
        inputs = self.word_embed(x) + self.kind_embedding(kinds)
        h = torch.cat((label.unsqueeze(1), inputs), 1)
        step = plan_step(self.rope, (None,), 1, batch, n + 1, h.dtype, h.device)
        h = F.dropout(h, self.config.dropout, self.training).reshape(batch * (n + 1), -1)
        for layer in self.layers:
            h = layer(h, step)
        h = h.view(batch, n + 1, -1)[:, 1:]  # the class position has no output of its own
        scale, shift = (
            (self.vector_table + self.vector_class(F.silu(label)).unflatten(1, (2, -1))).unsqueeze(2).unbind(1)
        )
        vectors: Tensor = self.vector_head(self.vector_norm(h) * (1 + scale) + shift)
        return self.norm(h), vectors

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    @torch.no_grad()
    def sample(
        self, noise: Tensor, classes: Tensor, starts: Sequence[int] = (0,), split: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(codes int64 [B, N], vectors [B, N, D]) of noise [B, N, D]: one pass for each of `starts`.

        The same noise serves every pass; a pass keeps what earlier ones gave before its start, as exact codes. Vectors
        are codes at positions below `split` (None: at all) and the continuous head's behind.
        Raises InvalidValue for starts that were not trained.
        """
        self.check_starts(starts)
        n = noise.shape[1]
        split = n if split is None else split
        if not 0 <= split <= n:
            raise InvalidValue(f"split must lie in [0, {n}], got {split}")
        codes = torch.zeros(noise.shape[:2], dtype=torch.int64, device=noise.device)
        vectors = noise
        for start in starts:
            kept = torch.arange(n, device=noise.device) < start
            x = torch.where(kept.view(1, -1, 1), self.codebook[codes], noise)
            hidden, free = self(x, torch.full((len(x),), start, device=x.device), classes)
            found = self.head(hidden).argmax(-1)
            codes = torch.where(kept, codes, found)
            vectors = self.codebook[codes]
            if split < n:
                nearest = (free @ self.codebook.T - self.codebook.square().sum(-1) / 2).argmax(-1)
                behind = (torch.arange(n, device=noise.device) >= split) & ~kept
                codes = torch.where(behind, nearest, codes)
                vectors = torch.where(behind.view(1, -1, 1), free, vectors)
        return codes, vectors

    def check_starts(self, starts: Sequence[int]) -> None:
        """Raises InvalidValue for starts that do not ascend from 0 or that the network was not trained for."""
        ascending = list(starts) == sorted(set(starts))
        if not starts or starts[0] != 0 or not ascending or not set(starts) <= set(self.config.starts):
            raise InvalidValue(
                f"starts must ascend from 0 and be among those trained, {list(self.config.starts)}; got {list(starts)}"
            )

    def check_classes(self, classes: Tensor) -> None:
        """Raises InvalidValue for class ids outside [0, num_classes), guidance being baked in."""
        check_classes(classes, self.config.num_classes - 1, 1.0)

    def seal_inputs(self) -> dict[str, Tensor]:
        """Noise, clean codes before it, and classes of three images."""
        config = self.config
        rows = torch.arange(3)
        at = torch.arange(config.num_tokens * config.code_dim).view(1, config.num_tokens, config.code_dim)
        x = (uniform(0, rows.view(3, 1, 1), at, 0) * 4 - 2).float()
        clean = torch.tensor([config.starts[0], config.starts[len(config.starts) // 2], config.starts[-1]])
        return {"x": x, "clean": clean, "classes": torch.tensor([0, config.num_classes // 2, config.num_classes - 1])}

    def seal_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits and vectors side by side, [B, N, V + D], of one batch."""
        x = inputs["x"].to(self.lm_head.weight.dtype)
        hidden, vectors = self(x, inputs["clean"], inputs["classes"])
        return torch.cat((self.head(hidden), vectors), -1)

    def seal_replay(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same row by row: an image must not depend on its batch."""
        rows = [self.seal_reference({k: v[i : i + 1] for k, v in inputs.items()}) for i in range(len(inputs["x"]))]
        return torch.cat(rows)
