"""A model for generation: its caches are spread over the ranks, and each rank prefills its own tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..comm import Communicator, agree
from ..compiler import outside_graphs
from ..digests import digest_indices
from ..errors import Unsupported
from ..layouts import Layout
from ..tree import unit
from .bound_model import MASK_POSITIONS, AttentionCall, BoundModel, has_argument
from .cache import CacheShape, LocalTokens, ShardedCache
from .masks import IntervalMask, MaskFunction, interval_mask
from .requests import check_columns, check_tokens
from .shared_call import SharedCall
from .tiles import Tiles


class Session(BoundModel):
    """One model bound to one communicator; `sharded` makes it.

    - `comm`: the communicator, which may be replaced between two calls; see `BoundModel`.
    - `positions`: the longest sequence that the model was checked for.
    - `reproducible`: whether logits have the same bits on any number of ranks; the model runs in `tiles` then.
    - `new_cache()`: an empty KV cache, spread over the ranks.
    - `prefill(cache, input_ids, ...)`: put new tokens into it, each rank running its own share of them.
    - `shared_call`: the call of all ranks that is under way.
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
        self.cache_shape: CacheShape | None = None
        # By layer, the cache that was updated last, and with what: the attention call that follows is over it.
        self.updated: dict[int, tuple[ShardedCache, Tensor, Tensor]] = {}
        self.shared_call = SharedCall()

    def new_cache(self) -> ShardedCache:
        """Make an empty cache for this model. It may be used as long as the session is open."""
        assert self.cache_shape is not None, "sharded() finds the shape before it hands a session out"
        return ShardedCache(self, self.comm, self.cache_shape, self.reproducible)

    def check(self, cache: ShardedCache) -> None:
        """Raises: ValueError after the session has been closed, or where the cache is another group's.

        Whatever uses the cache comes here: under torch.autocast it raises Unsupported.
        """
        refuse_autocast(self.model)
        if not self.open:
            raise ValueError(
                "this cache belongs to a session that is closed; outside of it the model attends to the newest "
                "tokens only. Use the cache inside of `with sharded(...)`."
            )
        if cache.store.comm is not self.comm:
            raise ValueError(
                "this cache lies on the ranks of the communicator that the session had before. Put the tokens "
                "into a new one: session.new_cache()."
            )

    def announce(self, layer: int, cache: ShardedCache, k: Tensor, v: Tensor) -> None:
        """Expect an attention call over `cache`, with these new keys and values."""
        self.updated[layer] = cache, k, v

    def renew(self) -> None:
        """Hear that what all ranks do together is over."""
        self.shared_call.renew()

    @torch.no_grad()
    @outside_graphs
    def prefill(
        self,
        cache: ShardedCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **inputs: Tensor,
    ) -> None:
        """Append the tokens `input_ids` to the cache; each rank runs the model on its own share of them.

        `inputs` are what else the model is handed for each token, such as token_type_ids. Where the call fails on
        one rank it fails on all, and the cache is left as it was.

        Shapes: input_ids (batch, new), the same on every rank; attention_mask (batch, cached + new);
        position_ids (batch or 1, new) or, where positions have several axes, (axes, batch or 1, new), by default
        counted from the first token that is not padding; other inputs (batch or 1, new).
        Raises: Unsupported for masks other than padding on the left, and under torch.autocast; ValueError where
        the sequence gets longer than `positions`; Mismatch where the ranks' calls differ.
        """
        with self.shared_call.over(cache, self.comm):
            self.check(cache)
            seen, new = cache.get_seq_length(), check_tokens(self.model, input_ids).shape[1]
            if position_ids is None:
                position_ids = _count_positions(input_ids, seen, attention_mask)
            inputs = {"input_ids": input_ids, "position_ids": position_ids, **inputs}
            check_columns(inputs, new)
            described = {name: digest_indices(x) for name, x in inputs.items()}
            described |= {"attention_mask": digest_indices(attention_mask)}
            agree(self.comm, {"call": "hf.Session.prefill", "cached": seen, **described})
            self.renew()
            _prefill(self, cache, inputs, attention_mask)

    def attend(self, call: AttentionCall, options: dict[str, Any]) -> Tensor:
        """Attend over the cache that this layer updated, or together with the other tiles.

        Raises: Unsupported where there is no cache.
        """
        attend_in_tile = None if self.tiles is None else self.tiles.attend
        if attend_in_tile is not None:
            return attend_in_tile(call)
        layer: Any = getattr(call.module, "layer_idx", None)
        cache, k, v = self.updated.pop(layer, (None, call.k, call.v))
        where = self.describe(call.module)
        with self.mistakes():
            if cache is None:
                raise Unsupported(
                    f"{where} attends without a sharded cache: pass past_key_values=session.new_cache()."
                )
            if not (_are_the_same(k, call.k) and _are_the_same(v, call.v)):
                raise Unsupported(f"{where} attends to other keys or values than it put into the cache.")
        return cache.attend(layer, call.q, call.mask, call.scale)

    def mask(
        self,
        batch_size: int,
        mask_function: MaskFunction,
        attention_mask: Tensor | None = None,
        kv_length: int = 0,
        q_offset: int = 0,
        kv_offset: int = 0,
        device: torch.device | str = "cpu",
        **_: object,
    ) -> IntervalMask:
        """Make one `IntervalMask` for all layers of a kind; its arguments are Transformers'.

        Raises: ValueError where the sequence gets longer than `positions`.
        """
        # A forward pass begins with its masks: what one that failed has left behind is forgotten.
        self.updated.clear()
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


def _prefill(
    session: Session, cache: ShardedCache, inputs: dict[str, Tensor], attention_mask: Tensor | None
) -> None:
    seen, new, together = cache.get_seq_length(), inputs["input_ids"].shape[1], unit(session.reproducible)
    # A segment that has begun lies where it is: every rank runs the tokens that go into it.
    replicated = min(-seen % together, new)
    if replicated:
        mask = None if attention_mask is None else attention_mask[:, : seen + replicated]
        _run(session.model, cache, None, {name: x[..., :replicated] for name, x in inputs.items()}, mask)
    if new > replicated:
        layout, comm = session.layout, session.comm
        mine = layout.positions(new - replicated, comm.rank, comm.size, together)
        local_tokens = LocalTokens(layout, local=len(mine), total=new - replicated)
        columns = replicated + (mine if len(mine) else torch.zeros(1, dtype=torch.int64))
        local = {name: x[..., columns] for name, x in inputs.items()}
        _run(session.model, cache, local_tokens, local, attention_mask)


def _run(
    model: PreTrainedModel,
    cache: ShardedCache,
    local_tokens: LocalTokens | None,
    inputs: dict[str, Tensor],
    mask: Tensor | None,
) -> None:
    """Put these tokens into the cache; with `local_tokens`, they are this rank's of all."""
    keep = {"logits_to_keep": 1} if has_argument(model, "logits_to_keep") else {}
    cache.local_tokens = local_tokens
    try:
        model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True, **keep)
    finally:
        cache.local_tokens = None


def _are_the_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same elements, which need not be looked at where they lie at one place."""
    if one.shape != other.shape:
        return False
    return (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride()) or torch.equal(one, other)


def _count_positions(input_ids: Tensor, seen: int, attention_mask: Tensor | None) -> Tensor:
    """Number new tokens from the first of their row that is not padding: (batch, new)."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids[:, :1]).expand(-1, seen + input_ids.shape[1])
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]


def refuse_autocast(model: PreTrainedModel) -> None:
    """Raises: Unsupported under torch.autocast: a cache has one dtype, and autocast gives keys and values two."""
    if torch.is_autocast_enabled(model.device.type):
        raise Unsupported(
            "torch.autocast is not supported over sharded keys. Leave it, and load the model in the dtype that it "
            "is to compute in: load(path, dtype=torch.bfloat16)."
        )
