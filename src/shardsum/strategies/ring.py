"""Queries stay, keys and values go round: at most two shards on a rank, and the next one travels meanwhile."""

from __future__ import annotations

import functools

from ..comm import Traffic
from ..state import AttentionState, merge
from .base import Call, Strategy


class Ring(Strategy):
    """Attend to the shard at hand while the next one arrives from the neighbour.

    Source: Liu, Zaharia, Abbeel 2023 (ring attention, section 3).
    """

    name = "ring"

    def forward(self, call: Call) -> AttentionState:
        comm = call.comm
        to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        k, v = call.k, call.v
        total: AttentionState | None = None
        by_source: dict[int, AttentionState] = {}
        for hop in range(comm.size):
            held, coming = (comm.rank - hop) % comm.size, (comm.rank - hop - 1) % comm.size
            arriving = []
            if hop < comm.size - 1:
                arriving = [
                    comm.exchange(k, to, source, call.k_shape(coming)),
                    comm.exchange(v, to, source, call.v_shape(coming)),
                ]
            state = call.partial(call.q, k, v, rows_of=comm.rank, keys_of=held)
            if call.q_replicated:
                by_source[held] = state
            else:
                total = state if total is None else merge(total, state)
            if arriving:
                k, v = (wait() for wait in arriving)
        if total is not None:
            return total
        # Every rank holds these rows: it must merge in the same order as the others to get the same bits.
        return functools.reduce(merge, (by_source[rank] for rank in range(comm.size)))

    def traffic(self, call: Call) -> Traffic:
        size, rank = call.comm.size, call.comm.rank
        passed_on = sum(call.kv_bytes((rank - hop) % size) for hop in range(size - 1))
        return Traffic(passed_on, 2 * (size - 1), 2 * (size - 1))
