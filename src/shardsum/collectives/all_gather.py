"""One round: everyone's rows go to everyone, who combines them alone."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator, Traffic
from ..kernels.merging import pack_into, packed_shape
from ..state import AttentionState
from .base import Collective
from .operations import Operation, combine_all, merge_all


class GatherAll(Collective):
    """All-gather, then the same combination on every rank: the fewest rounds, the most bytes."""

    name = "all_gather"

    def all_reduce_state(self, comm: Communicator, state: AttentionState) -> None:
        own, pieces, gather = comm.gathering(state.out, packed_shape(state))
        pack_into(state, own)
        gather()
        merge_all(pieces, state)

    def _all_reduce(self, comm: Communicator, rows: Tensor, operation: Operation) -> None:
        whole, pieces = comm.scratch(rows, comm.size)
        comm.all_gather_into(rows, whole)
        combine_all(pieces, operation, rows)

    def _traffic(self, comm: Communicator, rows: int, row_bytes: int) -> Traffic:
        return Traffic(rows * row_bytes * (comm.size - 1), comm.size - 1, 1)

    def _rounds(self, comm: Communicator, rows: int, row_bytes: int) -> int:
        return 1

    def messages_at_once(self, comm: Communicator) -> int:
        return comm.size - 1
