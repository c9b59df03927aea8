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

import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import Unsupported
from ..tree import SEGMENT
from .cache import ShardedCache
from .masks import IntervalMask

# From four rows on, MKL's and oneDNN's products give a row the same bits beside any others (docs/log.md,
# 2026-11-25); eight rows of even length are whole vectors of 16 numbers.
ROWS = 8
_MOST_THREADS = 1 << 16  # as many as a prompt has segments; idle ones are used again
_WHOLE = ("inputs_embeds", "labels", "output_attentions", "output_hidden_states")


class Call(NamedTuple):
    """What a tile's attention call was given. Shapes: q, k, v (1, heads, the tile's rows, head_dim or v_dim)."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: IntervalMask
    scale: float | None


class _Abandoned(BaseException):
    """Ends a tile that waits for others which won't come; no `except Exception` of a model's keeps it."""


class Meeting:
    """Functions that run side by side and wait for each other in `attend`: of one thread each.

    As many compute at a time as the caller has threads.
    """

    def __init__(self) -> None:
        self._at_once = torch.get_num_threads()
        self._turn = threading.Semaphore(self._at_once)
        self._arrived: SimpleQueue[tuple[int, object]] = SimpleQueue()
        self._answers: list[SimpleQueue[Tensor | None]] = []

    def run(
        self,
        threads: ThreadPoolExecutor,
        functions: Sequence[Callable[[Callable[[Call], Tensor]], Tensor]],
        together: Callable[[list[Call]], Sequence[Tensor]],
    ) -> list[Tensor]:
        """What the functions return. Each gets `attend`; when all have called it, `together` answers them all.

        Raises: what the first of the functions, or `together`, raises; the others are ended.
        """
        self._answers = [SimpleQueue() for _ in functions]
        running = [
            threads.submit(contextvars.copy_context().run, self._one, number, function)
            for number, function in enumerate(functions)
        ]
        try:
            while True:
                arrived = dict(self._arrived.get() for _ in functions)
                calls = [arrived[number] for number in range(len(functions))]
                for error in calls:
                    if isinstance(error, BaseException):
                        raise error
                if all(isinstance(result, Tensor) for result in calls):
                    return calls  # type: ignore[return-value]
                if len({getattr(call, "module", None) for call in calls}) > 1:
                    raise Unsupported(
                        "reproducible: the model attends in other layers for some tokens than for others."
                    )
                for answers, answer in zip(self._answers, together(calls), strict=True):  # type: ignore[arg-type]
                    answers.put(answer)
        finally:
            for answers in self._answers:
                answers.put(None)
            concurrent.futures.wait(running)
            torch.set_num_threads(self._at_once)  # a thread that starts later takes the number that was set last

    def _one(self, number: int, function: Callable[[Callable[[Call], Tensor]], Tensor]) -> None:
        torch.get_num_threads()  # a thread's first call about threads gives it the number that was set last
        torch.set_num_threads(1)  # of this thread alone
        with self._turn:
            try:
                result: object = function(functools.partial(self._attend, number))
            except BaseException as error:  # noqa: BLE001 (raised again where all were started)
                result = error
        self._arrived.put((number, result))

    def _attend(self, number: int, call: Call) -> Tensor:
        self._turn.release()
        try:
            self._arrived.put((number, call))
            answer = self._answers[number].get()
        finally:
            self._turn.acquire()
        if answer is None:
            raise _Abandoned
        return answer


class Tiles:
    """One model's forward pass in tiles; `tiled` makes it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._kind, self._forward = type(model).__name__, model.forward
        self._threads = ThreadPoolExecutor(_MOST_THREADS, "tile")
        self._here = threading.local()

    @property
    def attend(self) -> Callable[[Call], Tensor] | None:
        """The attention of the tile that this thread runs; None on other threads."""
        return getattr(self._here, "attend", None)

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
        """What the model's forward returns, of it the logits and the cache; without a gradient.

        Shapes: input_ids (batch, tokens): those of `past_key_values.part`, or replicated ones; attention_mask
        (batch, cached + new); position_ids (batch or 1, tokens).
        Raises: Unsupported where more is asked for than logits.
        """
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **others}
        if input_ids is None or not isinstance(past_key_values, ShardedCache):
            return self._forward(input_ids=input_ids, past_key_values=past_key_values, **given)
        keep = others.pop("logits_to_keep", None)
        asked = [name for name in _WHOLE if others.get(name) is not None and others[name] is not False]
        if asked or not isinstance(keep, (int, type(None))):
            raise Unsupported(
                f"reproducible: {asked[0] if asked else 'logits_to_keep as a tensor'} is not supported."
            )
        cache, (batch, count) = past_key_values, input_ids.shape
        if position_ids is None:
            position_ids = cache.get_seq_length() + torch.arange(count, device=input_ids.device)[None]
        spans = [slice(start, min(start + SEGMENT, count)) for start in range(0, count, SEGMENT)]
        places = list(itertools.product(range(batch), spans))
        functions = [
            functools.partial(
                self._tile,
                input_ids[b : b + 1, span],
                None if attention_mask is None else attention_mask[b : b + 1],
                position_ids[b % len(position_ids)][None, span],
                _View(cache, count),
                keep,
                others,
            )
            for b, span in places
        ]
        found = Meeting().run(self._threads, functions, functools.partial(_together, cache, places))
        rows = [torch.cat(found[b * len(spans) : (b + 1) * len(spans)], dim=1) for b in range(batch)]
        logits = torch.cat(rows)[:, -keep if keep else 0 :]
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @torch.no_grad()
    def _tile(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: _View,
        keep: int | None,
        others: dict[str, Any],
        attend: Callable[[Call], Tensor],
    ) -> Tensor:
        """The logits of one tile, at least the last `keep`. The rows that fill it up stand before its own."""
        count = ids.shape[1]
        filling = -count % ROWS
        self._here.attend = functools.partial(_without, filling, attend)
        try:
            logits: Tensor = self._forward(
                input_ids=_filled(ids, filling),
                attention_mask=mask,
                position_ids=_filled(positions, filling),
                past_key_values=cache,
                **others,
                **({} if keep is None else {"logits_to_keep": keep + -keep % ROWS}),
            ).logits
        finally:
            del self._here.attend
        return logits[:, -min(count, logits.shape[1]) :]


class _View(Cache):
    """The cache as a tile sees it: lengths are those of all, and what a tile adds waits for its attention call."""

    def __init__(self, whole: ShardedCache, count: int) -> None:
        super().__init__(layers=[*whole.lengths])
        self._whole, self._count = whole, count

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._whole.get_mask_sizes(self._count, layer_idx)


@contextlib.contextmanager
def tiled(model: PreTrainedModel) -> Iterator[Tiles]:
    """The model's forward passes over a sharded cache run in tiles inside of the block."""
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


def _together(cache: ShardedCache, places: list[tuple[int, slice]], calls: list[Call]) -> list[Tensor]:
    """The attention of all tiles' tokens, cut up again."""
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


def _without(filling: int, attend: Callable[[Call], Tensor], call: Call) -> Tensor:
    """`attend` for a tile's own rows; those that fill it up get zeros."""
    q, k, v = (x[:, :, filling:] for x in (call.q, call.k, call.v))
    out = attend(call._replace(q=q, k=k, v=v))
    whole = out.new_zeros(*out.shape[:2], filling + out.shape[2], out.shape[3])
    whole[:, :, filling:] = out
    return whole


def _filled(x: Tensor, filling: int) -> Tensor:
    """`x` behind copies of its first column, in memory of its own."""
    return torch.cat([x[:, :1].expand(-1, filling), x], dim=1)
