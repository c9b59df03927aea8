"""A strategy under observation: what it declares to send beside what its communicator counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..collectives import Collective
from ..comm import Traffic
from ..kernels import Gradients, OutputGradient
from ..problem import Problem
from ..state import AttentionState
from .base import AUTO, Strategy
from .call import Call

Result = TypeVar("Result", AttentionState, Gradients)
# Told after each direction: the call, its name, and what was declared and counted.
Note = Callable[[Call, str, Traffic, Traffic], None]


class Observed(Strategy):
    """Another strategy, which does the work and is asked for everything; `note` is told of each direction."""

    def __init__(self, strategy: Strategy, note: Note) -> None:
        self._strategy, self._note = strategy, note
        self.name, self.rows_stay, self.keys_stay = strategy.name, strategy.rows_stay, strategy.keys_stay

    def forward(self, call: Call) -> AttentionState:
        declared = self.traffic(call.problem, call.comm.rank, call.collective)
        return self._noted(call, "forward", declared, lambda: self._strategy.forward(call))

    def backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        declared = self.traffic_backward(call.problem, call.comm.rank, call.collective)
        return self._noted(call, "backward", declared, lambda: self._strategy.backward(call, gradient))

    def why_not(self, problem: Problem) -> str | None:
        return self._strategy.why_not(problem)

    def traffic(self, problem: Problem, rank: int, collective: Collective = AUTO) -> Traffic:
        return self._strategy.traffic(problem, rank, collective)

    def traffic_backward(self, problem: Problem, rank: int, collective: Collective = AUTO) -> Traffic:
        return self._strategy.traffic_backward(problem, rank, collective)

    def memory_bytes(self, problem: Problem, rank: int) -> int:
        return self._strategy.memory_bytes(problem, rank)

    def _noted(self, call: Call, direction: str, declared: Traffic, work: Callable[[], Result]) -> Result:
        before = call.comm.traffic.snapshot()
        result = work()
        self._note(call, direction, declared, call.comm.traffic - before)
        return result
