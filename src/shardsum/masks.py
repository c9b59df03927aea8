"""A mask is one interval of keys per query row.

Causal, sliding window, packed documents, padding, and any of them intersected let row i see the keys
`[lo_i, hi_i)` and no others. Intervals are of *global* key indices; the visible part of a shard whose positions
increase is again one interval per row, found by `localize`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import Unsupported

Rows = Int[Tensor, "batch_or_1 rows"]


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query may see, over the global sequence.

    `q_len`, `kv_len`: global lengths. `window`: (left, right) keys around the query's own position, None is no
    limit. `cu_seqlens`, `cu_seqlens_k`: cumulative document lengths. `key_range`: (start, end), each (batch,).
    `q_start`: position of query 0, () or (batch,); without it the last query meets the last key.
    Raises: ValueError for lengths, windows and ranges that make no sense.
    """

    q_len: int
    kv_len: int
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    cu_seqlens: Int[Tensor, " q_ends"] | None = None
    cu_seqlens_k: Int[Tensor, " k_ends"] | None = None
    key_range: tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]] | None = None
    q_start: Int[Tensor, " batch_or_1"] | None = None

    def __post_init__(self) -> None:
        if (self.cu_seqlens is None) != (self.cu_seqlens_k is None):
            raise ValueError("cu_seqlens and cu_seqlens_k belong together.")
        if self.cu_seqlens is None or self.cu_seqlens_k is None:
            return
        if self.q_start is not None:
            raise Unsupported("q_start has no meaning beside cu_seqlens: positions count per document.")
        if len(self.cu_seqlens) != len(self.cu_seqlens_k):
            raise ValueError(
                "cu_seqlens and cu_seqlens_k must name the same documents: "
                f"got {len(self.cu_seqlens) - 1} and {len(self.cu_seqlens_k) - 1}."
            )
        _check_documents("cu_seqlens", self.cu_seqlens, self.q_len)
        _check_documents("cu_seqlens_k", self.cu_seqlens_k, self.kv_len)

    def intervals(self, rows: Int[Tensor, " rows"]) -> tuple[Rows, Rows]:
        """`lo` and `hi`: the query rows with these global indices see the global keys lo <= j < hi.

        Shapes: each (batch or 1, rows), int64. A row that sees nothing has lo == hi.
        """
        first, end, own = self._documents(rows)
        lo, hi = first, end
        if self.causal:
            hi = torch.minimum(hi, own + 1)
        left, right = self.window
        if left is not None:
            lo = torch.maximum(lo, own - left)
        if right is not None:
            hi = torch.minimum(hi, own + right + 1)
        if self.key_range is not None:
            start, stop = (bound.to(rows.device, torch.int64).view(-1, 1) for bound in self.key_range)
            lo, hi = torch.maximum(lo, start), torch.minimum(hi, stop)
        lo, hi = lo.clamp(0, self.kv_len), hi.clamp(0, self.kv_len)
        hi = torch.maximum(lo, hi)
        return lo.expand_as(hi), hi

    def _documents(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's first and last permitted key and its own position, as global key indices."""
        if self.cu_seqlens is None or self.cu_seqlens_k is None:
            first = rows.new_zeros(1, rows.numel())
            shift = rows.new_tensor([self.kv_len - self.q_len]) if self.q_start is None else self.q_start
            own = rows + shift.to(rows.device, torch.int64).view(-1, 1)
            return first, first + self.kv_len, own
        q_ends, k_ends = self.cu_seqlens.to(rows).contiguous(), self.cu_seqlens_k.to(rows)
        document = torch.searchsorted(q_ends, rows, right=True) - 1
        first, end = k_ends[document], k_ends[document + 1]
        # The document's last query meets its last key.
        own = end - q_ends[document + 1] + rows
        return first[None], end[None], own[None]


def localize(lo: Rows, hi: Rows, positions: Int[Tensor, " keys"]) -> tuple[Rows, Rows]:
    """The same intervals as local indices into a shard that holds the keys at these increasing positions."""
    return torch.searchsorted(positions, lo.contiguous()), torch.searchsorted(positions, hi.contiguous())


def _check_documents(name: str, ends: Tensor, length: int) -> None:
    if ends.ndim != 1 or len(ends) < 2:
        raise ValueError(f"{name} must be (documents + 1,): got {tuple(ends.shape)}.")
    if int(ends[0]) != 0 or int(ends[-1]) != length or bool((ends.diff() < 0).any()):
        raise ValueError(
            f"{name} must rise from 0 to the global length {length}: "
            f"got {int(ends[0])} ... {int(ends[-1])}. State the lengths of all ranks together."
        )
