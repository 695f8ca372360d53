"""Decoders side by side in one process: interleaved repetitions, medians with intervals, a forecast made beforehand.

`run` takes loaded parts and prompts and returns the report that `draftsmith bench` writes as JSON; docs/benchmarks.md
states the method. Shape letters: B batch, R repetitions.
"""

import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference import bench_report, registry
from draftsmith.inference.costs import CostCurve, calibrate, measure
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.forecast import forecast
from draftsmith.inference.metrics import Estimate, median_estimate, ratio_estimate, summarize, summarize_by_tag
from draftsmith.inference.peers import PEERS, TransformersPeers, quiet
from draftsmith.inference.requests import Decoder, RoundStats, TokenRequest
from draftsmith.inference.sampling import SamplingParams

ENOUGH = 7  # repetitions below which no figure should be published
EVERY = 4  # every fourth prompt makes the forecast,
MOST_HELD_OUT = 16  # but not more than this
CALIBRATION_TOKENS = 48  # per request, to time whole rounds for the cost curve,
CALIBRATION_LENGTHS = (1, 8)  # of these draft lengths,
CALIBRATION_TURNS = 3  # so often
OURS = ("plain", "speculative", "speculative_best", "speculative_auto", "prompt_lookup")  # the rows of every bench
CONSTANT = {"schedule": "constant", "fallback": "never"}


# (requests, seed) -> (new tokens, rounds); the rounds of a peer are not known
Decode = Callable[[Sequence[TokenRequest], int], tuple[list[list[int]], RoundStats | None]]
Progress = Callable[[float, str], None]  # (share done in 0..1, what is going on)


@dataclass(frozen=True)
class BenchSettings:
    """What is run, and how often."""

    max_new_tokens: int = 128
    batches: tuple[int, ...] = (1,)
    temperature: float = 0.0
    g: int = 5  # fixed draft length, also of the peer that has a constant one
    lookup_tokens: int = 10  # tokens that prompt lookup proposes, ours and transformers'
    repetitions: int = ENOUGH
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "g", "lookup_tokens", "repetitions"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) != len(self.batches):
            raise InvalidValue(f"batch sizes are different numbers from 1 on (1,8,16), got {list(self.batches)}")
        if self.temperature < 0:
            raise InvalidValue(f"temperature must be 0 (greedy) or above, got {self.temperature}")


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids."""

    ids: tuple[int, ...]
    tag: str = ""


@dataclass(frozen=True)
class Extra:
    """A further row of the table: any decoder of the registry with settings of its own."""

    name: str  # of the row; unlike the others'
    decoder: str
    settings: Mapping[str, Any]
    draft: Any = None  # an engine, a drafter or a table, where the decoder takes one
    vocab_size: int | None = None  # ids that target and this draft share


@dataclass(frozen=True)
class Parts:
    """What is benched, loaded and checked."""

    target: Engine
    draft: Engine | None = None
    vocab_size: int | None = None  # ids that target and draft share
    stop_ids: tuple[int, ...] = ()
    training_seconds: float | None = None  # that the draft took, where its manifest says so
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    name: str
    label: str
    peer: bool
    decode: Decode


def split_prompts(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(held out for the forecast, measured): every fourth prompt, so that a file sorted by domain is split evenly.

    Raises InvalidValue for fewer than two prompts.
    """
    if len(prompts) < 2:
        raise InvalidValue("one prompt is not enough: the forecast uses other prompts than the measurement, give two")
    step = max(EVERY, -(-len(prompts) // MOST_HELD_OUT))
    return list(prompts[::step]), [prompt for i, prompt in enumerate(prompts) if i % step]


def run(
    parts: Parts,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    *,
    peers: TransformersPeers | None = None,
    on_forecast: Callable[[dict[str, Any]], None] | None = None,  # gets the frozen forecast before anything is timed
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Forecast, then measure. Returns {"forecast", "batches", "summary", "warnings"}, JSON-ready.

    Raises InvalidValue for too few prompts, and whatever the decoders refuse.
    """
    tell: Progress = progress or (lambda share, what: None)
    held_out, measured = split_prompts(prompts)
    predicted = make_forecast(parts, held_out, measured, settings, tell)
    if parts.extras:
        plain = Contestant("plain", "draftsmith plain", False, _ours("autoregressive", {}, parts, settings))
        predicted["rows"] = {}
        for batch in settings.batches:
            tell(0.0, f"forecast: further rows at batch {batch}")
            few = dataclasses.replace(settings, repetitions=min(ENOUGH, max(1, len(held_out) // batch)))
            found = pilot(parts, held_out, few, batch, [plain, *further(parts, settings)])
            predicted["rows"][str(batch)] = {name: row for name, row in found.items() if name != "plain"}
    if on_forecast is not None:
        on_forecast(predicted)
    blocks = []
    for i, batch in enumerate(settings.batches):

        def share(done: float, what: str, first: int = i) -> None:
            tell((first + done) / len(settings.batches), what)

        table = contestants(parts, settings, batch, predicted["batches"].get(str(batch)), peers)
        blocks.append(measure_batch(parts, measured, settings, batch, table, share))
        if peers is not None:
            blocks[-1]["rows"] += [
                {"name": name, "label": peers.label(name), "peer": True, "offered": False, "why": why}
                for name in PEERS
                if (why := peers.why_not(name, batch)) is not None
            ]
    return {
        "forecast": predicted,
        "batches": blocks,
        "summary": bench_report.summary(predicted, blocks, settings.seed),
        "warnings": bench_report.warnings(blocks, settings.repetitions, ENOUGH),
    }


def make_forecast(
    parts: Parts, held_out: Sequence[Prompt], measured: Sequence[Prompt], settings: BenchSettings, tell: Progress
) -> dict[str, Any]:
    """Acceptance on the held-out prompts, cost curves of this machine, and what follows from them; JSON-ready."""
    made: dict[str, Any] = {
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "prompts": f"{len(held_out)} held-out prompts make the forecast, {len(measured)} other prompts are measured",
        "model": "i.i.d. acceptance (see docs/benchmarks.md), decoding phase only",
        "acceptance": None,
        "batches": {},
    }
    if parts.draft is None:
        return made
    tell(0.0, "forecast: acceptance on held-out prompts")
    rounds = _speculative(parts, settings, settings.g)(_requests(held_out, settings, parts.stop_ids, 0), 0)[1]
    assert rounds is not None
    seen = summarize(rounds, seed=settings.seed)
    if seen.alpha is None:
        raise InvalidValue("nothing was drafted on the held-out prompts: raise --max-new-tokens above 1")
    made["acceptance"] = seen.to_json()
    curves = []
    for batch in settings.batches:
        tell(0.0, f"forecast: cost curve at batch {batch}")
        curve = _cost_curve(parts, held_out, settings, batch)
        curves.append(curve)
        made["batches"][str(batch)] = {**forecast(seen.alpha, curve).to_json(), "costs": curve.to_json()}
    made |= bench_report.break_even(seen.alpha.value, curves, parts.training_seconds)
    return made


def contestants(
    parts: Parts,
    settings: BenchSettings,
    batch: int,
    predicted: dict[str, Any] | None,  # the forecast at this batch
    peers: TransformersPeers | None,
) -> list[Contestant]:
    """The rows at one batch size, in the order of the table."""
    lookup = {"draft_length": settings.lookup_tokens, **CONSTANT}
    table = [Contestant("plain", "draftsmith plain", False, _ours("autoregressive", {}, parts, settings))]
    if parts.draft is not None and predicted is not None:
        best = predicted["g"]
        table.append(
            Contestant(
                "speculative",
                f"draftsmith speculative, g = {settings.g}",
                False,
                _speculative(parts, settings, settings.g),
            )
        )
        if best != settings.g:
            label = f"draftsmith speculative, g = {best} (forecast best)"
            table.append(Contestant("speculative_best", label, False, _speculative(parts, settings, best)))
        auto = {"draft_length": best, "schedule": "cost"}
        costs = CostCurve.from_json(predicted["costs"])
        decode = _ours("speculative", auto, parts, settings, costs)
        table.append(Contestant("speculative_auto", "draftsmith speculative, automatic", False, decode))
    label = f"draftsmith prompt lookup, {settings.lookup_tokens} tokens"
    table.append(Contestant("prompt_lookup", label, False, _ours("prompt_lookup", lookup, parts, settings)))
    table += further(parts, settings)
    if peers is not None:
        for name in PEERS:
            if peers.why_not(name, batch) is None:
                table.append(Contestant(name, peers.label(name), True, peer(peers, name)))
    return table


def further(parts: Parts, settings: BenchSettings) -> list[Contestant]:
    """The rows of `parts.extras`. Raises InvalidValue for one that is named as another row is."""
    rows: list[Contestant] = []
    for extra in parts.extras:
        if extra.name in {*OURS, *PEERS, *(row.name for row in rows)}:
            raise InvalidValue(f"the row {extra.name!r} is there already: leave it out, or give it another setting")
        roles = {"target": parts.target} | ({} if extra.draft is None else {"draft": extra.draft})
        decoder = registry.build(
            extra.decoder,
            roles,
            sampling=SamplingParams(temperature=settings.temperature),
            settings=extra.settings,
            seed=settings.seed,
            vocab_size=extra.vocab_size or parts.vocab_size,
        )

        def decode(
            requests: Sequence[TokenRequest], seed: int, made: Decoder = decoder
        ) -> tuple[list[list[int]], RoundStats | None]:
            result = made.decode(requests)
            return result.output, result.rounds

        rows.append(Contestant(extra.name, f"draftsmith {extra.name}", False, decode))
    return rows


def measure_batch(
    parts: Parts,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    batch: int,
    table: Sequence[Contestant],
    tell: Progress,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Time every row on every prompt, `repetitions` times, interleaved and in rotated order; JSON-ready.

    fresh: every repetition takes its own share of the prompts instead, so that as much time measures many more of them
    and the intervals hold what prompts differ by; figures are then of all repetitions together, not medians.
    Raises InvalidValue for fewer prompts than repetitions then.
    """
    repetitions = settings.repetitions
    shares = [_chunks(share, batch) for share in (_shares(prompts, repetitions) if fresh else [prompts])]
    seconds = {row.name: [0.0] * repetitions for row in table}
    tokens = {row.name: [0] * repetitions for row in table}
    outputs: dict[str, list[list[int]]] = {row.name: [] for row in table}  # of each share's first repetition
    rounds = {row.name: RoundStats() for row in table}  # the same
    with quiet():
        for row in table:
            tell(0.0, f"batch {batch}: warm-up of {row.label}")
            row.decode(_requests(shares[0][0], settings, parts.stop_ids, 0, most=8), settings.seed)
        for r in range(repetitions):
            chunks = shares[r % len(shares)]
            for j, chunk in enumerate(chunks):
                first_row = (r * len(chunks) + j) * batch
                requests = _requests(chunk, settings, parts.stop_ids, first_row)
                turn = (r + j) % len(table)
                for row in (*table[turn:], *table[:turn]):
                    _wait(parts.target)
                    start = time.perf_counter()
                    output, stats = row.decode(requests, settings.seed + first_row)
                    _wait(parts.target)
                    seconds[row.name][r] += time.perf_counter() - start
                    tokens[row.name][r] += sum(len(new) for new in output)
                    if r < len(shares):
                        if stats is not None:
                            rounds[row.name].extend(stats, row_offset=len(outputs[row.name]))
                        outputs[row.name] += output
                tell((r + (j + 1) / len(chunks)) / repetitions, f"batch {batch}: repetition {r + 1} of {repetitions}")
    rows = []
    flat = [prompt for chunks in shares for chunk in chunks for prompt in chunk]
    plain = _rates(tokens["plain"], seconds["plain"])
    for row in table:
        speed = _rates(tokens[row.name], seconds[row.name])
        if fresh:  # repetitions differ by their prompts: all of them together, not the middle one
            spent = torch.tensor(seconds[row.name], dtype=torch.float64)
            rate = ratio_estimate(speed * spent, spent, seed=settings.seed)
            gain = ratio_estimate(speed * spent / plain, spent, seed=settings.seed)  # seconds that plain would take
            assert rate is not None and gain is not None  # time passed
        else:
            rate = median_estimate(speed, seed=settings.seed)
            gain = median_estimate(speed / plain, seed=settings.seed)
        entry: dict[str, Any] = {
            "name": row.name,
            "label": row.label,
            "peer": row.peer,
            "offered": True,
            "seconds": seconds[row.name],
            "tokens": tokens[row.name],
            "tokens_per_second": _json(rate),
            "speedup_vs_plain": _json(gain),
            "acceptance": None,
            "mean_draft_length": None,
        }
        if not row.peer:
            seen = summarize(rounds[row.name], seed=settings.seed)
            drafting = sum(n > 0 for n in rounds[row.name].drafted)
            entry["acceptance"] = seen.to_json()
            by_tag = summarize_by_tag(rounds[row.name], [prompt.tag for prompt in flat], seed=settings.seed)
            entry["acceptance_by_tag"] = {tag: part.to_json() for tag, part in by_tag.items()}
            entry["mean_draft_length"] = seen.counts.drafted / drafting if drafting else None
            entry["plain_round_share"] = 1.0 - drafting / max(seen.counts.rounds, 1)
        if settings.temperature == 0:
            entry["same_as_plain"] = compare(parts.target, flat, outputs["plain"], outputs[row.name])
        rows.append(entry)
    return {"batch": batch, "requests": len(flat), "distinct_prompts": len(prompts), "rows": rows}


def pilot(
    parts: Parts, held_out: Sequence[Prompt], settings: BenchSettings, batch: int, table: Sequence[Contestant]
) -> dict[str, dict[str, float]]:
    """The forecast of any decoder: tokens per target call and speed-up over plain, row by row, on other prompts.

    Each of the `repetitions` takes its own prompts, at least `batch` of them: decoders that copy from their own text
    gain much on a few prompts and nothing on most, so the number of prompts is what makes such a forecast good, and
    in a batch the slowest row sets the pace. The statistic is that of a measurement on fresh prompts.
    table: our rows, `plain` among them.
    """
    block = measure_batch(parts, held_out, settings, batch, table, lambda share, what: None, fresh=True)
    return {
        row["name"]: {"tau": row["acceptance"]["tau"]["value"], "speedup": row["speedup_vs_plain"]["value"]}
        for row in block["rows"]
    }


def compare(
    engine: Engine, prompts: Sequence[Prompt], reference: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Greedy outputs token by token: how many rows agree, and where each other one first differs.

    top2_gap: the two largest logits at that position, of the target on the common prefix, apart by so much; a
    difference at a gap far above the rounding of the dtype is a bug, not a near-tie.
    """
    differences = []
    for i, (prompt, want, got) in enumerate(zip(prompts, reference, outputs, strict=True)):
        if list(want) == list(got):
            continue
        at = next((t for t, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
        ids = torch.tensor([[*prompt.ids, *want[:at]]], device=engine.device)
        with torch.inference_mode():
            top = engine.head(engine.forward(ids)[0][:, -1]).float().topk(2).values[0]
        differences.append({"request": i, "position": at, "top2_gap": float(top[0] - top[1])})
    return {"equal": len(outputs) - len(differences), "of": len(outputs), "first_differences": differences}


def _ours(
    name: str, chosen: dict[str, Any], parts: Parts, settings: BenchSettings, costs: CostCurve | None = None
) -> Decode:
    roles = {"target": parts.target}
    if name == "speculative":
        assert parts.draft is not None
        roles["draft"] = parts.draft
    decoder = registry.build(
        name,
        roles,
        sampling=SamplingParams(temperature=settings.temperature),
        settings=chosen,
        seed=settings.seed,
        costs=costs,
        vocab_size=parts.vocab_size,
    )

    def decode(requests: Sequence[TokenRequest], seed: int) -> tuple[list[list[int]], RoundStats | None]:
        result = decoder.decode(requests)  # its randomness is keyed by the requests' row ids
        return result.output, result.rounds

    return decode


def _speculative(parts: Parts, settings: BenchSettings, g: int) -> Decode:
    return _ours("speculative", {"draft_length": g, **CONSTANT}, parts, settings)


def peer(peers: TransformersPeers, name: str) -> Decode:
    def decode(requests: Sequence[TokenRequest], seed: int) -> tuple[list[list[int]], RoundStats | None]:
        prompts = [request.prompt for request in requests]
        return peers.decode(name, prompts, requests[0].max_new_tokens, seed), None

    return decode


def _cost_curve(parts: Parts, prompts: Sequence[Prompt], settings: BenchSettings, batch: int) -> CostCurve:
    """Costs of calls alone, then of whole rounds of the decoders that will be forecast."""
    lengths = sorted(len(prompt.ids) for prompt in prompts)
    context = lengths[len(lengths) // 2] + settings.max_new_tokens // 2
    assert parts.draft is not None
    sampling = SamplingParams(temperature=settings.temperature)
    bare = measure(parts.target, ModelDrafter(parts.draft), batch=batch, context=context, sampling=sampling)
    requests = _requests(_chunks(prompts, batch)[0], settings, (), 0, most=CALIBRATION_TOKENS)
    decode = {g: _speculative(parts, settings, g) for g in CALIBRATION_LENGTHS}
    decode[0] = _ours("autoregressive", {}, parts, settings)
    rounds = {g: RoundStats() for g in decode}
    for g in decode:  # warm-up
        decode[g](requests, settings.seed)
    for turn in range(CALIBRATION_TURNS):
        for g in decode:
            stats = decode[g](requests, settings.seed)[1]
            assert stats is not None
            rounds[g].extend(stats, row_offset=turn * batch)
    return calibrate(bare, rounds)


def _requests(
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    stop_ids: tuple[int, ...],
    first_row: int,
    most: int | None = None,
) -> list[TokenRequest]:
    new = settings.max_new_tokens if most is None else min(most, settings.max_new_tokens)
    return [
        TokenRequest(prompt.ids, max_new_tokens=new, row_id=first_row + i, stop_ids=stop_ids, tag=prompt.tag)
        for i, prompt in enumerate(prompts)
    ]


def _chunks(prompts: Sequence[Prompt], batch: int) -> list[list[Prompt]]:
    """Full batches of B prompts; the last one is filled up from the start, so that every call has the same batch."""
    count = -(-len(prompts) // batch)
    cycled = [prompts[i % len(prompts)] for i in range(count * batch)]
    return [cycled[i : i + batch] for i in range(0, count * batch, batch)]


def _shares(prompts: Sequence[Prompt], count: int) -> list[list[Prompt]]:
    """The prompts dealt out to `count` repetitions, as many to each; what is left over is not used."""
    if len(prompts) < count:
        raise InvalidValue(f"{count} repetitions on prompts of their own need as many prompts, got {len(prompts)}")
    return [list(prompts[r::count])[: len(prompts) // count] for r in range(count)]


def _rates(tokens: Sequence[int], seconds: Sequence[float]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)


def _json(estimate: Estimate) -> dict[str, float | None]:
    return dict(vars(estimate))


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
