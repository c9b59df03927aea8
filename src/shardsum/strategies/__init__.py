"""How the sum is distributed: each strategy is one file, and all compute the same thing."""

from __future__ import annotations

from ..scalars import one_of
from .all_gather import AllGather
from .all_reduce import AllReduce
from .base import Strategy
from .bound import lower_bound_bytes
from .call import Call, PlacedBlock
from .hybrid import Hybrid
from .observed import Observed
from .pass_q import PassQ
from .ring import Ring
from .ulysses import Ulysses

# "auto" takes the first that suits.
STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (AllReduce, AllGather, Ring, PassQ, Ulysses, Hybrid)
}

__all__ = [
    "STRATEGIES",
    "AllGather",
    "AllReduce",
    "Call",
    "Hybrid",
    "Observed",
    "PassQ",
    "PlacedBlock",
    "Ring",
    "Strategy",
    "Ulysses",
    "as_strategy",
    "lower_bound_bytes",
]


def as_strategy(strategy: str | Strategy) -> Strategy | None:
    """The strategy itself, or a new one of that name; None for "auto", which `choose` decides for a problem."""
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str) and strategy == "auto":
        return None
    return STRATEGIES[one_of("strategy", strategy, ("auto", *sorted(STRATEGIES)))]()
