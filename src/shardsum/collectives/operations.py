"""What an all-reduce can reduce by: the merge of packed attention states, the sum, the maximum."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..packed import StateOperation, merge_packed, merger
from ..state import AttentionState


@dataclass(frozen=True)
class Operation:
    """An associative, commutative operation on tensors of rows: `combine(a, b, into)`, where `into` may be a or b.

    Rows are what a collective may cut between; all three tensors are contiguous and of one shape (rows, width).
    """

    name: str
    combine: Callable[[Tensor, Tensor, Tensor], None]


def _add(a: Tensor, b: Tensor, into: Tensor) -> None:
    torch.add(a, b, out=into)


def _maximum(a: Tensor, b: Tensor, into: Tensor) -> None:
    torch.maximum(a, b, out=into)


MERGE = Operation("merge", merge_packed)
SUM = Operation("sum", _add)
MAXIMUM = Operation("maximum", _maximum)


def combine_all(pieces: Sequence[Tensor], operation: Operation, into: Tensor) -> None:
    """Write all pieces combined to `into`, which may be one of them: pairwise along one fixed binary tree.

    The pieces are working memory. Numerics: the tree depends only on the number of pieces, so equal pieces give
    equal bits on every rank.
    """
    if len(pieces) == 1:
        if pieces[0] is not into:
            into.copy_(pieces[0])
        return
    *inner, (a, b) = _tree(len(pieces))
    for i, j in inner:
        operation.combine(pieces[i], pieces[j], pieces[i])
    operation.combine(pieces[a], pieces[b], into)


def merger_of_all(pieces: Sequence[Tensor]) -> StateOperation:
    """What writes the merge of two or more pieces to a contiguous state: what `combine_all` makes of them."""
    *inner, (a, b) = _tree(len(pieces))
    merge_last = merger(pieces[a], pieces[b])

    def merge_all(state: AttentionState) -> None:
        for i, j in inner:
            merge_packed(pieces[i], pieces[j], pieces[i])
        merge_last(state)

    return merge_all


@functools.lru_cache
def _tree(pieces: int) -> list[tuple[int, int]]:
    """Which two are combined, in this order, and take the place of the first."""
    steps = [1 << level for level in range((pieces - 1).bit_length())]
    return [(i, i + step) for step in steps for i in range(0, pieces - step, 2 * step)]
