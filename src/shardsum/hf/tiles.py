"""A model run in tiles that are the same on any number of ranks, so that its bits are.

The last bits of a matrix product's row depend on how many rows there are beside it and on the number of threads;
with fewer than four rows, even on where in memory the weights lie. Those of an activation depend on where a token
stands in a tensor: what is left over at the end of a vector loop goes another way. So with `reproducible` a model
never runs on all of a rank's tokens at once. It runs on one segment of one sequence at a time, padded to whole
ROWS, by one thread. Ranks hold whole segments, so a token has the same tokens beside it on any number of them, and
nothing has to be known of what the model computes.

Tiles meet in attention: each waits there until all tiles of this rank have come, their queries, keys and values
are put together, and the ranks attend as ever. A tile waits inside of the model's code, so it has a thread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import Unsupported
from ..tree import SEGMENT
from .bound_model import AttentionCall
from .cache import ShardedCache
from .masks import IntervalMask
from .rendezvous import Attend, Rendezvous

# From four rows on, MKL's and oneDNN's products give a row the same bits beside any others (docs/log.md,
# 2026-11-25); eight rows of even length are whole vectors of 16 numbers.
ROWS = 8
_MOST_THREADS = 1 << 16  # as many as a prompt has segments; idle ones are used again
_WHOLE = ("inputs_embeds", "labels", "output_attentions", "output_hidden_states")


class Tiles:
    """One model's forward pass in tiles; `run_in_tiles` makes it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._forward = model.forward
        self._threads = ThreadPoolExecutor(_MOST_THREADS, "tile")
        self._thread = threading.local()

    @property
    def attend(self) -> Attend | None:
        """Return the attention of the tile that this thread runs; None on other threads."""
        return getattr(self._thread, "attend", None)

    def close(self) -> None:
        self._threads.shutdown()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        **others: Any,
    ) -> Any:
        """Return logits and cache as the model's own forward does, without a gradient.

        Shapes: input_ids (batch, tokens): those of `past_key_values.local_tokens`, or replicated ones;
        attention_mask (batch, cached + new); position_ids and other tensors (..., batch or 1, tokens).
        Raises: Unsupported where more is asked for than logits.
        """
        if input_ids is None or not isinstance(past_key_values, ShardedCache):
            inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **others}
            return self._forward(input_ids=input_ids, past_key_values=past_key_values, **inputs)
        keep = others.pop("logits_to_keep", None)
        if (why_not := _why_not_in_tiles(keep, others)) is not None:
            raise Unsupported(why_not)
        cache, (batch, count) = past_key_values, input_ids.shape
        if position_ids is None:
            position_ids = cache.get_seq_length() + torch.arange(count, device=input_ids.device)[None]
        columns = {"input_ids": input_ids, "position_ids": position_ids}
        columns |= {name: others.pop(name) for name, x in [*others.items()] if isinstance(x, Tensor)}
        spans = [slice(start, min(start + SEGMENT, count)) for start in range(0, count, SEGMENT)]
        places = list(itertools.product(range(batch), spans))
        functions = [
            functools.partial(
                self._tile,
                {name: x[..., b % x.shape[-2], None, span] for name, x in columns.items()},
                None if attention_mask is None else attention_mask[b : b + 1],
                _TileCache(cache, count),
                keep,
                others,
            )
            for b, span in places
        ]
        answer = functools.partial(_attend_together, cache, places)
        results = Rendezvous().run(self._threads, functions, answer)
        rows = [torch.cat(results[b * len(spans) : (b + 1) * len(spans)], dim=1) for b in range(batch)]
        logits = torch.cat(rows)[:, -keep if keep else 0 :]
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @torch.no_grad()
    def _tile(
        self,
        columns: dict[str, Tensor],
        mask: Tensor | None,
        cache: _TileCache,
        keep: int | None,
        others: dict[str, Any],
        attend: Attend,
    ) -> Tensor:
        """Compute one tile's logits, at least the last `keep`; what fills it up stands before its own rows."""
        count = columns["input_ids"].shape[1]
        filling = -count % ROWS
        self._thread.attend = functools.partial(_attend_without_filling, filling, attend)
        try:
            logits: Tensor = self._forward(
                **{name: _fill(x, filling) for name, x in columns.items()},
                attention_mask=mask,
                past_key_values=cache,
                **others,
                **({} if keep is None else {"logits_to_keep": keep + -keep % ROWS}),
            ).logits
        finally:
            del self._thread.attend
        return logits[:, -min(count, logits.shape[1]) :]


class _TileCache(Cache):
    """What a tile sees of a cache: lengths are those of all, and what it adds waits for its attention call."""

    def __init__(self, whole: ShardedCache, count: int) -> None:
        super().__init__(layers=[*whole.lengths])
        self._whole, self._count = whole, count

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._whole.get_mask_sizes(self._count, layer_idx)


@contextlib.contextmanager
def run_in_tiles(model: PreTrainedModel) -> Iterator[Tiles]:
    """Run the model's forward passes over a sharded cache in tiles inside of the block."""
    tiles, own = Tiles(model), vars(model).get("forward")

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return tiles.forward(*args, **kwargs)

    model.forward = forward
    try:
        yield tiles
    finally:
        del model.forward
        if own is not None:
            model.forward = own
        tiles.close()


def _why_not_in_tiles(keep: object, others: dict[str, Any]) -> str | None:
    """Say which argument of a forward pass tiles can't honour; None where they can."""
    asked = [name for name in _WHOLE if others.get(name) is not None and others[name] is not False]
    if asked or not isinstance(keep, (int, type(None))):
        return f"reproducible: {asked[0] if asked else 'logits_to_keep as a tensor'} is not supported."
    return None


def _attend_together(
    cache: ShardedCache, places: list[tuple[int, slice]], calls: list[AttentionCall]
) -> list[Tensor]:
    """Attend with all tiles' tokens at once, and cut the result up again."""
    batch = places[-1][0] + 1

    def whole(parts: list[Tensor]) -> Tensor:
        each = len(parts) // batch
        return torch.cat([torch.cat(parts[b * each : (b + 1) * each], dim=2) for b in range(batch)])

    first = calls[0]
    layer: Any = first.module.layer_idx
    cache.append(whole([call.k for call in calls]), whole([call.v for call in calls]), layer)
    starts = [call.mask.start for call in calls[:: len(calls) // batch]]
    start = None
    if any(x is not None for x in starts):
        start = torch.cat([torch.zeros(1, dtype=torch.int64) if x is None else x.cpu() for x in starts])
    q = whole([call.q for call in calls])
    out = cache.attend(layer, q, IntervalMask(first.mask.left, start), first.scale)
    return [out[b : b + 1, :, span] for b, span in places]


def _attend_without_filling(filling: int, attend: Attend, call: AttentionCall) -> Tensor:
    """Attend with a tile's own rows; those that fill it up get zeros."""
    q, k, v = (x[:, :, filling:] for x in (call.q, call.k, call.v))
    out = attend(call._replace(q=q, k=k, v=v))
    whole = out.new_zeros(*out.shape[:2], filling + out.shape[2], out.shape[3])
    whole[:, :, filling:] = out
    return whole


def _fill(x: Tensor, filling: int) -> Tensor:
    """Put copies of the first column before `x`, in memory of its own."""
    return torch.cat([x[..., :1].expand(*x.shape[:-1], filling), x], dim=-1)
