"""A learned stop rule of a draft beside fixed lengths, confidence and cost: how many drafted tokens are worth a check.

Run from the repository's root, alone on the machine, after `draftsmith demo`:

    python -m benchmarks.draft_stop --demo runs/demo --json draft_stop.json

The pair is the demo's target and its online-distilled draft, greedy, one request at a time. The filter learns from what
became of drafts of eight tokens on one set of prompts; every rule's own number is tuned on a second set; the row is
measured on a third, interleaved with the others.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.drafters import Effort, prompts
from draftsmith.inference import bench, registry
from draftsmith.inference.bench import Prompt
from draftsmith.inference.drafters.base import DraftTask, Proposal
from draftsmith.inference.drafters.filtered import CAUSAL, FilteredDrafter, chain_signals
from draftsmith.inference.drafters.model import ModelDrafter, ModelDraftSession
from draftsmith.inference.engine import Engine
from draftsmith.inference.loader import load
from draftsmith.inference.nets.commit_filter import CommitFilter, FilterConfig, features
from draftsmith.inference.requests import TokenRequest

LONGEST = 8  # drafted tokens of a round that the filter learns from
TOKENS = 48
LEARNED, TUNED, MEASURED = 48, 8, 24  # prompts


@dataclass(frozen=True)
class Chains:
    """What became of drafted chains."""

    seen: Tensor  # float32 [R, LONGEST, F]
    examined: Tensor  # bool [R, LONGEST]; all tokens before were accepted
    accepted: Tensor  # bool [R, LONGEST]


class Watching(ModelDrafter):
    """Keeps what it drafted."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.made: list[Proposal] = []

    def start(self, task: DraftTask) -> "WatchingSession":
        return WatchingSession(self, task)


class WatchingSession(ModelDraftSession):
    """One call of a `Watching` drafter."""

    def __init__(self, drafter: Watching, task: DraftTask) -> None:
        super().__init__(drafter.engine, task.sampling, replace(task, want_law=True))
        self._made = drafter.made

    def propose(self, *given: Any) -> Proposal | None:
        made = super().propose(*given)
        if made is not None:
            self._made.append(made)
        return made


def watch(target: Engine, draft: Engine, asked: Sequence[Prompt], config: FilterConfig) -> Chains:
    """Decode one by one with drafts of eight tokens."""
    drafter = Watching(draft)
    settings = {"draft_length": LONGEST, **bench.CONSTANT}
    decoder = registry.build("speculative", {"target": target, "draft": drafter}, settings=settings)
    accepted: list[int] = []
    for i, prompt in enumerate(asked):
        rounds = decoder.decode([TokenRequest(prompt.ids, TOKENS, row_id=i, tag=prompt.tag)]).rounds
        accepted += [k for k, n in zip(rounds.accepted, rounds.drafted, strict=True) if n]
    seen, examined, right = [], [], []
    for made, k in zip(drafter.made, accepted, strict=True):
        n = made.tokens.shape[1]
        if n < LONGEST or made.law is None:  # the end of an answer
            continue
        seen.append(features(config, chain_signals(made.tokens, made.law)))
        place = torch.arange(n)
        examined.append((place <= k).unsqueeze(0))
        right.append((place < k).unsqueeze(0))
    return Chains(torch.cat(seen), torch.cat(examined), torch.cat(right))


def learn(chains: Chains, config: FilterConfig, steps: int = 600) -> CommitFilter:
    """Binary cross-entropy at the examined tokens; the best of the last fifth of the chains is kept."""
    torch.manual_seed(0)
    net = CommitFilter(config)
    rows = len(chains.seen)
    held = torch.arange(rows) >= rows * 4 // 5
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    best, kept = float("inf"), net.state_dict()

    def loss(which: Tensor) -> Tensor:
        logits = net(chains.seen[which])
        each = F.binary_cross_entropy_with_logits(logits, chains.accepted[which].float(), reduction="none")
        weight = chains.examined[which].float()
        return (each * weight).sum() / weight.sum()

    for step in range(steps):
        optimizer.zero_grad()
        loss(~held).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        if step % 20 == 19:
            with torch.no_grad():
                found = float(loss(held))
            if found < best:
                best, kept = found, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(kept)
    return net.eval().requires_grad_(False)


def candidates(target: Engine, draft: Engine, net: CommitFilter) -> dict[str, list[tuple[str, Any]]]:
    """Of each rule the numbers to choose from: (label, decoder)."""
    never: dict[str, Any] = {"fallback": "never"}

    def build(settings: dict[str, Any], drafter: Any = draft) -> Any:
        return registry.build("speculative", {"target": target, "draft": drafter}, settings=settings)

    adaptive: dict[str, Any] = {"schedule": "confidence", "draft_length": 4, "max_draft_length": LONGEST, **never}
    return {
        "fixed length": [(f"g = {g}", build({"draft_length": g, **bench.CONSTANT})) for g in (2, 3, 4, 5, 6, 8)],
        "confidence": [
            (f"confidence {c:g}", build({**adaptive, "confidence_threshold": c})) for c in (0.1, 0.2, 0.3, 0.4, 0.6)
        ],
        "cost": [("cost", build({"schedule": "cost", "max_draft_length": LONGEST, "fallback": "measured"}))],
        "learned": [
            (f"filter {t:g}", build(adaptive, FilteredDrafter(draft, net, t))) for t in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
        ],
    }


def rates(decoders: dict[str, Any], asked: Sequence[Prompt], turns: int) -> dict[str, dict[str, float]]:
    """Tokens/s (median over the turns), tau and drafted tokens a round; all decoders take turns on every prompt."""
    spent: dict[str, list[float]] = {name: [] for name in decoders}
    drafted: dict[str, list[int]] = {name: [] for name in decoders}
    committed: dict[str, list[int]] = {name: [] for name in decoders}
    for turn in range(turns + 1):  # the first one warms up
        seconds = dict.fromkeys(decoders, 0.0)
        made = dict.fromkeys(decoders, 0)
        for i, prompt in enumerate(asked):
            for name, decoder in decoders.items():
                begin = time.perf_counter()
                result = decoder.decode([TokenRequest(prompt.ids, TOKENS, row_id=i, tag=prompt.tag)])
                seconds[name] += time.perf_counter() - begin
                made[name] += len(result.output[0])
                if turn:
                    drafted[name] += result.rounds.drafted
                    committed[name] += result.rounds.committed
        if turn:
            for name in decoders:
                spent[name].append(made[name] / seconds[name])
    return {
        name: {
            "tokens/s": statistics.median(spent[name]),
            "tau": statistics.fmean(committed[name]),
            "drafted": statistics.fmean(drafted[name]),
        }
        for name in decoders
    }


def run(demo: Path) -> dict[str, Any]:
    """Learn, tune, measure; the report."""
    target_path = demo / "exports" / "target"
    target, draft = load(target_path).part, load(demo / "exports" / "draft").part
    every = prompts(target_path, LEARNED + TUNED + MEASURED, Effort(tokens=TOKENS))
    learned, tuned, measured = every[:LEARNED], every[LEARNED : LEARNED + TUNED], every[LEARNED + TUNED :]
    config = FilterConfig(LONGEST, features=CAUSAL, window=0, hidden=16)
    begin = time.perf_counter()
    chains = watch(target, draft, learned, config)
    net = learn(chains, config)
    seconds = time.perf_counter() - begin
    tried = {}
    chosen: dict[str, Any] = {"plain": registry.build("autoregressive", {"target": target})}
    for rule, numbers in candidates(target, draft, net).items():
        found = rates(dict(numbers), tuned, 1)
        best = max(found, key=lambda label: found[label]["tokens/s"])
        tried[rule] = {label: row["tokens/s"] for label, row in found.items()}
        chosen[f"{rule}: {best}"] = dict(numbers)[best]
    return {
        "chains": len(chains.seen),
        "learning seconds": seconds,
        "tuning": tried,
        "rows": rates(chosen, measured, 3),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args(argv)
    given.json.write_text(json.dumps(run(given.demo), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
