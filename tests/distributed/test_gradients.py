"""Outputs and all gradients of random problems, on every rank, against float64; and the declared traffic."""

from __future__ import annotations

import pytest

from shardsum.comm import Communicator
from shardsum.launching import launch

from .random_problems import check, draw

CASES, NIGHTLY_CASES, BATCH = 200, 2000, 20


def run(seeds: range) -> None:
    problems = [draw(seed) for seed in seeds]
    for ranks in sorted({problem.ranks for problem in problems}):

        def solve(comm: Communicator, ranks: int = ranks) -> None:
            for problem in problems:
                if problem.ranks == ranks:
                    check(comm, problem)

        launch(solve, ranks=ranks, transport="threads")


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_random_problems(first: int) -> None:
    run(range(first, first + BATCH))


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(CASES, CASES + NIGHTLY_CASES, 10 * BATCH))
def test_many_random_problems(first: int) -> None:
    run(range(first, first + 10 * BATCH))
