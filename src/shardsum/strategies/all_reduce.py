"""Keys and values stay where they are: queries go to them, and the partial states are merged.

What decoding wants: a few queries against a cache that is too large to move. Replicated queries need one
collective, an all-reduce of states. Sharded queries are gathered first, and each rank gets back its own rows.
"""

from __future__ import annotations

from ..collectives import all_reduce_states, reduce_scatter_states
from ..comm import Traffic
from ..state import AttentionState
from .base import Call, Strategy


class AllReduce(Strategy):
    """Merge the states that every rank computes over its own keys.

    Source: Shyam et al. 2024 (tree attention, section 5), with one (out, lse) pair in place of three reductions.
    """

    name = "all_reduce"

    def forward(self, call: Call) -> AttentionState:
        comm = call.comm
        if call.q_replicated:
            state = call.partial(call.q, call.k, call.v, rows_of=comm.rank, keys_of=comm.rank)
            return all_reduce_states(comm, state)
        queries = comm.all_gather(call.q, [call.q_shape(rank) for rank in range(comm.size)])
        states = [
            call.partial(q, call.k, call.v, rows_of=rank, keys_of=comm.rank) for rank, q in enumerate(queries)
        ]
        return reduce_scatter_states(comm, states)

    def traffic(self, call: Call) -> Traffic:
        rank, others = call.comm.rank, [r for r in range(call.comm.size) if r != call.comm.rank]
        if not others:
            return Traffic()
        if call.q_replicated:
            return Traffic(call.state_bytes(rank) * len(others), len(others), 1)
        states_bytes = sum(call.state_bytes(other) for other in others)
        return Traffic(call.q.nbytes * len(others) + states_bytes, 2 * len(others), 2)
