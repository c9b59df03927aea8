"""A model whose attention runs over all ranks, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..comm import Communicator, agree, connect
from ..errors import Unsupported
from ..layouts import Layout, as_layout
from .cache import Part, Shape, ShardedCache
from .masks import IntervalMask, MaskFunction, checked_mask, interval_mask

# A model that names no limit is checked for sequences of up to this many tokens.
DEFAULT_POSITIONS = 1 << 16
# Masks are looked at up to this position; within a million, windows and chunks have long shown themselves.
MASK_POSITIONS = 1 << 20
_numbers = itertools.count()
# A model's configurations name its attention function, so a configuration serves one session at a time.
_lock, _in_use = threading.Lock(), set[int]()


class Handler(Protocol):
    """What runs in the place of one attention call: a session's cache, or the probe."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None
    ) -> Tensor: ...


class Session:
    """One model bound to one communicator; `sharded` makes it.

    - `positions`: the longest sequence that the model was checked for.
    - `new_cache()`: an empty KV cache, spread over the ranks.
    - `prefill(cache, input_ids, ...)`: put new tokens into it, each rank running its own share of them.
    - `generate(input_ids, ...)`: as `shardsum.hf.generate`, without checking the model again.
    """

    def __init__(self, model: PreTrainedModel, comm: Communicator, layout: Layout, positions: int) -> None:
        self.model, self.comm, self.layout, self.positions = model, comm, layout, positions
        self.names = {module: name for name, module in model.named_modules()}
        self.cache_shape: Shape | None = None
        self.probe: Handler | None = None
        self.open = True
        # By layer, the cache that was updated last: the attention call that follows is over it.
        self.pending: dict[int, ShardedCache] = {}

    def new_cache(self) -> ShardedCache:
        """An empty cache for this model. It may be used as long as the session is open."""
        assert self.cache_shape is not None, "sharded() finds the shape before it hands a session out"
        return ShardedCache(self.comm, self.cache_shape, self.announce)

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

    def generate(self, input_ids: Tensor, **arguments: Any) -> Any:
        """What `shardsum.hf.generate` returns, for a model that is sharded already."""
        from .generation import generate_in

        return generate_in(self, input_ids, **arguments)

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
        mine = self.layout.positions(new, self.comm.rank, self.comm.size)
        cache.part = Part(self.layout, local=len(mine), total=new)
        rows = mine if len(mine) else torch.zeros(1, dtype=torch.int64)
        try:
            self.model(
                input_ids=input_ids[:, rows],
                attention_mask=attention_mask,
                position_ids=position_ids[:, rows],
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": 1} if takes(self.model, "logits_to_keep") else {}),
            )
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
        if self.probe is not None:
            out = self.probe.attend(module, q, k, v, mask, scaling)
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

    def describe(self, module: nn.Module) -> str:
        """The module's place in the model, and its class."""
        return f"{self.names.get(module, 'a module')} ({type(module).__name__})"


@contextlib.contextmanager
def sharded(
    model: PreTrainedModel,
    comm: Communicator | None = None,
    layout: str | Layout = "zigzag",
    positions: int | None = None,
) -> Iterator[Session]:
    """A `Session` in which the model's attention runs over the keys and values of all ranks.

    On entry a few forward passes over seven tokens find out whether the model is one whose tokens meet in plain
    softmax attention only; see `shardsum.hf.probe`. `positions` is the longest sequence to expect, by default
    the model's own limit. Everything is undone on exit, after an exception too.

    Raises: Unsupported, naming the module or option that stands in the way; ValueError for a model in training
    mode, one that is in a session already, or more positions than it has. A rank whose model is fine raises
    Mismatch, naming those where it isn't.
    """
    from .probe import probe

    comm, layout = connect() if comm is None else comm, as_layout(layout)
    session, problem = Session(model, comm, layout, 0), None
    with contextlib.ExitStack() as undo:
        try:
            session.positions = _longest(model, positions)
            name = undo.enter_context(_registered(session))
            session.cache_shape = probe(session, name)
        except ValueError as error:
            problem = error
        agree(comm, {"call": "hf.sharded", "model": type(model).__name__, "layout": str(layout)}, error=problem)
        yield session


@contextlib.contextmanager
def _registered(session: Session) -> Iterator[str]:
    """The name under which the model can choose the session's attention; all is as before afterwards."""
    chosen = [(config, config._attn_implementation) for config in _configs(session.model)]
    ids = {id(config) for config, _ in chosen}
    with _lock:
        if ids & _in_use:
            raise ValueError(
                f"this {type(session.model).__name__} (or one with the same config object) is in a session "
                "already. Call generate() of that session. Ranks that are threads need a model each: load it on "
                "each rank."
            )
        _in_use.update(ids)
    name = f"shardsum_{next(_numbers)}"
    AttentionInterface.register(name, session.attention)
    AttentionMaskInterface.register(name, session.mask)
    try:
        yield name
    finally:
        session.open = False
        for config, implementation in chosen:
            config._attn_implementation_internal = implementation
        # There is no public way to unregister.
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
        with _lock:
            _in_use.difference_update(ids)


def _longest(model: PreTrainedModel, positions: int | None) -> int:
    """The number of positions to expect: what was asked for, the model's limit, or a default.

    Raises: ValueError where more are asked for than the model has.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None
    if positions is None:
        return limit or DEFAULT_POSITIONS
    if limit is not None and positions > limit:
        raise ValueError(
            f"{type(model).__name__} has {limit} positions: got a prompt and new tokens of {positions} together. "
            "Shorten the prompt or ask for fewer new tokens."
        )
    return positions


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration in the model, those without a module of their own included."""
    found: dict[int, PreTrainedConfig] = {}
    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
