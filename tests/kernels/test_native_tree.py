"""The C++ kernel along the tree of segments: the definition's values, and a row's bits whatever lies beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardsum.blocks import Dense
from shardsum.collectives import MERGE, combine_all
from shardsum.errors import Unsupported
from shardsum.extension import instruction_sets
from shardsum.kernels.native import NativeKernel
from shardsum.kernels.operators import attention_forward
from shardsum.masks import Bounds
from shardsum.packed import pack
from shardsum.scores import Scores
from shardsum.state import AttentionState
from shardsum.tree import SEGMENT

from ..tolerances import ROUNDED_WEIGHTS, STATE
from .native import best_and_plainest, check_state, drawn, each_dtype, each_instruction_set, normal

BATCH, Q_HEADS, Q_LEN, KV_LEN = 3, 4, 61, 1500
each_mask_and_option = pytest.mark.parametrize(
    ("mask", "option"),
    [
        *(("causal", "plain"), ("window", "plain"), ("padding", "plain"), ("causal", "softcap")),
        *(("window", "alibi"), ("padding", "dropout"), ("window", "underflow")),
    ],
)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, and the call on a part of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    lo: Tensor
    hi: Tensor
    scores: Scores

    def state(self, isa: str) -> AttentionState:
        return NativeKernel(isa).forward_tree(self.q, Dense(self.k, self.v), Bounds(self.lo, self.hi), self.scores)

    def state_by(self, isa: str, segment: int) -> AttentionState:
        """The plain state over segments of another size."""
        inputs = (self.q, self.k, self.v, self.lo, self.hi, self.scores.scale)
        return AttentionState(*attention_forward(*inputs, instruction_set=isa, segment=segment))

    def sequences(self, some: slice) -> Call:
        q, k, v = (x[some] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, lo=self.lo[some], hi=self.hi[some])

    def rows(self, some: slice) -> Call:
        lo, hi = self.lo[:, some], self.hi[:, some]
        return replace(self, q=self.q[:, :, some], lo=lo, hi=hi, scores=self.scores.some_rows(some))

    def heads(self, first: int, end: int) -> Call:
        group = self.q.shape[1] // self.k.shape[1]
        kv = slice(first // group, end // group)
        scores = self.scores.some_heads(first, end)
        return replace(self, q=self.q[:, first:end], k=self.k[:, kv], v=self.v[:, kv], scores=scores)

    def keys(self, begin: int, end: int) -> Call:
        assert self.scores.keys is not None
        scores = replace(self.scores, keys=self.scores.keys[begin:end])
        lo, hi = self.lo - begin, self.hi - begin
        return Call(self.q, self.k[:, :, begin:end], self.v[:, :, begin:end], lo, hi, scores)

    def contiguous(self) -> Call:
        q, k, v = (x.contiguous() for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)


def call(dtype: torch.dtype, mask: str = "causal", option: str = "plain") -> Call:
    """Strided tensors with GQA; `underflow`: weights and sums pass the subnormal numbers to 0 of either sign."""
    steep, tiny = (60.0, 2.0**-133) if option == "underflow" else (1.0, 1.0)
    q = (normal(0, BATCH, Q_LEN, Q_HEADS, 48) * steep).to(dtype).transpose(1, 2)
    k = normal(1, BATCH, KV_LEN, 2, 50, dtype=dtype)[..., 1:-1].transpose(1, 2)
    v = (normal(2, BATCH, KV_LEN, 2, 40) * tiny).to(dtype).transpose(1, 2)
    hi = torch.linspace(1, KV_LEN, Q_LEN).long().expand(BATCH, -1)
    lo = {
        "causal": torch.zeros_like(hi),
        "window": (hi - 400).clamp(min=0),
        "padding": torch.tensor([0, 300, 1024]).unsqueeze(1).expand_as(hi),
    }[mask]
    places = {"rows": torch.arange(Q_LEN) + 3, "keys": torch.arange(KV_LEN), "diagonal": hi[:1] - 1}
    given: dict[str, object] = {
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": torch.linspace(0.001, 0.01, Q_HEADS)},
        "dropout": {"dropout_p": 0.3, "seed": 5},
    }.get(option, {})  # type: ignore[assignment]
    return Call(q, k, v, lo, hi, Scores(0.15, **places, **given))  # type: ignore[arg-type]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def assert_same_bits(one: AttentionState, other: AttentionState, what: str = "") -> None:
    assert torch.equal(bits(one.out), bits(other.out)), f"{what}: out"
    assert torch.equal(bits(one.lse), bits(other.lse)), f"{what}: lse"


def part(state: AttentionState, *index: slice) -> AttentionState:
    return AttentionState(state.out[index], state.lse[index])


def on_threads(threads: int, run: Callable[[], AttentionState]) -> AttentionState:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return run()
    finally:
        torch.set_num_threads(before)


@each_instruction_set
@settings(max_examples=20)
@given(st.data())
def test_any_shape_interval_dtype_stride_and_option(isa: str, data: st.DataObject) -> None:
    (q, k, v, lo, hi, scores), options = drawn(
        data,
        (2, 2, 4),
        lambda group: data.draw(st.sampled_from([1, 5, 150])),
        [1, 33, 255, 256, 257, 700, 1300],
        dims := [1, 2, 31, 64, 80, 129, 256, 512],
        dims,
        steepest=0.01,
    )
    state = NativeKernel(isa).forward_tree(q, Dense(k, v), Bounds(lo, hi), scores)
    rounded = q.dtype == torch.bfloat16 and isa in ("amx", "avx512_bf16")
    check_state(state, ROUNDED_WEIGHTS if rounded else STATE[q.dtype], q, k, v, lo, hi, scores, **options)


@best_and_plainest
@each_dtype
@each_mask_and_option
def test_a_rows_bits_depend_on_nothing_else(isa: str, dtype: torch.dtype, mask: str, option: str) -> None:
    all_of, some = slice(None), slice(17, 40)
    whole = call(dtype, mask, option)
    state = whole.state(isa)
    for threads in (1, 2, 3):
        assert_same_bits(on_threads(threads, lambda: whole.state(isa)), state, f"{threads} threads")
    assert_same_bits(whole.contiguous().state(isa), state, "contiguous")
    assert_same_bits(whole.sequences(slice(1)).state(isa), part(state, slice(1)), "one sequence")
    assert_same_bits(whole.heads(2, 4).state(isa), part(state, all_of, slice(2, 4)), "one KV head")
    assert_same_bits(whole.rows(some).state(isa), part(state, all_of, all_of, some), "some rows")
    for row in (0, 1, 13, 44, Q_LEN - 1):
        one, end = slice(row, row + 1), int(whole.hi[0, row])
        alone = whole.rows(one).keys(0, end).state(isa)  # decoded as soon as it could be
        assert_same_bits(alone, part(state, all_of, all_of, one), f"row {row} alone")


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("head_dim", [128, 192, 512])
def test_few_rows_have_the_bits_of_many_where_scores_are_sums_of_sums(
    isa: str, dtype: torch.dtype, head_dim: int
) -> None:
    """Few rows are multiplied where keys lie, many with packed keys."""
    q, k, v = (normal(i, 1, 1, length, head_dim, dtype=dtype) for i, length in enumerate((40, 512, 512)))
    lo = torch.zeros(1, 40, dtype=torch.int64)
    whole = Call(q, k, v, lo, lo + 512, Scores(head_dim**-0.5))
    for rows in (slice(0, 1), slice(7, 12)):
        assert_same_bits(whole.rows(rows).state(isa), part(whole.state(isa), slice(None), slice(None), rows))


def over_segments(of: Call, isa: str, ranges: list[tuple[int, int]]) -> list[Tensor]:
    states = [of.keys(begin * SEGMENT, min(end * SEGMENT, KV_LEN)).state(isa) for begin, end in ranges]
    return [pack(state).flatten(0, 2) for state in states]


@best_and_plainest
@each_dtype
@each_mask_and_option
def test_nodes_merge_to_the_tree(isa: str, dtype: torch.dtype, mask: str, option: str) -> None:
    """By the merge that ranks use, which is that of the best instruction set."""
    of = call(dtype, mask, option)
    expected = pack(of.state(isa)).flatten(0, 2)
    for ranges in ([(0, 4), (4, 6)], [(0, 2), (2, 4), (4, 6)], [(i, i + 1) for i in range(6)]):
        pieces = over_segments(of, isa, ranges)
        combine_all(pieces, MERGE, into := torch.empty_like(expected))
        assert torch.equal(bits(into), bits(expected)), ranges


def test_another_tree_has_other_bits() -> None:
    """So that the tests above would see one."""
    of = call(torch.float32)
    for isa in instruction_sets():
        expected = pack(of.state(isa)).flatten(0, 2)
        leaves = over_segments(of, isa, [(i, i + 1) for i in range(6)])
        for order in (leaves, leaves[::-1]):
            folded = order[0].clone()
            for leaf in order[1:]:
                MERGE.combine(folded, leaf, folded)
            assert not torch.equal(bits(folded), bits(expected))
            assert torch.allclose(folded, expected, atol=1e-5)
        assert not torch.equal(bits(pack(of.state_by(isa, 2 * SEGMENT)).flatten(0, 2)), bits(expected))


@each_instruction_set
@each_dtype
def test_merging_with_no_keys_changes_no_bit(isa: str, dtype: torch.dtype) -> None:
    state = pack(call(dtype, "window", "underflow").state(isa)).flatten(0, 2)
    state[0, :3] = torch.tensor([-0.0, torch.nan, -torch.inf])
    empty = pack(AttentionState.empty(*state.shape[:1], state.shape[1] - 1, dtype=state.dtype))
    for one, other in ((state, empty), (empty, state)):
        MERGE.combine(one, other, into := torch.empty_like(state))
        assert torch.equal(bits(into), bits(state))


@each_instruction_set
@each_dtype
def test_values_that_are_not_finite_reach_the_rows_that_see_them_alike(isa: str, dtype: torch.dtype) -> None:
    clean = call(dtype)
    k, v = clean.k.clone(), clean.v.clone()
    k[:, :, 700], v[:, :, 700, 3], v[:, 0, 1000, 5], v[:, 0, 1001, 5] = torch.nan, torch.nan, torch.inf, -torch.inf
    v[:, :, 600, 7] = torch.inf
    of = replace(clean, k=k, v=v)
    state, before = of.state(isa), clean.state(isa)
    unseen = int((clean.hi[0] <= 600).sum())
    assert_same_bits(
        part(state, *[slice(None)] * 2, slice(unseen)), part(before, *[slice(None)] * 2, slice(unseen))
    )
    for row in range(unseen, Q_LEN, 4):
        one = [slice(None), slice(None), slice(row, row + 1)]
        assert not bool(part(state, *one).out.isfinite().all())
        assert_same_bits(of.rows(one[2]).state(isa), part(state, *one), f"row {row}")


def test_a_row_that_sees_nothing() -> None:
    of = call(torch.float32)
    for isa in instruction_sets():
        state = replace(of, hi=of.lo).state(isa)
        assert torch.equal(state.out, torch.zeros_like(state.out))
        assert torch.equal(state.lse, torch.full_like(state.lse, -torch.inf))


def test_what_it_does_not_do_is_refused() -> None:
    of = call(torch.float32)
    arguments = (of.q, of.k, of.v, of.lo, of.hi)
    for segment in (100, -256):
        with pytest.raises(ValueError, match="segment must be 0 or a multiple of 256"):
            attention_forward(*arguments, 0.1, segment=segment)
    out, _ = attention_forward(of.q.requires_grad_(), *arguments[1:], 0.1, segment=SEGMENT)
    with pytest.raises(Unsupported, match="has no gradient"):
        out.sum().backward()
