"""A mask is one interval of keys per query row, or two that do not overlap.

Causal, sliding window, packed documents, padding, and any of them intersected let row i see the keys
`[lo_i, hi_i)` and no others; first tokens or a prefix beside a window are a second interval. Intervals are of
*global* key indices; the visible part of a shard whose positions increase is again one interval per row, found by
`localize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import Unsupported

Rows = Int[Tensor, "batch_or_1 rows"]


class Bounds(NamedTuple):
    """An interval of keys for each query row: row i sees the keys lo_i <= j < hi_i."""

    lo: Rows
    hi: Rows


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query may see, over the global sequence.

    `q_len`, `kv_len`: global lengths. `window`: (left, right) keys around the query's own position, None is no
    limit. `cu_seqlens`, `cu_seqlens_k`: cumulative document lengths. `key_range`: (start, end), each (batch,).
    `q_start`: position of query 0, () or (batch,); without it the last query meets the last key. `prefix`,
    `sink_tokens`: so many first keys are seen besides, the former whatever causal says. `key_intervals`: (lo, hi)
    of all queries, global key indices; nothing outside is seen.
    Raises: ValueError for lengths, windows and ranges that make no sense.
    """

    q_len: int
    kv_len: int
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    cu_seqlens: Int[Tensor, " q_ends"] | None = None
    cu_seqlens_k: Int[Tensor, " k_ends"] | None = None
    key_range: tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]] | None = None
    q_start: Int[Tensor, " batch_or_1_of_starts"] | None = None
    prefix: Int[Tensor, " batch_or_1_of_prefixes"] | None = None
    sink_tokens: int = 0
    key_intervals: tuple[Rows, Rows] | None = None

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
        _check_documents("cu_seqlens", self.cu_seqlens, self.q_len, "queries")
        name = "cu_seqlens" if self.cu_seqlens_k is self.cu_seqlens else "cu_seqlens_k"
        _check_documents(name, self.cu_seqlens_k, self.kv_len, "keys")

    def intervals(self, rows: Int[Tensor, " rows"]) -> list[Bounds]:
        """Disjoint intervals: the query rows with these global indices see the global keys lo <= j < hi of each.

        There are two if first tokens or a prefix are seen beside a window or the causal past, else one.
        Shapes: each (batch or 1, rows), int64. A row that sees nothing of an interval has lo == hi.
        """
        first, end, own = self._documents(rows)
        if self.key_range is not None:
            start, stop = (bound.to(rows.device, torch.int64).view(-1, 1) for bound in self.key_range)
            first, end = torch.maximum(first, start), torch.minimum(end, stop)
        lo, hi = first, end
        if self.causal:
            hi = torch.minimum(hi, own + 1)
        past = hi
        left, right = self.window
        if left is not None:
            lo = torch.maximum(lo, own - left)
        if right is not None:
            hi = torch.minimum(hi, own + right + 1)
        found = [(lo, hi)]
        if self.sink_tokens or self.prefix is not None:
            head = torch.minimum(first + self.sink_tokens, past)
            if self.prefix is not None:
                head = torch.maximum(head, first + self.prefix.to(first).view(-1, 1))
            head = torch.maximum(torch.minimum(head, end), first)
            # Where the first keys reach the window, both are one interval.
            joined = (lo <= head) & (lo < hi)
            head = torch.where(joined, torch.maximum(head, hi), head)
            found = [(first, head), (torch.where(joined, hi, lo), hi)]
        if self.key_intervals is not None:
            given_lo, given_hi = (bound.to(rows.device)[:, rows] for bound in self.key_intervals)
            found = [(torch.maximum(lo, given_lo), torch.minimum(hi, given_hi)) for lo, hi in found]
        return [self._clamped(lo, hi) for lo, hi in found]

    def _clamped(self, lo: Tensor, hi: Tensor) -> Bounds:
        lo, hi = torch.broadcast_tensors(lo.clamp(0, self.kv_len), hi.clamp(0, self.kv_len))
        return Bounds(lo, torch.maximum(lo, hi))

    def own(self, rows: Int[Tensor, " rows"]) -> Rows:
        """Each row's own position, as a global key index: what distances are measured from."""
        return self._documents(rows)[2]

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


def localize(bounds: Bounds, positions: Int[Tensor, " keys"]) -> Bounds:
    """Return the bounds as local indices into a shard that holds the keys at these increasing positions."""
    return Bounds(*(torch.searchsorted(positions, bound.contiguous()) for bound in bounds))


def _check_documents(name: str, ends: Tensor, length: int, what: str) -> None:
    if ends.ndim != 1 or len(ends) < 2:
        raise ValueError(f"{name} must be (documents + 1,): got {tuple(ends.shape)}.")
    if int(ends[0]) != 0 or int(ends[-1]) != length or bool((ends.diff() < 0).any()):
        raise ValueError(
            f"{name} must rise from 0 to {length}, the number of {what} of all ranks together: "
            f"got {int(ends[0])} ... {int(ends[-1])}."
        )
