"""Where the tokens of all layers lie: which rank holds which positions, and what this rank holds of them."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ..placement import Placement
from ..scalars import whole
from ..strategies import PlacedBlock
from .owners import Owners
from .slab import Layer, Shape, Slab


class Store:
    """The layers of a cache on one rank, and the holders of all positions, which are the same for every layer.

    `reordered`: a digest of the orders in which sequences were put since it was empty.
    """

    def __init__(self, layers: int, shape: Shape, rank: int, size: int, unit: int) -> None:
        self._rank, self._size, self._unit, self._shape = rank, size, unit, shape
        self.layers = [Layer(shape) for _ in range(layers)]
        self.clear()

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.owners = Owners(self._size, self._unit)
        self.reordered = 0
        for layer in self.layers:
            layer.clear()

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return max((len(layer.lengths) for layer in self.layers), default=0)

    def layer(self, number: int) -> Layer:
        """The layer of this number. Raises: ValueError where there is none."""
        if not 0 <= whole("layer", number) < len(self.layers):
            raise ValueError(f"layer must be one of the cache's {len(self.layers)}: got {number}.")
        return self.layers[number]

    def append(self, layer: Layer, k: Tensor, v: Tensor, valid: tuple[int, ...], shards: Placement | None) -> None:
        """Write new tokens, of which each sequence has `valid`, behind those of a layer.

        k and v are all of them on every rank, or this rank's of `shards`.
        """
        start = layer.lengths or (0,) * len(valid)
        ends = tuple(first + new for first, new in zip(start, valid, strict=True))
        even = len(set(start)) == 1
        if shards is None:
            self.owners.take_turns(max(ends))
        else:
            self.owners.take_shards(start[0] if even else None, max(ends), shards)
        together = [(slice(None), start[0], max(valid))]
        single = [(slice(b, b + 1), start[b], valid[b]) for b in range(len(start))]
        for group in self.owners.held(self._rank):
            runs, slab = self.owners.runs(group, max(ends)), layer.slab(group)
            slab.reserve(len(start), len(runs))
            for row, base, count in together if even else single:
                # Slots are in the order of positions: those of new tokens follow each other.
                first, last = base, base + count
                if len(runs) < max(ends):  # other groups have positions between
                    first, last = runs.below(torch.tensor([first, last])).tolist()
                come: slice | Tensor = slice(last - first)
                if shards is None and last - first < count:  # not all new tokens are the group's
                    come = (runs.at(torch.arange(first, last)) - base).to(k.device)
                slab.write(row, first, k[row, :, come], v[row, :, come])
        layer.lengths = ends

    def blocks(self, layer: Layer, batch: int) -> list[PlacedBlock]:
        """The blocks of a layer that this rank computes with; `batch`: of a cache that is still empty."""
        owners, length = self.owners, layer.longest
        blocks = []
        for group in owners.owned(self._rank):
            block = layer.slab(group).block(batch, len(owners.runs(group, length)))
            blocks.append(PlacedBlock(block, owners.keys(group, length)))
        return blocks or [PlacedBlock(Slab(self._shape).block(batch, 0))]

    def crop(self, length: int) -> None:
        """Forget every sequence's tokens from position `length` on, and give idle memory back."""
        for layer in self.layers:
            layer.lengths = tuple(min(cached, length) for cached in layer.lengths)
        self._forget_owners()
        for layer in self.layers:
            for group in self.owners.held(self._rank):
                layer.slab(group).release(len(self.owners.runs(group, layer.longest)))

    def reorder(self, order: Tensor) -> None:
        """Make sequence b what sequence order[b] was."""
        self.reordered = zlib.crc32(order.numpy().tobytes(), self.reordered)
        for layer in self.layers:
            layer.reorder(order)
        self._forget_owners()

    def _forget_owners(self) -> None:
        """Let positions that no sequence has any more come to lie elsewhere."""
        self.owners.crop(max((layer.longest for layer in self.layers), default=0))
