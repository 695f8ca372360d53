"""A plain language model as a subject of diagnosis: its law at every step of an anchor, teacher-forced.

A hypothesis is a view of its weights or another configuration; the network is made anew for each, over the same
tensors. Row j of the contexts predicts token j + 2, so step k of an anchor is the model's law behind token j + 1 + k.
Shape letters: c samples, N anchors, K steps, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidType
from draftsmith.inference.formats.files import rope_of
from draftsmith.inference.formats.record import DrafterRecord, LMFields
from draftsmith.inference.hypotheses import FAMILIES
from draftsmith.inference.hypotheses.base import Facts, Family
from draftsmith.inference.hypotheses.served_law import ALL, LawFilter, filtered
from draftsmith.inference.hypotheses.template import GIVEN
from draftsmith.inference.hypotheses.window import window_of
from draftsmith.inference.loader import LoadedPart
from draftsmith.inference.nets.causal_lm import FAMILIES as NATIVE
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class LMCouplings:
    """Everything that ties a language model to its use as a draft, as values."""

    rope: Mapping[str, Any]
    head: str  # "own", "embedding" (tied)
    final_norm: bool = True
    label_shift: int = 0  # the law of row t is for token t + 1 + this
    token_offset: int = 0  # id of the draft = id of the target + this
    interleaved: bool = False
    swapped: str = ""
    windows: tuple[int | None, ...] = ()  # per layer: positions back that it sees, itself included
    law_filter: LawFilter = ALL  # top-k and top-p that drafts are drawn with
    rendering: str = GIVEN  # of the contexts' prompts


@dataclass
class LMSubject:
    """See `base.Subject`."""

    config: CausalLMConfig
    tensors: Mapping[str, Tensor]
    facts: Facts
    couplings: LMCouplings
    families: tuple[Family, ...] = field(default=FAMILIES)

    def logits(self, couplings: LMCouplings, contexts: Any, chunk: slice) -> tuple[Tensor, Tensor]:
        """(logits [c, N, K, V], int64 [V] target ids of the columns, -1 for none)."""
        c, size = couplings, self.config.vocab_size
        net = self._net(c)
        tokens = (contexts.tokens[chunk] + c.token_offset).clamp(0, size - 1)
        seen: list[Tensor] = []
        if not c.final_norm:
            net.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        hidden, _ = net(tokens)
        if seen:
            hidden = seen[0].view_as(hidden)
        places = (contexts.rows[chunk] + 1 - c.label_shift).unsqueeze(-1) + torch.arange(contexts.steps)
        index = places.clamp(0, tokens.shape[1] - 1).flatten(1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        logits = net.head(hidden.gather(1, index)).float().view(*places.shape, -1)
        ids = torch.arange(size) - c.token_offset
        logits = filtered(logits, c.law_filter)
        return logits, torch.where((ids >= 0) & (ids < contexts.vocab_size), ids, -1)

    def _net(self, c: LMCouplings) -> CausalLM:
        tied = c.head == "embedding"
        with torch.device("meta"):
            net = CausalLM(replace(self.config, rope=dict(c.rope), tied=tied, windows=c.windows))
        tensors = self._viewed(c)
        if tied:
            tensors[HEAD] = tensors[EMBEDDING]
        net.load_state_dict(tensors, assign=True)
        return net.eval().requires_grad_(False)

    def _viewed(self, c: LMCouplings) -> dict[str, Tensor]:
        """The tensors under the couplings, in float32."""
        tensors = {name: tensor.float() for name, tensor in self.tensors.items()}
        block, pairs = self.config.block, {"gate_up": "mlp.{gate,up}_proj", "k_v": "self_attn.{k,v}_proj"}
        pairs["q_k"] = "self_attn.{q,k}_proj"
        for i in range(self.config.num_layers):
            at = f"model.layers.{i}."
            if c.swapped:
                folder, _, names = pairs[c.swapped].partition(".")
                one, two = (f"{at}{folder}.{n}_proj.weight" for n in names[1 : names.index("}")].split(","))
                tensors[one], tensors[two] = tensors[two], tensors[one]
            if c.interleaved:  # neighbouring pairs become halves: q and k are permuted alike
                for name, heads in (("q", block.num_heads), ("k", block.num_kv_heads)):
                    for kind in ("weight", "bias"):
                        full = f"{at}self_attn.{name}_proj.{kind}"
                        if full in tensors:
                            cut = tensors[full].view(heads, block.head_dim // 2, 2, *tensors[full].shape[1:])
                            tensors[full] = cut.transpose(1, 2).flatten(0, 2)
        return tensors


def lm_subject(target: LoadedPart, drafter: Path, record: DrafterRecord) -> LMSubject:
    """A language model of a native family. Raises InvalidType for another one."""
    from draftsmith.inference.checkpoint import read_json

    assert isinstance(record.fields, LMFields)
    family = record.fields.config.get("model_type")
    if family not in NATIVE:
        raise InvalidType(f"{drafter} is of the family {family!r}: couplings of {', '.join(NATIVE)} can be tried")
    config = CausalLMConfig.from_hf(record.fields.config)
    tensors = {name: t for name, t in record.tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        tensors.setdefault(EMBEDDING, tensors.get(HEAD, torch.empty(0)))
    tensors.setdefault(HEAD, tensors[EMBEDDING])
    block, spec = config.block, target.part.spec
    rope, _ = rope_of(read_json(target.path / "config.json"))
    facts = Facts(
        target_layers=spec.num_layers,
        target_rope=rope,
        has_map=False,
        draft_vocab_size=config.vocab_size,
        vocab_size=spec.vocab_size,
        own_embedding=True,
        own_head=not torch.equal(tensors[HEAD], tensors[EMBEDDING]),
        same_width=False,
        square_kv=True,
        square_qk=block.num_heads == block.num_kv_heads,
        half_head=block.head_dim % 2 == 0,
        target_window=window_of(target.path),
    )
    head = "embedding" if config.tied else "own"
    return LMSubject(config, tensors, facts, LMCouplings(dict(config.rope), head, windows=config.windows))
