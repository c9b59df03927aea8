"""launch: what comes back, which error is raised, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from shardsum import AttentionState
from shardsum.comm import Communicator, connect
from shardsum.errors import RankLost, Unsupported
from shardsum.launching import launch, wire
from shardsum.launching.failures import read_failure
from shardsum.launching.worker import _report as report_error

PROCESSES = ["gloo", "mpi"]
EVERY = ["threads", *PROCESSES]
MPIEXEC = str(Path(sys.executable).parent / "mpiexec")


pytestmark = pytest.mark.usefixtures("nothing_stays_behind")


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


def _connect_in_another_thread() -> Communicator:
    found: list[Communicator] = []
    thread = threading.Thread(target=lambda: found.append(connect()))
    thread.start()
    thread.join()
    return found[0]


def give_back(comm: Communicator, value: Any) -> Any:
    return [comm.rank, comm.size, connect() is comm, value]


def say_and_give_back(comm: Communicator, value: Any) -> Any:
    print(f"{'long ' * 50_000}{comm.rank} end", end="")
    cores = (sorted(os.sched_getaffinity(0)), torch.get_num_threads())
    return [*give_back(comm, value), _connect_in_another_thread() is comm, cores]


@pytest.mark.parametrize("transport", PROCESSES)
def test_ranks_that_are_processes(transport: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Values return as they went; every thread finds its rank; ranks share the cores; what they print arrives."""
    torch.manual_seed(0)
    value = everything()
    results = launch(say_and_give_back, ranks=2, transport=transport, args=(value,))
    assert [result[:3] for result in results] == [[0, 2, True], [1, 2, True]]
    for result in results:
        assert_same(result[3], value)
    assert [result[4] for result in results] == [True, True]
    available = os.sched_getaffinity(0)
    (first, threads), (second, _) = (result[5] for result in results)
    if len(available) > 1:
        assert set(first).isdisjoint(second)
        assert set(first) | set(second) <= available
        assert threads == len(available) // 2
    out, err = capfd.readouterr()
    assert sorted(out.split("end")) == ["", *("long " * 50_000 + str(rank) + " " for rank in range(2))]
    assert err == ""


def test_ranks_that_are_threads_share_their_values() -> None:
    value = object()
    assert launch(give_back, ranks=2, transport="threads", args=(value,)) == [
        [0, 2, True, value],
        [1, 2, True, value],
    ]


def test_closures_run_as_threads() -> None:
    held = torch.arange(4)
    results = launch(lambda comm: int(held[comm.rank]), ranks=4, transport="threads")
    assert results == [0, 1, 2, 3]
    with pytest.raises(TypeError, match="transport='threads'"):
        launch(lambda comm: comm.rank, ranks=2, transport="gloo")


class Holder:
    def method(self, comm: Communicator) -> int:
        return comm.rank


def test_no_room_for_what_goes_to_other_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(wire, "save_file", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"can't write .*arguments\.safetensors: .*No space left on device"):
        launch(give_back, 2, "gloo", (torch.ones(3),))
    assert list(tmp_path.iterdir()) == []


def mpiexecs_folder(comm: Communicator) -> str | None:
    return os.environ.get("PMIX_SERVER_TMPDIR")


def test_what_mpiexec_writes_goes_with_the_launch() -> None:
    (folder,) = launch(mpiexecs_folder, 1, "mpi")
    if folder is None:
        pytest.skip("this mpiexec is not Open MPI's")
    assert Path(folder).parent.name.startswith(f"shardsum-{os.getpid()}-")
    assert not Path(folder).exists()


def test_what_has_no_name_in_another_process_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Holder\.method' can't be found by name"):
        launch(Holder().method, ranks=2, transport="gloo")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, object()]}, r"\['a'\]\[1\].*object"),
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (np.array(["text"]), "array of <U4"),
        (np.arange(3, dtype=">i4"), "array of >i4"),
        ((torch.zeros(2, dtype=torch.complex128),), r"value\[0\]\[0\].*complex128"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
    ],
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


RULE = "-" * 80
# Open MPI's own words where a collective loses a peer (5.0.11, libnbc); no option stops them.
LIBNBC = re.compile(r"\n?NBC_Progress: an error \d+ was found during schedule \S+ at\s+row-offset \d+ - [a-z ]+\n")


class OwnError(Exception):
    """Not built in, not ours."""


def fail(comm: Communicator, failing: list[int]) -> None:
    sys.stdout.write(f"{RULE}\nrank {comm.rank} prints what looks like a message of mpiexec\n{RULE}\n")
    sys.stderr.write(f"rank {comm.rank} to stderr\n")
    if comm.rank in failing:
        raise ZeroDivisionError(f"on rank {comm.rank}")
    comm.barrier()  # the others wait for the failed one


@pytest.mark.parametrize(("transport", "ranks"), [("threads", 3), ("gloo", 3), ("mpi", 2)])
def test_an_error_is_raised_with_its_rank_and_hidden_by_no_lost_peer(
    transport: str, ranks: int, capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="on rank 1") as raised:
        launch(fail, ranks, transport, args=([*range(1, ranks)],))
    assert raised.value.rank == 1  # type: ignore[attr-defined]
    assert time.monotonic() - start < 30  # not the deadline's 300 s
    if transport != "threads" and sys.version_info >= (3, 11):
        assert "in fail" in "".join(raised.value.__notes__)
    out, err = capfd.readouterr()
    words = [f"rank {rank} prints what looks like a message of mpiexec" for rank in range(ranks)]
    assert sorted(out.splitlines()) == sorted([RULE] * 2 * ranks + words)
    err = LIBNBC.sub("", err)
    assert sorted(err.splitlines()) == [f"rank {rank} to stderr" for rank in range(ranks)]  # nothing of mpiexec


def _raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:  # noqa: BLE001
        return raised


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OwnError("something of my own"), RuntimeError, "OwnError: something of my own"),
        (Unsupported("that can't be done"), Unsupported, "that can't be done"),
        (KeyError("absent"), KeyError, "'absent'"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            RuntimeError,
            "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
    ],
)
def test_the_class_of_an_error(error: BaseException, kind: type, words: str, tmp_path: Path) -> None:
    report_error(tmp_path, 2, _raised(error))
    failure = read_failure(tmp_path, 2, None)
    assert failure is not None
    assert (type(failure[1]), str(failure[1])) == (kind, words)


def die(comm: Communicator, how: str) -> None:
    if comm.rank == 1:
        if how == "exit":
            sys.exit(3)
        if how == "_exit":
            os._exit(5)
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()


@pytest.mark.parametrize(
    ("transport", "how", "words"),
    [
        ("threads", "exit", r"sys.exit\(3\)"),
        ("mpi", "exit", r"sys.exit\(3\)"),
        *((transport, "_exit", "exit status 5") for transport in PROCESSES),
        *((transport, "kill", "signal 9") for transport in PROCESSES),
    ],
)
def test_a_rank_that_dies_without_a_word_is_named(transport: str, how: str, words: str) -> None:
    with pytest.raises(RankLost, match=f"rank 1 ended without a result: {words}") as raised:
        launch(die, ranks=2, transport=transport, args=(how,))
    assert raised.value.rank == 1  # type: ignore[attr-defined]


def test_mpiexec_that_starts_nothing_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardsum.launching.mpiexec._mpiexec", lambda ranks: [MPIEXEC, "--no-such-option"])
    with pytest.raises(RankLost, match=r"(?s)rank 0 ended without a result: mpiexec: .*no-such-option"):
        launch(die, ranks=2, transport="mpi", args=("exit",))


def come_later(comm: Communicator) -> float:
    start = time.monotonic()
    if comm.rank == 0:
        raise ValueError("at once")
    with pytest.raises(RankLost, match="rank 0 failed"):
        comm.barrier()
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


def test_threads_share_the_cores_and_leave_the_callers_number_alone() -> None:
    before = torch.get_num_threads()
    ranks = len(os.sched_getaffinity(0)) + 1
    assert launch(lambda comm: torch.get_num_threads(), ranks, "threads") == [1] * ranks
    assert torch.get_num_threads() == before


def test_ctrl_c_ends_ranks_that_are_threads() -> None:
    def wait_for_each_other(comm: Communicator) -> None:
        if comm.rank == 0:
            os.kill(os.getpid(), signal.SIGINT)
        comm.exchange(torch.zeros(1), to=1 - comm.rank, source=comm.rank, shape=(1,))()

    # A shell that starts the tests in the background has switched Ctrl-C off for them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(wait_for_each_other, ranks=2, transport="threads")
    finally:
        signal.signal(signal.SIGINT, before)


SCRIPT = """
    import os, signal, sys, time, torch
    import helper_beside_the_script
    from shardsum import launch

    transport, started = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # off in what a shell starts in the background

    def sleep(comm, x):
        total = sum(int(part) for part in comm.all_gather(torch.tensor(x + comm.rank)))
        total += helper_beside_the_script.ONE
        print(f"rank {comm.rank}: total {total}, on a terminal: {sys.stdout.isatty()}")
        open(f"{started}.{comm.rank}", "w").close()
        time.sleep(60)

    if __name__ == "__main__":
        launch(sleep, ranks=2, transport=transport, args=(10,))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("transport", PROCESSES)
def test_functions_of_the_main_script_end_with_it(transport: str, end: signal.Signals, tmp_path: Path) -> None:
    """On a terminal for one of the two ends: the ranks then write to it themselves."""
    (tmp_path / "helper_beside_the_script.py").write_text("ONE = 1\n")
    (tmp_path / "main_script.py").write_text(textwrap.dedent(SCRIPT))
    started = [tmp_path / f"started.{rank}" for rank in range(2)]
    on_terminal = end == signal.SIGINT
    reading, writing = os.openpty() if on_terminal else os.pipe()
    command = [sys.executable, "main_script.py", transport, str(tmp_path / "started")]
    parent = subprocess.Popen(command, cwd=tmp_path, stdout=writing, stderr=writing)
    os.close(writing)
    limit = time.monotonic() + 60
    while not all(file.exists() for file in started) and parent.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    parent.send_signal(end)
    parent.wait(20)
    output = b""
    with contextlib.suppress(OSError):  # how a terminal without a writer ends
        while part := os.read(reading, 4096):
            output += part
    os.close(reading)
    for rank in range(2):
        assert f"rank {rank}: total 22, on a terminal: {on_terminal}".encode() in output
    assert (b"KeyboardInterrupt" in output) == on_terminal


def modes(comm: Communicator, launcher: int) -> dict[str, str]:
    """The permissions of every directory that the launch has made."""
    comm.barrier()
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    made = [path for place in places for path in place.glob(f"shardsum-{launcher}-*")]
    found = {str(path): oct(path.stat().st_mode & 0o777) for path in made}
    comm.barrier()
    return found


@pytest.mark.parametrize("transport", PROCESSES)
def test_what_a_launch_makes_is_its_users_alone(transport: str) -> None:
    before = os.umask(0)
    try:
        found = launch(modes, ranks=2, transport=transport, args=(os.getpid(),))
    finally:
        os.umask(before)
    assert all(len(each) == 2 and set(each.values()) == {"0o700"} for each in found), found
