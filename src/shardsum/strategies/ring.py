"""Queries stay, keys and values go round: at most two shards on a rank, and the next one travels meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..collectives import circulate
from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..state import AttentionState, merge
from .base import Call, Strategy


class Ring(Strategy):
    """Attend to the shard at hand while the next one arrives from the neighbour; of a shard only those keys go on
    that some rank on the way may see. In the backward pass dK and dV travel one hop behind, and return home.

    Source: Liu, Zaharia, Abbeel 2023 (ring attention, section 3).
    """

    name = "ring"
    rows_stay = True

    def forward(self, call: Call) -> AttentionState:
        rank, states = call.comm.rank, {}

        def visit(owner: int, held: Sequence[Tensor]) -> Sequence[Tensor]:
            keys = _held(call, owner, rank)
            k, v = held
            states[owner] = call.partial(call.q, k, v, rows_of=rank, keys_of=owner, keys=keys)
            if not call.q_replicated and len(states) == 2:
                states[owner] = functools.reduce(merge, [states.pop(other) for other in list(states)])
            return []

        shapes, onward = _travel(call)
        circulate(call.comm, (call.k, call.v), visit, shapes, onward)
        # Every rank holds replicated rows: it must merge in the same order as the others to get the same bits.
        return functools.reduce(merge, (states[owner] for owner in sorted(states)))

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        rank = call.comm.rank
        d_q: list[Tensor] = []
        d_bias: list[Tensor] = []

        def visit(owner: int, held: Sequence[Tensor]) -> Sequence[Tensor]:
            keys = _held(call, owner, rank)
            k, v = held
            found = call.partial_backward(call.q, k, v, gradient, rows_of=rank, keys_of=owner, keys=keys)
            d_q[:] = [functools.reduce(torch.add, [*d_q, found.q])]
            if found.bias is not None:
                d_bias[:] = [functools.reduce(torch.add, [*d_bias, found.bias])]
            return [torch.cat([found.k, found.v], dim=3)]

        def combine(owner: int, arrived: Sequence[Tensor], found: Sequence[Tensor]) -> Sequence[Tensor]:
            first, here = _held(call, owner, (owner + 1) % call.comm.size), _held(call, owner, rank)
            arrived[0][:, :, here.start - first.start : here.stop - first.start] += found[0]
            return arrived

        def result_shapes(owner: int) -> Sequence[Sequence[int]]:
            keys = _held(call, owner, (owner + 1) % call.comm.size)
            return [(*call.k_shape(keys)[:3], call.k.shape[3] + call.v.shape[3])]

        shapes, onward = _travel(call)
        (own,), others = circulate(call.comm, (call.k, call.v), visit, shapes, onward, combine, result_shapes)
        if others:
            own[:, :, _held(call, rank, (rank + 1) % call.comm.size)] += others[0]
        d_k, d_v = own.split([call.k.shape[3], call.v.shape[3]], dim=3)
        return Gradients(d_q[0], d_k, d_v, d_bias[0] if d_bias else None)

    def _traffic(self, call: Call) -> Traffic:
        size, rank = call.comm.size, call.comm.rank
        to = (rank + 1) % size
        sent = sum(call.kv_bytes(_held(call, (rank - hop) % size, to)) for hop in range(size - 1))
        return Traffic(sent, 2 * (size - 1), 2 * (size - 1))

    def _traffic_backward(self, call: Call) -> Traffic:
        size, rank, again = call.comm.size, call.comm.rank, self._traffic(call)
        owners = [(rank - hop) % size for hop in range(1, size)]
        results = sum(call.kv_gradient_bytes(_held(call, owner, (owner + 1) % size)) for owner in owners)
        return Traffic(again.sent_bytes + results, again.messages + size - 1, again.rounds + size - 1)


def _held(call: Call, owner: int, rank: int) -> slice:
    """Which of the owner's keys reach a rank: those that it or a later one on their way may see."""
    size = call.comm.size
    if rank == owner:
        return slice(0, len(call.keys.positions[owner]))
    later = [call.seen((owner + hop) % size, owner) for hop in range((rank - owner) % size, size)]
    seen = [keys for keys in later if keys.start < keys.stop]
    if not seen:
        return slice(0, 0)
    return slice(min(keys.start for keys in seen), max(keys.stop for keys in seen))


def _travel(
    call: Call,
) -> tuple[Callable[[int], Sequence[Sequence[int]]], Callable[[int, Sequence[Tensor]], Sequence[Tensor]]]:
    """`shapes` and `onward` of keys and values, for `circulate`."""
    size, rank = call.comm.size, call.comm.rank

    def shapes(owner: int) -> Sequence[Sequence[int]]:
        keys = _held(call, owner, rank)
        return [call.k_shape(keys), call.v_shape(keys)]

    def onward(owner: int, held: Sequence[Tensor]) -> Sequence[Tensor]:
        here, there = _held(call, owner, rank), _held(call, owner, (rank + 1) % size)
        if there.start == there.stop:
            return [x[:, :, :0] for x in held]
        return [x[:, :, there.start - here.start : there.stop - here.start] for x in held]

    return shapes, onward
