"""The compiled module `shardsum._native`: whether it was built, and how it numbers the types of elements."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int8: 4}


@functools.cache
def native_module() -> Any:  # the module is compiled
    """Return the compiled module, or None where it was not built."""
    try:
        return import_module("shardsum._native")
    except ModuleNotFoundError:
        return None


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that the module can use on this machine, the best first."""
    return () if native_module() is None else tuple(native_module().instruction_sets())
