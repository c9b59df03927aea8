"""States and gradients along the fixed tree, from a kernel that knows nothing of it: what `reproducible` asks for.

torch's operators give a row other bits beside other rows: a matrix product goes other ways for other sizes and
numbers of threads, and an elementwise function treats what is left over at the end of a thread's share by itself.
So one head is computed at a time, in pieces of one shape, by one thread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..blocks import Block, Dense
from ..masks import Bounds
from ..packed import merge_alike
from ..problem import state_dtype
from ..scores import Scores
from ..state import AttentionState
from ..tree import SEGMENT, Forest, Node, segments
from .base import Gradients, Kernel, OutputGradient, Queries

ROWS = 16  # of a piece: few, since one query is padded to as many
Intervals = Sequence[Bounds]
Spans = Sequence[tuple[Node, slice]]  # nodes, and where in a tensor their positions lie


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()  # of the calling thread, and of those that start meanwhile: only slower
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def state_by_pieces(kernel: Kernel, q: Queries, block: Dense, bounds: Bounds, scores: Scores) -> AttentionState:
    """Compute `kernel.forward` along the tree over the block's segments, piece by piece."""
    count = segments(block.kv_len)
    nothing = AttentionState.empty(*q.shape[:3], block.v_dim, dtype=state_dtype(q.dtype), device=q.device)
    forest = Forest(count, merge_alike, nothing, {})
    for segment in range(count):
        state = AttentionState(nothing.out.clone(), nothing.lse.clone())
        for b, h, rows, keys in _pieces(q, block, segment):
            piece = _bounds(bounds, b, rows, keys)
            if bool((piece.lo < piece.hi).any()):
                part = scores.some(b, h, rows, keys)
                found = kernel.forward(_row(q, b, h, rows), _key_rows(q, block, b, h, keys), piece, part)
                own = slice(int(rows[0]), int(rows[-1]) + 1)
                state.out[b, h, own] = found.out[0, 0, : own.stop - own.start] + 0.0
                state.lse[b, h, own] = found.lse[0, 0, : own.stop - own.start]
        forest = forest.of({**forest.nodes, Node(0, segment): state})
    return forest.total()


@_one_thread()
def gradients_by_pieces(
    kernel: Kernel, q: Queries, block: Dense, bounds: Bounds, scores: Scores, gradient: OutputGradient
) -> Gradients:
    """Compute `kernel.backward` over one segment of keys, piece by piece and added up in one order."""
    dtype = state_dtype(q.dtype)
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=dtype) for x in (q, block.k, block.v))
    d_bias = None if scores.bias is None else torch.zeros_like(scores.bias, dtype=dtype)
    group = q.shape[1] // block.kv_heads
    for b, h, rows, keys in _pieces(q, block, 0):
        piece = _bounds(bounds, b, rows, keys)
        if not bool((piece.lo < piece.hi).any()):
            continue
        flowing = OutputGradient(
            _row(gradient.out, b, h, rows),
            gradient.lse[b, h, rows][None, None],
            gradient.delta[b, h, rows][None, None],
        )
        inputs = (_row(q, b, h, rows), _key_rows(q, block, b, h, keys), piece, scores.some(b, h, rows, keys))
        found = kernel.backward(*inputs, flowing)
        own, size = slice(int(rows[0]), int(rows[-1]) + 1), block.kv_len
        d_q[b, h, own] = found.q[0, 0, : own.stop - own.start]
        d_k[b, h // group] += found.k[0, 0, :size]
        d_v[b, h // group] += found.v[0, 0, :size]
        if d_bias is not None and found.bias is not None:
            place = (b % d_bias.shape[0], h % d_bias.shape[1], own)
            d_bias[place] += found.bias[0, 0, : own.stop - own.start, :size]
    return Gradients(d_q, d_k, d_v, d_bias)


def states_of_nodes(
    kernel: Kernel, q: Queries, block: Block, intervals: Intervals, scores: Scores, spans: Spans, kv_len: int
) -> Forest[AttentionState]:
    """Return the states of all rows over the nodes that a block's keys make, for each of the intervals.

    The nodes are of a tree over `kv_len` keys.
    """
    nodes: dict[Node, AttentionState] = {}
    for (node, keys), (part, bounds) in itertools.product(spans, enumerate(intervals)):
        local = Bounds(*(bound.clamp(keys.start, keys.stop) - keys.start for bound in bounds))
        state = kernel.forward_tree(q, block.keys(keys), local, scores.some_keys(keys))
        nodes[node._replace(part=part)] = state
    nothing = AttentionState.empty(*q.shape[:3], block.v_dim, dtype=state_dtype(q.dtype), device=q.device)
    return Forest(segments(kv_len), merge_alike, nothing, nodes)


def _pieces(q: Tensor, block: Dense, segment: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Sequence, query head, rows and keys: ROWS and SEGMENT of them, behind the last comes the last again."""
    keys = torch.arange(segment * SEGMENT, (segment + 1) * SEGMENT).clamp(max=block.kv_len - 1)
    tiles = [torch.arange(row, row + ROWS).clamp(max=q.shape[2] - 1) for row in range(0, q.shape[2], ROWS)]
    for b, h, rows in itertools.product(range(q.shape[0]), range(q.shape[1]), tiles):
        yield b, h, rows, keys


def _bounds(bounds: Bounds, b: int, rows: Tensor, keys: Tensor) -> Bounds:
    """The piece's bounds: (1, ROWS) each, counted from its first key; a row that is there again sees nothing."""
    first, end = int(keys[0]), int(keys[-1]) + 1
    of_rows = [(x[b % len(x), rows].clamp(first, end) - first).unsqueeze(0) for x in bounds]
    again = torch.cat([torch.tensor([False]), rows[1:] == rows[:-1]])
    return Bounds(of_rows[0], torch.where(again, of_rows[0], of_rows[1]))


def _row(x: Tensor, b: int, h: int, rows: Tensor) -> Tensor:
    return x[b, h].index_select(0, rows.to(x.device))[None, None]


def _key_rows(q: Tensor, block: Dense, b: int, h: int, keys: Tensor) -> Dense:
    kv_head = h // (q.shape[1] // block.kv_heads)
    return Dense(_row(block.k, b, kv_head, keys), _row(block.v, b, kv_head, keys))


class GradientsOfNodes:
    """The gradients of some rows and keys, from those of one segment of rows and one of keys at a time.

    d_q is summed along the tree of the keys, d_k and d_v along the tree of the rows. Halves of halves are taken:
    within two nodes, what waits for its sibling is never more than twice the gradients themselves.
    """

    def __init__(
        self,
        kernel: Kernel,
        q: Queries,
        block: Dense,
        intervals: Intervals,
        scores: Scores,
        gradient: OutputGradient,
    ) -> None:
        self._kernel, self._q, self._block, self._intervals = kernel, q, block, intervals
        self._scores, self._gradient = scores, gradient

    def by_nodes(
        self, of_rows: Spans, of_keys: Spans, q_len: int, kv_len: int
    ) -> tuple[Forest[Tensor], Forest[Tensor], Tensor | None]:
        """d_q by nodes of the keys, d_k and d_v side by side by nodes of the rows, and d_bias."""
        rows, keys = (slice(0, sum(_size(some) for _, some in spans)) for spans in (of_rows, of_keys))
        nothing = self.nothing(rows, keys)
        no_kv, d_bias = torch.cat([nothing.k, nothing.v], dim=3), nothing.bias
        d_q = {node: torch.zeros_like(nothing.q) for node, _ in of_keys}
        d_kv = {node: torch.zeros_like(no_kv) for node, _ in of_rows}
        for (row_node, some_rows), (key_node, some_keys) in itertools.product(of_rows, of_keys):
            found = self.of(some_rows, some_keys)
            if found is not None:
                d_q[key_node][:, :, some_rows] = found.q
                d_kv[row_node][:, :, some_keys] = torch.cat([found.k, found.v], dim=3)
                if d_bias is not None and found.bias is not None:
                    d_bias[:, :, some_rows, some_keys] = found.bias
        of_q = Forest(segments(kv_len), torch.add, nothing.q, d_q)
        return of_q, Forest(segments(q_len), torch.add, no_kv, d_kv), d_bias

    def of(self, rows: slice, keys: slice) -> Gradients | None:
        """Return the gradients of whole nodes of both trees; None where no row sees a key."""
        if not self._visible(rows, keys):
            return None
        by_trees = self._kernel.backward_by_trees(self._scores) and len(self._intervals) == 1
        if by_trees or max(_size(rows), _size(keys)) <= SEGMENT:
            return self._by_kernel(rows, keys)
        if _size(rows) > _size(keys):
            above, below = self._halves([(half, keys) for half in _halves(rows)])
            bias = None if above.bias is None or below.bias is None else torch.cat([above.bias, below.bias], dim=2)
            return Gradients(torch.cat([above.q, below.q], dim=2), above.k + below.k, above.v + below.v, bias)
        left, right = self._halves([(rows, half) for half in _halves(keys)])
        bias = None if left.bias is None or right.bias is None else torch.cat([left.bias, right.bias], dim=3)
        d_k, d_v = torch.cat([left.k, right.k], dim=2), torch.cat([left.v, right.v], dim=2)
        return Gradients(left.q + right.q, d_k, d_v, bias)

    def _halves(self, blocks: list[tuple[slice, slice]]) -> list[Gradients]:
        return [self.of(rows, keys) or self.nothing(rows, keys) for rows, keys in blocks]

    def nothing(self, rows: slice, keys: slice) -> Gradients:
        """The gradients where no row sees a key."""
        dtype, bias = state_dtype(self._q.dtype), self._scores.bias
        tensors = (self._q[:, :, rows], *self._block.keys(keys).tensors)
        d_q, d_k, d_v = (torch.zeros_like(x, dtype=dtype) for x in tensors)
        d_bias = None if bias is None else torch.zeros_like(bias[:, :, rows, keys], dtype=dtype)
        return Gradients(d_q, d_k, d_v, d_bias)

    def _visible(self, rows: slice, keys: slice) -> bool:
        for lo, hi in self._intervals:
            some_lo, some_hi = lo[:, rows], hi[:, rows]
            if bool(((some_lo < some_hi) & (some_lo < keys.stop) & (some_hi > keys.start)).any()):
                return True
        return False

    def _by_kernel(self, rows: slice, keys: slice) -> Gradients:
        q, block = self._q[:, :, rows], self._block.keys(keys)
        scores = self._scores.some_rows(rows).some_keys(keys)
        g = self._gradient
        gradient = OutputGradient(g.out[:, :, rows], g.lse[:, :, rows], g.delta[:, :, rows])
        found = []
        for bounds in self._intervals:
            local = Bounds(*((x[:, rows] - keys.start).clamp(0, _size(keys)) for x in bounds))
            found.append(self._kernel.backward_leaf(q, block, local, scores, gradient))
        total = functools.reduce(Gradients.__add__, found)
        for x in (total.q, total.k, total.v):
            x.add_(0.0)  # -0.0 becomes 0.0, as beside zeros; a sum is -0.0 only where both sides are
        return total


def _size(some: slice) -> int:
    size: int = some.stop - some.start
    return size


def _halves(some: slice) -> tuple[slice, slice]:
    """Cut where the tree over these positions has its root's second child."""
    middle = some.start + (SEGMENT << ((segments(_size(some)) - 1).bit_length() - 1))
    return slice(some.start, middle), slice(middle, some.stop)
