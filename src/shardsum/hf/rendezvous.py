"""Functions in threads of their own that meet in each attention call, where all are answered together."""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from .bound_model import AttentionCall

Attend = Callable[[AttentionCall], Tensor]


class _Ended(BaseException):
    """Ends a function that waits for others which won't come; no `except Exception` of a model's keeps it."""


class Rendezvous:
    """Functions that run side by side, on one thread each, and wait for each other in `attend`.

    As many compute at a time as the caller has threads.
    """

    def __init__(self) -> None:
        self._at_once = torch.get_num_threads()
        self._turn = threading.Semaphore(self._at_once)
        self._arrivals: SimpleQueue[tuple[int, object]] = SimpleQueue()
        self._answers: list[SimpleQueue[Tensor | None]] = []

    def run(
        self,
        threads: ThreadPoolExecutor,
        functions: Sequence[Callable[[Attend], Tensor]],
        answer: Callable[[list[AttentionCall]], Sequence[Tensor]],
    ) -> list[Tensor]:
        """Return what the functions do. Each gets `attend`; when all have called it, `answer` answers them all.

        Raises: what the first of the functions, or `answer`, raises; the others are ended.
        """
        self._answers = [SimpleQueue() for _ in functions]
        running = [
            threads.submit(contextvars.copy_context().run, self._run_one, number, function)
            for number, function in enumerate(functions)
        ]
        try:
            while True:
                arrivals = self._wait_for_all()
                if all(isinstance(result, Tensor) for result in arrivals):
                    return arrivals
                _check_layer(arrivals)
                for answers, out in zip(self._answers, answer(arrivals), strict=True):
                    answers.put(out)
        finally:
            for answers in self._answers:
                answers.put(None)
            concurrent.futures.wait(running)
            torch.set_num_threads(self._at_once)  # a thread that starts later takes the number that was set last

    def _wait_for_all(self) -> list[Any]:
        """Return each function's next call or its result. Raises: the exception of the first that has one."""
        arrivals = dict(self._arrivals.get() for _ in self._answers)
        ordered = [arrivals[number] for number in range(len(arrivals))]
        for arrival in ordered:
            if isinstance(arrival, BaseException):
                raise arrival
        return ordered

    def _run_one(self, number: int, function: Callable[[Attend], Tensor]) -> None:
        torch.get_num_threads()  # a thread's first call about threads gives it the number that was set last
        torch.set_num_threads(1)  # of this thread alone
        with self._turn:
            try:
                result: object = function(functools.partial(self._attend, number))
            except BaseException as error:  # noqa: BLE001 (raised again where all were started)
                result = error
        self._arrivals.put((number, result))

    def _attend(self, number: int, call: AttentionCall) -> Tensor:
        self._turn.release()
        try:
            self._arrivals.put((number, call))
            answer = self._answers[number].get()
        finally:
            self._turn.acquire()
        if answer is None:
            raise _Ended
        return answer


def _check_layer(arrivals: Sequence[object]) -> None:
    """Raises: Unsupported where functions call the attention of different layers, or only some have ended."""
    if len({getattr(arrival, "module", None) for arrival in arrivals}) > 1:
        raise Unsupported("reproducible: the model attends in other layers for some tokens than for others.")
