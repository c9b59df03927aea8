"""Functions that run as they are under torch.compile: the graph of a compiled caller breaks around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., object])

_SKIP = eval_frame._FrameAction.SKIP


def outside_graphs(function: F) -> F:
    """Keep torch.compile out of a function in which ranks meet, and out of all that it calls.

    This is `torch.compiler.disable(function)`, without a wrapper around each call and without importing the
    compiler, which takes a second at `import shardsum`.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "ranks meet in it"  # type: ignore[attr-defined]
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP))
    return function
