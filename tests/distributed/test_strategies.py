"""Every kernel x strategy x layout x mask against float64, every rank checked, over real ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import shardsum
from shardsum import AttentionState, Layout, Mismatch, NonFiniteWarning, RankLost, Unsupported, launch
from shardsum.comm import Communicator
from shardsum.kernels import available
from shardsum.strategies import STRATEGIES, as_strategy

from .. import dense
from ..tolerances import assert_close
from .cases import LAYOUTS, MASKS, Case, layout_of, recorded, run_all, run_case, sample

# Cases with a NaN in a visible key are among them: that they warn is tested below.
pytestmark = pytest.mark.filterwarnings("ignore::shardsum.NonFiniteWarning")


@pytest.mark.parametrize("size", [1, 3, *(pytest.param(size, marks=pytest.mark.nightly) for size in (2, 5))])
@pytest.mark.parametrize("which", ["sample", "corners", pytest.param("matrix", marks=pytest.mark.nightly)])
def test_against_float64_on_every_rank(size: int, which: str) -> None:
    counts = launch(run_all, ranks=size, transport="threads", args=(which,))
    cases = {"sample": 450, "corners": 96 if size < 5 else 94, "matrix": 450 * len(available())}
    assert set(counts) == {cases[which]}


def test_the_sample_has_every_kernel_with_every_strategy_layout_and_mask() -> None:
    cases = [(case.mask, case.layout, strategy, kernel) for case, strategy, kernel, _ in sample()]
    for place, values in enumerate((MASKS, LAYOUTS, STRATEGIES)):
        assert {(case[place], case[3]) for case in cases} == {*itertools.product(values, available())}


@pytest.mark.parametrize("transport", [pytest.param("gloo", marks=pytest.mark.nightly), "mpi"])
def test_against_float64_in_processes(transport: str) -> None:
    assert launch(run_all, ranks=3, transport=transport, args=("corners",)) == [96] * 3


def declared_is_counted(comm: Communicator, name: str) -> None:
    strategy = recorded(STRATEGIES[name]())
    for mask, layout in itertools.product(MASKS, ("contiguous", "zigzag", "weighted", "ragged")):
        for q_replicated in (False, True):
            run_case(comm, Case(mask, layout), strategy, "aten", q_replicated)
            if mask == "causal":
                run_case(comm, Case(mask, layout, dtype=torch.bfloat16), strategy, "aten", q_replicated)


@pytest.mark.parametrize("size", [1, 2, *(pytest.param(size, marks=pytest.mark.nightly) for size in (3, 5))])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_declared_traffic_is_what_the_communicator_counts(name: str, size: int) -> None:
    launch(declared_is_counted, ranks=size, transport="threads", args=(name,))


def replicated_states(comm: Communicator, strategy: str) -> AttentionState:
    q, k, v = (torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k, v = (shardsum.shard(x, comm=comm) for x in (k, v))
    return shardsum.attention(
        q, k, v, comm=comm, strategy=strategy, q_replicated=True, causal=True, return_state=True
    )


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_replicated_queries_give_the_same_bits_on_every_rank(strategy: str) -> None:
    first, *others = launch(replicated_states, ranks=5, transport="threads", args=(strategy,))
    for other in others:
        assert torch.equal(first.out, other.out)
        assert torch.equal(first.lse, other.lse)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_rank_whose_sum_is_not_finite_is_named(strategy: str, bad: float) -> None:
    def run(comm: Communicator) -> torch.Tensor:
        x = torch.randn(2, 3, 4, 3)
        v = x.clone()
        if comm.rank == 1:
            v[1, 2, 2, 0] = bad
        out: torch.Tensor = shardsum.attention(x, x, v, comm=comm, strategy=strategy, kernel="aten")
        return out

    holder = {"ulysses": "group 0", "hybrid": "group 1"}.get(strategy, "rank 1")
    finder = "2" if strategy == "ulysses" else "1" if strategy in ("all_reduce", "pass_q") else "[012]"
    named = (
        rf"^rank {finder}, call 1, attention: the attention over the keys of {holder} gave NaN or Inf, "
        r"first at \(batch, head, row\) \(1, 2, 0\) of the queries of (rank|group) [012]"
    )
    with pytest.warns(NonFiniteWarning, match=named):
        outs = launch(run, ranks=3, transport="threads")
    # Spread, not dropped: every row of that head sees that value, and nothing else does.
    for out in outs:
        assert not out[1, 2, :, 0].isfinite().any()
        out[1, 2, :, 0] = 0.0
        assert out.isfinite().all()


def test_a_cache_that_is_not_finite_names_its_layer() -> None:
    cache = shardsum.KVCache(layers=2, kv_heads=1, head_dim=2)
    for layer in range(2):
        cache.append(layer, torch.ones(1, 1, 3, 2), torch.full((1, 1, 3, 2), torch.nan if layer else 1.0))
        cache.attend(0, torch.ones(1, 1, 1, 2))
    with pytest.warns(NonFiniteWarning, match=r"rank 0, call \d+, KVCache.attend in layer 1: .* \(0, 0, 0\)"):
        cache.attend(1, torch.ones(1, 1, 1, 2))


def mistaken(comm: Communicator, change: str) -> str:
    """The message that this rank gets when rank 1 calls otherwise than the others; then a right call works."""
    x = torch.randn(1, 2, 3, 4)
    options: dict[str, object] = {"causal": True, "strategy": "ring"}
    if comm.rank == 1:
        options |= {
            "mask": {"causal": False},
            "scale": {"scale": 2.0},
            "strategy": {"strategy": "all_gather"},
            "layout": {"layout": "zigzag"},
            "key_range": {"key_range": ([0], [2])},
            "value": {"window": (1,)},
            "shape": {},
            "dtype": {},
        }[change]
    y = x[:, :, :, :3] if (change, comm.rank) == ("shape", 1) else x
    y = y.double() if (change, comm.rank) == ("dtype", 1) else y
    with pytest.raises(ValueError, match=r".") as caught:
        shardsum.attention(y, y, y, comm=comm, **options)
    shardsum.attention(x, x, x, comm=comm, causal=True)
    return str(caught.value)


@pytest.mark.parametrize("change", ["mask", "scale", "strategy", "layout", "key_range", "shape", "dtype"])
def test_ranks_that_ask_for_different_things_all_hear_the_same(change: str) -> None:
    messages = launch(mistaken, ranks=3, transport="threads", args=(change,))
    assert len(set(messages)) == 1
    named = {"mask": "causal", "shape": "head_dim"}.get(change, change)
    assert f"{named} must be the same on every rank: got" in messages[0]
    assert "on rank 0, 2" in messages[0]
    assert "on rank 1" in messages[0]


def test_one_ranks_mistake_reaches_all_instead_of_a_hang() -> None:
    messages = launch(mistaken, ranks=3, transport="threads", args=("value",))
    assert messages[0].startswith("rank 1 could not take part: ValueError: window must be (left, right)")
    assert len(set(messages)) == 1


def test_shards_that_the_layout_does_not_cut_are_refused_on_every_rank() -> None:
    def run(comm: Communicator) -> str:
        x = torch.randn(1, 1, 3 + 2 * comm.rank, 2)
        with pytest.raises(ValueError, match="layout zigzag over 2 ranks cuts 8 keys into") as caught:
            shardsum.attention(x, x, x, comm=comm, layout="zigzag")
        with pytest.raises(ValueError, match="q_len=9, but the ranks together hold 8"):
            shardsum.attention(x, x, x, comm=comm, q_len=9)
        with pytest.raises(ValueError, match="same queries on every rank"):
            shardsum.attention(x, x, x, comm=comm, q_replicated=True)
        return str(caught.value)

    assert len(set(launch(run, ranks=2, transport="threads"))) == 1


def test_what_is_given_as_lists_or_for_one_sequence_is_as_exact() -> None:
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lo, hi = torch.tensor([[0, 0, 1]]), torch.tensor([[1, 2, 3], [3, 3, 2]])  # of both sequences, and of each
    found = shardsum.attention(x, x, x, alibi_slopes=[0.1, 0.7], key_intervals=(lo, hi))
    seen = dense.visible(3, 3, 2, key_intervals=(lo, hi))
    alibi = torch.tensor([0.1, 0.7], dtype=torch.float64), dense.distances(3, 3, 2)
    assert_close(found, dense.attention(x, x, x, seen, alibi=alibi)[0], 1e-12, "out")


def test_what_is_not_supported_says_so() -> None:
    with pytest.raises(
        Unsupported,
        match="strategy must be auto, all_gather, all_reduce, hybrid, pass_q, ring, ulysses: got 'tree'",
    ):
        as_strategy("tree")
    y = torch.randn(1, 2, 3, 4)
    for options, message in (
        ({"bias": torch.zeros(1, 1, 3, 3), "strategy": "pass_q"}, "Use all_gather or ring"),
        ({"bias": torch.zeros(1, 1, 3, 2)}, "a column for each of the 3 keys"),
        ({"softcap": 0.0}, "softcap must be a positive number"),
        ({"dropout_p": 1.0}, "less than 1"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \(q_heads,\)"),
        ({"key_intervals": (torch.zeros(1, 2), torch.zeros(1, 2))}, "key_intervals must be"),
        ({"key_range": ([0.5], [2.0])}, "key_range must be whole numbers"),
        ({"window": (1.5, 0)}, "window must be"),
        ({"window": (1 << 70, 0)}, "window must be"),
        ({"comm": "gloo"}, "comm must be a Communicator"),
        (
            {"scale": torch.ones(3)},
            r"scale must be a number, or a tensor .*: got \(3,\) of torch.float32, .* 2 heads",
        ),
        ({"scale": torch.ones(1, 1, 4)}, r"got \(1, 1, 4\) .* 3 rows"),
        ({"scale": "x"}, "scale must be a number: got 'x'"),
        ({"softcap": "x"}, "softcap must be a number"),
        ({"dropout_p": "x"}, "dropout_p must be a number"),
        ({"dropout_p": 0.1, "seed": 1 << 63}, r"seed must be between -2\^63 and 2\^63"),
        ({"dropout_p": 0.1, "seed": 0.5}, "seed must be a whole number"),
        ({"sinks": [0.0, 0.0]}, r"sinks must be a tensor of floats: got \[0.0, 0.0\]"),
        ({"alibi_slopes": [None, 1.0]}, "alibi_slopes must be numbers"),
        (
            {"bias": torch.ones(1, 1, 3, 3, dtype=torch.bool)},
            "bias must be .* torch.bool. A mask is a bias of 0 and",
        ),
        (
            {"key_intervals": (torch.zeros(1, 3), torch.ones(1, 3))},
            r"whole numbers .* got \(1, 3\) of torch.float32",
        ),
        ({"key_intervals": 3}, r"key_intervals \(lo, hi\) must be a tuple of two: got 3"),
        ({"key_range": (None, [2])}, r"key_range \(start, end\) must be a tuple of two"),
        ({"cu_seqlens": 3}, r"cu_seqlens must be \(documents \+ 1,\): got 3"),
        ({"reproducible": "portable"}, "reproducible must be True or False: got 'portable'"),
    ):
        with pytest.raises(ValueError, match=message):
            shardsum.attention(y, y, y, **options)
    for wrong, message in (
        ((y, y[:, :, :2], y), "same batch, heads and length"),
        ((y[:, :1].expand(1, 3, 3, 4), y, y), "kv_heads must divide q_heads"),
        ((y[0], y, y), r"q must be \(batch, heads, length, dim\)"),
        ((y.int(), y.int(), y.int()), "one dtype"),
        ((y, y.double(), y), "one dtype"),
        ((y[..., :2], y, y), "same batch and head_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            shardsum.attention(*wrong)


@pytest.mark.parametrize("transport", ["threads", "mpi"])
def test_one_ranks_wrong_type_reaches_all_instead_of_a_hang(transport: str) -> None:
    messages = launch(wrong_types, ranks=2, transport=transport, deadline=20)
    for own, other in zip(*messages, strict=True):
        assert other.startswith("rank 0 could not take part: ")
        assert own == other


def wrong_types(comm: Communicator) -> list[str]:
    x, said = torch.ones(1, 1, 2, 2), []
    calls: list[Callable[[], object]] = [
        lambda: shardsum.attention(None if comm.rank == 0 else x, x, x, comm=comm),  # type: ignore[arg-type]
        lambda: shardsum.attention(x, x, x, comm=comm, window=("a", 0) if comm.rank == 0 else None),  # type: ignore[arg-type]
        lambda: shardsum.attention(x, x, x, comm=comm, key_range=5 if comm.rank == 0 else None),  # type: ignore[arg-type]
        # Found out too late these would be messages of other sizes than the other rank's.
        lambda: shardsum.attention(x, x, x, comm=comm, scale=torch.ones(2 if comm.rank == 0 else 1)),
        lambda: shardsum.unshard(x[0, 0, 0, 0] if comm.rank == 0 else x, comm=comm),
        lambda: shardsum.unshard(x, comm=comm, dim=4 if comm.rank == 0 else 3),
        lambda: shardsum.weighted_sum(None if comm.rank == 0 else x, x, comm=comm),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(Exception, match=r".") as caught:
            call()
        assert not isinstance(caught.value, RankLost)
        said.append(str(caught.value))
    shardsum.attention(x, x, x, comm=comm)
    return said


def test_ranks_that_differ_in_what_they_call() -> None:
    def run(comm: Communicator) -> str:
        x = torch.randn(1, 1, 2, 2)
        call = (
            (lambda: shardsum.unshard(x, comm=comm))
            if comm.rank
            else (lambda: shardsum.attention(x, x, x, comm=comm))
        )
        with pytest.raises(Mismatch) as caught:
            call()
        return str(caught.value)

    messages = launch(run, ranks=2, transport="threads")
    assert messages[0] == messages[1]
    assert 'call must be the same on every rank: got "attention" on rank 0, "unshard" on rank 1.' in messages[0]


def shard_and_back(comm: Communicator) -> None:
    x = torch.randn(3, 11, 2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for layout in (*map(Layout, ("contiguous", "zigzag", "striped")), layout_of("weighted", comm.size)):
        for dim in (0, 1, -2, 2):
            part = shardsum.shard(x, comm=comm, dim=dim, layout=layout)
            assert torch.equal(shardsum.unshard(part, comm=comm, dim=dim, layout=layout), x)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_unshard_is_the_inverse_of_shard(size: int) -> None:
    launch(shard_and_back, ranks=size, transport="threads")
