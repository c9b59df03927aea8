"""A model whose attention runs over all ranks: what Transformers calls, and what it finds."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..comm import Communicator
from ..errors import Unsupported
from ..layouts import Layout
from ..tree import unit
from .cache import Part, Shape, ShardedCache
from .masks import IntervalMask, MaskFunction, checked_mask, interval_mask
from .tiles import Call, Tiles

# Masks are looked at up to this position; within a million, windows and chunks have long shown themselves.
MASK_POSITIONS = 1 << 20


class Handler(Protocol):
    """What runs in the place of one attention call: a session's cache, or the probe."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None
    ) -> Tensor: ...


class Bound(ABC):
    """One model bound to one communicator: what the functions that Transformers calls belong to.

    - `positions`: the longest sequence that the model was checked for.
    - `probe`: while the model is being checked, what stands in for its attention.
    """

    def __init__(self, model: PreTrainedModel, comm: Communicator, layout: Layout, positions: int) -> None:
        self.model, self.comm, self.layout, self.positions = model, comm, layout, positions
        self.names = {module: name for name, module in model.named_modules()}
        self.probe: Handler | None = None
        self.open = True

    @abstractmethod
    def attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: object) -> object:
        """The attention function, with Transformers' further arguments."""

    @abstractmethod
    def mask(self, batch_size: int, mask_function: MaskFunction) -> IntervalMask:
        """The mask function, with Transformers' further arguments."""

    def describe(self, module: nn.Module) -> str:
        """The module's place in the model, and its class."""
        return f"{self.names.get(module, 'a module')} ({type(module).__name__})"


class Session(Bound):
    """One model bound to one communicator; `sharded` makes it.

    - `positions`: the longest sequence that the model was checked for.
    - `reproducible`: whether logits have the same bits on any number of ranks; the model runs in `tiles` then.
    - `new_cache()`: an empty KV cache, spread over the ranks.
    - `prefill(cache, input_ids, ...)`: put new tokens into it, each rank running its own share of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        comm: Communicator,
        layout: Layout,
        positions: int,
        reproducible: bool = False,
    ) -> None:
        super().__init__(model, comm, layout, positions)
        self.reproducible = reproducible
        self.tiles: Tiles | None = None
        self.cache_shape: Shape | None = None
        # By layer, the cache that was updated last: the attention call that follows is over it.
        self.pending: dict[int, ShardedCache] = {}

    def new_cache(self) -> ShardedCache:
        """An empty cache for this model. It may be used as long as the session is open."""
        assert self.cache_shape is not None, "sharded() finds the shape before it hands a session out"
        return ShardedCache(self.comm, self.cache_shape, self.announce, self.reproducible)

    def owns(self, cache: ShardedCache) -> bool:
        """Whether the cache is one of this session's."""
        return cache.announce == self.announce

    def announce(self, layer: int, cache: ShardedCache) -> None:
        """Expect an attention call over `cache`. Raises: ValueError after the session has been closed."""
        if not self.open:
            raise ValueError(
                "this cache belongs to a session that is closed; outside of it the model attends to the newest "
                "tokens only. Use the cache inside of `with sharded(...)`."
            )
        self.pending[layer] = cache

    @torch.no_grad()
    def prefill(
        self,
        cache: ShardedCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        """Append the tokens `input_ids` to the cache; each rank runs the model on its own share of them.

        Shapes: input_ids (batch, new), the same on every rank; attention_mask (batch, cached + new);
        position_ids (batch or 1, new), by default counted from the first token that is not padding.
        Raises: Unsupported for masks other than padding on the left; ValueError where the sequence gets longer
        than `positions`.
        """
        seen, new = cache.get_seq_length(), input_ids.shape[1]
        if new == 0:
            return
        if position_ids is None:
            kept = torch.ones_like(input_ids[:, :1]).expand(-1, seen + new)
            kept = kept if attention_mask is None else attention_mask
            position_ids = (kept.long().cumsum(1) - 1).clamp(min=0)[:, seen:]

        # A segment that has begun lies where it is: every rank runs the tokens that go into it.
        begun = min(-seen % unit(self.reproducible), new)
        if begun:
            mask = None if attention_mask is None else attention_mask[:, : seen + begun]
            self._run(cache, None, input_ids[:, :begun], mask, position_ids[:, :begun])
        if new > begun:
            mine = self.layout.positions(new - begun, self.comm.rank, self.comm.size, unit(self.reproducible))
            part = Part(self.layout, local=len(mine), total=new - begun)
            rows = begun + (mine if len(mine) else torch.zeros(1, dtype=torch.int64))
            self._run(cache, part, input_ids[:, rows], attention_mask, position_ids[:, rows])

    def _run(
        self, cache: ShardedCache, part: Part | None, ids: Tensor, mask: Tensor | None, positions: Tensor
    ) -> None:
        """Put these tokens into the cache; with `part`, they are this rank's of all."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        keep = {"logits_to_keep": 1} if takes(self.model, "logits_to_keep") else {}
        cache.part = part
        try:
            self.model(**inputs, past_key_values=cache, use_cache=True, **keep)
        finally:
            cache.part = None

    # What Transformers calls, under the registered name.

    def attention(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: object,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: object,
    ) -> tuple[Tensor, None]:
        """The attention function: (out in (batch, length, heads, v_dim), no weights)."""
        where = self.describe(module)
        mask = checked_mask(where, module, attention_mask, scaling, dropout, options)
        layer: Any = getattr(module, "layer_idx", None)
        tile = None if self.tiles is None else self.tiles.attend
        if self.probe is not None:
            out = self.probe.attend(module, q, k, v, mask, scaling)
        elif tile is not None:
            out = tile(Call(module, q, k, v, mask, scaling))
        else:
            cache = self.pending.pop(layer, None)
            if cache is None:
                raise Unsupported(
                    f"{where} attends without a sharded cache: pass past_key_values=session.new_cache()."
                )
            out = cache.attend(layer, q, mask, scaling)
        return out.transpose(1, 2).contiguous(), None

    def mask(
        self,
        batch_size: int,
        mask_function: MaskFunction,
        attention_mask: Tensor | None = None,
        q_length: int = 0,
        kv_length: int = 0,
        q_offset: int = 0,
        kv_offset: int = 0,
        device: torch.device | str = "cpu",
        **_: object,
    ) -> IntervalMask:
        """The mask function: one `IntervalMask` for all layers of a kind.

        Raises: ValueError where the sequence gets longer than `positions`.
        """
        # A forward pass begins with its masks: what one that failed has left behind is forgotten.
        self.pending.clear()
        device = torch.device(device)
        assert kv_offset == 0, "a sharded cache drops no keys"
        if self.probe is not None:
            # Windows and chunks show only in sequences longer than the probe's.
            far = interval_mask(mask_function, None, batch_size, 0, min(self.positions, MASK_POSITIONS), device)
            if far.problem is not None:
                return far
        mask = interval_mask(mask_function, attention_mask, batch_size, q_offset, kv_length, device)
        padding = 0 if mask.start is None else int(mask.start.min())
        if self.cache_shape is not None and kv_length - padding > self.positions:
            raise ValueError(
                f"{type(self.model).__name__} was checked for sequences of up to {self.positions} tokens: "
                f"got {kv_length - padding}. Open the session with more positions, or shorten the sequence."
            )
        return mask


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters
