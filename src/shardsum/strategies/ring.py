"""Queries stay, keys and values go round, some heads at a time, and the next ones travel meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import Dense
from ..collectives import Collective, slices
from ..comm import Traffic
from ..geometry import key_route, row_nodes
from ..kernels import Gradients, OutputGradient
from ..partials import SUMS, Partial, total, union
from ..problem import Problem, state_dtype
from ..state import AttentionState
from .base import Strategy
from .call import Call
from .circulation import circulate

PIECE_BYTES = 1 << 22


class Ring(Strategy):
    """Attend to the shard at hand while the next one arrives from a neighbour. A key goes only as far as ranks
    may see it, up or down the ring, whichever is less. In the backward pass dK and dV travel one hop behind, and
    home from where their key ends. Heads are sums of their own, so a shard goes round some heads at a time:
    `piece_bytes` of keys and values, or one KV head. A rank holds a few times that beside its own shard.

    Source: Liu, Zaharia, Abbeel 2023 (ring attention, section 3).
    """

    name = "ring"
    rows_stay = True

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        if piece_bytes < 1:
            raise ValueError(f"piece_bytes must be positive: got {piece_bytes}.")
        self._piece_bytes = piece_bytes
        if piece_bytes != PIECE_BYTES:
            self.name = f"ring, pieces of {piece_bytes} bytes"

    def suits(self, problem: Problem) -> str | None:
        return "keys and values are too large to gather"

    def forward(self, call: Call) -> AttentionState:
        pieces = self._pieces(call.problem)
        if len(pieces) == 1:
            return self._forward(call)
        q, v_dim = call.q, call.problem.v_dim
        state = AttentionState.empty(*q.shape[:3], v_dim, dtype=state_dtype(q.dtype), device=q.device)
        for heads in pieces:
            found, rows = self._forward(call.heads(heads)), call.q_heads(heads)
            state.out[:, rows], state.lse[:, rows] = found.out, found.lse
        return state

    def _forward(self, call: Call) -> AttentionState:
        rank = call.comm.rank
        states: dict[int, Partial[AttentionState]] = {}

        def visit(owner: int, keys: Tensor, held: Sequence[Tensor]) -> Tensor:
            state = call.partial(call.q, Dense(*held), rows_of=rank, keys_of=owner, keys=keys)
            # Every rank holds replicated rows: it must merge in the same order as the others to get the same bits.
            place = owner if call.problem.q_replicated else rank
            states[place] = union([states[place], state]) if place in states else state
            return call.q[:, :, :0]

        circulate(call.comm, key_route(call.problem), (call.dense.k, call.dense.v), visit)
        return total(states[owner] for owner in sorted(states))

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        pieces, own = self._pieces(call.problem), call.dense
        if len(pieces) == 1:
            return self._backward_of_piece(call, gradient)
        whole = Gradients(*(torch.empty_like(x, dtype=state_dtype(x.dtype)) for x in (call.q, own.k, own.v)))
        for heads in pieces:
            rows = call.q_heads(heads)
            part = OutputGradient(gradient.out[:, rows], gradient.lse[:, rows], gradient.delta[:, rows])
            found = self._backward_of_piece(call.heads(heads), part)
            whole.q[:, rows], whole.k[:, heads], whole.v[:, heads] = found.q, found.k, found.v
        return whole

    def _backward_of_piece(self, call: Call, gradient: OutputGradient) -> Gradients:
        rank, table = call.comm.rank, row_nodes(call.problem).table
        d_q: list[Partial[Tensor]] = []
        d_bias: list[Tensor] = []
        d_kv: list[Partial[Tensor]] = []

        def visit(owner: int, keys: Tensor, held: Sequence[Tensor]) -> Tensor:
            found = call.partial_backward(call.q, Dense(*held), gradient, rows_of=rank, keys_of=owner, keys=keys)
            d_q[:] = [union([*d_q, found.q])]
            if found.bias is not None:
                d_bias[:] = [functools.reduce(torch.add, [*d_bias, found.bias])]
            if owner == rank:
                d_kv.append(found.kv)
            return found.kv.to_table(table)

        combine = SUMS.combine_tables(call.problem.reproducible)
        numbers = circulate(call.comm, key_route(call.problem), (call.dense.k, call.dense.v), visit, combine)
        own = d_kv[0].from_numbers(numbers, table).total()
        return Gradients(d_q[0].total(), *call.halves(own), d_bias[0] if d_bias else None)

    def memory_bytes(self, problem: Problem, rank: int) -> int:
        # A piece that is here, one that arrives and one that leaves, and two states of the rows.
        heads = self._pieces(problem)
        piece = max(problem.heads(some.stop - some.start).kv_bytes(max(problem.keys.lengths)) for some in heads)
        return 3 * piece + 2 * problem.row_bytes(problem.q_len(rank), problem.v_dim + 1)

    def _traffic(self, problem: Problem, rank: int, collective: Collective) -> Traffic:
        route = key_route(problem)
        sent = [
            route.sent(
                rank,
                [
                    problem.batch * (heads.stop - heads.start) * dim * problem.dtype.itemsize
                    for dim in (problem.head_dim, problem.v_dim)
                ],
            )
            for heads in self._pieces(problem)
        ]
        return functools.reduce(Traffic.__add__, sent)

    def _traffic_backward(self, problem: Problem, rank: int) -> Traffic:
        route, nodes = key_route(problem), row_nodes(problem).table_count
        returned = [
            route.returned(rank, problem.heads(heads.stop - heads.start).kv_gradient_bytes(nodes))
            for heads in self._pieces(problem)
        ]
        return functools.reduce(Traffic.__add__, returned, self.traffic(problem, rank))

    def _pieces(self, problem: Problem) -> list[slice]:
        """The KV heads that go round at once; a bias has its gradient whole, and is larger than any shard."""
        largest = problem.kv_bytes(max(problem.keys.lengths))
        most = max(1, min(problem.kv_heads, -(-largest // self._piece_bytes)))
        return slices(problem.kv_heads, 1 if problem.bias_shape is not None else most)
