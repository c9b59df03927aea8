"""What an all-reduce can reduce by: the merge of packed attention states, the sum, the maximum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.merging import merge_into, merge_packed
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
    if len(pieces) > 1:
        operation.combine(*_last_two(pieces, operation), into)
    elif pieces[0] is not into:
        into.copy_(pieces[0])


def merge_all(pieces: Sequence[Tensor], state: AttentionState) -> None:
    """Write the merge of two or more pieces to a contiguous state: what `combine_all` makes of them."""
    merge_into(*_last_two(pieces, MERGE), state)


def _last_two(pieces: Sequence[Tensor], operation: Operation) -> tuple[Tensor, Tensor]:
    """What the tree's root combines."""
    step = 1
    while 2 * step < len(pieces):
        for i in range(0, len(pieces) - step, 2 * step):
            operation.combine(pieces[i], pieces[i + step], pieces[i])
        step *= 2
    return pieces[0], pieces[step]
