"""A KV cache sharded over the ranks by position: who holds what, the storage of it, and attention over it."""

from .cache import KVCache

__all__ = ["KVCache"]
