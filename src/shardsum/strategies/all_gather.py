"""Queries stay, keys and values are gathered: the simplest strategy for prefill, at the price of memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..state import AttentionState
from .base import Strategy
from .call import Call
from .circulation import take
from .order import added, off_wire, on_wire, put, total, union, whole


class AllGather(Strategy):
    """Gather the keys and values that this rank's rows may see, and attend to them shard by shard in rank order.

    Source: Llama Team 2024 (The Llama 3 herd of models, section 3.3.2: all-gather based context parallelism).
    """

    name = "all_gather"
    rows_stay = True

    def forward(self, call: Call) -> AttentionState:
        rank = call.comm.rank
        states = (
            call.partial(call.q, k, v, rows_of=rank, keys_of=owner, keys=_keys(call, rank, owner))
            for owner, (k, v) in enumerate(_gathered(call))
        )
        return whole(functools.reduce(union, states))

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        comm, rank = call.comm, call.comm.rank
        parts = [
            call.partial_backward(
                call.q, k, v, gradient, rows_of=rank, keys_of=owner, keys=_keys(call, rank, owner)
            )
            for owner, (k, v) in enumerate(_gathered(call))
        ]
        q = total(functools.reduce(added, [part.q for part in parts]))
        found = [part.bias for part in parts if part.bias is not None]
        bias = functools.reduce(torch.add, found) if found else None
        own, nodes = parts[rank].kv, call.row_nodes().of_rank
        sent = [on_wire(part.kv, nodes[rank]) for part in parts]
        sent[rank] = sent[rank][:, :, :0]
        seen = [_sent(call, receiver) for receiver in range(comm.size)]
        width = call.k.shape[3] + call.v.shape[3]
        shapes = [
            (*call.k.shape[:2], len(keys), width * len(held)) for keys, held in zip(seen, nodes, strict=True)
        ]
        for keys, held, arrived in zip(seen, nodes, comm.all_to_all(sent, shapes), strict=True):
            if len(keys):
                own = put(own, keys, off_wire(arrived, held, own))
        return Gradients(q, *call.halves(total(own)), bias)

    def _traffic(self, call: Call) -> Traffic:
        others = call.comm.size - 1
        sent = sum(call.kv_bytes(len(_sent(call, receiver))) for receiver in range(call.comm.size))
        return Traffic(sent, 2 * others, 2)

    def _traffic_backward(self, call: Call) -> Traffic:
        again, others = self._traffic(call), call.comm.size - 1
        rank = call.comm.rank
        received = [call.seen(rank, owner) for owner in range(call.comm.size) if owner != rank]
        returned = sum(call.kv_gradient_bytes(len(keys)) for keys in received)
        returned *= len(call.row_nodes().of_rank[rank])
        return Traffic(again.sent_bytes + returned, 3 * others, 3)


def _gathered(call: Call) -> list[tuple[Tensor, Tensor]]:
    """Every rank's keys and values that this rank's rows may see; its own whole, where they are."""
    comm, rank = call.comm, call.comm.rank
    if comm.size == 1:
        return [(call.k, call.v)]
    sent = [_sent(call, receiver) for receiver in range(comm.size)]
    seen = [0 if owner == rank else len(call.seen(rank, owner)) for owner in range(comm.size)]
    keys = comm.all_to_all([take(call.k, part) for part in sent], [call.k_shape(count) for count in seen])
    values = comm.all_to_all([take(call.v, part) for part in sent], [call.v_shape(count) for count in seen])
    keys[rank], values[rank] = call.k, call.v
    return list(zip(keys, values, strict=True))


def _sent(call: Call, receiver: int) -> Tensor:
    """Which of this rank's keys go to another."""
    seen = call.seen(receiver, call.comm.rank)
    return seen[:0] if receiver == call.comm.rank else seen


def _keys(call: Call, rank: int, owner: int) -> slice | Tensor:
    return slice(None) if owner == rank else call.seen(rank, owner)
