"""Memory that is kept from one call to the next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Make = TypeVar("Make", bound=Callable[..., Any])


def remembered(make: Make) -> Make:
    """Decorate a function of few values: its results are shared, outside of inference mode."""
    cached = functools.lru_cache(maxsize=16)(make)

    @functools.wraps(make)
    def found(*values: Any) -> Any:
        return make(*values) if torch.is_inference_mode_enabled() else cached(*values)

    return cast(Make, found)


def kept_memory(*shape: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """A tensor to write to in any later call: what torch.inference_mode() makes can't be written to outside it."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)
