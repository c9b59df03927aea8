"""What a KV cache holds of one layer on one rank: slots in the order of their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import Unsupported
from .memory import kept_memory
from .quantized import Quantized

# Storage grows by a 32nd, at least 32 positions: about 3 % of it lies idle at most.
GROWTH_SHARE, GROWTH_POSITIONS = 32, 32


class LayerStorage:
    """One layer's storage on this rank: slots in the order of their positions, and each sequence's length.

    `quantized`: keys and values are held as int8, with scales in float32 for each slot and head.
    """

    def __init__(
        self,
        kv_heads: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str | None,
        quantized: bool,
    ) -> None:
        self.kv_heads, self.dims, self.dtype, self.quantized = kv_heads, dims, dtype, quantized
        kinds = [(dim, torch.int8 if quantized else dtype) for dim in dims]
        kinds += [(1, torch.float32)] * (2 if quantized else 0)
        self._empty = [torch.empty(0, kv_heads, 0, dim, dtype=held, device=device) for dim, held in kinds]
        self.clear()

    def clear(self) -> None:
        self._held = self._empty
        self.lengths: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._held)

    def read(self, batch: int, slots: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Keys, values and the scales of both, if they are int8, of the first `slots`; no copies.

        `batch`: of a cache that is still empty.
        """
        held = self._held if len(self.lengths) else [x.new_empty(batch, *x.shape[1:]) for x in self._held]
        k, v, *scales = (x[:, :, :slots] for x in held)
        return k, v, (scales[0].squeeze(3), scales[1].squeeze(3)) if scales else None

    def check(self, k: Tensor, v: Tensor) -> None:
        batch = len(self.lengths) or (k.shape[0] if isinstance(k, Tensor) and k.ndim else 1)
        for name, x, dim in zip("kv", (k, v), self.dims, strict=True):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name} must be a torch tensor: got {type(x).__name__}.")
            expected = (batch, self.kv_heads, dim)
            if x.ndim != 4 or (x.shape[0], x.shape[1], x.shape[3]) != expected or x.dtype != self.dtype:
                raise ValueError(
                    f"{name} must be ({batch}, {self.kv_heads}, new, {dim}) in {self.dtype}, as in the cache: "
                    f"got {tuple(x.shape)} in {x.dtype}."
                )
            if self.quantized and torch.is_grad_enabled() and x.requires_grad:
                raise Unsupported(f"{name} has no gradient once it is int8. Append it under torch.no_grad().")
        if batch == 0:
            raise ValueError("a cache needs at least one sequence: got a batch of 0.")
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"k and v must have the same length: got {k.shape[2]} and {v.shape[2]}.")

    def reserve(self, batch: int, slots: int) -> None:
        """Make room for so many slots; contents stay."""
        held = self._held[0].shape[2]
        if slots <= held and self._held[0].shape[0] == batch:
            return
        capacity = slots if held == 0 else room(slots)
        self._held = [_grown(x, batch, capacity) for x in self._held]

    def write(self, row: slice, first: int, k: Tensor, v: Tensor) -> None:
        """Fill the slots from `first` on of some of the sequences."""
        new = [k, v]
        if self.quantized:
            both = [Quantized.of(x) for x in new]
            new = [x.numbers for x in both] + [x.scales.unsqueeze(3) for x in both]
        for held, x in zip(self._held, new, strict=True):
            held[row, :, first : first + x.shape[2]] = x

    def reorder(self, order: Tensor) -> None:
        if len(self.lengths):
            self._held = [x.index_select(0, order.to(x.device)) for x in self._held]
            self.lengths = tuple(self.lengths[sequence] for sequence in order.tolist())


def room(slots: int) -> int:
    """How many slots to make where so many are needed, and more will be."""
    return slots + max(slots // GROWTH_SHARE, GROWTH_POSITIONS)


def _grown(x: Tensor, batch: int, capacity: int) -> Tensor:
    grown = kept_memory(batch, x.shape[1], capacity, x.shape[3], dtype=x.dtype, device=x.device)
    if x.shape[0]:
        grown[:, :, : x.shape[2]] = x
    return grown
