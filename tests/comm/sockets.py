"""Which sockets the processes of a job listen on, and who they are: read from /proc, as `ss -ltnup` does."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

LAUNCHERS = ("prterun", "torchrun")
_LISTENS, _UNCONNECTED = "0A", "07"  # a TCP socket's state; a UDP socket's, which hears whoever sends
_TABLES = {"tcp": _LISTENS, "tcp6": _LISTENS, "udp": _UNCONNECTED, "udp6": _UNCONNECTED}


def listening(mark: str) -> set[tuple[str, str]]:
    """(launcher or "rank", address) of every socket that a process with `mark` in its environment listens on."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                if mark.encode() in (entry / "environ").read_bytes():
                    found |= {(_who(entry), address) for address in addresses(entry)}
    return found


def addresses(entry: Path) -> set[str]:
    """Those that one process of /proc listens on."""
    everyones = _addresses()
    return {everyones[inode] for inode in _sockets(entry) & everyones.keys()}


def _who(entry: Path) -> str:
    words = (entry / "cmdline").read_text().split("\0")[:2]
    return next((Path(word).name for word in words if Path(word).name in LAUNCHERS), "rank")


def _sockets(entry: Path) -> set[str]:
    names = []
    for descriptor in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(os.readlink(descriptor))
    return {name[len("socket:[") : -1] for name in names if name.startswith("socket:[")}


def _addresses() -> dict[str, str]:
    """The address of each socket that listens, by inode."""
    found = {}
    for table, state in _TABLES.items():
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state:
                found[fields[9]] = _address(fields[1].split(":")[0])
    return found


def _address(digits: str) -> str:
    words = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
