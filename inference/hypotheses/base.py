"""What a wrong coupling is to `draftsmith diagnose`: a change of values, with its name and its fix for each reader.

A subject's couplings are a frozen dataclass of plain values; a hypothesis changes some of them, so trying one, undoing
it and comparing two are exact. A family (one file each) yields the hypotheses that are worth trying; it applies to any
subject whose couplings have its fields, so that a new kind of drafter gets all families that fit it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

FLOOR = 0.02


@dataclass(frozen=True)
class Hypothesis:
    """One change of couplings."""

    family: str
    name: str
    changes: Mapping[str, Any]  # field -> value
    explain: str  # what would be wrong as deployed, a sentence
    fixes: Mapping[str, str] = field(default_factory=dict)  # reader -> what to set there
    floor: float = FLOOR  # relative gain of S below which it is no fault

    def apply(self, couplings: Any) -> Any:
        """The couplings with the change. Pure."""
        return dataclasses.replace(couplings, **self.changes)

    def inverse(self, couplings: Any) -> "Hypothesis":
        """The hypothesis that leads from `apply(couplings)` back to `couplings`."""
        back = {name: getattr(couplings, name) for name in self.changes}
        return Hypothesis(self.family, f"undo {self.name}", back, "")


@dataclass(frozen=True)
class Facts:
    """What families need to know of the pair beside the couplings."""

    target_layers: int
    target_rope: Mapping[str, Any]
    has_map: bool  # d2t is there
    draft_vocab_size: int
    vocab_size: int
    own_embedding: bool
    own_head: bool
    same_width: bool  # the target's embedding and head would fit the drafter
    square_kv: bool  # k and v have one shape
    square_qk: bool  # q and k have one shape
    half_head: bool  # an even head width, as rotary pairs need
    target_window: int | None = None  # positions that the target's attention sees, where it has a window
    renderings: tuple[str, ...] = ()  # of the prompts, under which the target's recorded answers are likelier
    target_filter: tuple[int, float] = (0, 1.0)  # top-k (0: all) and top-p (1: all) that the target is served with


Family = Callable[[Any, Facts], Iterator[Hypothesis]]


class Subject(Protocol):
    """A drafter whose law can be computed under any couplings."""

    facts: Facts

    @property
    def couplings(self) -> Any:
        """As deployed."""
        ...

    @property
    def families(self) -> Sequence[Family]: ...

    def logits(self, couplings: Any, contexts: Any, chunk: slice) -> tuple[Tensor, Tensor]:
        """(logits [c, N, K, W], int64 [W] target ids of the W columns, -1 for none) at the anchors of some samples."""
        ...


def key(couplings: Any) -> str:
    """Equal for equal couplings: two hypotheses that lead to one configuration are one."""
    return json.dumps(dataclasses.asdict(couplings), sort_keys=True, default=list)


def same_value(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True, default=list) == json.dumps(b, sort_keys=True, default=list)
