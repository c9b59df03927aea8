"""`shardsum verify`: every strategy, layout, mask and transport of this machine against float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import click
import torch
from rich.table import Table
from torch import Tensor

from .. import kernels
from ..attention import attention
from ..comm import LAUNCHED, TRANSPORTS, Communicator, connect
from ..layouts import NAMES, Layout
from ..problem import Sizes
from ..sharding import shard
from ..state import AttentionState
from ..strategies import STRATEGIES
from .common import console, launchers_rank, on_ranks, print_json, progress, rank_options
from .digests import check_digests, digest_table
from .problems import draw_tensors, make_problem
from .traffic import check_traffic, traffic_table

RANKS = 3
SIZES = Sizes(batch=2, q_heads=6, kv_heads=2, q_len=43, kv_len=61, head_dim=16, v_dim=24, dtype=torch.float32)
# Sums of 61 float32 terms in any order: the tests hold 2e-6, relative norm and largest lse alike.
TOLERANCE = 1e-5
REFUSED = -1.0
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (7, 3)},
    "causal window": {"causal": True, "window": (11, None)},
    "key range": {"causal": True, "key_range": ([5, 0], [57, 31])},
    "documents": {"causal": True, "cu_seqlens": [0, 3, 3, 20, 43], "cu_seqlens_k": [0, 5, 6, 30, 61]},
    "document windows": {"window": (4, 1), "cu_seqlens": [0, 3, 3, 20, 43], "cu_seqlens_k": [0, 5, 6, 30, 61]},
    "earlier queries": {"causal": True, "q_start": [9, -4]},
}
WEIGHTED = "weighted"  # shares of 1, 2, 3, 1, ...
LAYOUTS = (*NAMES, WEIGHTED)


@click.command()
@rank_options(RANKS)
def verify(ranks: int | None, transport: str | None, as_json: bool) -> int | None:
    """Check every strategy, layout, mask and transport that this machine has against float64, on every rank.

    And the bytes that each strategy declares against those that are counted, beside the least that rows need:
    the keys and values that they see and their rank does not hold. And the bits of reproducible attention and its
    gradients against those of one rank.
    Exit status 1 if anything is wrong.

    \b
    Example:
      shardsum verify -n 4
    """
    if transport is not None or launchers_rank() is not None:
        transports = [transport]
    else:
        transports = [name for name in reversed(LAUNCHED) if TRANSPORTS[name].why_not() is None]
    reports = [on_ranks(check_all, ranks, name, default_ranks=RANKS) for name in transports]
    results = [one for one in reports if one is not None]
    if not results:
        return None
    failures = [failure for one in results for failure in one["failures"]]
    ok = not failures and all(row["as_declared"] for one in results for row in one["traffic"])
    ok = ok and all(row["as_alone"] for one in results for row in one["digests"])
    if as_json:
        print_json({"tolerance": TOLERANCE, "ok": ok, "results": results})
    else:
        _show(results, failures)
        _show_traffic(results)
        _show_digests(results)
    return None if ok else 1


class Case(NamedTuple):
    """One way to compute one mask's attention."""

    strategy: str
    layout: str
    mask: str
    kernel: str
    q_replicated: bool

    def options(self) -> dict[str, Any]:
        """The options of `attention` that make the problem what it is."""
        return {**MASKS[self.mask], "q_replicated": self.q_replicated}


def _kernels(comm: Communicator) -> list[str]:
    return kernels.available(comm.device, (SIZES.head_dim, SIZES.v_dim))


def check_all(comm: Communicator) -> dict[str, Any]:
    """The largest error of each strategy and layout over all ranks, and which cases were wrong."""
    *whole, _ = draw_tensors(SIZES._replace(dtype=torch.float64), comm.device)
    expected = {
        mask: attention(*whole, comm=connect("single"), kernel=kernels.definition(), return_state=True, **options)
        for mask, options in MASKS.items()
    }
    products = itertools.product(STRATEGIES, LAYOUTS, MASKS, _kernels(comm), (False, True))
    cases = [Case(*each) for each in products]
    with progress(visible=comm.rank == 0) as bar:
        errors = [
            _error_of(comm, case, whole, expected[case.mask])
            for case in bar.track(cases, description=comm.transport)
        ]
    own = torch.tensor(errors, dtype=torch.float64, device=comm.device)
    worst = torch.stack(comm.all_gather(own)).amax(0).tolist()
    largest: dict[str, dict[str, float]] = {}
    for case, error in zip(cases, worst, strict=True):
        row = largest.setdefault(case.strategy, {})
        row[case.layout] = max(row.get(case.layout, REFUSED), error)
    return {
        "transport": comm.transport,
        "ranks": comm.size,
        "kernels": _kernels(comm),
        "cases": sum(error != REFUSED for error in worst),
        "largest_error": largest,
        "failures": [
            {"transport": comm.transport, **case._asdict(), "error": error}
            for case, error in zip(cases, worst, strict=True)
            if not error <= TOLERANCE
        ],
        "traffic": check_traffic(comm),
        "digests": check_digests(comm),
    }  # fmt: skip


def _error_of(comm: Communicator, case: Case, whole: list[Tensor], expected: AttentionState) -> float:
    """The largest error of a case on this rank; REFUSED where its strategy can't do it, on any rank alike."""
    layout = _layout(case.layout, comm.size)
    if STRATEGIES[case.strategy]().why_not(make_problem(comm, SIZES, layout, **case.options())) is not None:
        return REFUSED
    q, k, v = (x.float() for x in whole)
    own_k, own_v = (shard(x, comm=comm, layout=layout) for x in (k, v))
    own_q = q if case.q_replicated else shard(q, comm=comm, layout=layout)
    state = attention(
        own_q, own_k, own_v, comm=comm, layout=layout, strategy=case.strategy, kernel=case.kernel,
        return_state=True, **case.options(),
    )  # fmt: skip
    out, lse = expected.out, expected.lse.unsqueeze(-1)
    if not case.q_replicated:
        out, lse = (shard(x, comm=comm, layout=layout) for x in (out, lse))
    return max(_error(state.out, out), _error(state.lse.unsqueeze(-1), lse))


def _layout(name: str, ranks: int) -> Layout:
    return Layout.weighted([1 + rank % 3 for rank in range(ranks)]) if name == WEIGHTED else Layout(name)


def _error(computed: Tensor, expected: Tensor) -> float:
    """The relative norm of the difference; inf where one is infinite or NaN and the other is not."""
    if expected.numel() == 0:
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(computed[~finite].double(), expected[~finite]) or not bool(
        computed[finite].isfinite().all()
    ):
        return torch.inf
    difference, scale = (computed[finite] - expected[finite]).norm(), expected[finite].norm()
    return float(difference / scale) if scale else float(difference)


def _marked(error: float) -> str:
    if error == REFUSED:
        return "can't"
    return f"[green]ok[/]     {error:.0e}" if error <= TOLERANCE else f"[bold red]WRONG[/] {error:.0e}"


def _show(results: list[dict[str, Any]], failures: list[dict[str, Any]]) -> None:
    out = console()
    table = Table("strategy", "layout", *(one["transport"] for one in results))
    for strategy, layout in itertools.product(STRATEGIES, LAYOUTS):
        errors = [one["largest_error"][strategy][layout] for one in results]
        marked = [_marked(error) for error in errors]
        table.add_row(strategy, layout, *marked)
    out.print(table)
    total, size = sum(one["cases"] for one in results), results[0]["ranks"]
    out.print(
        f"{total - len(failures):,} of {total:,} cases agree with float64 on each of {size} ranks, to "
        f"{TOLERANCE:g} (the largest relative error of {len(MASKS)} masks, "
        f"{len(results[0]['kernels'])} kernels, queries sharded and replicated)."
    )
    for failure in failures[:20]:
        out.print("wrong: " + ", ".join(f"{key} {value}" for key, value in failure.items()))


def _show_traffic(results: list[dict[str, Any]]) -> None:
    out = console()
    out.print()
    out.print(traffic_table(results[0]["traffic"]))
    right = [row["as_declared"] for one in results for row in one["traffic"]]
    names = ", ".join(one["transport"] for one in results)
    out.print(
        f"{sum(right)} of {len(right)} times, over {names}, each rank's bytes, messages and rounds were as "
        "declared. Lower bound: the keys and values that rows see and their rank lacks."
    )


def _show_digests(results: list[dict[str, Any]]) -> None:
    out = console()
    out.print()
    out.print(digest_table(results))
    equal = [row["as_alone"] for one in results for row in one["digests"]]
    size = results[0]["ranks"]
    out.print(f"{sum(equal)} of {len(equal)} times, {size} ranks gave every bit of one rank's out, dq, dk and dv.")
