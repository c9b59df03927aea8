"""A KV cache whose positions are spread over ranks: each rank's memory falls as one over their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import Arguments, Indices, indices_of, listed, settled
from ..comm import Communicator, agree_on, as_communicator, mistakes_reach_all
from ..compiler import outside_graphs
from ..copies import OneRanksPart
from ..errors import Unsupported
from ..layouts import Layout, as_layout
from ..placement import Placement
from ..prepared import PreparedCall
from ..prepared_calls import PreparedCalls
from ..problem import DTYPES, Sizes, check_dims
from ..scalars import at_least, flag, shown
from ..strategies import PlacedBlock
from ..tensors import check_tensors
from ..tree import unit
from .slab import Layer, Shape
from .store import Store

SIZES = ("layers", "kv_heads", "head_dim", "v_dim")
QUANTIZATIONS = (None, "int8")
# Arguments of `attention` that `attend` does not have, and why.
_NOT_OPTIONS = {
    "comm": "the cache has its own",
    "reproducible": "KVCache(..., reproducible=True) decides it for the whole cache",
    "return_bound": "only attention(...) bounds its error",
}


class KVCache(OneRanksPart):
    """Keys and values of every layer, sharded over the ranks by position.

    Where a position lies is decided once, for all layers and sequences: tokens that came sharded stay on the
    rank that brought them, replicated ones go to the ranks in turn. Every rank knows where all positions lie.

    `quantize="int8"` holds keys and values as int8, with a float32 scale for each token and KV head: dim + 4 bytes
    in place of 4 dim in float32. With the native kernel a decode step reads them as they are; everything else, and
    keys that travel, takes copies in the queries' dtype, one layer at a time.
    `reproducible=True`: ranks get whole segments of 256 positions, and every `attend` has the same bits on any
    number of ranks, as `attention(..., reproducible=True)`: a token's are the same decoded and prefilled.
    `copy.deepcopy` copies it, on each rank by itself; to save one is refused.
    Numerics: of int8, the output is within 1e-2 by relative norm on keys and values from N(0, 1), head_dim up to
    128; copies in bfloat16 make that 1.1e-2.

    >>> cache = KVCache(layers=1, kv_heads=1, head_dim=2)
    >>> cache.append(0, torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    >>> len(cache), cache.attend(0, torch.ones(1, 1, 1, 2)).tolist()
    (3, [[[[1.0, 1.0]]]])
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        v_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        comm: Communicator | None = None,
        quantize: str | None = None,
        reproducible: bool = False,
    ) -> None:
        self.comm = as_communicator(comm)
        self._reproducible, self._unit = reproducible, unit(reproducible)
        dims = (head_dim, head_dim if v_dim is None else v_dim)
        _check_shape((layers, kv_heads, *dims), dtype, quantize)
        self._shape = Shape(kv_heads, dims, dtype, device, quantize is not None)
        self._store = Store(layers, self._shape, self.comm.rank, self.comm.size, self._unit)
        self._calls: PreparedCalls[PreparedCall] = PreparedCalls()

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self._calls = PreparedCalls()
        self._store.clear()

    def __len__(self) -> int:
        """The number of tokens that every layer holds, of the longest sequence."""
        return min((layer.longest for layer in self._store.layers), default=0)

    def lengths(self, layer: int) -> Int[Tensor, " batch"]:
        """The number of tokens of each sequence in one layer; empty before its first token."""
        return torch.tensor(self._store.layer(layer).lengths, dtype=torch.int64)

    @property
    def bytes_held(self) -> int:
        """Bytes of this rank's storage, room to grow included."""
        return sum(layer.nbytes for layer in self._store.layers)

    @outside_graphs
    def append(
        self,
        layer: int,
        k: Float[Tensor, "batch kv_heads new head_dim"],
        v: Float[Tensor, "batch kv_heads new v_dim"],
        layout: str | Layout | None = None,
        lengths: Indices | None = None,
    ) -> None:
        """Add new tokens at the end of every sequence of one layer.

        Without `layout`, k and v are the same new tokens on every rank, and each rank keeps those that it owns.
        With it, they are this rank's shard of the new tokens and stay here. `lengths` (batch,): only so many of
        the new tokens, the first ones, are valid in each sequence; sequences advance separately.

        Shapes: k (batch, kv_heads, new, head_dim), v (batch, kv_heads, new, v_dim).
        Traffic: none without `layout`; with it, one all-gather of 64 bytes to agree on the number of tokens.
        Raises: ValueError for shapes that do not fit the cache; Mismatch where the ranks' calls differ (without
        `layout` only the next `attend` finds out); Unsupported for shards behind sequences of different lengths.
        """

        def describe() -> dict[str, Any]:
            store = self._store.layer(layer)
            store.check(k, v)
            shape = [*k.shape[:2], k.shape[3], v.shape[3]]
            return {"layer": layer, "shape": shape, "cached": store.lengths, "lengths": listed("lengths", lengths)}

        shards = None if layout is None else _agree_on_shards(self.comm, describe, k, layout, self._unit)
        store = self._store.layer(layer)
        store.check(k, v)
        new, batch = k.shape[2] if shards is None else shards.length, len(store.lengths) or k.shape[0]
        valid = (new,) * batch if lengths is None else _valid(lengths, batch, new)
        self._store.append(store, k, v, valid, shards)

    @outside_graphs
    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch q_heads q_len head_dim"],
        *,
        causal: bool = True,
        q_replicated: bool = True,
        layout: str | Layout | None = None,
        return_state: bool = False,
        **options: Any,
    ) -> Any:  # a Tensor, or an AttentionState if return_state
        """The attention of queries over what all ranks hold in one layer; the last query meets the last token.

        Queries are the same on every rank, or with `q_replicated=False` this rank's shard by `layout` (prefill).
        `options` are the other arguments of `attention` (window, key_range, softcap, sinks, strategy, ...; but
        `reproducible` is the cache's, and there is no return_bound), as are Numerics and Raises. In a batch whose
        sequences have different lengths, each sequence's queries end at its own length.
        """
        with mistakes_reach_all(self.comm):
            flag("return_state", return_state)
            _check_queries(q)
            layout = "contiguous" if layout is None else layout
            given = settled({"causal": causal, "q_replicated": q_replicated, "layout": layout, **options})
            store = self._store.layer(layer)
            blocks = self._store.blocks(store, q.shape[0])
            call = self._call(store, q, blocks, given)
        state = call.attend(q, blocks, f"KVCache.attend in layer {layer}")
        return state if return_state else state.out.to(q.dtype)

    def _call(self, store: Layer, q: Tensor, blocks: list[PlacedBlock], given: dict[str, Any]) -> PreparedCall:
        """The call but for its tensors, which is mostly what it was in the layer before."""
        lengths, owners = store.lengths or (0,) * q.shape[0], self._store.owners
        with_gradients = torch.is_grad_enabled() and q.requires_grad  # keys and values have none
        key = (owners.version, lengths, self._store.reordered, q.shape, q.dtype, q.device, with_gradients)

        def make() -> PreparedCall:
            sizes = Sizes.of(q, *blocks[0].block.tensors[:2], quantized=self._shape.quantized)
            _check_options(given)
            arguments = Arguments(**given, reproducible=self._reproducible)
            arguments = replace(arguments, lengths=lengths, reordered=self._store.reordered)
            at = owners.placement(store.longest)
            return PreparedCall(self.comm, sizes, (q,), arguments, at, store.shape.kind)

        return self._calls.get(key, given, make)

    @outside_graphs
    def crop(self, length: int) -> None:
        """Forget every sequence's tokens from position `length` on, and give idle memory back."""
        self._store.crop(at_least("length", length, 0))

    @outside_graphs
    def reorder(self, sequences: Indices) -> None:
        """Make sequence b of the batch what `sequences[b]` was; entries may repeat (beam search)."""
        self._store.reorder(_order(sequences, self._store.batch))


def _check_shape(sizes: tuple[int, ...], dtype: torch.dtype, quantize: str | None) -> None:
    for name, size in zip(SIZES, sizes, strict=True):
        at_least(name, size, 1)
    if quantize not in QUANTIZATIONS:
        raise Unsupported(f"quantize must be None or 'int8': got {shown(quantize)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16: got {dtype}.")


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name in _NOT_OPTIONS:
            raise Unsupported(f"KVCache.attend takes no {name}: {_NOT_OPTIONS[name]}.")
        if name not in Arguments.names():
            raise ValueError(f"KVCache.attend takes no {name}. It takes the arguments of attention.")


def _check_queries(q: Tensor) -> None:
    check_tensors(q=q)
    check_dims("q", q)


def _agree_on_shards(
    comm: Communicator, describe_layer: Callable[[], dict[str, Any]], k: Tensor, layout: str | Layout, unit: int
) -> Placement:
    """Where the new tokens lie of which each rank has a shard, once all ranks have said the same of them."""

    def describe() -> dict[str, Any]:
        return {"call": "append", "layout": as_layout(layout).describe(), **describe_layer()}

    counts = [length for _, length in agree_on(comm, describe, k, k)]
    return as_layout(layout).of_lengths(counts, "new tokens", unit)


def _order(sequences: Indices, batch: int) -> Tensor:
    order = indices_of("sequences", sequences)
    if order is None or order.ndim != 1 or not len(order) or not _all_in(order, 0, max(batch, 1) - 1):
        raise ValueError(f"sequences must be numbers of the {batch} in the cache, one at least: got {sequences}.")
    return order


def _valid(lengths: Indices, batch: int, new: int) -> tuple[int, ...]:
    valid = indices_of("lengths", lengths)
    if valid is None or valid.shape != (batch,) or not _all_in(valid, 0, new):
        raise ValueError(f"lengths must be ({batch},), each from 0 to {new} new tokens: got {lengths}.")
    return tuple(valid.tolist())


def _all_in(numbers: Tensor, least: int, most: int) -> bool:
    return bool(((numbers >= least) & (numbers <= most)).all())
