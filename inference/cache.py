"""The static key/value cache (contract 2): slot = position, so ragged rows need no padding, holes or compaction.

A query at position t sees the slots 0..t of its own row. Whatever lies behind a row's length is garbage that the next
write overwrites; rolling back is therefore a change of the lengths alone. Lengths live on the host: the one read per
round that a decoder makes anyway tells them, and nothing here ever waits for the device.

Shape letters: B batch, H key/value heads, C capacity, d head width, n new tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue


class StaticCache:
    """Preallocated keys and values of every layer, [B, H, C, d] each.

    Sliding-window models get the same full storage; their window is a matter of the mask.
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
    ) -> None:
        heads = [num_kv_heads] * num_layers if isinstance(num_kv_heads, int) else list(num_kv_heads)
        widths = [head_dim] * num_layers if isinstance(head_dim, int) else list(head_dim)
        shapes = [(batch, h, capacity, d) for h, d in zip(heads, widths, strict=True)]
        self.keys = [
            torch.zeros(s, dtype=dtype, device=device) for s in shapes
        ]  # zeros, not empty: NaN * 0 in a masked slot is NaN
        self.values = [torch.zeros(s, dtype=dtype, device=device) for s in shapes]
        self.capacity = capacity
        self.lengths: list[int] = [0] * batch

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def positions(self, n: int) -> Tensor:
        """int64 [B, n]: the positions that the next n tokens of each row take."""
        first = torch.tensor(self.lengths, dtype=torch.int64).unsqueeze(1)
        return (first + torch.arange(n)).to(self.device, non_blocking=True)

    def reserve(self, n: int) -> None:
        """Check that n more tokens fit into every row. Raises InvalidValue otherwise."""
        if max(self.lengths) + n > self.capacity:
            raise InvalidValue(
                f"cache of {self.capacity} slots is full: a row holds {max(self.lengths)} tokens and {n} more were fed"
            )

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, n, d] at `positions` [B, n]; returns views of the layer's buffers up to the longest row.

        Call `advance(n)` once after the last layer.
        """
        n = k.shape[2]
        longest = max(self.lengths) + n
        if longest - n == min(self.lengths):  # all rows equally long: a plain slice, no index tensors
            self.keys[layer][:, :, longest - n : longest] = k
            self.values[layer][:, :, longest - n : longest] = v
        else:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
            self.keys[layer][rows, :, positions] = k.transpose(1, 2)
            self.values[layer][rows, :, positions] = v.transpose(1, 2)
        return self.keys[layer][:, :, :longest], self.values[layer][:, :, :longest]

    def advance(self, n: int) -> None:
        """Count the n tokens just written to every row."""
        self.lengths = [length + n for length in self.lengths]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Roll each row back to `lengths[b]` tokens, O(1). Raises InvalidValue for more than the row has."""
        if len(lengths) != self.batch or any(
            not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True)
        ):
            raise InvalidValue(f"cannot truncate rows of {self.lengths} tokens to {list(lengths)}")
        self.lengths = list(lengths)

    def keep(self, path: Tensor, start: Sequence[int]) -> None:
        """Compact a verified tree: row b keeps the slots start[b] + path[b, :], moved right behind slot start[b] - 1.

        path: int64 [B, a], offsets of the accepted nodes among the tokens written last, increasing along a row.
        """
        rows = torch.arange(self.batch, device=self.device).unsqueeze(1)
        first = torch.tensor(list(start), device=self.device).unsqueeze(1)
        target = first + torch.arange(path.shape[1], device=self.device)
        for buffer in (*self.keys, *self.values):
            buffer[rows, :, target] = buffer[rows, :, first + path]  # the right side is copied before it is written
        self.lengths = [s + path.shape[1] for s in start]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only `rows` (indices may repeat), in that order; copies the buffers."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        self.keys = [x.index_select(0, index) for x in self.keys]
        self.values = [x.index_select(0, index) for x in self.values]
        self.lengths = [self.lengths[r] for r in rows]

    def expand(self, k: int) -> None:
        """Repeat every row k times, copies next to each other."""
        self.select([r for r in range(self.batch) for _ in range(k)])

    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))
