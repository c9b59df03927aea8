"""The public operations: attention over sharded keys, shard and unshard, and the plain weighted sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .comm import Communicator, agree, connect
from .errors import Unsupported
from .kernels import Kernel, as_kernel
from .layouts import Layout, Placement, as_layout
from .masks import Mask
from .problem import Problem, state_dtype
from .state import AttentionState
from .strategies import Call, Strategy, as_strategy, choose

Indices = Int[Tensor, " entries"] | Sequence[int]
Window = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a call asks for besides its tensors; `attention` documents each."""

    layout: str | Layout = "contiguous"
    strategy: str | Strategy = "auto"
    kernel: str | Kernel = "auto"
    causal: bool = False
    window: Window | None = None
    cu_seqlens: Indices | None = None
    cu_seqlens_k: Indices | None = None
    key_range: tuple[Indices, Indices] | None = None
    scale: float | None = None
    q_replicated: bool = False
    q_start: int | Indices | None = None
    q_len: int | None = None
    kv_len: int | None = None
    lengths: Tensor | None = None  # of a cache: how many keys each sequence has; its queries end there

    def describe(self) -> dict[str, Any]:
        """The arguments as JSON values, checked as far as one rank alone can check them."""
        layout, strategy = as_layout(self.layout), as_strategy(self.strategy)
        window = _window(self.window)
        if self.key_range is not None and len(self.key_range) != 2:
            raise ValueError(f"key_range must be (start, end): got {len(self.key_range)} entries.")
        if self.cu_seqlens is None and self.cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens: state the documents of the queries too.")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number: got {self.scale}.")
        return {
            "layout": [layout.name, *layout.weights],
            "strategy": "auto" if strategy is None else strategy.name,
            "kernel": as_kernel(self.kernel).name,
            "causal": bool(self.causal),
            "window": window,
            "cu_seqlens": _listed(self.cu_seqlens),
            "cu_seqlens_k": _listed(self.cu_seqlens_k),
            "key_range": None if self.key_range is None else [_listed(bound) for bound in self.key_range],
            "scale": self.scale,
            "q_replicated": bool(self.q_replicated),
            "q_start": _listed(self.q_start),
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "lengths": _listed(self.lengths),
        }

    def mask(self, q_len: int, kv_len: int, batch: int) -> Mask:
        """The mask over the global lengths. Raises: ValueError where arguments and lengths do not agree."""
        for name, stated, found in (("q_len", self.q_len, q_len), ("kv_len", self.kv_len, kv_len)):
            if stated is not None and stated != found:
                raise ValueError(f"{name}={stated}, but the ranks together hold {found}.")
        documents_k = self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k
        key_range = None
        if self.key_range is not None:
            start, end = (_per_sequence("key_range", bound, batch) for bound in self.key_range)
            key_range = (start, end)
        q_start = None if self.q_start is None else _per_sequence("q_start", self.q_start, batch)
        if self.lengths is not None:
            start, end = (torch.zeros_like(self.lengths), self.lengths) if key_range is None else key_range
            key_range = (start, torch.minimum(end, self.lengths))
            q_start = self.lengths - q_len
        return Mask(
            q_len=q_len,
            kv_len=kv_len,
            causal=self.causal,
            window=_window(self.window),
            cu_seqlens=_indices(self.cu_seqlens),
            cu_seqlens_k=_indices(documents_k),
            key_range=key_range,
            q_start=q_start,
        )


def attention(
    q: Float[Tensor, "batch q_heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    comm: Communicator | None = None,
    layout: str | Layout = "contiguous",
    strategy: str | Strategy = "auto",
    kernel: str | Kernel = "auto",
    causal: bool = False,
    window: Window | None = None,
    cu_seqlens: Indices | None = None,
    cu_seqlens_k: Indices | None = None,
    key_range: tuple[Indices, Indices] | None = None,
    scale: float | None = None,
    q_replicated: bool = False,
    q_start: int | Indices | None = None,
    q_len: int | None = None,
    kv_len: int | None = None,
    return_state: bool = False,
) -> Any:  # a Tensor, or an AttentionState if return_state; a union would burden every caller's type checker
    """The attention of this rank's queries over the keys and values of all ranks.

    Each rank passes its own shards, in layout order. Query t of a sequence stands at position
    t + kv_len - q_len, so the last query meets the last key, or at q_start + t.

    - `comm`: default `connect()`. `layout`: "contiguous", "zigzag", "striped" or a `Layout`: which positions
      each rank's shards hold; contiguous takes whatever lengths the ranks hold.
    - `strategy`: "all_reduce", "all_gather", "ring" or "auto". `kernel`: "aten", "reference" or "auto".
    - `causal`: row i sees keys up to its own position. `window` (left, right): only so many keys around its own
      position; None or -1 is no limit. `key_range` (start, end), each (batch,): only those keys (padding).
      `cu_seqlens`, `cu_seqlens_k`: cumulative global lengths of packed documents, which see only themselves.
      `q_start`: int or (batch,).
    - `scale`: multiplies the scores, default 1 / sqrt(head_dim).
    - `q_replicated`: every rank passes the same queries (decode) and gets the same result, bit for bit.
    - `q_len`, `kv_len`: the global lengths, checked against what the ranks hold.
    - `return_state`: an `AttentionState` (out in float32 or wider, and lse) instead of `out` in q's dtype.

    Shapes: q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads,
    kv_len, v_dim), out (batch, q_heads, q_len, v_dim). kv_heads divides q_heads; any rank may hold no queries
    or no keys.
    Numerics: partial sums are float32 or wider. A row that sees no key gives 0 (lse -inf). A key that a row may
    not see contributes nothing to it, whatever it holds.
    Traffic: one all-gather of 64 bytes in which the ranks agree on the call, then what the strategy declares.
    Raises: ValueError for arguments that make no sense; Mismatch on every rank where the ranks' calls differ;
    Unsupported where gradients are asked for; RankLost where a peer is gone.

    >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
    >>> attention(q, k, v, causal=True)[0, 0, 0]
    tensor([1., 0.])
    """
    arguments = Arguments(
        layout=layout,
        strategy=strategy,
        kernel=kernel,
        causal=causal,
        window=window,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        key_range=key_range,
        scale=scale,
        q_replicated=q_replicated,
        q_start=q_start,
        q_len=q_len,
        kv_len=kv_len,
    )
    state = attend(connect() if comm is None else comm, q, k, v, arguments)
    return state if return_state else state.out.to(q.dtype)


def attend(
    comm: Communicator, q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, keys: Placement | None = None
) -> AttentionState:
    """The state of this rank's query rows: what `attention` and `KVCache.attend` have in common.

    `keys` says where the keys lie; by default the layout does.
    """

    def describe() -> dict[str, Any]:
        _refuse_gradients("attention", q, k, v)
        problem = Problem.of(q, k, v)
        sizes = {name: getattr(problem, name) for name in ("batch", "q_heads", "kv_heads", "head_dim", "v_dim")}
        return {"call": "attention", **sizes, "dtype": str(q.dtype), **arguments.describe()}

    lengths = agree_on(comm, describe, q, k)
    q_lens, kv_lens = [q_len for q_len, _ in lengths], [kv_len for _, kv_len in lengths]
    layout = as_layout(arguments.layout)
    keys = Placement.of(layout, kv_lens, "keys") if keys is None else keys
    assert [len(positions) for positions in keys.positions] == kv_lens
    if arguments.q_replicated:
        queries = Placement.replicated(q_lens)
    else:
        queries = Placement.of(layout, q_lens, "queries")
    q_len = q_lens[0] if arguments.q_replicated else queries.length
    call = Call(
        comm=comm,
        kernel=as_kernel(arguments.kernel),
        q=q,
        k=k,
        v=v,
        mask=arguments.mask(q_len, keys.length, q.shape[0]),
        queries=queries,
        keys=keys,
        scale=1.0 / math.sqrt(q.shape[3]) if arguments.scale is None else float(arguments.scale),
        q_replicated=arguments.q_replicated,
    )
    return (as_strategy(arguments.strategy) or choose(call)).forward(call)


def shard(
    x: Tensor, *, comm: Communicator | None = None, dim: int = 2, layout: str | Layout = "contiguous"
) -> Tensor:
    """This rank's part of `x`, which is whole on every rank: the positions of `dim` that the layout gives it.

    >>> shard(torch.arange(4), dim=0, layout="zigzag")
    tensor([0, 1, 2, 3])
    """
    comm = connect() if comm is None else comm
    _refuse_gradients("shard", x)
    positions = as_layout(layout).positions(x.shape[dim], comm.rank, comm.size)
    return x.index_select(dim, positions.to(x.device))


def unshard(
    x: Tensor, *, comm: Communicator | None = None, dim: int = 2, layout: str | Layout = "contiguous"
) -> Tensor:
    """The whole of which every rank passes its part, on every rank: the inverse of `shard`.

    Traffic: each rank sends its part to every other.
    Raises: ValueError where the parts are not cut as the layout cuts; Mismatch where the ranks' calls differ.

    >>> unshard(torch.arange(4), dim=0, layout="zigzag")
    tensor([0, 1, 2, 3])
    """
    comm = connect() if comm is None else comm
    layout = as_layout(layout)

    def describe() -> dict[str, Any]:
        _refuse_gradients("unshard", x)
        others = [size for axis, size in enumerate(x.shape) if axis != dim % x.ndim]
        names = [layout.name, *layout.weights]
        return {
            "call": "unshard",
            "dim": dim % x.ndim,
            "layout": names,
            "dtype": str(x.dtype),
            "sizes": others,
        }

    lengths = [length for length, _ in agree_on(comm, describe, x, x, dim)]
    placement = Placement.of(layout, lengths, "positions")
    moved = x.movedim(dim, 0)
    parts = comm.all_gather(moved.contiguous(), [(length, *moved.shape[1:]) for length in lengths])
    order = torch.cat(placement.positions).argsort().to(x.device)
    return torch.cat(parts).index_select(0, order).movedim(0, dim)


def weighted_sum(
    weights: Float[Tensor, "*rows keys"],
    values: Float[Tensor, "*batch keys v_dim"],
    *,
    comm: Communicator | None = None,
) -> Tensor:
    """`weights @ values` over the keys of all ranks, for weights that are already normalised, on every rank.

    Shapes: weights (..., keys), values (..., keys, v_dim); the keys are this rank's, any number of them.
    Numerics: partial sums are float32 or wider and are added in rank order, so every rank has the same bits. A
    weight of exactly 0 contributes nothing, whatever its value holds.
    Traffic: each rank sends its partial sum to every other, after the agreement.
    Raises: ValueError for shapes that do not fit; Mismatch where the ranks' calls differ.

    >>> weighted_sum(torch.tensor([0.25, 0.75]), torch.tensor([[4.0], [8.0]]))
    tensor([7.])
    """
    comm = connect() if comm is None else comm

    def describe() -> dict[str, Any]:
        _refuse_gradients("weighted_sum", weights, values)
        if weights.ndim < 1 or values.ndim < 2 or weights.shape[-1] != values.shape[-2]:
            raise ValueError(
                "weights (..., keys) and values (..., keys, v_dim) must have the same number of keys: "
                f"got {tuple(weights.shape)} and {tuple(values.shape)}."
            )
        if not weights.is_floating_point() or weights.dtype != values.dtype:
            raise ValueError(
                f"weights and values must have one floating dtype: got {weights.dtype} and {values.dtype}."
            )
        sizes = [list(weights.shape[:-1]), [*values.shape[:-2], values.shape[-1]]]
        return {"call": "weighted_sum", "dtype": str(values.dtype), "sizes": sizes}

    agree_on(comm, describe, weights, values, -1)
    dtype = state_dtype(values.dtype)
    partial = _sum_of_weighted(weights.to(dtype), values.to(dtype))
    return functools.reduce(torch.add, comm.all_gather(partial)).to(values.dtype)


def _sum_of_weighted(weights: Tensor, values: Tensor) -> Tensor:
    total = weights @ values
    if bool(total.sum(dtype=torch.float64).isfinite()):
        return total
    # 0 * NaN is NaN, but a weight of 0 has no say: products with what is not finite are written out.
    finite = values.isfinite()
    total = weights @ values.masked_fill(~finite, 0.0)
    for key in (~finite).any(dim=-1).reshape(-1, values.shape[-2]).any(dim=0).nonzero().flatten().tolist():
        weight = weights[..., key].unsqueeze(-1)
        value = values[..., key, :].masked_fill(finite[..., key, :], 0.0)
        value = value.unsqueeze(-2) if weights.ndim > 1 else value
        total = total + torch.where((weight == 0.0) | (value == 0.0), 0.0, weight * value)
    return total


def agree_on(
    comm: Communicator, describe: Callable[[], dict[str, Any]], q: Tensor, k: Tensor, dim: int = 2
) -> list[tuple[int, int]]:
    """Every rank's lengths of q and k along `dim`, once all ranks gave the same description.

    A ValueError from `describe`, the caller's mistake on this rank, reaches every rank instead of a hang.
    """
    description: dict[str, Any] = {}
    error: ValueError | None = None
    lengths = (0, 0)
    try:
        description = describe()
        lengths = (q.shape[dim], k.shape[dim])
    except ValueError as mistake:
        error = mistake
    return agree(comm, description, *lengths, error)


def _refuse_gradients(what: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise Unsupported(f"{what} has no gradients yet: call it under torch.no_grad() or detach the inputs.")


def _window(window: Window | None) -> Window:
    if window is None:
        return (None, None)
    sides = tuple(window) if isinstance(window, (tuple, list)) else ()
    if len(sides) != 2 or any(side is not None and side < -1 for side in sides):
        raise ValueError(
            f"window must be (left, right), each a number of keys, or None or -1 for no limit: got {window!r}."
        )
    left, right = (None if side == -1 else side for side in sides)
    return (left, right)


def _indices(values: Indices | None) -> Tensor | None:
    return None if values is None else torch.as_tensor(values, dtype=torch.int64, device="cpu")


def _per_sequence(name: str, values: int | Indices, batch: int) -> Tensor:
    indices = torch.as_tensor(values, dtype=torch.int64, device="cpu").reshape(-1)
    if len(indices) not in (1, batch):
        raise ValueError(f"{name} must have one entry for each sequence: got {len(indices)} for batch {batch}.")
    return indices


def _listed(values: int | Indices | None) -> list[int] | int | None:
    if values is None or isinstance(values, int):
        return values
    listed: list[int] = torch.as_tensor(values).tolist()
    return listed
