"""Keys and values stay, queries go round: their partial states travel one hop behind them, and return home.

Like `all_reduce` for sharded queries, with one neighbour's rows in memory at a time in place of all ranks'.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..state import AttentionState
from .all_reduce import AllReduce
from .base import Strategy, pack_gradient, unpack_gradient
from .call import Call
from .circulation import circulate, item_bytes
from .order import State, Sum, added, in_table, joined_states, off_wire, total, whole


class PassQ(Strategy):
    """Attend with the queries at hand while the next ones arrive from the neighbour.

    Replicated queries are everywhere already: there it is `all_reduce`.
    Source: Yang et al. 2024 (context parallelism for scalable million-token inference, section 3.4: ring pass-Q).
    """

    name = "pass_q"

    def forward(self, call: Call) -> AttentionState:
        if call.q_replicated:
            return AllReduce().forward(call)

        nodes = call.state_nodes()
        states: list[State] = []

        def visit(owner: int, rows: Tensor, held: Sequence[Tensor]) -> Tensor:
            state = call.partial(held[0], call.k, call.v, rows_of=owner, keys_of=call.comm.rank, rows=rows)
            if owner == call.comm.rank:
                states.append(state)
            return in_table(state, nodes)

        table = circulate(call.comm, call.row_route(), (call.q,), visit, joined_states(call.reproducible))
        assert table is not None
        return whole(off_wire(table, nodes.table, states[0]))

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        nodes = call.key_nodes()
        d_q: list[Sum] = []
        d_kv: list[Sum] = []

        def visit(owner: int, rows: Tensor, held: Sequence[Tensor]) -> Tensor:
            q, row = held
            found = call.partial_backward(
                q, call.k, call.v, unpack_gradient(row), rows_of=owner, keys_of=call.comm.rank, rows=rows
            )
            d_kv[:] = [functools.reduce(added, [*d_kv, found.kv])]
            if owner == call.comm.rank:
                d_q.append(found.q)
            return in_table(found.q, nodes)

        table = circulate(call.comm, call.row_route(), (call.q, pack_gradient(gradient)), visit, torch.add)
        assert table is not None
        return Gradients(total(off_wire(table, nodes.table, d_q[0])), *call.halves(total(d_kv[0])))

    def _traffic(self, call: Call) -> Traffic:
        if call.q_replicated:
            return AllReduce().traffic(call)
        route, rank = call.row_route(), call.comm.rank
        return route.sent(rank, [item_bytes(call.q)]) + route.returned(
            rank, call.row_bytes(len(call.state_nodes().table), call.v.shape[3] + 1)
        )

    def _traffic_backward(self, call: Call) -> Traffic:
        route, rank = call.row_route(), call.comm.rank
        sent = route.sent(rank, [item_bytes(call.q), call.row_bytes(1, call.v.shape[3] + 2)])
        return sent + route.returned(rank, call.row_bytes(len(call.key_nodes().table), call.q.shape[3]))
