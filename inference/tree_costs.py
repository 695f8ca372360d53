"""What trees cost on this machine, for the policies whose size follows from it (Sequoia, DySpec that stops by cost).

The target is timed on as many tokens as a tree may have; a draft's step by growing chains through its tree session, the
way it will be used. A cost curve that was measured before is read from a file instead.
Shape letters: B batch.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from draftsmith.inference.costs import DRAFT_TOKENS, CostCurve, measure
from draftsmith.inference.drafters.tree_base import Accepted, PolicyDrafter, TreeTask, Uniforms
from draftsmith.inference.drafters.tree_model import TreeModelDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree_policies.chain import ChainPolicy

REPETITIONS = 7
_POINTS = 5  # sizes of a tree whose verification is timed, the root alone aside


def measure_tree(
    target: Engine,
    draft: Engine | PolicyDrafter,
    *,
    nodes: int,
    batch: int = 1,
    context: int = 64,
    sampling: SamplingParams | None = None,
    repetitions: int = REPETITIONS,
    clock: Callable[[], float] = time.perf_counter,
) -> CostCurve:
    """Time target calls on 1 to `nodes` + 1 tokens and a draft's step at `batch` rows of `context` tokens.

    Raises InvalidValue for a draft that makes its trees without a policy, and as `measure`.
    """
    if hasattr(draft, "start") and not hasattr(draft, "with_policy"):
        raise InvalidValue(f"a {type(draft).__name__} makes its trees itself: there is no size to choose by cost")
    sampling = sampling or SamplingParams()
    points = sorted({1, *(1 + max(1, nodes * i // _POINTS) for i in range(1, _POINTS + 1))})
    found = measure(
        *(target, None),
        batch=batch,
        context=context,
        sampling=sampling,
        verify_tokens=points,
        repetitions=repetitions,
        clock=clock,
    )
    long = max(DRAFT_TOKENS)
    drafter = cast(PolicyDrafter, draft) if hasattr(draft, "with_policy") else _over(draft, long)
    if hasattr(drafter, "bind"):
        drafter.bind(target)
    # a draft's positions may end before the target's
    spec = getattr(getattr(drafter, "engine", drafter), "spec", target.spec)
    room = min(found.context, spec.max_length - long)
    if room < 1:
        raise InvalidValue(
            f"the draft's {spec.max_length} positions do not hold {long} more tokens: nothing can be timed"
        )
    with torch.inference_mode():
        seconds = _chains(drafter.with_policy(ChainPolicy(long)), target, room, batch, sampling, repetitions, clock)
    short = min(DRAFT_TOKENS)
    step = max(seconds[long] - seconds[short], 0.0) / (long - short)
    fixed = max(seconds[short] - short * step, 0.0)
    if drafter.aux_layers:  # a round also feeds the states that the target brought: one call more
        fixed += step
    return dataclasses.replace(found, draft_step=step, draft_fixed=fixed)


def _over(engine: Engine, nodes: int) -> PolicyDrafter:
    return TreeModelDrafter(engine, ChainPolicy(nodes))


def _chains(
    drafter: PolicyDrafter,
    target: Engine,
    context: int,
    batch: int,
    sampling: SamplingParams,
    repetitions: int,
    clock: Callable[[], float],
) -> dict[int, float]:
    """Nodes of a chain -> median seconds of a session that drafts it."""
    longest = max(DRAFT_TOKENS)
    vocab = min(target.spec.vocab_size, drafter.vocab_size or target.spec.vocab_size)
    session = drafter.start(
        TreeTask(
            rows=batch,
            capacity=context + longest,
            nodes=longest,
            vocab_size=vocab,
            sampling=sampling,
            device=target.device,
        )
    )
    tokens = torch.arange(context).remainder(vocab).expand(batch, -1)
    path = torch.zeros(batch, 1, dtype=torch.int64, device=target.device)
    if drafter.aux_layers and context > 1:
        ids = tokens[:, :-1].to(target.device)
        features = torch.cat(target.forward(ids, aux_layers=drafter.aux_layers)[1], -1)
        session.commit(Accepted([context] * batch, path, [0] * batch, features, [context - 1] * batch))
    texts: list[list[int]] = tokens.tolist()
    u: Uniforms | None = None
    if not sampling.greedy:

        def half(index: torch.Tensor) -> torch.Tensor:
            return torch.full((batch, *index.shape[1:]), 0.5, dtype=torch.float64, device=target.device)

        u = half

    def draft(g: int) -> None:
        if session.propose(texts, [g] * batch, [g] * batch, u, None) is None:
            raise InvalidValue(f"the draft has no room behind a context of {context} tokens: nothing can be timed")
        session.commit(Accepted([context] * batch, path, [1] * batch, None, [0] * batch))

    times: dict[int, list[float]] = {g: [] for g in DRAFT_TOKENS}
    for turn in range(repetitions + 1):
        for g in DRAFT_TOKENS if turn % 2 else DRAFT_TOKENS[::-1]:
            _wait(target)
            start = clock()
            draft(g)
            _wait(target)
            if turn:  # the first calls allocate
                times[g].append(clock() - start)
    return {g: statistics.median(found) for g, found in times.items()}


def node_value(costs: CostCurve, nodes: int) -> float:
    """The value below which one more node costs more time than it can save, in (0, 1).

    A node of value v is tested, let alone accepted, with probability v; accepted it saves a plain round. It costs a
    draft step and its share of the target's call: v * plain_round < draft_step + slope of t_verify ("DySpec" (2024);
    its acceptance is not asked for, as whether a node is drawn may not depend on the token that comes).
    """
    slope = max(0.0, costs.t_verify(nodes + 1) - costs.t_verify(1)) / nodes
    return min(max((costs.draft_step + slope) / costs.plain_round, 1e-6), 1 - 1e-6)


def read_curve(path: Path, batch: int) -> CostCurve:
    """A cost curve from a file of its own, or that of a batch size from a report of `draftsmith bench --json`.

    Raises InvalidValue for anything else, and for a batch size that was not measured.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidValue(f"cannot read costs from {path}: {error}") from None
    batches = bench_batches(found)
    if batches is None:
        return CostCurve.from_json(found if isinstance(found, dict) else {})
    if str(batch) not in batches:
        raise InvalidValue(f"{path} holds costs at the batch sizes {', '.join(batches)}, none at {batch}")
    return CostCurve.from_json(batches[str(batch)]["costs"])


def bench_batches(report: Any) -> dict[str, Any] | None:
    """Batch size -> forecast and costs of a bench report; None for another document."""
    try:
        batches = report["forecast"]["batches"]
        return batches if all("costs" in entry for entry in batches.values()) and batches else None
    except (KeyError, TypeError, AttributeError):
        return None


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
