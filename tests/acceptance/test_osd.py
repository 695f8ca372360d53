"""OSD's small-scale acceptance experiment (specs/osd.md, last section), through the shipped parts.

Decoder, recorder, buffer, stream, router, chunked head and row losses are the product's; only the two networks are
stand-ins with known laws on the engine protocol. Teacher: order-2 tables over V = 32 in two domains of 16 tokens.
Draft: an MLP on two embeddings, weakly pre-trained. 320 requests of domain A, then 320 of B, 32 tokens each, 16 in
flight, g = 5; after each 16 requests 12 AdamW steps at 5e-3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from draftsmith.data.online_buffer import BufferSettings
from draftsmith.data.online_stream import OnlineStream, Requests, ServeSettings
from draftsmith.data.router import DraftRouter
from draftsmith.data.served_log import Served
from draftsmith.inference.recorder import RecorderSettings
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.served_draft import ServedDraft
from draftsmith.modules.losses.chunked_head import chunked_head
from draftsmith.modules.losses.divergence import row_loss
from tests.fakes import MarkovEngine
from tests.figures import record

V, DOMAIN = 32, 16
PER_DOMAIN, TOKENS, IN_FLIGHT, G = 320, 32, 16, 5
STEPS, RATE = 12, 5e-3
ABSENT = -25.0  # logit of the other domain's tokens: a mass of about 1e-10, and a finite reverse KL

pytestmark = pytest.mark.acceptance


def teacher(seed: int) -> MarkovEngine:
    generator = torch.Generator().manual_seed(seed)
    table = 3.0 * torch.randn(V, V, V, generator=generator)
    domain = torch.arange(V) // DOMAIN
    table[:, domain[:, None] != domain[None, :]] = ABSENT
    return MarkovEngine(table)


class MLP(nn.Module):
    """Logits of the next token from the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 24)
        self.body = nn.Sequential(nn.Linear(48, 128), nn.GELU())
        self.head = nn.Linear(128, V)

    def hidden(self, past: Tensor, last: Tensor) -> Tensor:
        return self.body(torch.cat([self.embed(past), self.embed(last)], -1))

    @torch.no_grad()
    def table(self) -> Tensor:
        """Its logits for every context, [V, V, V]."""
        ids = torch.arange(V)
        return self.head(self.hidden(ids[:, None].expand(V, V), ids[None, :].expand(V, V)))


def pretrained(seed: int, target: MarkovEngine) -> MLP:
    """60 steps of forward KL on random contexts of both domains: knows the domains and little else."""
    torch.manual_seed(seed)
    net = MLP()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(60):
        past = torch.randint(V, (64,))
        last = torch.randint(DOMAIN, (64,)) + past // DOMAIN * DOMAIN
        p = target.table[past, last].softmax(-1)
        loss = -(p * net.head(net.hidden(past, last)).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def traffic(seed: int) -> list[TokenRequest]:
    generator = torch.Generator().manual_seed(1000 + seed)
    found = []
    for i in range(2 * PER_DOMAIN):
        b = i // PER_DOMAIN
        prompt = torch.randint(DOMAIN, (2,), generator=generator) + b * DOMAIN
        found.append(TokenRequest(tuple(prompt.tolist()), max_new_tokens=TOKENS, tag="AB"[b]))
    return found


@dataclass(frozen=True)
class Curve:
    """Acceptance at the four moments of the spec's table, and tokens per target call."""

    start: float  # requests 16..31 (after one update)
    end_a: float  # the last 48 requests of A
    switch: float  # the first 16 requests of B
    end_b: float
    tau: float  # of the last 48 requests of A and of B


def alpha(served: Sequence[Served]) -> float:
    return sum(s.alpha * s.examined for s in served) / sum(s.examined for s in served)


@cache
def run(seed: int, positions: str = "", loss: str = "", routed: bool = False) -> Curve:
    """One run; without a loss the draft stays as it is."""
    target = teacher(seed)
    nets = [pretrained(seed, target) for _ in range(2 if routed else 1)]
    optimizers = [torch.optim.AdamW(net.parameters(), lr=RATE) for net in nets]
    served = [
        ServedDraft(lambda net=net: MarkovEngine(net.table()), lambda engine, w: setattr(engine, "table", w["table"]))
        for net in nets
    ]
    stream = OnlineStream(
        Requests(traffic(seed)),
        serve=ServeSettings(
            in_flight=IN_FLIGHT, steps=STEPS, sampling=SamplingParams(temperature=1.0), decoder={"draft_length": G}
        ),
        recorder=RecorderSettings(positions=positions or "wrong", top_k=V),
        buffer=BufferSettings(interval=IN_FLIGHT),
        num_drafts=len(nets),
        router=DraftRouter(["A", "B"]) if routed else None,
        seed=seed,
    )
    stream.bind(target, served)
    for batch in stream:
        if not loss:
            continue
        net, optimizer = nets[batch.draft], optimizers[batch.draft]
        out = chunked_head(
            net.hidden(batch.contexts[batch.row, batch.position - 2], batch.contexts[batch.row, batch.position - 1]),
            net.head.weight,
            batch.law(),
            row_loss=row_loss(loss),
            bias=net.head.bias,
            statistics=False,
        )
        optimizer.zero_grad()
        out.mean.backward()
        optimizer.step()
        if batch.step == batch.steps - 1:
            served[batch.draft].prepare({"table": net.table()})
            served[batch.draft].swap()
    log = list(stream.log)
    assert [s.number for s in log] == list(range(2 * PER_DOMAIN))
    late = log[PER_DOMAIN - 48 : PER_DOMAIN] + log[-48:]
    return Curve(
        start=alpha(log[16:32]),
        end_a=alpha(log[PER_DOMAIN - 48 : PER_DOMAIN]),
        switch=alpha(log[PER_DOMAIN : PER_DOMAIN + 16]),
        end_b=alpha(log[-48:]),
        tau=sum(s.tokens for s in late) / sum(len(s.rounds) for s in late),
    )


SEEDS = (0, 1, 2)


def put(name: str, curves: Sequence[Curve], **need: str) -> None:
    """Record a row of the table: means over the seeds, lowest and highest beside them."""
    figures = {}
    for moment in vars(curves[0]):
        values = [getattr(curve, moment) for curve in curves]
        figures[f"{name}: {moment}"] = {
            "value": sum(values) / len(values),
            "low": min(values),
            "high": max(values),
            "unit": "tokens per target call" if moment == "tau" else "acceptance (mean sum min)",
        } | ({"need": need[moment]} if moment in need else {})
    record("osd", figures, seeds=list(SEEDS[: len(curves)]))


def test_wrong_positions_lift_a_static_draft_by_0_3() -> None:
    static, wrong = [run(s) for s in SEEDS], [run(s, "wrong", "forward_kl") for s in SEEDS]
    put("static", static)
    put("wrong, forward KL", wrong, end_a=">= static + 0.30", end_b=">= 0.70", switch="below static")
    for a, b in zip(static, wrong, strict=True):
        assert b.end_a >= a.end_a + 0.30
        assert b.end_b >= 0.70
        assert b.switch < a.switch  # forgetting: worse than never having learned
        assert 0.25 < a.end_a < 0.45  # the baseline is the spec's kind of weak, and stays where it is
        assert abs(a.end_a - a.start) < 0.08


def test_all_positions_learn_more_than_wrong_ones() -> None:
    wrong, everything = [run(s, "wrong", "forward_kl") for s in SEEDS], [run(s, "all", "forward_kl") for s in SEEDS]
    put("all, forward KL", everything, end_a=">= wrong + 0.05", end_b=">= 0.70", switch="below static")
    for s, a, b in zip(SEEDS, wrong, everything, strict=True):
        assert b.end_a >= a.end_a + 0.05
        assert b.end_b >= 0.70
        assert b.switch < run(s).switch


def test_two_routed_drafts_do_not_forget() -> None:
    static, routed = [run(s) for s in SEEDS], [run(s, "wrong", "forward_kl", True) for s in SEEDS]
    put("wrong, forward KL, two routed drafts", routed, switch=">= 0.9 x static")
    for a, b in zip(static, routed, strict=True):
        assert b.switch >= 0.9 * a.switch
        assert b.end_a >= a.end_a + 0.30 and b.end_b >= 0.70


@pytest.mark.parametrize(
    ("positions", "loss"), [("wrong", "reverse_kl"), ("wrong", "jsd"), ("wrong", "tvd"), ("all", "reverse_kl")]
)
def test_the_other_losses_learn_too(positions: str, loss: str) -> None:
    """The spec gives these rows without a requirement; they must at least clear half of the paper's lift."""
    static, learned = run(0), run(0, positions, loss)
    put(f"{positions}, {loss}", [learned])
    assert learned.end_a >= static.end_a + 0.15
    assert learned.end_b >= static.end_b + 0.15
