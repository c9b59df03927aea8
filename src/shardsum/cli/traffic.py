"""What strategies send: the bytes that they declare, those that were counted, and the least that rows need."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from rich.box import HORIZONTALS
from rich.table import Table

from ..attention import attention
from ..comm import Communicator, Traffic
from ..problem import Sizes
from ..sharding import shard
from ..strategies import STRATEGIES, Call, Observed, lower_bound_bytes
from .problems import draw_tensors, make_problem

SIZES = Sizes(batch=1, q_heads=6, kv_heads=2, q_len=480, kv_len=480, head_dim=16, v_dim=24, dtype=torch.float32)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window 64": {"causal": True, "window": (63, None)},
    "documents": {"causal": True, "cu_seqlens": [0, 90, 150, 170, 400, 480]},
}
LAYOUTS = ("contiguous", "zigzag")


def check_traffic(comm: Communicator) -> list[dict[str, Any]]:
    """For each mask, layout and strategy: bytes of all ranks, and whether each rank's traffic was as declared."""
    *whole, _ = draw_tensors(SIZES, comm.device)
    found = []
    for mask, layout, name in itertools.product(MASKS, LAYOUTS, STRATEGIES):
        asked = make_problem(comm, SIZES, layout, **MASKS[mask])
        if STRATEGIES[name]().why_not(asked) is not None:
            continue
        notes: list[tuple[Call, str, Traffic, Traffic]] = []
        strategy = Observed(STRATEGIES[name](), lambda *note, notes=notes: notes.append(note))
        own = [shard(x, comm=comm, layout=layout).requires_grad_() for x in whole]
        out = attention(*own, comm=comm, layout=layout, strategy=strategy, **MASKS[mask])
        torch.autograd.grad(out, own, torch.ones_like(out))
        own_bytes = [traffic.sent_bytes for *_, declared, counted in notes for traffic in (declared, counted)]
        unequal_here = any(declared != counted for *_, declared, counted in notes)
        least_bytes = lower_bound_bytes(asked, comm.rank)
        numbers = torch.tensor([*own_bytes, least_bytes, unequal_here], device=comm.device)
        *sent, least, unequal = torch.stack(comm.all_gather(numbers)).sum(dim=0).tolist()
        found.append(
            {"mask": mask, "layout": layout, "strategy": name, "as_declared": unequal == 0,
             "lower_bound_bytes": least,
             "forward": {"declared_bytes": sent[0], "counted_bytes": sent[1]},
             "backward": {"declared_bytes": sent[2], "counted_bytes": sent[3]}}
        )  # fmt: skip
    return found


def traffic_table(rows: list[dict[str, Any]]) -> Table:
    """Declared, counted and least bytes of all ranks together."""
    table = Table(title="Bytes sent by all ranks together", box=HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("mask,\nlayout", "\nstrategy"):
        table.add_column(column, no_wrap=True)
    for column in ("forward,\ndeclared", "\ncounted", "lower\nbound", "backward,\ndeclared", "\ncounted"):
        table.add_column(column, justify="right")
    for (mask, layout), group in itertools.groupby(rows, key=lambda row: (row["mask"], row["layout"])):
        table.add_section()
        for row, where in zip(group, itertools.chain((mask, layout), itertools.repeat("")), strict=False):
            (declared, counted), back = row["forward"].values(), row["backward"].values()
            numbers = (f"{count:,}" for count in (declared, counted, row["lower_bound_bytes"], *back))
            table.add_row(where, row["strategy"], *numbers, style="" if row["as_declared"] else "bold red")
    return table
