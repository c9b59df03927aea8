"""Exact attention over keys and values that live on many machines, as one weighted sum."""

from .attention import attention
from .comm import Communicator, connect
from .context_parallel import context_parallel
from .errors import Mismatch, NonFiniteWarning, RankLost, Unsupported
from .kv import KVCache
from .launching import launch
from .layouts import Layout
from .paged import decode_paged
from .sharding import global_value, shard, unshard, weighted_sum
from .state import AttentionState, merge

__version__ = "0.1.0"

__all__ = [
    "AttentionState",
    "Communicator",
    "KVCache",
    "Layout",
    "Mismatch",
    "NonFiniteWarning",
    "RankLost",
    "Unsupported",
    "attention",
    "connect",
    "context_parallel",
    "decode_paged",
    "global_value",
    "launch",
    "merge",
    "shard",
    "unshard",
    "weighted_sum",
]
