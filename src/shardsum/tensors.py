"""Which tensors can be computed with: those whose numbers lie in memory of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _disabled_torch_dispatch_impl as _its_own_dispatch
from torch._C import _functorch, _get_dispatch_mode, _TorchDispatchModeKey
from torch.autograd import forward_ad

from .errors import Unsupported

# Modes in which torch makes tensors without numbers, or writes down operations to do them later.
_MODES = {
    _TorchDispatchModeKey.FAKE: "FakeTensorMode",
    _TorchDispatchModeKey.FUNCTIONAL: "functionalization",
    _TorchDispatchModeKey.PROXY: "a tracer (make_fx)",
}


def check_tensors(**tensors: Any) -> None:
    """Raise unless these are tensors whose numbers lie in memory of their own, as kernels and wires read them.

    Raises: ValueError for what is no such tensor, and where torch only traces; Unsupported for forward-mode
    derivatives. All say what to do instead.
    """
    _check_mode()
    for name, x in tensors.items():
        _check_tensor(name, x)


def has_numbers(x: Tensor) -> bool:
    """Whether the numbers of x can be read."""
    return _without_memory(x) is None


def no_gradient(name: str, x: object, instead: str) -> None:
    """Raise Unsupported where x would be expected to receive a gradient. `instead`: a sentence, what to do."""
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise Unsupported(f"{name} requires a gradient, and receives none here. {instead}")


def first_derivatives(
    backward: Callable[..., list[Tensor | None]], ctx: Any, *gradients: Tensor
) -> list[Tensor | None]:
    """What `backward(ctx, saved, *gradients)` gives; to differentiate that once more raises Unsupported.

    torch's `once_differentiable` does so too, but where no incoming gradient depends on anything it lets second
    derivatives be taken as zero.
    """
    saved = ctx.saved_tensors  # once, and under the caller's modes: a checkpoint computes them now
    with torch.no_grad(), torch._C.DisableTorchFunction():
        found = backward(ctx, saved, *gradients)
    if not torch.is_grad_enabled():  # nobody has asked for create_graph
        return found
    there = [x for x in found if x is not None]
    kept = iter(_Last.apply(len(there), *there, *gradients, *saved))  # type: ignore[no-untyped-call]
    return [None if x is None else next(kept) for x in found]


class _Last(torch.autograd.Function):
    """The first `count` of its tensors, which depend on all of them in a way that nobody knows."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count] if x is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise Unsupported(
            "attention has first derivatives only. Use ATen operations where second ones are needed."
        )


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch tensor: got {type(x).__name__}.")
    what = _without_memory(x)
    if what is not None:
        raise ValueError(f"{name} must be a plain tensor: got {what}.")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise Unsupported(f"{name} has a tangent, and there are no forward-mode derivatives. Use backward().")


def _check_mode() -> None:
    if torch._C._len_torch_dispatch_stack():
        for key, name in _MODES.items():
            if _get_dispatch_mode(key) is not None:
                raise ValueError(f"{name} is on, under which nothing is computed. Call outside of it.")
    if torch.jit.is_tracing():
        raise ValueError("torch.jit.trace would keep the result of this call as a constant. Call outside of it.")


def _without_memory(x: Tensor) -> str | None:
    """What kind of tensor x is, and what to pass instead, if its numbers don't lie in memory of its own."""
    if _functorch.is_functorch_wrapped_tensor(x):
        return "a tensor inside torch.func (vmap, grad, jvp). Loop over the batch, or use autograd"
    if x.is_nested:
        return "a nested tensor. Pad it, or pack it with cu_seqlens"
    if x.layout is not torch.strided:
        return "a sparse tensor. Pass x.to_dense()"
    if type(x).__torch_dispatch__ is not _its_own_dispatch:
        also = ". Pass x.to_local()" if hasattr(x, "to_local") else ", which has no numbers of its own"
        return f"a {type(x).__name__}{also}"
    if x.is_meta:
        return "a meta tensor, which has no numbers"
    if x.is_quantized:
        return "a quantized tensor. Pass x.dequantize()"
    if x.is_neg() or x.is_conj():
        return "a view that is negated when it is read. Pass x.resolve_neg() or x.resolve_conj()"
    if x.numel() and not x.untyped_storage().nbytes():
        return "a tensor whose memory was given back, as FSDP does with parameters"
    return None
