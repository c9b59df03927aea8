"""One round: everyone's rows go to everyone, who combines them alone."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator, Ranks, Traffic
from ..memory import kept_memory
from ..packed import packed_shape, packer
from ..state import AttentionState
from .base import Collective
from .operations import Operation, combine_all, merger_of_all


class GatherAll(Collective):
    """All-gather, then the same combination on every rank: the fewest rounds, the most bytes."""

    name = "all_gather"

    def all_reduce_state(self, comm: Communicator, state: AttentionState) -> None:
        out = state.out
        key = "all_gather", out.shape, out.dtype, out.device
        held_bytes = comm.size * (out.nbytes + state.lse.nbytes)
        prepared = comm.prepared.get(key, held_bytes, lambda: PreparedStates(comm, state))
        if prepared is None:
            super().all_reduce_state(comm, state)
        else:
            prepared.all_reduce(state)

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        whole, pieces = comm.buffers.get(rows, comm.size)
        comm.all_gather(rows, into=whole)
        combine_all(pieces, operation, rows)

    def _traffic(self, ranks: Ranks, rows: int, row_bytes: int) -> Traffic:
        return Traffic(rows * row_bytes * (ranks.size - 1), ranks.size - 1, 1)

    def _rounds(self, ranks: Ranks, rows: int, row_bytes: int) -> int:
        return 1

    def messages_at_once(self, ranks: Ranks) -> int:
        return ranks.size - 1


class PreparedStates:
    """All ranks' states of one shape, packed, gathered and merged in the same memory by an operation made once.

    The plain way is that of every other collective, `Collective.all_reduce_state`, to the same bits.
    """

    def __init__(self, comm: Communicator, like: AttentionState) -> None:
        whole = kept_memory(comm.size, *packed_shape(like), dtype=like.out.dtype, device=like.out.device)
        pieces = whole.unbind()
        self._pack, self._merge = packer(pieces[comm.rank]), merger_of_all(pieces)
        self._gather = comm.prepare_all_gather(whole)

    def all_reduce(self, state: AttentionState) -> None:
        self._pack(state)
        self._gather()
        self._merge(state)
