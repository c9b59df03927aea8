"""`shardsum explain`: a small sum, distributed step by step by the real library."""

from __future__ import annotations

from typing import Any

import click
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..comm import Communicator, connect
from ..comm.threads import ThreadTransport
from ..layouts import Layout
from ..sharding import weighted_sum
from .common import console, launchers_rank, numbers, on_ranks, print_json, rank_options

WORDS = "The cat sat on the mat"
WEIGHTS = "0.05,0.45,0.05,0,0,0.45"
VALUES = "1,2/8,2/3,9/5,5/1,2/2,6"
RANKS = 3


@click.command()
@click.option("--weights", help=f"The weights, separated by commas.  [default: {WEIGHTS}]")
@click.option("--values", help="The values, separated by / if they are vectors: 1,2/8,2/3,9")
@click.option("--words", help="What the values belong to, separated by spaces.")
@click.option("--numbers", "plain", help="A plain sum instead: numbers by commas, nodes by /: 150,200/300")
@rank_options(RANKS)
def explain(
    weights: str | None,
    values: str | None,
    words: str | None,
    plain: str | None,
    ranks: int | None,
    transport: str | None,
    as_json: bool,
) -> None:
    """Show how a sum is distributed: shares, partial sums, the collective, the result.

    \b
    Examples:
      shardsum explain
      shardsum explain --weights 0.2,0.8 --values 10,20
      shardsum explain --numbers 150,200,50/300,100/250,150,100
    """
    comm = launchers_rank()
    if plain is not None:
        if any(option is not None for option in (weights, values, words)):
            raise click.UsageError("--numbers is a plain sum: leave --weights, --values and --words out.")
        nodes = [numbers(node, "--numbers") for node in plain.split("/")]
        if ranks not in (None, len(nodes)):
            raise click.UsageError(f"--numbers gives {len(nodes)} nodes their numbers, but -n is {ranks}.")
        shares, names = [len(node) for node in nodes], None
        table = torch.tensor([[number] for node in nodes for number in node], dtype=torch.float64)
        factors = torch.ones(len(table), dtype=torch.float64)
    else:
        names, factors, table = _words(weights, values, words)
        size = comm.size if comm else ranks or RANKS
        shares = Layout("contiguous").lengths(len(factors), size)
    transport = transport if comm else transport or ThreadTransport.name
    result = on_ranks(distribute, ranks, transport, factors, table, shares, default_ranks=len(shares))
    if result is None:
        return
    result |= {"weights": factors.tolist(), "values": table.tolist(), "words": names, "shares": shares}
    if as_json:
        print_json(result)
    else:
        _show(result, plain is not None)


def _words(weights: str | None, values: str | None, words: str | None) -> tuple[list[str], Tensor, Tensor]:
    factors = torch.tensor(numbers(WEIGHTS if weights is None else weights, "--weights"), dtype=torch.float64)
    if values is None and len(factors) != len(WORDS.split()):
        raise click.UsageError(f"--weights needs --values too, one for each of its {len(factors)} weights.")
    values = VALUES if values is None else values
    rows = values.split("/") if "/" in values else values.split(",")
    vectors = [numbers(row, "--values") for row in rows]
    if len({len(vector) for vector in vectors}) > 1:
        raise click.UsageError(f"--values must be vectors of one length: got {values!r}.")
    table = torch.tensor(vectors, dtype=torch.float64)
    if words is None:
        words = WORDS if len(factors) == len(WORDS.split()) else " ".join(f"v{j}" for j in range(len(factors)))
    names = words.split()
    if not len(factors) == len(table) == len(names):
        raise click.UsageError(
            "weights, values and words must be equally many: "
            f"got {len(factors)} weights, {len(table)} values, {len(names)} words."
        )
    return names, factors, table


def distribute(comm: Communicator, weights: Tensor, values: Tensor, shares: list[int]) -> dict[str, Any]:
    """The distributed sum on this rank, and what every rank contributed to it."""
    if comm.size != len(shares):
        raise ValueError(f"the numbers are for {len(shares)} nodes: got {comm.size} ranks.")
    own_weights, own_values = (x.split(shares)[comm.rank] for x in (weights, values))
    partial = weighted_sum(own_weights, own_values, comm=connect("single"))
    before = comm.traffic.snapshot()
    total = weighted_sum(own_weights, own_values, comm=comm)
    sent = comm.traffic - before
    # A weight of exactly 0 has no say, whatever the value is.
    nothing = torch.where(own_weights.unsqueeze(1) == 0, torch.nan, own_values)
    without = weighted_sum(own_weights, nothing, comm=comm)
    totals = comm.all_gather(total)
    return {
        "ranks": comm.size,
        "transport": comm.transport,
        "partial_sums": [part.tolist() for part in comm.all_gather(partial)],
        "result": total.tolist(),
        "same_bits_on_every_rank": all(torch.equal(totals[0], other) for other in totals),
        "result_if_weight_zero_had_nan": without.tolist(),
        "sent_bytes_per_rank": sent.sent_bytes,
    }


def _show(result: dict[str, Any], plain: bool) -> None:
    out = console()
    names, shares = result["words"], result["shares"]
    what = "numbers" if plain else "words"
    out.print(f"[bold]1. The {what} are shared out[/bold] over {result['ranks']} ranks.\n")
    columns = ("rank", "number") if plain else ("rank", "word", "weight", "value", "weight x value")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    owners = [rank for rank, share in enumerate(shares) for _ in range(share)]
    for j, (rank, weight, value) in enumerate(zip(owners, result["weights"], result["values"], strict=True)):
        if plain:
            table.add_row(str(rank), _vector(value))
        else:
            product = [weight * x for x in value]
            table.add_row(str(rank), escape(names[j]), f"{weight:g}", _vector(value), _vector(product))
    out.print(table)
    out.print("\n[bold]2. Each rank adds up its own share[/bold], all at the same time: the partial sums.\n")
    for rank, partial in enumerate(result["partial_sums"]):
        out.print(f"rank {rank}   {_vector(partial)}{'' if shares[rank] else '   (it holds nothing)'}")
    what = "with one rank there is nothing to send."
    if result["ranks"] > 1:
        what = (
            f"every rank sends its own to the others ({result['sent_bytes_per_rank']} bytes over "
            f"{result['transport']}, their agreement included) and adds all of them, in rank order."
        )
    out.print(f"\n[bold]3. A collective operation adds the partial sums up[/bold]: {what}\n")
    terms = " + ".join(_vector(partial) for partial in result["partial_sums"])
    same = "the same bits on every rank" if result["same_bits_on_every_rank"] else "not the same on every rank!"
    out.print(f"{terms} = [bold]{_vector(result['result'])}[/bold]   ({same})")
    zero = [names[j] for j, weight in enumerate(result["weights"]) if weight == 0] if names else []
    if zero:
        listed = " and ".join(f'"{escape(name)}"' for name in zero)
        out.print(
            f"\n{listed}: weight zero adds nothing, whatever the value is. With NaN there the result is "
            f"{_vector(result['result_if_weight_zero_had_nan'])}."
        )


def _vector(numbers: list[float]) -> str:
    written = [f"{number:,.12g}" for number in numbers]
    return written[0] if len(written) == 1 else f"({', '.join(written)})"
