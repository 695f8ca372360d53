"""An ideal model: exact conditional marginals in place of a network, so that any decoder can be tested without one.

`simulate` is a small decoder of its own (one block, no cache); `IdealNet` gives the same marginals through the
interface of a masked LM, so that the real decoder and every commit rule run on it.
Shape letters: B rows, n positions of the answer, L of the canvas, M right answers, V tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draftsmith.data.parallelbench.tasks import Answer, Sample, Task, listed
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.rng import sample_categorical, uniform

OPEN = -1
_LISTED = 50_000  # above, marginals are asked of the task, one row at a time
_TIES, _PICK = 101, 102  # streams of the simulator
Chooser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (confidence, masked, uniform), all [B,n] -> committed now [B,n]


class IdealLaw:
    """The marginals of one sample for many rows at once. `vocabulary` gives the meaning of token indices 0..V-1."""

    def __init__(self, task: Task, sample: Sample, vocabulary: Sequence[str] | None = None) -> None:
        self.task, self.sample = task, sample
        few = task.num_outcomes(sample) <= _LISTED
        if vocabulary is None:
            own = {token for answer in listed(task, sample) for token in answer} if few else set(task.alphabet())
            vocabulary = sorted(own)
        self.vocabulary = tuple(vocabulary)
        self.index = {token: i for i, token in enumerate(self.vocabulary)}
        self.outcomes = (
            torch.tensor([[self.index[token] for token in answer] for answer in listed(task, sample)]) if few else None
        )
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, known: Tensor) -> Tensor:
        """p(y_i | X, known) [B,n,V] float64 for known [B,n], OPEN where nothing is committed.

        Where the known tokens contradict themselves: the law without them. At known positions: one-hot.
        """
        distinct, inverse = torch.unique(known, dim=0, return_inverse=True)
        fresh = [tuple(row) for row in distinct.tolist() if tuple(row) not in self._seen]
        if fresh:
            for state, law in zip(fresh, self._laws(torch.tensor(fresh)), strict=True):
                self._seen[state] = law
        return torch.stack([self._seen[tuple(row)] for row in distinct.tolist()])[inverse]

    def _laws(self, known: Tensor) -> Tensor:
        opened = known == OPEN
        one_hot = nn.functional.one_hot(known.clamp_min(0), len(self.vocabulary)).double()
        if self.outcomes is None or type(self.task).marginals is not Task.marginals:
            laws = torch.stack([self._asked(row) for row in known.tolist()])
        else:
            agrees = ((known[:, None] == self.outcomes) | opened[:, None]).all(-1)  # [B,M]
            agrees |= ~agrees.any(-1, keepdim=True)
            tokens = nn.functional.one_hot(self.outcomes, len(self.vocabulary)).double()  # [M,n,V]
            laws = torch.einsum("bm,mnv->bnv", agrees.double(), tokens)
            laws /= agrees.sum(-1)[:, None, None]
        return torch.where(opened[..., None], laws, one_hot)

    def _asked(self, row: Sequence[int]) -> Tensor:
        known = {i: self.vocabulary[token] for i, token in enumerate(row) if token != OPEN}
        law = torch.zeros(len(row), len(self.vocabulary), dtype=torch.float64)
        for i, marginal in self.task.marginals(self.sample, known).items():
            for token, probability in marginal.items():
                law[i, self.index[token]] = probability
        return law

    def answers(self, tokens: Tensor) -> list[Answer]:
        """[B,n] indices as answers."""
        return [tuple(self.vocabulary[token] for token in row) for row in tokens.tolist()]


@dataclass(frozen=True)
class Simulation:
    """What a simulated decoder did with B rows of one sample."""

    answers: list[Answer]
    passes: Tensor  # [B]
    order: Tensor  # [B,n] the pass that committed each position, from 0
    right: Tensor  # [B] bool

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())


def simulate(law: IdealLaw, choose: Chooser, rows: int, *, greedy: bool = False, seed: int = 0) -> Simulation:
    """Decode `rows` copies of one sample by its exact marginals."""
    known, order = fill(law, choose, rows, len(law.sample.reference), greedy=greedy, seed=seed)
    answers = law.answers(known)
    right = torch.tensor([law.task.valid(law.sample, answer) for answer in answers])
    return Simulation(answers, order.max(-1).values + 1, order, right)


def fill(
    law: Callable[[Tensor], Tensor], choose: Chooser, rows: int, n: int, *, greedy: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(tokens [B,n], pass of each commit [B,n]): marginals, one prediction each, commit what `choose` says.

    law: known [B,n] -> probabilities [B,n,V]. At least the most confident position is committed in each pass.
    greedy takes the likeliest token, ties at random for each position (a fixed order would make positions collide).
    """
    known = torch.full((rows, n), OPEN)
    order = torch.full((rows, n), -1)
    row, position = torch.arange(rows)[:, None], torch.arange(n)
    step = 0
    while bool((known == OPEN).any()):
        probs = law(known)
        at = uniform(seed, row, position, 1000 * step + _TIES)  # [B,n]
        if greedy:
            tokens = torch.arange(probs.shape[-1])
            noise = uniform(seed, row[..., None] * n + position[:, None], tokens, 1000 * step + _TIES)
            predicted = (probs + 1e-9 * noise).argmax(-1)
        else:
            predicted = sample_categorical(probs, at)
        confidence = probs.gather(-1, predicted[..., None]).squeeze(-1)
        masked = known == OPEN
        commit = choose(confidence, masked, uniform(seed, row, position, 1000 * step + _PICK)) & masked
        best = torch.where(masked, confidence, -1.0).argmax(-1, keepdim=True)
        none = ~commit.any(-1, keepdim=True) & masked.any(-1, keepdim=True)
        commit |= torch.zeros_like(commit).scatter(-1, best, True) & none
        known = torch.where(commit, predicted, known)
        order = torch.where(commit, step, order)
        step += 1
    return known, order


def top_k(k: int, by: str = "confidence") -> Chooser:
    """The k best masked positions by confidence, at random, or from the left. Raises InvalidValue for k < 1."""
    if k < 1 or by not in ("confidence", "random", "left"):
        raise InvalidValue(f"top_k commits k >= 1 by confidence, random or left, got {k} by {by!r}")

    def choose(confidence: Tensor, masked: Tensor, u: Tensor) -> Tensor:
        place = -torch.arange(masked.shape[-1], dtype=torch.float64)
        # equal confidences are the rule here: in a fixed order they would make the choice a left-to-right one
        score = {"confidence": confidence + 1e-9 * u, "random": u, "left": place.expand_as(u)}[by]
        rank = torch.where(masked, score, -torch.inf).argsort(-1, descending=True).argsort(-1)
        return rank < k

    return choose


def threshold(gamma: float) -> Chooser:
    """Every position whose confidence is above gamma."""
    return lambda confidence, masked, u: confidence > gamma


@dataclass(frozen=True)
class IdealConfig:
    """What the block sampler asks of a masked LM's config."""

    vocab_size: int
    mask_id: int
    max_length: int = 1024
    logit_shift: bool = False
    end_ids: tuple[int, ...] = ()


class IdealNet(nn.Module):
    """Exact marginals behind the interface of a masked LM: its states are log-marginals, its head passes them on.

    A row finds its sample by its prompt, the ids before the canvas's answer; all prompts have one length and differ.
    `tokens` gives the meaning of ids 0..V-1; the last id, V, is the mask.
    noise: relative, fixed for each (canvas, position, token); breaks ties that would make greedy positions collide.
    """

    def __init__(
        self, tokens: Sequence[str], known: dict[tuple[int, ...], tuple[Task, Sample]], noise: float = 1e-6
    ) -> None:
        """Raises InvalidValue for no prompt, or prompts of different lengths."""
        super().__init__()
        if len({len(prompt) for prompt in known}) != 1:
            raise InvalidValue("an ideal net takes prompts of one length, and one at least")
        self.config = IdealConfig(len(tokens) + 1, len(tokens))
        self.laws = {prompt: IdealLaw(task, sample, tokens) for prompt, (task, sample) in known.items()}
        self.noise, self.device, self.dtype = noise, torch.device("cpu"), torch.float32

    def states(self, tokens: Tensor, lengths: Tensor | None = None, *cache: object) -> Tensor:
        """canvases [B,L] -> log-marginals [B,L,V+1]; uniform where there is nothing to answer.

        A canvas of another prompt is answered by its last token everywhere (the sampler probes for causal networks).
        Raises InvalidValue when a cache is given: there is nothing to keep.
        """
        if any(part is not None for part in cache):
            raise InvalidValue("an ideal net keeps no cache: decode with cache none")
        size = len(next(iter(self.laws)))
        probs = torch.full((*tokens.shape, self.config.vocab_size), 1.0 / self.config.vocab_size, dtype=torch.float64)
        for row, canvas in zip(probs, tokens.tolist(), strict=True):
            law = self.laws.get(tuple(canvas[:size]))
            if law is None:
                row[:, canvas[-1]] += 1.0
                continue
            n = len(law.sample.reference)
            answer = torch.tensor(canvas[size : size + n])
            row[size : size + n, :-1] = law(torch.where(answer == self.config.mask_id, OPEN, answer)[None])[0]
            state = sum(token * 31**i % 1_000_003 for i, token in enumerate(canvas[: size + n]))
            place = torch.arange(len(canvas))[:, None]
            row *= 1.0 + self.noise * uniform(state, place, torch.arange(row.shape[-1]), _TIES)
        return probs.log().float()

    def head(self, hidden: Tensor) -> Tensor:
        """[..., V+1] -> logits [..., V+1]; the mask's is -inf."""
        return hidden.index_fill(-1, torch.tensor([self.config.mask_id]), -torch.inf)
