"""A mask is one interval of keys per query row, or two that do not overlap.

Causal, sliding window, packed documents, padding, and any of them intersected let row i see the keys
`[lo_i, hi_i)` and no others; first tokens or a prefix beside a window are a second interval. Intervals are of
*global* key indices; the visible part of a shard whose positions increase is again one interval per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .errors import Unsupported

Rows = Int[Tensor, "batch_or_1 rows"]


class Bounds(NamedTuple):
    """One interval of keys for each query row: the row sees the keys lo <= j < hi."""

    lo: Rows
    hi: Rows


class _OfKeys(NamedTuple):
    """Each key's document: its rows, what to add to a row for its own position, and its permitted keys."""

    row: Tensor
    row_end: Tensor
    shift: Tensor
    first: Tensor
    end: Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Where queries and keys stand, and which keys their documents and ranges permit.

    `q_len`, `kv_len`: global lengths. `cu_seqlens`, `cu_seqlens_k`: cumulative document lengths. `key_range`:
    (start, end), each (batch,). `q_start`: position of query 0, () or (batch,); without it the last query meets
    the last key.
    Raises: ValueError for lengths that make no sense.
    """

    q_len: int
    kv_len: int
    cu_seqlens: Int[Tensor, " q_ends"] | None = None
    cu_seqlens_k: Int[Tensor, " k_ends"] | None = None
    key_range: tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]] | None = None
    q_start: Int[Tensor, " batch_or_1_of_starts"] | None = None

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

    def _in_range(self, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        if self.key_range is None:
            return first, end
        start, stop = (bound.to(first.device, torch.int64).view(-1, 1) for bound in self.key_range)
        first = torch.maximum(first, start)
        return first, torch.maximum(torch.minimum(end, stop), first)

    def _documents(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's first and last key of its document and its own position, as global key indices."""
        if self.cu_seqlens is None or self.cu_seqlens_k is None:
            first = rows.new_zeros(1, rows.numel())
            return first, first + self.kv_len, rows + self._shift(rows)
        q_ends, k_ends = self.cu_seqlens.to(rows).contiguous(), self.cu_seqlens_k.to(rows)
        document = torch.searchsorted(q_ends, rows, right=True) - 1
        first, end = k_ends[document], k_ends[document + 1]
        # The document's last query meets its last key.
        diagonal = end - q_ends[document + 1] + rows
        return first[None], end[None], diagonal[None]

    def _documents_of_keys(self, keys: Tensor) -> _OfKeys:
        """Each key's document: its rows, what to add to a row for its own position, and its permitted keys."""
        if self.cu_seqlens is None or self.cu_seqlens_k is None:
            row, first = torch.zeros_like(keys)[None], torch.zeros_like(keys)[None]
            return _OfKeys(row, row + self.q_len, self._shift(keys), *self._in_range(first, first + self.kv_len))
        q_ends, k_ends = self.cu_seqlens.to(keys), self.cu_seqlens_k.to(keys).contiguous()
        document = torch.searchsorted(k_ends, keys, right=True) - 1
        row, row_end = q_ends[document][None], q_ends[document + 1][None]
        first, end = k_ends[document][None], k_ends[document + 1][None]
        return _OfKeys(row, row_end, end - row_end, *self._in_range(first, end))

    def _shift(self, like: Tensor) -> Tensor:
        """What is added to a row for its own position, of a sequence that is one document: (batch or 1, 1)."""
        shift = like.new_tensor([self.kv_len - self.q_len]) if self.q_start is None else self.q_start
        return shift.to(like.device, torch.int64).view(-1, 1)


@dataclass(frozen=True, eq=False)
class Mask(Documents):
    """Which keys each query may see, over the global sequence.

    `window`: (left, right) keys around the query's own position, None is no limit. `prefix`, `sink_tokens`: this
    many first keys are seen besides, the former whatever causal says. `key_intervals`: (lo, hi) of all queries,
    global key indices; nothing outside is seen.
    """

    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    prefix: Int[Tensor, " batch_or_1_of_prefixes"] | None = None
    sink_tokens: int = 0
    key_intervals: tuple[Rows, Rows] | None = None

    @property
    def parts(self) -> int:
        """How many intervals a row has at most: two if first tokens or a prefix are seen beside the others."""
        return 2 if self.sink_tokens or self.prefix is not None else 1

    def intervals(self, rows: Int[Tensor, " rows"]) -> list[Bounds]:
        """Disjoint intervals, `parts` of them: the query rows with these global indices see lo <= j < hi of each.

        Shapes: each (batch or 1, rows), int64. A row that sees nothing of an interval has lo == hi.
        """
        first, bounds = self._overlapping(rows)
        if len(bounds) == 2:
            (_, head), (lo, hi) = bounds
            # Where the first keys reach the window, both are one interval.
            joined = (lo <= head) & (lo < hi)
            head = torch.where(joined, torch.maximum(head, hi), head)
            bounds = [Bounds(first, head), Bounds(torch.where(joined, hi, lo), hi)]
        return [self._clamped(lo, hi) for lo, hi in self._intersected(bounds, rows)]

    def seen_between(self, first: Int[Tensor, " pairs"], last: Int[Tensor, " pairs"]) -> list[Bounds]:
        """The keys that some row from `first` to `last` sees, `parts` intervals for each pair; they may overlap.

        Both rows of a pair are of one document, and between two rows that follow each other no key is left out:
        see `leaves_out`. Shapes: each (batch or 1, pairs).
        """
        (_, at_first), (_, at_last) = self._overlapping(first), self._overlapping(last)
        bounds = [Bounds(a.lo, b.hi) for a, b in zip(at_first, at_last, strict=True)]
        return [self._clamped(lo, hi) for lo, hi in self._intersected(bounds, first)]

    def leaves_out(self, step: Int[Tensor, " pairs"]) -> Bool[Tensor, " pairs"]:
        """Whether rows so far apart may see two keys and none of those between."""
        if self.key_intervals is not None:
            return torch.ones_like(step, dtype=torch.bool)
        left, right = self._reach
        return step > (torch.inf if left is None or right is None else left + right + 1)

    def rows_seeing(self, start: Int[Tensor, " runs"], stop: Int[Tensor, " runs"]) -> list[Bounds]:
        """The rows that see some key j with start <= j < stop, `parts` intervals for each run; they may overlap.

        The keys of a run are of one document; without `key_intervals`. Shapes: each (batch or 1, runs).
        """
        assert self.key_intervals is None, "rows with keys of their own are asked one by one"
        row, row_end, shift, first, end = self._documents_of_keys(start)
        start, stop = torch.maximum(start, first), torch.minimum(stop, end)
        left, right = self._reach
        lo = row if right is None else torch.maximum(row, start - right - shift)
        hi = row_end if left is None else torch.minimum(row_end, stop + left - shift)
        found = [(lo, hi)]
        if self.parts == 2:
            tokens = torch.maximum(row, start - shift) if self.causal else row
            of_tokens = torch.where(start < first + self.sink_tokens, tokens, row_end)
            if self.prefix is not None:
                prefix = first + self.prefix.to(first).view(-1, 1)
                of_tokens = torch.where(start < prefix, row, of_tokens)
            found.append((of_tokens, row_end))
        empty = start >= stop
        return [Bounds(*torch.broadcast_tensors(lo, hi.masked_fill(empty, 0))) for lo, hi in found]

    def diagonal(self, rows: Int[Tensor, " rows"]) -> Rows:
        """Each row's own position, as a global key index: what distances are measured from."""
        return self._documents(rows)[2]

    @property
    def _reach(self) -> tuple[int | None, int | None]:
        """How many keys before a row's own position it sees, and how many behind that; None is all."""
        left, right = self.window
        return left, 0 if self.causal else right

    def _overlapping(self, rows: Tensor) -> tuple[Rows, list[Bounds]]:
        """Each row's first permitted key, then its intervals: the first keys and the others, which may overlap."""
        first, end, diagonal = self._permitted(rows)
        left, right = self._reach
        lo = first if left is None else torch.maximum(first, diagonal - left)
        hi = end if right is None else torch.minimum(end, diagonal + right + 1)
        others = Bounds(torch.minimum(lo, end), torch.maximum(hi, first))
        if self.parts == 1:
            return first, [others]
        past = torch.minimum(end, diagonal + 1) if self.causal else end
        head = torch.minimum(first + self.sink_tokens, past)
        if self.prefix is not None:
            head = torch.maximum(head, first + self.prefix.to(first).view(-1, 1))
        return first, [Bounds(first, torch.maximum(torch.minimum(head, end), first)), others]

    def _intersected(self, bounds: list[Bounds], rows: Tensor) -> list[Bounds]:
        if self.key_intervals is None:
            return bounds
        lo, hi = (bound.to(rows.device)[:, rows] for bound in self.key_intervals)
        return [Bounds(torch.maximum(one.lo, lo), torch.minimum(one.hi, hi)) for one in bounds]

    def _clamped(self, lo: Tensor, hi: Tensor) -> Bounds:
        lo, hi = torch.broadcast_tensors(lo.clamp(0, self.kv_len), hi.clamp(0, self.kv_len))
        return Bounds(lo, torch.maximum(lo, hi))

    def _permitted(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's first and last permitted key, by document and key_range, and its own position."""
        first, end, diagonal = self._documents(rows)
        return *self._in_range(first, end), diagonal


def _check_documents(name: str, ends: Tensor, length: int, what: str) -> None:
    if ends.ndim != 1 or len(ends) < 2:
        raise ValueError(f"{name} must be (documents + 1,): got {tuple(ends.shape)}.")
    if int(ends[0]) != 0 or int(ends[-1]) != length or bool((ends.diff() < 0).any()):
        raise ValueError(
            f"{name} must rise from 0 to {length}, the number of {what} of all ranks together: "
            f"got {int(ends[0])} ... {int(ends[-1])}."
        )
