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

from ..packed import merge_alike
from ..problem import state_dtype
from ..scores import Scores
from ..state import AttentionState
from ..tree import SEGMENT, Forest, Node, segments
from .base import Bounds, Gradients, Kernel, Keys, OutputGradient, Queries, Values

ROWS = 16  # of a piece: few, since one query is padded to as many
Intervals = Sequence[tuple[Bounds, Bounds]]
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
def state_by_pieces(
    kernel: Kernel, q: Queries, k: Keys, v: Values, lo: Bounds, hi: Bounds, scores: Scores
) -> AttentionState:
    """`kernel.forward` along the tree over the segments of k, computed piece by piece."""
    count = segments(k.shape[2])
    nothing = AttentionState.empty(*q.shape[:3], v.shape[3], dtype=state_dtype(q.dtype), device=q.device)
    forest = Forest(count, merge_alike, nothing, {})
    for segment in range(count):
        state = AttentionState(nothing.out.clone(), nothing.lse.clone())
        for b, h, rows, keys in _pieces(q, k, segment):
            bounds = _bounds(lo, hi, b, rows, keys)
            if bool((bounds[0] < bounds[1]).any()):
                part = scores.some(b, h, rows, keys)
                found = kernel.forward(_row(q, b, h, rows), *_key_rows(q, k, v, b, h, keys), *bounds, part)
                own = slice(int(rows[0]), int(rows[-1]) + 1)
                state.out[b, h, own] = found.out[0, 0, : own.stop - own.start] + 0.0
                state.lse[b, h, own] = found.lse[0, 0, : own.stop - own.start]
        forest = forest.of({**forest.nodes, Node(0, segment): state})
    return forest.total()


@_one_thread()
def gradients_by_pieces(
    kernel: Kernel,
    q: Queries,
    k: Keys,
    v: Values,
    lo: Bounds,
    hi: Bounds,
    scores: Scores,
    gradient: OutputGradient,
) -> Gradients:
    """`kernel.backward` of one segment of k, computed piece by piece and added up in one order."""
    dtype = state_dtype(q.dtype)
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    d_bias = None if scores.bias is None else torch.zeros_like(scores.bias, dtype=dtype)
    group = q.shape[1] // k.shape[1]
    for b, h, rows, keys in _pieces(q, k, 0):
        bounds = _bounds(lo, hi, b, rows, keys)
        if not bool((bounds[0] < bounds[1]).any()):
            continue
        flowing = OutputGradient(
            _row(gradient.out, b, h, rows),
            gradient.lse[b, h, rows][None, None],
            gradient.delta[b, h, rows][None, None],
        )
        found = kernel.backward(
            _row(q, b, h, rows), *_key_rows(q, k, v, b, h, keys), *bounds, scores.some(b, h, rows, keys), flowing
        )
        own, size = slice(int(rows[0]), int(rows[-1]) + 1), k.shape[2]
        d_q[b, h, own] = found.q[0, 0, : own.stop - own.start]
        d_k[b, h // group] += found.k[0, 0, :size]
        d_v[b, h // group] += found.v[0, 0, :size]
        if d_bias is not None and found.bias is not None:
            place = (b % d_bias.shape[0], h % d_bias.shape[1], own)
            d_bias[place] += found.bias[0, 0, : own.stop - own.start, :size]
    return Gradients(d_q, d_k, d_v, d_bias)


def states_by_nodes(
    kernel: Kernel,
    tensors: tuple[Queries, Keys, Values],
    intervals: Intervals,
    scores: Scores,
    of_keys: Spans,
    kv_len: int,
) -> Forest[AttentionState]:
    """The states of all rows over these keys' nodes in a tree over `kv_len` keys, for each of the intervals."""
    q, k, v = tensors
    nodes: dict[Node, AttentionState] = {}
    for (node, some), (part, bounds) in itertools.product(of_keys, enumerate(intervals)):
        lo, hi = (bound.clamp(some.start, some.stop) - some.start for bound in bounds)
        found = kernel.forward_tree(q, k[:, :, some], v[:, :, some], lo, hi, scores.some_keys(some))
        nodes[node._replace(part=part)] = found
    nothing = AttentionState.empty(*q.shape[:3], v.shape[3], dtype=state_dtype(q.dtype), device=q.device)
    return Forest(segments(kv_len), merge_alike, nothing, nodes)


def _pieces(q: Tensor, k: Tensor, segment: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Sequence, query head, rows and keys: ROWS and SEGMENT of them, behind the last comes the last again."""
    keys = torch.arange(segment * SEGMENT, (segment + 1) * SEGMENT).clamp(max=k.shape[2] - 1)
    tiles = [torch.arange(row, row + ROWS).clamp(max=q.shape[2] - 1) for row in range(0, q.shape[2], ROWS)]
    for b, h, rows in itertools.product(range(q.shape[0]), range(q.shape[1]), tiles):
        yield b, h, rows, keys


def _bounds(lo: Tensor, hi: Tensor, b: int, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The piece's bounds: (1, ROWS) each, counted from its first key; a row that is there again sees nothing."""
    first, end = int(keys[0]), int(keys[-1]) + 1
    of_rows = [(x[b % len(x), rows].clamp(first, end) - first).unsqueeze(0) for x in (lo, hi)]
    again = torch.cat([torch.tensor([False]), rows[1:] == rows[:-1]])
    return of_rows[0], torch.where(again, of_rows[0], of_rows[1])


def _row(x: Tensor, b: int, h: int, rows: Tensor) -> Tensor:
    return x[b, h].index_select(0, rows.to(x.device))[None, None]


def _key_rows(q: Tensor, k: Tensor, v: Tensor, b: int, h: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    kv_head = h // (q.shape[1] // k.shape[1])
    return _row(k, b, kv_head, keys), _row(v, b, kv_head, keys)


class Blocks:
    """The gradients of some rows and keys, from those of one segment of rows and one of keys at a time.

    d_q is summed along the tree of the keys, d_k and d_v along the tree of the rows. Halves of halves are taken:
    within two nodes, what waits for its sibling is never more than twice the gradients themselves.
    """

    def __init__(
        self,
        kernel: Kernel,
        tensors: tuple[Queries, Keys, Values],
        intervals: Intervals,
        scores: Scores,
        gradient: OutputGradient,
    ) -> None:
        self._kernel, self._tensors, self._intervals = kernel, tensors, intervals
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
        """Of whole nodes of both trees; None where no row sees a key."""
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
        q, k, v = self._tensors
        dtype, bias = state_dtype(q.dtype), self._scores.bias
        d_q, d_k, d_v = (
            torch.zeros_like(x[:, :, some], dtype=dtype) for x, some in ((q, rows), (k, keys), (v, keys))
        )
        d_bias = None if bias is None else torch.zeros_like(bias[:, :, rows, keys], dtype=dtype)
        return Gradients(d_q, d_k, d_v, d_bias)

    def _visible(self, rows: slice, keys: slice) -> bool:
        for lo, hi in self._intervals:
            some_lo, some_hi = lo[:, rows], hi[:, rows]
            if bool(((some_lo < some_hi) & (some_lo < keys.stop) & (some_hi > keys.start)).any()):
                return True
        return False

    def _by_kernel(self, rows: slice, keys: slice) -> Gradients:
        q, k, v = self._tensors
        scores = self._scores.some_rows(rows).some_keys(keys)
        g = self._gradient
        gradient = OutputGradient(g.out[:, :, rows], g.lse[:, :, rows], g.delta[:, :, rows])
        found = []
        for lo, hi in self._intervals:
            bounds = [(x[:, rows] - keys.start).clamp(0, _size(keys)) for x in (lo, hi)]
            inputs = (q[:, :, rows], k[:, :, keys], v[:, :, keys], bounds[0], bounds[1], scores)
            found.append(self._kernel.backward_leaf(*inputs, gradient))
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
