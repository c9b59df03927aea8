"""Every example, and every Python block of the README, runs and prints what it says it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shardsum

from .hf.tiny import tiny

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_it_says(example: Path) -> None:
    """With the arguments that the file names beside its output."""
    _, arguments, output = re.split(r"# Output(?: with (.*))?:\n", example.read_text())
    expected = re.sub(r"^# ?", "", output, flags=re.MULTILINE)
    assert run(sys.executable, str(example), *(arguments or "").split()) == expected.strip()


def test_the_readmes_example_prints_what_it_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for number, (code, expected) in enumerate(blocks):
        script = tmp_path / f"block_{number}.py"
        script.write_text(code)
        assert run(sys.executable, str(script)) == expected.strip()


def test_the_readmes_fragments_run() -> None:
    """The blocks that print nothing, with the names that the text around them takes for granted."""
    fragments = re.findall(
        r"```python\n((?:(?!```).)*)```\s*(?!```text)[^`\s]", (ROOT / "README.md").read_text(), re.DOTALL
    )
    model = tiny("Llama")
    ids = torch.arange(2 * 96).view(2, 96) % 97
    before = [weight.detach().clone() for weight in model.parameters()]
    names: dict[str, Any] = {"shardsum": shardsum, "comm": shardsum.connect("single"), "model": model}
    names |= {"batches": [(ids, ids)], "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    names |= dict(zip("qkv", torch.randn(3, 1, 2, 600, 8), strict=True))
    for fragment in fragments:
        exec(fragment, names)
    assert len(fragments) == 2
    assert not all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert names["out"].shape == (1, 2, 600, 8)


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_the_same_script_under_any_launcher(launcher: str) -> None:
    script = str(ROOT / "examples" / "04_any_launcher.py")
    beside = Path(sys.executable).parent
    if launcher == "mpiexec":
        command = [str(beside / "mpiexec"), "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable]
    else:
        command = [str(beside / "torchrun"), "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    assert run(*command, script) == "sum over all ranks: [66.0, 66.0]"
