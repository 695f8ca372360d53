"""Tiny networks with known laws on the Engine protocol, and the statistics that compare decoders with them.

Imports inference only (contract 7). Shape letters: B batch, n new tokens, C cache slots, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.engine import Engine, EngineSpec
from draftsmith.inference.errors import InvalidType
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import PenaltyState, SamplingParams, law


@dataclass
class MarkovEngine:
    """A context-free (order 0), Markov-1 or Markov-2 language model given by a table of logits.

    It remembers its tokens in a real StaticCache (the key of a slot is the token's id), so a wrong roll-back, a wrong
    slot or a stale row changes its logits from order 2 on. Before the first token it sees id 0.
    Hidden states are the logits themselves and the head is the identity. Under a tree mask the token before a query is
    the one in the last slot that it sees, itself left out. No embeddings as input.
    """

    table: Tensor  # [V] * order + [V] logits; may be changed between calls (a draft that learns)
    max_length: int = 4096
    training: bool = False
    calls: list[tuple[int, int]] = field(default_factory=list)  # (B, n) of each forward

    @property
    def order(self) -> int:
        return self.table.ndim - 1

    @property
    def spec(self) -> EngineSpec:
        v = self.table.shape[-1]
        return EngineSpec(family="markov", vocab_size=v, hidden_size=v, num_layers=1, max_length=self.max_length)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        return StaticCache(1, batch, 1, 1, capacity, torch.float32, self.device)

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
        if tokens is None or embeds is not None or (mask is not None and cache is None):
            raise InvalidType("MarkovEngine reads tokens: no embeddings, a tree mask only over a cache")
        n = tokens.shape[1]
        self.calls.append((tokens.shape[0], n))
        if cache is None:
            past = torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
        else:
            cache.reserve(n)
            at = cache.positions(n)  # where they are written, whatever `positions` says
            ids = tokens[:, None, :, None].float()
            keys, _ = cache.write(0, ids, ids, at)
            before = at - 1
            if mask is not None:
                slots = torch.arange(keys.shape[2])
                seen = (mask[:, 0] == 0) & (slots != at.unsqueeze(-1))
                before = torch.where(seen, slots, -1).amax(-1)
            past = keys[:, 0, :, 0].gather(1, before.clamp_min(0)).long() * (before >= 0)
            cache.advance(n)
        if self.order == 0:
            hidden = self.table.expand(*tokens.shape, -1)
        elif self.order == 1:
            hidden = self.table[tokens]
        else:
            hidden = self.table[past, tokens]
        return hidden, tuple(hidden for _ in aux_layers)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def markov(vocab: int, order: int = 2, *, seed: int = 0, scale: float = 1.5, **kwargs: object) -> MarkovEngine:
    """A MarkovEngine with random normal logits."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn([vocab] * (order + 1), generator=generator) * scale
    return MarkovEngine(table, **kwargs)


def near(engine: MarkovEngine, *, seed: int = 1, noise: float = 0.8) -> MarkovEngine:
    """A draft for `engine`: its table plus normal noise. Larger noise: lower acceptance."""
    generator = torch.Generator().manual_seed(seed)
    return MarkovEngine(engine.table + torch.randn(engine.table.shape, generator=generator) * noise, engine.max_length)


@dataclass(frozen=True)
class ChiSquare:
    """Pearson's test of counts against a law."""

    statistic: float
    dof: int
    p_value: float
    detectable_tv: float  # any law at least this far away in total variation fails (p < 0.001) with probability 0.9

    def __str__(self) -> str:
        test = f"chi2 {self.statistic:.1f} on {self.dof} dof, p {self.p_value:.4f}"
        return f"{test}; a TV of {self.detectable_tv:.4f} would be detected"


def chi_square(counts: Tensor, probs: Tensor, *, level: float = 0.001, power: float = 0.9) -> ChiSquare:
    """Test counts [K] against probs [K]; cells with an expectation below 5 are merged into one.

    detectable_tv: with d the difference of the laws, sum d^2/p >= (sum |d|)^2 = (2 TV)^2 (Cauchy-Schwarz), so
    N (2 TV)^2 bounds the noncentrality from below, and TV = sqrt(lambda / N) / 2 is detected with `power` at `level`.
    It speaks of the merged cells.
    """
    counts, probs = counts.double(), probs.double()
    total = float(counts.sum())
    if float(counts[probs <= 0].sum()) > 0:  # an impossible string was seen: no chi-square needed
        return ChiSquare(math.inf, 0, 0.0, 1 / total)
    counts, probs = counts[probs > 0], probs[probs > 0]
    order = probs.argsort(descending=True)
    counts, expected = counts[order], probs[order] / probs.sum() * total
    keep = int((expected >= 5).sum())
    if keep < len(expected):
        rest_counts, rest = counts[keep:].sum(), expected[keep:].sum()
        if rest < 5 and keep > 1:  # still too thin: join the smallest of the kept cells
            keep -= 1
            rest_counts, rest = rest_counts + counts[keep], rest + expected[keep]
        counts = torch.cat([counts[:keep], rest_counts[None]])
        expected = torch.cat([expected[:keep], rest[None]])
    dof = len(expected) - 1
    if dof == 0:
        return ChiSquare(0.0, 0, 1.0, 1.0)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return ChiSquare(
        statistic, dof, _chi2_sf(statistic, dof), 0.5 * math.sqrt(_noncentrality(dof, level, power) / total)
    )


def pool(tests: Sequence[ChiSquare], total: int, *, level: float = 0.001, power: float = 0.9) -> ChiSquare:
    """Independent tests of equally many rows each as one, `total` rows together.

    detectable_tv is about the mean total variation over the tests: by Jensen total (2 mean TV)^2 bounds the sum of the
    noncentralities from below.
    """
    statistic, dof = sum(t.statistic for t in tests), sum(t.dof for t in tests)
    if dof == 0 or math.isinf(statistic):
        return ChiSquare(statistic, dof, 0.0 if math.isinf(statistic) else 1.0, 1.0)
    tv = 0.5 * math.sqrt(_noncentrality(dof, level, power) / total)
    return ChiSquare(statistic, dof, _chi2_sf(statistic, dof), tv)


def _chi2_sf(x: float, dof: float) -> float:
    return float(torch.special.gammaincc(torch.tensor(dof / 2, dtype=torch.float64), torch.tensor(x / 2).double()))


def _noncentral_sf(x: float, dof: int, nc: float) -> float:
    """P(chi2_dof(nc) > x): a Poisson(nc / 2) mixture of central laws."""
    j = torch.arange(0, int(nc) + 200, dtype=torch.float64)
    weight = torch.exp(j * math.log(nc / 2) - nc / 2 - torch.lgamma(j + 1))
    return float((weight * torch.special.gammaincc(dof / 2 + j, torch.full_like(j, x / 2))).sum())


def _noncentrality(dof: int, level: float, power: float) -> float:
    """The noncentrality at which the test of `level` rejects with `power`, by bisection."""
    low, high = float(dof), dof + 20 * math.sqrt(dof) + 100
    for _ in range(60):  # the critical value
        mid = (low + high) / 2
        low, high = (mid, high) if _chi2_sf(mid, dof) > level else (low, mid)
    critical = high
    low, high = 1e-6, 20 * math.sqrt(dof) + 200
    for _ in range(60):
        mid = (low + high) / 2
        low, high = (mid, high) if _noncentral_sf(critical, dof, mid) < power else (low, mid)
    return high


@dataclass(frozen=True)
class StringLaw:
    """The law of the first `length` output tokens of a target, by enumeration; strings end early at a stop id."""

    strings: list[tuple[int, ...]]
    probs: Tensor  # float64 [len(strings)]

    def test(self, outputs: Sequence[Sequence[int]], length: int) -> ChiSquare:
        """Chi-square of decoded outputs, each cut to `length` tokens."""
        index = {s: i for i, s in enumerate(self.strings)}
        cells = [index.get(tuple(o[:length]), len(self.strings)) for o in outputs]  # the last cell is impossible
        counts = torch.tensor(cells).bincount(minlength=len(self.strings) + 1)
        return chi_square(counts, torch.cat([self.probs, torch.zeros(1, dtype=torch.float64)]))


def string_law(
    engine: Engine, prompt: Sequence[int], length: int, params: SamplingParams, stop_ids: Sequence[int] = ()
) -> StringLaw:
    """Enumerate every continuation of `prompt` up to `length` tokens by full forward passes without a cache."""
    vocab = engine.spec.vocab_size
    live, weights = [()], torch.ones(1, dtype=torch.float64)
    done: list[tuple[int, ...]] = []
    done_weights: list[float] = []
    for _ in range(length):
        tokens = torch.tensor([[*prompt, *s] for s in live])
        hidden, _ = engine.forward(tokens)
        state = PenaltyState([prompt] * len(live), vocab, "cpu")
        state.add(live)
        p = law(engine.head(hidden[:, -1:]), params, state.counts() if params.has_penalties else None)[:, 0]
        joint = weights.unsqueeze(1) * p.double()
        strings, kept = [], []
        for s, row in zip(live, joint.tolist(), strict=True):
            for v, w in enumerate(row):
                if w == 0.0:
                    continue
                if v in stop_ids:
                    done.append((*s, v))
                    done_weights.append(w)
                else:
                    strings.append((*s, v))
                    kept.append(w)
        live, weights = strings, torch.tensor(kept, dtype=torch.float64)
    return StringLaw([*live, *done], torch.cat([weights, torch.tensor(done_weights, dtype=torch.float64)]))


def requests_for(
    prompts: Sequence[Sequence[int]], rows: int, max_new_tokens: int, stop_ids: Sequence[int] = (), first_row: int = 0
) -> list[TokenRequest]:
    """`rows` requests over the prompts in turn, each with its own row_id."""
    return [
        TokenRequest(list(prompts[i % len(prompts)]), max_new_tokens, first_row + i, tuple(stop_ids))
        for i in range(rows)
    ]
