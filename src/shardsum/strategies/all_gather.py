"""Queries stay, keys and values are gathered: the simplest strategy for prefill, at the price of memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..blocks import Dense
from ..collectives import Collective
from ..comm import Traffic
from ..geometry import row_nodes, seen, seen_counts, sent_counts
from ..kernels import Gradients, OutputGradient
from ..partials import total
from ..placement import Subset
from ..problem import Problem
from ..state import AttentionState
from .base import Strategy
from .call import ALL, Call
from .circulation import take

# Up to this many bytes of keys and values on every rank, one all-gather is simpler and overlaps nothing away.
GATHERED_BYTES = 1 << 30


class AllGather(Strategy):
    """Gather the keys and values that this rank's rows may see, and attend to them shard by shard in rank order.

    Source: Llama Team 2024 (The Llama 3 herd of models, section 3.3.2: all-gather based context parallelism).
    """

    name = "all_gather"
    rows_stay = True

    def suits(self, problem: Problem) -> str | None:
        fits = problem.kv_bytes(problem.keys.length) <= GATHERED_BYTES
        return f"all keys and values are at most {GATHERED_BYTES} bytes" if fits else None

    def forward(self, call: Call) -> AttentionState:
        rank, problem = call.comm.rank, call.problem
        return total(
            call.partial(call.q, block, rows_of=rank, keys_of=owner, keys=_keys(problem, rank, owner))
            for owner, block in enumerate(_gathered(call))
        )

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        problem, rank = call.problem, call.comm.rank
        parts = [
            call.partial_backward(
                call.q, block, gradient, rows_of=rank, keys_of=owner, keys=_keys(problem, rank, owner)
            )
            for owner, block in enumerate(_gathered(call))
        ]
        found = [part.bias for part in parts if part.bias is not None]
        bias = functools.reduce(torch.add, found) if found else None
        own, nodes = parts[rank].kv, row_nodes(problem)
        sent = [part.kv.to_numbers(nodes.of_rank(rank)) for part in parts]
        sent[rank] = sent[rank][:, :, :0]
        keys = [_sent(problem, rank, receiver) for receiver in range(problem.size)]
        width = problem.head_dim + problem.v_dim
        shapes = [
            (*problem.k_shape(len(some))[:3], width * nodes.count(receiver)) for receiver, some in enumerate(keys)
        ]
        for receiver, arrived in enumerate(call.comm.all_to_all(sent, shapes)):
            if len(keys[receiver]):
                own = own.put(keys[receiver], own.from_numbers(arrived, nodes.of_rank(receiver)))
        return Gradients(total(part.q for part in parts), *call.halves(own.total()), bias)

    def memory_bytes(self, problem: Problem, rank: int) -> int:
        sent = problem.kv_bytes(int(sent_counts(problem, rank).sum()))
        received = problem.kv_bytes(int(seen_counts(problem, rank).sum()))
        return sent + received + 2 * problem.row_bytes(problem.q_len(rank), problem.v_dim + 1)

    def _traffic(self, problem: Problem, rank: int, collective: Collective) -> Traffic:
        others = problem.size - 1
        return Traffic(problem.kv_bytes(int(sent_counts(problem, rank).sum())), 2 * others, 2)

    def _traffic_backward(self, problem: Problem, rank: int) -> Traffic:
        others = problem.size - 1
        sent = problem.kv_bytes(int(sent_counts(problem, rank).sum()))
        received = int(seen_counts(problem, rank).sum())
        returned = problem.kv_gradient_bytes(received) * row_nodes(problem).count(rank)
        return Traffic(sent + returned, 3 * others, 3)


def _gathered(call: Call) -> list[Dense]:
    """Every rank's keys and values that this rank's rows may see; its own whole, where they are."""
    comm, rank, problem, own = call.comm, call.comm.rank, call.problem, call.dense
    if comm.size == 1:
        return [own]
    sent = [_sent(problem, rank, receiver) for receiver in range(comm.size)]
    counts = seen_counts(problem, rank).tolist()
    k = comm.all_to_all([take(own.k, some) for some in sent], [problem.k_shape(count) for count in counts])
    v = comm.all_to_all([take(own.v, some) for some in sent], [problem.v_shape(count) for count in counts])
    gathered = [Dense(*pair) for pair in zip(k, v, strict=True)]
    gathered[rank] = own
    return gathered


def _sent(problem: Problem, rank: int, receiver: int) -> Tensor:
    """Which of a rank's keys go to another."""
    return seen(problem, receiver, rank)[: 0 if receiver == rank else None]


def _keys(problem: Problem, rank: int, owner: int) -> Subset:
    return ALL if owner == rank else seen(problem, rank, owner)
