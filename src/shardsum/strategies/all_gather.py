"""Queries stay, keys and values are gathered: the simplest strategy for prefill, at the price of memory."""

from __future__ import annotations

import functools

from ..comm import Traffic
from ..state import AttentionState, merge
from .base import Call, Strategy


class AllGather(Strategy):
    """Gather every rank's keys and values, then attend to them shard by shard in rank order.

    Source: Llama Team 2024 (The Llama 3 herd of models, section 3.3.2: all-gather based context parallelism).
    """

    name = "all_gather"

    def forward(self, call: Call) -> AttentionState:
        comm, ranks = call.comm, range(call.comm.size)
        keys = comm.all_gather(call.k, [call.k_shape(rank) for rank in ranks])
        values = comm.all_gather(call.v, [call.v_shape(rank) for rank in ranks])
        states = (
            call.partial(call.q, keys[rank], values[rank], rows_of=comm.rank, keys_of=rank) for rank in ranks
        )
        return functools.reduce(merge, states)

    def traffic(self, call: Call) -> Traffic:
        others = call.comm.size - 1
        return Traffic(call.kv_bytes(call.comm.rank) * others, 2 * others, 2 * (others > 0))
