"""Every example runs and prints what it says it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The real model is loaded by three processes for it, which takes most of a minute.
SLOW = {"05_fine_tune"}
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.nightly] * (path.stem in SLOW))
    for path in sorted((ROOT / "examples").glob("*.py"))
]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_prints_what_it_says(example: Path) -> None:
    """With the arguments that the file names beside its output."""
    _, arguments, output = re.split(r"# Output(?: with (.*))?:\n", example.read_text())
    expected = re.sub(r"^# ?", "", output, flags=re.MULTILINE)
    assert run(sys.executable, str(example), *(arguments or "").split()) == expected.strip()


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_the_same_script_under_any_launcher(launcher: str) -> None:
    script = str(ROOT / "examples" / "04_any_launcher.py")
    beside = Path(sys.executable).parent
    if launcher == "mpiexec":
        command = [str(beside / "mpiexec"), "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable]
    else:
        command = [str(beside / "torchrun"), "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    assert run(*command, script) == "sum over all ranks: [66.0, 66.0]"
