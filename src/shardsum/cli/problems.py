"""The problems that `verify` puts to every strategy, and random tensors of their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import Arguments
from ..comm import Communicator
from ..layouts import Layout, as_layout
from ..placement import Placement
from ..problem import Problem, Sizes
from ..tree import unit


def make_problem(comm: Communicator, sizes: Sizes, layout: str | Layout, **options: Any) -> Problem:
    """The problem that a call of `attention` with these options is, of the sizes of all ranks together."""
    arguments, size = Arguments(**options), comm.size
    place, together = as_layout(layout), unit(arguments.reproducible)
    if arguments.q_replicated:
        queries = Placement.replicated([sizes.q_len] * size)
    else:
        queries = place.placement(sizes.q_len, size, together)
    return Problem(
        batch=sizes.batch,
        q_heads=sizes.q_heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        v_dim=sizes.v_dim,
        dtype=sizes.dtype,
        mask=arguments.mask(sizes.q_len, sizes.kv_len, sizes.batch, None),
        queries=queries,
        keys=place.placement(sizes.kv_len, size, together),
        q_replicated=arguments.q_replicated,
        reproducible=arguments.reproducible,
        device=comm.device.type,
    )


def draw_tensors(sizes: Sizes, device: torch.device) -> list[Tensor]:
    """The q, k, v and gradient of the output of all ranks together, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    rows, keys = (sizes.batch, sizes.q_heads, sizes.q_len), (sizes.batch, sizes.kv_heads, sizes.kv_len)
    shapes = [(*rows, sizes.head_dim), (*keys, sizes.head_dim), (*keys, sizes.v_dim), (*rows, sizes.v_dim)]
    return [torch.randn(shape, generator=generator, dtype=sizes.dtype).to(device) for shape in shapes]
