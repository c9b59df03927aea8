"""Whether `reproducible` attention and its gradients have the bits of one rank alone: digests, side by side."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from rich.box import HORIZONTALS
from rich.table import Table
from torch import Tensor

from ..attention import attention
from ..comm import Communicator, connect
from ..digests import digest_bits
from ..layouts import NAMES
from ..problem import Sizes
from ..sharding import shard, unshard
from ..strategies import STRATEGIES
from .problems import draw_tensors, make_problem

# 3 segments of queries, 5 of keys.
SIZES = Sizes(batch=1, q_heads=4, kv_heads=2, q_len=600, kv_len=1100, head_dim=16, v_dim=24, dtype=torch.float32)
OPTIONS: dict[str, Any] = {"causal": True, "reproducible": True}


def check_digests(comm: Communicator) -> list[dict[str, Any]]:
    """For each layout and strategy: the digest of out, dq, dk and dv, and whether it is that of one rank alone."""
    whole = draw_tensors(SIZES, comm.device)
    alone = _digest(connect("single"), whole, NAMES[0], "auto")
    rows = []
    for layout, strategy in itertools.product(NAMES, STRATEGIES):
        if STRATEGIES[strategy]().why_not(make_problem(comm, SIZES, layout, **OPTIONS)) is not None:
            continue
        digest = _digest(comm, whole, layout, strategy)
        equal = all(bool(x) for x in comm.all_gather(torch.tensor(digest == alone, device=comm.device)))
        rows.append({"layout": layout, "strategy": strategy, "digest": digest, "as_alone": equal})
    return rows


def _digest(comm: Communicator, whole: list[Tensor], layout: str, strategy: str) -> str:
    place: dict[str, Any] = {"comm": comm, "layout": layout, "reproducible": OPTIONS["reproducible"]}
    *own, d_out = (shard(x, **place) for x in whole)
    inputs = [x.requires_grad_() for x in own]
    out = attention(*inputs, comm=comm, layout=layout, strategy=strategy, **OPTIONS)
    results = [out.detach(), *torch.autograd.grad(out, inputs, d_out)]
    return digest_bits(unshard(x, **place) for x in results)


def digest_table(results: list[dict[str, Any]]) -> Table:
    """The digests over each transport."""
    table = Table(title="Bits of reproducible attention and its gradients", box=HORIZONTALS)
    for column in ("layout", "strategy", *(one["transport"] for one in results)):
        table.add_column(column, no_wrap=True)
    rows = [{(row["layout"], row["strategy"]): row for row in one["digests"]} for one in results]
    for key in rows[0]:
        marks = [of[key]["digest"] if of[key]["as_alone"] else f"[bold red]{of[key]['digest']}[/]" for of in rows]
        table.add_row(*key, *marks)
    return table
