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

from .errors import Unsupported
from .memory import remembered
from .placement import Placement, Positions
from .scalars import shown

NAMES = ("contiguous", "zigzag", "striped")
# What a rank's share of packed documents may lack or have too much if that saves cutting a document.
SLACK = 0.01


@dataclass(frozen=True)
class Layout:
    """A rule that gives each position to one rank.

    `contiguous`: rank r holds the r-th piece. `zigzag`: 2 N chunks as `torch.tensor_split` cuts them, rank r
    holding chunks r and 2 N - 1 - r, so that causal work is even. `striped`: position p is on rank p mod N.
    `weighted`: zigzag whose chunks are in proportion to the ranks' speeds. `packed`: documents with even work.

    >>> Layout("zigzag").positions(10, rank=0, size=2)
    tensor([0, 1, 2, 8, 9])
    """

    name: str
    weights: tuple[float, ...] = ()
    documents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in (*NAMES, "weighted", "packed"):
            raise ValueError(
                f"layout must be one of {', '.join(NAMES)}, Layout.weighted([...]) or Layout.packed(cu_seqlens): "
                f"got {shown(self.name)}."
            )
        ends = list(self.documents)
        if self.name != "packed" and ends:
            raise ValueError(f"layout {self.name} has no documents: got {ends}.")
        if self.name == "packed" and (len(ends) < 2 or ends[0] != 0 or sorted(ends) != ends):
            raise ValueError(f"cu_seqlens must be (documents + 1,), rising from 0: got {ends}.")
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

    @classmethod
    def packed(cls, cu_seqlens: Sequence[int] | Int[Tensor, " ends"]) -> Layout:
        """Equal shares of the positions and of the attention work of packed documents, few documents cut.

        Each rank takes some of the longest documents that are left and some of the shortest, in such a proportion
        that it has its share of both. A document that is cut is cut as zigzag cuts: row 0 goes with its last row,
        row 1 with the one before that. Work is the number of keys that rows see in their document, causal or
        not. It fits sequences of the documents' length, queries and keys alike.

        >>> Layout.packed([0, 4, 5, 8]).positions(8, rank=1, size=2)
        tensor([2, 5, 6, 7])
        """
        ends = torch.as_tensor(cu_seqlens)
        if ends.is_floating_point() and ends.numel():
            raise ValueError(f"cu_seqlens must be whole numbers: got {ends.tolist()}.")
        return cls("packed", documents=tuple(ends.long().tolist()))

    def describe(self) -> list[str | float]:
        """The layout as JSON values, for the agreement."""
        return [self.name, *self.weights, *self.documents]

    @remembered  # each layer of a model asks
    def placement(self, length: int, size: int, unit: int = 1) -> Placement:
        """Where a sequence of `length` positions lies on `size` ranks.

        Units of `unit` positions stay together: the layout gives units to ranks as it gives positions otherwise.
        Raises: ValueError for weights or documents of another sequence; Unsupported for units of packed documents.
        """
        if self.name == "packed":
            return self._of_documents(length, size, unit)
        units = -(-length // unit)
        if self.name == "striped":
            return _striped(length, size, unit)
        edges = (self._edges(units, size) * unit).clamp(max=length)
        starts, counts = edges[:-1], edges.diff()
        if self.name == "contiguous":
            return Placement(size, torch.arange(size), starts, counts)
        chunks = torch.stack([torch.arange(size), 2 * size - 1 - torch.arange(size)], dim=1).flatten()
        return Placement(size, torch.arange(size).repeat_interleave(2), starts[chunks], counts[chunks])

    def positions(self, length: int, rank: int, size: int, unit: int = 1) -> Positions:
        """The global positions that `rank` of `size` holds of a sequence of `length`, increasing."""
        return self.placement(length, size, unit).positions(rank)

    def lengths(self, length: int, size: int, unit: int = 1) -> list[int]:
        """How many positions each of `size` ranks holds of a sequence of `length`."""
        return self.placement(length, size, unit).lengths

    def of_lengths(self, local_lengths: Sequence[int], what: str, unit: int = 1) -> Placement:
        """The placement of a sequence of which each rank holds `local_lengths[rank]`; `what`: its items' name.

        Contiguous takes whatever lengths the ranks hold; the other layouts determine them, in whole units. A unit
        is one position, or a segment of the fixed tree.
        Raises: ValueError where a rank holds another number than the layout gives it.
        """
        size, length = len(local_lengths), sum(local_lengths)
        if self.name == "contiguous":
            placement = Placement.contiguous(local_lengths)
            return placement if unit == 1 else placement.of_whole_segments()
        placement = self.placement(length, size, unit)
        if placement.lengths != list(local_lengths):
            units = "" if unit == 1 else f", in whole segments of {unit},"
            also = "" if unit == 1 else " and reproducible=True"
            raise ValueError(
                f"layout {self.name} over {size} ranks cuts {length} {what}{units} into {placement.lengths}: "
                f"got {list(local_lengths)}. Use shardsum.shard with the same layout{also}."
            )
        return placement

    def _of_documents(self, length: int, size: int, unit: int) -> Placement:
        if unit > 1:
            raise Unsupported("Layout.packed cuts between units of positions: use contiguous, zigzag or striped.")
        if length != self.documents[-1]:
            raise ValueError(f"Layout.packed is of {self.documents[-1]} positions: got a sequence of {length}.")
        return _packed(self.documents, size)

    def _edges(self, length: int, size: int) -> Tensor:
        """Where the chunks of a sequence begin and end: (chunks + 1,)."""
        if self.name == "weighted":
            if len(self.weights) != size:
                raise ValueError(
                    "Layout.weighted needs one weight for each rank: "
                    f"got {len(self.weights)} weights, {size} ranks."
                )
            shares = torch.tensor([*self.weights, *reversed(self.weights)], dtype=torch.float64)
            edges = (shares.cumsum(0) / shares.sum() * length).round().long()
            return torch.cat([edges.new_zeros(1), edges])
        chunks = size if self.name == "contiguous" else 2 * size
        whole, rest = divmod(length, chunks)
        numbers = torch.arange(chunks + 1)
        return numbers * whole + numbers.clamp(max=rest)


def _striped(length: int, size: int, unit: int) -> Placement:
    if unit == 1:
        ranks = torch.arange(size)
        return Placement(size, ranks, ranks, (length - ranks + size - 1) // size, torch.full_like(ranks, size))
    units = torch.arange(-(-length // unit))
    rank, order = (units % size).sort(stable=True)
    start = units[order] * unit
    return Placement(size, rank, start, (length - start).clamp(max=unit))


def _packed(documents: tuple[int, ...], size: int) -> Placement:
    """What each rank holds, as `Layout.packed` says.

    Positions stand in one line, the longest document first, and in each document as row 0, the last, row 1, the
    last but one, ...: every two of these see as many keys. Ranks take from both ends of that line.
    """
    ends = torch.tensor(documents)
    lengths, order = ends.diff().sort(descending=True, stable=True)
    line = torch.cat([_folded(int(ends[d]), int(length)) for d, length in zip(order, lengths, strict=True)])
    starts = torch.repeat_interleave(ends[:-1], ends.diff())
    work = torch.cat([torch.zeros(1, dtype=torch.int64), (line - starts[line] + 1).cumsum(0)])
    cuts = torch.ones(len(line) + 1, dtype=torch.bool)  # whether the line cut there cuts a document
    cuts[torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])] = False
    first, last, held = 0, len(line), []
    for ranks in range(size, 0, -1):
        count = round((last - first) / ranks)
        share = float(work[last] - work[first]) / ranks
        longest = torch.arange(count + 1)  # so many from the front, the others from the back
        front, back = first + longest, last - count + longest
        off = (work[front] - work[first] + work[last] - work[back] - share).abs()
        price = (off - SLACK * share).clamp(min=0) * len(line) + (cuts[front].int() + (cuts[back] & (back < last)))
        taken = int((price + off / (4 * work[-1] + 1)).argmin())
        held.append(torch.cat([line[first : first + taken], line[last - count + taken : last]]).sort().values)
        first, last = first + taken, last - count + taken
    return Placement.of(held)


def _folded(start: int, length: int) -> Tensor:
    rows = torch.arange(length)
    return start + torch.where(rows % 2 == 0, rows // 2, length - 1 - rows // 2)


def as_layout(layout: str | Layout) -> Layout:
    """The layout itself, or the one of that name."""
    return layout if isinstance(layout, Layout) else Layout(layout)
