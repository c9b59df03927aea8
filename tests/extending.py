"""What docs/extending.md adds from outside, put through the tests that would find it in its registry."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from click.testing import CliRunner

from shardsum import Layout, launch
from shardsum.comm import Communicator, Transport
from shardsum.geometry import seen
from shardsum.masks import Mask
from shardsum.problem import Problem
from shardsum.strategies import STRATEGIES

from .collectives import test_collectives
from .contracts import run_communicator_contracts
from .distributed import cases, random_problems, test_seams, test_strategies
from .kernels import test_kernels


def check_strategy(name: str) -> None:
    """Every mask, layout and corner, gradients, and the declared traffic, with ranks and without."""

    def run(comm: Communicator) -> None:
        for case, strategy, kernel, q_replicated in (*cases.matrix(), *cases.corners()):
            if (strategy, kernel) == (name, "aten"):
                cases.run_case(comm, case, cases.recorded(STRATEGIES[name]()), kernel, q_replicated)

    drawn = [one for one in map(random_problems.draw, range(40)) if one.strategy == name]
    assert drawn
    for problem in (random_problems.plain(name), *drawn):
        launch(random_problems.check, problem.ranks, "threads", (problem,))
    launch(run, 3, "threads")
    launch(test_strategies.declared_is_counted, 2, "threads", (name,))
    test_seams.test_a_strategy_runs_without_a_wire_and_sends_what_it_declares(name, 5)


def check_mask(mask: Mask, expected: torch.Tensor) -> None:
    """The intervals of a mask, and what the geometry makes of it, beside which row sees which key."""
    rows, keys = torch.arange(mask.q_len), torch.arange(mask.kv_len)
    ((lo, hi),) = mask.intervals(rows)
    assert torch.equal((lo[0, :, None] <= keys) & (keys < hi[0, :, None]), expected)
    sizes: dict[str, Any] = {"batch": 1, "q_heads": 1, "kv_heads": 1, "head_dim": 1, "v_dim": 1}
    for layout, size in (("contiguous", 3), ("zigzag", 3), ("striped", 2), ("zigzag", 5)):
        queries, place = (Layout(layout).placement(length, size) for length in (mask.q_len, mask.kv_len))
        problem = Problem(**sizes, dtype=torch.float32, mask=mask, queries=queries, keys=place)
        for rank, owner in torch.cartesian_prod(torch.arange(size), torch.arange(size)).tolist():
            sees = expected[queries.positions(rank)][:, place.positions(owner)].any(dim=0)
            assert torch.equal(seen(problem, rank, owner), sees.nonzero().flatten()), (layout, rank, owner)


def check_collective(name: str) -> None:
    for size in (1, 2, 5):
        for rows in (0, 1, 24):
            test_collectives.check_states(name, size, rows, torch.float32)


def check_kernel(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        test_kernels.test_on_each_device(name, "cpu", dtype)
        test_kernels.test_gradients_on_each_device(name, "cpu", dtype, "window")
    test_kernels.test_scores_of_80(name, 80.0)
    test_kernels.test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(name)
    test_kernels.test_a_bad_key_or_value_reaches_only_the_rows_that_see_it(name, torch.nan, 4)
    test_kernels.test_nan_in_keys_values_and_rows_reaches_only_gradients_that_see_it(name)


def check_transport(kind: type[Transport]) -> None:
    with TemporaryDirectory() as folder:

        def keep_the_contract(comm: Communicator) -> dict[str, str]:
            return run_communicator_contracts(Communicator(kind.join(Path(folder), comm.rank, comm.size, 60.0)))

        assert launch(keep_the_contract, 3, "threads") == [{}] * 3


def check_command(group: click.Group, name: str) -> None:
    shell = CliRunner()
    assert f"shardsum {name}" in shell.invoke(group, [name, "--help"]).output
    assert len(shell.invoke(group, [name, "-n", "3"]).output.split()) == 3
