"""The least that must travel: what a strategy's traffic is to be seen beside."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call


def lower_bound_bytes(call: Call, rank: int) -> int:
    """Bytes of the keys and values that some query row of `rank` sees and that it does not hold.

    No strategy in which rows stay and keys travel can bring this rank less in its forward pass. Counted key by
    key and for each sequence of the batch, where strategies send slices. Rows that travel may cost less, or more.
    """
    own = call.keys.positions[rank]
    numbers = call.k.shape[1] * (call.k.shape[3] + call.v.shape[3])
    seen = _seen_keys(call, rank)
    seen[:, own] = False
    return int(seen.sum()) * (call.k.shape[0] // seen.shape[0]) * numbers * call.k.element_size()


def _seen_keys(call: Call, rank: int) -> Tensor:
    """Which keys some row of a rank sees: (batch or 1, all keys), bool."""
    intervals = call.mask.intervals(call.queries.positions[rank])
    batch = max(lo.shape[0] for lo, _ in intervals)
    changes = torch.zeros(batch, call.keys.length + 1, dtype=torch.int64)
    for lo, hi in intervals:
        for bound, change in ((lo, 1), (hi, -1)):
            changes.scatter_add_(1, bound.expand(batch, -1), torch.full((batch, bound.shape[1]), change))
    return changes.cumsum(dim=1)[:, :-1] > 0
