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
from ..kernels import Gradients, OutputGradient
from ..sharding import shard
from ..state import AttentionState
from ..strategies import STRATEGIES, Call, Strategy, lower_bound_bytes

LENGTH, Q_HEADS, KV_HEADS, HEAD_DIM, V_DIM = 480, 6, 2, 16, 24
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window 64": {"causal": True, "window": (63, None)},
    "documents": {"causal": True, "cu_seqlens": [0, 90, 150, 170, 400, 480]},
}
LAYOUTS = ("contiguous", "zigzag")


class _Observed(Strategy):
    """A strategy that notes what it declared, what its communicator counted, and the lower bound."""

    def __init__(self, strategy: Strategy) -> None:
        self._inner, self.name, self.rows_stay = strategy, strategy.name, strategy.rows_stay
        self.declared: list[Traffic] = []
        self.counted: list[Traffic] = []
        self.least_bytes = 0

    def forward(self, call: Call) -> AttentionState:
        before = call.comm.traffic.snapshot()
        state = self._inner.forward(call)
        self.counted.append(call.comm.traffic - before)
        self.declared.append(self._inner.traffic(call))
        self.least_bytes = lower_bound_bytes(call, call.comm.rank)
        return state

    def _backward(self, call: Call, gradient: OutputGradient) -> Gradients:
        before = call.comm.traffic.snapshot()
        found = self._inner.backward(call, gradient)
        self.counted.append(call.comm.traffic - before)
        self.declared.append(self._inner.traffic_backward(call))
        return found

    def _traffic(self, call: Call) -> Traffic:
        return self._inner.traffic(call)

    def _traffic_backward(self, call: Call) -> Traffic:
        return self._inner.traffic_backward(call)


def check_traffic(comm: Communicator) -> list[dict[str, Any]]:
    """For each mask, layout and strategy: bytes of all ranks, and whether each rank's traffic was as declared."""
    device = comm.device
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, Q_HEADS, LENGTH, HEAD_DIM), (1, KV_HEADS, LENGTH, HEAD_DIM), (1, KV_HEADS, LENGTH, V_DIM)]
    whole = [torch.randn(size, generator=generator).to(device) for size in sizes]
    found = []
    for mask, layout, name in itertools.product(MASKS, LAYOUTS, STRATEGIES):
        strategy = _Observed(STRATEGIES[name]())
        own = [shard(x, comm=comm, layout=layout).requires_grad_() for x in whole]
        try:
            out = attention(*own, comm=comm, layout=layout, strategy=strategy, **MASKS[mask])
        except Unsupported:  # too few heads for so many ranks; every rank finds so
            continue
        torch.autograd.grad(out, own, torch.ones_like(out))
        equal = strategy.declared == strategy.counted
        pairs = zip(strategy.declared, strategy.counted, strict=True)
        own_bytes = [x.sent_bytes for pair in pairs for x in pair]
        numbers = torch.tensor([*own_bytes, strategy.least_bytes, not equal], device=device)
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
