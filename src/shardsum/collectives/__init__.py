"""All-reduce of attention states, sums and maxima by several algorithms: each is one file, all do the same."""

from __future__ import annotations

from ..scalars import one_of
from .all_gather import GatherAll
from .auto import Auto
from .base import Collective, slices
from .bound import least_bytes, least_messages, least_rounds
from .exchange import KaryExchange, RecursiveDoubling
from .operations import MAXIMUM, MERGE, SUM, Operation, combine_all
from .rabenseifner import Rabenseifner
from .ring import RingReduce
from .sums import all_reduce_states, reduce_over_ranks, reduce_scatter_states, sum_scatter
from .tree import BinomialTree
from .two_level import TwoLevel

COLLECTIVES: dict[str, type[Collective]] = {
    "all_gather": GatherAll,
    "recursive_doubling": RecursiveDoubling,
    "k_ary": KaryExchange,
    "tree": BinomialTree,
    "ring": RingReduce,
    "rabenseifner": Rabenseifner,
    "two_level": TwoLevel,
}

__all__ = [
    "COLLECTIVES",
    "MAXIMUM",
    "MERGE",
    "SUM",
    "Auto",
    "BinomialTree",
    "Collective",
    "GatherAll",
    "KaryExchange",
    "Operation",
    "Rabenseifner",
    "RecursiveDoubling",
    "RingReduce",
    "TwoLevel",
    "all_reduce_states",
    "as_collective",
    "combine_all",
    "least_bytes",
    "least_messages",
    "least_rounds",
    "reduce_over_ranks",
    "reduce_scatter_states",
    "slices",
    "sum_scatter",
]


def as_collective(collective: str | Collective) -> Collective:
    """The collective itself, or a new one of that name. Raises: Unsupported for an unknown name."""
    if isinstance(collective, Collective):
        return collective
    if isinstance(collective, str) and collective == "auto":
        return Auto()
    return COLLECTIVES[one_of("collective", collective, ("auto", *COLLECTIVES))]()
