"""An EAGLE head as the drafter of trees: laws from the target's own states, continued by the head's.

The head's cache holds pairs (state of token j, token j+1), pair j in slot j. What the target has read since the last
round comes with `commit`; the next `propose`, which knows the new root, feeds those pairs in one call: the last one
reads the root. Drafted nodes read the output of their parent instead of a state; their pairs are dropped after the
round, since the target's own states then take their place.
Shape letters: B batch, S nodes of the source's tree with the root, w nodes expanded at once, D width of the head,
F width of the states read, V vocabulary, Vd of the draft, C slots.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.drafters.tree_base import Accepted, PolicyDrafter, TreePolicy, TreeTask, Uniforms
from draftsmith.inference.drafters.tree_model import draft_sampling
from draftsmith.inference.engine import Engine, EngineSpec
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.nets.eagle_head import EagleHead
from draftsmith.inference.nets.masks import additive
from draftsmith.inference.sampling import PenaltyState, SamplingParams, law
from draftsmith.inference.tree import Tree


def input_embedding(engine: Engine) -> Tensor:
    """The input embedding [V, D] of a target. Raises InvalidType for an engine that has no such table."""
    net = getattr(engine, "net", None)
    if net is not None and hasattr(net, "model"):
        table: Tensor = net.model.embed_tokens.weight
        return table
    model = getattr(engine, "model", None)
    if model is None or model.get_input_embeddings() is None:
        raise InvalidType(f"{type(engine).__name__} shows no input embedding, which this EAGLE head reads")
    found: Tensor = model.get_input_embeddings().weight
    return found


def lend(head: EagleHead, target: Engine) -> None:
    """Give a head what it reads of its target. Raises InvalidValue for a target of other sizes."""
    config, spec = head.config, target.spec
    if config.target_hidden_size != spec.hidden_size or max(config.aux_layers) > spec.num_layers:
        raise InvalidValue(
            f"this EAGLE head reads states {list(config.aux_layers)} of width {config.target_hidden_size}; the target "
            f"has {spec.num_layers} layers of width {spec.hidden_size}: it is a head for another target"
        )
    if not config.own_embedding:
        rows = input_embedding(target).shape[0]
        if rows < config.vocab_size:
            raise InvalidValue(f"this EAGLE head was made for {config.vocab_size} ids, the target embeds {rows}")
        head.use_embedding(lambda: input_embedding(target))
    if config.version == 1:
        head.use_output(lambda x: target.head(x.to(target.dtype)))


class EagleTreeDrafter(PolicyDrafter):
    """Drafts trees with an EAGLE-1 or EAGLE-3 head; a chain policy makes it the usual EAGLE chain.

    Penalties shape the target's laws only: drafts are made without them, which costs acceptance and no exactness.
    """

    def __init__(
        self,
        head: EagleHead,
        policy: TreePolicy,
        *,
        target: Engine | None = None,
        sampling: SamplingParams | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        """target: lends its embedding (and head) to a head that has none; None: lent already, or not needed.

        sampling: the draft's own temperature and filters; None: the target's. tokenizer: compared with the target's.
        """
        if target is not None:
            lend(head, target)
        self.net, self.policy, self.sampling = head, policy, sampling
        self._tokenizer = tokenizer
        self.aux_layers = head.config.aux_layers

    def bind(self, target: Engine) -> None:
        """Lend the head what it reads of its target. Raises InvalidValue for a target of other sizes."""
        lend(self.net, target)

    @property
    def spec(self) -> EngineSpec:
        """Its sizes, as couplings see them."""
        config = self.net.config
        return EngineSpec("eagle", config.vocab_size, config.hidden_size, config.num_layers, config.max_length)

    @property
    def vocab_size(self) -> int | None:
        return self.net.config.vocab_size

    @property
    def tokenizer(self) -> Any | None:
        return self._tokenizer

    def with_policy(self, policy: TreePolicy) -> "EagleTreeDrafter":
        return EagleTreeDrafter(self.net, policy, sampling=self.sampling, tokenizer=self._tokenizer)

    def start(self, task: TreeTask) -> "EagleTreeSession":
        """Raises InvalidType when a decoder of chains asks, which shows a drafter no states of the target."""
        if not isinstance(task, TreeTask):
            raise InvalidType(
                "an EAGLE head reads the target's states, which the tree decoder alone shows it: take decoder 'tree' "
                "(its policy 'chain' drafts a chain)"
            )
        return EagleTreeSession(self.net, self.policy, draft_sampling(self.sampling, task), task)


@dataclasses.dataclass
class _States:
    """States of the target that were not fed yet."""

    features: Tensor  # [B, c, F]
    counts: list[int]  # [B]


class EagleTreeSession:
    """One decode call's drafting; between rounds row b's cache holds the pairs of the tokens fed so far."""

    def __init__(self, head: EagleHead, policy: TreePolicy, sampling: SamplingParams, task: TreeTask) -> None:
        if head.training:
            raise InvalidState("the EAGLE head is in train mode: call eval() first")
        self.calls = 0
        self.head, self.task = head, task
        self.sampling = dataclasses.replace(
            sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
        )
        self._policy = policy
        self._longest = min(task.capacity, head.config.max_length)
        spare = max(policy.columns(task.nodes), task.nodes + 1) + 1
        self.cache = head.new_cache(task.rows, self._longest + spare)
        self._waiting: list[_States] = []
        self._out = torch.zeros(task.rows, 1, head.config.hidden_size, dtype=head.dtype, device=head.device)
        ids = head.draft_ids()
        self._inside = ids < task.vocab_size
        self._ids = ids[self._inside]
        self._whole = not head.config.reduced and len(self._ids) == task.vocab_size

    def room(self, length: int) -> int:
        return self.task.nodes if length < self._longest else 0

    @torch.inference_mode()
    def propose(
        self,
        tokens: Sequence[Sequence[int]],
        want: Sequence[int],
        depth: Sequence[int],
        u: Uniforms | None,
        penalties: PenaltyState | None,
    ) -> Tree | None:
        waiting, self._waiting = self._waiting, []
        for states in waiting:
            self._feed(states, tokens)
        fed = [held == len(t) - 1 > 0 for held, t in zip(self.cache.lengths, tokens, strict=True)]
        depth = [min(d, self._longest - len(t)) if ok else 0 for d, t, ok in zip(depth, tokens, fed, strict=True)]
        want = [n if d > 0 else 0 for n, d in zip(want, depth, strict=True)]
        if max(want) == 0:
            return None
        roots = host_tensor([[t[-1] for t in tokens]], self.task.device)[0]
        held = list(self.cache.lengths)
        tree = self._policy.grow(_Source(self, self._out), roots, want, [max(0, d) for d in depth], u)
        self.cache.truncate(held)  # drafted pairs hold the head's own states
        return tree

    def _feed(self, states: _States, tokens: Sequence[Sequence[int]]) -> None:
        """Append the pairs of the states that came; rows that outgrew the head's positions stay as they are."""
        head, cache = self.head, self.cache
        held = list(cache.lengths)
        counts = [min(n, self._longest - length) for n, length in zip(states.counts, held, strict=True)]
        width = max(counts)
        if width == 0:
            return
        following = [list(t[n + 1 : n + 1 + c]) for t, n, c in zip(tokens, held, counts, strict=True)]
        ids = host_tensor([[*row, *[0] * (width - len(row))] for row in following], head.device)
        features = states.features[:, :width].to(head.device, head.dtype)
        start = cache.capacity - width  # a row near the end beside one with many new pairs: drop some, feed them again
        if max(held) > start:
            raise InvalidState(
                f"{width} new states came for rows of {max(held)} pairs: more than a round of {self.task.nodes} nodes "
                "brings; a session drafts for rows that began together"
            )
        out = head(head.embed(ids), head.project(features), cache=cache)
        cache.truncate([n + c for n, c in zip(held, counts, strict=True)])
        last = host_tensor([[max(0, c - 1)] for c in counts], head.device)
        new = out.gather(1, last.unsqueeze(-1).expand(-1, -1, out.shape[-1]))
        self._out = torch.where(host_tensor([counts], head.device)[0].view(-1, 1, 1) > 0, new, self._out)
        self.calls += 1

    def laws(self, out: Tensor) -> Tensor:
        """Draft laws [B, w, V] on the task's device of output states [B, w, D]; 0 outside the draft vocabulary."""
        logits, size = self.head.logits(out), self.task.vocab_size
        if self._whole:
            full = logits
        else:
            kept = logits[..., : self.head.config.draft_vocab_size][..., self._inside]
            full = kept.new_full((*kept.shape[:-1], size), float("-inf")).index_copy_(-1, self._ids, kept)
        return law(full, self.sampling).to(self.task.device)

    def commit(self, accepted: Accepted) -> None:
        if accepted.features is not None and max(accepted.counts) > 0:
            self._waiting.append(_States(accepted.features, list(accepted.counts)))

    def select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)
        index = host_tensor([list(rows)], self.head.device)[0]
        self._out = self._out[index]
        self._waiting = [
            _States(s.features[index.to(s.features.device)], [s.counts[r] for r in rows]) for s in self._waiting
        ]


class _Source:
    """The head over one round's trees; implements `LawSource`."""

    def __init__(self, session: EagleTreeSession, out: Tensor) -> None:
        """out: [B, 1, D], the head's output at each row's last pair, which the cache holds."""
        self._session = session
        self._first = [max(0, n - 1) for n in session.cache.lengths]  # slot and position of the pair with the root
        batch, device = len(out), out.device
        self._out = out  # [B, S, D]
        self._depth = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._seen = torch.ones(batch, 1, 1, dtype=torch.bool, device=device)  # [B, S, S]: ancestors and itself

    @torch.inference_mode()
    def root(self) -> Tensor:
        return self._session.laws(self._out[:, :1]).squeeze(1)

    @torch.inference_mode()
    def expand(self, tokens: Tensor, parent: Tensor) -> Tensor:
        session, head = self._session, self._session.head
        cache = session.cache
        tokens, parent = tokens.to(head.device), parent.to(head.device)
        w = tokens.shape[1]
        depth = self._depth.gather(1, parent) + 1
        above = self._seen.gather(1, parent.unsqueeze(-1).expand(-1, -1, self._seen.shape[2]))  # [B, w, S]
        itself = torch.eye(w, dtype=torch.bool, device=above.device).expand(len(tokens), -1, -1)
        seen = torch.cat((above, itself), 2)
        self._seen = torch.cat((torch.nn.functional.pad(self._seen, (0, w)), seen), 1)
        self._depth = torch.cat((self._depth, depth), 1)
        states = head.feedback(self._out.gather(1, parent.unsqueeze(-1).expand(-1, -1, self._out.shape[2])))
        first = host_tensor([[n] for n in self._first], head.device)
        out = head(
            head.embed(tokens),
            states,
            cache=cache,
            positions=(first + depth).clamp_max(head.config.max_length - 1),
            mask=self._mask(seen, first, max(cache.lengths) + w),
        )
        self._out = torch.cat((self._out, out), 1)
        session.calls += 1
        return session.laws(out)

    def _mask(self, seen: Tensor, first: Tensor, end: int) -> Tensor:
        """Additive [B, 1, w, C]: the row's pairs, ancestors and itself. first: [B, 1], the root's slot."""
        node = torch.arange(end, device=seen.device) - first  # [B, C]: which of the source's nodes a slot holds
        inside = (node >= 0) & (node < seen.shape[2])
        index = node.clamp(0, seen.shape[2] - 1).unsqueeze(1).expand(-1, seen.shape[1], -1)
        visible = seen.gather(2, index) & inside.unsqueeze(1) | (node < 0).unsqueeze(1)
        return additive(~visible, self._session.head.dtype).unsqueeze(1)
