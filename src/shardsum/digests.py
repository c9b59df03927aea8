"""Digests of tensors: a few hexadecimal digits in place of what ranks or runs compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_BYTES = 8


def digest_bits(tensors: Iterable[Tensor]) -> str:
    """Return twelve digits for the bits of tensors of any of numpy's dtypes, for people to compare.

    >>> digest_bits([torch.zeros(2)]) == digest_bits([-torch.zeros(2)])
    False
    """
    content = hashlib.sha256()
    for x in tensors:
        content.update(x.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:12]


def digest_numbers(numbers: Tensor | None) -> str | None:
    """Return the digest of floating-point values, for an agreement; they are compared as float64.

    >>> digest_numbers(torch.ones(2)) == digest_numbers(torch.ones(2, dtype=torch.float64))
    True
    """
    return None if numbers is None else _digest_as(torch.float64, numbers)


def digest_indices(indices: Tensor | None) -> str | None:
    """Return the shape and the digest of whole numbers, for an agreement.

    >>> digest_indices(torch.tensor([[3, 4]])) == digest_indices(torch.tensor([3, 4]))
    False
    """
    return None if indices is None else f"{tuple(indices.shape)} {_digest_as(torch.int64, indices)}"


def _digest_as(dtype: torch.dtype, values: Tensor) -> str:
    content = values.detach().cpu().to(dtype).contiguous().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=_BYTES).hexdigest()
