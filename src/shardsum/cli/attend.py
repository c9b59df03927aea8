"""`shardsum attend`: attention, or a plain weighted sum, over arrays on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from ..arrays import open_array, save_array, take, why_not_save
from ..attention import attention
from ..comm import Communicator, agree, mistakes_reach_all
from ..kernels import available
from ..layouts import NAMES, Layout
from ..problem import Sizes
from ..sharding import check_weighted, unshard, weighted_sum
from ..strategies import STRATEGIES
from ..tree import unit
from .common import busy, on_ranks, pair, print_json, rank_options

RANKS = 2
# Keys are read where they lie, and lie on disk: they stay there.
STRATEGY = next(name for name, strategy in STRATEGIES.items() if strategy.keys_stay)


@click.command()
@click.option("-q", "--q", help="Queries: (batch, q_heads, q_len, head_dim); batch and heads may be missing.")
@click.option("-k", "--k", help="Keys: (batch, kv_heads, kv_len, head_dim).")
@click.option("-v", "--v", required=True, help="Values: (batch, kv_heads, kv_len, v_dim).")
@click.option("--weights", help="Weights (..., keys) instead of --q and --k: a plain weighted sum.")
@click.option("-o", "--output", required=True, help="Where the result goes: a .npy or .safetensors file.")
@click.option("--causal", is_flag=True, help="A query sees no key after its own position.")
@click.option("--window", metavar="LEFT,RIGHT", help="Only so many keys around a query; '4,' is no limit right.")
@click.option("--key-range", metavar="START,END", help="Only the keys from START up to, without, END.")
@click.option("--cu-seqlens", metavar="0,A,B,...", help="Cumulative lengths of packed documents.")
@click.option("--q-start", type=int, help="The first query's position.  [default: the last meets the last key]")
@click.option("--scale", type=float, help="Multiplies the scores.  [default: 1/sqrt(head_dim)]")
@click.option("--layout", type=click.Choice(NAMES), default="contiguous", show_default=True)
@click.option(
    "--strategy",
    type=click.Choice(list(STRATEGIES)),
    default=STRATEGY,
    show_default=True,
    help=f"{STRATEGY} moves queries and results only.",
)
@click.option("--kernel", type=click.Choice(["auto", *sorted(available())]), default="auto", show_default=True)
@click.option("--reproducible", is_flag=True, help="The same bits on any number of ranks, and in any layout.")
@rank_options(RANKS)
def attend(ranks: int | None, transport: str | None, as_json: bool, output: str, **options: Any) -> None:
    """Attention over arrays on disk, .npy or safetensors (FILE or FILE:TENSOR); a rank reads its own keys only.

    \b
    Examples:
      shardsum attend --q Q.npy --k K.npy --v V.npy -o OUT.npy -n 4 --causal
      shardsum attend --weights W.npy --v V.npy -o OUT.npy
    """
    _check_usage(options)
    options["window"] = pair(options["window"], "--window")
    options["key_range"] = pair(options["key_range"], "--key-range")
    if options["cu_seqlens"] is not None:
        try:
            options["cu_seqlens"] = [int(edge) for edge in options["cu_seqlens"].split(",")]
        except ValueError:
            raise click.UsageError(
                f"--cu-seqlens must be whole numbers, as in 0,5,9: got {options['cu_seqlens']!r}."
            ) from None
    work = sum_on_rank if options["weights"] else attend_on_rank
    with busy("reading and summing"):
        report = on_ranks(work, ranks, transport, options, output, default_ranks=RANKS)
    if report is None:
        return
    if as_json:
        print_json(report)
    else:
        shape = " x ".join(map(str, report["shape"]))
        click.echo(
            f"{output}: {shape}, {report['dtype']}, from {report['keys']:,} keys on {report['ranks']} ranks "
            f"({report['transport']}), {report['sent_bytes_per_rank']:,} bytes sent by rank 0, "
            f"{report['seconds']:.2f} s"
        )


def _check_usage(options: dict[str, Any]) -> None:
    if options["weights"]:
        others = ("q", "k", "window", "key_range", "cu_seqlens", "q_start", "scale")
        misplaced = [name for name in others if options[name] is not None]
        if misplaced or options["causal"] or options["reproducible"]:
            raise click.UsageError(
                "--weights are given already: leave --q, --k, --scale, --reproducible and the masks out."
            )
    elif not (options["q"] and options["k"]):
        raise click.UsageError("attention needs --q, --k and --v; a plain weighted sum needs --weights and --v.")


def attend_on_rank(comm: Communicator, options: dict[str, Any], output: str) -> dict[str, Any]:
    """Attention over this rank's part of the files; rank 0 writes the output."""
    started = time.perf_counter()

    def read() -> tuple[torch.Tensor, ...]:
        arrays = [open_array(options[name]) for name in "qkv"]
        if len({x.ndim for x in arrays}) > 1 or not 2 <= arrays[0].ndim <= 4:
            raise ValueError(
                "q, k and v must all be (batch, heads, length, dim), or all lack the first of these: got "
                + ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("qkv", arrays, strict=True))
            )
        whole = [x[(None,) * (4 - x.ndim)] for x in arrays]
        Sizes.of(*whole)
        _check_output(comm, output, arrays[0].dtype, whole[0].shape[:3].numel() * whole[2].shape[3])
        return (*whole, arrays[0])

    q, k, v, as_given = _on_every_rank(comm, read)
    layout, reproducible = Layout(options["layout"]), options["reproducible"]
    together = unit(reproducible)
    own = [take(x, 2, layout.positions(x.shape[2], comm.rank, comm.size, together)) for x in (q, k, v)]
    names = ("causal", "window", "cu_seqlens", "q_start", "scale", "layout", "strategy", "kernel", "reproducible")
    key_range = options["key_range"]
    if key_range is not None:
        start, end = key_range
        end = k.shape[2] if end is None else end
        key_range = ([start or 0] * q.shape[0], [end] * q.shape[0])
    local = attention(*own, comm=comm, key_range=key_range, **{name: options[name] for name in names})
    out = unshard(local, comm=comm, layout=layout, reproducible=reproducible).reshape(
        *as_given.shape[:-1], v.shape[3]
    )
    return _finish(comm, output, out, k.shape[2], started)


def sum_on_rank(comm: Communicator, options: dict[str, Any], output: str) -> dict[str, Any]:
    """The weighted sum of this rank's part of the files; rank 0 writes the output."""
    started = time.perf_counter()

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        weights, values = open_array(options["weights"]), open_array(options["v"])
        check_weighted(weights, values)
        shape = np.broadcast_shapes(weights.shape[:-2], values.shape[:-2])
        rows = weights.shape[-2] if weights.ndim > 1 else 1
        _check_output(comm, output, values.dtype, math.prod(shape) * rows * values.shape[-1])
        return weights, values

    weights, values = _on_every_rank(comm, read)
    layout = Layout(options["layout"])
    mine = layout.positions(weights.shape[-1], comm.rank, comm.size)
    out = weighted_sum(take(weights, -1, mine), take(values, -2, mine), comm=comm)
    return _finish(comm, output, out, weights.shape[-1], started)


def _on_every_rank(comm: Communicator, read: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """What `read` returns, once it has succeeded on every rank; its ValueError otherwise, on every rank."""
    with mistakes_reach_all(comm):
        arrays = read()
    agree(comm, {"call": "attend", "shapes": [list(x.shape) for x in arrays]})
    return arrays


def _check_output(comm: Communicator, name: str, dtype: torch.dtype, numel: int) -> None:
    """Raise ValueError where rank 0 could not write the output, before the work is done."""
    if comm.rank:
        return
    path = Path(name)
    if (problem := why_not_save(path, numel * dtype.itemsize)) is not None:
        raise ValueError(problem)
    if dtype is torch.bfloat16 and path.suffix == ".npy":
        raise ValueError(f".npy files have no bfloat16: write {path.stem}.safetensors.")


def _finish(comm: Communicator, output: str, out: torch.Tensor, keys: int, started: float) -> dict[str, Any]:
    with mistakes_reach_all(comm):
        if comm.rank == 0:
            save_array(Path(output), out)
    agree(comm, {"call": "save"})
    return {
        "output": output,
        "shape": list(out.shape),
        "dtype": str(out.dtype).removeprefix("torch."),
        "keys": keys,
        "ranks": comm.size,
        "transport": comm.transport,
        "sent_bytes_per_rank": comm.traffic.sent_bytes,
        "seconds": time.perf_counter() - started,
    }
