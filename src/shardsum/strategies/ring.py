"""Queries stay, keys and values go round: at most two shards on a rank, and the next one travels meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..state import AttentionState, merge
from .base import Call, Strategy
from .circulation import circulate


class Ring(Strategy):
    """Attend to the shard at hand while the next one arrives from a neighbour. A key goes only as far as ranks
    may see it, up or down the ring, whichever is less. In the backward pass dK and dV travel one hop behind, and
    home from where their key ends.

    Source: Liu, Zaharia, Abbeel 2023 (ring attention, section 3).
    """

    name = "ring"
    rows_stay = True

    def forward(self, call: Call) -> AttentionState:
        rank = call.comm.rank
        states: dict[int, AttentionState] = {}

        def visit(owner: int, keys: Tensor, held: Sequence[Tensor]) -> None:
            k, v = held
            state = call.partial(call.q, k, v, rows_of=rank, keys_of=owner, keys=keys)
            # Every rank holds replicated rows: it must merge in the same order as the others to get the same bits.
            place = owner if call.q_replicated else rank
            states[place] = merge(states[place], state) if place in states else state

        circulate(call.comm, call.key_route(), (call.k, call.v), visit)
        return functools.reduce(merge, (states[owner] for owner in sorted(states)))

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        rank = call.comm.rank
        d_q: list[Tensor] = []
        d_bias: list[Tensor] = []

        def visit(owner: int, keys: Tensor, held: Sequence[Tensor]) -> Tensor:
            k, v = held
            found = call.partial_backward(call.q, k, v, gradient, rows_of=rank, keys_of=owner, keys=keys)
            d_q[:] = [functools.reduce(torch.add, [*d_q, found.q])]
            if found.bias is not None:
                d_bias[:] = [functools.reduce(torch.add, [*d_bias, found.bias])]
            return torch.cat([found.k, found.v], dim=3)

        own = circulate(call.comm, call.key_route(), (call.k, call.v), visit, torch.add)
        assert own is not None
        d_k, d_v = own.split([call.k.shape[3], call.v.shape[3]], dim=3)
        return Gradients(d_q[0], d_k, d_v, d_bias[0] if d_bias else None)

    def _traffic(self, call: Call) -> Traffic:
        item_bytes = [
            torch.Size(shape).numel() * call.k.element_size() for shape in (call.k_shape(1), call.v_shape(1))
        ]
        return call.key_route().sent(call.comm.rank, item_bytes)

    def _traffic_backward(self, call: Call) -> Traffic:
        return self._traffic(call) + call.key_route().returned(call.comm.rank, call.kv_gradient_bytes(1))
