"""What a rank holds of one layer: a slab for each holder group, with slots in the order of their positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import Block, Dense, Int8
from ..memory import kept_memory
from ..quantized import Quantized
from ..tensors import check_tensors, no_gradient

# Storage grows by a 32nd, at least 32 positions: about 3 % of it lies idle at most.
GROWTH_SHARE, GROWTH_POSITIONS = 32, 32


@dataclass(frozen=True)
class Shape:
    """What a token of one sequence takes in a layer; `quantized`: as int8, with a float32 scale for each head."""

    kv_heads: int
    dims: tuple[int, int]  # of a key and of a value
    dtype: torch.dtype
    device: torch.device | str | None
    quantized: bool

    @property
    def kind(self) -> str:
        """The kind of block that a slab of this shape is."""
        return Int8.kind if self.quantized else Dense.kind

    def empty(self, batch: int) -> list[Tensor]:
        """Keys and values, and the scales of both if they are int8, of no slots."""
        parts = [(dim, torch.int8 if self.quantized else self.dtype) for dim in self.dims]
        parts += [(1, torch.float32)] * (2 if self.quantized else 0)
        return [torch.empty(batch, self.kv_heads, 0, dim, dtype=dtype, device=self.device) for dim, dtype in parts]


class Slab:
    """The keys and values of one holder group in one layer, in memory with room for more."""

    def __init__(self, shape: Shape) -> None:
        self._shape, self._parts = shape, shape.empty(0)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def block(self, batch: int, slots: int) -> Block:
        """The first `slots`, where they lie; `batch`: of a slab that has no sequence yet."""
        parts = self._parts if self._parts[0].shape[0] else self._shape.empty(batch)
        k, v, *scales = (part[:, :, :slots] for part in parts)
        if not scales:
            return Dense(k, v)
        return Int8(*(Quantized(x, of_x.squeeze(3)) for x, of_x in zip((k, v), scales, strict=True)))

    def reserve(self, batch: int, slots: int) -> None:
        """Make room for `slots`; contents stay."""
        capacity = self._parts[0].shape[2]
        if slots > capacity or self._parts[0].shape[0] != batch:
            slots = slots if capacity == 0 else _with_room(slots)
            self._parts = [_resized(part, batch, slots) for part in self._parts]

    def release(self, slots: int) -> None:
        """Give memory back, once the first `slots` and room for more fit into half of it."""
        batch, _, capacity, _ = self._parts[0].shape
        if 2 * _with_room(slots) <= capacity:
            self._parts = [_resized(part, batch, _with_room(slots)) for part in self._parts]

    def write(self, row: slice, first: int, k: Tensor, v: Tensor) -> None:
        """Fill the slots from `first` on of some of the sequences."""
        new = [k, v]
        if self._shape.quantized:
            both = [Quantized.of(x) for x in new]
            new = [x.numbers for x in both] + [x.scales.unsqueeze(3) for x in both]
        for part, x in zip(self._parts, new, strict=True):
            part[row, :, first : first + x.shape[2]] = x

    def reorder(self, order: Tensor) -> None:
        """Make sequence b what sequence order[b] was."""
        self._parts = [part.index_select(0, order.to(part.device)) for part in self._parts]


class Layer:
    """One layer on this rank: each sequence's length, and a slab for each holder group that the rank is in."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.clear()

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self._slabs: dict[int, Slab] = {}
        self.lengths: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs.values())

    def slab(self, group: int) -> Slab:
        """The slab of a holder group, empty at first."""
        if group not in self._slabs:
            self._slabs[group] = Slab(self.shape)
        return self._slabs[group]

    def check(self, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless these are tokens of this layer; Unsupported where they require gradients."""
        shape = self.shape
        batch = len(self.lengths) or (k.shape[0] if isinstance(k, Tensor) and k.ndim else 1)
        for name, x, dim in zip("kv", (k, v), shape.dims, strict=True):
            check_tensors(**{name: x})
            expected = (batch, shape.kv_heads, dim)
            if x.ndim != 4 or (x.shape[0], x.shape[1], x.shape[3]) != expected or x.dtype != shape.dtype:
                raise ValueError(
                    f"{name} must be ({batch}, {shape.kv_heads}, new, {dim}) in {shape.dtype}, as in the cache: "
                    f"got {tuple(x.shape)} in {x.dtype}."
                )
            no_gradient(name, x, "A KVCache holds numbers alone: append under torch.no_grad(), or use attention.")
        if batch == 0:
            raise ValueError("a cache needs at least one sequence: got a batch of 0.")
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"k and v must have the same length: got {k.shape[2]} and {v.shape[2]}.")

    def reorder(self, order: Tensor) -> None:
        """Make sequence b what sequence order[b] was."""
        if len(self.lengths):
            for slab in self._slabs.values():
                slab.reorder(order)
            self.lengths = tuple(self.lengths[sequence] for sequence in order.tolist())


def _with_room(slots: int) -> int:
    return slots + max(slots // GROWTH_SHARE, GROWTH_POSITIONS)


def _resized(part: Tensor, batch: int, slots: int) -> Tensor:
    resized = kept_memory(batch, part.shape[1], slots, part.shape[3], dtype=part.dtype, device=part.device)
    if part.shape[0]:
        both = min(part.shape[2], slots)
        resized[:, :, :both] = part[:, :, :both]
    return resized
