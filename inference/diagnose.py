"""Which wrong coupling explains that a drafter is accepted too little: every known one is tried, nothing is retrained.

No paper: our own tool. The statistic S is the expected number of accepted drafts at an anchor, along the target's own
answer: sum over k of the product of alpha_1..alpha_k, alpha = sum_v min(p, q) (Leviathan et al. 2022), averaged over
anchors. The draft's temperature is chosen anew for every hypothesis: else one that merely sharpens or flattens q wins.
Shape letters: n samples, N anchors, K steps, V vocabulary, W rows of the draft's head.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.hypotheses import base
from draftsmith.inference.hypotheses.base import Hypothesis, Subject, key
from draftsmith.inference.hypotheses.contexts import Contexts, chunks, likelihood
from draftsmith.inference.rng import Stream, uniform

TEMPERATURES = (0.6, 0.75, 0.9, 1.0, 1.15, 1.35, 1.7)
LEVEL = 0.05  # of a false alarm, over all hypotheses together
RESAMPLES = 2000
FLOOR = base.FLOOR
LEAST_GAIN = 0.002
SCREEN = 8  # samples of the first look
ROUNDS = 4
HOPELESS = 0.02  # S below it under every hypothesis: nothing explains that


@dataclass(frozen=True)
class Scored:
    """S of every sample under some couplings, at the temperature that suits them best."""

    samples: Tensor  # float64 [n]
    temperature: float

    @property
    def mean(self) -> float:
        return float(self.samples.mean())


@dataclass(frozen=True)
class Row:
    """What one hypothesis came to."""

    hypothesis: Hypothesis
    couplings: Any
    score: float
    gain: float  # mean of the paired differences to the couplings that it changes
    low: float  # their lower bound at the level of the family
    temperature: float


@dataclass(frozen=True)
class Finding:
    """An accepted hypothesis."""

    hypothesis: Hypothesis
    ties: tuple[Hypothesis, ...]  # as good within the samples' noise; exact equivalents among them
    before: float
    after: float
    gain_low: float


@dataclass
class Verdict:
    """What a diagnosis ends with."""

    status: str  # "healthy", "named", "tie", "unexplained", "certain" (found before any pass)
    deployed: float = 0.0  # S
    final: float = 0.0
    unigram: float = 0.0  # S of a draft that always proposes the answers' average law
    findings: list[Finding] = field(default_factory=list)
    table: list[Row] = field(default_factory=list)  # of the first round, best first
    tried: int = 0  # hypotheses, over all rounds
    couplings: Any = None  # after the fixes
    certain: list[str] = field(default_factory=list)  # preflight: faults that need no statistics
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    confirmed: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 a fault is named, 2 not explained."""
        return {"healthy": 0, "named": 1, "tie": 1, "certain": 1, "unexplained": 2}[self.status]


Watch = Callable[[str, int, int, Sequence[Row]], None]  # (stage, done, of, rows so far)


def overlap(logits: Tensor, ids: Tensor, p: Tensor, temperature: float) -> Tensor:
    """alpha = sum_v min(p, q) [..., ] of logits [..., W] at target ids [W] (-1: none) and p [..., V].

    The mass of two draft rows on one id adds. What is not finite counts as no mass.
    """
    q = (logits.float() / temperature).softmax(-1).nan_to_num(0.0)
    known = ids >= 0
    if not bool(known.all()):
        q, ids = q[..., known], ids[known]
    if ids.numel() and int(torch.bincount(ids).max()) > 1:
        q = torch.zeros_like(p).index_add_(-1, ids, q)
        return torch.minimum(p, q).sum(-1)
    return torch.minimum(p[..., ids], q).sum(-1)


def accepted(alpha: Tensor) -> Tensor:
    """S [n] of alpha [n, N, K]."""
    return alpha.double().cumprod(-1).sum(-1).mean(-1)


def bootstrap(values: Tensor, level: float, seed: int = 0) -> float:
    """The `level` quantile of the mean of `values` [n] over resampled samples."""
    draws = uniform(seed, torch.arange(RESAMPLES).unsqueeze(1), torch.arange(len(values)), Stream.DATA)
    means = values[(draws * len(values)).long()].mean(1).sort().values
    return float(means[min(RESAMPLES - 1, int(level * RESAMPLES))])


class Search:
    """Scores couplings on fixed contexts, each once."""

    def __init__(
        self,
        subject: Subject,
        contexts: Contexts,
        *,
        temperatures: Sequence[float] = TEMPERATURES,
        seed: int = 0,
        deep: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.subject, self.contexts, self.seed, self.deep = subject, contexts, seed, deep
        self.temperatures = tuple(temperatures)
        self._few = contexts.first(SCREEN) if contexts.count >= 2 * SCREEN else None
        self._known: dict[tuple[str, bool], Scored] = {}
        self._watch = watch or (lambda stage, done, of, rows: None)

    def score(self, couplings: Any, *, few: bool = False) -> Scored:
        """S of all samples (or of the first few)."""
        name = (key(couplings), few)
        if name not in self._known:
            contexts = self._few if few and self._few is not None else self.contexts
            contexts = contexts.rendered(getattr(couplings, "rendering", ""))
            self._known[name] = score(self.subject, couplings, contexts, self.temperatures)
        return self._known[name]

    @property
    def tried(self) -> int:
        """How many couplings were scored, those as deployed aside."""
        return len({name for name, _ in self._known}) - 1

    def hypotheses(self, couplings: Any) -> list[tuple[Hypothesis, Any]]:
        """Every hypothesis of every family with the couplings it leads to; of two that lead to one, the first."""
        found: dict[str, tuple[Hypothesis, Any]] = {key(couplings): (Hypothesis("", "", {}, ""), couplings)}
        for family in self.subject.families:
            for hypothesis in family(couplings, self.subject.facts):
                changed = hypothesis.apply(couplings)
                found.setdefault(key(changed), (hypothesis, changed))
        if self.deep and hasattr(couplings, "aux_layers"):
            for hypothesis, changed in _all_ids(couplings, self.subject.facts.target_layers):
                found.setdefault(key(changed), (hypothesis, changed))
        return list(found.values())[1:]

    def round(self, couplings: Any) -> list[Row]:
        """Every single hypothesis against `couplings`, best first."""
        tried = self.hypotheses(couplings)
        kept = self._screened(couplings, tried)
        now, level = self.score(couplings), LEVEL / max(1, len(tried))
        rows: list[Row] = []
        for i, (hypothesis, changed) in enumerate(kept):
            scored = self.score(changed)
            gains = scored.samples - now.samples
            low = bootstrap(gains, level, self.seed)
            rows.append(Row(hypothesis, changed, scored.mean, float(gains.mean()), low, scored.temperature))
            rows.sort(key=lambda row: -row.gain)
            self._watch("all samples", i + 1, len(kept), rows)
        return rows

    def _screened(self, couplings: Any, tried: list[tuple[Hypothesis, Any]]) -> list[tuple[Hypothesis, Any]]:
        """Without those whose upper bound on the first samples is below the lower bound of the best."""
        if self._few is None:
            return tried
        now = self.score(couplings, few=True).samples
        gains: list[Tensor] = []
        for i, (_, changed) in enumerate(tried):
            gains.append(self.score(changed, few=True).samples - now)
            self._watch(f"first {SCREEN} samples", i + 1, len(tried), [])
        spread = [3 * float(g.std()) / len(g) ** 0.5 for g in gains]
        best = max((float(g.mean()) - s for g, s in zip(gains, spread, strict=True)), default=0.0)
        return [one for one, g, s in zip(tried, gains, spread, strict=True) if float(g.mean()) + s >= best]

    def accept(self, couplings: Any, rows: list[Row]) -> Finding | None:
        """The best hypothesis, if its gain is beyond chance and worth the name of a fault."""
        now = self.score(couplings)
        worth = [row for row in rows if row.gain > max(row.hypothesis.floor * now.mean, LEAST_GAIN)]
        if not worth or not worth[0].low > 0:
            return None
        best = worth[0]
        mine = self.score(best.couplings).samples
        ties = [
            row.hypothesis
            for row in worth[1:]
            if row.gain > 0 and bootstrap(mine - self.score(row.couplings).samples, LEVEL, self.seed) <= 0
        ]
        return Finding(best.hypothesis, tuple(ties), now.mean, best.score, best.low)

    def repair(self, couplings: Any, first: Row | None = None) -> tuple[Any, list[Finding], list[Row]]:
        """Greedy: the best hypothesis is fixed and the rest tried again, at most ROUNDS times; then each is undone.

        first: begin with this row of the first round instead of the best one.
        Returns the couplings, the findings, and the rows of the first round.
        """
        start = couplings
        findings: list[Finding] = []
        table: list[Row] = []
        for number in range(ROUNDS):
            rows = self.round(couplings)
            table = table or rows
            if number == 0 and first is not None:
                rows = [first, *(row for row in rows if row is not first)]
            found = self.accept(couplings, rows)
            if found is None:
                break
            findings.append(found)
            couplings = found.hypothesis.apply(couplings)
        return *self._without_needless(start, couplings, findings), table

    def _without_needless(self, start: Any, final: Any, findings: list[Finding]) -> tuple[Any, list[Finding]]:
        """A fix may have mimicked a later one: each is left out alone, and stays out where nothing is lost."""
        kept = list(findings)
        for found in findings:
            rest = [other for other in kept if other is not found]
            if found not in kept or not rest:
                continue
            without = start
            for other in rest:
                without = other.hypothesis.apply(without)
            loss = self.score(final).samples - self.score(without).samples
            if bootstrap(loss, LEVEL, self.seed) <= 0:
                kept, final = rest, without
        return final, kept


def score(subject: Subject, couplings: Any, contexts: Contexts, temperatures: Sequence[float]) -> Scored:
    """S of every sample at the best temperature. Nothing of the drafter is changed."""
    parts: list[Tensor] = []
    with torch.inference_mode():
        for chunk in chunks(contexts.count):
            logits, ids = subject.logits(couplings, contexts, chunk)
            p = contexts.law(chunk)
            parts.append(torch.stack([accepted(overlap(logits, ids, p, t)) for t in temperatures]))
    table = torch.cat(parts, 1)
    best = int(table.mean(1).argmax())
    return Scored(table[best], temperatures[best])


def unigram(contexts: Contexts) -> Tensor:
    """S [n] of the draft that always proposes the mean law of the answers: what no coupling should lose to."""
    laws = [contexts.law(chunk) for chunk in chunks(contexts.count)]
    q = torch.cat([law.flatten(0, 2) for law in laws]).mean(0)
    return torch.cat([accepted(torch.minimum(law, q).sum(-1)) for law in laws])


def likelier(contexts: Contexts, seed: int = 0) -> tuple[str, ...]:
    """Renderings under which the target finds the answers likelier, beyond chance: else it did not write them so."""
    given = likelihood(contexts)
    level = LEVEL / max(1, len(contexts.renderings))
    gains = {name: likelihood(other) - given for name, other in contexts.renderings.items()}
    return tuple(name for name, gain in gains.items() if bootstrap(gain, level, seed) > 0)


def diagnose(
    subject: Subject,
    contexts: Contexts,
    *,
    expected: float | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
    deep: bool = False,
    watch: Watch | None = None,
) -> Verdict:
    """Try every coupling; see the module. expected: S of the healthy drafter, where somebody measured it.

    Returns a verdict; the drafter's weights are as they were.
    """
    began = time.perf_counter()
    if contexts.renderings:
        subject.facts = replace(subject.facts, renderings=likelier(contexts, seed))
    search = Search(subject, contexts, temperatures=temperatures, seed=seed, deep=deep, watch=watch)
    deployed = search.score(subject.couplings)
    chance = unigram(contexts)
    verdict = Verdict("unexplained", deployed.mean, deployed.mean, float(chance.mean()), couplings=subject.couplings)
    if expected is not None and deployed.mean >= (1 - FLOOR) * expected:
        verdict.status = "healthy"
        verdict.notes.append(f"S is within {FLOOR:.0%} of the expected {expected:.3f}: nothing was tried")
    else:
        final, findings, table = search.repair(subject.couplings)
        if deep and table and (not findings or expected is not None):
            final, findings = _beam(search, subject.couplings, table, final, findings)
        verdict.couplings, verdict.findings, verdict.table = final, findings, table
        end = search.score(final)
        verdict.final = end.mean
        verdict.status = _status(verdict, bootstrap(end.samples - chance, LEVEL, seed), expected)
    verdict.tried = search.tried
    verdict.seconds = time.perf_counter() - began
    return verdict


def _status(verdict: Verdict, above_chance: float, expected: float | None) -> str:
    if verdict.final < HOPELESS or above_chance <= 0:  # an untrained head, made a little less bad by chance
        return "unexplained"
    if verdict.findings:
        return "tie" if any(found.ties for found in verdict.findings) else "named"
    return "unexplained" if expected is not None and verdict.final < (1 - FLOOR) * expected else "healthy"


def _beam(
    search: Search, start: Any, table: list[Row], final: Any, findings: list[Finding]
) -> tuple[Any, list[Finding]]:
    """Begin again from the second and third best single hypothesis; the best end counts."""
    for row in table[1:3]:
        if row.low > 0:
            other, found, _ = search.repair(start, row)
            if search.score(other).mean > search.score(final).mean:
                final, findings = other, found
    return final, findings


def _all_ids(couplings: Any, depth: int) -> list[tuple[Hypothesis, Any]]:
    from draftsmith.inference.hypotheses.aux_ids import hypothesis

    found = []
    for place, now in enumerate(couplings.aux_layers):
        for i in range(depth + 1):
            ids = (*couplings.aux_layers[:place], i, *couplings.aux_layers[place + 1 :])
            if len(set(ids)) == len(ids):
                one = hypothesis(f"id {now} is {i}", ids)
                found.append((one, one.apply(couplings)))
    return found


def fixes(verdict: Verdict) -> Mapping[str, list[str]]:
    """Reader -> what to set there, a line for each finding."""
    lines: dict[str, list[str]] = {}
    for found in verdict.findings:
        for reader, text in found.hypothesis.fixes.items():
            lines.setdefault(reader, []).append(text)
    return lines
