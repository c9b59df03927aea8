"""Who holds the positions of a growing sequence, against one list of owners; and what a token costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardsum import KVCache, connect
from shardsum.kv.owners import Owners
from shardsum.layouts import Layout
from shardsum.placement import Placement


def shards(length: int, layout: str, size: int, unit: int) -> Placement:
    return Layout(layout).placement(length, size, unit)


def in_turn(owners: list[int], length: int, size: int, unit: int) -> list[int]:
    """One position after the other: a unit's first by its number, the others where the first is."""
    owners = list(owners)
    for position in range(len(owners), length):
        owners.append(owners[-1] if position % unit else position // unit % size)
    return owners


def check(placement: Placement, owners: list[int], size: int) -> None:
    expected = [[p for p, owner in enumerate(owners) if owner == rank] for rank in range(size)]
    assert [placement.positions(rank).tolist() for rank in range(size)] == expected


@given(st.data(), st.integers(1, 5), st.sampled_from([1, 3]))
def test_as_one_list_and_what_was_returned_stays(data: st.DataObject, size: int, unit: int) -> None:
    owners, found = [], Owners(size, unit)
    returned: list[tuple[Placement, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        operation = data.draw(st.sampled_from(["turns", "shards", "crop"]))
        if operation == "turns":
            length = len(owners) + data.draw(st.integers(-2, 40))
            owners = in_turn(owners, length, size, unit)
            found.take_turns(length)
        elif operation == "shards" and len(owners) % unit == 0:
            length, layout = data.draw(st.integers(0, 40)), data.draw(st.sampled_from(["zigzag", "contiguous"]))
            some, end = shards(length, layout, size, unit), len(owners) + data.draw(st.integers(0, length))
            base, where = len(owners), torch.empty(length, dtype=torch.int64)
            for rank in range(size):
                where[some.positions(rank)] = rank
            owners = owners + where[: end - base].tolist()
            found.take_shards(base, end, some)
            found.take_shards(base, end, some)  # the next layer's
        elif operation == "crop":
            length = data.draw(st.integers(0, 60))
            owners = owners[:length]
            found.crop(length)
        assert found.length == len(owners)
        lengths = len(owners), data.draw(st.integers(0, len(owners)))
        returned += [(found.placement(length), owners[:length]) for length in lengths]
        for placement, then in returned:
            check(placement, then, size)


def test_shards_that_lie_elsewhere_are_refused_and_nothing_changes() -> None:
    owners = Owners(2, 1)
    owners.take_shards(0, 10, shards(10, "contiguous", 2, 1))
    for length in (10, 12):
        with pytest.raises(ValueError, match="sharded alike"):
            owners.take_shards(0, length, shards(length, "zigzag", 2, 1))
    check(owners.placement(10), [0] * 5 + [1] * 5, 2)
    assert owners.length == 10


class New(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation made, beside views."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and func._schema.returns[0].alias_info is None:
            self.largest = max(self.largest, found.numel())
        return found


def test_a_token_costs_no_work_over_all_positions() -> None:
    cache, token = KVCache(layers=1, kv_heads=1, head_dim=1, comm=connect("single")), torch.ones(1, 1, 1, 1)
    cache.append(0, torch.ones(1, 1, 100_000, 1), torch.ones(1, 1, 100_000, 1))
    for _ in range(2):  # the first makes room
        with New() as new:
            cache.append(0, token, token)
            out = cache.attend(0, token, window=(10, 0))
    assert out.item() == 1
    assert new.largest < 1000
