"""How the sum is distributed: each strategy is one file, and all compute the same thing."""

from __future__ import annotations

from ..errors import Unsupported
from .all_gather import AllGather
from .all_reduce import AllReduce
from .base import Strategy
from .bound import lower_bound_bytes
from .call import Call, Found
from .hybrid import Hybrid
from .pass_q import PassQ
from .ring import Ring
from .ulysses import Ulysses

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (AllReduce, AllGather, Ring, PassQ, Ulysses, Hybrid)
}

# Up to this many bytes of keys and values on every rank, one all-gather is simpler and overlaps nothing away.
GATHERED_BYTES = 1 << 30

__all__ = [
    "STRATEGIES",
    "AllGather",
    "AllReduce",
    "Call",
    "Found",
    "Hybrid",
    "PassQ",
    "Ring",
    "Strategy",
    "Ulysses",
    "as_strategy",
    "choose",
    "lower_bound_bytes",
]


def as_strategy(strategy: str | Strategy) -> Strategy | None:
    """The strategy itself, or a new one of that name; None for "auto", which `choose` decides per call."""
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        return None
    if strategy not in STRATEGIES:
        raise Unsupported(f"strategy must be auto, {', '.join(sorted(STRATEGIES))}: got {strategy!r}.")
    return STRATEGIES[strategy]()


def choose(call: Call) -> Strategy:
    """A simple rule: replicated queries go to the keys; otherwise gather keys while they fit, else a ring."""
    if call.q_replicated:
        return AllReduce()
    gathered = call.keys.length * call.k.element_size() * call.k.shape[0] * call.k.shape[1]
    gathered *= call.k.shape[3] + call.v.shape[3]
    return AllGather() if gathered <= GATHERED_BYTES else Ring()
