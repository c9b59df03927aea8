"""Attention on one device: the same call for every kernel, so that one contract suite tests them all."""

from __future__ import annotations

from ..errors import Unsupported
from .aten import AtenKernel
from .base import Gradients, Kernel, OutputGradient
from .native import NativeKernel, instruction_sets
from .reference import EagerKernel, ReferenceKernel

KERNELS: dict[str, type[Kernel]] = {
    "aten": AtenKernel,
    "eager": EagerKernel,
    "native": NativeKernel,
    "reference": ReferenceKernel,
}

__all__ = [
    "KERNELS",
    "AtenKernel",
    "Gradients",
    "Kernel",
    "NativeKernel",
    "OutputGradient",
    "ReferenceKernel",
    "as_kernel",
    "instruction_sets",
]


def as_kernel(kernel: str | Kernel) -> Kernel:
    """The kernel itself, or a new one of that name; "auto" is the fastest there is, now `aten`."""
    if isinstance(kernel, Kernel):
        return kernel
    name = "aten" if kernel == "auto" else kernel
    if name not in KERNELS:
        raise Unsupported(f"kernel must be auto, {', '.join(sorted(KERNELS))}: got {kernel!r}.")
    return KERNELS[name]()
