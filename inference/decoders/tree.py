"""Speculative sampling over token trees: a drafter offers several continuations at once, one target call verifies all.

"SpecInfer" (2024), section 4; trees without replacement as in "Sequoia" and "DySpec" (2024). A round is: grow a tree
behind the last committed token, one target call on its nodes under the ancestor mask, walk down from the root
(tree_verification.py), one read of the outcome by the host, keep the accepted path in both caches.
Shape letters: B rows in the batch, N nodes with the root, P nodes of a path, F aux width, V vocabulary.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.decoders.session import RowOutcome, Session, drain, empty_result, greedy_choice, warn_once
from draftsmith.inference.decoders.speculative import shared_vocabulary
from draftsmith.inference.drafters.tree_base import Accepted, TreeDrafter, TreeDraftSession, TreePolicy, TreeTask
from draftsmith.inference.drafters.tree_model import TreeModelDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.requests import Commit, DecodeResult, Recorder, TokenRequest
from draftsmith.inference.rng import Stream
from draftsmith.inference.sampling import SamplingParams, TokenCounts, law
from draftsmith.inference.traversal_verification import verify_traversal
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_settings import AUTO, TreeSettings, make_policy
from draftsmith.inference.tree_verification import TreeVerdict, verify_tree, verify_tree_greedy
from draftsmith.inference.typical_acceptance import verify_typical

# What a round looked like to somebody who measures: the trees, the verdict, and which rows took part.
Watcher = Callable[[Tree, TreeVerdict, Sequence[int]], None]
# What the target said in a round, for somebody who learns from it: the trees, the verdict, the logits of all nodes
# [B, N, V], which rows took part, and the texts [B] that end with the roots.
Listener = Callable[[Tree, TreeVerdict, Tensor, Sequence[int], Sequence[Sequence[int]]], None]

# What the target says at the prompts of a call: positions -> its logits [B, n, V] there (behind a row's last token but
# one: of padding), made when they are asked for; and the texts [B].
PromptReader = Callable[[Callable[[slice], Tensor], Sequence[Sequence[int]]], None]


@dataclass
class _Call:
    """One decode call."""

    session: Session
    draft: TreeDraftSession
    checked: bool = False  # the first tree of a call is looked at, node by node
    underflow: int = 0  # rejections that left no residual


class TreeDecoder:
    """Decodes with trees; lossless for every drafter that keeps the protocol of `tree_base`."""

    def __init__(
        self,
        target: Engine,
        drafter: TreeDrafter,
        *,
        sampling: SamplingParams | None = None,
        settings: TreeSettings | None = None,
        seed: int = 0,
        tokenizer: Any | None = None,
        recorder: Recorder | None = None,
        vocab_size: int | None = None,
        watcher: Watcher | None = None,
        listener: Listener | None = None,
        reader: PromptReader | None = None,
    ) -> None:
        """vocab_size: the tokenizer's size, where the two heads are padded to different sizes above it.

        watcher: called once a round with what a calibration needs. listener: with what the target said, plain rounds
        too. reader: with what it says at the prompts, before the first round.
        """
        self._target = target
        self._drafter = drafter
        self._sampling = sampling or SamplingParams()
        self._settings = settings or TreeSettings()
        self._seed = seed
        self._tokenizer = tokenizer
        self._recorder = recorder
        self.watcher = watcher
        self._listener = listener
        self._reader = reader
        self._policy: TreePolicy | None = getattr(drafter, "policy", None)
        self._nodes = self._settings.nodes if self._policy is None else self._policy.nodes
        self._draws = not self._sampling.greedy or self._settings.draft_temperature > 0
        self._vocab_size = shared_vocabulary(
            target.spec.vocab_size, drafter.vocab_size, vocab_size, tokenizer, drafter.tokenizer
        )

    def decode(self, requests: Sequence[TokenRequest]) -> DecodeResult:
        """Decode all requests as one batch."""
        return drain(self.stream(requests))

    def stream(self, requests: Sequence[TokenRequest]) -> Generator[Commit, None, DecodeResult]:
        """Yields what every round commits to each row; the generator's return value is the DecodeResult."""
        if not requests:
            return empty_result("target", "draft")
        with torch.inference_mode():
            call = self._open(requests)
        session = call.session
        while session.running:
            with torch.inference_mode():  # closed before each yield: the caller's code is not to run in it
                commits = self._round(call)
                kept = session.shrink()
                if kept is not None:
                    call.draft.select(kept)
            yield from commits
        session.nfe["draft"] = call.draft.calls
        result = session.result()
        result.notes["residual_underflow"] = call.underflow
        result.notes["rule"] = self._rule
        result.notes["nodes"] = self._nodes
        return result

    @property
    def _rule(self) -> str:
        if self._sampling.greedy:  # one-hot laws: typical acceptance is the exact rule there
            return "greedy"
        return "typical" if self._settings.lossy_typical else self._settings.verification

    def _open(self, requests: Sequence[TokenRequest]) -> _Call:
        target, settings = self._target, self._settings
        session = Session(
            requests,
            target=target,
            vocab_size=self._vocab_size,
            sampling=self._sampling,
            seed=self._seed,
            tokenizer=self._tokenizer,
            recorder=self._recorder,
            headroom=0,
        )
        capacity = max(row.limit for row in session.rows) + self._nodes
        session.cache.widen(capacity)  # nodes need slots, but no positions behind the row's limit
        temperature = settings.draft_temperature or self._sampling.temperature
        draft = self._drafter.start(
            TreeTask(
                rows=len(requests),
                capacity=capacity,
                nodes=self._nodes,
                vocab_size=self._vocab_size,
                sampling=replace(self._sampling, temperature=temperature),
                device=target.device,
            )
        )
        rooms = {row.index: draft.room(len(row.tokens)) for row in session.rows}
        warn_once(
            [i for i, room in rooms.items() if room < 1 and requests[i].max_new_tokens > 1],
            "the prompt fills the draft's context: nothing can be drafted behind it, and the row is decoded plainly",
        )
        call = _Call(session, draft)
        self._prefill(call)
        return call

    def _prefill(self, call: _Call) -> None:
        """Read all prompts but their last tokens, which are the first roots; show their features to the drafter."""
        session = call.session
        lengths = [len(t) - 1 for t in session.tokens()]
        most = max(lengths)
        if most == 0:
            return
        ids = host_tensor(
            [[*t[:-1], *[t[-1]] * (most - n)] for t, n in zip(session.tokens(), lengths, strict=True)],
            session.cache.device,
        )
        hidden, aux = self._target.forward(ids, cache=session.cache, aux_layers=self._drafter.aux_layers)
        session.nfe["target"] += 1
        if self._reader is not None:
            self._reader(lambda places: self._target.head(hidden[:, places])[..., : self._vocab_size], session.tokens())
        session.cache.truncate(lengths)
        if aux:
            path = torch.zeros(len(lengths), 1, dtype=torch.int64, device=ids.device)
            features = torch.cat(aux, -1)
            call.draft.commit(Accepted([n + 1 for n in lengths], path, [0] * len(lengths), features, lengths))

    def _round(self, call: _Call) -> list[Commit]:
        """Grow, verify, commit; one host synchronisation besides those of the drafter."""
        begin = time.perf_counter()
        session, target = call.session, self._target
        cache = session.cache
        tree = self._propose(call)
        offered = tree is not None
        if tree is None:
            tree = Tree.bare(host_tensor([[row.tokens[-1] for row in session.rows]], target.device)[0])
        starts = list(cache.lengths)
        last = target.spec.max_length - 1  # padding, and nodes of rows that ended, may stand behind it
        hidden, aux = target.forward(
            tree.tokens,
            cache=cache,
            positions=tree.positions(starts).clamp_max_(last),
            mask=tree.mask(starts, target.dtype) if tree.width > 1 else None,
            aux_layers=self._drafter.aux_layers,
        )
        session.nfe["target"] += 1
        logits = target.head(hidden)[..., : self._vocab_size]
        verdict = self._verify(session, tree, logits)
        outcomes = _read(tree, verdict)
        live = [b for b, row in enumerate(session.rows) if row.reason is None]
        call.underflow += sum(outcomes[b].underflow for b in live)
        if self.watcher is not None and offered:
            self.watcher(tree, verdict, live)
        if self._listener is not None:
            self._listener(tree, verdict, logits, live, session.tokens())
        most = 1 + max(outcomes[b].k for b in live)
        path = verdict.path[:, :most]
        if most > 1:
            cache.keep(path, starts)
        shown = self._shown(session, tree, verdict, logits, outcomes) if session.records else _Shown(path, logits)
        commits, _ = session.commit(
            outcomes, begin, drafted=shown.drafted, logits=shown.logits, p=shown.target_law, q=shown.draft_law
        )
        kept = [0] * len(session.rows)
        for b, commit in zip(live, commits, strict=True):
            kept[b] = len(commit.tokens)
        features = None
        if aux:
            states = torch.cat(aux, -1)
            features = states.gather(1, path.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        call.draft.commit(Accepted([len(row.tokens) for row in session.rows], path, kept, features, kept))
        if offered and self._policy is not None:
            self._policy.observe([outcomes[b].k if kept[b] else None for b in range(len(kept))])
        return commits

    def _propose(self, call: _Call) -> Tree | None:
        session, draft = call.session, call.draft
        want, depth = [], []
        for row in session.rows:
            levels = 0 if row.reason is not None else min(self._settings.depth, row.budget - 1)
            depth.append(max(0, levels))  # a round commits one token more than it accepts
            want.append(min(self._nodes, draft.room(len(row.tokens))) if levels > 0 else 0)
        if max(want) < 1:
            return None

        def u(index: Tensor) -> Tensor:
            return session.numbers(Stream.DRAFT, index)

        tree = draft.propose(session.tokens(), want, depth, u if self._draws else None, session.penalties)
        if tree is not None and not call.checked:
            tree.check()
            call.checked = True
        return tree

    def _verify(self, session: Session, tree: Tree, logits: Tensor) -> TreeVerdict:
        params = self._sampling
        rows = torch.arange(tree.batch, device=logits.device)
        before = _Counts(session, tree) if session.penalties is not None else None

        def at(node: Tensor) -> tuple[Tensor, TokenCounts | None]:
            return logits[rows, node].unsqueeze(1), None if before is None else before.at(rows, node)

        def laws(node: Tensor) -> Tensor:
            scores, counts = at(node)
            return law(scores, params, counts).squeeze(1)

        def choices(node: Tensor) -> tuple[Tensor, Tensor]:
            scores, counts = at(node)
            best, finite = greedy_choice(scores, params, counts)
            return best[:, 0], finite[:, 0]

        if params.greedy:
            return verify_tree_greedy(tree, choices)
        if self._settings.lossy_typical:
            return verify_typical(tree, laws, self._settings.typical_epsilon, self._settings.typical_delta)
        rule = verify_traversal if self._settings.verification == "traversal" else verify_tree
        return rule(tree, laws, session.numbers(Stream.ACCEPT, torch.arange(tree.width).unsqueeze(0)))

    def _shown(
        self, session: Session, tree: Tree, verdict: TreeVerdict, logits: Tensor, outcomes: "Sequence[TreeOutcome]"
    ) -> "_Shown":
        """What a recorder is shown: the accepted path as a chain, and behind it the first sibling that was rejected."""
        g = max(o.shown for o in outcomes)
        path = torch.nn.functional.pad(verdict.path, (0, max(0, g + 1 - verdict.path.shape[1])))[:, : g + 1]
        first, _ = tree.kin()
        ends = torch.tensor([[o.k] for o in outcomes], device=path.device)
        following = torch.cat([path[:, 1:], torch.zeros_like(path[:, :1])], 1)
        rejected = first.gather(1, path.gather(1, ends)).clamp_min(0)
        drafted = tree.tokens.gather(1, following.scatter(1, ends, rejected))[:, :g]
        rows = torch.arange(tree.batch, device=path.device).unsqueeze(1)
        seen = logits[rows, path]
        p = None
        if not self._sampling.greedy:
            p = law(seen, self._sampling, session.penalties.counts(drafted) if session.penalties else None)
        q = None
        if tree.law is not None and tree.law_row is not None:
            q = tree.law[rows, tree.law_row.gather(1, path).clamp_min(0)][:, :g]
        return _Shown(drafted, seen, p, q)


@dataclass(frozen=True)
class TreeOutcome(RowOutcome):
    """What one round decided for one row."""

    underflow: int = 0
    shown: int = 0


@dataclass(frozen=True)
class _Shown:
    """A round as a chain."""

    drafted: Tensor  # int64 [B, g]
    logits: Tensor  # [B, g+1, V]
    target_law: Tensor | None = None  # [B, g+1, V]
    draft_law: Tensor | None = None  # [B, g, V]


class _Counts:
    """Token counts before each node: the committed text and the node's own path."""

    def __init__(self, session: Session, tree: Tree) -> None:
        assert session.penalties is not None
        self._committed = session.penalties.counts()  # the root is committed
        self._tokens = tree.tokens
        self._above = tree.ancestors().clone()  # a tree without nodes shares its entries
        self._above[..., 0] = False

    def at(self, rows: Tensor, node: Tensor) -> TokenCounts:
        """At one node of each row: int64 [B] each."""
        output = self._committed.output.squeeze(1)
        weight = self._above[rows, node].to(output.dtype)
        return TokenCounts(self._committed.prompt, output.scatter_add(1, self._tokens, weight).unsqueeze(1))


def _read(tree: Tree, verdict: TreeVerdict) -> list[TreeOutcome]:
    """The round's only wait for the device: all that the host must know, in one copy (ids are exact in float64)."""
    first, _ = tree.kin()
    last = verdict.path.gather(1, verdict.k.unsqueeze(1))
    more = first.gather(1, last).squeeze(1) >= 0  # the path ended at a node with children
    head = [verdict.k, verdict.y, tree.size - 1, verdict.fault, verdict.examined, verdict.underflow, more]
    columns = [torch.stack([x.double() for x in head], 1), verdict.beta_sum.unsqueeze(1)]
    read: list[list[float]] = torch.cat([*columns, tree.tokens.gather(1, verdict.path).double()], 1).tolist()
    outcomes = []
    for row in read:
        k, y, n, fault, examined, underflow, more_below = (int(x) for x in row[:7])
        new = [*(int(token) for token in row[9 : 9 + k]), y]  # the path's first token is the root's
        outcomes.append(TreeOutcome(n, k, y, new, row[7], fault, examined, k + more_below, underflow))
    return outcomes


def build(
    parts: Mapping[str, Any],
    *,
    sampling: SamplingParams | None,
    settings: TreeSettings,
    seed: int,
    tokenizer: Any | None,
    recorder: Recorder | None,
    costs: CostCurve | None,
    vocab_size: int | None,
) -> TreeDecoder:
    """For the registry: the draft is an engine, or any TreeDrafter. costs: for policies that choose a size by them."""
    draft = parts["draft"]
    params = sampling or SamplingParams()
    if not hasattr(draft, "start"):
        draft = TreeModelDrafter(draft, make_policy(settings, params, costs))
    elif settings.policy != AUTO:
        if not hasattr(draft, "with_policy"):
            raise InvalidValue(
                f"a {type(draft).__name__} makes its trees itself: leave policy at 'auto', got {settings.policy!r}"
            )
        draft = draft.with_policy(make_policy(settings, params, costs))
    if hasattr(draft, "bind"):  # a feature drafter reads its target's embedding, or head
        draft.bind(parts["target"])
    return TreeDecoder(
        parts["target"],
        draft,
        sampling=sampling,
        settings=settings,
        seed=seed,
        tokenizer=tokenizer,
        recorder=recorder,
        vocab_size=vocab_size,
    )
