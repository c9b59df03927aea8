"""Jobs over several hosts, by the commands of docs/hosts.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .hosts import ROOT, Hosts, Program

LAUNCHERS = ("torchrun", "mpiexec")
SHOWN = ROOT / "docs" / "hosts.md"


def shown(launcher: str, change: Mapping[str, object]) -> str:
    """The command that the documentation shows, where what stands for something of the user's is exchanged."""
    commands = re.findall(r"^```sh\n(.*?)\n```$", SHOWN.read_text(), re.MULTILINE | re.DOTALL)
    (command,) = (command for command in commands if f"/{launcher} " in command)
    for old, new in change.items():
        assert command.count(old) == 1, (old, command)
        command = command.replace(old, str(new))
    return str(command)


def torchrun(hosts: Hosts, ranks: int, program: str) -> list[Program]:
    """The same command on every host, but for its number."""
    change = {
        "--nnodes 2": f"--nnodes {len(hosts.names)}",
        "--nproc-per-node 1": f"--nproc-per-node {ranks}",
        "program.py": program,
    }
    return [
        hosts.start(host, shown("torchrun", {**change, "--node-rank 0": f"--node-rank {number}"}))
        for number, host in enumerate(hosts.names)
    ]


def mpiexec(hosts: Hosts, ranks: int, program: str) -> list[Program]:
    """One command on one host; the shell of `hosts` takes the place of ssh."""
    change = {
        "-n 2": f"-n {ranks * len(hosts.names)}",
        "h1:1,h2:1": ",".join(f"{host}:{ranks}" for host in hosts.names),
        "ppr:1": f"ppr:{ranks}",
        "program.py": program,
    }
    settings = {"PRTE_MCA_plm_ssh_agent": str(hosts.shell)}
    for library in ("OMPI", "PRTE"):  # allowed by either, and only if said twice
        settings |= {f"{library}_ALLOW_RUN_AS_ROOT": "1", f"{library}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [hosts.start("h1", shown("mpiexec", change), settings)]


def start(launcher: str, hosts: Hosts, ranks: int, what: str, directory: Path) -> list[Program]:
    """The worker of these tests as a job, with so many ranks on each host."""
    begin = {"torchrun": torchrun, "mpiexec": mpiexec}[launcher]
    return begin(hosts, ranks, f"-m tests.hosts.worker {what} {directory}")


def run(launcher: str, hosts: Hosts, ranks: int, what: str, directory: Path, seconds: float = 60) -> list[Any]:
    """What every rank of the job found, in rank order, each on its own host."""
    for program in start(launcher, hosts, ranks, what, directory):
        status = program.wait(seconds)
        assert status == 0, program.said
    return results(launcher, hosts, ranks, directory)


def results(launcher: str, hosts: Hosts, ranks: int, directory: Path) -> list[Any]:
    """What the ranks found, if each was where it belongs."""
    reports = [report(directory, rank) for rank in range(ranks * len(hosts.names))]
    assert [report["host"] for report in reports] == [host for host in hosts.names for _ in range(ranks)]
    assert {report["transport"] for report in reports} == {"gloo" if launcher == "torchrun" else "mpi"}
    return [report["found"] for report in reports]


def report(directory: Path, rank: int) -> Any:
    """What one rank has written."""
    return json.loads((directory / f"result.{rank}").read_text())
