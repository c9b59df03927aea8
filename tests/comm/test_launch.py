"""launch: what comes back, which error is raised, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardsum import AttentionState
from shardsum.comm import Communicator, connect, launch
from shardsum.errors import RankLost, Unsupported

PROCESSES = ["gloo", "mpi"]
EVERY = ["threads", *PROCESSES]


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No process, directory, shared memory or thread that was not there before."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("SHARDSUM_TEST_MARK", mark)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared, threads = set(os.listdir("/dev/shm")), set(threading.enumerate())
    yield
    end = time.monotonic() + 5
    while _processes(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert _processes(mark) == []
    assert not [name for name in os.listdir(tmp_path) if name.startswith(("shardsum", "ompi", "prte", "pmix"))]
    left = set(os.listdir("/dev/shm")) - shared
    assert not [name for name in left if str(os.getpid()) in name or name.startswith(("sm_segment", "vader"))]
    assert set(threading.enumerate()) <= threads


def _processes(mark: str) -> list[int]:
    """The live processes that inherited this test's mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"SHARDSUM_TEST_MARK={mark}".encode() in environment:
                found.append(int(entry.name))
    return found


def everything() -> dict[str, Any]:
    return {
        "none": None,
        "bools": [True, False],
        "numbers": [0, -(2**70), 0.1, float("inf"), -float("inf")],
        "text": 'Umlauts äöü, a quote " and a line\nbreak',
        "tuple": (1, (2, [3, ()])),
        "empty": [[], {}, ""],
        "nested": {"a": {"b": (torch.arange(3), np.arange(2))}},
        "tensors": [
            torch.tensor([1.5, -2.0]).to(dtype)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
        ]
        + [torch.tensor([1, 0], dtype=torch.int16), torch.tensor([1, 0]).bool(), torch.tensor([3]).byte()],
        "scalar": torch.tensor(7.0),
        "no elements": torch.empty(0, 3, dtype=torch.bfloat16),
        "strided": torch.arange(12).reshape(3, 4).t()[::2],
        "arrays": [np.array(3.5), np.zeros((0, 2)), np.array([True]), np.arange(6.0).reshape(2, 3).T],
        "state": AttentionState(torch.randn(1, 2, 3), torch.randn(1, 2)),
    }


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, AttentionState):
        assert_same([found.out, found.lse], [expected.out, expected.lse])
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def give_back(comm: Communicator, value: Any) -> Any:
    return [comm.rank, comm.size, connect() is comm, value]


@pytest.mark.parametrize("transport", EVERY)
def test_values_return_as_they_went(transport: str) -> None:
    torch.manual_seed(0)
    value = everything()
    results = launch(give_back, ranks=2, transport=transport, args=(value,))
    assert [result[:3] for result in results] == [[0, 2, True], [1, 2, True]]
    for result in results:
        assert_same(result[3], value)


def test_closures_run_as_threads() -> None:
    held = torch.arange(4)
    results = launch(lambda comm: int(held[comm.rank]), ranks=4, transport="threads")
    assert results == [0, 1, 2, 3]
    with pytest.raises(TypeError, match="transport='threads'"):
        launch(lambda comm: comm.rank, ranks=2, transport="gloo")


class Holder:
    def method(self, comm: Communicator) -> int:
        return comm.rank


def test_what_has_no_name_in_another_process_is_refused() -> None:
    with pytest.raises(TypeError):
        launch(Holder().method, ranks=2, transport="gloo")


@pytest.mark.parametrize(
    ("value", "where"), [({"a": [1, object()]}, r"\['a'\]\[1\].*object"), ({1, 2}, "set"), (b"bytes", "bytes")]
)
def test_other_types_are_refused_by_name_and_place(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        launch(give_back, ranks=2, transport="gloo", args=(value,))


def return_a_set(comm: Communicator) -> Any:
    return {"inner": {1, 2}}


def test_results_of_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"'inner'.*set"):
        launch(return_a_set, ranks=1, transport="gloo")


def test_unknown_transports_and_no_ranks() -> None:
    with pytest.raises(ValueError, match="'carrier pigeon'"):
        launch(give_back, transport="carrier pigeon")
    with pytest.raises(ValueError, match="at least 1: got 0"):
        launch(give_back, ranks=0)


class OwnError(Exception):
    """Not built in, not ours."""


def fail(comm: Communicator, kind: str, failing: list[int]) -> None:
    if comm.rank in failing:
        if kind == "OwnError":
            raise OwnError("something of my own")
        if kind == "Unsupported":
            raise Unsupported("that can't be done")
        if kind == "KeyError":
            raise KeyError("absent")
        if kind == "UnicodeDecodeError":
            b"\xff".decode("utf-8")
        raise ZeroDivisionError(f"on rank {comm.rank}")
    comm.barrier()  # the others wait for the failed one


@pytest.mark.parametrize("transport", EVERY)
def test_an_error_is_raised_with_its_rank_and_hidden_by_no_lost_peer(transport: str) -> None:
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="on rank 1") as raised:
        launch(fail, ranks=3, transport=transport, args=("ZeroDivisionError", [1, 2]))
    assert raised.value.rank == 1  # type: ignore[attr-defined]
    assert time.monotonic() - start < 30  # not the deadline's 300 s
    if transport != "threads" and sys.version_info >= (3, 11):
        assert "in fail" in "".join(raised.value.__notes__)


@pytest.mark.parametrize(
    ("kind", "expected", "words"),
    [
        ("OwnError", RuntimeError, "OwnError.*something of my own"),
        ("Unsupported", Unsupported, "^that can't be done$"),
        ("KeyError", KeyError, "^'absent'$"),
        ("UnicodeDecodeError", (UnicodeDecodeError, RuntimeError), "invalid start byte"),
    ],
)
def test_the_class_of_an_error(kind: str, expected: Any, words: str) -> None:
    with pytest.raises(expected, match=words) as raised:
        launch(fail, ranks=1, transport="gloo", args=(kind, [0]))
    assert raised.value.rank == 0  # type: ignore[attr-defined]


def die(comm: Communicator, how: str) -> None:
    if comm.rank == 1:
        if how == "exit":
            sys.exit(3)
        if how == "_exit":
            os._exit(5)
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSEGV)
    comm.barrier()


@pytest.mark.parametrize(
    ("how", "words"),
    [("exit", "3"), ("_exit", "5"), ("kill", "9|SIGKILL|137"), ("segfault", "11|SIGSEGV|139")],
)
@pytest.mark.parametrize("transport", PROCESSES)
def test_a_rank_that_dies_without_a_word_is_named(transport: str, how: str, words: str) -> None:
    with pytest.raises(RankLost, match=f"rank 1 .*({words})") as raised:
        launch(die, ranks=2, transport=transport, args=(how,))
    assert raised.value.rank == 1  # type: ignore[attr-defined]


def come_later(comm: Communicator) -> float:
    start = time.monotonic()
    if comm.rank == 0:
        raise ValueError("at once")
    try:
        comm.barrier()
    except RankLost as lost:
        assert "rank 0" in str(lost)
    return time.monotonic() - start


def test_threads_hear_of_a_lost_rank_at_once() -> None:
    waited: dict[int, float] = {}

    def run(comm: Communicator) -> None:
        waited[comm.rank] = come_later(comm)

    with pytest.raises(ValueError, match="at once"):
        launch(run, ranks=3, transport="threads")
    assert sorted(waited) == [1, 2]
    assert max(waited.values()) < 5


def test_threads_do_not_wait_for_a_rank_that_returned() -> None:
    def run(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.barrier()

    start = time.monotonic()
    with pytest.raises(RankLost, match="rank 0") as raised:
        launch(run, ranks=2, transport="threads")
    assert raised.value.rank == 1  # type: ignore[attr-defined]
    assert time.monotonic() - start < 10


def cores(comm: Communicator) -> list[Any]:
    torch.ones(512, 512) @ torch.ones(512, 512)  # torch's pool has started
    tasks = [int(task) for task in os.listdir("/proc/self/task")]
    if comm.transport == "gloo":  # the transport's own thread may run anywhere
        tasks = [os.getpid()]
    allowed = set().union(*(os.sched_getaffinity(task) for task in tasks[:1]))
    return [sorted(allowed), torch.get_num_threads()]


@pytest.mark.parametrize("transport", PROCESSES)
def test_ranks_have_cores_of_their_own(transport: str) -> None:
    available = os.sched_getaffinity(0)
    if len(available) < 2:
        pytest.skip("one core")
    (first, threads), (second, _) = launch(cores, ranks=2, transport=transport)
    assert set(first).isdisjoint(second)
    assert set(first) | set(second) <= available
    assert threads == len(available) // 2


def test_threads_share_the_cores_and_leave_the_callers_number_alone() -> None:
    before = torch.get_num_threads()
    ranks = len(os.sched_getaffinity(0)) + 1
    assert launch(lambda comm: torch.get_num_threads(), ranks, "threads") == [1] * ranks
    assert torch.get_num_threads() == before


def say(comm: Communicator) -> None:
    print(f"rank {comm.rank} to stdout", flush=True)
    print(f"rank {comm.rank} to stderr", file=sys.stderr, flush=True)
    if comm.rank == 0:
        raise ValueError("after its words")
    comm.barrier()


@pytest.mark.parametrize("transport", PROCESSES)
def test_output_passes_through_and_mpiexec_keeps_quiet(transport: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="after its words"):
        launch(say, ranks=2, transport=transport)
    out, err = capfd.readouterr()
    assert "rank 0 to stdout" in out
    assert "rank 0 to stderr" in err
    for noise in ("MPI_ABORT", "prterun", "PRTE", "mpiexec"):
        assert noise not in out + err


SCRIPT = """
    import os, sys, torch
    import helper_beside_the_script
    from shardsum import launch

    def f(comm, x):
        total = sum(int(part) for part in comm.all_gather(torch.tensor(x + comm.rank)))
        return total + helper_beside_the_script.ONE

    def sleep(comm):
        import time
        open(f"{sys.argv[2] if len(sys.argv) > 2 else os.environ['STARTED']}.{comm.rank}", "w").close()
        time.sleep(60)

    if __name__ == "__main__":
        if sys.argv[1] == "sleep":
            launch(sleep, ranks=2, transport=os.environ["TRANSPORT"])
        print(launch(f, ranks=2, transport=sys.argv[1], args=(10,)))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper_beside_the_script.py").write_text("ONE = 1\n")
    path = tmp_path / "main_script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


@pytest.mark.parametrize("transport", EVERY)
def test_functions_of_the_main_script(script: Path, transport: str) -> None:
    command = [sys.executable, script.name, transport]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[22, 22]\n"), done.stderr


@pytest.mark.parametrize("transport", PROCESSES)
def test_ctrl_c_ends_every_rank(script: Path, transport: str, tmp_path: Path) -> None:
    started = tmp_path / "started"
    environment = {**os.environ, "TRANSPORT": transport, "STARTED": str(started)}
    parent = subprocess.Popen(
        [sys.executable, str(script), "sleep"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    end = time.monotonic() + 30
    while not all(Path(f"{started}.{rank}").exists() for rank in range(2)) and time.monotonic() < end:
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    output, _ = parent.communicate(timeout=20)
    assert b"KeyboardInterrupt" in output
