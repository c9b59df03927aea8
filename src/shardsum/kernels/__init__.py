"""Attention on one device: the same call for every kernel, so that one contract suite tests them all."""

from __future__ import annotations

import functools
import warnings

import torch

from ..scalars import one_of
from . import operators as operators
from .aten import AtenKernel
from .base import Dims, Gradients, Kernel, Leaf, OutputGradient
from .costing import CostingKernel
from .native import NativeKernel
from .reference import EagerKernel, ReferenceKernel
from .registry import KERNELS, available, definition

# In the order in which "auto" prefers them.
KERNELS |= {
    kernel.name: kernel for kernel in (NativeKernel, AtenKernel, EagerKernel, ReferenceKernel, CostingKernel)
}

__all__ = [
    "KERNELS",
    "AtenKernel",
    "CostingKernel",
    "EagerKernel",
    "Gradients",
    "Kernel",
    "Leaf",
    "NativeKernel",
    "OutputGradient",
    "ReferenceKernel",
    "as_kernel",
    "available",
    "chosen",
    "definition",
]


def chosen(device: torch.device | None = None, dims: Dims = ()) -> str:
    """Return the name of the kernel that "auto" is, for tensors on this device of these head_dim and v_dim."""
    return available(device, dims)[0]


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def as_kernel(kernel: str | Kernel, device: torch.device | None = None, dims: Dims = ()) -> Kernel:
    """Return the kernel itself, or a new one of that name; "auto" is what `chosen` says.

    It warns, once, where "auto" is a slower kernel because the package was built without the preferred one.
    """
    if isinstance(kernel, Kernel):
        return kernel
    name = kernel
    if isinstance(kernel, str) and kernel == "auto":
        name = chosen(device, dims)
        missing = next(iter(KERNELS.values())).why_not()
        if missing is not None:
            _warn_once(f"{missing} kernel='auto' is {name!r}; asked for by name it says nothing.")
    computing = sorted(name for name, known in KERNELS.items() if known.computes)
    return KERNELS[one_of("kernel", name, ("auto", *computing))]()
