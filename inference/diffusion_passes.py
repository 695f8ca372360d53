"""The network side of the block sampler: what a pass feeds with each kind of cache, and the logits that are wanted.

Source: Fast-dLLM (arXiv 2505.22618, section 3.1) for the two caches, LLaDA (arXiv 2502.09992, equation 16) for
guidance. Of an approximate cache the rows are renewed each at its own time: a row whose block has just begun gets a
full pass, the others feed what their cache cannot stand for, in a second call.

Shape letters: B rows still running, g rows of one call, n positions fed, M positions whose logits are wanted, D width,
L longest canvas, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftsmith.inference.diffusion_rows import Active, Bools, DiffusionRows, Ints
from draftsmith.inference.nets.masked_lm import CanvasCache, MaskedLM

CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True)
class _Plan:
    """One network call."""

    group: Ints  # [g] indices of running rows
    columns: Ints | None  # [g, n] positions fed, ascending, L for padding; None: all of them from 0 on
    first: Ints | None  # [g] where a row's positions begin, if they are consecutive


class CanvasPasses:
    """Runs the network over the running rows of one decode call."""

    def __init__(self, net: MaskedLM, state: DiffusionRows, cache: str, guidance: float) -> None:
        self._net, self._state, self._kind, self._guidance = net, state, cache, guidance
        self._copies = 2 if guidance > 0 else 1  # with guidance the rows whose prompt is masked follow the others
        self._cache = None
        if cache != "none" and len(state.rows):
            rows = self._copies * len(state.rows)
            self._cache = CanvasCache(net.config, rows, state.width, net.dtype, net.device)
        self.calls = 0

    def logits(self, active: Active, at: Ints, position: Ints) -> Tensor:
        """float32 [M, V] of tokens at `position` [M] of the running rows `at` [M]: never of a row's unfed positions."""
        net, shift = self._net, int(self._net.config.logit_shift)
        wanted = np.maximum(position - shift, 0)  # the position whose state predicts it
        index, second = np.zeros(len(at), dtype=np.int64), np.zeros(len(at), dtype=np.int64)
        found: list[Tensor] = []
        base = 0
        for plan in self._plans(active):
            states = self._run(active, plan)
            n = states.shape[1]
            place = np.full(len(active.rows), -1, dtype=np.int64)
            place[plan.group] = np.arange(len(plan.group))
            mine = place[at] >= 0
            row = place[at[mine]]
            if plan.columns is None:
                slot = wanted[mine]
            elif plan.first is not None:
                slot = wanted[mine] - plan.first[row]
            else:
                slot = (plan.columns[row] == wanted[mine][:, None]).argmax(1)
            index[mine] = base + row * n + slot
            second[mine] = index[mine] + len(plan.group) * n
            found.append(states.view(-1, states.shape[2]))
            base += states.shape[0] * n
        flat = found[0] if len(found) == 1 else torch.cat(found)
        logits = net.head(flat.index_select(0, _send(index, net.device))).float()
        if self._copies == 2:
            plain = net.head(flat.index_select(0, _send(second, net.device))).float()
            logits = plain + (self._guidance + 1.0) * (logits - plain)
            logits[:, net.config.mask_id] = float("-inf")  # inf - inf
        return logits

    def seen(self, active: Active, at: Ints) -> Bools:
        """[M]: whether this pass feeds the whole rest of the canvas of the running rows `at` [M]."""
        whole: Bools = (active.step[at] == 0) | (self._kind != "dual")
        return whole

    def drop(self, kept: Ints) -> None:
        """Keep only these [any] of the running rows."""
        if self._cache is not None:
            rows = np.concatenate([kept + i * self._held() for i in range(self._copies)])
            self._cache.select(_send(rows, self._net.device))

    def _held(self) -> int:
        assert self._cache is not None
        return self._cache.keys[0].shape[0] // self._copies

    def _plans(self, active: Active) -> list[_Plan]:
        everyone = np.arange(len(active.rows))
        if self._cache is None:
            return [_Plan(everyone, None, None)]
        begins = active.step == 0
        plans = [_Plan(everyone[begins], None, None)] if begins.any() else []
        if not begins.all():
            plans.append(self._partial(active, everyone[~begins]))
        return plans

    def _partial(self, active: Active, group: Ints) -> _Plan:
        """What rows in the midst of their blocks feed."""
        state, shift = self._state, int(self._net.config.logit_shift)
        lengths = state.lengths[active.rows[group]][:, None]
        if self._kind == "prefix":
            first = np.maximum(active.start[group] - shift, 0)
            columns = first[:, None] + np.arange(int((lengths[:, 0] - first).max()))
            return _Plan(group, np.where(columns < lengths, columns, state.width), first)
        columns = active.position[group]
        columns = np.where(columns < lengths, columns, state.width)  # behind a cut there is nothing to feed
        if shift:  # the states that predict the block stand one position further left
            both = np.concatenate((np.where(columns < state.width, np.maximum(columns - 1, 0), columns), columns), 1)
            both.sort(1)
            repeated = np.zeros(both.shape, dtype=np.bool_)
            repeated[:, 1:] = both[:, 1:] == both[:, :-1]
            both[repeated] = state.width
            both.sort(1)
            columns = both[:, : int((both < state.width).sum(1).max())]
        return _Plan(group, columns, None)

    def _run(self, active: Active, plan: _Plan) -> Tensor:
        """States [g, n, D], with guidance [2g, n, D]."""
        net, state = self._net, self._state
        rows = active.rows[plan.group]
        lengths = state.lengths[rows]
        if plan.columns is None:
            width = int(lengths.max())
            tokens, given = state.tokens[rows, :width], state.given[rows, :width]
            state.fed[rows] += self._copies * lengths
        else:
            width = state.width
            tokens = state.tokens[rows[:, None], plan.columns]
            given = state.given[rows[:, None], plan.columns]
            state.fed[rows] += self._copies * (plan.columns < width).sum(1)
        if self._copies == 2:
            tokens = np.concatenate((tokens, np.where(given, net.config.mask_id, tokens)))
        device = net.device
        self.calls += self._copies
        copies = self._copies
        of_cache = None
        if self._cache is not None and len(plan.group) < self._held():
            of_cache = _send(np.concatenate([plan.group + i * self._held() for i in range(copies)]), device)
        return net.states(
            _send(tokens, device),
            None if (lengths == width).all() else _send(np.tile(lengths, copies), device),
            self._cache,
            None if plan.columns is None else _send(np.tile(plan.columns, (copies, 1)), device),
            of_cache,
        )


def _send(array: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
