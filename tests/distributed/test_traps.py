"""Bugs that shipped elsewhere, put back one at a time: the suite must see each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shardsum import AttentionState, launch, prepared, state
from shardsum.collectives import Operation, operations, sums
from shardsum.comm import Communicator
from shardsum.kernels import OutputGradient, aten
from shardsum.masks import Mask
from shardsum.partials import STATES, SUMS, Merged, Partial
from shardsum.strategies import call as calls
from shardsum.strategies import circulation, ring
from shardsum.strategies import sums as strategy_sums
from shardsum.strategies.call import Call, Contribution

from .cases import Case, run_case
from .random_problems import check, plain

pytestmark = pytest.mark.filterwarnings("ignore::shardsum.NonFiniteWarning")

operator = aten._operator
merge = state.merge


def a_masked_row_has_lse_zero(patch: pytest.MonkeyPatch) -> None:
    """ATen's own answer for a row whose keys are all masked."""
    attend = aten._attend

    def attend_as_is(kind: str, q: Any, k: Any, v: Any, lo: Any, hi: Any, scale: float) -> AttentionState:
        result = attend(kind, q, k, v, lo, hi, scale)
        return AttentionState(result.out, result.lse.masked_fill(result.lse == -torch.inf, 0.0))

    patch.setattr(aten, "_attend", attend_as_is)


def all_lse_are_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(aten, "_operator", lambda *args: (operator(*args)[0], operator(*args)[1] * 0))


def lse_is_base_2(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(aten, "_operator", lambda *args: (operator(*args)[0], operator(*args)[1] / 0.6931471805599453))


def masked_nan_leaks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AttentionState, "is_finite", lambda self: True)


def partials_are_rounded_to_bfloat16(patch: pytest.MonkeyPatch) -> None:
    def rounded(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = operator(*args)
        return out.bfloat16().to(out.dtype), lse

    patch.setattr(aten, "_operator", rounded)


def every_mask_is_causal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mask, "intervals", lambda self, rows: Mask(self.q_len, self.kv_len, causal=True).rows(rows))
    patch.setattr(Mask, "rows", Mask.__dict__["intervals"], raising=False)


def causal_is_aligned_top_left(patch: pytest.MonkeyPatch) -> None:
    documents = Mask._documents

    def top_left(self: Mask, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, end, _ = documents(self, rows)
        return first, end, rows.unsqueeze(0)

    patch.setattr(Mask, "_documents", top_left)


def the_ring_drops_its_last_hop(patch: pytest.MonkeyPatch) -> None:
    partial = Call.partial

    def dropped(
        self: Call, q: Any, block: Any, *, rows_of: int, keys_of: int, keys: slice
    ) -> Partial[AttentionState]:
        result = partial(self, q, block, rows_of=rows_of, keys_of=keys_of, keys=keys)
        last, out = keys_of == (rows_of + 1) % self.comm.size, result.total().out
        return Merged(AttentionState.empty(*out.shape, dtype=out.dtype), STATES) if last else result

    patch.setattr(Call, "partial", dropped)


def two_empty_states_merge_to_nan(patch: pytest.MonkeyPatch) -> None:
    def naive(a: AttentionState, b: AttentionState) -> AttentionState:
        lse = torch.logaddexp(a.lse, b.lse)
        out = a.out * (a.lse - lse).exp().unsqueeze(-1) + b.out * (b.lse - lse).exp().unsqueeze(-1)
        return AttentionState(out, lse)

    for module in (aten, calls, state):
        patch.setattr(module, "merge", naive)
    patch.setattr(calls, "STATES", replace(STATES, combine=naive))


def a_rank_with_nan_is_dropped(patch: pytest.MonkeyPatch) -> None:
    def forgiving(a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
        good = [x for x in (a, b) if not x.isnan().any()]
        operations.MERGE.combine(*(good * 2)[:2], into) if len(good) == 2 else into.copy_((good or [a])[0])

    patch.setattr(sums, "MERGE", Operation("merge", forgiving))


def the_rank_is_a_cached_global(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Communicator, "rank", property(lambda self: 0, lambda self, rank: None), raising=False)


def the_states_go_to_the_wrong_rows(patch: pytest.MonkeyPatch) -> None:
    scatter = sums.reduce_scatter_states
    patch.setattr(strategy_sums, "reduce_scatter_states", lambda comm, states: scatter(comm, states[::-1]))


def keys_of_an_uneven_shard_are_cut_to_the_shortest(patch: pytest.MonkeyPatch) -> None:
    exchange = Communicator.all_to_all

    def even(self: Communicator, sent: Any, shapes: Any) -> list[torch.Tensor]:
        parts = exchange(self, sent, shapes)
        if sent[0].ndim == 4:
            shortest = min(p.shape[2] for p in parts)
            parts = [torch.cat([p[:, :, :shortest], 0 * p[:, :, shortest:]], dim=2) for p in parts]
        return parts

    patch.setattr(Communicator, "all_to_all", even)


BUGS: dict[Callable[[pytest.MonkeyPatch], None], tuple[Case, str]] = {
    a_masked_row_has_lse_zero: (Case("window", "zigzag", q_len=70, kv_len=71), "ring"),
    all_lse_are_zero: (Case("full", "contiguous"), "ring"),
    lse_is_base_2: (Case("full", "contiguous"), "all_reduce"),
    masked_nan_leaks: (Case("causal", "contiguous", nan_key=16), "all_gather"),
    partials_are_rounded_to_bfloat16: (Case("full", "zigzag", dtype=torch.bfloat16), "ring"),
    every_mask_is_causal: (Case("window", "striped"), "all_gather"),
    causal_is_aligned_top_left: (Case("causal", "contiguous"), "all_reduce"),
    the_ring_drops_its_last_hop: (Case("full", "striped"), "ring"),
    two_empty_states_merge_to_nan: (Case("causal", "contiguous", q_len=13, kv_len=5), "ring"),
    a_rank_with_nan_is_dropped: (Case("causal", "contiguous", nan_key=1), "all_reduce"),
    the_rank_is_a_cached_global: (Case("causal", "contiguous"), "ring"),
    the_states_go_to_the_wrong_rows: (Case("full", "contiguous"), "all_reduce"),
    keys_of_an_uneven_shard_are_cut_to_the_shortest: (Case("full", "ragged"), "all_gather"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_suite_sees(bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    case, strategy = BUGS[bug]

    def run(comm: Communicator) -> None:
        run_case(comm, case, strategy, "aten", q_replicated=False)

    launch(run, ranks=3, transport="threads", deadline=20)  # right without the bug
    bug(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        launch(run, ranks=3, transport="threads", deadline=2)


def backward_takes_lse_as_zero(patch: pytest.MonkeyPatch) -> None:
    backward = Call.partial_backward

    def zero(self: Call, q: Any, block: Any, gradient: OutputGradient, **where: Any) -> Contribution:
        return backward(self, q, block, replace(gradient, lse=gradient.lse * 0), **where)

    patch.setattr(Call, "partial_backward", zero)


def _changed(change: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def bug(patch: pytest.MonkeyPatch) -> None:
        backward = Call.partial_backward

        def changed(*args: Any, **where: Any) -> Contribution:
            found = backward(*args, **where)
            return replace(found, kv=Merged(torch.cat(change(*found.kv.total().chunk(2, dim=3)), dim=3), SUMS))

        patch.setattr(Call, "partial_backward", changed)

    return bug


dk_is_dk_plus_dv = _changed(lambda k, v: (k + v, v))
dk_and_dv_are_swapped = _changed(lambda k, v: (v, k))
dk_and_dv_are_rounded_to_bfloat16 = _changed(lambda k, v: (k.bfloat16().float(), v.bfloat16().float()))


def the_ring_uses_stale_keys(patch: pytest.MonkeyPatch) -> None:
    backward = Call.partial_backward

    def stale(self: Call, q: Any, block: Any, gradient: Any, **where: Any) -> Contribution:
        same = self.dense.k.shape == block.k.shape
        return backward(self, q, self.dense if same else block, gradient, **where)

    patch.setattr(Call, "partial_backward", stale)


def the_ring_drops_a_hop_of_gradients(patch: pytest.MonkeyPatch) -> None:
    def dropping(*args: Any) -> Any:
        *first, combine = args
        return circulate(*first, combine and (lambda arrived, found: arrived))

    circulate = circulation.circulate
    patch.setattr(ring, "circulate", lambda *args: dropping(*args) if len(args) == 5 else circulate(*args))


def gradients_go_to_the_wrong_rows(patch: pytest.MonkeyPatch) -> None:
    scatter = sums.sum_scatter
    patch.setattr(strategy_sums, "sum_scatter", lambda comm, parts: scatter(comm, parts[::-1]))


def delta_forgets_the_gradient_of_lse(patch: pytest.MonkeyPatch) -> None:
    backward = prepared._Attend.backward
    patch.setattr(
        prepared._Attend, "backward", staticmethod(lambda ctx, d_out, d_lse: backward(ctx, d_out, d_lse * 0))
    )


BACKWARD_BUGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "backward takes lse as zero": (backward_takes_lse_as_zero, "all_gather"),
    "dk is dk + dv": (dk_is_dk_plus_dv, "ring"),
    "dk and dv are swapped": (dk_and_dv_are_swapped, "all_reduce"),
    "dk and dv are rounded to bfloat16": (dk_and_dv_are_rounded_to_bfloat16, "pass_q"),
    "the ring uses stale keys": (the_ring_uses_stale_keys, "ring"),
    "the ring drops a hop of gradients": (the_ring_drops_a_hop_of_gradients, "ring"),
    "gradients go to the wrong rows": (gradients_go_to_the_wrong_rows, "all_reduce"),
    "delta forgets the gradient of lse": (delta_forgets_the_gradient_of_lse, "all_gather"),
}


@pytest.mark.parametrize("name", BACKWARD_BUGS)
def test_the_suite_sees_in_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, strategy = BACKWARD_BUGS[name]
    problem = plain(strategy)

    def run(comm: Communicator) -> None:
        check(comm, problem)

    launch(run, ranks=3, transport="threads", deadline=20)  # right without the bug
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="is off by"):
        launch(run, ranks=3, transport="threads", deadline=20)
