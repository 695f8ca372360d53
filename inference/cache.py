"""The static key/value cache (contract 2): slot = position, so rows of different lengths need no padding, no holes and
no compaction.

A query at position t sees the slots 0..t of its own row. Whatever lies behind a row's length is garbage that the next
write overwrites; rolling back is therefore a change of the lengths alone. Lengths live on the host: the one read per
round that a decoder makes anyway tells them, and nothing here ever waits for the device.

Shape letters: B batch, H key/value heads, C capacity, d head width, n new tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidState, InvalidValue


def _per_layer(value: int | Sequence[int], num_layers: int) -> list[int]:
    return [value] * num_layers if isinstance(value, int) else list(value)


class StaticCache:
    """Preallocated keys and values of every layer, [B, H, C, d] each.

    Sliding-window models get the same full storage; their window is a matter of the mask. `value_dim` is for networks
    whose values are narrower or wider than their keys (default: as wide). Where both agree a layer's keys and values
    are the two halves of one tensor [B, 2H, C, d], so that one copy writes, compacts or gathers both.
    The tensors are ordinary ones even when the cache is made or re-ordered under `torch.inference_mode`.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        value_dim: int | Sequence[int] | None = None,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise InvalidValue(f"a cache needs at least one row and one slot, got batch {batch}, capacity {capacity}")
        heads = _per_layer(num_kv_heads, num_layers)
        key_dims = _per_layer(head_dim, num_layers)
        value_dims = key_dims if value_dim is None else _per_layer(value_dim, num_layers)
        self.capacity = capacity
        self.lengths: list[int] = [0] * batch
        self.keys: list[Tensor] = []  # [B, H, C, d] per layer
        self.values: list[Tensor] = []
        self._storage: list[tuple[Tensor, ...]] = []
        with torch.inference_mode(False):
            for h, dk, dv in zip(heads, key_dims, value_dims, strict=True):
                shapes = [(batch, 2 * h, capacity, dk)] if dk == dv else [(batch, h, capacity, d) for d in (dk, dv)]
                # zeros, not empty: NaN * 0 in a masked slot is NaN
                self._append(tuple(torch.zeros(s, dtype=dtype, device=device) for s in shapes))
        self._rows = torch.arange(batch, device=device).unsqueeze(1)  # [B, 1], for ragged writes

    def _append(self, parts: tuple[Tensor, ...]) -> None:
        keys, values = parts if len(parts) == 2 else parts[0].chunk(2, dim=1)
        self._storage.append(parts)
        self.keys.append(keys)
        self.values.append(values)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return max(self.lengths)

    @property
    def even(self) -> bool:
        """Whether all rows hold the same number of tokens."""
        return min(self.lengths) == max(self.lengths)

    def positions(self, n: int) -> Tensor:
        """int64 [B, n]: the positions (= slots) that the next n tokens of each row take."""
        first = torch.tensor(self.lengths, dtype=torch.int64).unsqueeze(1)
        return (first + torch.arange(n)).to(self.device, non_blocking=True)

    def reserve(self, n: int) -> None:
        """Check that n more tokens fit into every row. Raises InvalidValue otherwise."""
        if max(self.lengths) + n > self.capacity:
            raise InvalidValue(
                f"cache of {self.capacity} slots is full: a row holds {max(self.lengths)} tokens and {n} more came; "
                "make it with a larger capacity"
            )

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, n, d] behind the rows' lengths; returns the layer's keys and values up to the longest row.

        positions: int64 [B, n] from `positions(n)`, needed when rows differ in length. Call `advance(n)` once after the
        last layer.
        """
        keys, values = self.keys[layer], self.values[layer]
        start, end = max(self.lengths), max(self.lengths) + k.shape[2]
        if start == min(self.lengths):  # a plain slice, no index tensors
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
        else:
            assert positions is not None
            keys[self._rows, :, positions] = k.transpose(1, 2)
            values[self._rows, :, positions] = v.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]

    def write_joint(self, layer: int, kv: Tensor, positions: Tensor | None = None) -> None:
        """As `write`, both at once in the layout of a projection: kv [B, n, 2H, d], keys first."""
        (storage,) = self._storage[layer]
        start = max(self.lengths)
        if start == min(self.lengths):
            storage.narrow(2, start, kv.shape[1]).copy_(kv.transpose(1, 2))
        else:
            assert positions is not None
            storage[self._rows, :, positions] = kv

    def widen(self, capacity: int) -> None:
        """Make room for `capacity` slots; only while empty. The nodes of a tree take slots that no position needs.

        Raises InvalidState for a cache that holds tokens.
        """
        if any(self.lengths):
            raise InvalidState(f"only an empty cache can be widened; the rows hold {self.lengths} tokens")
        if capacity <= self.capacity:
            return
        storage, self._storage, self.keys, self.values = self._storage, [], [], []
        with torch.inference_mode(False):
            while storage:
                self._append(tuple(x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in storage.pop(0)))
        self.capacity = capacity

    def advance(self, n: int) -> None:
        """Count the n tokens just written to every row."""
        self.lengths = [length + n for length in self.lengths]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Roll each row back to `lengths[b]` tokens, O(1). Raises InvalidValue for a length that no row has."""
        if len(lengths) != self.batch or any(
            not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True)
        ):
            raise InvalidValue(f"cannot truncate rows of {self.lengths} tokens to {list(lengths)}")
        self.lengths = list(lengths)

    def keep(self, path: Tensor, start: Sequence[int]) -> None:
        """Compact a verified tree: row b keeps the slots start[b] + path[b, :], in that order, from slot start[b] on.

        path: int64 [B, a], offsets of the accepted nodes among the tokens written last (strictly increasing along a
        row). Rows that keep fewer than a nodes: fill up with any offsets and `truncate` afterwards.
        """
        width = path.shape[1]
        if len(start) != self.batch or path.shape[0] != self.batch:
            raise InvalidValue(
                f"keep wants one start and path a row: {self.batch} rows, {len(start)} starts, path {list(path.shape)}"
            )
        if any(not 0 <= s <= length - width for s, length in zip(start, self.lengths, strict=True)):
            raise InvalidValue(f"cannot keep {width} slots from {list(start)} of rows with {self.lengths} tokens")
        first = torch.tensor(list(start), dtype=torch.int64).unsqueeze(1).to(self.device, non_blocking=True)
        target = first + torch.arange(width, device=self.device)
        source = first + path
        for parts in self._storage:
            for part in parts:
                part[self._rows, :, target] = part[self._rows, :, source]  # the right side is a copy
        self.lengths = [s + width for s in start]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only `rows` (indices may repeat), in that order; copies the buffers. Raises InvalidValue for others."""
        if not rows or any(not 0 <= r < self.batch for r in rows):
            raise InvalidValue(f"cannot select rows {list(rows)} of a cache of {self.batch} rows")
        index = torch.tensor(list(rows), dtype=torch.int64).to(self.device, non_blocking=True)
        storage, self._storage, self.keys, self.values = self._storage, [], [], []
        with torch.inference_mode(False):
            while storage:  # layer by layer, each old tensor freed at once: the peak is one layer above the result
                self._append(tuple(part.index_select(0, index) for part in storage.pop(0)))
            self._rows = torch.arange(len(rows), device=index.device).unsqueeze(1)
        self.lengths = [self.lengths[r] for r in rows]

    def expand(self, k: int) -> None:
        """Repeat every row k times, copies next to each other."""
        self.select([r for r in range(self.batch) for _ in range(k)])

    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(x.numel() * x.element_size() for parts in self._storage for x in parts)
