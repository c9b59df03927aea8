"""Keys and values stay, queries go round: their partial states travel one hop behind them, and return home.

Like `all_reduce` for sharded queries, with one neighbour's rows in memory at a time in place of all ranks'.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..collectives import Collective
from ..comm import Traffic
from ..geometry import key_nodes, row_route, state_nodes
from ..kernels import Gradients, OutputGradient
from ..partials import STATES, SUMS, Partial, union
from ..problem import Problem
from ..state import AttentionState
from .all_reduce import AllReduce
from .base import Strategy, pack_gradient, unpack_gradient
from .call import Call
from .circulation import circulate


class PassQ(Strategy):
    """Attend with the queries at hand while the next ones arrive from the neighbour.

    Replicated queries are everywhere already: there it is `all_reduce`.
    Source: Yang et al. 2024 (context parallelism for scalable million-token inference, section 3.4: ring pass-Q).
    """

    name = "pass_q"
    keys_stay = True

    def forward(self, call: Call) -> AttentionState:
        if call.problem.q_replicated:
            return AllReduce().forward(call)
        table = state_nodes(call.problem).table
        combine = STATES.combine_tables(call.problem.reproducible)
        own: list[Partial[AttentionState]] = []

        def visit(owner: int, rows: Tensor, held: Sequence[Tensor]) -> Tensor:
            state = call.partial_of_blocks(held[0], rows_of=owner, rows=rows)
            if owner == call.comm.rank:
                own.append(state)
            return state.to_table(table)

        numbers = circulate(call.comm, row_route(call.problem), (call.q,), visit, combine)
        return own[0].from_numbers(numbers, table).total()

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        table, rank = key_nodes(call.problem).table, call.comm.rank
        combine = SUMS.combine_tables(call.problem.reproducible)
        d_q: list[Partial[Tensor]] = []
        d_kv: list[Partial[Tensor]] = []

        def visit(owner: int, rows: Tensor, held: Sequence[Tensor]) -> Tensor:
            q, row = held
            found = call.partial_backward(
                q, call.dense, unpack_gradient(row), rows_of=owner, keys_of=rank, rows=rows
            )
            d_kv[:] = [union([*d_kv, found.kv])]
            if owner == rank:
                d_q.append(found.q)
            return found.q.to_table(table)

        shard = (call.q, pack_gradient(gradient))
        numbers = circulate(call.comm, row_route(call.problem), shard, visit, combine)
        return Gradients(d_q[0].from_numbers(numbers, table).total(), *call.halves(d_kv[0].total()))

    def memory_bytes(self, problem: Problem, rank: int) -> int:
        if problem.q_replicated:
            return AllReduce().memory_bytes(problem, rank)
        # Rows that are here, that arrive and that leave, and their states.
        rows = 3 * max(problem.queries.lengths)
        state = problem.row_bytes(1, problem.v_dim + 1) * state_nodes(problem).table_count
        return problem.q_bytes(rows) + rows * state

    def _traffic(self, problem: Problem, rank: int, collective: Collective) -> Traffic:
        if problem.q_replicated:
            return AllReduce().traffic(problem, rank, collective)
        route, width = row_route(problem), (problem.v_dim + 1) * state_nodes(problem).table_count
        return route.sent(rank, [problem.q_bytes(1)]) + route.returned(rank, problem.row_bytes(1, width))

    def _traffic_backward(self, problem: Problem, rank: int) -> Traffic:
        route, width = row_route(problem), problem.head_dim * key_nodes(problem).table_count
        sent = route.sent(rank, [problem.q_bytes(1), problem.row_bytes(1, problem.v_dim + 2)])
        return sent + route.returned(rank, problem.row_bytes(1, width))
