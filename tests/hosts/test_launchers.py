"""Ranks on several hosts, started as docs/hosts.md says: what they compute, and what they send."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from .hosts import Hosts
from .jobs import LAUNCHERS, run

STRATEGIES = {"all_reduce", "all_gather", "ring", "pass_q", "ulysses"}

# What the wire carries beyond the messages. Of 1,514 bytes of a full frame 1,448 are payload: 1.046. There is at
# most one acknowledgement, of 66 bytes, for each frame: 0.046. Each message has a header of the library's (Gloo,
# Open MPI) and may come in several frames that are not full.
HEADERS, MESSAGE_BYTES = 1.10, 1000


def assert_wired(found: Iterable[dict[str, Any]]) -> None:
    """On every host's interface is what its rank has sent; and on all together, little beside that."""
    ranks = list(found)
    assert all(rank["wired"] >= rank["bytes"] > 0 for rank in ranks)
    total, messages, wired = (sum(rank[name] for rank in ranks) for name in ("bytes", "messages", "wired"))
    assert wired <= HEADERS * total + MESSAGE_BYTES * messages, ranks


@pytest.fixture(scope="module", params=LAUNCHERS)
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks finds, one on each of two hosts."""
    with Hosts(2) as hosts:
        return run(request.param, hosts, 1, "values,traffic,sockets", tmp_path_factory.mktemp("ranks"))


def test_values_and_gradients_are_right_on_every_rank(two_ranks: list[Any]) -> None:
    assert all(set(found["values"]) >= STRATEGIES for found in two_ranks)


def test_what_is_declared_is_what_the_interfaces_count(two_ranks: list[Any]) -> None:
    for name in two_ranks[0]["traffic"]:
        assert_wired(found["traffic"][name] for found in two_ranks)


def test_ranks_listen_on_the_interface_named(two_ranks: list[Any]) -> None:
    """Open MPI connects by it alone, but its ports are open to all (docs/security.md)."""
    everywhere = ["0.0.0.0", "::"]
    expected = {"gloo": [["10.77.0.1"], ["10.77.0.2"]], "mpi": [everywhere, everywhere]}
    transport = two_ranks[0]["sockets"][0]
    assert [found["sockets"][1] for found in two_ranks] == expected[transport]


@pytest.mark.nightly
@pytest.mark.parametrize(("count", "ranks"), [(2, 2), (3, 1), (4, 1)])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_values_and_bytes_of_more_ranks(launcher: str, count: int, ranks: int, tmp_path: Path) -> None:
    with Hosts(count) as hosts:
        found = run(launcher, hosts, ranks, "values,traffic", tmp_path, seconds=120)
    assert all(set(rank["values"]) >= STRATEGIES for rank in found)
    if ranks == 1:  # else a part of what a rank sends stays on its host
        for name in found[0]["traffic"]:
            assert_wired(rank["traffic"][name] for rank in found)


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.nightly), "mpiexec"])
def test_two_levels_send_a_state_between_hosts_once(launcher: str, tmp_path: Path) -> None:
    with Hosts(2) as hosts:
        found = [rank["levels"] for rank in run(launcher, hosts, 2, "levels", tmp_path)]
    assert [rank["hosts"] for rank in found] == [["h1", "h1", "h2", "h2"]] * 4
    for rank in found:
        state = rank["state"]
        for name, crossings in (("two_level", 1), ("flat", 2)):
            assert rank[name]["bytes"] == rank[name]["declared"]
            crossing = {"bytes": crossings * state, "messages": 4 * crossings, "wired": rank[name]["wired"]}
            assert_wired([crossing])


# Low enough for the wire to take most of the time, also on a busy machine.
CAP_BYTES_PER_SECOND = 5_000_000


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.nightly), "mpiexec"])
def test_time_follows_the_bytes(launcher: str, tmp_path: Path) -> None:
    with Hosts(2, CAP_BYTES_PER_SECOND) as hosts:
        found = [rank["speed"] for rank in run(launcher, hosts, 1, "speed", tmp_path)]
    for name in ("all_gather", "ring"):
        for rank in found:
            whole, window = rank[name]
            at_least = max(other[name][0]["bytes_of_one"] for other in found) / CAP_BYTES_PER_SECOND
            # The first 64 KB of 2 MB are not held back; headers, agreement, computing and waking up take the rest.
            assert 0.95 * at_least <= whole["seconds"] <= 1.5 * at_least, (name, rank)
            # A window of 128 keys sends a thirteenth of the bytes; what stays is latency and computing.
            assert window["seconds"] <= whole["seconds"] / 3, (name, rank)
        assert 12 * max(rank[name][1]["bytes_of_one"] for rank in found) <= found[0][name][0]["bytes_of_one"]
