"""Memory that is kept from one call to the next."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_memory(*shape: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """A tensor to write to in any later call: what torch.inference_mode() makes can't be written to outside it."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)
