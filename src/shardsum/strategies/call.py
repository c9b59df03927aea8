"""The call that a strategy works on, as a rank sees it."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..blocks import Block, Dense, Int8
from ..collectives import Auto, Collective
from ..comm import Communicator
from ..errors import NonFiniteWarning
from ..kernels import Gradients, Kernel, OutputGradient
from ..kernels.along_tree import GradientsOfNodes, states_of_nodes
from ..layouts import Placement
from ..masks import Bounds, Mask, localize
from ..problem import state_dtype
from ..quantized import Quantized
from ..scores import Scores
from ..state import AttentionState, merge
from ..tree import SEGMENT, Node
from .circulation import Route
from .order import Nodes, State, Sum

# Local indices of rows or keys, increasing.
Some = slice | Tensor


@dataclass(frozen=True, eq=False)
class Contribution:
    """What some rows and keys contribute to the gradients: q, and k and v side by side along the last dim."""

    q: Sum
    kv: Sum
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """What was found out about mask, rows and keys, which strategies, and calls that are alike, ask several times.

    By the rank whose rows they are, or the two whose rows and keys.
    """

    intervals: dict[int, list[Bounds]] = field(default_factory=dict)
    local: dict[tuple[int, int], list[Bounds]] = field(default_factory=dict)
    runs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    routes: dict[str, Route] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call as a rank sees it once all ranks have agreed: its shards, and where all shards lie.

    `queries`, `keys`: which global rows and keys each rank holds. With `q_replicated` every rank holds all rows.
    `reproducible`: every sum goes along the fixed tree, so that partial results are forests.
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
    # Of k and v that are int8: only where they stay on their rank, and sums may take any order.
    scales: tuple[Tensor, Tensor] | None = None
    # How a message names this rank and call, and what `keys` are numbered by.
    name: str = "attention"
    holder: str = "rank"
    reproducible: bool = False
    found: Found = field(default_factory=Found)

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
    ) -> State:
        """The state of the query rows of one rank over the keys of one rank, or of some of them, computed here.

        Warns: NonFiniteWarning, naming this rank, the call, whose keys gave NaN or Inf, and where first.
        """
        scores, intervals = self._local(rows_of, keys_of, rows, keys)
        if self.reproducible:
            of_keys = self.keys.spans_of(keys_of, keys)
            forest = states_of_nodes(self.kernel, q, Dense(k, v), intervals, scores, of_keys, self.mask.kv_len)
            for state in forest.nodes.values():
                self._warn_unless_finite(state, rows_of, keys_of)
            return forest
        block = self._block(k, v)
        state = functools.reduce(merge, [self.kernel.forward(q, block, bounds, scores) for bounds in intervals])
        self._warn_unless_finite(state, rows_of, keys_of)
        return state

    def _warn_unless_finite(self, state: AttentionState, rows_of: int, keys_of: int) -> None:
        if not state.is_finite():
            bad = state.lse.isnan() | (state.lse == torch.inf) | ~state.out.isfinite().all(dim=-1)
            batch, head, row = bad.nonzero()[0].tolist()
            first = (batch, head + self.scores.head, row)
            warnings.warn(
                f"{self.name}: the attention over the keys of {self.holder} {keys_of} gave NaN or Inf, "
                f"first at (batch, head, row) {first} of the queries of {self.holder} {rows_of}.",
                NonFiniteWarning,
                stacklevel=3,
            )

    def _block(self, k: Tensor, v: Tensor) -> Block:
        if self.scales is None:
            return Dense(k, v)
        of_k, of_v = self.scales
        return Int8(Quantized(k, of_k), Quantized(v, of_v))

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
    ) -> Contribution:
        """What the query rows of one rank and the keys of one rank, or some of them, contribute, computed here.

        The bias' gradient is of all its keys, zero but for these.
        """
        scores, intervals = self._local(rows_of, keys_of, rows, keys)
        key_positions = self.keys.positions[keys_of][keys]
        if self.reproducible:
            nodes = GradientsOfNodes(self.kernel, q, Dense(k, v), intervals, scores, gradient)
            of_rows, of_keys = self.queries.spans_of(rows_of, rows), self.keys.spans_of(keys_of, keys)
            found = Contribution(*nodes.by_nodes(of_rows, of_keys, self.mask.q_len, self.mask.kv_len))
        else:
            block = Dense(k, v)
            parts = [self.kernel.backward(q, block, bounds, scores, gradient) for bounds in intervals]
            summed = functools.reduce(Gradients.__add__, parts)
            found = Contribution(summed.q, torch.cat([summed.k, summed.v], dim=3), summed.bias)
        if found.bias is None or self.scores.bias is None:
            return found
        bias = torch.zeros_like(self.scores.bias, dtype=found.bias.dtype)
        bias[..., key_positions.to(bias.device)] = found.bias
        return replace(found, bias=bias)

    def _local(self, rows_of: int, keys_of: int, rows: Some, keys: Some) -> tuple[Scores, list[Bounds]]:
        scores = self.scores
        if not scores.plain:
            own, positions = self.queries.positions[rows_of][rows], self.keys.positions[keys_of][keys]
            scores = scores.localize(own, positions, self.mask.own(own))
        if not (_is_all(rows) and _is_all(keys)):
            return scores, self._local_intervals(rows_of, keys_of, rows, keys)
        if (rows_of, keys_of) not in self.found.local:
            self.found.local[rows_of, keys_of] = self._local_intervals(rows_of, keys_of, rows, keys)
        return scores, self.found.local[rows_of, keys_of]

    def _local_intervals(self, rows_of: int, keys_of: int, rows: Some, keys: Some) -> list[Bounds]:
        positions = self.keys.positions[keys_of][keys]
        return [localize(Bounds(lo[:, rows], hi[:, rows]), positions) for lo, hi in self._intervals(rows_of)]

    def _intervals(self, rows_of: int) -> list[Bounds]:
        if rows_of not in self.found.intervals:
            self.found.intervals[rows_of] = self.mask.intervals(self.queries.positions[rows_of])
        return self.found.intervals[rows_of]

    def seen(self, rows_of: int, keys_of: int) -> Tensor:
        """The keys of one rank that some query row of another may see, as local indices: what has to travel."""
        return self._sees(rows_of, keys_of).nonzero().flatten()

    def _sees(self, rows_of: int, keys_of: int) -> Tensor:
        starts, ends = self._runs(rows_of)
        positions = self.keys.positions[keys_of]
        # Runs do not overlap: a key lies in one if more of them have begun than ended.
        sees = torch.searchsorted(starts, positions, right=True) > torch.searchsorted(ends, positions, right=True)
        return self._with_segments(sees, positions)

    def _with_segments(self, chosen: Tensor, positions: Tensor) -> Tensor:
        """What is chosen, and if `reproducible` whatever shares a segment with it."""
        if not self.reproducible:
            return chosen
        numbers = positions // SEGMENT
        return torch.isin(numbers, numbers[chosen])

    def _runs(self, rows_of: int) -> tuple[Tensor, Tensor]:
        """The global keys that some row of a rank may see, as disjoint runs: where each starts and ends."""
        if rows_of not in self.found.runs:
            lo, hi = (
                torch.cat([x.flatten() for x in bounds]) for bounds in zip(*self._intervals(rows_of), strict=True)
            )
            seeing = lo < hi
            lo, order = lo[seeing].sort()
            covered = hi[seeing][order].cummax(dim=0).values
            gap = lo[1:] > covered[:-1]
            edge = gap.new_ones(min(1, len(lo)))
            self.found.runs[rows_of] = lo[torch.cat([edge, gap])], covered[torch.cat([gap, edge])]
        return self.found.runs[rows_of]

    def _rows_that_see(self, keys_of: int, rows_of: int) -> Tensor:
        """Which query rows of one rank may see some key of another."""
        positions = self.keys.positions[keys_of]
        local = [localize(bounds, positions) for bounds in self._intervals(rows_of)]
        sees = torch.stack([(lo < hi).any(dim=0) for lo, hi in local]).any(dim=0)
        return self._with_segments(sees, self.queries.positions[rows_of])

    def key_nodes(self) -> Nodes:
        """The nodes that each rank's keys make: what a gradient of rows is a sum of."""
        return self._nodes_of(self.keys)

    def row_nodes(self) -> Nodes:
        """The nodes that each rank's rows make: what a gradient of keys is a sum of."""
        return self._nodes_of(self.queries)

    def state_nodes(self) -> Nodes:
        """The nodes that each rank's keys make, for each of the mask's intervals: what a state is merged of."""
        if not self.reproducible:
            return self.key_nodes()
        parts = range(len(self._intervals(self.comm.rank)))
        held = self.key_nodes().of_rank
        return Nodes.of([node._replace(part=part) for part in parts for node in nodes] for nodes in held)

    def _nodes_of(self, placement: Placement) -> Nodes:
        if self.reproducible:
            return Nodes.of([node for node, _ in held] for held in placement.spans)
        one = (Node(0, 0),)
        return Nodes((one,) * self.comm.size, one)

    def key_route(self) -> Route:
        """How keys go round a ring: to every rank that has a row which may see them."""
        if "keys" not in self.found.routes:
            self.found.routes["keys"] = Route.of(self.comm.size, self._sees)
        return self.found.routes["keys"]

    def row_route(self) -> Route:
        """How query rows go round a ring: to every rank that has a key which they may see."""
        if "rows" not in self.found.routes:
            self.found.routes["rows"] = Route.of(self.comm.size, self._rows_that_see)
        return self.found.routes["rows"]

    def some_heads(self, kv_heads: slice) -> Call:
        """The call of some of the KV heads, and of the query heads that read them."""
        q_heads = self.q_heads_of(kv_heads)
        scores = self.scores.some_heads(q_heads.start, q_heads.stop)
        return replace(self, q=self.q[:, q_heads], k=self.k[:, kv_heads], v=self.v[:, kv_heads], scores=scores)

    def q_heads_of(self, kv_heads: slice) -> slice:
        group = self.q.shape[1] // self.k.shape[1]
        return slice(kv_heads.start * group, kv_heads.stop * group)

    def halves(self, d_kv: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of k and of v, which lie side by side."""
        d_k, d_v = d_kv.split([self.k.shape[3], self.v.shape[3]], dim=3)
        return d_k, d_v

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
        """Bytes of what this rank has of the state of one rank's query rows, packed."""
        held = len(self.state_nodes().of_rank[self.comm.rank])
        return self.row_bytes(len(self.queries.positions[rank]), self.v.shape[3] + 1) * held

    def _key_elements(self, keys: int) -> int:
        return keys * self.k.shape[0] * self.k.shape[1] * (self.k.shape[3] + self.v.shape[3])


def _is_all(some: Some) -> bool:
    return isinstance(some, slice) and some == slice(None)
