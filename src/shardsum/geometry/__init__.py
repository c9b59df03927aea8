"""From a Problem, without tensors of a call: who sees what, what has to travel, and by which way round a ring."""

from .nodes import Nodes, key_nodes, row_nodes, state_nodes
from .routes import DOWN, UP, Route, key_route, row_route
from .visible import (
    Ranges,
    intervals,
    keys_seen,
    local_intervals,
    localized,
    rows_seeing,
    seen,
    seen_counts,
    sent_counts,
)

__all__ = [
    "DOWN",
    "UP",
    "Nodes",
    "Ranges",
    "Route",
    "intervals",
    "key_nodes",
    "key_route",
    "keys_seen",
    "local_intervals",
    "localized",
    "row_nodes",
    "row_route",
    "rows_seeing",
    "seen",
    "seen_counts",
    "sent_counts",
    "state_nodes",
]
