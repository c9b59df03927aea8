"""Keys and values wherever they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantized import Quantized


class Block(ABC):
    kind: str
    inputs: tuple[Tensor, ...]

    @property
    @abstractmethod
    def kv_len(self) -> int: ...
    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Dense: ...
    @abstractmethod
    def heads(self, some: slice) -> Block: ...


@dataclass(frozen=True, eq=False)
class Dense(Block):
    k: Tensor
    v: Tensor
    kind = "dense"

    @property
    def inputs(self):
        return (self.k, self.v)

    @property
    def kv_len(self):
        return self.k.shape[2]

    def dense(self, dtype):
        return self

    def heads(self, some):
        return Dense(self.k[:, some], self.v[:, some])

    def keys(self, some):
        return Dense(self.k[:, :, some], self.v[:, :, some])


@dataclass(frozen=True, eq=False)
class Int8(Block):
    k: Quantized
    v: Quantized
    kind = "int8"
    inputs = ()

    @property
    def kv_len(self):
        return self.k.numbers.shape[2]

    def dense(self, dtype):
        return Dense(self.k.dequantized(dtype), self.v.dequantized(dtype))

    def heads(self, some):
        return Int8(*(Quantized(x.numbers[:, some], x.scales[:, some]) for x in (self.k, self.v)))
