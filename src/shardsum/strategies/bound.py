"""The least that must travel: what a strategy's traffic is to be seen beside."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import intervals
from ..problem import Problem


def lower_bound_bytes(problem: Problem, rank: int) -> int:
    """Bytes of the keys and values that some query row of `rank` sees and that it does not hold.

    No strategy in which rows stay and keys travel can bring this rank less in its forward pass. Counted key by
    key and for each sequence of the batch, where strategies send slices. Rows that travel may cost less, or more.
    """
    seen = _seen_keys(problem, rank)
    seen[:, problem.keys.positions(rank)] = False
    sequences = problem.batch // seen.shape[0]
    return int(seen.sum()) * sequences * problem.kv_bytes(1) // problem.batch


def _seen_keys(problem: Problem, rank: int) -> Tensor:
    """Which keys some row of a rank sees: (batch or 1, all keys), bool."""
    bounds = intervals(problem, rank)
    batch = max(one.lo.shape[0] for one in bounds)
    changes = torch.zeros(batch, problem.mask.kv_len + 1, dtype=torch.int64)
    for lo, hi in bounds:
        for bound, change in ((lo, 1), (hi, -1)):
            changes.scatter_add_(1, bound.expand(batch, -1), torch.full((batch, bound.shape[1]), change))
    return changes.cumsum(dim=1)[:, :-1] > 0
