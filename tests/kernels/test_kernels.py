"""One suite for every kernel, against the float64 definition written down a second time in tests/dense.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsum.blocks import Dense
from shardsum.errors import Unsupported
from shardsum.kernels import KERNELS, AtenKernel, OutputGradient, as_kernel
from shardsum.masks import Bounds
from shardsum.scores import Scores
from shardsum.state import AttentionState

from .. import dense
from ..tolerances import ROUNDED_GRADIENTS, ROUNDED_WEIGHTS, STATE, assert_close

NAMES = sorted(name for name, kernel in KERNELS.items() if kernel.computes)
kernels = pytest.mark.parametrize("name", NAMES)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
) -> None:
    state = as_kernel(name).forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.7))
    j = torch.arange(k.shape[2])
    seen = ((lo.unsqueeze(-1) <= j) & (j < hi.unsqueeze(-1))).expand(q.shape[0], -1, -1)
    out, lse = dense.attention(q.cpu(), k.cpu(), v.cpu(), seen, 0.7)
    assert state.out.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    # Where terms cancel, an eighth of the tolerance is allowed of their size.
    terms = dense.attention(q.cpu(), k.cpu(), v.cpu().abs(), seen, 0.7)[0].norm() / out.norm()
    cancelling = max(1.0, float(terms) / 8) if bool(terms.isfinite()) else 1.0
    tolerance = STATE[q.dtype] * cancelling
    if name == "native" and q.dtype == torch.bfloat16:
        tolerance = ROUNDED_WEIGHTS * max(1.0, float(terms.nan_to_num(nan=1.0)))
    assert_close(state.out.cpu(), out, tolerance, f"out of {name}")
    # An lse may happen to be 0.0004: its error is that of scores of about 1.
    size = float(lse[lse.isfinite()].norm())
    assert_close(state.lse.cpu(), lse, STATE[q.dtype] / (min(1.0, size) or 1.0), f"lse of {name}")


@kernels
@settings(max_examples=80)
@given(st.data())
def test_any_intervals_shapes_dtypes_and_strides(name: str, data: st.DataObject) -> None:
    batch, kv_heads, group = (data.draw(st.integers(1, high)) for high in (3, 3, 3))
    q_len, kv_len = (
        data.draw(st.sampled_from([0, 1, 2, 7, 71, 290])),
        data.draw(st.sampled_from([0, 1, 5, 61, 310])),
    )
    head_dim, v_dim = data.draw(st.sampled_from([1, 3, 8])), data.draw(st.sampled_from([1, 5, 8]))
    dtype = data.draw(st.sampled_from(list(STATE)))
    seed = data.draw(st.integers(0, 2**31))
    q = normal(seed, batch, q_len, kv_heads * group, head_dim).transpose(1, 2)
    k, v = normal(seed + 1, batch, kv_heads, kv_len, head_dim), normal(seed + 2, batch, kv_heads, v_dim, kv_len).mT
    rows = data.draw(st.sampled_from([1, batch]))
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(kv_len + 1, (2, rows, q_len), generator=generator).sort(dim=0).values
    kind = data.draw(st.sampled_from(["random", "causal", "all", "none"]))
    if kind == "causal":
        bounds[0], bounds[1] = 0, (torch.arange(q_len) + data.draw(st.integers(-3, 9))).clamp(0, kv_len)
    elif kind != "random":
        bounds[0], bounds[1] = 0, kv_len * (kind == "all")
    check(name, q.to(dtype), k.to(dtype), v.to(dtype), bounds[0], bounds[1])


@kernels
@pytest.mark.parametrize("q_len", [1, 70])
def test_queries_wider_than_keys(name: str, q_len: int) -> None:
    q, k, v = normal(0, 2, 6, q_len, 8), normal(1, 2, 2, 90, 8), normal(2, 2, 2, 90, 5)
    hi = torch.arange(q_len).unsqueeze(0) + 20
    check(name, q.float(), k.bfloat16(), v.bfloat16(), hi * 0, hi)


@kernels
@pytest.mark.parametrize("size", [80.0, -80.0])
def test_scores_of_80(name: str, size: float) -> None:
    q, k, v = normal(0, 1, 2, 9, 4), normal(1, 1, 1, 11, 4), normal(2, 1, 1, 11, 4)
    k[..., 0] = size  # 0.7 * q_0 * size: the largest scores are about this size
    lo, hi = torch.zeros(1, 9).long(), torch.arange(3, 12).unsqueeze(0)
    check(name, q, k, v, lo, hi)
    state = as_kernel(name).forward(q.float(), Dense(k.float(), v.float()), Bounds(lo, hi), Scores(0.7))
    seen = torch.arange(11) < hi.unsqueeze(-1)
    out, lse = dense.attention(q.float(), k.float(), v.float(), seen, 0.7)
    assert_close(state.out, out, 2e-5, "out")
    assert_close(state.lse, lse, 2e-6, "lse")


@kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("q_len", [1, 4, 300])
def test_a_bad_key_or_value_reaches_only_the_rows_that_see_it(name: str, bad: float, q_len: int) -> None:
    q, k, v = normal(0, 2, 4, q_len, 4), normal(1, 2, 2, q_len + 9, 4), normal(2, 2, 2, q_len + 9, 4)
    lo, hi = torch.zeros(1, q_len).long(), torch.arange(8, q_len + 8).unsqueeze(0)
    v[1, 0, q_len + 8] = k[1, 1, q_len + 8] = bad  # the last key, which no row sees
    check(name, q, k, v, lo, hi)
    check(name, q.bfloat16(), k.bfloat16(), v.bfloat16(), lo, hi)
    v[0, 1, q_len + 6, 2] = bad  # a value that only the last row sees
    check(name, q, k, v, lo, hi)
    k[1, 0, q_len + 6] = math.nan
    check(name, q, k, v, lo, hi)


@kernels
def test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(name: str) -> None:
    q, k, v = normal(0, 1, 1, 3, 4).float(), normal(1, 1, 1, 300, 4).float(), normal(2, 1, 1, 300, 4).float()
    lo, hi = torch.tensor([[0, 5, 7]]), torch.tensor([[300, 5, 290]])
    state = as_kernel(name).forward(q, Dense(k, v), Bounds(lo, hi), Scores(1.0))
    assert state.lse[0, 0, 1] == -math.inf
    assert torch.equal(state.out[0, 0, 1], torch.zeros(4))
    empty = as_kernel(name).forward(q, Dense(k[:, :, :0], v[:, :, :0]), Bounds(lo * 0, hi * 0), Scores(1.0))
    assert torch.equal(empty.lse, AttentionState.empty(1, 1, 3, 4).lse)


def biases() -> dict[str, torch.Tensor]:
    """Terms of scores (9 rows, 70 keys) beside which float32 has no room for the logarithm of a sum."""
    lowest, steps = torch.finfo(torch.float32).min, torch.arange(70.0) % 4
    some = torch.arange(70) % 3 == 0
    return {
        "-1e9": torch.full((9, 70), -1e9),
        "1e9": torch.full((9, 70), 1e9),
        "the lowest of float32": torch.full((9, 70), lowest),
        "2^14 and a step": (2.0**14 + steps).expand(9, 70),
        "-2^24 and steps of 2": (-(2.0**24) + 2 * steps).expand(9, 70),
        "-1e9, some lower yet": torch.where(some, lowest, -1e9).expand(9, 70),
        "-1e9 in some rows": torch.where(torch.arange(9).unsqueeze(1) < 4, -1e9, 0.0).expand(9, 70),
    }


@kernels
@pytest.mark.parametrize("case", biases())
def test_weights_add_up_to_1_however_large_the_scores(name: str, case: str) -> None:
    """Against float64 of the scores as they are computed: beside -1e9 those of float32 are rounded to 64."""
    q, k, v = (normal(seed, 1, 2, length, 8).float() for seed, length in enumerate((9, 70, 70)))
    bias, dtype = biases()[case], torch.float64 if name == "reference" else torch.float32
    hi = torch.arange(1, 71, 8).unsqueeze(0)
    state = as_kernel(name).forward(q, Dense(k, v), Bounds(hi * 0, hi), Scores(0.5, bias=bias[None, None]))
    scores = (q.to(dtype) @ k.to(dtype).mT * 0.5 + bias).double()
    seen = torch.arange(70) < hi.unsqueeze(-1)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    rounded = 2.0**14 * torch.finfo(dtype).eps if case.startswith("2^14") else 0.0  # of products, in any order
    assert_close(state.out, weights @ v.double(), max(STATE[torch.float32], rounded), case)


@kernels
@pytest.mark.parametrize("q_len", [1, 4, 90])
@pytest.mark.parametrize("score", [-(2.0**14), 2.0**14, 2.0**20, 2.0**24])
def test_equal_keys_have_equal_weights_however_large_the_scores(name: str, q_len: int, score: float) -> None:
    q, k, v = torch.zeros(1, 2, q_len, 8), torch.zeros(1, 1, 300, 8), normal(0, 1, 1, 300, 5).float()
    q[..., 3], k[..., 3] = score, 1.0
    bounds = Bounds(torch.zeros(1, q_len).long(), torch.full((1, q_len), 290))
    state = as_kernel(name).forward(q, Dense(k, v), bounds, Scores(1.0))
    mean = v[:, :, :290].double().mean(dim=2, keepdim=True).expand_as(state.out)
    assert_close(state.out, mean, STATE[torch.float32], f"the mean under scores of {score}")


@kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_each_device(name: str, device: str, dtype: torch.dtype) -> None:
    q, k, v = (normal(i, 2, heads, 300, 16).to(device, dtype) for i, heads in enumerate((6, 2, 2)))
    hi = torch.arange(1, 301).unsqueeze(0)
    check(name, q, k, v, (hi - 40).clamp(min=0), hi)
    check(name, q, k, v, hi * 0, hi)


@kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "causal", "window"])
def test_gradients_on_each_device(name: str, device: str, dtype: torch.dtype, kind: str) -> None:
    shapes = ((2, 6, 300, 13), (2, 2, 310, 13), (2, 2, 310, 7), (2, 6, 300, 7))
    q, k, v, d_out = (normal(i, *shape).to(dtype) for i, shape in enumerate(shapes))
    hi = {"full": torch.full((1, 300), 310)}.get(kind, torch.arange(11, 311).unsqueeze(0))
    lo = (hi - 40).clamp(min=0) if kind == "window" else hi * 0
    j = torch.arange(310)
    seen = ((lo.unsqueeze(-1) <= j) & (j < hi.unsqueeze(-1))).expand(2, -1, -1)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = dense.attention(*exact, seen, 0.7)
    expected = torch.autograd.grad(out, exact, d_out.double())
    delta = (d_out.double() * out.detach()).sum(dim=-1)
    gradient = OutputGradient(*(x.detach().float().to(device) for x in (d_out, lse, delta)))
    q, k, v = (x.to(device) for x in (q, k, v))
    found = as_kernel(name).backward(q, Dense(k, v), Bounds(lo, hi), Scores(0.7), gradient)
    tolerance = ROUNDED_GRADIENTS if name == "native" and dtype == torch.bfloat16 else STATE[dtype]
    for what, mine, whole in zip("qkv", (found.q, found.k, found.v), expected, strict=True):
        assert_close(mine.cpu(), whole, tolerance, f"d{what} of {name}")


def test_decode_calls_the_operator_once_with_the_group_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV is read once for all heads of a group: the operator sees kv_heads heads and group * q_len queries."""
    calls = []
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def recorded(q: torch.Tensor, *args: object, **options: object) -> object:
        calls.append(tuple(q.shape))
        return operator(q, *args, **options)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", recorded)
    q, k = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 50, 8)
    AtenKernel().forward(q, Dense(k, k), Bounds(torch.zeros(1, 1).long(), torch.full((1, 1), 50)), Scores(1.0))
    assert calls == [(2, 2, 3, 8)]


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(Unsupported, match="kernel must be auto, aten, eager, native, reference: got 'flash'"):
        as_kernel("flash")


@kernels
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-50])
def test_a_causal_mask_under_any_scale(name: str, scale: float) -> None:
    q, k, v = (torch.randn(1, 2, 70, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    lo, hi = torch.zeros(1, 70).long(), torch.arange(1, 71).unsqueeze(0)
    out, lse = dense.attention(q, k, v, dense.visible(70, 70, causal=True), scale)
    state = as_kernel(name).forward(q, Dense(k, v), Bounds(lo, hi), Scores(scale))
    assert_close(state.out, out, STATE[torch.float32], f"out with scale {scale}")
    assert_close(state.lse, lse, STATE[torch.float32], f"lse with scale {scale}")


@pytest.mark.parametrize("name", ["aten", "eager"])  # in float64 nothing overflows
@pytest.mark.parametrize("kind", ["full", "causal", "masked"])
def test_scores_of_minus_infinity_weigh_nothing(name: str, kind: str) -> None:
    """Finite inputs suffice: 1e20 * -1e20 overflows. Such keys among others, and alone."""
    q, k = torch.full((1, 1, 70, 4), 1e20), torch.zeros(1, 1, 70, 4)
    k[:, :, 1:] = -1e20
    lo, hi = torch.zeros(1, 70).long(), torch.full((1, 70), 70)
    hi = hi if kind == "full" else torch.arange(1, 71).unsqueeze(0)
    lo = (hi - 5).clamp(min=0) if kind == "masked" else lo
    v = torch.arange(1.0, 71.0).view(1, 1, 70, 1).expand(1, 1, 70, 4).contiguous()
    state = as_kernel(name).forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.5))
    sees = (lo[0] == 0).view(1, 1, 70)  # the one key whose score is 0
    assert torch.equal(state.lse, torch.where(sees, 0.0, -torch.inf))
    assert torch.equal(state.out, torch.where(sees, 1.0, 0.0).unsqueeze(-1).expand_as(state.out))


@kernels
def test_nan_in_keys_values_and_rows_reaches_only_gradients_that_see_it(name: str) -> None:
    q, k, v, d_out = (torch.randn(1, 2, 20, 4, generator=torch.Generator().manual_seed(i)) for i in range(4))
    lo, hi = torch.zeros(1, 20).long(), torch.arange(1, 21).unsqueeze(0)
    scores, kernel = Scores(0.5), as_kernel(name)
    clean = kernel.forward(q, Dense(k, v), Bounds(lo, hi), scores)
    k[:, :, 15], v[:, :, 15] = torch.nan, torch.inf  # rows 15 and later see it
    state = kernel.forward(q, Dense(k, v), Bounds(lo, hi), scores)
    assert torch.equal(state.out[:, :, :15], clean.out[:, :, :15]) or name == "aten"
    gradient = OutputGradient(d_out, state.lse, (d_out * state.out).sum(dim=-1))
    found = kernel.backward(q, Dense(k, v), Bounds(lo, hi), scores, gradient)
    assert bool(found.q[:, :, :15].isfinite().all())
    assert bool(found.q[:, :, 15:].isnan().any(dim=-1).all())
    assert bool(found.k[:, :, 15].isnan().any())
    few = OutputGradient(*(x[:, :, :15] for x in (d_out, state.lse, gradient.delta)))
    alone = kernel.backward(q[:, :, :15], Dense(k, v), Bounds(lo[:, :15], hi[:, :15]), scores, few)
    assert bool(alone.k.isfinite().all())
    assert bool((alone.k[:, :, 15:] == 0).all())
    assert bool((alone.v[:, :, 15:] == 0).all())
