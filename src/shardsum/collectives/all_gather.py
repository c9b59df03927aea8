"""One round: everyone's rows go to everyone, who combines them alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic
from ..memory import kept_memory
from ..packed import StateOperation, packed_shape, packer
from ..state import AttentionState
from .base import Collective
from .operations import Operation, combine_all, merger_of_all


class GatherAll(Collective):
    """All-gather, then the same combination on every rank: the fewest rounds, the most bytes."""

    name = "all_gather"

    def all_reduce_state(self, comm: Communicator, state: AttentionState) -> None:
        out = state.out
        key = "all_gather", out.shape, out.dtype, out.device
        pack, gather, merge = comm.kept(key, _prepare, comm, state)
        pack(state)
        gather()
        merge(state)

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        whole, pieces = comm.scratch(rows, comm.size)
        comm.all_gather_into(rows, whole)
        combine_all(pieces, operation, rows)

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        return Traffic(rows * row_bytes * (ranks.size - 1), ranks.size - 1, 1)

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        return 1

    def messages_at_once(self, ranks: Ranks) -> int:
        return ranks.size - 1


def _prepare(
    comm: Communicator, like: AttentionState
) -> tuple[tuple[StateOperation, Callable[[], None], StateOperation], int]:
    """What packs a state, gathers all ranks' and merges them, in memory of its own, and the bytes of that."""
    whole = kept_memory(comm.size, *packed_shape(like), dtype=like.out.dtype, device=like.out.device)
    pieces = whole.unbind()
    return (packer(pieces[comm.rank]), comm.all_gather_again(whole), merger_of_all(pieces)), whole.nbytes
