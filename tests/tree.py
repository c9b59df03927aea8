"""The README's tree of the house, made of import-linter's layers and of docstrings.

python -m tests.tree            # print it
python -m tests.tree --write    # put it into the README
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from importlinter.api import read_configuration

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PACKAGE = "src/shardsum"
COLUMNS = 120
# What has no docstring of ours, and a few folders of tests.
OUTSIDE = {
    "native/": "the kernels in C++, compiled for each instruction set, chosen at run time",
    "src/shardsum_command/": "the command's first moment: a signal is heard before torch is imported",
    "tests/": "mirrors src; dense.py is attention written a second time, independently, in float64",
    "  distributed/": "every kernel x strategy x layout x mask on 1 to 5 ranks (make test: a sample), random "
    "problems with all gradients, and the traps: bugs put back on purpose",
    "  hosts/": "several hosts, made of network namespaces",
    "  properties/": "the merge laws, and the bound on errors beside 50 digits (exact.py), by Hypothesis",
    "  contracts.py": "what every communicator must do",
    "  extending.py": "what the docs add from outside, put through the suites that would find it",
    "  test_promises.py": "what README and docs promise, executed; test_sizes.py: how large things may be",
    "  unpickling/": "a bomb in place of pickle's loaders",
    "benchmarks/": "ratios against one process, other libraries beside ours, memory by ranks; results/ in JSON",
    "examples/": "numbered; CI compares what they print",
    "docs/": "choose.md: which strategy, layout, kernel and transport; extending.md: adding one of each; "
    "native.md: the C++; edges.md: where other people's code is met; log.md: what was measured and tried; "
    "defense-of-design.md: why it is built this way; "
    "theory.md: what rounding can do; reproducible.md, hosts.md, security.md",
}


def layers() -> list[list[str]]:
    """Return the names that stand in each layer of import-linter's contract, from the ground up."""
    (contract,) = (
        c for c in read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"] if "layers" in c
    )
    return [re.split(r"\s*[|:]\s*", layer) for layer in reversed(contract["layers"])]


def entries() -> Iterator[tuple[str, str]]:
    """Yield each module and package of shardsum in that order, then what lies outside, each with its line."""
    yield f"{PACKAGE}/", ""
    for layer in layers():
        for name in layer:
            folder = ROOT / PACKAGE / name
            file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            first = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
            yield f"  {folder.name}/" if folder.is_dir() else f"  {file.name}", first.rstrip(".")
    yield from OUTSIDE.items()


def tree() -> str:
    """Return the tree as it stands in the README."""
    found = list(entries())
    start = 2 + max(len(name) for name, _ in found)
    texts = [
        textwrap.fill(line, COLUMNS, initial_indent=name.ljust(start), subsequent_indent=" " * start)
        if line
        else name
        for name, line in found
    ]
    return "\n".join(texts)


def rewritten(readme: str) -> str:
    """Return the README with this tree in place of the one that it has."""
    return re.sub(rf"(?<=```\n){PACKAGE}/\n.*?(?=\n```)", lambda _: tree(), readme, flags=re.DOTALL)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(rewritten(README.read_text()))
    else:
        print(tree())
