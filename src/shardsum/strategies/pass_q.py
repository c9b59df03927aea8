"""Keys and values stay, queries go round: their partial states travel one hop behind them, and return home.

Like `all_reduce` for sharded queries, with one neighbour's rows in memory at a time in place of all ranks'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import circulate, pack, unpack
from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..state import AttentionState, merge
from .all_reduce import AllReduce
from .base import Call, Strategy, pack_gradient, unpack_gradient


class PassQ(Strategy):
    """Attend with the queries at hand while the next ones arrive from the neighbour.

    Replicated queries are everywhere already: there it is `all_reduce`.
    Source: Yang et al. 2024 (context parallelism for scalable million-token inference, section 3.4: ring pass-Q).
    """

    name = "pass_q"

    def forward(self, call: Call) -> AttentionState:
        if call.q_replicated:
            return AllReduce().forward(call)

        def visit(owner: int, held: Sequence[Tensor]) -> Sequence[Tensor]:
            return [pack(call.partial(held[0], call.k, call.v, rows_of=owner, keys_of=call.comm.rank))]

        def combine(owner: int, arrived: Sequence[Tensor], found: Sequence[Tensor]) -> Sequence[Tensor]:
            return [pack(merge(unpack(arrived[0]), unpack(found[0])))]

        def result_shapes(owner: int) -> Sequence[Sequence[int]]:
            return [call.row_shape(owner, call.v.shape[3] + 1)]

        own, others = circulate(
            call.comm,
            (call.q,),
            visit,
            lambda owner: [call.q_shape(owner)],
            combine=combine,
            result_shapes=result_shapes,
        )
        return merge(unpack(own[0]), unpack(others[0])) if others else unpack(own[0])

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        d_k: list[Tensor] = []
        d_v: list[Tensor] = []
        rows = pack_gradient(gradient)

        def visit(owner: int, held: Sequence[Tensor]) -> Sequence[Tensor]:
            q, row = held
            found = call.partial_backward(
                q, call.k, call.v, unpack_gradient(row), rows_of=owner, keys_of=call.comm.rank
            )
            d_k[:] = [found.k + d_k[0] if d_k else found.k]
            d_v[:] = [found.v + d_v[0] if d_v else found.v]
            return [found.q]

        own, others = circulate(
            call.comm,
            (call.q, rows),
            visit,
            lambda owner: [call.q_shape(owner), call.row_shape(owner, rows.shape[3])],
            combine=lambda owner, arrived, found: [torch.add(arrived[0], found[0])],
            result_shapes=lambda owner: [call.q_shape(owner)],
        )
        return Gradients(torch.add(own[0], others[0]) if others else own[0], d_k[0], d_v[0])

    def _traffic(self, call: Call) -> Traffic:
        if call.q_replicated:
            return AllReduce().traffic(call)
        size, rank = call.comm.size, call.comm.rank
        queries = sum(_q_bytes(call, (rank - hop) % size) for hop in range(size - 1))
        states = sum(call.state_bytes((rank - hop) % size) for hop in range(1, size))
        return Traffic(queries + states, 2 * (size - 1), 2 * (size - 1))

    def _traffic_backward(self, call: Call) -> Traffic:
        size, rank = call.comm.size, call.comm.rank
        sent = 0
        for hop in range(size - 1):
            owner = (rank - hop) % size
            sent += _q_bytes(call, owner) + call.row_bytes(owner, call.v.shape[3] + 2)
        returned = sum(call.row_bytes((rank - hop) % size, call.q.shape[3]) for hop in range(1, size))
        return Traffic(sent + returned, 3 * (size - 1), 3 * (size - 1))


def _q_bytes(call: Call, owner: int) -> int:
    return torch.Size(call.q_shape(owner)).numel() * call.q.element_size()
