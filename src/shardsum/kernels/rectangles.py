"""Cutting any set of row intervals into pieces that a fused attention operator can compute.

A fused operator knows three masks: none, causal from the top left corner, and a dense matrix. Every interval
mask is a union of such pieces, and a union is a merge.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

# Rows that follow no simple rule are taken this many at a time: each block computes at most this many masked
# keys on either side of the keys that all its rows see. 256 is also ATen's own block of queries.
BLOCK_ROWS = 256
# A shorter regular run costs less inside a block than as operator calls of its own.
SHORTEST_RUN = 64


class Piece(NamedTuple):
    """Rows [row, row_end) over keys [key, key_end): all of them, causal from the top left, or as `lo, hi` say."""

    kind: str  # "full" | "causal" | "masked"
    row: int
    row_end: int
    key: int
    key_end: int


def pieces(lo: Int[Tensor, " rows"], hi: Int[Tensor, " rows"]) -> Iterator[Piece]:
    """Disjoint pieces that together hold every (row, key) with lo <= key < hi, and for "masked" some others."""
    for row, row_end, regular in _runs(lo, hi):
        if regular:
            yield from _regular(lo, hi, row, row_end)
        else:
            for start in range(row, row_end, BLOCK_ROWS):
                yield from _block(lo, hi, start, min(start + BLOCK_ROWS, row_end))


def _runs(lo: Tensor, hi: Tensor) -> Iterator[tuple[int, int, bool]]:
    """Runs of rows: regular ones (lo constant, hi constant or rising by one), and the rest lumped together."""
    rows = len(lo)
    if rows == 0:
        return
    rise = hi.diff()
    step = torch.where((lo.diff() == 0) & ((rise == 0) | (rise == 1)), rise, -1)
    changes = (step.diff() != 0).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), rows - 1]
    lump = 0  # where the rows that no regular run has taken begin
    taken = 0
    for first, last in itertools.pairwise(edges):
        start, end = max(first, taken), last + 1
        regular = rows == 1 or int(step[first]) >= 0
        if regular and (end - start >= SHORTEST_RUN or end - start == rows):
            if lump < start:
                yield lump, start, False
            yield start, end, True
            lump = taken = end
    if lump < rows:
        yield lump, rows, False


def _regular(lo: Tensor, hi: Tensor, row: int, row_end: int) -> Iterator[Piece]:
    """A rectangle of keys that all rows see, then a triangle."""
    key, shared_end, key_end = int(lo[row]), int(hi[row]), int(hi[row_end - 1])
    if key_end == shared_end:
        if key < key_end:
            yield Piece("full", row, row_end, key, key_end)
        return
    if key == shared_end:  # the first row sees nothing
        row, shared_end = row + 1, shared_end + 1
    if key < shared_end - 1:
        yield Piece("full", row, row_end, key, shared_end - 1)
    yield Piece("causal", row, row_end, shared_end - 1, key_end)


def _block(lo: Tensor, hi: Tensor, row: int, row_end: int) -> Iterator[Piece]:
    """The keys that all rows of the block see without a mask, those on either side with one."""
    lo, hi = lo[row:row_end], hi[row:row_end]
    seeing = lo < hi
    if not bool(seeing.any()):
        return
    first, last = int(lo[seeing].min()), int(hi[seeing].max())
    shared, shared_end = int(lo.max()), int(hi.min())
    if shared_end - shared < BLOCK_ROWS or not bool(seeing.all()):
        yield Piece("masked", row, row_end, first, last)
        return
    if first < shared:
        yield Piece("masked", row, row_end, first, shared)
    yield Piece("full", row, row_end, shared, shared_end)
    if shared_end < last:
        yield Piece("masked", row, row_end, shared_end, last)
