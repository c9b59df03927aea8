"""The hosts themselves: apart from each other, joined by the network, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from .hosts import ROOT, Hosts
from .room import INTERFACE


def namespaces(hosts: Hosts) -> list[str]:
    """The network namespace of each host."""
    return [hosts.run(host, "readlink /proc/self/ns/net").strip() for host in hosts.names]


def still_there(networks: list[str]) -> list[str]:
    """The processes of this machine that are in one of the namespaces."""
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [str(link)] if os.readlink(link) in networks else []
    return found


def refusal(hosts: Hosts, seconds: float) -> str:
    """What h1 hears when it wants to speak to h3, where nobody listens."""
    code = f"import socket; socket.create_connection(('h3', 999), {seconds})"
    program = hosts.start("h1", shlex.join([sys.executable, "-c", code]))
    assert program.wait(10) == 1
    return program.said.splitlines()[-1]


def test_hosts_have_names_addresses_and_a_network() -> None:
    with Hosts(3) as hosts:
        assert [hosts.run(host, "uname -n").strip() for host in hosts.names] == ["h1", "h2", "h3"]
        known = hosts.run("h2", "cat /etc/hosts").splitlines()
        assert known[1:] == ["127.0.1.1 h2", "10.77.0.1 h1.net h1", "10.77.0.2 h2.net", "10.77.0.3 h3.net h3"]
        interfaces = hosts.run("h1", "cat /proc/net/dev").splitlines()[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo", INTERFACE]
        assert len({os.readlink("/proc/self/ns/net"), *namespaces(hosts)}) == 4
        assert refusal(hosts, 5).startswith("ConnectionRefusedError")  # h3 is there, and says no
        hosts.cut("h3")
        assert refusal(hosts, 0.5).startswith("TimeoutError")


def test_a_test_that_fails_leaves_nothing() -> None:
    interfaces, mounts = os.listdir("/sys/class/net"), Path("/proc/self/mounts").read_text()
    networks = []

    def fail(hosts: Hosts) -> None:
        with hosts:
            networks.extend(namespaces(hosts))
            hosts.start("h2", "sleep 100")
            assert still_there(networks)
            raise ZeroDivisionError

    hosts = Hosts(2)
    with pytest.raises(ZeroDivisionError):
        fail(hosts)
    assert not still_there(networks)
    assert not hosts.directory.exists()
    assert (os.listdir("/sys/class/net"), Path("/proc/self/mounts").read_text()) == (interfaces, mounts)


MAKER = """
    import time
    from tests.hosts.hosts import Hosts
    from tests.hosts.test_hosts import namespaces
    with Hosts(2) as hosts:
        hosts.start("h2", "sleep 100")
        print(hosts.directory, *namespaces(hosts), flush=True)
        time.sleep(100)
"""


def test_hosts_end_with_the_process_that_made_them() -> None:
    command = [sys.executable, "-c", textwrap.dedent(MAKER)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        directory, *networks = maker.stdout.readline().split()
        assert still_there(networks)
        maker.send_signal(signal.SIGKILL)
    end = time.monotonic() + 5
    while (left := still_there(networks)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left
    assert not Path(directory).exists()
