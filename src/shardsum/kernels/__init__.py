"""Attention on one device: the same call for every kernel, so that one contract suite tests them all."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor

from ..errors import Unsupported
from .aten import AtenKernel
from .base import Gradients, Kernel, OutputGradient
from .compiled import why_not_native
from .fixed import Blocks, states_by_nodes
from .native import NativeKernel
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
    "Blocks",
    "Gradients",
    "Kernel",
    "NativeKernel",
    "OutputGradient",
    "ReferenceKernel",
    "as_kernel",
    "chosen",
    "states_by_nodes",
    "that_run_here",
    "why_not_native",
]


def that_run_here() -> list[str]:
    """The names of the kernels that CPU tensors can use in this installation."""
    return [name for name in KERNELS if name != NativeKernel.name or why_not_native() is None]


def chosen(q: Tensor | None = None, v: Tensor | None = None) -> str:
    """The name of the kernel that "auto" is: `native` where it can take q and v, else `aten`."""
    return "native" if why_not_native(q, v) is None else "aten"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def as_kernel(kernel: str | Kernel, q: Tensor | None = None, v: Tensor | None = None) -> Kernel:
    """The kernel itself, or a new one of that name; "auto" is what `chosen` says.

    It warns, once, where "auto" is the slower kernel because the package was built without the other.
    """
    if isinstance(kernel, Kernel):
        return kernel
    name = kernel
    if kernel == "auto":
        name, missing = chosen(q, v), why_not_native()
        if missing is not None:
            _warn_once(f"{missing} kernel='auto' is {name!r}; asked for by name it says nothing.")
    if name not in KERNELS:
        raise Unsupported(f"kernel must be auto, {', '.join(sorted(KERNELS))}: got {kernel!r}.")
    return KERNELS[name]()
