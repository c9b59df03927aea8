"""A long real text that lies on every machine: the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

TOKENS = 6500
QUESTION = "Which distributions does the module random offer?"
# The question is about the last one; the others make the text long.
SUBJECT = "random"
OTHERS = ("tempfile", "shutil", "textwrap", "heapq", "datetime", "collections", "json", "statistics")


def text_and_question(count: Callable[[str], int]) -> str:
    """At least TOKENS tokens of documentation, as `count` counts them, and a question about its last part."""
    subject = list(_documentation(SUBJECT))
    total = sum(count(passage) for passage in subject)
    text = []
    for passage in (passage for module in OTHERS for passage in _documentation(module)):
        if total >= TOKENS:
            break
        text.append(passage)
        total += count(passage)
    return "\n\n".join([*text, *subject, QUESTION])


def _documentation(module: str) -> Iterator[str]:
    """Each documentation string under its name; the source is read, nothing is imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            written = ast.get_docstring(node)
            if written:
                yield f"# {module if isinstance(node, ast.Module) else f'{module}.{node.name}'}\n{written}"
