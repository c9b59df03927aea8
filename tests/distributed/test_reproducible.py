"""The same bits of out, dq, dk and dv on any number of ranks, and other bits where the tree is broken."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from jaxtyping import config
from torch import Tensor

import shardsum
from shardsum import KVCache, launch, placement, tree
from shardsum.comm import Communicator
from shardsum.kernels import along_tree, available
from shardsum.strategies import STRATEGIES, Ulysses
from shardsum.tree import Forest

from ..tolerances import assert_close

Q_LEN, KV_LEN = 600, 1100
LAYOUTS = ("contiguous", "zigzag", "striped")
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window": {"window": (300, 10), "key_range": ([5], [1000])},
    "first tokens": {"causal": True, "window": (200, None), "sink_tokens": 7},
    "documents": {"causal": True, "cu_seqlens": [0, 100, 500, 600], "cu_seqlens_k": [0, 300, 900, 1100]},
    "softcap": {"causal": True, "softcap": 4.0},
    "alibi": {"causal": True, "alibi_slopes": [0.1, 0.01, 0.2, 0.02]},
    "sinks": {"causal": True, "sinks": torch.tensor([0.5, -0.5, 2.0, 1.0])},
    "scale": {"causal": True, "scale": torch.tensor([0.2, 0.3, 0.4, 0.5])},
    "dropout": {"causal": True, "dropout_p": 0.2, "seed": 3},
}


@pytest.fixture(autouse=True)
def without_shape_checks() -> Iterator[None]:
    """They take half of the time here, and are made wherever values are tested."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@functools.cache
def tensors(kernel: str, dtype: str = "float32") -> tuple[Tensor, ...]:
    """q, k, v and the gradient of out; what is not native is slow, and gets half the heads."""
    generator, heads = torch.Generator().manual_seed(11), (4, 2) if kernel == "native" else (2, 1)
    sizes = [(heads[0], Q_LEN, 16), (heads[1], KV_LEN, 16), (heads[1], KV_LEN, 24), (heads[0], Q_LEN, 24)]
    made = [torch.randn(1, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return tuple(x.to(getattr(torch, dtype)) for x in made)


def options(mask: str, q: Tensor) -> dict[str, Any]:
    found = dict(MASKS[mask])
    for name in {"alibi_slopes", "sinks", "scale"} & set(found):
        found[name] = found[name][: q.shape[1]]
    return found


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


class Case(NamedTuple):
    """What the bits may not depend on, and what they may; `threads`: of each rank."""

    kernel: str
    layout: str
    strategy: str
    mask: str
    threads: int = 1
    dtype: str = "float32"


def run(comm: Communicator, case: Case) -> list[str] | None:
    """The digests of out, dq, dk, dv put together again, the same on every rank; None if refused."""
    torch.set_num_threads(case.threads)
    q, k, v, d_out = tensors(case.kernel, case.dtype)
    place: dict[str, Any] = {"comm": comm, "layout": case.layout, "reproducible": True}
    own = [shardsum.shard(x, **place).requires_grad_() for x in (q, k, v)]
    try:
        out = shardsum.attention(
            *own, **place, strategy=case.strategy, kernel=case.kernel, **options(case.mask, q)
        )
    except shardsum.Unsupported:
        return None
    found = [out, *torch.autograd.grad(out, own, shardsum.shard(d_out, **place))]
    return [digest(shardsum.unshard(x.detach(), **place)) for x in found]


@functools.cache
def expected(kernel: str, mask: str, dtype: str, threads: int = 1) -> list[str]:
    """On one rank."""
    case = Case(kernel, "contiguous", "all_gather", mask, threads, dtype)
    (found,) = launch(run, 1, "threads", (case,))
    assert found is not None
    return found


def run_all(comm: Communicator, cases: list[Case]) -> list[list[str] | None]:
    return [run(comm, Case(*case)) for case in cases]


def has_heads(case: Case, ranks: int) -> bool:
    """Whether whole groups of query heads can be shared out."""
    strategy, kv_heads = STRATEGIES[case.strategy](), tensors(case.kernel)[1].shape[1]
    return not isinstance(strategy, Ulysses) or kv_heads % strategy.ranks_in_group(ranks) == 0


def check(ranks: int, transport: str, cases: list[Case]) -> None:
    """Every rank's bits of every case are those of one rank alone; refused is what has too few heads."""
    for found in launch(run_all, ranks, transport, (cases,)):
        for case, digests in zip(cases, found, strict=True):
            wanted = expected(case.kernel, case.mask, case.dtype) if has_heads(case, ranks) else None
            assert digests == wanted, (ranks, transport, case)


def product(kernels: Iterable[str]) -> list[Case]:
    return [Case(*case) for case in itertools.product(kernels, LAYOUTS, STRATEGIES, MASKS, (1, 2))]


NATIVE = product({"native"} & {*available()})
OTHERS = product(name for name in available() if name != "native")


def some(which: int, native: int, others: int) -> list[Case]:
    """One case in so many, other ones for each `which`: primes divide no number of strategies, masks, ..."""
    return NATIVE[which % native :: native] + OTHERS[which % others :: others]


RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32)  # that are threads
EVERY = {1: 8, 2: 7, 3: 7, 4: 7, 6: 11}  # by the number of ranks: each so-manieth combination
SOME = {("threads", ranks): some(ranks, every, 173) for ranks, every in EVERY.items()}
SOME |= {("threads", ranks): NATIVE[ranks % 61 :: 61] for ranks in (16, 32)}
SOME |= {("gloo", 2): some(42, 11, 173), ("mpi", 3): some(43, 11, 173)}
MANY = {("threads", ranks): some(ranks, 1, 13 if ranks < 10 else 37) for ranks in RANKS}
MANY |= {where: some(where[1], 1, 13) for where in itertools.product(("gloo", "mpi"), (1, 2, 3, 4))}


def combinations(chosen: dict[tuple[str, int], list[Case]]) -> int:
    """How many of them are computed, and not refused."""
    return sum(has_heads(case, ranks) for (_, ranks), cases in chosen.items() for case in set(cases))


@pytest.mark.skipif(not NATIVE, reason="the native kernels are not installed")
def test_there_are_enough_combinations() -> None:
    assert combinations(SOME) >= 300
    assert combinations(MANY) >= 5000


@pytest.mark.parametrize(("transport", "ranks"), SOME)
def test_the_same_bits(transport: str, ranks: int) -> None:
    check(ranks, transport, SOME[transport, ranks])


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("transport", "ranks"), MANY)
def test_the_same_bits_of_many(transport: str, ranks: int) -> None:
    check(ranks, transport, MANY[transport, ranks])


@pytest.mark.parametrize("kernel", available())
def test_the_same_bits_on_any_number_of_threads_of_a_rank(kernel: str) -> None:
    for threads in (2, 3):
        assert expected(kernel, "causal", "float32", threads) == expected(kernel, "causal", "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(dtype: str) -> None:
    check(3, "threads", [Case(kernel, "zigzag", "ring", "causal", dtype=dtype) for kernel in available()])


@pytest.mark.parametrize("kernel", available())
@pytest.mark.parametrize("mask", MASKS)
def test_one_rank_is_right(kernel: str, mask: str) -> None:
    q, k, v, d_out = tensors(kernel)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = shardsum.attention(*inputs, reproducible=True, kernel=kernel, **options(mask, q))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = shardsum.attention(*exact, kernel="reference", **options(mask, q))
    found = (out.detach(), *torch.autograd.grad(out, inputs, d_out))
    expected = (wanted.detach(), *torch.autograd.grad(wanted, exact, d_out.double()))
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(a, b, 2e-6, name)


def decoded(comm: Communicator, kernel: str, prompt: int, sharded: bool) -> list[str]:
    """Digests of what attention gives the tokens behind a prompt, one by one; the same to the bit all at once."""
    q, k, v, _ = tensors(kernel)
    cache = KVCache(layers=1, kv_heads=k.shape[1], head_dim=16, v_dim=24, comm=comm, reproducible=True)
    if sharded:
        of_prompt = [x[:, :, :prompt] for x in (k, v)]
        parts = [shardsum.shard(x, comm=comm, layout="zigzag", reproducible=True) for x in of_prompt]
        cache.append(0, *parts, layout="zigzag")
    else:
        cache.append(0, k[:, :, :prompt], v[:, :, :prompt])
    found = []
    for step in range(5):
        at = slice(prompt + step, prompt + step + 1)
        cache.append(0, k[:, :, at], v[:, :, at])
        found.append(cache.attend(0, q[:, :, step : step + 1], kernel=kernel))
    assert digest(torch.cat(found, dim=2)) == digest(cache.attend(0, q[:, :, :5], kernel=kernel))
    return [digest(x) for x in found]


@pytest.mark.parametrize("kernel", available())
@pytest.mark.parametrize("prompt", [253, 767])
def test_a_token_has_the_same_bits_decoded_and_prefilled(kernel: str, prompt: int) -> None:
    alone = decoded(shardsum.connect(), kernel, prompt, False)
    for ranks, sharded in itertools.product((2, 3), (False, True)):
        assert launch(decoded, ranks, "threads", (kernel, prompt, sharded)) == [alone] * ranks


@pytest.mark.parametrize("kernel", available())
def test_a_row_has_the_same_bits_in_any_batch(kernel: str) -> None:
    q, k, v, d_out = tensors(kernel)
    other = [torch.randn_like(x) for x in (q, k, v)]

    def bits(inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = shardsum.attention(*inputs, causal=True, kernel=kernel, reproducible=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]

    alone = bits([q, k, v], d_out)
    both = bits([torch.cat([a, b]) for a, b in zip(other, (q, k, v), strict=True)], torch.cat([d_out, d_out]))
    assert [digest(x[1]) for x in both] == [digest(x[0]) for x in alone]


def bits_of(comm: Communicator, strategy: str, kernel: str, what: str) -> list[str] | None:
    """Digests of what is rare: on every rank the same."""
    q, k, v, d_out = (x.clone() for x in tensors(kernel))
    place: dict[str, Any] = {"comm": comm, "layout": "zigzag", "reproducible": True}
    rest: dict[str, Any] = {"causal": True, "kernel": kernel, "strategy": strategy}
    if what == "a bias":
        if strategy not in ("all_gather", "ring"):
            return None
        bias = torch.randn(1, 1, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(3))
        rest["bias"] = shardsum.shard(bias, **place)
    if what == "a weight of zero times infinity":
        k[:, :, 10], v[:, :, 10] = -torch.inf, torch.inf
        rest["key_range"] = ([10], [300])
        q = q.abs()
    if what == "subnormal gradients":
        d_out *= 1e-43
    replicated = what == "replicated queries"
    own = [x if replicated and i == 0 else shardsum.shard(x, **place) for i, x in enumerate((q, k, v))]
    own = [x.requires_grad_() for x in own]
    try:
        out = shardsum.attention(*own, **place, **rest, q_replicated=replicated)
    except shardsum.Unsupported:
        assert strategy in ("ulysses", "hybrid")
        return None
    grads = torch.autograd.grad(out, own, d_out if replicated else shardsum.shard(d_out, **place))
    found = [(out.detach(), replicated), *zip(grads, (replicated, False, False), strict=True)]
    return [digest(x if whole else shardsum.unshard(x, **place)) for x, whole in found]


@pytest.mark.filterwarnings("ignore::shardsum.NonFiniteWarning")
@pytest.mark.parametrize("kernel", [name for name in ("native", "eager") if name in available()])
@pytest.mark.parametrize(
    "what", ["a bias", "a weight of zero times infinity", "subnormal gradients", "replicated queries"]
)
def test_what_is_rare(what: str, kernel: str) -> None:
    alone = bits_of(shardsum.connect(), "all_gather", kernel, what)
    for strategy in STRATEGIES:
        for found in launch(bits_of, 2, "threads", (strategy, kernel, what), deadline=60):
            assert found in (None, alone), strategy


def attended(comm: Communicator, strategy: str) -> str:
    q, k, v, _ = (x.bfloat16() for x in tensors("eager"))
    kinds: dict[str, Any] = {"dtype": torch.bfloat16, "quantize": "int8", "reproducible": True}
    cache = KVCache(layers=1, kv_heads=1, head_dim=16, v_dim=24, comm=comm, **kinds)
    cache.append(0, k, v)
    return digest(cache.attend(0, q[:, :, :3], scale=torch.tensor(0.25), strategy=strategy))


@pytest.mark.parametrize("strategy", ["all_reduce", "all_gather", "ring"])
def test_int8_is_read_alike(strategy: str) -> None:
    assert launch(attended, 2, "threads", (strategy,)) == [attended(shardsum.connect(), "all_gather")] * 2


def test_a_cache_refuses_a_cut_segment_at_once() -> None:
    def refused(comm: Communicator) -> None:
        cache = KVCache(layers=1, kv_heads=1, head_dim=8, comm=comm, reproducible=True)
        k = torch.randn(1, 1, 300, 8)
        with pytest.raises(shardsum.Unsupported, match="whole segments of 256"):
            cache.append(0, k, k, layout="contiguous")

    launch(refused, 2, "threads", deadline=20)


def test_a_cut_segment_is_refused_by_every_rank() -> None:
    def refused(comm: Communicator) -> None:
        lengths = [300, 468, 332]  # the last rank's are whole segments
        k = torch.randn(1, 1, lengths[comm.rank], 8)
        with pytest.raises(shardsum.Unsupported, match="whole segments of 256 positions on every rank"):
            shardsum.attention(k, k, k, comm=comm, reproducible=True)

    launch(refused, 3, "threads", deadline=20)


# Lines of the tree, each with one that looks as right.
CHANGED: dict[str, tuple[Any, str, str, str]] = {
    "each rank's partial result first": (
        Forest,
        "union",
        "self.of({**self.nodes, **other.nodes})",
        "self.of({Node(3, 0): self._combine(self.total(), other.total())})",
    ),
    "a node pairs with the next": (Forest, "_climb", "place=node.place ^ 1", "place=node.place + 1"),
    "a node waits for no sibling": (Forest, "_climb", "whole or sibling.first >= self._count", "True"),
    "a sibling is left out": (
        Forest,
        "_climb",
        "self._combine(found.pop(node), found.pop(sibling))",
        "found.pop(node)",
    ),
    "gradients of one segment and of all others": (
        along_tree,
        "_halves",
        "some.start + (SEGMENT << ((segments(_size(some)) - 1).bit_length() - 1))",
        "some.start + SEGMENT",
    ),
}


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_line_of_the_tree_is_seen(change: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, name, line, other = CHANGED[change]
    source = textwrap.dedent(inspect.getsource(getattr(home, name)))
    assert source.count(line) == 1
    kernel = "native" if NATIVE and home is not along_tree else "eager"  # native sums gradients in C++, without it
    cases = [Case(kernel, "contiguous", strategy, "causal")]
    check(2, "threads", cases)
    changed: dict[str, Any] = {}
    exec(source.replace(line, other), vars(sys.modules[getattr(home, name).__module__]), changed)
    monkeypatch.setattr(home, name, changed[name])
    for keeps in (tree.cover, placement._contiguous):  # what it keeps is the unchanged tree's
        monkeypatch.setattr(placement, keeps.__name__, keeps.__wrapped__)  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules[__name__], "expected", functools.cache(expected.__wrapped__))
    # Other bits; or nodes that are not those which the ranks count on.
    with pytest.raises((AssertionError, RuntimeError), match=r"Case|size of tensor"):
        check(2, "threads", cases)
