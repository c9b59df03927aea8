"""What strategies send: the bytes that they declare, those that were counted, and the least that rows need."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from rich.box import HORIZONTALS
from rich.table import Table

from ..attention import attention
from ..comm import Communicator, Traffic
from ..errors import Unsupported
from ..sharding import shard
from ..strategies import STRATEGIES, Call, Observed, lower_bound_bytes

LENGTH, Q_HEADS, KV_HEADS, HEAD_DIM, V_DIM = 480, 6, 2, 16, 24
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window 64": {"causal": True, "window": (63, None)},
    "documents": {"causal": True, "cu_seqlens": [0, 90, 150, 170, 400, 480]},
}
LAYOUTS = ("contiguous", "zigzag")


def check_traffic(comm: Communicator) -> list[dict[str, Any]]:
    """For each mask, layout and strategy: bytes of all ranks, and whether each rank's traffic was as declared."""
    device = comm.device
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, Q_HEADS, LENGTH, HEAD_DIM), (1, KV_HEADS, LENGTH, HEAD_DIM), (1, KV_HEADS, LENGTH, V_DIM)]
    whole = [torch.randn(size, generator=generator).to(device) for size in sizes]
    found = []
    for mask, layout, name in itertools.product(MASKS, LAYOUTS, STRATEGIES):
        notes: list[tuple[Call, str, Traffic, Traffic]] = []
        strategy = Observed(STRATEGIES[name](), lambda *note, notes=notes: notes.append(note))
        own = [shard(x, comm=comm, layout=layout).requires_grad_() for x in whole]
        try:
            out = attention(*own, comm=comm, layout=layout, strategy=strategy, **MASKS[mask])
        except Unsupported:  # too few heads for so many ranks; every rank finds so
            continue
        torch.autograd.grad(out, own, torch.ones_like(out))
        own_bytes = [traffic.sent_bytes for *_, declared, counted in notes for traffic in (declared, counted)]
        unequal_here = any(declared != counted for *_, declared, counted in notes)
        least_bytes = lower_bound_bytes(notes[0][0].problem, comm.rank)
        numbers = torch.tensor([*own_bytes, least_bytes, unequal_here], device=device)
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
