"""What tree policies learn from verified draws: how often a drawn token is really accepted.

Two figures of the same tests: acceptance by sibling rank and draft probability (DySpec, our extension of its estimate
"acceptance = draft probability"), and the share of nodes whose k-th child is the accepted one ("Sequoia" (2024),
section 4.1: the acceptance vector P). Both are kept in one JSON file beside the drafter, with a fingerprint of what
they were measured on.
Shape letters: R sibling ranks, K bins of draft probability.
"""

import bisect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_verification import TreeVerdict

CALIBRATION_FILE = "tree_calibration.json"
VERSION = 1
# upper edges of the bins of R[y], the last one 1: fine where a small probability may still be a good draw
EDGES = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0)
_RANKS = 8
_PRIOR = 4.0  # tests that the plain estimate, acceptance = R[y], counts for in a bin
_OFF = 0.3  # relative difference of estimate and measurement that is worth a word
_ROUNDS = 200  # after so many rounds


class EstimateWarning(UserWarning):
    """A policy's estimate of acceptance does not agree with what is accepted."""


@dataclass(frozen=True)
class AcceptanceTable:
    """acc[r][bin(R[y])]: measured acceptance of the (r+1)-th child of a node, drawn with probability R[y]."""

    acc: tuple[tuple[float, ...], ...]  # [R][K]
    edges: tuple[float, ...] = EDGES  # [K] upper edges, rising, the last one 1

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if not self.edges or not rising or self.edges[0] <= 0 or self.edges[-1] != 1.0:
            raise InvalidValue(f"the bins' upper edges must rise from above 0 to 1, got {list(self.edges)}")
        if not self.acc or any(len(row) != len(self.edges) for row in self.acc):
            raise InvalidValue(
                f"an acceptance table has one row a rank and {len(self.edges)} bins a row, got rows of "
                f"{[len(row) for row in self.acc]}"
            )
        wrong = next((a for row in self.acc for a in row if not 0.0 <= a <= 1.0), None)
        if wrong is not None:
            raise InvalidValue(f"acceptance lies between 0 and 1, the table holds {wrong}")

    def acceptance(self, rank: int, share: float) -> float:
        """Estimated acceptance of a draw; ranks behind the last row use that row."""
        row = self.acc[min(rank, len(self.acc) - 1)]
        return row[bisect.bisect_left(self.edges, min(share, 1.0))]


@dataclass(frozen=True)
class Calibration:
    """One measurement."""

    table: AcceptanceTable
    sequoia: tuple[float, ...]  # P[k]: the k-th child was the accepted one; P[0] = 0
    tests: int
    fingerprint: Mapping[str, Any]  # what it was measured on: target, draft, temperatures

    def __post_init__(self) -> None:
        check_acceptance_vector(self.sequoia)

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        document = {"version": VERSION, **asdict(self), "fingerprint": dict(self.fingerprint)}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path, fingerprint: Mapping[str, Any] | None = None) -> "Calibration":
        """Read and check the file. Raises InvalidValue when it is damaged or was made for something else."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            table = AcceptanceTable(
                tuple(tuple(float(a) for a in row) for row in raw["table"]["acc"]),
                tuple(float(e) for e in raw["table"]["edges"]),
            )
            found = Calibration(table, tuple(float(p) for p in raw["sequoia"]), int(raw["tests"]), raw["fingerprint"])
            version = raw["version"]
        except OSError as error:
            raise InvalidValue(
                f"no calibration at {path}: make one with 'draftsmith calibrate TARGET DRAFT'"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidValue(f"{path} is no calibration of tree policies: {error}") from error
        if version != VERSION:
            raise InvalidValue(f"{path} has version {version}, this release reads {VERSION}: calibrate again")
        for key, value in (fingerprint or {}).items():
            if found.fingerprint.get(key) != value:
                raise InvalidValue(
                    f"{path} was measured with {key} {found.fingerprint.get(key)!r}, this run has {value!r}: "
                    "run 'draftsmith calibrate' for this pair and temperature"
                )
        return found


def check_acceptance_vector(p: Sequence[float]) -> None:
    """Sequoia's P: P[0] = 0, entries in [0, 1] that sum to 1 at most. Raises InvalidValue."""
    if len(p) < 2 or p[0] != 0.0:
        raise InvalidValue(f"Sequoia's P counts children from 1: P[0] must be 0 and P[1] there, got {list(p)[:4]}")
    if not all(0.0 <= x <= 1.0 for x in p) or sum(p) > 1.0 + 1e-9:
        raise InvalidValue(f"Sequoia's P holds probabilities that sum to at most 1, got a sum of {sum(p):.6g}")


class Calibrator:
    """Counts tested draws; a `Watcher` of the tree decoder.

    It replays the walk on the host, node by node: for measuring only. Trees should be wide (policy fixed).
    """

    def __init__(self) -> None:
        self._tests = torch.zeros(_RANKS, len(EDGES), dtype=torch.float64)
        self._passed = torch.zeros_like(self._tests)
        self._nodes: list[int] = []  # entry k: nodes that had a k-th child
        self._which: list[int] = []  # entry k: nodes whose k-th child was accepted

    @property
    def tests(self) -> int:
        """Draws tested so far."""
        return int(self._tests.sum())

    def __call__(self, tree: Tree, verdict: TreeVerdict, live: Sequence[int]) -> None:
        """Count one round. Raises InvalidValue for trees whose policy does not say how likely its draws were."""
        if tree.share is None or tree.replacement:
            raise InvalidValue(
                "acceptance is measured on trees drawn or picked without replacement: use policy 'fixed'"
            )
        parent, size, share = tree.parent.tolist(), tree.size.tolist(), tree.share.tolist()
        path, accepted = verdict.path.tolist(), verdict.k.tolist()
        for b in live:
            for step in range(accepted[b] + 1):
                children = [c for c in range(1, size[b]) if parent[b][c] == path[b][step]]
                passed = children.index(path[b][step + 1]) if step < accepted[b] else None
                self._count([share[b][c] for c in children], passed)

    def _count(self, shares: Sequence[float], passed: int | None) -> None:
        """One node: R[y] of its children in the order of drawing, and which of them was accepted."""
        for _ in range(len(self._nodes), len(shares) + 1):
            self._nodes.append(0)
            self._which.append(0)
        for rank, share in enumerate(shares):
            self._nodes[rank + 1] += 1
            if share <= 0.0 or (passed is not None and rank > passed):
                continue  # nothing was left to draw, or it was not tested
            at = min(rank, _RANKS - 1), bisect.bisect_left(EDGES, min(share, 1.0))
            self._tests[at] += 1
            if rank == passed:
                self._passed[at] += 1
                self._which[rank + 1] += 1

    def result(self, fingerprint: Mapping[str, Any]) -> Calibration:
        """The measurement. Raises InvalidValue when nothing was tested."""
        if not self.tests:
            raise InvalidValue("nothing was drafted, so nothing can be calibrated: give longer prompts or outputs")
        middle = torch.tensor([(a + b) / 2 for a, b in zip((0.0, *EDGES), EDGES, strict=False)], dtype=torch.float64)
        acc = (self._passed + _PRIOR * middle) / (self._tests + _PRIOR)
        p = [k / n if n else 0.0 for k, n in zip(self._which, self._nodes, strict=True)]
        total = max(1.0, sum(p))  # later children are measured on fewer nodes
        return Calibration(
            AcceptanceTable(tuple(tuple(row) for row in acc.tolist())),
            tuple(x / total for x in p),
            self.tests,
            dict(fingerprint),
        )


class EstimateWatch:
    """Compares a policy's forecast of accepted nodes with what was accepted, and says so when they part."""

    def __init__(self) -> None:
        self.rounds = 0
        self.forecast = 0.0
        self.accepted = 0
        self._warned = False

    def add(self, forecast: float, accepted: int, *, calibrated: bool) -> None:
        """One row's round. Warns once, at the end of a window of rounds in which they differ by more than 30 %."""
        self.rounds += 1
        self.forecast += forecast
        self.accepted += accepted
        if self.rounds % _ROUNDS or self._warned:
            return
        if abs(self.forecast - self.accepted) > _OFF * max(self.accepted, 1):
            self._warned = True
            advice = "calibrate again" if calibrated else "calibrate it with 'draftsmith calibrate TARGET DRAFT'"
            warnings.warn(
                f"DySpec expected {self.forecast / self.rounds:.2f} accepted nodes a round and got "
                f"{self.accepted / self.rounds:.2f} over {self.rounds} rounds: its trees are not the best ones for "
                f"this pair; {advice}",
                EstimateWarning,
                stacklevel=2,
            )
