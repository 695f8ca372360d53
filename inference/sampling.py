"""From logits to laws: penalties, temperature, top-k, top-p and min-p, for a whole [B, n, V] block at once.

Order and meaning are those of transformers' processors (5.23, `generation/logits_process.py`): repetition penalty,
temperature, top-k, top-p, min-p. Presence and frequency penalties, which transformers lacks, follow the OpenAI
definition and stand right after the repetition penalty. Where transformers cuts inside a group of equally likely tokens
by the order of an unstable sort, the whole group is kept here.

Nothing waits for the device. Shape letters: B batch, n positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen from the logits; the defaults are greedy decoding without penalties."""

    temperature: float = field(default=0.0, metadata={"help": "0 is greedy: filters then change nothing"})
    top_k: int = field(default=0, metadata={"help": "keep the k most likely tokens (and those that tie); 0 keeps all"})
    top_p: float = field(default=1.0, metadata={"help": "keep the fewest tokens whose mass reaches top_p; 1 keeps all"})
    min_p: float = field(
        default=0.0, metadata={"help": "drop tokens less likely than min_p times the likeliest; 0 keeps all"}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "divides the logits of tokens in prompt or output; 1 is off"}
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "subtracted from the logits of tokens already in the output; 0 is off"}
    )
    frequency_penalty: float = field(
        default=0.0, metadata={"help": "subtracted once per earlier occurrence in the output; 0 is off"}
    )

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1 (off)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 (off) and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0; 1 is off"),
            ("presence_penalty", abs(self.presence_penalty) < float("inf"), "a finite number; 0 is off"),
            ("frequency_penalty", abs(self.frequency_penalty) < float("inf"), "a finite number; 0 is off"),
        ):
            if not ok:
                raise InvalidValue(f"{name} must be {allowed}, got {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class TokenCounts:
    """What stands before each position, for the penalties: every position has its own (hypothetical) prefix."""

    prompt: Tensor  # bool [B, 1, V]: in the prompt
    output: Tensor  # float32 [B, n, V]: occurrences among the generated tokens before the position

    def after(self, x: Tensor) -> "TokenCounts":
        """The counts one token later. x: int64 [B, n], the token at each position."""
        at = x.unsqueeze(-1)
        return TokenCounts(self.prompt, self.output.scatter_add(-1, at, torch.ones_like(at, dtype=self.output.dtype)))


class PenaltyState:
    """Token counts of a batch of rows, kept on the device and updated by what each round commits."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> None:
        self._prompt = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        self._output = torch.zeros(len(prompts), vocab_size, device=device)
        rows = torch.tensor([b for b, tokens in enumerate(prompts) for _ in tokens], dtype=torch.int64)
        ids = torch.tensor([t for tokens in prompts for t in tokens], dtype=torch.int64)
        self._prompt[rows.to(device), ids.to(device)] = True

    def add(self, tokens: Sequence[Sequence[int]]) -> None:
        """Count the tokens [B][any] that the rows just committed."""
        device = self._output.device
        rows = torch.tensor([b for b, new in enumerate(tokens) for _ in new], dtype=torch.int64)
        ids = torch.tensor([t for new in tokens for t in new], dtype=torch.int64)
        at = (rows.to(device, non_blocking=True), ids.to(device, non_blocking=True))
        self._output.index_put_(at, torch.ones(len(rows), device=device), accumulate=True)

    def counts(self, drafted: Tensor | None = None) -> TokenCounts:
        """Counts before each of g+1 positions: the committed tokens and, at position i, the first i of `drafted`.

        drafted: [B, g]; None: the next position alone.
        """
        output = self._output.unsqueeze(1)
        if drafted is not None and drafted.shape[1]:
            steps = torch.zeros(*drafted.shape, output.shape[-1], device=output.device)
            steps.scatter_(-1, drafted.unsqueeze(-1), 1.0)
            output = torch.cat([output, output + steps.cumsum(1)], 1)
        return TokenCounts(self._prompt.unsqueeze(1), output)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(list(rows), dtype=torch.int64).to(self._output.device, non_blocking=True)
        self._prompt, self._output = self._prompt[index], self._output[index]


def penalise(logits: Tensor, params: SamplingParams, counts: TokenCounts | None) -> Tensor:
    """Logits [B, n, V] in float32 (float64 stays) after the penalties; `counts` is needed only when there are any."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if not params.has_penalties:
        return scores
    if counts is None:
        raise InvalidValue("penalties need the counts of the tokens before each position")
    if params.repetition_penalty != 1.0:
        factor = params.repetition_penalty
        seen = counts.prompt | (counts.output > 0)
        scores = torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
    if params.frequency_penalty != 0.0:
        scores = scores - params.frequency_penalty * counts.output
    if params.presence_penalty != 0.0:
        scores = scores - params.presence_penalty * (counts.output > 0)
    return scores


def argmax(logits: Tensor, params: SamplingParams, counts: TokenCounts | None = None) -> Tensor:
    """Greedy tokens int64 [B, n] of logits [B, n, V]: the first of equal maxima, as torch.argmax; no softmax."""
    return (penalise(logits, params, counts) if params.has_penalties else logits).argmax(-1)


def law(logits: Tensor, params: SamplingParams, counts: TokenCounts | None = None) -> Tensor:
    """The law of the next token at every position.

    Args: logits: [B, n, V] raw, any float dtype. counts: what stands before each position, when there are penalties.
    Returns: probabilities [B, n, V], float32 (float64 for float64 logits); one-hot at temperature 0. A position whose
    logits hold a NaN or +inf, or nothing but -inf, comes out as NaN in all of its V entries.
    """
    scores = penalise(logits, params, counts)
    if params.greedy:
        one_hot = torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        return torch.where(scores.amax(-1, keepdim=True).isfinite(), one_hot, float("nan"))
    if params.temperature != 1.0:
        scores = scores / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        # every comparison is written so that NaN is kept: softmax then spreads it over the row
        kth = scores.topk(params.top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    probs = scores.softmax(-1)
    drop = None
    if params.top_p < 1.0:
        drop = ~nucleus(probs, params.top_p)
    if params.min_p > 0.0:
        thin = probs < params.min_p * probs.amax(-1, keepdim=True)  # a ratio: renormalising after top-p changes nothing
        drop = thin if drop is None else drop | thin
    if drop is not None:
        probs = probs.masked_fill(drop, 0.0)
    # also without a filter: over 10^5 entries softmax can miss a sum of 1 by 1e-4 (it adds up in float32, one by one),
    # and an acceptance test with such laws would miss the target's by as much; `sum` adds in pairs
    return probs.div_(probs.sum(-1, keepdim=True))


# Non-negative floats order like their bit patterns, and 1.0 is 0x3F800000: 30 bits, three digits of ten.
_DIGIT = 10
_BUCKETS = 1 << _DIGIT
_CPU_BLOCK = 1 << 16  # entries handled at once on a CPU, so that the temporaries stay in its cache


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Mask [..., V] of the fewest most likely tokens whose mass reaches `top_p`: those with less than top_p above them.

    The threshold is found digit by digit over the bit patterns (a radix select on sums of mass in float64): linear in V
    and several times faster than sorting. Probabilities are compared at float32.
    """
    if probs.shape[-1] <= _BUCKETS:  # sorting is cheaper than filling the buckets
        falling = probs.sort(-1, descending=True).values
        above = falling.cumsum(-1, dtype=torch.float64) - falling
        last = (above < top_p).sum(-1, keepdim=True).sub_(1).clamp_min_(0)
        return ~(probs < falling.gather(-1, last))
    flat = probs.reshape(-1, probs.shape[-1])
    rows = max(1, _CPU_BLOCK // flat.shape[1]) if flat.device.type == "cpu" else flat.shape[0]
    return torch.cat([_nucleus(block, top_p) for block in torch.split(flat, rows)]).view(probs.shape)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """`nucleus` of a block [n, V]."""
    bits = probs.float().view(torch.int32)
    mass = probs.double()
    above = torch.zeros(probs.shape[0], 1, dtype=torch.float64, device=probs.device)  # mass above the current prefix
    prefix = torch.zeros(probs.shape[0], 1, dtype=torch.int32, device=probs.device)
    for shift in (2 * _DIGIT, _DIGIT, 0):
        digit = (bits >> shift).bitwise_and_(_BUCKETS - 1).long()
        inside = mass if shift == 2 * _DIGIT else mass * ((bits >> (shift + _DIGIT)) == prefix)
        histogram = torch.zeros(probs.shape[0], _BUCKETS, dtype=torch.float64, device=probs.device)
        histogram.scatter_add_(-1, digit, inside)
        # mass strictly above each bucket; the threshold lies in the lowest bucket that has less than top_p above it
        upper = above + histogram.flip(-1).cumsum(-1).flip(-1) - histogram
        bucket = (upper >= top_p).sum(-1, keepdim=True).clamp_max_(_BUCKETS - 1)
        above = upper.gather(-1, bucket)
        prefix = (prefix << _DIGIT) | bucket.to(torch.int32)
    return ~(bits < prefix)
