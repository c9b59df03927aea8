"""The interface of a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..collectives import reduce_over_ranks
from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..problem import state_dtype
from ..state import AttentionState
from .call import Call
from .order import reduce_sum, total


class Strategy(ABC):
    """A way to distribute the sum. Every rank calls `forward`, and gets the state of its own query rows."""

    name: str
    # Whether query rows stay on their rank, so that an additive bias, which only that rank has, can be used.
    rows_stay: bool = False
    # Whether replicated queries find keys where they are, so that these may be int8.
    keys_stay: bool = False

    @abstractmethod
    def forward(self, call: Call) -> AttentionState:
        """The state of this rank's query rows over all keys; of all rows, bit-equal, if q is replicated."""

    def backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        """The gradients of this rank's q, k, v and bias."""
        return replicated_backward(call, gradient) if call.q_replicated else self._backward(call, gradient)

    def traffic(self, call: Call) -> Traffic:
        """What this rank sends in `forward`, in closed form: the communicator must count exactly this."""
        return self._traffic(call) if call.comm.size > 1 else Traffic()

    def traffic_backward(self, call: Call) -> Traffic:
        """What this rank sends in `backward`."""
        if call.comm.size == 1:
            return Traffic()
        if not call.q_replicated:
            return self._traffic_backward(call)
        itemsize = state_dtype(call.q.dtype).itemsize
        if call.reproducible:
            others = call.comm.size - 1
            own = len(call.key_nodes().of_rank[call.comm.rank])
            sent = Traffic(call.q.numel() * itemsize * own * others, others, 1)
        else:
            sent = call.collective.traffic(call.collective.ranks(call.comm), call.q.numel(), itemsize)
        if call.scores.bias is None:
            return sent
        return sent + call.collective.traffic(call.collective.ranks(call.comm), call.scores.bias.numel(), itemsize)

    @abstractmethod
    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients: ...

    @abstractmethod
    def _traffic(self, call: Call) -> Traffic: ...

    @abstractmethod
    def _traffic_backward(self, call: Call) -> Traffic: ...


def replicated_backward(call: Call, gradient: OutputGradient) -> Gradients:
    """Every rank has all rows and their gradients: it needs to sum over ranks only what these rows receive."""
    rank = call.comm.rank
    own = call.partial_backward(call.q, call.k, call.v, gradient, rows_of=rank, keys_of=rank)
    bias = None if own.bias is None else reduce_over_ranks(call.comm, own.bias, call.collective)
    return Gradients(reduce_sum(call, own.q), *call.halves(total(own.kv)), bias)


def pack_gradient(gradient: OutputGradient) -> Tensor:
    """The gradient of query rows as one tensor: lse and delta are two more components of each."""
    return torch.cat([gradient.out, gradient.lse.unsqueeze(-1), gradient.delta.unsqueeze(-1)], dim=-1)


def unpack_gradient(packed: Tensor) -> OutputGradient:
    """What `pack_gradient` made this tensor of."""
    return OutputGradient(packed[..., :-2], packed[..., -2], packed[..., -1])
