"""Random calls of the public functions with odd and hostile arguments, on one rank and on all.

Each is computed as by one process, or refused by every rank with an error of ours, soon; and the next call works.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import config
from torch import Tensor

import shardsum
from shardsum import AttentionState, KVCache, Layout, Mismatch, launch
from shardsum.comm import Communicator

from .test_tensor_kinds import KINDS, normal

RANKS, SECONDS = 2, 2.0
Options = dict[str, Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore::shardsum.NonFiniteWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Without the tests' own checks of types."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def qkv(comm: Communicator, *names: str) -> Options:
    whole = {name: normal(2, 4 if name == "q" else 2, 6, 4, seed=seed) for seed, name in enumerate(names)}
    return {name: shardsum.shard(x, comm=comm) for name, x in whole.items()}


def attend(comm: Communicator, **options: Any) -> Any:
    return shardsum.attention(comm=comm, **(qkv(comm, "q", "k", "v") | options))


def decode(comm: Communicator, **options: Any) -> Any:
    """One token over a cache of five."""
    cache = KVCache(comm=comm, layers=1, kv_heads=2, head_dim=4)
    given = {"q": normal(2, 4, 1, 4), "k": normal(2, 2, 5, 4), "v": normal(2, 2, 5, 4), "layer": 0} | options
    cache.append(0, given.pop("k"), given.pop("v"))
    return cache.attend(**given)


def append_shards(comm: Communicator, **options: Any) -> Any:
    cache = KVCache(comm=comm, layers=1, kv_heads=2, head_dim=4)
    cache.append(**({"layer": 0, "layout": "contiguous"} | qkv(comm, "k", "v") | options))
    return cache.attend(0, normal(2, 4, 1, 4))


def weigh(comm: Communicator, **options: Any) -> Any:
    weights, values = (shardsum.shard(normal(6, 3, seed=seed), comm=comm, dim=0) for seed in (0, 1))
    return shardsum.weighted_sum(comm=comm, **({"weights": weights.t(), "values": values} | options))


def value(comm: Communicator, **options: Any) -> Any:
    given = {"values": shardsum.shard(normal(6, 3), comm=comm, dim=0), "kind": "mean"} | options
    return shardsum.global_value(comm=comm, **given)


def whole(comm: Communicator, **options: Any) -> Any:
    return shardsum.unshard(comm=comm, **({"x": shardsum.shard(normal(1, 2, 6, 4), comm=comm)} | options))


CALLS: dict[Callable[..., Any], tuple[str, ...]] = {
    attend: (
        *("q", "k", "v", "layout", "strategy", "kernel", "collective", "causal", "window", "cu_seqlens"),
        *(
            "cu_seqlens_k",
            "key_range",
            "prefix",
            "sink_tokens",
            "key_intervals",
            "scale",
            "softcap",
            "alibi_slopes",
        ),
        *("sinks", "bias", "dropout_p", "seed", "q_replicated", "q_start", "q_len", "kv_len", "reproducible"),
        *("return_state", "return_bound"),
    ),
    decode: ("q", "layer", "causal", "layout", "window", "key_range", "scale", "softcap", "strategy", "sinks"),
    append_shards: ("k", "v", "layout", "lengths", "layer"),
    weigh: ("weights", "values", "collective"),
    value: ("values", "kind", "collective"),
    whole: ("x", "dim", "layout", "reproducible"),
}
# By position in a list, so that the same one is made on every rank.
PLAIN: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (None, "", "x", b"x", 0, 1, 3, -1, 1 << 62, -(1 << 70), True, False)),
    *(lambda value=value: value for value in (0.0, 0.5, -1.5, 1e-45, 1e308, math.nan, math.inf, -math.inf, 1j)),
    *(
        lambda value=value: value
        for value in ((), (1,), (1, 2), (None, None), (-1, -1), (3, 0), (0, 1, 2), ("a", "b"))
    ),
    *([list, lambda: [0, 6], lambda: [0, 3, 12], lambda: [[1]], dict, set, object, lambda: range(3)]),
    *(
        lambda value=value: value
        for value in (Layout("zigzag"), Layout.weighted([1, 2]), Layout.packed([0, 4, 12]))
    ),
    *(
        lambda value=value: value
        for value in ("zigzag", "striped", "ring", "ulysses", "eager", "reference", "tree")
    ),
]
TENSORS: list[Callable[[], Any]] = [
    *(lambda shape=shape: normal(*shape) for shape in ((), (0,), (2,), (4,), (12,), (2, 4, 3, 4), (1, 4, 6, 12))),
    *(lambda shape=shape: normal(*shape) for shape in ((2, 4, 0, 4), (2, 3, 3, 4), (2, 4, 3, 0), (1, 1, 1, 1, 1))),
    *(
        lambda dtype=dtype: normal(2, 2, 3, 4).to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    ),
    *(lambda dtype=dtype: normal(2, 2, 3, 4).to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64)),
    *(lambda shape=shape: torch.arange(math.prod(shape)).view(shape) for shape in ((2,), (3,), (2, 3), (1, 3))),
    lambda: normal(2, 2, 3, 4) * math.nan,
    lambda: normal(2, 2, 3, 4) * 1e38,
    lambda: normal(2, 3, 2, 4).transpose(1, 2),
    lambda: normal(2, 2, 3, 8)[..., ::2],
    lambda: normal(1, 1, 1, 1).expand(2, 2, 3, 4),
    lambda: torch.nn.Parameter(normal(2, 2, 3, 4)),
    *(lambda make=make: make(normal(2, 2, 3, 4)) for make, _ in KINDS.values()),
]


@dataclass(frozen=True)
class Trial:
    """A call with one or two arguments of which nobody thought."""

    seed: int

    @property
    def on_all(self) -> bool:
        return self.seed % 3 == 0

    def options(self, rank: int) -> tuple[Callable[..., Any], Options]:
        """The call, and what this rank passes besides what is usual."""
        draw = random.Random(self.seed)
        call = draw.choice(list(CALLS))
        names = draw.sample(CALLS[call], draw.choice([1, 1, 2]))
        values = {name: draw.choice(PLAIN + TENSORS) for name in names}
        given = self.on_all or rank == self.seed % 3 - 1
        return call, {name: make() for name, make in values.items()} if given else {}


def shown(options: Options) -> str:
    """Without what tensors hold: one whose memory was given back can't be printed."""
    return str({name: (x.shape, x.dtype, type(x)) if isinstance(x, Tensor) else x for name, x in options.items()})


def outcome(call: Callable[..., Any], comm: Communicator, options: Options) -> Any:
    """What the call gives, as tensors, or its error; with what is no error of ours as it is."""
    try:
        found = call(comm, **options)
    except (ValueError, Mismatch) as error:  # Unsupported is a ValueError
        return f"{type(error).__name__}: {error}"
    found = found if isinstance(found, tuple) else (found,)
    flat = [x for one in found for x in ((one.out, one.lse) if isinstance(one, AttentionState) else (one,))]
    return [x.detach().double() for x in flat if isinstance(x, Tensor)]


def expect_as_of_one_process(comm: Communicator, call: Callable[..., Any], options: Options, found: Any) -> None:
    """What this rank was given is its part of what one process is given, where the options mean the same there."""
    other = {"q_replicated", "layout", "lengths", "dim"} & set(options)
    if other or isinstance(found, str) or any(isinstance(x, Tensor) for x in options.values()):
        return
    expected = outcome(call, shardsum.connect("single"), options)
    if isinstance(expected, str):
        return
    for ours, one in zip(found, expected, strict=True):
        part = shardsum.shard(one, comm=comm) if call is attend else one
        torch.testing.assert_close(ours, part, rtol=1e-3, atol=1e-4, equal_nan=True)


def tried(comm: Communicator, seeds: range) -> list[tuple[Any, float]]:
    outcomes = []
    for seed in seeds:
        trial = Trial(seed)
        call, options = trial.options(comm.rank)
        begin = time.monotonic()
        try:
            found = outcome(call, comm, options)
            outcomes.append((found, time.monotonic() - begin))
            if trial.on_all:
                expect_as_of_one_process(comm, call, options, found)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {call.__name__} {shown(options)}") from error
        assert int(shardsum.global_value(torch.ones(3), "count", comm=comm)) == 3 * comm.size
    return outcomes


def check(seeds: range) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = launch(tried, RANKS, "threads", (seeds,), deadline=20.0)
    for seed, outcomes in zip(seeds, zip(*every, strict=True), strict=True):
        call, options = Trial(seed).options(0)
        what = f"seed {seed}: {call.__name__} {shown(options or Trial(seed).options(1)[1])}: {outcomes}"
        assert all(seconds < SECONDS for _, seconds in outcomes), what
        found = [one for one, _ in outcomes]
        refused = [isinstance(one, str) for one in found]
        assert all(refused) or not any(refused), what


@pytest.mark.parametrize("first", [0, 100])
def test_random_calls(first: int) -> None:
    check(range(first, first + 100))


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(1000, 3000, 250))
def test_many_random_calls(first: int) -> None:
    check(range(first, first + 250))
