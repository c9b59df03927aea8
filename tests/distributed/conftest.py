"""Nothing is unpickled while these tests run."""

from ..unpickling import nothing_is_unpickled

__all__ = ["nothing_is_unpickled"]
