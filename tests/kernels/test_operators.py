"""torch.ops.shardsum: torch's own checks, compiled as eager, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardsum.blocks import Dense, Int8, Paged
from shardsum.errors import Unsupported
from shardsum.extension import TYPES, native_module
from shardsum.kernels.compiled import LARGEST_DIM, describe
from shardsum.kernels.operators import attention_backward, attention_forward
from shardsum.masks import Bounds
from shardsum.quantized import Quantized
from shardsum.scores import Scores

from .. import dense
from ..tolerances import ROUNDED_WEIGHTS, STATE, assert_close
from .native import causal, normal, visible

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
OPTIONS = ["plain", "softcap", "alibi", "dropout"]


def problem(dtype: torch.dtype, option: str = "plain", q_len: int = 9) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, lo, hi with GQA and v_dim != head_dim, and the other arguments."""
    q, k = normal(0, 2, q_len, 6, 8, dtype=dtype).transpose(1, 2), normal(1, 2, 3, 21, 8, dtype=dtype)
    v, hi = normal(2, 2, 3, 21, 5, dtype=dtype), causal(q_len, 21)[1]
    rows, keys = torch.arange(q_len) + 2, torch.arange(21)
    given: dict[str, Any] = {
        "plain": {},
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": torch.rand(6) / 9, "keys": keys, "own": rows.unsqueeze(0) + 12},
        "dropout": {"dropout_p": 0.3, "seed": 5, "rows": rows, "keys": keys},
    }[option]
    return [q, k, v, (hi - 7).clamp(min=0), hi.expand(2, -1)], {"scale": 0.3, **given}


def expected(inputs: list[Tensor], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, v, lo, hi = inputs
    options: dict[str, Any] = {"softcap": given.get("softcap")}
    if "alibi_slopes" in given:
        options["alibi"] = given["alibi_slopes"], (given["own"].unsqueeze(-1) - given["keys"]).abs()
    if "dropout_p" in given:
        like = torch.zeros(2, 6, q.shape[2], k.shape[2], dtype=torch.float64)
        options["kept"] = Scores(**given).kept(like)
    return dense.attention(q, k, v, visible(lo, hi, k.shape[2]), given["scale"], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_torchs_own_checks(dtype: torch.dtype, option: str) -> None:
    (q, k, v, lo, hi), given = problem(dtype, option)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention_forward, (*leaves, lo, hi), given)
    out, lse = attention_forward(q, k, v, lo, hi, **given)
    torch.library.opcheck(attention_backward, (out.sin(), lse, lse * 0.1, q, k, v, lo, hi), given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients(dtype: torch.dtype, option: str, compiled: bool) -> None:
    inputs, given = problem(dtype, option, 1 if option == "plain" else 9)
    found = [x.detach().requires_grad_() for x in inputs[:3]]
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.shardsum.attention_forward(q, k, v, *inputs[3:], **given)
        return 2.0 * out, lse

    torch.compiler.reset()  # the limit on recompilations is that of one function
    run = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    out, lse = run(*found)
    whole, whole_lse = expected([*exact, *inputs[3:]], given)
    tolerance = STATE[dtype] if dtype != torch.bfloat16 else 3 * ROUNDED_WEIGHTS  # terms cancel
    assert_close(out.detach(), 2.0 * whole.detach(), tolerance, "out")
    assert_close(lse.detach(), whole_lse.detach(), STATE[dtype], "lse")
    d_out, d_lse = normal(3, *whole.shape), normal(4, *whole_lse.shape)
    mine = torch.autograd.grad((out, lse), found, (d_out.to(out), d_lse.to(lse)))
    theirs = torch.autograd.grad((2.0 * whole, whole_lse), exact, (d_out, d_lse))
    rounded = 1e-2 if dtype == torch.bfloat16 else 5 * STATE[dtype]  # to the inputs' 8 bits
    for what, one, other in zip("qkv", mine, theirs, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, rounded, f"d{what}")


def test_second_derivatives_are_refused() -> None:
    inputs, given = problem(torch.float64)
    q = inputs[0].detach().requires_grad_()
    out, _ = torch.ops.shardsum.attention_forward(q, *inputs[1:], **given)
    (d_q,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(Unsupported, match="first derivatives only"):
        d_q.sum().backward()


def test_ends_beyond_the_keys_mean_the_last_and_the_first_key() -> None:
    """Also where a read behind them would be of other memory."""
    for q_len in (1, 40):
        (q, k, v, _, _), given = problem(torch.float32, q_len=q_len)
        lo, hi = torch.full((1, q_len), -(1 << 40)), torch.full((1, q_len), 1 << 40)
        out, lse = attention_forward(q, k, v, lo, hi, **given)
        whole, whole_lse = attention_forward(q, k, v, lo * 0, hi * 0 + 21, **given)
        assert torch.equal(out, whole)
        assert torch.equal(lse, whole_lse)
        found = attention_backward(out, lse, lse, q, k, v, lo, hi, **given)
        for one, other in zip(
            found, attention_backward(out, lse, lse, q, k, v, lo * 0, hi * 0 + 21, **given), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("length", [1, 40])
def test_views_of_any_order_are_read_where_they_lie(heads_last: bool, length: int) -> None:
    shape = (2, length, 6, 16) if heads_last else (2, 6, length, 16)
    whole = torch.randn(*shape)[..., 3:11]
    q = k = v = whole.transpose(1, 2) if heads_last else whole
    bounds = torch.zeros(1, length).long()
    attention, _ = describe(q, Dense(k, v), Bounds(bounds, bounds + 1), Scores(1.0))
    assert attention.q == attention.k == attention.v == (q.data_ptr(), *q.stride()[:3])


def fields_of(attention: Any) -> dict[str, Any]:
    return {name: getattr(attention, name) for name in dir(attention) if not name.startswith("_")}


def place(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def test_every_field_arrives_under_its_name() -> None:
    """Each has a value that no other field of its type has, so that two swapped ones are seen."""
    q, rows, keys, diagonal = torch.zeros(2, 6, 5, 8), torch.arange(5), torch.arange(7), torch.zeros(2, 5).long()
    k, v = (Quantized(torch.zeros(2, 3, 7, dim, dtype=torch.int8), torch.zeros(2, 3, 7)) for dim in (8, 9))
    lo, hi, slopes = torch.zeros(1, 5).long(), torch.zeros(1, 5).long(), torch.zeros(6).double()
    scores = Scores(
        0.25,
        softcap=2.0,
        alibi_slopes=slopes,
        dropout_p=0.5,
        seed=-11,
        head=13,
        rows=rows,
        keys=keys,
        diagonal=diagonal,
    )
    attention, _ = describe(q, Int8(k, v), Bounds(lo, hi), scores, 256)
    expected = {
        "type": TYPES[torch.int8],
        "batch": 2, "q_heads": 6, "kv_heads": 3, "q_len": 5, "kv_len": 7, "head_dim": 8, "v_dim": 9,
        "q": place(q), "k": place(k.numbers), "v": place(v.numbers),
        "k_scales": place(k.scales), "v_scales": place(v.scales),
        "pages": 0, "pages_batch": 0, "page_len": 0,
        "lo": lo.data_ptr(), "hi": hi.data_ptr(), "bounds_batch": 0,
        "scale": 0.25, "softcap": 2.0, "alibi_slopes": slopes.data_ptr(),
        "dropout_p": 0.5, "seed": (1 << 64) - 11, "first_head": 13,
        "rows": rows.data_ptr(), "keys": keys.data_ptr(), "diagonal": diagonal.data_ptr(), "diagonal_batch": 5,
        "threads": torch.get_num_threads(), "segment": 256,
    }  # fmt: skip
    assert fields_of(attention) == expected


def test_pages_and_an_interval_of_each_sequence_arrive_under_their_names() -> None:
    q, k, v = torch.zeros(2, 6, 1, 8), torch.zeros(9, 3, 4, 8), torch.zeros(9, 3, 4, 5)
    table, bounds = torch.zeros(2, 3).long(), torch.zeros(2, 1).long()
    attention, _ = describe(q, Paged(k, v, table), Bounds(bounds, bounds), Scores(1.0))
    fields = fields_of(attention)
    assert fields["pages"] == table.data_ptr()
    assert [fields[name] for name in ("pages_batch", "page_len", "kv_len", "bounds_batch")] == [3, 4, 12, 1]
    assert [fields[name] for name in ("k", "v", "k_scales")] == [place(k), place(v), (0, 0, 0, 0)]


def a_value_of_its_own_for_each() -> dict[str, Any]:
    """Return a value of its own for every field, by its type in C++."""
    q = torch.zeros(1, 1, 1, 1)
    bounds = torch.zeros(1, 1).long()
    attention, _ = describe(q, Dense(q, q), Bounds(bounds, bounds), Scores(1.0))
    return {
        name: (n, n, n, n) if isinstance(value, tuple) else type(value)(n)
        for n, (name, value) in enumerate(fields_of(attention).items(), start=1)
    }


def test_a_field_left_out_or_unknown_is_refused() -> None:
    values = {name: value for name, value in a_value_of_its_own_for_each().items() if name != "type"}
    new = native_module().Attention
    assert fields_of(new(type=1, **values)) == {"type": 1, **values}
    for wrong in ({"batch": 1}, {"type": 1, **values, "own": 0}):
        with pytest.raises(TypeError):
            new(**wrong)
    with pytest.raises(TypeError):
        new(1, *values.values())


def test_on_meta_only_shapes_are_made() -> None:
    inputs, given = problem(torch.bfloat16)
    out, lse = attention_forward(*(x.to("meta") for x in inputs), **given)
    assert (out.shape, out.dtype, out.device.type) == ((2, 6, 9, 5), torch.float32, "meta")
    assert (lse.shape, lse.dtype) == ((2, 6, 9), torch.float32)


WRONG = {
    "q, k and v must have one dtype": {"k": torch.zeros(2, 3, 21, 8).half()},
    "k and v must have the same batch, heads and length": {"v": torch.zeros(2, 3, 20, 5)},
    "q and k must have the same batch and head_dim": {"q": torch.zeros(2, 6, 9, 7)},
    "kv_heads must divide q_heads": {"q": torch.zeros(2, 5, 9, 8)},
    "q must be .batch, heads, length, dim.": {"q": torch.zeros(6, 9, 8)},
    "v_dim must be at least 1": {"v": torch.zeros(2, 3, 21, 0)},
    f"v_dim up to {LARGEST_DIM}": {"v": torch.zeros(2, 3, 21, LARGEST_DIM + 1)},
    "lo must be torch.int64": {"lo": torch.zeros(1, 9).int()},
    "hi must be torch.int64 .1, 9. or .2, 9. on cpu: got torch.int64 .1, 8.": {"hi": torch.zeros(1, 8).long()},
    "lo must .* got torch.int64 .3, 9.": {"lo": torch.zeros(3, 9).long()},
    "rows must": {"rows": torch.arange(8)},
    "keys must": {"keys": torch.arange(20)},
    "own must": {"own": torch.arange(9)},
    "alibi_slopes must be torch.float32": {"alibi_slopes": torch.zeros(6).half()},
    "alibi_slopes must .* .5,": {"alibi_slopes": torch.zeros(5)},
    "alibi_slopes need own and keys": {"alibi_slopes": torch.zeros(6)},
    "dropout needs rows and keys": {"dropout_p": 0.1},
    "dropout_p must be at least 0 and below 1": {"dropout_p": 1.0},
    "softcap must be above 0": {"softcap": 0.0},
    "does not run on this machine": {"instruction_set": "mmx"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_read(message: str) -> None:
    inputs, given = problem(torch.float32)
    arguments = {**dict(zip(("q", "k", "v", "lo", "hi"), inputs, strict=True)), **given, **WRONG[message]}
    with pytest.raises(ValueError, match=message):
        attention_forward(**arguments)
    out, lse = torch.zeros(2, 6, 9, 5), torch.zeros(2, 6, 9)
    with pytest.raises(ValueError, match=message):
        attention_backward(out, lse, lse, **arguments)


@pytest.mark.parametrize("name", ["d_out", "lse", "delta"])
def test_gradients_that_do_not_fit_are_refused(name: str) -> None:
    inputs, given = problem(torch.float32)
    gradient = {"d_out": torch.zeros(2, 6, 9, 5), "lse": torch.zeros(2, 6, 9), "delta": torch.zeros(2, 6, 9)}
    for wrong in (gradient[name].double(), gradient[name][:, :, 1:]):
        with pytest.raises(ValueError, match=f"{name} must be torch.float32"):
            attention_backward(
                **{**gradient, name: wrong},
                **dict(zip("qkv", inputs[:3], strict=True)),
                lo=inputs[3],
                hi=inputs[4],
                **given,
            )
