"""The ways in which one rank can call another function than the others, or another than `attention` otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch

import shardsum
from shardsum import KVCache

from .mismatches import Shards


def _other_function(shards: Shards, odd: bool) -> None:
    _ = shardsum.unshard(shards.q, comm=shards.comm) if odd else shards.attend()


def _weighted_sum(shards: Shards, odd: bool) -> None:
    _ = shardsum.weighted_sum(torch.ones(3), torch.ones(3, 2), comm=shards.comm) if odd else shards.attend()


def _global_value(shards: Shards, odd: bool) -> None:
    shardsum.global_value(shards.q, "sum" if odd else "max", comm=shards.comm)


def _value_dtype(shards: Shards, odd: bool) -> None:
    shardsum.global_value(shards.q.double() if odd else shards.q, "sum", comm=shards.comm)


def _value_that_is_no_float(shards: Shards, odd: bool) -> None:
    shardsum.global_value(shards.q.int() if odd else shards.q, "sum", comm=shards.comm)


def _value_collective(shards: Shards, odd: bool) -> None:
    shardsum.global_value(shards.q, "sum", comm=shards.comm, collective="ring" if odd else "tree")


def _weighted_sum_sizes(shards: Shards, odd: bool) -> None:
    shardsum.weighted_sum(torch.ones(3), torch.ones(3, 2 + odd), comm=shards.comm)


def _weighted_sum_shapes(shards: Shards, odd: bool) -> None:
    shardsum.weighted_sum(torch.ones(3 + odd), torch.ones(3, 2), comm=shards.comm)


def _unshard_dim(shards: Shards, odd: bool) -> None:
    shardsum.unshard(torch.ones(4, 4), comm=shards.comm, dim=int(odd))


def _unshard_layout(shards: Shards, odd: bool) -> None:
    shardsum.unshard(torch.ones(4, 4), comm=shards.comm, dim=0, layout="zigzag" if odd else "contiguous")


def _unshard_no_layout(shards: Shards, odd: bool) -> None:
    shardsum.unshard(torch.ones(4, 4), comm=shards.comm, dim=0, layout="smoke" if odd else "contiguous")


def _no_values(shards: Shards, odd: bool) -> None:
    shardsum.global_value(None if odd else shards.q, "sum", comm=shards.comm)  # type: ignore[arg-type]


def _abandoned_call(shards: Shards, odd: bool) -> None:
    shards.comm.calls += odd
    shards.attend()


def _epoch(shards: Shards, odd: bool) -> None:
    shards.comm.epoch = 7 + odd
    try:
        shards.attend()
    finally:
        shards.comm.epoch = 0


def _backward_of_another_call(shards: Shards, odd: bool) -> None:
    shards.q.requires_grad_()
    first, second = shards.attend(), shards.attend()
    (second if odd else first).sum().backward()


def _backward_beside_forward(shards: Shards, odd: bool) -> None:
    shards.q.requires_grad_()
    out = shards.attend()
    _ = out.sum().backward() if odd else shards.attend()


def _replicated_lengths(shards: Shards, odd: bool) -> None:
    shards.options["q_replicated"] = True
    shards.q = torch.ones(2, 6, 3 + odd, 5)
    shards.attend()


def _cache(shards: Shards) -> KVCache:
    cache = KVCache(comm=shards.comm, layers=2, kv_heads=2, head_dim=5, v_dim=7)
    for layer in range(2):
        cache.append(layer, torch.ones(2, 2, 9, 5), torch.ones(2, 2, 9, 7))
    return cache


def _cache_layer(shards: Shards, odd: bool) -> None:
    _cache(shards).attend(int(odd), torch.ones(2, 6, 1, 5))


def _cache_and_attention(shards: Shards, odd: bool) -> None:
    _ = _cache(shards).attend(0, torch.ones(2, 6, 1, 5)) if odd else shards.attend()


def _cache_append(shards: Shards, odd: bool) -> None:
    cache = _cache(shards)
    if odd:
        cache.append(0, torch.ones(2, 2, 1, 5), torch.ones(2, 2, 1, 7))
    cache.attend(0, torch.ones(2, 6, 1, 5))


def _cache_crop(shards: Shards, odd: bool) -> None:
    cache = _cache(shards)
    cache.crop(8 - odd)
    cache.attend(0, torch.ones(2, 6, 1, 5))


def _cache_reorder(shards: Shards, odd: bool) -> None:
    cache = _cache(shards)
    cache.reorder([1, 0] if odd else [0, 1])
    cache.attend(0, torch.ones(2, 6, 1, 5))


def _cache_shards(shards: Shards, odd: bool) -> None:
    layout = "striped" if odd else "contiguous"
    _cache(shards).append(0, torch.ones(2, 2, 2, 5), torch.ones(2, 2, 2, 7), layout=layout)


def _cache_no_layer(shards: Shards, odd: bool) -> None:
    _cache(shards).attend(7 * odd, torch.ones(2, 6, 1, 5))


def _cache_no_option(shards: Shards, odd: bool) -> None:
    _cache(shards).attend(0, torch.ones(2, 6, 1, 5), **{"smoke": 1} if odd else {})


def _cache_no_queries(shards: Shards, odd: bool) -> None:
    _cache(shards).attend(0, None if odd else torch.ones(2, 6, 1, 5))  # type: ignore[arg-type]


def _cache_shards_of_no_layer(shards: Shards, odd: bool) -> None:
    _cache(shards).append(7 * odd, torch.ones(2, 2, 2, 5), torch.ones(2, 2, 2, 7), layout="contiguous")


def _cache_queries(shards: Shards, odd: bool) -> None:
    _cache(shards).attend(0, torch.ones(2, 6, 1 + odd, 5))


# Kinds in which no strategy has a part, and what their message must name.
OTHERS: dict[str, tuple[Callable[[Shards, bool], None], str]] = {
    "unshard beside attention": (_other_function, "call"),
    "weighted_sum beside attention": (_weighted_sum, "call"),
    "another kind of global_value": (_global_value, "call"),
    "dtype of global_value": (_value_dtype, "dtype"),
    "global_value of whole numbers": (_value_that_is_no_float, "values must be floats"),
    "collective of global_value": (_value_collective, "collective"),
    "sizes of weighted_sum": (_weighted_sum_sizes, "sizes"),
    "shapes of weighted_sum": (_weighted_sum_shapes, "same number of keys"),
    "dim of unshard": (_unshard_dim, "dim"),
    "layout of unshard": (_unshard_layout, "layout"),
    "a call that one rank gave up": (_abandoned_call, "call number"),
    "epoch": (_epoch, "epoch"),
    "backward of another call": (_backward_of_another_call, "of call number"),
    "backward beside forward": (_backward_beside_forward, "call"),
    "numbers of replicated queries": (_replicated_lengths, "queries"),
    "layer of a cache": (_cache_layer, "call"),
    "cache beside attention": (_cache_and_attention, "call"),
    "a token more in a cache": (_cache_append, "lengths"),
    "a cache that was cropped": (_cache_crop, "lengths"),
    "a cache that was reordered": (_cache_reorder, "reordered"),
    "layout of a cache's tokens": (_cache_shards, "layout"),
    "a layer that is none": (_cache_no_layer, "layer must be"),
    "an option that is none": (_cache_no_option, "smoke"),
    "no queries for a cache": (_cache_no_queries, "NoneType"),
    "tokens for a layer that is none": (_cache_shards_of_no_layer, "layer must be"),
    "a layout of unshard that is none": (_unshard_no_layout, "smoke"),
    "no values": (_no_values, "NoneType"),
    "queries of a cache": (_cache_queries, "queries"),
}
