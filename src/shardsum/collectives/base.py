"""The interface of a collective: an all-reduce by one algorithm, with its cost in closed form."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic
from ..packed import packed_shape, packer, unpacker
from ..state import AttentionState
from .operations import MERGE, Operation


class Collective(ABC):
    """An algorithm for all-reduce. It moves and combines rows of numbers, whatever the operation makes of them.

    Every pair of partial results is combined in rank order, and either by one rank, which sends the others what
    came out, or by several in the same way: all ranks get the same bits.
    """

    name: str

    def all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        """Replace `rows`, contiguous and of the same shape (rows, width) on every rank, by all ranks' combined."""
        assert rows.is_contiguous()
        assert rows.ndim == 2
        if comm.size > 1 and rows.numel():
            self._all_reduce(comm, rows, operation)

    def all_reduce_state(self, comm: Communicator, state: AttentionState) -> None:
        """Replace `state` by all ranks' merged: contiguous, with rows, of one shape on each of several ranks."""
        packed = comm.buffers.get(state.out, 1, "send", packed_shape(state))[1][0]
        packer(packed)(state)
        self._all_reduce(comm, packed, MERGE)
        unpacker(packed)(state)

    @property
    def needs_hosts(self) -> bool:
        """Whether what it does, and costs, depends on which ranks share a host."""
        return False

    def ranks(self, comm: Communicator) -> Ranks:
        """The communicator's ranks as this collective's cost asks for them, which all ranks call together."""
        if self.needs_hosts:
            comm.hosts()
        return comm.ranks

    def traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        """What this rank sends, in closed form: the communicator must count exactly this."""
        return self._traffic(ranks, rows, row_bytes) if ranks.size > 1 and rows * row_bytes else Traffic()

    def rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        """The longest chain of rounds of which each waits for the one before; fewer where some have no rows."""
        return self._rounds(ranks, rows, row_bytes) if ranks.size > 1 and rows * row_bytes else 0

    def messages_at_once(self, ranks: Ranks) -> int:
        """The most messages that a rank sends in one round."""
        return 1

    @abstractmethod
    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None: ...

    @abstractmethod
    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int: ...

    @abstractmethod
    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic: ...


def slices(rows: int, parts: int) -> list[slice]:
    """Cut `rows` rows into `parts` slices, as even as they can be."""
    edges = [rows * part // parts for part in range(parts + 1)]
    return [slice(*ends) for ends in itertools.pairwise(edges)]


def depth(size: int) -> int:
    """Return how often a group of `size` ranks is halved until each rank is alone."""
    return (size - 1).bit_length()


def distances(size: int) -> list[int]:
    """The powers of two below `size`, the largest first."""
    return [1 << level for level in reversed(range(depth(size)))]
