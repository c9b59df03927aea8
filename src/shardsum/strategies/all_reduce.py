"""Keys and values stay where they are: queries go to them, and the partial states are merged.

What decoding wants: a few queries against a cache that is too large to move. Replicated queries need one
collective, an all-reduce of states. Sharded queries are gathered first, and each rank gets back its own rows.
"""

from __future__ import annotations

import functools

from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..state import AttentionState
from .base import Strategy, pack_gradient, unpack_gradient
from .call import Call
from .order import added, reduce_states, scatter_states, scatter_sums, total


class AllReduce(Strategy):
    """Merge the states that every rank computes over its own keys.

    Source: Shyam et al. 2024 (tree attention, section 5), with one (out, lse) pair in place of three reductions.
    """

    name = "all_reduce"
    keys_stay = True

    def forward(self, call: Call) -> AttentionState:
        comm = call.comm
        if call.q_replicated:
            state = call.partial(call.q, call.k, call.v, rows_of=comm.rank, keys_of=comm.rank)
            return reduce_states(call, state)
        queries = comm.all_gather(call.q, [call.q_shape(rank) for rank in range(comm.size)])
        states = [
            call.partial(q, call.k, call.v, rows_of=rank, keys_of=comm.rank) for rank, q in enumerate(queries)
        ]
        return scatter_states(call, states)

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        comm, ranks = call.comm, range(call.comm.size)
        queries = comm.all_gather(call.q, [call.q_shape(rank) for rank in ranks])
        packed = pack_gradient(gradient)
        rows = comm.all_gather(packed, [call.row_shape(rank, packed.shape[3]) for rank in ranks])
        parts = [
            call.partial_backward(q, call.k, call.v, unpack_gradient(row), rows_of=rank, keys_of=comm.rank)
            for rank, (q, row) in enumerate(zip(queries, rows, strict=True))
        ]
        d_kv = total(functools.reduce(added, [part.kv for part in parts]))
        return Gradients(scatter_sums(call, [part.q for part in parts]), *call.halves(d_kv))

    def _traffic(self, call: Call) -> Traffic:
        rank, others = call.comm.rank, [r for r in range(call.comm.size) if r != call.comm.rank]
        if call.q_replicated:
            rows, row_bytes = call.q.shape[:3].numel(), call.state_bytes(rank)
            if call.reproducible:
                return Traffic(row_bytes * len(others), len(others), 1)
            return call.collective.traffic(call.collective.ranks(call.comm), rows, row_bytes // max(1, rows))
        states_bytes = sum(call.state_bytes(other) for other in others)
        return Traffic(call.q.nbytes * len(others) + states_bytes, 2 * len(others), 2)

    def _traffic_backward(self, call: Call) -> Traffic:
        others = [r for r in range(call.comm.size) if r != call.comm.rank]
        sent = (call.q.nbytes + call.row_bytes(call.q.shape[2], call.v.shape[3] + 2)) * len(others)
        returned = sum(call.row_bytes(len(call.queries.positions[other]), call.q.shape[3]) for other in others)
        returned *= len(call.key_nodes().of_rank[call.comm.rank])
        return Traffic(sent + returned, 3 * len(others), 3)
