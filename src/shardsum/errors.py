"""The exceptions of shardsum: what went wrong, and whose mistake it is."""

from __future__ import annotations


class Unsupported(ValueError):
    """The strategy, kernel or model can't do what was asked; the message says what can."""


class Mismatch(ValueError):
    """The ranks of one call asked for different things; every rank raises the same message."""


class RankLost(RuntimeError):
    """A peer is gone or did not answer before the deadline; the message names it where it is known."""


class NonFiniteWarning(RuntimeWarning):
    """A rank's own partial sum holds NaN or Inf; the message names the rank."""
