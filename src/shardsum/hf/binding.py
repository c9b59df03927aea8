"""Binding a model to a communicator for as long as a `with` block lasts, and undoing it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..comm import Communicator, agree, as_communicator, mistakes_reach_all
from ..layouts import Layout, as_layout
from ..tree import unit
from .bound_model import BoundModel
from .identity import describe_model
from .probe import probe
from .session import Session, refuse_autocast
from .tiles import run_in_tiles
from .wrappers import check_whole

# A model that names no limit is checked for sequences of up to this many tokens.
DEFAULT_POSITIONS = 1 << 16
_numbers = itertools.count()
# A model's configurations name its attention function, so a configuration serves one session at a time.
_lock, _in_use = threading.Lock(), set[int]()


@contextlib.contextmanager
def sharded(
    model: PreTrainedModel,
    comm: Communicator | None = None,
    layout: str | Layout = "zigzag",
    positions: int | None = None,
    reproducible: bool = False,
) -> Iterator[Session]:
    """Open a `Session` in which the model's attention runs over the keys and values of all ranks.

    On entry a few forward passes over a few tokens find out whether the model is one whose tokens meet in plain
    softmax attention only; see `shardsum.hf.probe`. `positions` is the longest sequence to expect, by default
    the model's own limit. With `reproducible` keys lie in whole segments, and logits have the same bits on any
    number of ranks; see `shardsum.hf.tiles`. Everything is undone on exit, after an exception too.

    Raises: Unsupported, naming the module or option that stands in the way; ValueError for a model in training
    mode, one that is in a session already, or more positions than it has. A rank whose model is fine raises
    Mismatch, naming those where it isn't.
    """
    comm = as_communicator(comm)
    with contextlib.ExitStack() as undo:
        with mistakes_reach_all(comm):
            check_whole(model)
            refuse_autocast(model)
            layout = as_layout(layout)
            session = Session(model, comm, layout, 0, reproducible)
            session.positions = longest_sequence(model, positions)
            name = undo.enter_context(register(session))
            session.cache_shape = probe(session, name)
            if reproducible:  # raises where the layout cuts segments
                layout.positions(0, comm.rank, comm.size, unit(reproducible))
            call = {"call": "hf.sharded", "layout": layout.describe(), "reproducible": reproducible}
            call |= describe_model(model, comm.size)
        agree(comm, call)
        session.checked = True
        if reproducible:
            session.tiles = undo.enter_context(run_in_tiles(model))
        yield session


@contextlib.contextmanager
def register(session: BoundModel) -> Iterator[str]:
    """Register the session's attention under the name returned; all is as before after the block."""
    chosen = [(config, config._attn_implementation) for config in _configs(session.model)]
    ids = {id(config) for config, _ in chosen}
    with _lock:
        if ids & _in_use:
            raise ValueError(
                f"this {type(session.model).__name__} (or one with the same config object) is in a session "
                "already. Call generate() with that session. Ranks that are threads need a model each: load it on "
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


def longest_sequence(model: PreTrainedModel, positions: int | None) -> int:
    """Return the number of positions to expect: what was asked for, the model's limit, or a default.

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


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Collect every configuration in the model, those without a module of their own included."""
    found: dict[int, PreTrainedConfig] = {}
    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
