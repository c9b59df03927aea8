"""Ranks as processes that mpiexec starts."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import Unsupported
from .processes import SHARED_MEMORY, Processes, how_it_ended

EAGER_BYTES = 1 << 15
# How a rank under mpiexec ended is written down. An end without a result is made one by a signal: of no other does
# Open MPI tell the other ranks (5.0.11, `--with-ft ulfm`).
_RECORDED = """"$@"; status=$?; rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
echo $status > "$0/ended.$rank.unfinished" && mv "$0/ended.$rank.unfinished" "$0/ended.$rank"
test $status -eq 0 && test -e "$0/result.$rank" || kill -KILL $$"""


class Mpiexec(Processes):
    """All ranks by one mpiexec, which pins them and tells each its number."""

    def commands(self, worker: list[str]) -> list[list[str]]:
        return [[*_mpiexec(self.ranks), "sh", "-c", _RECORDED, str(self.directory), *worker]]

    def environment(self) -> dict[str, str]:
        # On one host the shared-memory transport alone starts in 0.1 s instead of 1.0.
        environment = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "sm,self"}
        # Up to this size a message is copied and gone; beyond it, both sides must be there at the same time. The
        # usual 4 KB are less than one attention state.
        environment |= {"OMPI_MCA_btl_sm_eager_limit": str(EAGER_BYTES)}
        environment |= {"UCX_TLS": "shm,self"}  # the same for MPICH
        environment["PRTE_MCA_prte_tmpdir_base"] = str(self.directory)  # what a killed mpiexec leaves goes with it
        if SHARED_MEMORY.is_dir():  # in a place of our own, which we can clear after any end
            environment["OMPI_MCA_btl_sm_backing_directory"] = str(SHARED_MEMORY / self.directory.name)
        return environment

    def ends(self, codes: list[int | None], words: list[str]) -> dict[int, str]:
        ends = {rank: how_it_ended(code, words[0]) for rank, code in _recorded_ends(self.directory).items()}
        if ends or codes[0] is None or any(self.directory.glob("error.*[0-9]")):
            return ends
        return dict.fromkeys(range(self.ranks), f"mpiexec: {how_it_ended(codes[0], words[0])}")


def _recorded_ends(directory: Path) -> dict[int, int]:
    """The status of each rank under mpiexec that has ended, negative if by a signal, as subprocess has it."""
    found = {int(file.suffix[1:]): int(file.read_text()) for file in directory.glob("ended.*[0-9]")}
    return {rank: status if status <= 128 else 128 - status for rank, status in found.items()}


def find_mpiexec() -> str | None:
    """The mpiexec beside this Python, or the one on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


@functools.cache
def _version(mpiexec: str) -> str:
    return subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=60).stdout


def reports_lost_ranks(mpiexec: str) -> bool:
    """Whether it knows `--with-ft ulfm`: Open MPI from 5 on does.

    Source: Bland et al. 2013 (Post-failure recovery of MPI communication capability).
    """
    version = re.search(r"Open MPI\D*(\d+)", _version(mpiexec))
    return version is not None and int(version[1]) >= 5


def _mpiexec(ranks: int) -> list[str]:
    program = find_mpiexec()
    if program is None:
        raise Unsupported("the mpi transport needs mpiexec: pip install 'shardsum[mpi]', or put mpiexec on PATH.")
    command, cores = [program, "-n", str(ranks)], len(os.sched_getaffinity(0))
    if "HYDRA" in _version(program):  # MPICH's
        return [*command, "-iface", "lo", "-bind-to", f"core:{cores // ranks}" if ranks <= cores else "none"]
    if reports_lost_ranks(program):
        command += ["--with-ft", "ulfm"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    if ranks > cores:
        return [*command, "--oversubscribe", "--bind-to", "none"]
    return [*command, "--map-by", f"slot:PE={cores // ranks}", "--bind-to", "core"]
