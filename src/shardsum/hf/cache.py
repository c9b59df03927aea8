"""Transformers' `Cache` over `shardsum.KVCache`: lengths are global, keys and values are wherever they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..comm import Communicator
from ..copies import OneRanksPart
from ..errors import Unsupported
from ..kv import KVCache
from ..layouts import Layout
from .masks import IntervalMask


@dataclass(frozen=True)
class CacheShape:
    """What a model caches: a number of layers, each with the same heads."""

    layers: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LocalTokens:
    """What one forward pass runs on: this rank's `local` of `total` new tokens.

    No model runs on zero tokens, so a rank without any runs on one stand-in, which goes no further than here.
    """

    layout: Layout
    local: int
    total: int


class CacheOwner(Protocol):
    """What a cache belongs to."""

    def check(self, cache: ShardedCache) -> None:
        """Raises: ValueError where the cache may not be used any more."""

    def announce(self, layer: int, cache: ShardedCache, k: Tensor, v: Tensor) -> None:
        """Expect an attention call over the cache with these new keys: Transformers does not hand it on."""

    def renew(self) -> None:
        """Hear that a call in which all ranks take part is over."""


class LayerLength(CacheLayerMixin):  # type: ignore[no-untyped-call]  # Transformers' own hook
    """One layer as Transformers sees it: only its global length; the tensors belong to `ShardedCache`."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: ShardedCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Transformers' own
        self.cache, self.length = cache, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise Unsupported("a layer of a sharded cache is updated through its cache: cache.update(k, v, layer).")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        tokens = self.cache.local_tokens
        return self.length + (query_length if tokens is None else tokens.total), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class ShardedCache(OneRanksPart, Cache):
    """The keys and values of all tokens so far, spread over the ranks of `comm`.

    `update` keeps this rank's part of the new tokens and returns them as they came; `attend` is what looks at
    all of them. `local_tokens` is set while the forward pass runs on this rank's shard of the tokens.
    `copy.deepcopy` makes another cache of the same session, for a second question over the same tokens; to save
    one is refused.
    """

    def __init__(
        self,
        owner: CacheOwner,
        comm: Communicator,
        shape: CacheShape,
        reproducible: bool = False,
    ) -> None:
        self.lengths = [LayerLength(self) for _ in range(shape.layers)]
        super().__init__(layers=[*self.lengths])
        self.owner = owner
        self.store = KVCache(
            comm=comm,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            v_dim=shape.v_dim,
            dtype=shape.dtype,
            device=shape.device,
            reproducible=reproducible,
        )
        self.local_tokens: LocalTokens | None = None
        self.batch = 0

    @property
    def bytes_held(self) -> int:
        """How many bytes of the keys and values lie on this rank."""
        return self.store.bytes_held

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens of one layer, and return them unchanged.

        Shapes: key_states (batch, kv_heads, new, head_dim), value_states (batch, kv_heads, new, v_dim); with
        `local_tokens`, new is this rank's part, stand-in included.
        Raises: ValueError where the session has been closed, or goes on over other ranks.
        """
        self.append(key_states, value_states, layer_idx)
        self.owner.announce(layer_idx, self, key_states, value_states)
        return key_states, value_states

    def append(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Append the new tokens of one layer, where no attention call of the model's is to follow."""
        self.owner.check(self)
        mine = k.shape[2] if self.local_tokens is None else max(self.local_tokens.local, 1)
        if k.shape[2] != mine or v.shape[2] != mine:
            raise Unsupported(
                f"layer {layer} caches {k.shape[2]} keys and {v.shape[2]} values where this rank runs "
                f"{mine} tokens: they must be those of the tokens themselves."
            )
        if self.local_tokens is None:
            self.store.append(layer, k, v)
            self.lengths[layer].length += k.shape[2]
        else:
            own = slice(self.local_tokens.local)
            self.store.append(layer, k[:, :, own], v[:, :, own], layout=self.local_tokens.layout)
            self.lengths[layer].length += self.local_tokens.total
        self.batch = k.shape[0]
        self.owner.renew()

    def attend(self, layer: int, q: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
        """Attend with the new queries over all tokens so far.

        Shapes: q (batch, q_heads, new tokens on this rank, head_dim); the result has v_dim instead.
        """
        masking: dict[str, Any] = {"causal": True}
        if mask.start is not None:
            start = mask.start.to("cpu", torch.int64)
            masking["key_range"] = (start, torch.full_like(start, self.lengths[layer].length))
        if mask.left is not None:
            masking["window"] = (mask.left, 0)
        mine = q
        if self.local_tokens is not None:
            mine = q[:, :, : self.local_tokens.local]
            masking |= {"q_replicated": False, "layout": self.local_tokens.layout}
        out: Tensor = self.store.attend(layer, mine, scale=scale, **masking)
        self.owner.renew()
        if mine is q:
            return out
        stand_ins = out.new_zeros(*out.shape[:2], q.shape[2] - mine.shape[2], out.shape[3])
        return torch.cat([out, stand_ins], dim=2)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row b what row `beam_idx[b]` was. Shapes: beam_idx (new batch,)."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order. Shapes: indices (new batch,)."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, as beams need it."""
        if repeats > 1:
            self._select(torch.arange(self.batch).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.get_seq_length():
            self.store.reorder(rows)
            self.batch = len(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; Transformers passes their number negated."""
        if tokens_to_remove:
            self.cut(max(self.get_seq_length() - abs(tokens_to_remove), 0))

    def cut(self, length: int) -> None:
        """Forget the tokens from position `length` on, in whichever layers have any."""
        if length == 0:  # of a batch of any size from now on
            self.reset()
            return
        self.store.crop(length)
        for layer in self.lengths:
            layer.length = min(layer.length, length)

    def reset(self) -> None:
        """Forget everything."""
        self.store.reset()
        for layer in self.lengths:
            layer.length = 0
