"""The bound on rounding errors: its constants measured, what it refuses, and that a worse kernel breaks it."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor

import shardsum
from shardsum import AttentionState, Mismatch, Unsupported, launch, merge, rounding
from shardsum.blocks import Dense
from shardsum.comm import Communicator
from shardsum.extension import instruction_sets
from shardsum.kernels import EagerKernel, Kernel, NativeKernel, available, native
from shardsum.masks import Bounds
from shardsum.packed import merge_alike
from shardsum.scores import Scores
from shardsum.strategies import STRATEGIES

from . import dense, exact
from .kernels.native import normal

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
each_kernel = pytest.mark.parametrize("kernel", available())
needs_native = pytest.mark.skipif(not instruction_sets(), reason="built without the native kernels")
# What the constants of rounding.py and docs/theory.md allow elementary functions, in unit roundoffs.
EXP, TANH, LN, SHARE, SHARE_OF_ARGUMENT, LN_OF_TOTAL = 3, 3, 2, 6, 2, 2


def in_units(found: Tensor, expected: Callable[[Any], Any], at: Tensor, relative: bool = True) -> list[Any]:
    """The errors of found against expected(at) in unit roundoffs, of expected itself if relative."""
    unit = torch.finfo(found.dtype).eps / 2
    with mpmath.workdps(exact.DIGITS):
        wanted = [expected(mpf(x)) for x in at.double().flatten().tolist()]
        pairs = zip(found.double().flatten().tolist(), wanted, strict=True)
        return [abs(mpf(x) - y) / (abs(y) if relative else 1) / unit for x, y in pairs]


def largest(errors: Iterable[Any], beside: Iterable[Any]) -> float:
    return float(max(error / allowed for error, allowed in zip(errors, beside, strict=True)))


def uniform(seed: int, low: float, high: float, count: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low + (high - low) * drawn).to(dtype)


def arguments_of_tanh(dtype: torch.dtype) -> Tensor:
    return torch.cat([normal(1, 1000) * 3, normal(2, 500) * 1e-3]).to(dtype)


def test_the_constants_are_sums_of_what_is_measured() -> None:
    assert 2 * EXP + 1 + LN <= rounding.OF_LEAF
    assert LN <= rounding.OF_LOGARITHM
    assert SHARE + LN_OF_TOTAL <= rounding.OF_MERGE
    assert 1 + SHARE_OF_ARGUMENT <= rounding.OF_SHIFT
    assert TANH + 5 <= rounding.OF_SOFTCAP


@each_dtype
def test_elementary_functions_of_torch(dtype: torch.dtype) -> None:
    x = uniform(0, -80, 0, 1500, dtype)
    assert max(in_units(x.exp(), mpmath.exp, x)) <= EXP
    x = arguments_of_tanh(dtype)
    assert max(in_units(x.tanh(), mpmath.tanh, x)) <= TANH
    x = uniform(1, 1, 256, 1500, dtype)
    assert largest(in_units(x.log(), mpmath.log, x, relative=False), [1 + math.log(y) for y in x.tolist()]) <= LN


@each_dtype
@pytest.mark.parametrize("merged", [merge_alike, merge])
def test_shares_of_a_merge(merged: Callable[..., AttentionState], dtype: torch.dtype) -> None:
    x = torch.cat([uniform(0, -86, 0, 1500, dtype), uniform(1, -4, 0, 1000, dtype)])
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    found = merged(AttentionState(zeros.unsqueeze(1), zeros), AttentionState(ones.unsqueeze(1), x))
    shares = in_units(found.out, lambda y: mpmath.exp(y) / (1 + mpmath.exp(y)), x)
    assert largest(shares, [SHARE + SHARE_OF_ARGUMENT * abs(y) for y in x.tolist()]) <= 1
    assert max(in_units(found.lse, lambda y: mpmath.log1p(mpmath.exp(y)), x, relative=False)) <= LN_OF_TOTAL


def forward(isa: str, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, scores: Scores) -> AttentionState:
    """Each query alone, a row that sees so many keys."""
    q, k, v = q.view(1, 1, -1, 1), k.view(1, 1, -1, 1), v.view(1, 1, -1, 1)
    return NativeKernel(isa).forward_tree(
        q, Dense(k, v), Bounds(torch.zeros_like(keys).unsqueeze(0), keys.unsqueeze(0)), scores
    )


@each_dtype
@pytest.mark.parametrize("isa", instruction_sets())
def test_elementary_functions_of_the_native_kernel(isa: str, dtype: torch.dtype) -> None:
    # Beside a weight of 1, 2^x is out itself if x is low enough; ln 2 as scale makes scores in base 2 whole.
    x, two = uniform(0, -70, -55, 1500, dtype), torch.tensor([0, 1], dtype=dtype)
    state = forward(isa, x, two, two, torch.full((1500,), 2), Scores(1 / 1.4426950408889634074))
    assert max(in_units(state.out, lambda y: mpf(2) ** y, x)) <= EXP
    counts = torch.arange(1, 257)
    equal = torch.zeros(256, dtype=dtype)
    state = forward(isa, equal, equal, equal, counts, Scores(1.0))
    errors = in_units(state.lse, mpmath.log, counts, relative=False)
    assert largest(errors, [1 + math.log(count) for count in counts.tolist()]) <= LN
    # One key's lse is its score: the scale, 2 of ln 2 and of the sum, and the softcap.
    x, one = arguments_of_tanh(dtype), torch.ones(1, dtype=dtype)
    state = forward(isa, x, one, one, torch.ones(len(x)).long(), Scores(1.0, softcap=2.0))
    assert max(in_units(state.lse, lambda y: 2 * mpmath.tanh(y / 2), x)) <= 3 + rounding.OF_SOFTCAP


def with_bound(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, list[Any]]:
    """out, its bound, and its errors in the order of out.flatten()."""
    out, bound = shardsum.attention(q, k, v, reproducible=True, return_bound=True, **options)
    seen = dense.visible(q.shape[2], k.shape[2], q.shape[0])
    return out, bound, exact.errors(out, exact.attention(q, k, v, seen))


def holds(bound: Tensor, errors: list[Any]) -> bool:
    return all(error <= allowed for error, allowed in zip(errors, bound.flatten().tolist(), strict=True))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_not_much_larger_than_errors(kernel: str, dtype: torch.dtype) -> None:
    """At most 3,000 times: largest over largest, of N(0,1) data."""
    q, k, v = (normal(i, 1, 1, length, 64, dtype=dtype) for i, length in enumerate((1, 600, 600)))
    _, bound, errors = with_bound(q, k, v, kernel=kernel)
    assert holds(bound, errors)
    assert float(bound.max()) <= 3000 * float(max(errors))


def worst_sum() -> tuple[Tensor, list[Any]]:
    """The bound and errors of 1 + (126 numbers that are rounded away one by one) - 1, under equal weights."""
    zeros = torch.zeros(1, 1, 128, 8)
    v = torch.full((1, 1, 128, 4), 0.99 * 2.0**-24)
    v[:, :, 0], v[:, :, 127] = 1.0, -1.0
    return with_bound(zeros[:, :, :1], zeros, v, kernel="native")[1:]


@needs_native
def test_the_chain_of_a_leaf_is_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, errors = worst_sum()
    assert holds(bound, errors)
    assert float(bound.max()) <= 4 * float(max(errors))
    monkeypatch.setattr(native, "ROUNDINGS", 0)
    assert not holds(*worst_sum())


@pytest.mark.skipif("avx512_bf16" not in instruction_sets(), reason="needs AVX512-BF16")
def test_weights_in_bfloat16_break_it_if_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (normal(i, 1, 1, length, 16, dtype=torch.bfloat16) for i, length in enumerate((3, 40, 40)))
    kernel = NativeKernel("avx512_bf16")

    def state_holds() -> bool:
        state, bound = shardsum.attention(
            q, k, v, kernel=kernel, reproducible=True, return_bound=True, return_state=True
        )
        return holds(bound, exact.errors(state.out, exact.attention(q, k, v, dense.visible(3, 40))))

    assert state_holds()
    monkeypatch.setattr(native, "WEIGHT_OF_BFLOAT16", 0.0)
    assert not state_holds()


def coarse_scores(forward: Any) -> Any:
    return lambda self, q, *rest: forward(self, q.half().to(q.dtype), *rest)


def coarse_weights(forward: Any) -> Any:
    def of(self: Any, *rest: Any) -> AttentionState:
        state: AttentionState = forward(self, *rest)
        return AttentionState(state.out.half().to(state.out.dtype), state.lse)

    return of


def coarse_lse(combine: Any) -> Any:
    return lambda a, b: combine(AttentionState(a.out, a.lse.half().to(a.lse)), b)


@pytest.mark.parametrize(
    ("where", "name", "worse"),
    [
        ("shardsum.kernels.EagerKernel", "forward", coarse_scores),
        ("shardsum.kernels.EagerKernel", "forward", coarse_weights),
        ("shardsum.kernels.along_tree", "merge_alike", coarse_lse),
    ],
)
def test_one_more_rounding_to_16_bits_breaks_it(
    where: str, name: str, worse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the scores, in a leaf's output, in the lse that a merge is given."""
    q, k, v = (normal(i, 1, 1, length, 8, dtype=torch.float32) for i, length in enumerate((2, 520, 520)))
    _, bound, errors = with_bound(q, k, v, kernel="eager")
    assert holds(bound, errors)
    off = [abs(2 * allowed - error) for allowed, error in zip(bound.flatten().tolist(), errors, strict=True)]
    assert not any(error <= allowed for error, allowed in zip(off, bound.flatten().tolist(), strict=True))
    module = pkgutil.resolve_name(where)
    monkeypatch.setattr(module, name, worse(getattr(module, name)))
    assert not holds(*with_bound(q, k, v, kernel="eager")[1:])


@pytest.mark.filterwarnings("ignore::shardsum.NonFiniteWarning")
def test_a_row_that_sees_nothing_has_bound_0_and_masked_keys_have_no_part() -> None:
    q, k, v = (normal(i, 1, 1, 4, 3, dtype=torch.float32) for i in range(3))
    k[0, 0, 2], v[0, 0, 3] = math.nan, math.inf
    intervals = (torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 2, 2, 4]]))
    out, bound = shardsum.attention(q, k, v, key_intervals=intervals, reproducible=True, return_bound=True)
    assert not out[0, 0, 0].any()
    assert not bound[0, 0, 0].any()
    assert bool(((bound[0, 0, 1:3] > 0) & (bound[0, 0, 1:3] < 1e-4)).all())
    assert bool((bound[0, 0, 3] == math.inf).all())


def test_it_is_the_same_under_every_strategy_and_on_every_rank_and_leaves_gradients_alone() -> None:
    q, k, v = (normal(i, 1, 2, 700, 8, dtype=torch.float32) for i in range(3))

    def run(comm: Communicator, strategy: str) -> tuple[Tensor, Tensor]:
        place: dict[str, Any] = {"comm": comm, "layout": "zigzag", "reproducible": True}
        parts = [shardsum.shard(x, **place).requires_grad_() for x in (q, k, v)]
        out, bound = shardsum.attention(*parts, **place, causal=True, strategy=strategy, return_bound=True)
        assert not bound.requires_grad
        (d_q,) = torch.autograd.grad(out.sum(), parts[:1])
        return shardsum.unshard(bound, **place), shardsum.unshard(d_q, **place)

    bound, d_q = launch(run, 1, "threads", ("all_gather",))[0]
    for strategy in STRATEGIES:
        for found in launch(run, 2, "threads", (strategy,)):
            torch.testing.assert_close(found[0], bound, rtol=1e-6, atol=0)
            assert torch.equal(found[1], d_q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reproducible": False}, "needs reproducible=True"),
        ({"dropout_p": 0.5}, "knows no dropout"),
        ({"alibi_slopes": torch.tensor([0.1], dtype=torch.float64)}, "float32 numbers"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    x = torch.ones(1, 1, 3, 2)
    with pytest.raises(Unsupported, match=message):
        shardsum.attention(x, x, x, **{"reproducible": True, "return_bound": True, **options})


def test_kernels_that_it_does_not_know_are_refused() -> None:
    class Other(EagerKernel):
        name = "other"
        rounding = Kernel.rounding

    x = torch.ones(1, 1, 3, 2)
    with pytest.raises(Unsupported, match="got other"):
        shardsum.attention(x, x, x, kernel=Other(), reproducible=True, return_bound=True)


def test_products_of_less_than_float32_are_refused() -> None:
    x = torch.ones(1, 1, 3, 2)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(Unsupported, match="set_float32_matmul_precision"):
            shardsum.attention(x, x, x, reproducible=True, return_bound=True)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_ranks_that_do_not_all_ask_for_it_are_told() -> None:
    def run(comm: Communicator) -> None:
        x = torch.ones(1, 1, 256, 2)
        shardsum.attention(x, x, x, comm=comm, reproducible=True, return_bound=comm.rank == 0)

    with pytest.raises(Mismatch, match="return_bound"):
        launch(run, 2, "threads")


def test_with_return_state_it_is_of_the_state() -> None:
    q, k, v = (normal(i, 1, 1, 9, 4, dtype=torch.bfloat16) for i in range(3))
    options: dict[str, Any] = {"reproducible": True, "return_bound": True, "kernel": "eager"}
    out, bound = shardsum.attention(q, k, v, **options)
    state, of_state = shardsum.attention(q, k, v, **options, return_state=True)
    assert state.out.dtype == bound.dtype == of_state.dtype == torch.float32
    rounded = (out.double() - state.out.double()).abs()
    torch.testing.assert_close(bound.double(), of_state.double() + rounded, rtol=1e-5, atol=0)
