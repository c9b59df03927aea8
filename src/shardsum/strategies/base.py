"""The interface of a strategy, and the call it works on."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..collectives import Auto, Collective, reduce_over_ranks
from ..comm import Communicator, Traffic
from ..errors import NonFiniteWarning
from ..kernels import Gradients, Kernel, OutputGradient
from ..layouts import Placement
from ..masks import Mask, localize
from ..problem import state_dtype
from ..quantized import Quantized
from ..scores import Scores
from ..state import AttentionState, merge
from .circulation import Route

# Local indices of rows or keys, increasing.
Some = slice | Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call as a rank sees it once all ranks have agreed: its shards, and where all shards lie.

    `queries`, `keys`: which global rows and keys each rank holds. With `q_replicated` every rank holds all rows.
    """

    comm: Communicator
    kernel: Kernel
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    queries: Placement
    keys: Placement
    scores: Scores
    q_replicated: bool
    collective: Collective = field(default_factory=Auto)
    # Of k and v that are int8: only where they stay on their rank.
    scales: tuple[Tensor, Tensor] | None = None
    # What was found out about the mask, which every strategy asks several times.
    _intervals_of: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _runs_of: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _routes: dict[str, Route] = field(default_factory=dict)

    def partial(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rows_of: int,
        keys_of: int,
        rows: Some = slice(None),
        keys: Some = slice(None),
    ) -> AttentionState:
        """The state of the query rows of one rank over the keys of one rank, or of some of them, computed here.

        Warns: NonFiniteWarning, naming the rank whose keys gave NaN or Inf.
        """
        scores, intervals = self._local(rows_of, keys_of, rows, keys)
        states = [self._forward(q, k, v, lo, hi, scores) for lo, hi in intervals]
        state = functools.reduce(merge, states)
        if not state.is_finite():
            bad = state.lse.isnan() | (state.lse == torch.inf) | ~state.out.isfinite().all(dim=-1)
            batch, head, row = bad.nonzero()[0].tolist()
            first = (batch, head + self.scores.head, row)
            warnings.warn(
                f"rank {self.comm.rank}: the attention over the keys of rank {keys_of} gave NaN or Inf, "
                f"first at (batch, head, row) {first} of the queries of rank {rows_of}.",
                NonFiniteWarning,
                stacklevel=2,
            )
        return state

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scores: Scores) -> AttentionState:
        if self.scales is None:
            return self.kernel.forward(q, k, v, lo, hi, scores)
        held = [Quantized(x, scales) for x, scales in zip((k, v), self.scales, strict=True)]
        return self.kernel.forward_quantized(q, held[0], held[1], lo, hi, scores)

    def partial_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gradient: OutputGradient,
        *,
        rows_of: int,
        keys_of: int,
        rows: Some = slice(None),
        keys: Some = slice(None),
    ) -> Gradients:
        """What the query rows of one rank and the keys of one rank, or some of them, contribute, computed here.

        The bias' gradient is of all its keys, zero but for these.
        """
        scores, intervals = self._local(rows_of, keys_of, rows, keys)
        parts = [self.kernel.backward(q, k, v, lo, hi, scores, gradient) for lo, hi in intervals]
        found = functools.reduce(_added, parts)
        if found.bias is None or self.scores.bias is None:
            return found
        bias = torch.zeros_like(self.scores.bias, dtype=found.bias.dtype)
        bias[..., self.keys.positions[keys_of][keys].to(bias.device)] = found.bias
        return Gradients(found.q, found.k, found.v, bias)

    def _local(
        self, rows_of: int, keys_of: int, rows: Some, keys: Some
    ) -> tuple[Scores, list[tuple[Tensor, Tensor]]]:
        own, positions = self.queries.positions[rows_of][rows], self.keys.positions[keys_of][keys]
        scores = self.scores if self.scores.plain else self.scores.localize(own, positions, self.mask.own(own))
        intervals = self._intervals(rows_of)
        return scores, [localize(lo[:, rows], hi[:, rows], positions) for lo, hi in intervals]

    def _intervals(self, rows_of: int) -> list[tuple[Tensor, Tensor]]:
        if rows_of not in self._intervals_of:
            self._intervals_of[rows_of] = self.mask.intervals(self.queries.positions[rows_of])
        return self._intervals_of[rows_of]

    def seen(self, rows_of: int, keys_of: int) -> Tensor:
        """The keys of one rank that some query row of another may see, as local indices: what has to travel."""
        return self._sees(rows_of, keys_of).nonzero().flatten()

    def _sees(self, rows_of: int, keys_of: int) -> Tensor:
        starts, ends = self._runs(rows_of)
        positions = self.keys.positions[keys_of]
        # Runs do not overlap: a key lies in one if more of them have begun than ended.
        return torch.searchsorted(starts, positions, right=True) > torch.searchsorted(ends, positions, right=True)

    def _runs(self, rows_of: int) -> tuple[Tensor, Tensor]:
        """The global keys that some row of a rank may see, as disjoint runs: where each starts and ends."""
        if rows_of not in self._runs_of:
            lo, hi = (
                torch.cat([x.flatten() for x in bounds]) for bounds in zip(*self._intervals(rows_of), strict=True)
            )
            seeing = lo < hi
            lo, order = lo[seeing].sort()
            covered = hi[seeing][order].cummax(dim=0).values
            gap = lo[1:] > covered[:-1]
            edge = gap.new_ones(min(1, len(lo)))
            self._runs_of[rows_of] = lo[torch.cat([edge, gap])], covered[torch.cat([gap, edge])]
        return self._runs_of[rows_of]

    def _rows_that_see(self, keys_of: int, rows_of: int) -> Tensor:
        """Which query rows of one rank may see some key of another."""
        positions = self.keys.positions[keys_of]
        local = [localize(lo, hi, positions) for lo, hi in self._intervals(rows_of)]
        return torch.stack([(lo < hi).any(dim=0) for lo, hi in local]).any(dim=0)

    def key_route(self) -> Route:
        """How keys go round a ring: to every rank that has a row which may see them."""
        if "keys" not in self._routes:
            self._routes["keys"] = Route.of(self.comm.size, self._sees)
        return self._routes["keys"]

    def row_route(self) -> Route:
        """How query rows go round a ring: to every rank that has a key which they may see."""
        if "rows" not in self._routes:
            self._routes["rows"] = Route.of(self.comm.size, self._rows_that_see)
        return self._routes["rows"]

    def some_heads(self, kv_heads: slice) -> Call:
        """The call of some of the KV heads, and of the query heads that read them."""
        q_heads = self.q_heads_of(kv_heads)
        scores = self.scores.some_heads(q_heads.start, q_heads.stop)
        return replace(self, q=self.q[:, q_heads], k=self.k[:, kv_heads], v=self.v[:, kv_heads], scores=scores)

    def q_heads_of(self, kv_heads: slice) -> slice:
        group = self.q.shape[1] // self.k.shape[1]
        return slice(kv_heads.start * group, kv_heads.stop * group)

    def q_shape(self, rank: int) -> tuple[int, ...]:
        return (*self.q.shape[:2], len(self.queries.positions[rank]), self.q.shape[3])

    def k_shape(self, keys: int) -> tuple[int, ...]:
        """Of so many keys."""
        return (*self.k.shape[:2], keys, self.k.shape[3])

    def v_shape(self, keys: int) -> tuple[int, ...]:
        return (*self.v.shape[:2], keys, self.v.shape[3])

    def row_shape(self, rank: int, components: int) -> tuple[int, ...]:
        """Of so many numbers for each query row of one rank."""
        return (*self.q.shape[:2], len(self.queries.positions[rank]), components)

    # Bytes, for the closed forms of traffic.

    def kv_bytes(self, keys: int) -> int:
        """Bytes of so many keys and values, as they came."""
        return self._key_elements(keys) * self.k.element_size()

    def kv_gradient_bytes(self, keys: int) -> int:
        """Bytes of the gradients of so many keys and values."""
        return self._key_elements(keys) * state_dtype(self.q.dtype).itemsize

    def row_bytes(self, rows: int, components: int) -> int:
        """Bytes of so many float32 (or wider) numbers for each of so many query rows."""
        return rows * self.q.shape[0] * self.q.shape[1] * components * state_dtype(self.q.dtype).itemsize

    def state_bytes(self, rank: int) -> int:
        """Bytes of the packed state of one rank's query rows."""
        return self.row_bytes(len(self.queries.positions[rank]), self.v.shape[3] + 1)

    def _key_elements(self, keys: int) -> int:
        return keys * self.k.shape[0] * self.k.shape[1] * (self.k.shape[3] + self.v.shape[3])


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
        sent = call.collective.traffic(call.comm, call.q.numel(), itemsize)
        if call.scores.bias is None:
            return sent
        return sent + call.collective.traffic(call.comm, call.scores.bias.numel(), itemsize)

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
    q = reduce_over_ranks(call.comm, own.q, call.collective)
    bias = None if own.bias is None else reduce_over_ranks(call.comm, own.bias, call.collective)
    return Gradients(q, own.k, own.v, bias)


def pack_gradient(gradient: OutputGradient) -> Tensor:
    """The gradient of query rows as one tensor: lse and delta are two more components of each."""
    return torch.cat([gradient.out, gradient.lse.unsqueeze(-1), gradient.delta.unsqueeze(-1)], dim=-1)


def unpack_gradient(packed: Tensor) -> OutputGradient:
    """What `pack_gradient` made this tensor of."""
    return OutputGradient(packed[..., :-2], packed[..., -2], packed[..., -1])


def _added(a: Gradients, b: Gradients) -> Gradients:
    bias = a.bias if a.bias is None or b.bias is None else a.bias + b.bias
    return Gradients(a.q + b.q, a.k + b.k, a.v + b.v, bias)
