"""The fixed tree: which nodes there are, and that what meets in it meets in one order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardsum import Layout, Unsupported
from shardsum.placement import Runs
from shardsum.tree import SEGMENT, Forest, Node, cover, segments


def segment_numbers(positions: torch.Tensor, length: int) -> list[int]:
    """The numbers of the segments that make up these positions."""
    nodes = [node for node, _ in Runs.of(positions).spans(length)]
    ends = [min((node.place + 1) << node.level, segments(length)) for node in nodes]
    return [number for node, end in zip(nodes, ends, strict=True) for number in range(node.first, end)]


def joined(a: str, b: str) -> str:
    return f"({a}{b})"


def leaves(count: int) -> Forest[str]:
    return Forest(count, joined, "", {Node(0, segment): chr(97 + segment) for segment in range(count)})


@pytest.mark.parametrize(
    ("count", "tree"),
    [(0, ""), (1, "a"), (2, "(ab)"), (3, "((ab)c)"), (5, "(((ab)(cd))e)"), (7, "(((ab)(cd))((ef)g))")],
)
def test_the_tree(count: int, tree: str) -> None:
    assert leaves(count).total() == tree


@given(st.integers(1, 20), st.lists(st.integers(0, 4), min_size=20, max_size=20), st.permutations(range(5)))
def test_whoever_holds_what_and_in_any_order(count: int, holder: list[int], order: list[int]) -> None:
    parts = [
        Forest(count, joined, "", {Node(0, s): chr(97 + s) for s in range(count) if holder[s] == rank})
        for rank in order
    ]
    found = parts[0]
    for part in parts[1:]:
        found = found.union(part)
    assert found.total() == leaves(count).total()
    assert len(found.nodes) == 1


@given(st.integers(1, 20), st.sets(st.integers(0, 19)))
def test_what_nobody_has_is_empty(count: int, missing: set[int]) -> None:
    nodes = {Node(0, s): chr(97 + s) for s in range(count) if s not in missing}

    def expected(first: int, size: int) -> str:
        if size == 1:
            return nodes.get(Node(0, first), "")
        left, right = expected(first, size // 2), expected(first + size // 2, size // 2)
        return joined(left, right) if left and right else left or right

    assert Forest(count, joined, "", nodes).total() == expected(0, 1 << (count - 1).bit_length())


def test_parts_come_in_their_order() -> None:
    nodes = {Node(0, s, part): f"{'ab'[s]}{part}" for s, part in itertools.product(range(2), (1, 0))}
    assert Forest(2, joined, "", nodes).total() == "((a0b0)(a1b1))"


@given(st.integers(0, 5000), st.integers(1, 9), st.sampled_from(["contiguous", "zigzag", "striped"]))
def test_shards_are_whole_segments(length: int, size: int, name: str) -> None:
    shards = [Layout(name).positions(length, rank, size, SEGMENT) for rank in range(size)]
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(length))
    held = [segment_numbers(shard, length) for shard in shards]
    assert sorted(itertools.chain(*held)) == list(range(segments(length)))
    assert max(map(len, held)) - min(map(len, held)) <= (2 if name == "zigzag" else 1)
    for shard in shards:
        ends = 0
        for node, some in Runs.of(shard).spans(length):
            assert some.start == ends
            assert shard[some].tolist() == list(
                range(node.first * SEGMENT, node.first * SEGMENT + some.stop - some.start)
            )
            ends = some.stop
        assert ends == len(shard)
    placement = Layout(name).placement(length, size, SEGMENT)
    assert placement.node_counts.tolist() == [len(placement.runs(rank).spans(length)) for rank in range(size)]


def test_few_nodes_for_a_contiguous_shard() -> None:
    for first, end in itertools.combinations(range(40), 2):
        assert len(cover(tuple(range(first, end)), 40)) <= 2 * (end - first).bit_length()


def test_a_segment_that_is_cut_is_refused() -> None:
    with pytest.raises(Unsupported, match="whole segments of 256"):
        segment_numbers(torch.arange(300), 1000)


@given(st.data(), st.integers(1, 1500))
def test_any_positions_are_whole_segments_or_refused(data: st.DataObject, length: int) -> None:
    chosen = data.draw(st.sets(st.integers(0, segments(length) - 1)))
    parts = [set(range(s * SEGMENT, min((s + 1) * SEGMENT, length))) for s in sorted(chosen)]
    held = set().union(*parts) ^ data.draw(st.sets(st.integers(0, length - 1), max_size=2))
    numbers = sorted({p // SEGMENT for p in held})
    whole = all(set(range(s * SEGMENT, min((s + 1) * SEGMENT, length))) <= held for s in numbers)
    positions = torch.tensor(sorted(held), dtype=torch.int64)
    if whole:
        assert segment_numbers(positions, length) == numbers
    else:
        with pytest.raises(Unsupported):
            segment_numbers(positions, length)
