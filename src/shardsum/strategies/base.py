"""The interface of a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..collectives import Auto, Collective, reduce_over_ranks
from ..comm import Ranks, Traffic
from ..geometry import key_nodes
from ..kernels import Gradients, OutputGradient
from ..problem import Problem
from ..state import AttentionState
from .call import Call
from .sums import reduce_sum

AUTO = Auto()


class Strategy(ABC):
    """A way to distribute the sum. Every rank calls `forward`, and gets the state of its own query rows.

    Whether it can do a problem (`why_not`), what it sends (`traffic`) and what it holds (`memory_bytes`) can be
    asked without doing it, of any rank, at any number of ranks.
    """

    name: str
    # Whether query rows stay on their rank, so that an additive bias, which only that rank has, can be used.
    rows_stay: bool = False
    # Whether replicated queries find keys where they are, so that these may lie in several blocks of any kind.
    keys_stay: bool = False

    @abstractmethod
    def forward(self, call: Call) -> AttentionState:
        """The state of this rank's query rows over all keys; of all rows, bit-equal, if q is replicated."""

    def backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        """The gradients of this rank's q, k, v and bias."""
        return replicated_backward(call, gradient) if call.problem.q_replicated else self._backward(call, gradient)

    def why_not(self, problem: Problem) -> str | None:
        """Why the strategy can't do this, as a sentence; None where it can."""
        if problem.bias_shape is not None and not (self.rows_stay or problem.q_replicated):
            return f"bias stays with its rows, and {self.name} moves rows."
        return None

    def suits(self, problem: Problem) -> str | None:
        """Why "auto" should take this strategy, unless an earlier one of the registry suits; None: never."""
        return None

    def traffic(self, problem: Problem, rank: int, collective: Collective = AUTO) -> Traffic:
        """What a rank sends in `forward`, in closed form: the communicator must count exactly this."""
        return self._traffic(problem, rank, collective) if problem.size > 1 else Traffic()

    def traffic_backward(self, problem: Problem, rank: int, collective: Collective = AUTO) -> Traffic:
        """What a rank sends in `backward`."""
        if problem.size == 1:
            return Traffic()
        if problem.q_replicated:
            return _replicated_traffic(problem, rank, collective)
        return self._traffic_backward(problem, rank)

    @abstractmethod
    def memory_bytes(self, problem: Problem, rank: int) -> int:
        """What a rank holds at once in `forward` beside its own q, k, v and output: received, sent, partial."""

    # What a strategy defines of the rest: several ranks, each with its own rows.

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        raise AssertionError(f"{self.name} has neither backward nor _backward")

    def _traffic(self, problem: Problem, rank: int, collective: Collective) -> Traffic:
        raise AssertionError(f"{self.name} has neither traffic nor _traffic")

    def _traffic_backward(self, problem: Problem, rank: int) -> Traffic:
        raise AssertionError(f"{self.name} has neither traffic_backward nor _traffic_backward")


def replicated_backward(call: Call, gradient: OutputGradient) -> Gradients:
    """The gradients where every rank has all rows: it sums over ranks only what these rows receive."""
    rank = call.comm.rank
    own = call.partial_backward(call.q, call.dense, gradient, rows_of=rank, keys_of=rank)
    bias = None if own.bias is None else reduce_over_ranks(call.comm, own.bias, call.collective)
    return Gradients(reduce_sum(call, own.q), *call.halves(own.kv.total()), bias)


def _replicated_traffic(problem: Problem, rank: int, collective: Collective) -> Traffic:
    ranks, itemsize = Ranks(rank, problem.size, problem.hosts), problem.sum_bytes
    numbers = problem.q_len(rank) * problem.batch * problem.q_heads * problem.head_dim
    if problem.reproducible:
        others, nodes = problem.size - 1, key_nodes(problem).count(rank)
        sent = Traffic(numbers * itemsize * nodes * others, others, 1)
    else:
        sent = collective.traffic(ranks, numbers, itemsize)
    if problem.bias_shape is None:
        return sent
    batch, heads = problem.bias_shape
    bias = batch * heads * problem.q_len(rank) * problem.mask.kv_len
    return sent + collective.traffic(ranks, bias, itemsize)


def pack_gradient(gradient: OutputGradient) -> Tensor:
    """The gradient of query rows as one tensor: lse and delta are two more components of each."""
    return torch.cat([gradient.out, gradient.lse.unsqueeze(-1), gradient.delta.unsqueeze(-1)], dim=-1)


def unpack_gradient(packed: Tensor) -> OutputGradient:
    """The gradient of query rows that `pack_gradient` packed."""
    return OutputGradient(packed[..., :-2], packed[..., -2], packed[..., -1])
