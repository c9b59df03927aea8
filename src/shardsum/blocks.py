"""Some positions' keys and values, wherever and in whatever form they lie: what kernels compute with.

A new way to keep keys is one more subclass of Block; a kernel that can't read it is given its `dense` twin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .placement import Subset
from .quantized import Quantized


class Block(ABC):
    """Some positions' keys and values.

    `kind` is what ranks agree on and messages say. `tensors`: what it is made of.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(kv_heads, kv_len, head_dim, v_dim)"""

    @property
    def kv_heads(self) -> int:
        return self.shape[0]

    @property
    def kv_len(self) -> int:
        return self.shape[1]

    @property
    def head_dim(self) -> int:
        return self.shape[2]

    @property
    def v_dim(self) -> int:
        return self.shape[3]

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers that it is made of, scales rather than int8."""

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Dense:
        """Return keys and values as tensors in this dtype; itself where it is such."""

    @abstractmethod
    def keys(self, some: Subset) -> Block:
        """Return the block of some of its positions, counted within it."""

    @abstractmethod
    def heads(self, some: slice) -> Block:
        """Return the block of some of its KV heads."""


@dataclass(frozen=True, eq=False)
class Dense(Block):
    """Keys and values as two tensors of floating-point numbers."""

    k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    v: Float[Tensor, "batch kv_heads kv_len v_dim"]
    kind: ClassVar[str] = "dense"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v

    @property
    def shape(self) -> tuple[int, int, int, int]:
        _, kv_heads, kv_len, head_dim = self.k.shape
        return (kv_heads, kv_len, head_dim, self.v.shape[3])

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    def dense(self, dtype: torch.dtype) -> Dense:
        if self.k.dtype == self.v.dtype == dtype:
            return self
        return Dense(self.k.to(dtype), self.v.to(dtype))

    def keys(self, some: Subset) -> Dense:
        return Dense(self.k[:, :, some], self.v[:, :, some])

    def heads(self, some: slice) -> Dense:
        return Dense(self.k[:, some], self.v[:, some])


@dataclass(frozen=True, eq=False)
class Int8(Block):
    """Keys and values as int8, with a scale for each token and head."""

    k: Quantized
    v: Quantized
    kind: ClassVar[str] = "int8"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k.numbers, self.v.numbers, self.k.scales, self.v.scales

    @property
    def shape(self) -> tuple[int, int, int, int]:
        _, kv_heads, kv_len, head_dim = self.k.numbers.shape
        return (kv_heads, kv_len, head_dim, self.v.numbers.shape[3])

    @property
    def dtype(self) -> torch.dtype:
        return self.k.scales.dtype

    def dense(self, dtype: torch.dtype) -> Dense:
        return Dense(self.k.dequantized(dtype), self.v.dequantized(dtype))

    def keys(self, some: Subset) -> Int8:
        return Int8(self.k[:, :, some], self.v[:, :, some])

    def heads(self, some: slice) -> Int8:
        return Int8(self.k[:, some], self.v[:, some])


@dataclass(frozen=True, eq=False)
class Paged(Block):
    """Keys and values in pages of one pool, which sequences may share.

    Position j of sequence b is row j % page_len of page table[b, j // page_len].
    Entries of the table for positions that no query sees may be any number.
    """

    k_pages: Float[Tensor, "pages kv_heads page_len head_dim"]
    v_pages: Float[Tensor, "pages kv_heads page_len v_dim"]
    table: Int[Tensor, "batch max_pages"]
    kind: ClassVar[str] = "paged"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k_pages, self.v_pages, self.table

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that the table names, once for each sequence."""
        pages = max(1, self.k_pages.shape[0])
        return (self.k_pages.nbytes + self.v_pages.nbytes) // pages * self.table.numel()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        _, kv_heads, page_len, head_dim = self.k_pages.shape
        return (kv_heads, self.table.shape[1] * page_len, head_dim, self.v_pages.shape[3])

    @property
    def dtype(self) -> torch.dtype:
        return self.k_pages.dtype

    def dense(self, dtype: torch.dtype) -> Dense:
        table = self.table.to(self.device, torch.int64).clamp(0, max(0, self.k_pages.shape[0] - 1))
        k, v = (pages[table].transpose(1, 2).flatten(2, 3).to(dtype) for pages in (self.k_pages, self.v_pages))
        return Dense(k, v)

    def keys(self, some: Subset) -> Dense:
        return self.dense(self.dtype).keys(some)

    def heads(self, some: slice) -> Paged:
        return Paged(self.k_pages[:, some], self.v_pages[:, some], self.table)
