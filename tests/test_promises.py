"""What README, docs and docstrings promise: trees, fragments, commands and lists, executed or compared."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import click
import pytest

import shardsum
from shardsum import cli
from shardsum.collectives import COLLECTIVES
from shardsum.comm import TRANSPORTS, SingleTransport
from shardsum.kernels import KERNELS
from shardsum.layouts import NAMES as LAYOUTS
from shardsum.strategies import STRATEGIES

from . import tree

ROOT = tree.ROOT
README = tree.README.read_text()
DOCUMENTS = {path.name: path.read_text() for path in (tree.README, *sorted((ROOT / "docs").glob("*.md")))}
COMPUTING = [name for name, kernel in KERNELS.items() if kernel.computes]
RANKS = [name for name in TRANSPORTS if name != SingleTransport.name]

# What the text around a fragment takes for granted, by a word of it, and what holds when it has run.
SURROUNDINGS = {
    "hf.training": (
        """
        import torch
        from shardsum import connect
        from transformers import LlamaConfig, LlamaForCausalLM
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        comm, ids = connect("single"), torch.arange(2 * 96).view(2, 96) % 97
        batches, optimizer = [(ids, ids)], torch.optim.SGD(model.parameters(), 0.1)
        before = [weight.detach().clone() for weight in model.parameters()]
        """,
        "assert not all(torch.equal(*pair) for pair in zip(before, model.parameters()))",
    ),
    '"reproducible": True': (
        """
        import torch
        from shardsum import connect
        comm, (q, k, v) = connect("single"), torch.randn(3, 1, 2, 600, 8)
        """,
        "assert out.shape == (1, 2, 600, 8)",
    ),
    # docs/extending.md
    "class GatherWhole": ("from tests import extending", "extending.check_strategy(GatherWhole.name)"),
    "class Chunked": (
        "from tests import extending",
        """
        rows = torch.arange(50)
        sees = (rows[:, None] // 7 == rows // 7) & (rows <= rows[:, None])
        extending.check_mask(Chunked(50, 50, causal=True, chunk=7), sees)
        """,
    ),
    "class Star": ("", "from tests import extending\nextending.check_collective(Star.name)"),
    "class OnlineKernel": ("", "from tests import extending\nextending.check_kernel(OnlineKernel.name)"),
    "class FolderTransport": ("from tests import extending", "extending.check_transport(FolderTransport)"),
    "def hosts": ("from tests import extending", "extending.check_command(group, hosts.name)"),
}


def fragments(language: str) -> Iterator[tuple[str, str, str]]:
    """Each fenced block of a language: its document, itself, and the output that follows it, if any."""
    pattern = rf"```{language}\n(.*?)```(?:\s*```text\n(.*?)```)?"
    for name, text in DOCUMENTS.items():
        for code, output in re.findall(pattern, text, re.DOTALL):
            yield name, code, output


def test_the_readmes_tree_is_that_of_the_house() -> None:
    assert tree.rewritten(README) == README, "python -m tests.tree --write"
    assert tree.tree() in README


def test_what_the_tree_names_outside_src_is_there() -> None:
    top = ROOT
    for name, line in tree.OUTSIDE.items():
        top = top if name.startswith(" ") else ROOT / name
        for file in (name.strip(), *re.findall(r"[\w-]+\.(?:py|md)\b|[\w-]+/(?=\s)", line)):
            assert (top / file).exists() or (ROOT / file).exists(), (name, file)


@pytest.mark.parametrize(("document", "code", "output"), [*fragments("python")])
def test_a_fragment_runs_and_prints_what_it_says(document: str, code: str, output: str, tmp_path: Path) -> None:
    before, after = next((around for word, around in SURROUNDINGS.items() if word in code), ("", ""))
    script = tmp_path / "fragment.py"
    script.write_text(f"{inspect.cleandoc(before)}\n{code}\n{inspect.cleandoc(after)}\n")
    command = [sys.executable, str(script)]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=paths)
    assert done.returncode == 0, (document, done.stderr)
    assert done.stdout.strip() == output.strip()


def commands() -> Iterator[tuple[str, list[str], bool]]:
    """Each command of ours in a document, as the words after `shardsum`, and whether it is whole.

    Text that speaks of one option names no others. The log tells what once was.
    """
    for name, code, _ in fragments("sh"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            names = [Path(word).name for word in words]
            if "shardsum" in names and "pip" not in names:
                yield name, words[names.index("shardsum") + 1 :], True
    for name, text in DOCUMENTS.items():
        for line in [] if name == "log.md" else re.findall(r"`shardsum ([a-z][^`]*)`", text):
            yield name, shlex.split(line), False


@pytest.mark.parametrize(("document", "words", "whole"), [*commands()])
def test_a_command_can_be_given_as_it_is_written(document: str, words: list[str], whole: bool) -> None:
    command: click.Command = cli.group
    name = "shardsum"
    while isinstance(command, click.Group) and words:
        name, *words = words
        command = command.commands[name]
    if isinstance(command, click.Group):
        return
    with contextlib.nullcontext() if whole else contextlib.suppress(click.MissingParameter):
        command.make_context(name, words)


def test_what_is_to_be_made_can_be_made() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in (*DOCUMENTS.values(), (ROOT / "CONTRIBUTING.md").read_text()):
        assert {*re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)} <= targets


def test_links_lead_somewhere() -> None:
    for path in (tree.README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text()
        for target, _, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)\s]*))?\)", text):
            there = path.parent / target if target else path
            assert there.exists(), (path.name, target)
            if heading:
                headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}
                assert heading in anchors, (path.name, heading)


def entry(text: str, begins: str) -> str:
    """The item of a list, or the row of a table, that begins so."""
    (found,) = re.findall(rf"^ *[-|] {re.escape(begins)}.*?(?=\n *[-|] |\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


DOCSTRING = inspect.getdoc(shardsum.attention) or ""
LISTS: dict[str, tuple[str, Collection[str]]] = {
    "attention's strategies": (entry(DOCSTRING, "`strategy`"), STRATEGIES),
    "attention's layouts": (entry(DOCSTRING, "`layout`"), LAYOUTS),
    "attention's kernels": (entry(DOCSTRING, "`kernel`"), COMPUTING),
    "attention's collectives": (entry(DOCSTRING, "`collective`"), COLLECTIVES),
    "README's strategies": (entry(README, "`shardsum.attention"), STRATEGIES),
    "README's layouts": (entry(README, "`shardsum.attention"), LAYOUTS),
    "README's transports": (entry(README, "`shardsum.launch`"), RANKS),
    "README's commands": ("\n".join(re.findall(r"^\| `shardsum \w+", README, re.MULTILINE)), cli.COMMANDS),
    **{
        f"choose.md's {kind}": (DOCUMENTS["choose.md"], names)
        for kind, names in {
            "strategies": STRATEGIES,
            "layouts": LAYOUTS,
            "kernels": COMPUTING,
            "collectives": COLLECTIVES,
            "transports": RANKS,
        }.items()
    },
}


@pytest.mark.parametrize("what", LISTS)
def test_a_list_has_all(what: str) -> None:
    text, names = LISTS[what]
    assert not {name for name in names if not re.search(rf"\b{name}\b", text, re.IGNORECASE)}
    if what.startswith("attention's"):
        assert {*re.findall(r'"(\w+)"', text)} <= {*names, "auto"}


def test_each_argument_of_attention_is_described() -> None:
    assert {*inspect.signature(shardsum.attention).parameters} <= set(re.findall(r"\w+", DOCSTRING))
