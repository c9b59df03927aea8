"""Keys and values stay, queries go round: their partial states travel one hop behind them, and return home.

Like `all_reduce` for sharded queries, with one neighbour's rows in memory at a time in place of all ranks'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import pack, unpack
from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..state import AttentionState, merge
from .all_reduce import AllReduce
from .base import Call, Strategy, pack_gradient, unpack_gradient
from .circulation import circulate, item_bytes


class PassQ(Strategy):
    """Attend with the queries at hand while the next ones arrive from the neighbour.

    Replicated queries are everywhere already: there it is `all_reduce`.
    Source: Yang et al. 2024 (context parallelism for scalable million-token inference, section 3.4: ring pass-Q).
    """

    name = "pass_q"

    def forward(self, call: Call) -> AttentionState:
        if call.q_replicated:
            return AllReduce().forward(call)

        def visit(owner: int, rows: Tensor, held: Sequence[Tensor]) -> Tensor:
            return pack(call.partial(held[0], call.k, call.v, rows_of=owner, keys_of=call.comm.rank, rows=rows))

        def combine(a: Tensor, b: Tensor) -> Tensor:
            return pack(merge(unpack(a), unpack(b)))

        own = circulate(call.comm, call.row_route(), (call.q,), visit, combine)
        assert own is not None
        return unpack(own)

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        d_k: list[Tensor] = []
        d_v: list[Tensor] = []

        def visit(owner: int, rows: Tensor, held: Sequence[Tensor]) -> Tensor:
            q, row = held
            found = call.partial_backward(
                q, call.k, call.v, unpack_gradient(row), rows_of=owner, keys_of=call.comm.rank, rows=rows
            )
            d_k[:] = [found.k + d_k[0] if d_k else found.k]
            d_v[:] = [found.v + d_v[0] if d_v else found.v]
            return found.q

        own = circulate(call.comm, call.row_route(), (call.q, pack_gradient(gradient)), visit, torch.add)
        assert own is not None
        return Gradients(own, d_k[0], d_v[0])

    def _traffic(self, call: Call) -> Traffic:
        if call.q_replicated:
            return AllReduce().traffic(call)
        route, rank = call.row_route(), call.comm.rank
        return route.sent(rank, [item_bytes(call.q)]) + route.returned(
            rank, call.row_bytes(1, call.v.shape[3] + 1)
        )

    def _traffic_backward(self, call: Call) -> Traffic:
        route, rank = call.row_route(), call.comm.rank
        sent = route.sent(rank, [item_bytes(call.q), call.row_bytes(1, call.v.shape[3] + 2)])
        return sent + route.returned(rank, call.row_bytes(1, call.q.shape[3]))
