"""return_bound bounds the error: random problems of all kernels, dtypes, options and spreads, in 50 digits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import shardsum
from shardsum import launch
from shardsum.comm import Communicator
from shardsum.extension import instruction_sets
from shardsum.kernels import NativeKernel, available
from shardsum.problem import state_dtype

from .. import dense, exact

KERNELS = [name for name in available() if name != "native"] + [f"native {isa}" for isa in instruction_sets()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (40, 3)},
    {"causal": True, "window": (20, None), "sink_tokens": 3},
    {"key_range": ([2], [5])},
    {"causal": True, "prefix": 2},
]
# Powers of ten of q and k: scores from nothing to what overflows, and of the spread of v's.
SCORES, VALUES = [-30, -3, 0, 0, 0, 1, 2, 3, 10, 20], [0, 0, 0, 3, 20, 35]
LENGTHS = [0, 1, 1, 2, 3, 17, 129, 256, 257, 600]


@dataclass
class Case:
    """One problem: q, k and v, and the options of `shardsum.attention`."""

    kernel: str
    q: Tensor
    k: Tensor
    v: Tensor
    ranks: int = 1
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> list[tuple[Tensor, Tensor]]:
        """(out, bound) of each rank, put together again."""
        name, _, isa = self.kernel.partition(" ")
        kernel = NativeKernel(isa) if isa else name

        def attend(comm: Communicator) -> tuple[Tensor, Tensor]:
            place: dict[str, Any] = {"comm": comm, "layout": self.layout, "reproducible": True}
            options = dict(self.options)
            if "bias" in options:
                options["bias"] = shardsum.shard(options["bias"], **place)
            parts = [shardsum.shard(x, **place) for x in (self.q, self.k, self.v)]
            found = shardsum.attention(*parts, **place, kernel=kernel, **options, return_bound=True)
            out, bound = (shardsum.unshard(x, **place) for x in found)
            return out, bound

        return launch(attend, ranks=self.ranks, transport="threads")

    def exact(self) -> list[Any]:
        q_len, kv_len, batch = self.q.shape[2], self.k.shape[2], self.q.shape[0]
        options = dict(self.options)
        masks = {name: options.pop(name) for name in list(options) if any(name in mask for mask in MASKS)}
        slopes = options.pop("alibi_slopes", None)
        if slopes is not None:
            options["alibi"] = (slopes, dense.distances(q_len, kv_len, batch))
        return exact.attention(self.q, self.k, self.v, dense.visible(q_len, kv_len, batch, **masks), **options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kernel, dtype = draw(st.sampled_from(KERNELS)), draw(st.sampled_from(DTYPES))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    kv_len = draw(st.sampled_from(LENGTHS))
    q_len = draw(st.integers(1, 2 if kv_len > 200 else 4))
    head_dim, v_dim = draw(st.sampled_from([1, 1, 2, 8, 33])), draw(st.sampled_from([1, 2, 5]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    def within(x: Tensor) -> Tensor:
        most = torch.finfo(dtype).max / 1e3
        return x.clamp(-most, most).to(dtype)

    q = normal(kv_heads * group, q_len, head_dim) * 10.0 ** draw(st.sampled_from(SCORES))
    k = normal(kv_heads, kv_len, head_dim) * 10.0 ** (draw(st.sampled_from(SCORES)) / 2)
    spread = draw(st.sampled_from(VALUES))
    v = normal(kv_heads, kv_len, v_dim) * 10.0 ** (normal(kv_heads, kv_len, 1).clamp(-1, 1) * spread)
    if draw(st.booleans()):
        v = v.abs()  # no cancellation
    options = dict(draw(st.sampled_from(MASKS)))
    if kv_len < 5:
        options.pop("key_range", None)
    if draw(st.booleans()):
        options["scale"] = draw(
            st.sampled_from([1.0, -0.3, 0.0, 1e-40, 7.0, normal(kv_heads * group)[0].to(dtype)])
        )
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([0.3, 20.0]))
    if draw(st.integers(0, 3)) == 0:
        options["alibi_slopes"] = normal(kv_heads * group)[0].float()
    if draw(st.integers(0, 5)) == 0:
        options["bias"] = normal(1, q_len, kv_len).to(dtype) * 5
    if draw(st.integers(0, 3)) == 0:
        options["sinks"] = normal(kv_heads * group)[0].to(dtype) * 10
    ranks, layout = draw(st.integers(1, 3)), draw(st.sampled_from(["contiguous", "zigzag"]))
    return Case(kernel, within(q), within(k), within(v), ranks, layout, options)


def check(case: Case) -> None:
    """On every rank the bound is at least the error, and infinite where out is not finite."""
    expected = case.exact()
    for out, bound in case.run():
        assert out.dtype == case.q.dtype
        assert bound.dtype == state_dtype(case.q.dtype)
        assert bool((bound[~out.isfinite()] == math.inf).all())
        errors = exact.errors(out.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), expected)
        for error, allowed in zip(errors, bound.flatten().tolist(), strict=True):
            assert error <= allowed, (float(error), allowed)


@pytest.mark.filterwarnings("ignore::shardsum.NonFiniteWarning")
@settings(max_examples=100)
@given(cases())
def test_it_holds(case: Case) -> None:
    check(case)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::shardsum.NonFiniteWarning")
@settings(max_examples=2000)
@given(cases())
def test_it_holds_in_2000_cases(case: Case) -> None:
    check(case)
