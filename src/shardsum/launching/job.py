"""What a rank in another process has to know: a function by name, where modules lie, its share of the cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from ..comm.connect import MAIN


def threads_per_rank(ranks: int) -> int:
    """This process's cores, divided among the ranks."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def describe_job(fn: Callable[..., Any], ranks: int, transport: str, deadline: float) -> dict[str, Any]:
    """The job as JSON values. Raises: TypeError for a function that another process can't find."""
    name, module = getattr(fn, "__qualname__", None), getattr(fn, "__module__", None)
    found: Any = sys.modules.get(module or "")
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    if name is None or found != fn:
        raise TypeError(
            f"{name or fn!r} can't be found by name in another process: pass a function defined at the top level "
            "of a module or script, or use transport='threads'."
        )
    file = None
    if module in ("__main__", MAIN):  # the latter where a rank launches ranks
        main = sys.modules[module]
        module = main.__spec__.name if main.__spec__ is not None and module != MAIN else None
        file = getattr(main, "__file__", None)
        if module is None and file is None:
            raise TypeError(f"{name} was defined in no file (an interactive session?): use transport='threads'.")
    cores, share = sorted(os.sched_getaffinity(0)), threads_per_rank(ranks)
    pinned = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)] if ranks <= len(cores) else None
    return {
        "module": module,
        "file": file and os.path.abspath(file),
        "name": name,
        "argv": sys.argv,
        "path": [os.path.abspath(entry) for entry in sys.path],
        "transport": transport,
        "size": ranks,
        "deadline": deadline,
        "threads_per_rank": share,
        "cores": pinned,
    }
