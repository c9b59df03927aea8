"""The plain distributed weighted sum against float64, on every rank."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardsum
from shardsum import launch
from shardsum.comm import Communicator

from ..tolerances import OUT, assert_close


def sharded_sum(comm: Communicator, weights: torch.Tensor, values: torch.Tensor, edges: list[int]) -> torch.Tensor:
    start, end = edges[comm.rank], edges[comm.rank + 1]
    return shardsum.weighted_sum(weights[..., start:end], values[..., start:end, :], comm=comm)


@settings(max_examples=40)
@given(st.data())
def test_any_cut_gives_the_whole_sum_and_zero_weights_add_nothing(data: st.DataObject) -> None:
    keys, size = data.draw(st.integers(0, 17)), data.draw(st.integers(1, 5))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, keys), min_size=size - 1, max_size=size - 1))), keys]
    dtype = data.draw(st.sampled_from(list(OUT)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows, batch = data.draw(st.sampled_from([((), ()), ((3,), ()), ((2, 3), (2,)), ((2, 3), ())]))
    weights = torch.rand(*rows, keys, generator=generator).to(dtype)
    values = torch.randn(*batch, keys, 4, generator=generator).to(dtype)
    expected = weights.double() @ values.double()
    if keys and data.draw(st.booleans()):
        silent = data.draw(st.integers(0, keys - 1))
        weights[..., silent] = 0.0
        expected = weights.double() @ values.double()
        values[..., silent, :] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    results = launch(sharded_sum, ranks=size, transport="threads", args=(weights, values, edges))
    for result in results:
        assert result.dtype == dtype
        assert torch.equal(result, results[0])
        assert_close(result, expected, OUT[dtype], "sum")


def test_a_bad_value_with_weight_stays_in_its_component_and_row() -> None:
    weights, values = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[1.0, 2.0], [torch.nan, 4.0]])
    result = launch(sharded_sum, ranks=2, transport="threads", args=(weights, values, [0, 1, 2]))[0]
    assert result[0, 0].isnan()
    assert torch.equal(result.nan_to_num(nan=-1.0), torch.tensor([[-1.0, 3.0], [1.0, 2.0]]))


def test_over_processes() -> None:
    weights, values = torch.rand(1000), torch.randn(1000, 3)
    for transport in ("gloo", "mpi"):
        results = launch(sharded_sum, ranks=2, transport=transport, args=(weights, values, [0, 300, 1000]))
        for result in results:
            assert_close(result, weights.double() @ values.double(), 2e-6, transport)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="same number of keys"):
        shardsum.weighted_sum(torch.ones(3), torch.ones(2, 2))
    with pytest.raises(ValueError, match="one floating dtype"):
        shardsum.weighted_sum(torch.ones(2), torch.ones(2, 2).int())
    with pytest.raises(ValueError, match="dims of weights and values before the last two"):
        shardsum.weighted_sum(torch.ones(3, 2, 4), torch.ones(5, 4, 2))


def test_the_first_call_imports_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.broadcast_shapes imports 500 modules, which took each rank 2 to 4 seconds."""
    monkeypatch.delitem(sys.modules, "torch.fx.experimental.symbolic_shapes", raising=False)
    shardsum.weighted_sum(torch.ones(3, 1, 2), torch.ones(2, 2), comm=shardsum.connect("single"))
    assert "torch.fx.experimental.symbolic_shapes" not in sys.modules
