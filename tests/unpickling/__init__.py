"""A bomb in place of pickle's loaders while the distributed tests run, in the processes that they start too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .sitecustomize import BOMBS, armed, explode

FOLDER = str(Path(__file__).parent)


@pytest.fixture(scope="package", autouse=True)
def nothing_is_unpickled() -> Iterator[None]:
    """Here, and by PYTHONPATH (which `launch` makes of sys.path) in every Python that is started from here."""
    from multiprocessing.reduction import ForkingPickler

    from torch import _weights_only_unpickler
    from torch.distributed import distributed_c10d

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setenv("PYTHONPATH", FOLDER, prepend=os.pathsep)
        for (module, name), bomb in BOMBS.items():
            patch.setattr(module, name, bomb)
        # What these had taken from pickle before.
        patch.setattr(ForkingPickler, "loads", explode)
        patch.setattr(distributed_c10d, "_unpickler", explode)
        patch.setattr(_weights_only_unpickler, "Unpickler", armed(_weights_only_unpickler.Unpickler))
        yield
