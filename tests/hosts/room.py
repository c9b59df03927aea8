"""Several hosts on one machine, in namespaces that end with this process: `python room.py DIRECTORY HOSTS`.

It is the first process of a PID namespace (`Hosts` starts it so): everything in that ends with it. Its own network
namespace is the switch. Each host is a process in network, UTS (host name) and mount namespaces of its own, joined
to the switch by one veth pair. Nothing gets a name outside, so that nothing can be left behind.
Source: Lantz, Heller, McKeown 2010 (a network in a laptop, section 2), whose hosts are made so.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

INTERFACE = "eth0"
# Not in Python before 3.12. <sched.h>
NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x40000000  # mount, UTS, network
# What may go at once before the cap holds; what the queue holds at most, as time, so that nothing is dropped.
BURST_BYTES, QUEUE_MICROSECONDS = 1 << 16, 4_000_000


def address(number: int) -> str:
    """Of host `number`, the first being 1."""
    return f"10.77.0.{number}"


def become_host(directory: Path, name: str, number: int, ready: int, linked: int) -> None:
    """Leave the switch's namespaces, take the host's name and address, and wait for the end."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACES):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(name)
    _mount("--bind", str(directory / f"{name}.hosts"), "/etc/hosts")
    # Shared memory, and what programs leave in it, is of one host.
    _mount("-t", "tmpfs", "shm", "/dev/shm")
    os.write(ready, b".")
    os.read(linked, 1)
    with IPRoute() as links:
        for interface in ("lo", INTERFACE):
            links.link("set", index=links.link_lookup(ifname=interface)[0], state="up")
        index = links.link_lookup(ifname=INTERFACE)[0]
        links.addr("add", index=index, address=address(number), prefixlen=24)
    os.write(ready, b".")
    while True:
        signal.pause()


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


class Switch:
    """A bridge with one port for each host: what a port receives, its host has sent."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        self._links = IPRoute()
        self._links.link("add", ifname="switch", kind="bridge")
        (bridge,) = self._links.link_lookup(ifname="switch")
        self._links.link("set", index=bridge, state="up")
        self._ports: dict[str, int] = {}
        for number, name in enumerate(names, 1):
            self._add(directory, name, number, bridge)

    def _add(self, directory: Path, name: str, number: int, bridge: int) -> None:
        reading, ready = os.pipe()
        linked, writing = os.pipe()
        host = os.fork()
        if host == 0:
            become_host(directory, name, number, ready, linked)
        os.close(ready)
        if not os.read(reading, 1):
            raise RuntimeError(f"host {name} did not start")
        there = {"ifname": INTERFACE, "net_ns_pid": host}
        self._links.link("add", ifname=name, kind="veth", peer=there)
        (self._ports[name],) = self._links.link_lookup(ifname=name)
        self._links.link("set", index=self._ports[name], master=bridge, state="up")
        os.write(writing, b".")
        if not os.read(reading, 1):
            raise RuntimeError(f"host {name} got no address")
        (directory / f"{name}.pid").write_text(str(host))

    def cap(self, bytes_per_second: int) -> None:
        """Let every host receive so much and no more."""
        for port in self._ports.values():
            self._links.tc(
                "add", "tbf", port, 0, rate=bytes_per_second, burst=BURST_BYTES, latency=QUEUE_MICROSECONDS
            )

    def cut(self, host: str) -> None:
        """Let nothing through to or from the host, as if its cable were cut."""
        self._links.link("set", index=self._ports[host], state="down")


def main(directory: Path, names: list[str]) -> None:
    switch = Switch(directory, names)
    print("ready", flush=True)
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        getattr(switch, order.pop("do"))(**order)
        print("done", flush=True)
    shutil.rmtree(directory, ignore_errors=True)  # whoever made us is gone, perhaps without having cleared up


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
