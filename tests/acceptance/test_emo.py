"""EMO's acceptance experiments (specs/emo.md, last section) and what issue 4 asks of the chunked losses.

Quality: a Markov language of 12 clusters of 8 synonyms with 15% noise in its labels, an MLP, three seeds. Memory and
time: benchmarks/losses.py. OSD: a draft distilled offline with EMO beside the KL family.
Alone on the machine: `make acceptance SYSTEM=emo` (ARGS="-k quality" for one part).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks import losses as bench
from benchmarks.memory import MIB
from draftsmith.modules.losses.chunked_head import TeacherHead, chunked_head, naive_head
from draftsmith.modules.losses.costs import TokenCosts
from draftsmith.modules.losses.divergence import ROW_LOSSES, RowLoss, ce
from draftsmith.modules.losses.emo import EMO, FixedMix, Mix, mixce, tailr
from tests.figures import record

SEEDS = (0, 1, 2)
CLUSTERS, SYNONYMS = 12, 8
V = CLUSTERS * SYNONYMS
FILES = ("modules/losses/*.py",)

pytestmark = pytest.mark.acceptance


# --- quality


class MLP(nn.Module):
    """The law of the next token from the last one."""

    def __init__(self, embedding: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, embedding)
        self.body = nn.Sequential(nn.Linear(embedding, hidden), nn.GELU())
        self.head = nn.Linear(hidden, V)

    def hidden(self, x: Tensor) -> Tensor:
        return self.body(self.embed(x))

    @torch.no_grad()
    def law(self) -> Tensor:
        return self.head(self.hidden(torch.arange(V))).softmax(-1)


@dataclass(frozen=True)
class Language:
    law: Tensor  # [V, V] without the noise
    costs: TokenCosts
    x: Tensor  # int64 [20000] training pairs
    y: Tensor


@cache
def language(seed: int) -> Language:
    g = torch.Generator().manual_seed(seed)
    successors = torch.stack([torch.randperm(CLUSTERS, generator=g)[:3] for _ in range(CLUSTERS)])
    clusters = torch.zeros(CLUSTERS, CLUSTERS).scatter_(
        1, successors, torch.tensor([0.6, 0.3, 0.1]).repeat(CLUSTERS, 1)
    )
    synonyms = torch.softmax(-0.3 * torch.arange(SYNONYMS), 0)
    law = (clusters[:, :, None] * synonyms).flatten(1).repeat_interleave(SYNONYMS, 0)
    centroids = torch.nn.functional.normalize(torch.randn(CLUSTERS, 16, generator=g), dim=-1)
    embedding = centroids.repeat_interleave(SYNONYMS, 0) + 0.08 * torch.randn(V, 16, generator=g)
    x = torch.randint(V, (20_000,), generator=g)
    y = torch.multinomial(law[x], 1, generator=g).squeeze(-1)
    noise = torch.rand(len(x), generator=g) < 0.15
    return Language(law, TokenCosts.of(embedding), x, torch.where(noise, torch.randint(V, y.shape, generator=g), y))


@dataclass(frozen=True)
class Quality:
    legal_mass: float
    perplexity: float  # under the clean law
    tv: float  # to the clean law
    entropy: float


def measure(q: Tensor, p: Tensor) -> Quality:
    return Quality(
        legal_mass=float((q * (p > 0)).sum(-1).mean()),
        perplexity=float((-(p * q.log()).sum(-1)).mean().exp()),
        tv=float(0.5 * (p - q).abs().sum(-1).mean()),
        entropy=float(torch.special.entr(q).sum(-1).mean()),
    )


@cache
def trained(name: str, seed: int) -> Quality:
    lang = language(seed)
    row_losses: dict[str, RowLoss] = {
        "MLE": ce,
        "mle_anchored": EMO(lang.costs, Mix("mle_anchored")),
        "emo_anchored": EMO(lang.costs, Mix("emo_anchored")),
        "cost alone": EMO(lang.costs, FixedMix(0, 1)),
        "MixCE": mixce(0.5),
        "TaiLr": tailr(1e-5),
    }
    torch.manual_seed(seed)
    net = MLP()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(seed + 100)
    for _ in range(1200):
        batch = torch.randint(len(lang.x), (256,), generator=g)
        out = chunked_head(
            net.hidden(lang.x[batch]), net.head.weight, lang.y[batch], row_loss=row_losses[name], bias=net.head.bias,
            statistics=False,
        )  # fmt: skip
        optimizer.zero_grad()
        out.mean.backward()
        optimizer.step()
    return measure(net.law(), lang.law)


def put(name: str, found: Sequence[object], files: Sequence[str] = FILES, **need: str) -> None:
    """Record means over the seeds, the lowest and the highest beside them."""
    figures = {}
    for key in vars(found[0]):
        values = [getattr(one, key) for one in found]
        figures[f"{name}: {key.replace('_', ' ')}"] = {
            "value": sum(values) / len(values),
            "low": min(values),
            "high": max(values),
        } | ({"need": need[key]} if key in need else {})
    record("emo", figures, seeds=list(SEEDS), files=files)


def mean(found: Sequence[Quality], key: str) -> float:
    return sum(getattr(one, key) for one in found) / len(found)


def test_quality() -> None:
    rows = {name: [trained(name, s) for s in SEEDS] for name in ("MLE", "mle_anchored", "emo_anchored")}
    clean = [measure(language(s).law.clamp_min(1e-30), language(s).law) for s in SEEDS]
    put("quality, the clean law", clean)
    put("quality, MLE", rows["MLE"])
    put("quality, mle_anchored", rows["mle_anchored"], legal_mass=">= MLE + 0.04", perplexity="<= 1.02 x MLE")
    put("quality, emo_anchored", rows["emo_anchored"], legal_mass=">= MLE + 0.07")
    mle, anchored, emo = (rows[name] for name in ("MLE", "mle_anchored", "emo_anchored"))
    assert mean(anchored, "legal_mass") >= mean(mle, "legal_mass") + 0.04
    assert mean(anchored, "perplexity") <= 1.02 * mean(mle, "perplexity")
    assert mean(emo, "legal_mass") >= mean(mle, "legal_mass") + 0.07


def test_quality_of_the_baselines() -> None:
    """The cost alone puts its mass on one cluster; MixCE and TaiLr sharpen without knowing of tokens that are alike."""
    rows = {name: [trained(name, s) for s in SEEDS] for name in ("cost alone", "MixCE", "TaiLr")}
    for name, found in rows.items():
        put(f"quality, {name}", found)
    anchored = [trained("mle_anchored", s) for s in SEEDS]
    assert mean(rows["cost alone"], "entropy") < mean(anchored, "entropy") - 0.5
    assert mean(rows["cost alone"], "perplexity") > 1.5 * mean(anchored, "perplexity")


# --- memory and time


def put_memory(row: str, found: dict[str, float], where: str, **need: str) -> None:
    figures = {
        f"{where}, {row}: extra peak": {"value": found["extra"] / MIB, "unit": "MiB"} | need,
        f"{where}, {row}: forward and backward": {"value": found["seconds"], "unit": "s, one thread"},
    }
    record("emo", figures, seeds=[0], files=(*FILES, "benchmarks/losses.py"))


def test_memory_of_the_spec() -> None:
    """T = 1024, d = m = 256, V = 50257, fp32, one thread, chunks of 64, fresh processes."""
    naive = bench.memory("naive-emo", 50257, 1024, 256)
    chunked = bench.memory("emo", 50257, 1024, 256, chunk_rows=64)
    where = "T 1024, V 50257, d 256"
    put_memory("everything at once", naive, where)
    put_memory("chunks of 64", chunked, where, need="<= 25% of everything at once")
    record("emo", {f"{where}: memory of chunks of 64 / everything at once": {
        "value": chunked["extra"] / naive["extra"], "need": "<= 0.25"}}, seeds=[0], files=FILES)  # fmt: skip
    assert chunked["extra"] <= 0.25 * naive["extra"]
    assert chunked["seconds"] <= naive["seconds"]
    assert chunked["loss"] == pytest.approx(naive["loss"], rel=1e-5)


def test_gradients_at_size() -> None:
    """Relative error of the fp32 gradients against the equations in float64: T = 128, V = 50257, d = 256."""
    errors = {}
    for name, mix in (("mle_anchored", Mix()), ("emo_anchored", Mix("emo_anchored")),
                      ("emo_anchored, shift", Mix("emo_anchored", "shift"))):  # fmt: skip
        x = bench.make("emo", 50257, 128, 256)
        assert x.costs is not None
        wide = TokenCosts(x.costs.unit.double())
        h, w = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
        exact = torch.autograd.grad(naive_head(h, w, x.labels, row_loss=EMO(wide, mix)).mean, (h, w))
        for how, head in (("chunked", chunked_head), ("everything at once", naive_head)):
            loss = head(x.hidden, x.weight, x.labels, row_loss=EMO(x.costs, mix)).mean
            got = torch.autograd.grad(loss, (x.hidden, x.weight))
            errors[f"{name}, {how}"] = max(float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True))
    figures = {f"gradient error, {name}": {"value": e} | ({"need": "<= 1e-5"} if "chunked" in name else {})
               for name, e in errors.items()}  # fmt: skip
    record("emo", figures, seeds=[0], files=FILES)
    assert max(e for name, e in errors.items() if "chunked" in name) <= 1e-5


@pytest.mark.parametrize("row", ["emo-128", "emo", "emo-again"])
def test_a_large_vocabulary_fits(row: str) -> None:
    """T = 4096, V = 151936, d = 1024: the equations would need about 20 GB."""
    found = bench.memory(row, 151936, 4096, 1024)
    figure = {"value": found["extra"] / MIB, "unit": "MiB", "need": "<= 1536"}
    record("emo", {f"T 4096, V 151936, d 1024, {row}: extra peak": figure}, seeds=[0], files=FILES)
    assert found["extra"] <= 1536 * MIB


@pytest.mark.parametrize("vocab", [2048, 8192, 32768, 50257, 131072, 262144])
def test_time_over_the_vocabulary(vocab: int) -> None:
    rows = ("naive-ce", "naive-emo", *bench.TORCH, "ce", "kl", "emo", "emo-128")
    if vocab > 65536:  # its own rule was never the fastest, and takes several times as long
        rows = tuple(row for row in rows if row != "torch-auto")
    check_times(bench.compare(vocab, 512, 256, rows, repetitions=7 if vocab < 65536 else 5))


@pytest.mark.parametrize("tokens", [256, 4096])
def test_time_over_the_tokens(tokens: int) -> None:
    rows = ("naive-emo", *bench.TORCH, "ce", "kl", "emo", "emo-128")
    if tokens > 2048:
        rows = tuple(row for row in rows if row not in ("naive-emo", "torch-auto"))  # 7 GB; and too slow
    check_times(bench.compare(50257, tokens, 256, rows, repetitions=7 if tokens < 2048 else 3))


def check_times(found: dict[str, object]) -> None:
    """Record a line of the curve, and hold it against what the issue asks."""
    result: dict = found  # type: ignore[type-arg]  # JSON
    where = f"T {result['tokens']}, V {result['vocab']}, d {result['width']}"
    threads = f"s, {torch.get_num_threads()} threads"
    figures: dict[str, object] = {f"time, {where}: {row}": {"value": s, "unit": threads}
                                  for row, s in result["seconds"].items()}  # fmt: skip
    needs = {"ce": "<= 1", "kl": "<= 1", "emo": "<= 1.6"}
    for row, value in result["over_torch"].items():
        if row in needs:
            figures[f"time, {where}: {row} / best of torch"] = {**value, "need": needs[row]}
    over_naive = result.get("over_naive", {})
    if "emo" in over_naive:  # what is asked is for vocabularies of today; small ones fit into the cache either way
        need = {"need": "<= 0.7"} if result["vocab"] >= 32768 else {}
        figures[f"time, {where}: emo / everything at once"] = {**over_naive["emo"], **need}
    record("emo", figures, seeds=[0], files=(*FILES, "benchmarks/losses.py"))
    over = result["over_torch"]
    assert over["emo"]["value"] <= 1.6
    assert over["ce"]["value"] <= 1.05 and over["kl"]["value"] <= 1.05
    if "emo" in over_naive and result["vocab"] >= 32768:
        assert over_naive["emo"]["value"] <= 0.7


# --- EMO as a drafter's objective


@dataclass(frozen=True)
class Draft:
    alpha: float  # acceptance: mean of sum min(p, q)
    agree: float  # the likeliest token is the teacher's
    kl: float


@cache
def distilled(loss: str, seed: int) -> Draft:
    """A narrow draft learns the law of a wider teacher that was trained on the noisy language, for 400 steps."""
    lang = language(seed)
    torch.manual_seed(seed)
    target = MLP(64, 128)
    learn(target, lang, lambda h, w, b, x, y: chunked_head(h, w, y, row_loss=ce, bias=b, statistics=False), 1200, seed)
    target.requires_grad_(False)
    row_loss = EMO(TokenCosts.of(target.head.weight)) if loss == "emo" else ROW_LOSSES[loss]
    torch.manual_seed(seed + 1)
    draft = MLP(6, 8)

    def against(h: Tensor, w: Tensor, b: Tensor, x: Tensor, y: Tensor) -> object:
        live = TeacherHead(target.hidden(x), target.head.weight, 1.0, target.head.bias)
        return chunked_head(h, w, live, row_loss=row_loss, bias=b, statistics=False)

    learn(draft, lang, against, 400, seed)
    p, q = target.law(), draft.law()
    return Draft(
        alpha=float(torch.minimum(p, q).sum(-1).mean()),
        agree=float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        kl=float((p * (p / q).log()).sum(-1).mean()),
    )


def learn(net: MLP, lang: Language, loss: object, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(seed + 7)
    for _ in range(steps):
        batch = torch.randint(len(lang.x), (256,), generator=g)
        x, y = lang.x[batch], lang.y[batch]
        out = loss(net.hidden(x), net.head.weight, net.head.bias, x, y)  # type: ignore[operator]  # one of two above
        optimizer.zero_grad()
        out.mean.backward()
        optimizer.step()


def test_a_draft_distilled_with_emo_beside_the_kl_family() -> None:
    rows = {name: [distilled(name, s) for s in SEEDS] for name in ("forward_kl", "reverse_kl", "jsd", "tvd", "emo")}
    for name, found in rows.items():
        put(f"draft distilled by {name}", found)
    start = sum(d.alpha for d in rows["forward_kl"]) / len(SEEDS)
    assert sum(d.alpha for d in rows["emo"]) / len(SEEDS) >= start - 0.05  # an objective that a draft can learn by
