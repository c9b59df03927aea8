"""A KV cache whose positions are spread over ranks: each rank's memory falls as one over their number."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .arguments import Arguments, Indices
from .attention import attend
from .comm import Communicator, agree_on, as_communicator
from .errors import Unsupported
from .layouts import Layout, Placement, as_layout

# A layer's storage grows by a 32nd, at least 32 positions: about 3 % of it lies idle at most.
GROWTH_SHARE, GROWTH_POSITIONS = 32, 32


class KVCache:
    """Keys and values of every layer, sharded over the ranks by position.

    Where a position lies is decided once, for all layers and sequences: tokens that came sharded stay on the
    rank that brought them, replicated ones go to the ranks in turn. Every rank knows where all positions lie.

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
    ) -> None:
        self.comm = as_communicator(comm)
        dims = (head_dim, head_dim if v_dim is None else v_dim)
        self._layers = [_Layer(kv_heads, *dims, dtype, device) for _ in range(layers)]
        self.reset()

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        # Position p of every sequence lies on rank _owners[p].
        self._owners = torch.empty(0, dtype=torch.int64)
        self._placement: Placement | None = None
        for layer in self._layers:
            layer.clear()

    def __len__(self) -> int:
        """The number of tokens that every layer holds, of the longest sequence."""
        return min((layer.longest for layer in self._layers), default=0)

    def lengths(self, layer: int) -> Int[Tensor, " batch"]:
        """The number of tokens of each sequence in one layer; empty before its first token."""
        return self._layer(layer).lengths

    @property
    def bytes_held(self) -> int:
        """Bytes of this rank's storage, room to grow included."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._layers)

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
        store = self._layer(layer)
        if layout is None:
            store.check(k, v)
            index, new, owners = torch.arange(k.shape[2]), k.shape[2], None
        else:
            placement = self._agree_on_shards(layer, k, v, as_layout(layout))
            index, new, owners = placement.positions[self.comm.rank], placement.length, _owners(placement)
        start = store.lengths if len(store.lengths) else torch.zeros(k.shape[0], dtype=torch.int64)
        valid = torch.full_like(start, new) if lengths is None else _valid(lengths, len(start), new)
        last = int((start + valid).max())
        even = bool((start == start[0]).all())
        self._assign(int(start[0]) if even else None, last, owners)
        mine = self._positions(last, self.comm.rank)
        store.reserve(len(start), len(mine))
        whole = [(slice(None), int(start[0]), int(valid.max()))]
        single = [(slice(b, b + 1), int(start[b]), int(valid[b])) for b in range(len(start))]
        for row, base, count in whole if even else single:
            valid_index = index[index < count]
            here = (self._owners[base + valid_index] == self.comm.rank).nonzero().flatten()
            slots = torch.searchsorted(mine, base + index[here])
            here = here.to(k.device)
            store.write(row, slots, k[row].index_select(2, here), v[row].index_select(2, here))
        store.lengths = start + valid

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
        `options` are the other arguments of `attention` (window, key_range, softcap, sinks, strategy, ...), as are
        Numerics and Raises. In a batch whose sequences have different lengths, each sequence's queries end at its
        own length.
        """
        store = self._layer(layer)
        arguments = Arguments(
            layout="contiguous" if layout is None else layout,
            causal=causal,
            q_replicated=q_replicated,
            **options,
            lengths=store.lengths if len(store.lengths) else torch.zeros(q.shape[0], dtype=torch.int64),
        )
        placement = self._place(store.longest)
        held = len(placement.positions[self.comm.rank])
        k, v = store.k[:, :, :held], store.v[:, :, :held]
        if not len(store.lengths):
            k, v = (x.new_empty(q.shape[0], *x.shape[1:]) for x in (k, v))
        state = attend(self.comm, q, k, v, arguments, placement, f"KVCache.attend in layer {layer}")
        return state if return_state else state.out.to(q.dtype)

    def crop(self, length: int) -> None:
        """Forget every sequence's tokens from position `length` on."""
        if length < 0:
            raise ValueError(f"length must be 0 or more: got {length}.")
        for layer in self._layers:
            layer.lengths = layer.lengths.clamp(max=length)
        self._owners = self._owners[: max((layer.longest for layer in self._layers), default=0)]
        self._placement = None

    def reorder(self, sequences: Indices) -> None:
        """Make sequence b of the batch what `sequences[b]` was; entries may repeat (beam search)."""
        order = torch.as_tensor(sequences, dtype=torch.int64, device="cpu")
        for layer in self._layers:
            layer.reorder(order)

    def _layer(self, layer: int) -> _Layer:
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"layer must be one of the cache's {len(self._layers)}: got {layer}.")
        return self._layers[layer]

    def _agree_on_shards(self, layer: int, k: Tensor, v: Tensor, layout: Layout) -> Placement:
        def describe() -> dict[str, Any]:
            self._layer(layer).check(k, v)
            cached = self._layer(layer).lengths.tolist()
            shape = [*k.shape[:2], k.shape[3], v.shape[3]]
            names = layout.describe()
            return {"call": "append", "layer": layer, "shape": shape, "layout": names, "lengths": cached}

        lengths = [length for _, length in agree_on(self.comm, describe, k, k)]
        return Placement.of(layout, lengths, "new tokens")

    def _assign(self, base: int | None, last: int, owners: Tensor | None) -> None:
        """Give the positions before `last` that lie nowhere yet to ranks: sharded from `base`, or in turn."""
        known = len(self._owners)
        if owners is None:
            new = torch.arange(known, max(known, last)) % self.comm.size
        else:
            if base is None:
                raise Unsupported(
                    "sharded tokens can't follow sequences of different lengths. Append them without layout."
                )
            again = min(known, last) - base
            if not torch.equal(owners[:again], self._owners[base : base + again]):
                raise ValueError("every layer must be sharded alike: these positions lie on other ranks already.")
            new = owners[again : last - base]
        if len(new):
            self._owners = torch.cat([self._owners, new])

    def _positions(self, length: int, rank: int) -> Tensor:
        return (self._owners[:length] == rank).nonzero().flatten()

    def _place(self, length: int) -> Placement:
        """Where the first `length` positions lie, kept for the next layer."""
        if self._placement is None or self._placement.length != length:
            self._placement = Placement(tuple(self._positions(length, rank) for rank in range(self.comm.size)))
        return self._placement


class _Layer:
    """One layer's storage on this rank: slots in the order of their positions, and each sequence's length."""

    def __init__(
        self, kv_heads: int, head_dim: int, v_dim: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        self._empty_k = torch.empty(0, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self._empty_v = torch.empty(0, kv_heads, 0, v_dim, dtype=dtype, device=device)
        self.clear()

    def clear(self) -> None:
        self.k, self.v = self._empty_k, self._empty_v
        self.lengths = torch.empty(0, dtype=torch.int64)

    @property
    def longest(self) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0

    def check(self, k: Tensor, v: Tensor) -> None:
        batch = len(self.lengths) or k.shape[0]
        for name, x, like in (("k", k, self.k), ("v", v, self.v)):
            heads, dim = like.shape[1], like.shape[3]
            if x.ndim != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, dim) or x.dtype != like.dtype:
                raise ValueError(
                    f"{name} must be ({batch}, {heads}, new, {dim}) in {like.dtype}, as in the cache: "
                    f"got {tuple(x.shape)} in {x.dtype}."
                )
        if batch == 0:
            raise ValueError("a cache needs at least one sequence: got a batch of 0.")
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"k and v must have the same length: got {k.shape[2]} and {v.shape[2]}.")

    def reserve(self, batch: int, slots: int) -> None:
        """Make room for so many slots; contents stay."""
        held = self.k.shape[2]
        if slots <= held and self.k.shape[0] == batch:
            return
        capacity = slots if held == 0 else slots + max(slots // GROWTH_SHARE, GROWTH_POSITIONS)
        self.k, self.v = (_grown(x, batch, capacity) for x in (self.k, self.v))

    def write(self, row: slice, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.k[row].index_copy_(2, slots.to(k.device), k)
        self.v[row].index_copy_(2, slots.to(v.device), v)

    def reorder(self, order: Tensor) -> None:
        if len(self.lengths):
            self.k, self.v = (x.index_select(0, order.to(x.device)) for x in (self.k, self.v))
            self.lengths = self.lengths[order]


def _grown(x: Tensor, batch: int, capacity: int) -> Tensor:
    grown = x.new_empty(batch, x.shape[1], capacity, x.shape[3])
    if x.shape[0]:
        grown[:, :, : x.shape[2]] = x
    return grown


def _owners(placement: Placement) -> Tensor:
    owners = torch.empty(placement.length, dtype=torch.int64)
    for rank, positions in enumerate(placement.positions):
        owners[positions] = rank
    return owners


def _valid(lengths: Indices, batch: int, new: int) -> Tensor:
    valid = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
    if valid.shape != (batch,) or not bool(((valid >= 0) & (valid <= new)).all()):
        raise ValueError(f"lengths must be ({batch},), each from 0 to {new} new tokens: got {valid.tolist()}.")
    return valid
