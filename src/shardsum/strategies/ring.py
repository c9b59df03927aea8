"""Queries stay, keys and values go round, some heads at a time, and the next ones travel meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import slices
from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..problem import state_dtype
from ..state import AttentionState
from .base import Strategy
from .call import Call
from .circulation import circulate, item_bytes
from .order import State, Sum, added, in_table, off_wire, total, union, whole

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

    def forward(self, call: Call) -> AttentionState:
        pieces = self._pieces(call)
        if len(pieces) == 1:
            return self._forward(call)
        state = AttentionState.empty(
            *call.q.shape[:3], call.v.shape[3], dtype=state_dtype(call.q.dtype), device=call.q.device
        )
        for heads in pieces:
            found, rows = self._forward(call.some_heads(heads)), call.q_heads_of(heads)
            state.out[:, rows], state.lse[:, rows] = found.out, found.lse
        return state

    def _forward(self, call: Call) -> AttentionState:
        rank = call.comm.rank
        states: dict[int, State] = {}

        def visit(owner: int, keys: Tensor, held: Sequence[Tensor]) -> None:
            k, v = held
            state = call.partial(call.q, k, v, rows_of=rank, keys_of=owner, keys=keys)
            # Every rank holds replicated rows: it must merge in the same order as the others to get the same bits.
            place = owner if call.q_replicated else rank
            states[place] = union(states[place], state) if place in states else state

        circulate(call.comm, call.key_route(), (call.k, call.v), visit)
        return whole(functools.reduce(union, [states[owner] for owner in sorted(states)]))

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        pieces = self._pieces(call)
        if len(pieces) == 1:
            return self._backward_of_piece(call, gradient)
        whole = Gradients(*(torch.empty_like(x, dtype=state_dtype(x.dtype)) for x in (call.q, call.k, call.v)))
        for heads in pieces:
            rows = call.q_heads_of(heads)
            part = OutputGradient(gradient.out[:, rows], gradient.lse[:, rows], gradient.delta[:, rows])
            found = self._backward_of_piece(call.some_heads(heads), part)
            whole.q[:, rows], whole.k[:, heads], whole.v[:, heads] = found.q, found.k, found.v
        return whole

    def _backward_of_piece(self, call: Call, gradient: OutputGradient) -> Gradients:
        rank = call.comm.rank
        nodes = call.row_nodes()
        d_q: list[Sum] = []
        d_bias: list[Tensor] = []
        d_kv: list[Sum] = []

        def visit(owner: int, keys: Tensor, held: Sequence[Tensor]) -> Tensor:
            k, v = held
            found = call.partial_backward(call.q, k, v, gradient, rows_of=rank, keys_of=owner, keys=keys)
            d_q[:] = [functools.reduce(added, [*d_q, found.q])]
            if found.bias is not None:
                d_bias[:] = [functools.reduce(torch.add, [*d_bias, found.bias])]
            if owner == rank:
                d_kv.append(found.kv)
            return in_table(found.kv, nodes)

        table = circulate(call.comm, call.key_route(), (call.k, call.v), visit, torch.add)
        assert table is not None
        own = total(off_wire(table, nodes.table, d_kv[0]))
        return Gradients(total(d_q[0]), *call.halves(own), d_bias[0] if d_bias else None)

    def _traffic(self, call: Call) -> Traffic:
        sent = [
            call.key_route().sent(call.comm.rank, [item_bytes(x[:, heads]) for x in (call.k, call.v)])
            for heads in self._pieces(call)
        ]
        return functools.reduce(Traffic.__add__, sent)

    def _traffic_backward(self, call: Call) -> Traffic:
        returned = [
            call.key_route().returned(
                call.comm.rank, call.some_heads(heads).kv_gradient_bytes(len(call.row_nodes().table))
            )
            for heads in self._pieces(call)
        ]
        return functools.reduce(Traffic.__add__, returned, self._traffic(call))

    def _pieces(self, call: Call) -> list[slice]:
        """The KV heads that go round at once; a bias has its gradient whole, and is larger than any shard."""
        kv_heads = call.k.shape[1]
        largest = max(call.kv_bytes(len(positions)) for positions in call.keys.positions)
        count = 1 if call.scores.bias is not None else max(1, min(kv_heads, -(-largest // self._piece_bytes)))
        return slices(kv_heads, count)
