"""`shardsum verify` passes here, and says what is wrong when something is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from shardsum.cli import verify
from shardsum.comm import Traffic
from shardsum.problem import Problem
from shardsum.state import AttentionState
from shardsum.strategies import STRATEGIES, Call, Ring

from .run import shardsum

Capture = pytest.CaptureFixture[str]
Only = Callable[[str], None]


def test_all_is_right(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("causal window", "documents", "earlier queries")  # tests/distributed has them all
    monkeypatch.setattr(verify, "MASKS", {name: verify.MASKS[name] for name in some})
    done = shardsum(capsys, "verify", "-n", 2, "--transport", "threads", "--json")
    assert done.status == 0, done.out
    (result,) = done.json["results"]
    assert result["cases"] == len(STRATEGIES) * len(verify.LAYOUTS) * len(some) * len(result["kernels"]) * 2
    assert {(s, layout) for s, row in result["largest_error"].items() for layout in row} == {
        (s, layout) for s in STRATEGIES for layout in ("contiguous", "zigzag", "striped", "weighted")
    }
    assert all(error < 1e-6 for row in result["largest_error"].values() for error in row.values())
    traffic = {(row["mask"], row["layout"], row["strategy"]): row for row in result["traffic"]}
    assert len(traffic) == 3 * 2 * len(STRATEGIES)
    assert all(row["as_declared"] for row in traffic.values())
    # Of the other half's 240 keys rank 1 sees 63, each 2 heads of 40 float32 numbers; rank 0 sees none.
    digests = result["digests"]
    assert len(digests) == 3 * len(STRATEGIES)
    assert all(row["as_alone"] for row in digests)
    assert len({row["digest"] for row in digests}) == 1
    window = traffic["window 64", "contiguous", "ring"]
    assert window["lower_bound_bytes"] == window["forward"]["counted_bytes"] == 63 * 2 * 40 * 4


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Only:
    """Leave one part of the report, which is to find the fault; what all parts find is shown above."""

    def leave(part: str) -> None:
        masks = {"causal": verify.MASKS["causal"]} if part == "errors" else {}
        monkeypatch.setattr(verify, "MASKS", masks)
        for check in {"check_traffic", "check_digests"} - {part}:
            monkeypatch.setattr(verify, check, lambda comm: [])

    return leave


def test_a_wrong_strategy_is_found(capsys: Capture, monkeypatch: pytest.MonkeyPatch, only: Only) -> None:
    only("errors")
    right = Ring.forward

    def doubled(self: Ring, call: Call) -> AttentionState:
        state = right(self, call)
        out: Tensor = state.out * 2
        return AttentionState(out, state.lse) if call.comm.rank == 1 else state

    monkeypatch.setattr(Ring, "forward", doubled)
    done = shardsum(capsys, "verify", "-n", 2, "--transport", "threads")
    assert done.status == 1
    wrong = {line.split("│")[1].strip() for line in done.out.splitlines() if "WRONG" in line}
    assert wrong == {"ring", "hybrid"}  # which has a ring between its nodes
    assert "strategy ring" in done.out


def test_traffic_that_was_not_declared_is_found(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, only: Only
) -> None:
    only("check_traffic")
    right = Ring._traffic_backward

    def less(self: Ring, problem: Problem, rank: int) -> Traffic:
        declared = right(self, problem, rank)
        declared.sent_bytes -= 4 * (rank == 1)
        return declared

    monkeypatch.setattr(Ring, "_traffic_backward", less)
    done = shardsum(capsys, "verify", "-n", 2, "--transport", "threads", "--json")
    assert done.status == 1
    assert not done.json["ok"]
    wrong = {row["strategy"] for row in done.json["results"][0]["traffic"] if not row["as_declared"]}
    assert wrong == {"ring", "hybrid"}


def test_other_bits_are_found(capsys: Capture, monkeypatch: pytest.MonkeyPatch, only: Only) -> None:
    only("check_digests")
    right = Ring.forward

    def off(self: Ring, call: Call) -> AttentionState:
        state = right(self, call)
        return AttentionState(state.out * (1 + 2**-23), state.lse) if call.problem.reproducible else state

    monkeypatch.setattr(Ring, "forward", off)
    done = shardsum(capsys, "verify", "-n", 2, "--transport", "threads", "--json")
    assert done.status == 1
    wrong = {row["strategy"] for row in done.json["results"][0]["digests"] if not row["as_alone"]}
    assert wrong == {"ring", "hybrid"}
