"""Which kernels there are, for those who ask by name; `kernels/__init__.py` enters them."""

from __future__ import annotations

import torch

from .base import Dims, Kernel

KERNELS: dict[str, type[Kernel]] = {}  # in the order in which "auto" prefers them


def available(device: torch.device | None = None, dims: Dims = ()) -> list[str]:
    """Return the names of the kernels that compute here, such tensors if these are named, the preferred first."""
    return [name for name, kernel in KERNELS.items() if kernel.computes and kernel.why_not(device, dims) is None]


def definition() -> Kernel:
    """Return the kernel that is the definition itself, which the others are compared with."""
    return next(kernel for kernel in KERNELS.values() if kernel.definition)()


def use_another(device: torch.device | None = None, dims: Dims = (), *, but: str | None = None) -> str:
    """Return the sentence that names the kernels to use instead of the one that refuses (`but`)."""
    *others, last = (repr(name) for name in available(device, dims) if name != but)
    return f"Use kernel={', '.join(others)} or {last}." if others else f"Use kernel={last}."
