"""The KV cache: decode and prefill against attention over the whole sequence, on every rank."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from shardsum import KVCache, Layout, Mismatch, Unsupported, connect, launch, shard
from shardsum.comm import Communicator
from shardsum.prepared import PreparedCall
from shardsum.prepared_calls import CALLS

from . import dense
from .tolerances import OF_16_BITS, STATE, assert_close

BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, V_DIM = 2, 6, 2, 5, 7
ranks = pytest.mark.parametrize("size", [1, 2, 3, 5])
any_kind = pytest.mark.parametrize("quantize", [None, "int8"])


def tokens(count: int, seed: int = 0, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values that int8 holds exactly, so that any cache gives them back."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, Q_HEADS, count, HEAD_DIM, generator=generator)
    k, v = (whole_numbers(generator, batch, KV_HEADS, count, dim) for dim in (HEAD_DIM, V_DIM))
    return q, k, v


def whole_numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Rows of whole numbers up to 127, one of which that is, times a power of two."""
    numbers = torch.randint(-127, 128, shape, generator=generator).float()
    numbers[..., 0] = 127
    return numbers * 2.0 ** torch.randint(-7, -5, (*shape[:3], 1), generator=generator)


def new_cache(comm: Communicator, layers: int = 1, quantize: str | None = None) -> KVCache:
    return KVCache(comm=comm, layers=layers, kv_heads=KV_HEADS, head_dim=HEAD_DIM, v_dim=V_DIM, quantize=quantize)


def expect(
    quantize: str | None,
    found: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: slice | Tensor = slice(None),
    **mask: Any,
) -> None:
    """The attention of the last queries over all keys, of which `rows` are compared."""
    seen = dense.visible(q.shape[2], k.shape[2], q.shape[0], causal=True, **mask)
    tolerance = STATE[torch.float32] if quantize is None else OF_16_BITS
    assert_close(found, dense.attention(q, k, v, seen)[0][:, :, rows], tolerance)


def prefill_then_decode(comm: Communicator, layout: str, quantize: str | None) -> None:
    q, k, v = tokens(41)
    cache, prompt, chunk = new_cache(comm, quantize=quantize), 23, 31
    kind = Layout.weighted([1 + rank for rank in range(comm.size)]) if layout == "weighted" else layout
    for start, end in ((0, prompt), (prompt, chunk)):  # prefill in two chunks
        part = [shard(x[:, :, start:end], comm=comm, layout=kind) for x in (q, k, v)]
        cache.append(0, part[1], part[2], layout=kind)
        out = cache.attend(0, part[0], q_replicated=False, layout=kind)
        positions = as_positions(kind, end - start, comm)
        expect(quantize, out, q[:, :, start:end], k[:, :, :end], v[:, :, :end], positions)
    for step in range(chunk, 41):
        cache.append(0, k[:, :, step : step + 1], v[:, :, step : step + 1])
        assert len(cache) == step + 1
        out = cache.attend(0, q[:, :, step : step + 1], window=(17, 0))
        expect(quantize, out, q[:, :, step : step + 1], k[:, :, : step + 1], v[:, :, : step + 1], window=(17, 0))


def as_positions(layout: str | Layout, length: int, comm: Communicator) -> Tensor:
    layout = Layout(layout) if isinstance(layout, str) else layout
    return layout.positions(length, comm.rank, comm.size)


@ranks
@any_kind
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "weighted"])
def test_prefill_in_chunks_then_decode(size: int, layout: str, quantize: str | None) -> None:
    launch(prefill_then_decode, ranks=size, transport="threads", args=(layout, quantize))


def sequences_of_different_lengths(comm: Communicator, strategy: str, quantize: str | None) -> None:
    q, k, v = tokens(30)
    cache = new_cache(comm, quantize=quantize)
    cache.append(0, k[:, :, :9], v[:, :, :9], lengths=[9, 4])  # sequence 1 has 4 valid tokens
    cache.append(0, k[:, :, 9:12], v[:, :, 9:12], lengths=[1, 3])
    cache.append(0, k[:, :, 12:13], v[:, :, 12:13])
    assert cache.lengths(0).tolist() == [11, 8]
    assert len(cache) == 11
    out = cache.attend(0, q[:, :, 10:13], strategy=strategy)
    for row, index in enumerate(([*range(9), 9, 12], [*range(4), 9, 10, 11, 12])):
        one = slice(row, row + 1)
        expect(quantize, out[one], q[one, :, 10:13], k[one][:, :, index], v[one][:, :, index])
    # And padding in front on top of that.
    out = cache.attend(0, q[:, :, 10:13], strategy=strategy, key_range=([2, 0], [99, 99]))
    index = [*range(9), 9, 12]
    expect(quantize, out[:1], q[:1, :, 10:13], k[:1][:, :, index], v[:1][:, :, index], key_range=([2], [99]))


@ranks
@any_kind
@pytest.mark.parametrize("strategy", ["all_reduce", "all_gather", "ring"])
def test_sequences_advance_separately(size: int, strategy: str, quantize: str | None) -> None:
    launch(sequences_of_different_lengths, ranks=size, transport="threads", args=(strategy, quantize))


def crop_reorder_reset(comm: Communicator, quantize: str | None) -> None:
    q, k, v = tokens(40)
    cache = new_cache(comm, quantize=quantize)
    cache.append(0, *(shard(x[:, :, :20], comm=comm, layout="zigzag") for x in (k, v)), layout="zigzag")
    cache.crop(13)
    assert len(cache) == 13
    cache.append(0, k[:, :, 20:25], v[:, :, 20:25])
    kept = [*range(13), *range(20, 25)]
    expect(quantize, cache.attend(0, q[:, :, 24:25]), q[:, :, 24:25], k[:, :, kept], v[:, :, kept])
    cache.reorder([1, 1, 0])
    order = torch.tensor([1, 1, 0])
    expect(
        quantize,
        cache.attend(0, q[order, :, 24:25]),
        q[order, :, 24:25],
        k[order][:, :, kept],
        v[order][:, :, kept],
    )
    cache.reset()
    assert len(cache) == 0
    assert cache.bytes_held == 0
    assert torch.equal(cache.attend(0, q[:, :, :1]), torch.zeros(BATCH, Q_HEADS, 1, V_DIM))
    cache.append(0, k[:, :, :2], v[:, :, :2])
    expect(quantize, cache.attend(0, q[:, :, 1:2]), q[:, :, 1:2], k[:, :, :2], v[:, :, :2])


@ranks
@any_kind
def test_crop_reorder_and_reset(size: int, quantize: str | None) -> None:
    launch(crop_reorder_reset, ranks=size, transport="threads", args=(quantize,))


def held_bytes(comm: Communicator, quantize: str | None) -> int:
    cache = new_cache(comm, layers=3, quantize=quantize)
    _, k, v = tokens(4000)
    for layer in range(3):
        cache.append(layer, *(shard(x, comm=comm, layout="zigzag") for x in (k, v)), layout="zigzag")
    for _ in range(70):
        for layer in range(3):
            cache.append(layer, k[:, :, :1], v[:, :, :1])
    return cache.bytes_held


@any_kind
def test_memory_falls_as_one_over_the_ranks(quantize: str | None) -> None:
    whole = (
        3 * BATCH * KV_HEADS * 4070 * (4 * (HEAD_DIM + V_DIM) if quantize is None else HEAD_DIM + V_DIM + 2 * 4)
    )
    for size in (1, 2, 4):
        for held in launch(held_bytes, ranks=size, transport="threads", args=(quantize,)):
            assert whole / size * 0.999 <= held <= whole / size * 1.05


@any_kind
@pytest.mark.parametrize("length", [0, 1, 97])
def test_a_crop_gives_memory_back(length: int, quantize: str | None) -> None:
    q, k, v = tokens(120)

    def run(comm: Communicator) -> tuple[int, int]:
        cache = new_cache(comm, quantize=quantize)
        for _ in range(30):
            cache.append(0, k[:, :, :100], v[:, :, :100])
        cache.crop(2990)
        before = cache.bytes_held
        cache.crop(length)
        after = cache.bytes_held
        cache.append(0, k[:, :, 100:103], v[:, :, 100:103])
        kept = [*range(length), *range(100, 103)]
        expect(quantize, cache.attend(0, q[:, :, 103:104]), q[:, :, 103:104], k[:, :, kept], v[:, :, kept])
        return before, after

    for size in (1, 2):
        for before, after in launch(run, size, "threads"):
            assert after < before / 10


def refusals(comm: Communicator) -> list[str]:
    _, k, v = tokens(6)
    cache = new_cache(comm, layers=2)
    messages = []

    def refused(kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as caught:
            call()
        messages.append(str(caught.value))

    refused(ValueError, lambda: cache.append(0, k[:, :1], v))
    refused(ValueError, lambda: cache.append(0, k.double(), v.double()))
    refused(ValueError, lambda: cache.append(0, k, v[:, :, :2]))
    refused(ValueError, lambda: cache.append(0, k, v, lengths=[7, 0]))
    # Rank 1 brings another head count: every rank hears of it, none waits.
    wrong = k[:, :1] if comm.rank == 1 else k
    refused(ValueError, lambda: cache.append(0, wrong, v, layout="contiguous"))
    refused(Mismatch, lambda: cache.append(comm.rank, k, v, layout="contiguous"))
    refused(Mismatch, lambda: cache.append(0, k, v, layout="contiguous", lengths=[99 if comm.rank else 5, 5]))
    cache.append(0, k, v, lengths=[6, 2])
    refused(Unsupported, lambda: cache.append(0, k, v, layout="contiguous"))
    # A rank that appended more than the others is found out, not believed.
    cache.append(1, k[:, :, : 1 + comm.rank], v[:, :, : 1 + comm.rank])
    refused(Mismatch, lambda: cache.attend(1, torch.randn(BATCH, Q_HEADS, 1, HEAD_DIM)))
    return messages


def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    first, second = launch(refusals, ranks=2, transport="threads")
    assert first[0].startswith("k must be (2, 2, new, 5) in torch.float32, as in the cache: got (2, 1, 6, 5)")
    assert first[4].startswith("rank 1 could not take part: ValueError: k must be")
    assert first[5] == second[5] == "layer must be the same on every rank: got 0 on rank 0, 1 on rank 1."
    assert (
        first[6] == second[6] == "lengths must be the same on every rank: got [5, 5] on rank 0, [99, 5] on rank 1."
    )
    assert "Append them without layout" in first[7]
    assert first[8] == second[8]
    assert "lengths" in first[8]


def test_ranks_in_different_layers_are_told() -> None:
    def run(comm: Communicator) -> str:
        cache = KVCache(comm=comm, layers=2, kv_heads=1, head_dim=2)
        for layer in range(2):
            cache.append(layer, torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
        with pytest.raises(Mismatch) as caught:
            cache.attend(comm.rank, torch.ones(1, 1, 1, 2))
        return str(caught.value)

    messages = launch(run, ranks=2, transport="threads")
    assert messages[0] == messages[1]
    assert "KVCache.attend in layer 0" in messages[0]


def test_what_a_cache_refuses() -> None:
    cache = KVCache(comm=connect("single"), layers=1, kv_heads=1, head_dim=2)
    with pytest.raises(ValueError, match="length must be at least 0: got -1"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="layer must be one of the cache's 1: got 1"):
        cache.append(1, torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    with pytest.raises(ValueError, match="at least one sequence"):
        cache.append(0, torch.ones(0, 1, 3, 2), torch.ones(0, 1, 3, 2))
    x = torch.ones(2, 1, 3, 2)
    with pytest.raises(ValueError, match="k must be a torch tensor: got NoneType"):
        cache.append(0, None, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lengths must be whole numbers"):
        cache.append(0, x, x, lengths=[1.5, 2.0])  # type: ignore[list-item]
    cache.append(0, x, x)
    for order, message in (
        ([0.5], "whole numbers"),
        ([0, 2], "numbers of the 2"),
        ([-1], "of the 2"),
        ([], "one at"),
    ):
        with pytest.raises(ValueError, match=f"sequences must be .*{message}"):
            cache.reorder(order)  # type: ignore[arg-type]
    for wrong, message in (
        ({"layers": 0}, "layers must be at least 1: got 0"),
        ({"head_dim": 2.0}, "head_dim must be a whole number"),
        ({"dtype": torch.int32}, "dtype must be float64, float32, bfloat16 or float16: got torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            KVCache(**({"layers": 1, "kv_heads": 1, "head_dim": 2} | wrong))  # type: ignore[arg-type]


def test_positions_that_no_sequence_has_any_more_may_lie_elsewhere() -> None:
    def run(comm: Communicator) -> None:
        q, k, v = tokens(9)
        cache = new_cache(comm)
        cache.append(0, k[:, :, :5], v[:, :, :5], lengths=[3, 5])
        cache.reorder([0, 0])
        cache.append(0, *(shard(x[:, :, 5:], comm=comm) for x in (k, v)), layout="contiguous")
        held = [torch.cat([x[:1, :, :3].expand(2, -1, -1, -1), x[:, :, 5:]], dim=2) for x in (k, v)]
        expect(None, cache.attend(0, q[:, :, 8:]), q[:, :, 8:], *held)

    launch(run, ranks=2, transport="threads")


class Told:
    """The keys and values of each sequence of each layer, as they were given to a cache."""

    def __init__(self, layers: int) -> None:
        nothing = [(torch.empty(KV_HEADS, 0, HEAD_DIM), torch.empty(KV_HEADS, 0, V_DIM)) for _ in range(BATCH)]
        self.held = [list(nothing) for _ in range(layers)]

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: list[int]) -> None:
        rows = zip(self.held[layer], k, v, lengths, strict=True)
        self.held[layer] = [
            (torch.cat([old_k, new_k[:, :n]], 1), torch.cat([old_v, new_v[:, :n]], 1))
            for (old_k, old_v), new_k, new_v, n in rows
        ]

    def crop(self, length: int) -> None:
        self.held = [[(k[:, :length], v[:, :length]) for k, v in rows] for rows in self.held]

    def reorder(self, order: list[int]) -> None:
        self.held = [[rows[sequence] for sequence in order] for rows in self.held]


def attended_after_every_change(comm: Communicator, seed: int, changes: int) -> None:
    """Random changes of a cache, each followed by the same calls of `attend`: nothing is remembered too long."""
    draw, layers = random.Random(seed), 3
    cache, told = new_cache(comm, layers), Told(layers)
    q, k, v = tokens(400, seed)
    start = torch.zeros(BATCH, dtype=torch.int64)
    at = 0

    def check(layer: int, q_len: int) -> None:
        queries = q[:, :, at : at + q_len]
        start[at % BATCH] = draw.randrange(3)  # in place: the same tensor, but another padding
        range_of_row = [(int(first), 99) for first in start]
        masks: list[tuple[dict[str, Any], Any]] = [
            ({}, lambda row: {}),
            ({"window": (2, 0)}, lambda row: {"window": (2, 0)}),
            (
                {"key_range": (start, [99] * BATCH)},
                lambda row: {"key_range": tuple([x] for x in range_of_row[row])},
            ),
        ]
        for given, mask in masks:
            for replicated in (True, False):
                rows = queries if replicated else shard(queries, comm=comm)
                positions = slice(None) if replicated else as_positions("contiguous", q_len, comm)
                out = cache.attend(layer, rows, q_replicated=replicated, **given)
                for row, (row_k, row_v) in enumerate(told.held[layer]):
                    one = slice(row, row + 1)
                    expect(None, out[one], queries[one], row_k[None], row_v[None], positions, **mask(row))

    for _ in range(changes):
        kind = draw.choice(["one", "some", "sharded", "crop", "reorder", "reset"])
        even = len({x[0].shape[1] for rows in told.held for x in rows}) == 1
        new = 1 if kind == "one" else draw.randint(1, 5)
        lengths = [draw.randint(1, new) for _ in range(BATCH)] if kind == "some" else [new] * BATCH
        if kind == "crop" and len(cache):
            length = draw.randint(1, len(cache))
            cache.crop(length)
            told.crop(length)
        elif kind == "reorder" and len(cache):
            order = [draw.randrange(BATCH) for _ in range(BATCH)]
            cache.reorder(order)
            told.reorder(order)
        elif kind == "reset":
            cache.reset()
            told = Told(layers)
        for layer in range(layers):
            new_k, new_v = (x[:, :, at : at + new] for x in (k, v))
            if kind == "sharded" and even:
                parts = (shard(x, comm=comm, layout="zigzag") for x in (new_k, new_v))
                cache.append(layer, *parts, layout="zigzag")
            else:
                cache.append(layer, new_k, new_v, lengths=lengths if kind == "some" else None)
            told.append(layer, new_k, new_v, lengths)
            check(layer, 1)
            check(draw.randrange(layer + 1), 2)
        at += new


@pytest.mark.parametrize(
    ("size", "seed", "changes"),
    [(1, 0, 12), (3, 0, 7), *(pytest.param(3, seed, 20, marks=pytest.mark.nightly) for seed in (1, 2, 3))],
)
def test_nothing_is_remembered_too_long(size: int, seed: int, changes: int) -> None:
    launch(attended_after_every_change, ranks=size, transport="threads", args=(seed, changes), deadline=10.0)


def test_layers_whose_longest_sequences_are_equal_are_no_equal_calls() -> None:
    q, k, v = tokens(5)
    cache = new_cache(connect("single"), layers=2)
    for layer, lengths in enumerate(([5, 2], [2, 5])):
        cache.append(layer, k, v, lengths=lengths)
        out = cache.attend(layer, q[:, :, 4:])
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            expect(None, out[one], q[one, :, 4:], k[one, :, :length], v[one, :, :length])


def sharded_anew(comm: Communicator) -> None:
    q, k, v = tokens(12)
    cache = new_cache(comm)
    for layout in ("zigzag", "contiguous", "striped"):  # positions of the same lengths lie elsewhere each time
        cache.crop(0)
        cache.append(0, *(shard(x, comm=comm, layout=layout) for x in (k, v)), layout=layout)
        expect(None, cache.attend(0, q[:, :, 9:], window=(4, 0)), q[:, :, 9:], k, v, window=(4, 0))


@pytest.mark.parametrize("size", [2, 3])
def test_where_keys_lay_before_a_crop_is_forgotten(size: int) -> None:
    launch(sharded_anew, ranks=size, transport="threads", deadline=10.0)


def reordered_by_one_rank(comm: Communicator) -> str:
    q, k, v = tokens(3)
    cache = new_cache(comm)
    cache.append(0, k, v)
    cache.attend(0, q[:, :, 2:])
    if comm.rank == 1:
        cache.reorder([1, 0])
    with pytest.raises(Mismatch) as caught:
        cache.attend(0, q[:, :, 2:])
    return str(caught.value)


def test_a_rank_that_reordered_alone_is_found_out_after_equal_calls() -> None:
    first, second = launch(reordered_by_one_rank, ranks=2, transport="threads", deadline=10.0)
    assert first == second
    assert "reordered must be the same on every rank" in first


def test_an_option_that_changed_in_place_is_looked_at_again() -> None:
    """One number among so many that its tensor is printed without it."""
    batch, row = 1200, 600
    q, k, v = tokens(6, batch=batch)
    cache, start = new_cache(connect("single")), torch.zeros(batch, dtype=torch.int64)
    cache.append(0, k, v)
    one = slice(row, row + 1)
    for first in (0, 3):
        start[row] = first
        out = cache.attend(0, q[:, :, 5:], key_range=(start, [6] * batch))
        expect(None, out[one], q[one, :, 5:], k[one, :, first:], v[one, :, first:])


def test_calls_of_other_sizes_are_other_calls() -> None:
    q, k, v = tokens(6)
    cache = new_cache(connect("single"))
    cache.append(0, k, v)
    for rows in (1, 3, 1):
        expect(None, cache.attend(0, q[:, :, 6 - rows :]), q[:, :, 6 - rows :], k, v)
    # The same shape in another dtype is refused, as it would be at first.
    with pytest.raises(ValueError, match="one dtype"):
        cache.attend(0, q[:, :, 5:].double())


def test_the_layers_of_a_step_share_what_they_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PreparedCall] = []

    def counted(*arguments: Any) -> PreparedCall:
        made.append(PreparedCall(*arguments))
        return made[-1]

    monkeypatch.setattr("shardsum.kv.cache.PreparedCall", counted)
    q, k, v = tokens(20)
    cache = new_cache(connect("single"), layers=3)
    for step in range(20):
        for layer in range(3):
            cache.append(layer, *(x[:, :, step : step + 1] for x in (k, v)))
            cache.attend(layer, q[:, :, step : step + 1], window=(5, 0))
            # Equal to another, but not alike: refused, whatever was kept.
            with pytest.raises(ValueError, match="window must be"):
                cache.attend(layer, q[:, :, step : step + 1], window=(5.0, 0))  # type: ignore[arg-type]
    assert len(made) == 20


def test_a_call_with_gradients_is_another() -> None:
    q, k, v = tokens(3)
    cache = new_cache(connect("single"))
    cache.append(0, k, v)
    with torch.no_grad():
        cache.attend(0, q.requires_grad_())
    assert not cache.attend(0, q.detach()).requires_grad
    cache.attend(0, q).sum().backward()
    assert q.grad is not None
    assert float(q.grad.abs().sum()) > 0


def decoded_in_many_ways(comm: Communicator, plain: bool) -> list[Tensor]:
    """A few steps of two layers, each with more kinds of calls than are remembered; `plain`: none is."""
    q, k, v = tokens(20)
    cache = new_cache(comm, layers=2)
    if plain:
        cache._calls.get = lambda key, options, make: make()  # type: ignore[method-assign]
    outs = []
    for step in range(12, 20):
        new = slice(0 if step == 12 else step - 1, step)
        for layer in range(2):
            cache.append(layer, k[:, :, new], v[:, :, new])
            last = q[:, :, step - 1 : step]
            outs += [cache.attend(layer, last, window=(left, 0)) for left in range(CALLS + 2)]
        if step == 15:
            cache.reorder([1, 0])
        if step == 17:
            cache.crop(14)
    return outs


@pytest.mark.parametrize("size", [1, 2, *(pytest.param(size, marks=pytest.mark.nightly) for size in (3, 5))])
def test_calls_that_are_remembered_give_what_calls_made_anew_give(size: int) -> None:
    found, expected = (launch(decoded_in_many_ways, size, "threads", (plain,)) for plain in (False, True))
    for ours, plain in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reproducible": True}, Unsupported, r"takes no reproducible: KVCache\(\.\.\., reproducible=True\)"),
        ({"return_bound": True}, Unsupported, r"takes no return_bound: only attention\(\.\.\.\) bounds"),
        ({"comm": None}, Unsupported, "takes no comm: the cache has its own"),
        ({"lengths": [2]}, ValueError, "takes no lengths. It takes the arguments of attention"),
        ({"reordered": 1}, ValueError, "takes no reordered"),
        ({"windows": (1, 0)}, ValueError, "takes no windows"),
        ({"q_start": 1}, ValueError, "q_start: the queries of sequences of different lengths"),
    ],
)
def test_an_option_that_a_cache_does_not_have_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = torch.ones(2, 1, 3, 2)

    def run(comm: Communicator) -> None:
        cache = KVCache(comm=comm, layers=1, kv_heads=1, head_dim=2)
        cache.append(0, x, x, lengths=[3, 1])
        for _ in range(2):
            with pytest.raises(error, match=message):
                cache.attend(0, x[:, :, :1], **options)
        assert cache.attend(0, x[:, :, :1]).tolist() == [[[[1.0, 1.0]]]] * 2

    launch(run, 2, "threads")
