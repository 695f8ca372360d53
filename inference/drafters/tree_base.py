"""What a tree drafter is to the tree decoder; the twin of `base.py` for chains.

A `TreeDrafter` is built once and holds what is heavy. `start` makes a `TreeDraftSession` for one decode call. How a
tree grows is a `TreePolicy` (inference/tree_policies/), which asks a `LawSource` for draft laws: a policy works with
every source (a language model, an EAGLE head), and a drafter without laws (n-gram tables) makes its trees itself.
Shape letters: B batch, N nodes with the root, w nodes expanded at once, F aux width (layers times D), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, device

from draftsmith.inference.sampling import PenaltyState, SamplingParams
from draftsmith.inference.tree import Tree


@dataclass(frozen=True)
class TreeTask:
    """What a session needs to know of the call it drafts for."""

    rows: int
    capacity: int  # longest row, prompt and output, plus one tree
    nodes: int  # most nodes of a tree, root excluded
    vocab_size: int  # ids that may be proposed: 0..vocab_size-1
    sampling: SamplingParams  # the target's, at the draft's temperature where one is set; a drafter may have its own
    device: device  # where the tree must lie


class Uniforms(Protocol):
    """The numbers of one round for drawing drafts; every row's depend on its own seed, round and index only."""

    def __call__(self, index: Tensor) -> Tensor:
        """float64 [B, ...] uniform on [0, 1): the numbers of these indices in each row, on the task's device.

        index: int64 [B or 1, ...] on the host, any values up to 2^61. Policies number a draw by its place in the tree
        (`tree_drawing.slot`), so that a row's tree depends neither on its batch-mates nor on the order of growing.
        """
        ...


class LawSource(Protocol):
    """A draft network over the growing trees of one round."""

    def root(self) -> Tensor:
        """Draft laws at the roots [B, V], after the draft's temperature and filters (temperature 0: plain softmax)."""
        ...

    def expand(self, tokens: Tensor, parent: Tensor) -> Tensor:
        """Laws [B, w, V] at new nodes, by one network call that appends them to the source's own tree.

        Args: tokens: int64 [B, w]; parent: int64 [B, w], earlier nodes of the source's own tree (0 the root, then in
        the order of expansion), whose children they are.
        """
        ...


class TreePolicy(Protocol):
    """How a tree grows."""

    nodes: int  # most nodes, root excluded
    sampled: bool  # children are drawn from the laws (Tree.law is set); else it picks them (deterministic)

    def columns(self, nodes: int) -> int:
        """Most nodes that growing trees of `nodes` nodes expands: slots that a source's cache needs beside the root."""
        ...

    def grow(
        self, source: LawSource, roots: Tensor, want: Sequence[int], depth: Sequence[int], u: Uniforms | None
    ) -> Tree:
        """Trees of at most want[b] nodes (root excluded) and depth[b] levels. roots: int64 [B], the root tokens.

        A sampled node is kept whatever it is: whether another one is drawn depends only on what was drawn before it.
        u None (a greedy target): where others draw, the likeliest tokens are picked, and the tree has no laws.
        """
        ...

    def observe(self, accepted: Sequence[int | None]) -> None:
        """What became of the trees grown last: [B] nodes accepted, None for a row that took no part. For policies that
        adapt or watch their estimate; the decoder calls it once after each `grow`."""
        ...


@dataclass(frozen=True)
class Accepted:
    """What one round came to: the tree drafter's view of a commit.

    A drafter with `aux_layers` also sees the prefill as one, before the first `propose`: the features of the prompt
    without its last token (none for a prompt of one token), with kept 0 in every row.
    """

    lengths: Sequence[int]  # [B] committed tokens now
    path: Tensor  # int64 [B, P]: nodes of the round's tree that stayed, root first, in order; filled up with any nodes
    kept: Sequence[int]  # [B] how many entries of `path` count (the root included); 0: the row took no part
    features: Tensor | None  # [B, c, F]: the target's aux states at the committed tokens it read since the last commit
    counts: Sequence[int]  # [B] how many of those c count (they are aligned to the left); the new last token is unread


class TreeDraftSession(Protocol):
    """The drafting side of one decode call."""

    calls: int  # network calls so far

    def room(self, length: int) -> int:
        """Most nodes that can follow `length` committed tokens."""
        ...

    def propose(
        self,
        tokens: Sequence[Sequence[int]],
        want: Sequence[int],
        depth: Sequence[int],
        u: Uniforms | None,
        penalties: PenaltyState | None,
    ) -> Tree | None:
        """A tree for every row: at most want[b] nodes without the root, at most depth[b] levels.

        Args: tokens: [B] committed tokens, prompt included; the last one is the root. u: None when the target is greedy
        and the drafter draws nothing. Returns None when no row has anything to offer.
        """
        ...

    def commit(self, accepted: Accepted) -> None:
        """Forget the rejected nodes. Also called after a plain round, with `path` [B, 1] of roots."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        ...


class TreeDrafter(Protocol):
    """Proposes trees for a target to verify."""

    aux_layers: tuple[int, ...]  # states of the target that `Accepted.features` must bring (Engine.forward); mostly ()

    @property
    def vocab_size(self) -> int | None:
        """Rows of its head; None when it only repeats tokens it was shown."""
        ...

    @property
    def tokenizer(self) -> Any | None:
        """Compared with the target's when both are known."""
        ...

    def start(self, task: TreeTask) -> TreeDraftSession: ...


class PolicyDrafter(TreeDrafter, Protocol):
    """A tree drafter that gives laws and leaves it to a policy how its trees grow (language models, EAGLE heads)."""

    policy: TreePolicy

    def with_policy(self, policy: TreePolicy) -> "PolicyDrafter":
        """The same drafter under another policy."""
        ...
