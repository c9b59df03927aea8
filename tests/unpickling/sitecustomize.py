"""Python's ways to unpickle, each made to raise, in every interpreter that has this folder on its path.

What imports pickle later, as torch.distributed, mpi4py, NumPy and multiprocessing do, takes these.
"""

from __future__ import annotations

import _pickle
import pickle
from typing import Any, NoReturn


class Unpickled(BaseException):
    """Not an Exception: nothing catches it by chance."""


def explode(*_: Any, **__: Any) -> NoReturn:
    raise Unpickled("something was unpickled")


def armed(unpickler: type) -> type:
    """A class, because others derive from it."""
    return type("Unpickler", (unpickler,), {"__init__": explode, "load": explode})


BOMBS: dict[tuple[Any, str], Any] = {
    **{(module, name): explode for module in (pickle, _pickle) for name in ("load", "loads")},
    **{(pickle, name): explode for name in ("_load", "_loads")},
    **{
        (module, name): armed(getattr(module, name))
        for module, name in ((pickle, "Unpickler"), (pickle, "_Unpickler"), (_pickle, "Unpickler"))
    },
}


def arm() -> None:
    for (module, name), bomb in BOMBS.items():
        setattr(module, name, bomb)


if __name__ == "sitecustomize":
    arm()
