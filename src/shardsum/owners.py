"""Who holds the positions of a sequence that grows at its end: what a token adds costs one token's work."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import Unsupported
from .layouts import Placement
from .memory import kept_memory
from .storage import room


class Owners:
    """The ranks that hold positions 0 to `length` - 1, decided once for each.

    Positions come from shards, or are given to the ranks in turn, in units of so many. What `placement` returns
    stays as it is whatever comes later.
    """

    def __init__(self, size: int, unit: int) -> None:
        self._unit, self.length = unit, 0
        # Each rank's positions, increasing, with room for more behind the first `_counts[rank]`.
        self._held = [kept_memory(0, dtype=torch.int64)] * size
        self._counts = [0] * size
        self._placement: Placement | None = None

    def placement(self, length: int) -> Placement:
        """Where the first `length` positions lie; the same object until another number is asked for."""
        if self._placement is None or self._placement.length != length:
            self._placement = Placement(tuple(self._below(rank, length) for rank in range(len(self._held))))
        return self._placement

    def take_turns(self, length: int) -> None:
        """Give those of the first `length` positions that nobody has to ranks, unit after unit."""
        if length <= self.length:
            return
        new = torch.arange(self.length, length)
        owners = new // self._unit % len(self._held)
        begun = -self.length % self._unit
        if begun:  # a unit that has begun goes on where it is
            owners[:begun] = self._owner_of_last()
        few = len(new) < len(self._held)
        for rank in set(owners.tolist()) if few else range(len(self._held)):
            self._add(rank, new[owners == rank])
        self.length = length

    def take_shards(self, base: int | None, end: int, shards: Placement) -> None:
        """Leave the positions [base, end) where shards of them and what follows lie.

        `base` is None where sequences end at different positions.
        Raises: Unsupported where that can't be; ValueError where positions lie elsewhere already.
        """
        if base is None:
            raise Unsupported(
                "sharded tokens can't follow sequences of different lengths. Append them without layout."
            )
        if base % self._unit:
            raise Unsupported(
                f"in a reproducible cache sharded tokens begin a segment of {self._unit} positions: "
                f"got tokens from position {base} on. Append them without layout."
            )
        come = []
        for rank, positions in enumerate(shards.positions):
            positions = positions[: int(torch.searchsorted(positions, end - base))] + base
            known = int(torch.searchsorted(positions, self.length))
            below = self._below(rank, end)
            if not torch.equal(positions[:known], below[int(torch.searchsorted(below, base)) :]):
                raise ValueError("every layer must be sharded alike: these positions lie on other ranks already.")
            come.append(positions[known:])
        for rank, positions in enumerate(come):
            self._add(rank, positions)
        self.length = max(self.length, end)

    def crop(self, length: int) -> None:
        """Forget who holds positions from `length` on: they may come to lie elsewhere."""
        # Without room, so that what comes is not written where a placement still looks.
        self._held = [self._below(rank, length) for rank in range(len(self._held))]
        self._counts = list(map(len, self._held))
        self.length = min(self.length, length)
        self._placement = None

    def _below(self, rank: int, length: int) -> Tensor:
        held = self._held[rank][: self._counts[rank]]
        return held if length >= self.length else held[: int(torch.searchsorted(held, length))]

    def _owner_of_last(self) -> int:
        return next(
            rank
            for rank, (held, count) in enumerate(zip(self._held, self._counts, strict=True))
            if count and int(held[count - 1]) == self.length - 1
        )

    def _add(self, rank: int, positions: Tensor) -> None:
        held, count = self._held[rank], self._counts[rank]
        end = count + len(positions)
        if end > len(held):
            self._held[rank] = kept_memory(room(end), dtype=torch.int64)
            self._held[rank][:count] = held[:count]
        self._held[rank][count:end] = positions
        self._counts[rank] = end
