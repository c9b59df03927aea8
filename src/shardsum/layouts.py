"""Who holds which positions of a sequence.

A layout is a rule that gives every position of a global sequence to one rank, for any length and any number of
ranks. Positions on a rank are increasing. There are no divisibility rules; a rank may hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Positions = Int[Tensor, " positions"]
NAMES = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class Layout:
    """A rule that gives each position to one rank.

    `contiguous`: rank r holds the r-th piece. `zigzag`: 2 N chunks as `torch.tensor_split` cuts them, rank r
    holding chunks r and 2 N - 1 - r, so that causal work is even. `striped`: position p is on rank p mod N.
    `weighted`: zigzag whose chunks are in proportion to the ranks' speeds.

    >>> Layout("zigzag").positions(10, rank=0, size=2)
    tensor([0, 1, 2, 8, 9])
    """

    name: str
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in (*NAMES, "weighted"):
            raise ValueError(
                f"layout must be one of {', '.join(NAMES)} or Layout.weighted([...]): got {self.name!r}."
            )

        if self.name != "weighted" and self.weights:
            raise ValueError(f"layout {self.name} has no weights: got {list(self.weights)}.")
        if self.name == "weighted" and not (
            all(0 <= weight < float("inf") for weight in self.weights) and 0 < 2 * sum(self.weights) < float("inf")
        ):
            raise ValueError(f"weights must be finite, none negative and not all zero: got {list(self.weights)}.")

    @classmethod
    def weighted(cls, weights: Sequence[float]) -> Layout:
        """Shares in proportion to `weights`, one for each rank, for machines of unequal speed.

        Rank r holds chunks r and 2 N - 1 - r of a sequence cut in proportion to (w_0 .. w_N-1, w_N-1 .. w_0):
        the two chunks lie mirrored about the middle, so work is in proportion with a causal mask too.

        >>> Layout.weighted([3, 1, 2]).lengths(12, size=3)
        [6, 2, 4]
        """
        return cls("weighted", tuple(float(weight) for weight in weights))

    def positions(self, length: int, rank: int, size: int) -> Positions:
        """The global positions that `rank` of `size` holds of a sequence of `length`, increasing."""
        if self.name == "striped":
            return torch.arange(min(rank, length), length, size)
        edges = self._edges(length, size)
        chunks = [rank] if self.name == "contiguous" else [rank, 2 * size - 1 - rank]
        return torch.cat([torch.arange(edges[chunk], edges[chunk + 1]) for chunk in chunks])

    def lengths(self, length: int, size: int) -> list[int]:
        """How many positions each of `size` ranks holds of a sequence of `length`."""
        return [len(self.positions(length, rank, size)) for rank in range(size)]

    def _edges(self, length: int, size: int) -> list[int]:
        if self.name == "weighted":
            if len(self.weights) != size:
                raise ValueError(
                    "Layout.weighted needs one weight for each rank: "
                    f"got {len(self.weights)} weights, {size} ranks."
                )
            shares = torch.tensor([*self.weights, *reversed(self.weights)], dtype=torch.float64)
            return [0, *(shares.cumsum(0) / shares.sum() * length).round().long().tolist()]
        chunks = size if self.name == "contiguous" else 2 * size
        whole, rest = divmod(length, chunks)
        return [chunk * whole + min(chunk, rest) for chunk in range(chunks + 1)]


@dataclass(frozen=True, eq=False)
class Placement:
    """Which positions of one sequence each rank holds in one call: the layout, applied to real lengths."""

    positions: tuple[Positions, ...]

    @classmethod
    def of(cls, layout: Layout, local_lengths: Sequence[int], what: str) -> Placement:
        """The placement of a sequence of which each rank holds `local_lengths[rank]`.

        Contiguous takes whatever lengths the ranks hold; the other layouts determine them.
        Raises: ValueError where a rank holds another number than the layout gives it.
        """
        size, length = len(local_lengths), sum(local_lengths)
        if layout.name == "contiguous":
            return cls(torch.split(torch.arange(length), list(local_lengths)))
        expected = layout.lengths(length, size)
        if expected != list(local_lengths):
            raise ValueError(
                f"layout {layout.name} over {size} ranks cuts {length} {what} into {expected}: "
                f"got {list(local_lengths)}. Use shardsum.shard with the same layout."
            )
        return cls(tuple(layout.positions(length, rank, size) for rank in range(size)))

    @classmethod
    def replicated(cls, lengths: Sequence[int]) -> Placement:
        """The placement of a sequence that every rank holds whole."""
        if len(set(lengths)) > 1:
            raise ValueError(f"q_replicated needs the same queries on every rank: got {list(lengths)} queries.")
        return cls((torch.arange(lengths[0]),) * len(lengths))

    @property
    def length(self) -> int:
        return sum(len(positions) for positions in self.positions)


def as_layout(layout: str | Layout) -> Layout:
    """The layout itself, or the one of that name."""
    return layout if isinstance(layout, Layout) else Layout(layout)
