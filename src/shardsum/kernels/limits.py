"""The limits of this machine, measured: what no kernel can go beyond."""

from __future__ import annotations

import functools
import time

import torch

from ..extension import native_module
from .native import NativeKernel

READ_BYTES = 1 << 29  # far more than any cache
ROUNDS = 1 << 21


@functools.cache
def _floats() -> torch.Tensor:
    return torch.ones(READ_BYTES // 4)


def read_bytes_per_second() -> float:
    """How fast all threads together read memory, once."""
    data = _floats()
    start = time.perf_counter()
    native_module().read_memory(
        NativeKernel().instruction_set, data.data_ptr(), data.numel(), torch.get_num_threads()
    )
    return data.nbytes / (time.perf_counter() - start)


def flops_per_second(dtype: torch.dtype, instruction_set: str | None = None) -> float:
    """How many multiplications and additions all threads together do, of float32 or of bfloat16 into float32."""
    isa, of_bfloat16 = NativeKernel(instruction_set).instruction_set, dtype == torch.bfloat16
    start = time.perf_counter()
    flops: float = native_module().multiply_add(isa, of_bfloat16, ROUNDS, torch.get_num_threads())
    return flops / (time.perf_counter() - start)
