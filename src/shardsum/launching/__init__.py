"""Starting ranks on this machine: as threads, as processes, or under mpiexec."""

from .launch import launch

__all__ = ["launch"]
