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

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from ..errors import Unsupported
from ..extension import native_module
from ..problem import Sizes, state_dtype
from .compiled import SEGMENT_STEP, Options, call, few_rows, why_not_native

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, float scale, float? softcap=None, "
    "Tensor? alibi_slopes=None, float dropout_p=0.0, int seed=0, int head=0, Tensor? rows=None, "
    "Tensor? keys=None, Tensor? own=None, str? instruction_set=None, int segment=0"
)


def dense_forward(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """`attention_forward` without gradients, and without torch's dispatcher, which takes 11 us a call."""
    given = Options(*options)
    problem = _check(q, k, v, lo, hi, given)
    name = "tree" if given.segment else "decode" if few_rows(q, problem.kv_heads) else "prefill"
    return _state(name, problem, q, k, v, lo, hi, given)


def quantized_forward(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], lo: Tensor, hi: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """`attention_forward` of few float32 rows over int8 k and v, `scales` (batch, kv_heads, kv_len) of each."""
    given = Options(*options)
    problem = _check(q, k, v, lo, hi, given, quantized=True)
    return _state("decode", problem, q, k, v, lo, hi, given, scales=scales)


def paged_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lo: Tensor, hi: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """`attention_forward` over k and v in pages that `table` names; `shardsum.decode_paged` has checked them."""
    _check_device(q, v)
    batch, q_heads, q_len, head_dim = q.shape
    kv_len = table.shape[1] * k.shape[2]
    problem = Sizes(batch, q_heads, k.shape[1], q_len, kv_len, head_dim, v.shape[3], q.dtype)
    table = table.to(torch.int64)
    return _state("decode", problem, q, k, v, lo, hi, Options(*options), table=table)


def _state(
    name: str,
    problem: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    given: Options,
    **storage: Any,
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_state(q, problem)
    if not (out.numel() and problem.kv_len):
        return out.zero_(), lse.fill_(-math.inf)
    told, kept_alive = call(problem, q, k, v, lo, hi, given, **storage)
    getattr(native_module(), name)(*told, out.data_ptr(), lse.data_ptr())
    del kept_alive
    return out, lse


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return _empty_state(q, _check(q, k, v, lo, hi, Options(*options)))


def _empty_state(q: Tensor, problem: Sizes) -> tuple[Tensor, Tensor]:
    dtype, shape = state_dtype(q.dtype), (problem.batch, problem.q_heads, problem.q_len)
    return q.new_empty((*shape, problem.v_dim), dtype=dtype), q.new_empty(shape, dtype=dtype)


def _backward(
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    given = Options(*options)
    problem = _check(q, k, v, lo, hi, given)
    _check_gradient(d_out, lse, delta, q, problem)
    found = tuple(x.new_zeros(x.shape, dtype=state_dtype(x.dtype)) for x in (q, k, v))
    if d_out.numel() and problem.kv_len:
        gradient = [x.contiguous() for x in (d_out, lse, delta)]
        told, kept_alive = call(problem, q, k, v, lo, hi, given)
        addresses = (tuple(x.data_ptr() for x in tensors) for tensors in (gradient, found))
        native_module().backward(*told, *addresses)
        del kept_alive
    return found


def _backward_shapes(
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    problem = _check(q, k, v, lo, hi, Options(*options))
    _check_gradient(d_out, lse, delta, q, problem)
    return tuple(x.new_empty(x.shape, dtype=state_dtype(x.dtype)) for x in (q, k, v))


def _check(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, given: Options, *, quantized: bool = False
) -> Sizes:
    """The sizes, once everything is what the C++ takes it to be."""
    problem = Sizes.of(q, k, v, quantized=quantized)
    _check_device(q, v)
    batch, q_len, whole = problem.batch, problem.q_len, torch.int64
    of_rows = ((1, q_len), (batch, q_len))
    _check_tensor("lo", lo, q, whole, *of_rows)
    _check_tensor("hi", hi, q, whole, *of_rows)
    if given.rows is not None:
        _check_tensor("rows", given.rows, q, whole, (q_len,))
    if given.keys is not None:
        _check_tensor("keys", given.keys, q, whole, (problem.kv_len,))
    if given.own is not None:
        _check_tensor("own", given.own, q, whole, *of_rows)
    if given.alibi_slopes is not None:
        dtype = torch.float64 if given.alibi_slopes.dtype == torch.float64 else torch.float32
        _check_tensor("alibi_slopes", given.alibi_slopes, q, dtype, (problem.q_heads,))
        if given.own is None or given.keys is None:
            raise ValueError("alibi_slopes need own and keys, the positions that distances are between.")
    if given.softcap is not None and not given.softcap > 0.0:
        raise ValueError(f"softcap must be above 0, or None: got {given.softcap}.")
    if not 0.0 <= given.dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1: got {given.dropout_p}.")
    if given.dropout_p and (given.rows is None or given.keys is None):
        raise ValueError("dropout needs rows and keys, the indices whose hash decides.")
    if given.segment < 0 or given.segment % SEGMENT_STEP:
        raise ValueError(f"segment must be 0 or a multiple of {SEGMENT_STEP} keys: got {given.segment}.")
    return problem


def _check_device(q: Tensor, v: Tensor) -> None:
    wrong = why_not_native(q.device, (q.shape[3], v.shape[3]))
    if wrong is not None:
        raise Unsupported(f"{wrong} Use kernel='aten'.")


def _check_gradient(d_out: Tensor, lse: Tensor, delta: Tensor, q: Tensor, problem: Sizes) -> None:
    dtype, shape = state_dtype(q.dtype), tuple(q.shape[:3])
    _check_tensor("d_out", d_out, q, dtype, (*shape, problem.v_dim))
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
    if inputs[-1]:
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
    "attention_forward", _ARGUMENTS, "Tensor out, Tensor lse", dense_forward, _forward_shapes, _gradients, _keep
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
