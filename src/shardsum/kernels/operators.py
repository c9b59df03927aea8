"""The native kernels as operators of torch, which torch.compile, its shape checks and autograd know.

    torch.ops.shardsum.attention_forward(q, k, v, lo, hi, scale, ...) -> (out, lse)
    torch.ops.shardsum.attention_backward(d_out, lse, delta, q, k, v, lo, hi, scale, ...) -> (d_q, d_k, d_v)

They are `Kernel.forward` and `Kernel.backward` of base.py for CPU tensors. For `...` stand the fields of `Scores`
but its bias, and an instruction set, by default the best that runs here: softcap=None, alibi_slopes=None,
dropout_p=0.0, seed=0, head=0, rows=None, keys=None, own=None, instruction_set=None, segment=0. With a multiple of
256 for `segment`, the forward sums keys by segments of so many, from key 0 on, and merges the segments' states
along the one binary tree over their numbers: a row's bits depend on itself and the keys it sees alone. The
backward does so too, d_k and d_v over segments of rows.

Shapes: q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len,
v_dim), of any strides; lo, hi and own (batch or 1, q_len), rows (q_len,), keys (kv_len,), int64; alibi_slopes
(q_heads,), float32 or float64; out and d_out (batch, q_heads, q_len, v_dim), lse and delta (batch, q_heads,
q_len).
Numerics: out, lse, delta and all gradients are float32, or float64 for float64 inputs; autograd rounds to the
dtypes of q, k and v. Ends beyond 0 and kv_len mean these: no other key is read.
Gradients: of q, k and v, once, from those of out and lse.
Raises: ValueError for what does not fit together, Unsupported for what only other kernels take.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from ..blocks import Dense
from ..errors import Unsupported
from ..masks import Bounds
from ..problem import Sizes, state_dtype
from ..scores import Scores
from .base import OutputGradient
from .compiled import SEGMENT_STEP, Operation, backward, check_device, empty_state, forward

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, float scale, float? softcap=None, "
    "Tensor? alibi_slopes=None, float dropout_p=0.0, int seed=0, int head=0, Tensor? rows=None, "
    "Tensor? keys=None, Tensor? own=None, str? instruction_set=None, int segment=0"
)


class _Arguments(NamedTuple):
    """What torch calls both operators with, in this order."""

    q: Tensor
    k: Tensor
    v: Tensor
    lo: Tensor
    hi: Tensor
    scale: float
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    head: int = 0
    rows: Tensor | None = None
    keys: Tensor | None = None
    own: Tensor | None = None
    instruction_set: str | None = None
    segment: int = 0

    @property
    def block(self) -> Dense:
        return Dense(self.k, self.v)

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.lo, self.hi)

    @property
    def operation(self) -> Operation:
        return Operation(self.instruction_set, self.segment)

    def scores(self) -> Scores:
        return Scores(
            self.scale,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            dropout_p=self.dropout_p,
            seed=self.seed,
            head=self.head,
            rows=self.rows,
            keys=self.keys,
            diagonal=self.own,
        )


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Arguments(*arguments)
    _, scores = _check(given)
    return forward(given.q, given.block, given.bounds, scores, given.operation)


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Arguments(*arguments)
    sizes, _ = _check(given)
    return empty_state(given.q, sizes.v_dim)


def _backward(d_out: Tensor, lse: Tensor, delta: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _Arguments(*arguments)
    sizes, scores = _check(given)
    _check_gradient(d_out, lse, delta, given.q, sizes)
    gradient = OutputGradient(d_out, lse, delta)
    d = backward(given.q, given.block, given.bounds, scores, gradient, given.operation)
    return d.q, d.k, d.v


def _backward_shapes(d_out: Tensor, lse: Tensor, delta: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    given = _Arguments(*arguments)
    sizes, _ = _check(given)
    _check_gradient(d_out, lse, delta, given.q, sizes)
    return tuple(x.new_empty(x.shape, dtype=state_dtype(x.dtype)) for x in (given.q, given.k, given.v))


def _check(given: _Arguments) -> tuple[Sizes, Scores]:
    """Return the sizes and scores, once everything is what the C++ takes it to be."""
    q = given.q
    sizes = Sizes.of(q, given.k, given.v)
    check_device(q, (sizes.head_dim, sizes.v_dim))
    batch, q_len, whole = sizes.batch, sizes.q_len, torch.int64
    of_rows = ((1, q_len), (batch, q_len))
    _check_tensor("lo", given.lo, q, whole, *of_rows)
    _check_tensor("hi", given.hi, q, whole, *of_rows)
    if given.rows is not None:
        _check_tensor("rows", given.rows, q, whole, (q_len,))
    if given.keys is not None:
        _check_tensor("keys", given.keys, q, whole, (sizes.kv_len,))
    if given.own is not None:
        _check_tensor("own", given.own, q, whole, *of_rows)
    if given.alibi_slopes is not None:
        dtype = torch.float64 if given.alibi_slopes.dtype == torch.float64 else torch.float32
        _check_tensor("alibi_slopes", given.alibi_slopes, q, dtype, (sizes.q_heads,))
        if given.own is None or given.keys is None:
            raise ValueError("alibi_slopes need own and keys, the positions that distances are between.")
    scores = given.scores()
    if scores.dropout_p and (given.rows is None or given.keys is None):
        raise ValueError("dropout needs rows and keys, the indices whose hash decides.")
    if given.segment < 0 or given.segment % SEGMENT_STEP:
        raise ValueError(f"segment must be 0 or a multiple of {SEGMENT_STEP} keys: got {given.segment}.")
    return sizes, scores


def _check_gradient(d_out: Tensor, lse: Tensor, delta: Tensor, q: Tensor, sizes: Sizes) -> None:
    dtype, shape = state_dtype(q.dtype), tuple(q.shape[:3])
    _check_tensor("d_out", d_out, q, dtype, (*shape, sizes.v_dim))
    _check_tensor("lse", lse, q, dtype, shape)
    _check_tensor("delta", delta, q, dtype, shape)


def _check_tensor(name: str, x: Tensor, q: Tensor, dtype: torch.dtype, *shapes: tuple[Any, ...]) -> None:
    # A size is an int, or a symbol while torch traces shapes.
    if x.dtype != dtype or x.device != q.device or x.shape not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{name} must be {dtype} {expected} on {q.device}: got {x.dtype} {tuple(x.shape)} on {x.device}."
        )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*output, *tensors)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    inputs = [other if x is None else x for x, other in zip(tensors, ctx.others, strict=True)]
    if _Arguments(*inputs).segment:
        raise Unsupported("attention_forward along the tree of segments has no gradient. Use segment=0.")
    delta = (d_out * out).sum(dim=-1) - d_lse
    found = attention_backward(d_out, lse, delta, *inputs)
    return *(d_x.to(x.dtype) for d_x, x in zip(found, inputs, strict=False)), *[None] * (len(inputs) - 3)


def _no_gradients(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise Unsupported("the native kernels have first derivatives only. Use ATen operations for further ones.")


_LIBRARY = Library("shardsum", "DEF")  # as long as it lives, torch knows the operators


def _register(name: str, arguments: str, results: str, run: Any, shapes: Any, gradients: Any, keep: Any) -> Any:
    """The operator; it runs whatever the device, to say itself which ones it takes."""
    _LIBRARY.define(f"{name}({arguments}) -> ({results})", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    register_fake(f"shardsum::{name}", shapes, lib=_LIBRARY)
    register_autograd(f"shardsum::{name}", gradients, setup_context=keep, lib=_LIBRARY)
    return getattr(torch.ops.shardsum, name).default


attention_forward = _register(
    "attention_forward", _ARGUMENTS, "Tensor out, Tensor lse", _forward, _forward_shapes, _gradients, _keep
)
attention_backward = _register(
    "attention_backward",
    f"Tensor d_out, Tensor lse, Tensor delta, {_ARGUMENTS}",
    "Tensor d_q, Tensor d_k, Tensor d_v",
    _backward,
    _backward_shapes,
    _no_gradients,
    None,
)
