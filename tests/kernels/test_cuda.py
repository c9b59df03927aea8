"""The CUDA operators without a device: their arguments against PyTorch's own schemas and shapes, and the padding,
grouping and masks around them against float64, over stand-ins that insist on what the operators insist on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardsum.blocks import Dense
from shardsum.errors import Unsupported
from shardsum.kernels import AtenKernel, OutputGradient, aten, cuda
from shardsum.kernels.fused import Masking, Outputs
from shardsum.masks import Bounds
from shardsum.scores import Scores

from .. import dense
from ..tolerances import STATE, assert_close

ALIGNMENT = 4  # float32 elements in the 16 bytes that a thread loads


def check_inputs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    assert q.shape[1] == k.shape[1] == v.shape[1]
    assert 0 not in (q.shape[2], k.shape[2])
    for x in (q, k, v):
        assert x.dtype == torch.float32
        assert x.stride(3) == 1
        assert not any(stride % ALIGNMENT for stride in x.stride()[:3])
        assert x.shape[3] % ALIGNMENT == 0
    if bias is not None:
        assert bias.shape == (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        assert bias.stride(3) == 1
        assert bias.stride(2) % ALIGNMENT == 0


def visible(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    seen = torch.ones(q.shape[0], q.shape[2], k.shape[2], dtype=torch.bool)
    seen = seen.tril() if causal else seen
    return seen if bias is None else seen & (bias[:, 0] == 0)


def efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    compute_lse: bool,
    dropout: float,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    check_inputs(q, k, v, bias)
    assert compute_lse
    out, lse = dense.attention(q, k, v, visible(q, k, bias, causal), scale, dtype=torch.float32)
    padded = torch.full((*lse.shape[:2], -(-q.shape[2] // 32) * 32), 7.0)  # rows that mean nothing
    padded[:, :, : q.shape[2]] = lse
    return out, padded, torch.empty(()), torch.empty(())


def efficient_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: list[bool],
    causal: bool,
    *,
    scale: float,
) -> tuple[Tensor | None, ...]:
    check_inputs(q, k, v, bias)
    assert wanted == [True, True, True, False]
    assert lse.shape[2] % 32 == 0
    assert out.transpose(1, 2).is_contiguous()
    seen = visible(q, k, bias, causal).unsqueeze(1)
    lse = lse[:, :, : q.shape[2]]
    p = torch.where(seen, (scale * q @ k.mT - lse.unsqueeze(-1)).exp(), 0.0)
    d_s = scale * p * (d_out @ v.mT - (d_out * out).sum(dim=-1, keepdim=True))
    return d_s @ k, d_s.mT @ q, p.mT @ d_out, None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention_backward", efficient_backward)
    monkeypatch.setattr(aten, "_operator", cuda.forward)
    monkeypatch.setattr(aten, "_operator_backward", cuda.backward)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "causal", "window", "blind rows"])
@pytest.mark.parametrize(("head_dim", "v_dim"), [(13, 5), (3, 9), (8, 8)])
def test_forward_and_backward_against_float64(kind: str, dtype: torch.dtype, head_dim: int, v_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 90, head_dim), (2, 2, 101, head_dim), (2, 2, 101, v_dim), (2, 6, 90, v_dim))
    q, k, v, d_out = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    hi = torch.full((1, 90), 101) if kind == "full" else torch.arange(12, 102).unsqueeze(0)
    lo = (hi - 9).clamp(min=0) if kind in ("window", "blind rows") else hi * 0
    if kind == "blind rows":
        lo[:, 7::5] = hi[:, 7::5]
    j = torch.arange(101)
    seen = ((lo.unsqueeze(-1) <= j) & (j < hi.unsqueeze(-1))).expand(2, -1, -1)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = dense.attention(*exact, seen, 0.4)
    expected = torch.autograd.grad(out, exact, d_out.double())
    state = AtenKernel().forward(q, Dense(k, v), Bounds(lo, hi), Scores(0.4))
    assert_close(state.out, out.detach(), STATE[dtype], "out")
    assert_close(state.lse, lse.detach(), STATE[dtype], "lse")
    delta = (d_out.float() * state.out).sum(dim=-1)
    found = AtenKernel().backward(
        q, Dense(k, v), Bounds(lo, hi), Scores(0.4), OutputGradient(d_out.float(), state.lse, delta)
    )
    for name, mine, whole in zip("qkv", (found.q, found.k, found.v), expected, strict=True):
        assert_close(mine, whole, STATE[dtype], f"d{name}")


@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_take_these_arguments(bias: bool) -> None:
    """PyTorch's schemas and shape functions, on tensors without contents."""
    q, k = torch.empty(2, 6, 33, 13, device="meta"), torch.empty(2, 2, 41, 13, device="meta")
    v, d_out = torch.empty(2, 2, 41, 5, device="meta"), torch.empty(2, 6, 33, 5, device="meta")
    mask = torch.empty(33, 41, device="meta") if bias else None
    out, lse = cuda.forward(q, k, v, Masking(mask, False, 0.5))
    assert (out.shape, lse.shape) == (d_out.shape, (2, 6, 33))
    found = cuda.backward(q, k, v, Masking(mask, False, 0.5), Outputs(d_out, out, lse))
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


def test_float64_is_refused() -> None:
    """By the kernel, on any device but the CPU."""
    q = torch.zeros(1, 1, 1, 8, dtype=torch.float64, device="meta")
    bounds = torch.zeros(1, 1).long()
    with pytest.raises(Unsupported, match=r"no float64 on meta\. Use kernel=.*'eager' or 'reference'"):
        AtenKernel().forward(q, Dense(q, q), Bounds(bounds, bounds + 1), Scores(1.0))
