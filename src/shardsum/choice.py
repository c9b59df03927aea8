"""What "auto" is: one decision for a call, made from its Problem before anything depends on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .collectives import Collective, as_collective
from .errors import Unsupported
from .kernels import Kernel, as_kernel
from .problem import Problem
from .strategies import STRATEGIES, Strategy, as_strategy


@dataclass(frozen=True, eq=False)
class Choice:
    """How a problem is computed, the same on all ranks: by which strategy, collective and kernel, and why."""

    strategy: Strategy
    collective: Collective
    kernel: Kernel
    why: str


def choose(
    problem: Problem,
    strategy: str | Strategy = "auto",
    collective: str | Collective = "auto",
    kernel: str | Kernel = "auto",
) -> Choice:
    """The choice for a problem; what is asked for by name, or as an instance, is taken.

    Raises: Unsupported, alike on every rank, where the strategy asked for can't do the problem.
    """
    asked = as_strategy(strategy)
    if asked is None:
        chosen, why = _suitable(problem)
    else:
        chosen, why = asked, "it was asked for"
        reason = asked.why_not(problem)
        if reason is not None:
            others = [name for name, kind in STRATEGIES.items() if kind().why_not(problem) is None]
            raise Unsupported(f"{reason} Use {', '.join(others[:-1])} or {others[-1]}.")
    made = as_kernel(kernel, torch.device(problem.device), (problem.head_dim, problem.v_dim))
    return Choice(chosen, as_collective(collective), made, why)


def _suitable(problem: Problem) -> tuple[Strategy, str]:
    """The first strategy of the registry that suits the problem, and why it does."""
    for kind in STRATEGIES.values():
        strategy = kind()
        why = strategy.suits(problem)
        if why is not None and strategy.why_not(problem) is None:
            return strategy, why
    raise AssertionError("the registry has strategies that suit every problem")
