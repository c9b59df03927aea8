"""DTensors that are sharded along the sequence over the mesh that is `comm` are taken as their local parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SEQUENCE = 2  # which dim of q, k and v


def local_parts(comm: Any, *tensors: Any) -> tuple[tuple[Any, ...], Callable[[Tensor], Tensor]] | None:
    """The local parts of q, k and v, and what makes of this rank's output such a DTensor; differentiable.

    None where they are something else: what can't be computed with is refused later, by all ranks alike.
    """
    if not all(_lies_along_sequence(x, comm) for x in tensors):
        return None
    q, _, v = tensors
    whole = torch.empty(*q.shape[:3], v.shape[3], device="meta")

    def placed(out: Tensor) -> Tensor:
        lies = {"device_mesh": q.device_mesh, "placements": q.placements}
        made: Tensor = type(q).from_local(out, **lies, shape=whole.shape, stride=whole.stride())
        return made

    return tuple(x.to_local() for x in tensors), placed


def _lies_along_sequence(x: Any, comm: Any) -> bool:
    known = sys.modules.get("torch.distributed.tensor")  # who has not imported it has no DTensor
    if known is None or not isinstance(x, known.DTensor) or x.ndim != 4 or x.device_mesh.ndim != 1:
        return False
    over_comm = x.device_mesh == comm or x.device_mesh.get_group() is comm
    return over_comm and x.placements[0].is_shard(SEQUENCE)
