"""Cutting a tensor over the ranks and putting it together again, and the plain weighted sum over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .collectives import MAXIMUM, Collective, as_collective, reduce_over_ranks
from .comm import Communicator, agree_on, as_communicator
from .compiler import outside_graphs
from .layouts import Layout, as_layout
from .placement import Placement
from .problem import state_dtype
from .scalars import one_of, whole
from .tensors import check_tensors, no_gradient
from .tree import unit


@outside_graphs
def shard(
    x: Tensor,
    *,
    comm: Communicator | Any = None,
    dim: int = 2,
    layout: str | Layout = "contiguous",
    reproducible: bool = False,
) -> Tensor:
    """This rank's part of `x`, which is whole on every rank: the positions of `dim` that the layout gives it.

    `reproducible`: in whole segments of 256 positions, as `attention(..., reproducible=True)` needs them.

    Gradients: x receives its whole gradient on every rank: the backward pass is `unshard`.

    >>> shard(torch.arange(4), dim=0, layout="zigzag")
    tensor([0, 1, 2, 3])
    """
    comm = as_communicator(comm)
    _check_dim(x, dim)
    part: Tensor = _Shard.apply(x, comm, dim, as_layout(layout), unit(reproducible) > 1)  # type: ignore[no-untyped-call]
    return part


@outside_graphs
def unshard(
    x: Tensor,
    *,
    comm: Communicator | Any = None,
    dim: int = 2,
    layout: str | Layout = "contiguous",
    reproducible: bool = False,
) -> Tensor:
    """The whole of which every rank passes its part, on every rank: the inverse of `shard`, with its arguments.

    Gradients: the result is the same on every rank and counts once: the backward pass is `shard`.
    Traffic: each rank sends its part to every other.
    Raises: ValueError where the parts are not cut as the layout cuts; Mismatch where the ranks' calls differ.

    >>> unshard(torch.arange(4), dim=0, layout="zigzag")
    tensor([0, 1, 2, 3])
    """
    comm = as_communicator(comm)

    def describe() -> dict[str, Any]:
        _check_dim(x, dim)
        others = [size for axis, size in enumerate(x.shape) if axis != dim % x.ndim]
        names = as_layout(layout).describe()
        return {
            "call": "unshard",
            "dim": dim % x.ndim,
            "layout": names,
            "reproducible": unit(reproducible) > 1,
            "dtype": str(x.dtype),
            "sizes": others,
        }

    lengths = [length for length, _ in agree_on(comm, describe, x, x, dim)]
    placement = as_layout(layout).of_lengths(lengths, "positions", unit(reproducible))
    whole: Tensor = _Unshard.apply(x, comm, dim, placement)  # type: ignore[no-untyped-call]
    return whole


@outside_graphs
def weighted_sum(
    weights: Float[Tensor, "*rows keys"],
    values: Float[Tensor, "*batch keys v_dim"],
    *,
    comm: Communicator | Any = None,
    collective: str | Collective = "auto",
) -> Tensor:
    """`weights @ values` over the keys of all ranks, for weights that are already normalised, on every rank.

    Shapes: weights (..., keys), values (..., keys, v_dim); the keys are this rank's, any number of them.
    Numerics: partial sums are float32 or wider, and every rank has the same bits. A weight of exactly 0
    contributes nothing, whatever its value holds.
    Traffic: after the agreement, what the collective declares for the partial sum.
    Raises: ValueError for shapes that do not fit; Mismatch where the ranks' calls differ.

    >>> weighted_sum(torch.tensor([0.25, 0.75]), torch.tensor([[4.0], [8.0]]))
    tensor([7.])
    """
    comm = as_communicator(comm)

    def describe() -> dict[str, Any]:
        check_weighted(weights, values)
        sizes = [list(weights.shape[:-1]), [*values.shape[:-2], values.shape[-1]]]
        name = as_collective(collective).name
        return {"call": "weighted_sum", "dtype": str(values.dtype), "sizes": sizes, "collective": name}

    agree_on(comm, describe, weights, values, -1)
    dtype = state_dtype(values.dtype)
    partial = _sum_of_weighted(weights.to(dtype), values.to(dtype))
    total = sum_over_ranks(partial, comm, as_collective(collective))
    return total.to(values.dtype)


@outside_graphs
def global_value(
    values: Tensor,
    kind: str,
    *,
    comm: Communicator | Any = None,
    collective: str | Collective = "auto",
) -> Tensor:
    """The "sum", "mean", "max" or "count" of the elements that all ranks hold, as one number, on every rank.

    Shapes: `values` any, and another on every rank; no elements at all give 0, NaN, -inf and 0.
    Numerics: in float64, then in the values' dtype (float32 or wider); a count is int64. Bit-equal on every rank.
    Gradients: of sum and mean; the result is the same on every rank and counts once.
    Raises: ValueError for another kind or values that are not floats; Mismatch where the ranks' calls differ.

    >>> global_value(torch.tensor([1.0, 2.0, 6.0]), "mean")
    tensor(3.)
    """
    comm = as_communicator(comm)

    def describe() -> dict[str, Any]:
        one_of("kind", kind, ("sum", "mean", "max", "count"))
        check_tensors(values=values)
        if not values.is_floating_point():
            raise ValueError(f"values must be floats: got {values.dtype}.")
        if kind == "max":
            no_gradient("values", values, "Only sum and mean have gradients: pass values.detach().")
        return {"call": kind, "dtype": str(values.dtype), "collective": as_collective(collective).name}

    counts = [count for count, _ in agree_on(comm, describe, values, values, None)]
    if kind == "count":
        return torch.tensor(sum(counts), device=values.device)
    flat, by = values.reshape(-1), as_collective(collective)
    if kind == "max":
        flat = torch.cat([flat.detach().double(), flat.new_tensor([-torch.inf], dtype=torch.float64)])
        return reduce_over_ranks(comm, flat.amax(), by, MAXIMUM).to(state_dtype(values.dtype))
    total = sum_over_ranks(flat.sum(dtype=torch.float64), comm, by)
    return (total / sum(counts) if kind == "mean" else total).to(state_dtype(values.dtype))


def sum_over_ranks(part: Tensor, comm: Communicator, collective: Collective) -> Tensor:
    """The sum of every rank's part; differentiable: it is the same on every rank and counts once."""
    total: Tensor = _SumOverRanks.apply(part, comm, collective)  # type: ignore[no-untyped-call]
    return total


def _check_dim(x: Tensor, dim: int) -> None:
    check_tensors(x=x)
    if whole("dim", dim) not in range(-x.ndim, x.ndim):
        raise ValueError(f"dim must be one of those of a tensor: got dim {dim} of {tuple(x.shape)}.")


def check_weighted(weights: Tensor, values: Tensor) -> None:
    """Raise ValueError unless these are weights and values of one weighted sum."""
    check_tensors(weights=weights, values=values)
    shapes = f"got {tuple(weights.shape)} and {tuple(values.shape)}."
    if weights.ndim < 1 or values.ndim < 2 or weights.shape[-1] != values.shape[-2]:
        raise ValueError(
            f"weights (..., keys) and values (..., keys, v_dim) must have the same number of keys: {shapes}"
        )
    try:
        # torch's own imports 500 modules at its first call, on every rank: seconds.
        np.broadcast_shapes(weights.shape[:-2], values.shape[:-2])
    except ValueError:
        raise ValueError(
            f"the dims of weights and values before the last two must fit each other: {shapes}"
        ) from None
    if not weights.is_floating_point() or weights.dtype != values.dtype:
        raise ValueError(
            f"weights and values must have one floating dtype: got {weights.dtype} and {values.dtype}."
        )


def _sum_of_weighted(weights: Tensor, values: Tensor) -> Tensor:
    total = weights @ values
    if bool(total.sum(dtype=torch.float64).isfinite()):
        return total
    # 0 * NaN is NaN, but a weight of 0 has no say: products with what is not finite are written out.
    finite = values.isfinite()
    total = weights @ values.masked_fill(~finite, 0.0)
    for key in (~finite).any(dim=-1).reshape(-1, values.shape[-2]).any(dim=0).nonzero().flatten().tolist():
        weight = weights[..., key].unsqueeze(-1)
        value = values[..., key, :].masked_fill(finite[..., key, :], 0.0)
        value = value.unsqueeze(-2) if weights.ndim > 1 else value
        total = total + torch.where((weight == 0.0) | (value == 0.0), 0.0, weight * value)
    return total


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int, layout: Layout, reproducible: bool) -> Tensor:
        ctx.options = {"comm": comm, "dim": dim, "layout": layout, "reproducible": reproducible}
        positions = layout.positions(x.shape[dim], comm.rank, comm.size, unit(reproducible))
        return x.index_select(dim, positions.to(x.device))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return unshard(gradient, **ctx.options), None, None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int, placement: Placement) -> Tensor:
        ctx.dim, ctx.own = dim, placement.positions(comm.rank)
        moved = x.movedim(dim, 0)
        shapes = [(length, *moved.shape[1:]) for length in placement.lengths]
        parts = comm.all_gather(moved.contiguous(), shapes)
        return torch.cat(parts).index_select(0, placement.order.to(x.device)).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.index_select(ctx.dim, ctx.own.to(gradient.device)), None, None, None


class _SumOverRanks(torch.autograd.Function):
    """The sum is the same on every rank and counts once, so each part receives its gradient as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, comm: Communicator, collective: Collective) -> Tensor:
        return reduce_over_ranks(comm, part, collective)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, None
