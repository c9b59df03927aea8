"""Sizes, words and names that the code keeps to (CONTRIBUTING.md), read from its syntax."""

from __future__ import annotations

import ast
import inspect
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import shardsum
import shardsum.hf
from shardsum.collectives import COLLECTIVES
from shardsum.comm import TRANSPORTS
from shardsum.kernels import KERNELS
from shardsum.strategies import STRATEGIES

SOURCE = Path(shardsum.__file__).parent
CLASS_LINES, PARAMETERS, TUPLE_ENTRIES, FUNCTION_LINES = 150, 8, 4, 21
# First lines that say nothing to somebody who has not read the line above.
LEANING = ("The same", "Those", "That of", "That which", "Of ", "Its ", "Itself", "So many")
# By the file that each stands in.
REGISTRIES: dict[str, dict[str, type]] = {
    "strategies/__init__.py": STRATEGIES,
    "collectives/__init__.py": COLLECTIVES,
    "kernels/__init__.py": KERNELS,
    "comm/registry.py": TRANSPORTS,
}
PUBLIC = {*shardsum.__all__, *shardsum.hf.__all__}

# What stays although a check finds it, by file or scope, and why.
_OF_A_REPORT = "how many threads a process has, in a report"
_OF_A_JOB = "how many threads a rank has, or that it is one"
EXCEPTIONS: dict[str, dict[str, str]] = {
    "names_outside_registries": {
        "bench/timing.py:machine": _OF_A_REPORT,
        "cli/comparison.py": _OF_A_REPORT,
        "cli/doctor.py:examine": "what each transport lacks here is said in words of its own",
        "cli/generation.py": _OF_A_REPORT,
    },
}


class Scope(NamedTuple):
    """A module, class or function: its file, its qualified name, its syntax."""

    file: str
    name: str
    syntax: Any

    @property
    def where(self) -> str:
        return f"{self.file}:{self.name}"

    def inner(self) -> Iterator[Scope]:
        """The scope itself and all that it defines."""
        yield self
        for node in self.nodes():
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                yield from Scope(self.file, f"{self.name}.{node.name}".lstrip("."), node).inner()

    def nodes(self) -> Iterator[ast.AST]:
        """What stands in it, but not in what it defines."""
        below = list(ast.iter_child_nodes(self.syntax))
        while below:
            node = below.pop(0)
            yield node
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                below += ast.iter_child_nodes(node)


@cache
def scopes() -> list[Scope]:
    files = sorted(SOURCE.rglob("*.py"))
    modules = [Scope(str(file.relative_to(SOURCE)), "", ast.parse(file.read_text())) for file in files]
    return [scope for module in modules for scope in module.inner()]


def functions() -> list[Scope]:
    return [scope for scope in scopes() if isinstance(scope.syntax, ast.FunctionDef)]


def lines(syntax: Any) -> int:
    return int(syntax.end_lineno - syntax.lineno + 1)


Found = Iterator[tuple[Scope, object]]


def long_classes() -> Found:
    for scope in scopes():
        if isinstance(scope.syntax, ast.ClassDef) and lines(scope.syntax) > CLASS_LINES:
            yield scope, lines(scope.syntax)


def broad_functions() -> Found:
    for scope in functions():
        given = scope.syntax.args
        names = [parameter.arg for parameter in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > PARAMETERS and scope.name.split(".")[0] not in PUBLIC:
            yield scope, count


def long_tuples() -> Found:
    """Annotations tuple[...] of more entries than anybody can tell apart, and such tuples returned or passed."""
    for scope in scopes():
        if scope.name.endswith(".backward"):  # as torch.autograd wants it: a gradient for each input
            continue
        for node in scope.nodes():
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "tuple":
                entries = [node.slice]
            elif isinstance(node, ast.Return):
                entries = [node.value]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) != "isinstance":
                entries = node.args
            else:
                continue
            counts = [len(entry.elts) for entry in entries if isinstance(entry, ast.Tuple)]
            if max(counts, default=0) > TUPLE_ENTRIES:
                yield scope, max(counts)


def leaning_docstrings() -> Found:
    for scope in scopes():
        first = (ast.get_docstring(scope.syntax) or "").partition("\n")[0]
        if first.startswith(LEANING):
            yield scope, first


def hidden_imports() -> Found:
    """Imports behind TYPE_CHECKING, which hide circles."""
    for scope in scopes():
        if any(isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) for node in scope.nodes()):
            yield scope, "TYPE_CHECKING"


def forest_twins() -> Found:
    """Places that ask whether partial results are a forest."""
    for scope in scopes():
        for node in scope.nodes():
            text = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if text.startswith("isinstance(") and "Forest" in text:
                yield scope, text


def names_outside_registries() -> Found:
    """Strategies, collectives, kernels and transports known by name outside their own modules and registries."""
    homes = _homes()
    del homes["single"]  # one rank alone: no choice between transports
    for scope in scopes():
        for node in scope.nodes():
            if isinstance(node, ast.Constant) and scope.file not in homes.get(node.value, {scope.file}):
                yield scope, node.value


def _homes() -> dict[object, set[str]]:
    """The files that may know each name: its own module and the registry."""
    homes: dict[object, set[str]] = {}
    for file, registry in REGISTRIES.items():
        for name, entry in registry.items():
            own = str(Path(inspect.getfile(entry)).relative_to(SOURCE))
            homes.setdefault(name, set()).update((own, file))
    return homes


CHECKS: dict[str, Callable[[], Found]] = {
    check.__name__: check
    for check in (
        long_classes,
        broad_functions,
        long_tuples,
        leaning_docstrings,
        hidden_imports,
        forest_twins,
        names_outside_registries,
    )
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_code_keeps_to(check: str) -> None:
    excepted = EXCEPTIONS.get(check, {}).keys()
    found = [(scope, f"{scope.where}: {what}") for scope, what in CHECKS[check]()]
    wrong = [said for scope, said in found if not excepted & {scope.where, scope.file}]
    assert not wrong, "\n".join(["", *wrong])
    assert excepted <= {name for scope, _ in found for name in (scope.where, scope.file)}, "no exception any more"


def test_most_functions_are_short() -> None:
    counts = [lines(scope.syntax) for scope in functions()]
    assert statistics.quantiles(counts, n=10)[-1] <= FUNCTION_LINES
