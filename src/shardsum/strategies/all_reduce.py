"""Keys and values stay where they are: queries go to them, and the partial states are merged.

What decoding wants: a few queries against a cache that is too large to move. Replicated queries need one
collective, an all-reduce of states. Sharded queries are gathered first, and each rank gets back its own rows.
"""

from __future__ import annotations

from ..collectives import Collective
from ..comm import Ranks, Traffic
from ..geometry import key_nodes, state_nodes
from ..kernels import Gradients, OutputGradient
from ..partials import total
from ..problem import Problem
from ..state import AttentionState
from .base import Strategy, pack_gradient, unpack_gradient
from .call import Call
from .sums import reduce_states, scatter_states, scatter_sums


class AllReduce(Strategy):
    """Merge the states that every rank computes over its own keys.

    Source: Shyam et al. 2024 (tree attention, section 5), with one (out, lse) pair in place of three reductions.
    """

    name = "all_reduce"
    keys_stay = True

    def suits(self, problem: Problem) -> str | None:
        return "queries are replicated, so only states have to travel" if problem.q_replicated else None

    def forward(self, call: Call) -> AttentionState:
        comm, problem = call.comm, call.problem
        if problem.q_replicated:
            return reduce_states(call, call.partial_of_blocks(call.q, rows_of=comm.rank))
        queries = comm.all_gather(call.q, [problem.q_shape(rank) for rank in range(comm.size)])
        states = [call.partial_of_blocks(q, rows_of=rank) for rank, q in enumerate(queries)]
        return scatter_states(call, states)

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        comm, problem, ranks = call.comm, call.problem, range(call.comm.size)
        queries = comm.all_gather(call.q, [problem.q_shape(rank) for rank in ranks])
        packed = pack_gradient(gradient)
        rows = comm.all_gather(packed, [problem.row_shape(rank, packed.shape[3]) for rank in ranks])
        parts = [
            call.partial_backward(q, call.dense, unpack_gradient(row), rows_of=rank, keys_of=comm.rank)
            for rank, (q, row) in enumerate(zip(queries, rows, strict=True))
        ]
        d_q = scatter_sums(call, [part.q for part in parts])
        return Gradients(d_q, *call.halves(total(part.kv for part in parts)))

    def memory_bytes(self, problem: Problem, rank: int) -> int:
        state = problem.row_bytes(1, problem.v_dim + 1) * state_nodes(problem).count(rank)
        if problem.q_replicated:
            return 2 * problem.q_len(rank) * state
        rows = problem.queries.length
        return problem.q_bytes(rows) + (rows + problem.size * problem.q_len(rank)) * state

    def _traffic(self, problem: Problem, rank: int, collective: Collective) -> Traffic:
        others, own = problem.size - 1, problem.q_len(rank)
        state = problem.row_bytes(1, problem.v_dim + 1)
        if problem.q_replicated:
            if problem.reproducible:
                return Traffic(own * state * state_nodes(problem).count(rank) * others, others, 1)
            rows = problem.batch * problem.q_heads * own
            row_bytes = (problem.v_dim + 1) * problem.sum_bytes
            return collective.traffic(Ranks(rank, problem.size, problem.hosts), rows, row_bytes)
        states = (problem.queries.length - own) * state * state_nodes(problem).count(rank)
        return Traffic(problem.q_bytes(own) * others + states, 2 * others, 2)

    def _traffic_backward(self, problem: Problem, rank: int) -> Traffic:
        others, own = problem.size - 1, problem.q_len(rank)
        sent = (problem.q_bytes(own) + problem.row_bytes(own, problem.v_dim + 2)) * others
        returned = problem.row_bytes(problem.queries.length - own, problem.head_dim) * key_nodes(problem).count(
            rank
        )
        return Traffic(sent + returned, 3 * others, 3)
