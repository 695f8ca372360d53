"""The fixed contexts of a diagnosis: prompts, the target's own answers, its laws and its hidden states, computed once.

The target answers now (`draw`), or did before (`recorded`: then behind several renderings of the prompts).

Shape letters: n samples, c of them, T time, N anchors, K steps, D width of the target, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference import registry
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.hypotheses.served_law import ALL, LawFilter, filtered
from draftsmith.inference.loader import LoadedPart
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.rng import Stream, uniform
from draftsmith.inference.sampling import SamplingParams

LEAST_SAMPLES = 8
CHUNK = 8  # samples that are run through a network at once
STATES_LIMIT = 2 << 30  # bytes of hidden states that are kept; above, they are computed anew for each set of layers
LONGEST = 512  # tokens of a sample


@dataclass
class Contexts:
    """Samples, sorted by their tokens, so that the order in which they were drawn changes nothing."""

    engine: Engine
    tokens: Tensor  # int64 [n, T]; padding 0 at the end
    rows: Tensor  # int64 [n, N]: row j predicts token j + 2; its step k predicts token j + 2 + k
    steps: int  # K
    vocab_size: int
    keep: bool  # all states are held
    law_filter: LawFilter = ALL  # that the target is served with
    renderings: Mapping[str, "Contexts"] = field(default_factory=dict)  # the same answers behind other prompts
    _states: dict[tuple[int, bool], Tensor] = field(default_factory=dict)
    _final: Tensor | None = None  # [n, T, D] after the final norm

    def rendered(self, name: str) -> "Contexts":
        """These contexts, or the ones of another rendering."""
        return self.renderings.get(name, self)

    @property
    def count(self) -> int:
        return self.tokens.shape[0]

    def first(self, count: int) -> "Contexts":
        """The first `count` samples, for screening."""
        others = {name: other.first(count) for name, other in self.renderings.items()}
        part = dataclasses.replace(self, tokens=self.tokens[:count], rows=self.rows[:count], renderings=others)
        part._states = {name: x[:count] for name, x in self._states.items()}
        part._final = None if self._final is None else self._final[:count]
        return part

    def state(self, layer: int, chunk: slice, *, normed: bool = True) -> Tensor:
        """The target's state after `layer` (0: embeddings) [c, T, D] in float32. normed: the last after its norm."""
        place = (layer, normed or layer != self.engine.spec.num_layers)
        if place in self._states:
            return self._states[place][chunk]
        found = self._run(chunk, (layer,))[place]
        if self.keep and chunk == slice(0, self.count):
            self._states[place] = found
        return found

    def law(self, chunk: slice) -> Tensor:
        """The target's law [c, N, K, V] of every token that a step of an anchor predicts."""
        if self._final is None:
            parts = [self._run(part, ())[(-1, True)] for part in chunks(self.count)]
            self._final = torch.cat(parts)
        places = (self.rows[chunk] + 1).unsqueeze(-1) + torch.arange(self.steps)
        final = self._final[chunk]
        index = places.flatten(1).unsqueeze(-1).expand(-1, -1, final.shape[-1])
        logits = self.engine.head(final.gather(1, index).to(self.engine.dtype))
        served = filtered(logits[..., : self.vocab_size].float(), self.law_filter)
        return served.softmax(-1).view(*places.shape, -1)

    def fill(self) -> None:
        """Compute all states at once, where they fit into memory."""
        if not self.keep:
            return
        depth = self.engine.spec.num_layers
        parts = [self._run(part, tuple(range(depth + 1))) for part in chunks(self.count)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self._final = whole.pop((-1, True))
        self._states = whole

    def _run(self, chunk: slice, layers: Sequence[int]) -> dict[tuple[int, bool], Tensor]:
        """One pass of the target: (layer, after the final norm) -> [c, T, D]; (-1, True) is its last state."""
        raw: list[Tensor] = []
        remove = _watch_last(self.engine, raw)
        try:
            with torch.inference_mode():
                hidden, aux = self.engine.forward(self.tokens[chunk].to(self.engine.device), aux_layers=layers)
        finally:
            remove()
        found = {(i, True): x.float().cpu() for i, x in zip(layers, aux, strict=True)}
        found[(-1, True)] = hidden.float().cpu()
        if raw:
            found[(self.engine.spec.num_layers, False)] = raw[0].float().cpu().view_as(hidden)
        return found


def chunks(count: int) -> list[slice]:
    """Consecutive parts of `count` samples, CHUNK each."""
    return [slice(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]


def sees_raw_state(engine: Engine) -> bool:
    """Whether the state before the target's final norm can be read of this engine."""
    return getattr(getattr(getattr(engine, "net", None), "model", None), "norm", None) is not None


def _watch_last(engine: Engine, into: list[Tensor]) -> Callable[[], None]:
    """Note what enters the target's final norm, where the engine has one to watch."""
    if not sees_raw_state(engine):
        return lambda: None
    norm: Any = engine.net.model.norm  # type: ignore[attr-defined]  # checked above
    handle = norm.register_forward_pre_hook(lambda _, inputs: into.append(inputs[0].detach().clone()))
    removed: Callable[[], None] = handle.remove
    return removed


def draw(
    target: LoadedPart,
    prompts: Sequence[Sequence[int]],
    samples: int,
    *,
    seed: int = 0,
    first: int = 0,
    length: int = 64,
    anchors: int = 8,
    steps: int = 5,
    law_filter: LawFilter = ALL,
) -> Contexts:
    """Let the target answer `samples` prompts (used in turn) at temperature 1 and choose anchors in the answers.

    Args: first: row ids of the draws; other ids give fresh answers. length: tokens of an answer. steps: K. law_filter:
    the filter that it is served with.
    Raises InvalidValue for fewer than 8 samples, or answers too short for an anchor.
    """
    if samples < LEAST_SAMPLES:
        raise InvalidValue(f"{samples} samples are too few to tell anything: give at least {LEAST_SAMPLES}")
    room = min(LONGEST, target.part.spec.max_length)
    if length < steps + 2 or length + 2 > room:
        raise InvalidValue(f"answers of {length} tokens: between {steps + 2} and {room - 2} are needed")
    asked = [list(prompts[i % len(prompts)])[-(room - length) :] for i in range(samples)]
    texts = _answers(target, asked, length, seed, first, law_filter)
    usable = [(start, text) for start, text in texts if len(text) - max(start, 2) >= steps]
    usable.sort(key=lambda one: (one[1], one[0]))
    if len(usable) < LEAST_SAMPLES:
        raise InvalidValue(
            f"only {len(usable)} of {samples} answers have the {steps + 2} tokens that an anchor needs, at least "
            f"{LEAST_SAMPLES} must: give prompts with longer answers"
        )
    longest = max(len(text) for _, text in usable)
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for _, text in usable])
    rows = torch.stack([_anchors(seed, i, start, len(text), anchors, steps) for i, (start, text) in enumerate(usable)])
    spec = target.part.spec
    size = tokens.numel() * spec.hidden_size * (spec.num_layers + 2) * 4
    made = Contexts(target.part, tokens, rows, steps, spec.vocab_size, size <= STATES_LIMIT, law_filter)
    made.fill()
    return made


def recorded(
    target: LoadedPart,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    answers: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    anchors: int = 8,
    steps: int = 5,
    length: int = LONGEST,
    law_filter: LawFilter = ALL,
) -> Contexts:
    """Contexts of answers that the target gave before, behind every rendering of their prompts.

    Args: prompts: rendering -> prompt of each answer; the first one is that which is deployed. length: tokens of an
    answer that are used. Anchors stand at the same places of the answers in all renderings.
    Raises InvalidValue for fewer than 8 answers that are long enough.
    """
    room = min(LONGEST, target.part.spec.max_length)
    longest = max(len(ids) for every in prompts.values() for ids in every)
    cut = [list(answer[: min(length, max(0, room - longest))]) for answer in answers]
    given, *_ = prompts.values()
    shortest = [min(len(every[i]) for every in prompts.values()) for i in range(len(cut))]
    usable = [i for i, answer in enumerate(cut) if len(answer) - max(0, 2 - shortest[i]) >= steps + 2]
    usable.sort(key=lambda i: ([*given[i], *cut[i]], len(given[i])))
    if len(usable) < LEAST_SAMPLES:
        raise InvalidValue(
            f"only {len(usable)} of {len(cut)} recorded answers have the {steps + 2} tokens of an anchor within "
            f"{room} positions; at least {LEAST_SAMPLES} must: give more answers, or longer ones"
        )
    places = [
        _anchors(seed, n, 2 + max(0, 2 - shortest[i]), 2 + len(cut[i]), anchors, steps) for n, i in enumerate(usable)
    ]  # as behind a prompt of two tokens
    made: dict[str, Contexts] = {}
    for name, every in prompts.items():
        texts = [[*every[i], *cut[i]] for i in usable]
        widest = max(map(len, texts))
        tokens = torch.tensor([[*text, *[0] * (widest - len(text))] for text in texts])
        rows = torch.stack([place + len(every[i]) - 2 for place, i in zip(places, usable, strict=True)])
        spec = target.part.spec
        size = tokens.numel() * spec.hidden_size * (spec.num_layers + 2) * 4 * len(prompts)
        made[name] = Contexts(target.part, tokens, rows, steps, spec.vocab_size, size <= STATES_LIMIT, law_filter)
        made[name].fill()
    first, *others = made
    made[first].renderings = {name: made[name] for name in others}
    return made[first]


def likelihood(contexts: Contexts) -> Tensor:
    """float64 [n]: the target's mean log-probability of the tokens that its anchors' steps stand before."""
    found = []
    for chunk in chunks(contexts.count):
        law = contexts.law(chunk)
        places = (contexts.rows[chunk] + 2).unsqueeze(-1) + torch.arange(contexts.steps)
        said = contexts.tokens[chunk].gather(1, places.flatten(1)).view(places.shape)
        found.append(law.gather(-1, said.unsqueeze(-1)).squeeze(-1).double().clamp_min(1e-12).log().mean((1, 2)))
    return torch.cat(found)


def _answers(
    target: LoadedPart, prompts: list[list[int]], length: int, seed: int, first: int, law_filter: LawFilter
) -> list[tuple[int, list[int]]]:
    """(where the answer starts, prompt and answer) of each prompt."""
    decoder = registry.build(
        "autoregressive",
        {"target": target},
        sampling=SamplingParams(temperature=1.0, top_k=law_filter[0], top_p=law_filter[1]),
        seed=seed,
        vocab_size=target.vocab_size,
    )
    found: list[tuple[int, list[int]]] = []
    for part in chunks(len(prompts)):
        requests = [
            TokenRequest(prompt, length, row_id=first + part.start + i, stop_ids=target.stop_ids)
            for i, prompt in enumerate(prompts[part])
        ]
        outputs = decoder.decode(requests).output
        found += [(len(r.prompt), [*r.prompt, *out]) for r, out in zip(requests, outputs, strict=True)]
    return found


def _anchors(seed: int, sample: int, start: int, end: int, count: int, steps: int) -> Tensor:
    """int64 [N]: rows whose steps all predict tokens of the answer, drawn without repeats where there are enough."""
    places = torch.arange(max(start, 2), end - steps + 1)
    order = uniform(seed, sample, places, Stream.DATA).argsort()
    chosen = places[order].repeat(-(-count // len(places)))[:count]
    return chosen.sort().values - 2
