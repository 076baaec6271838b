"""Docstring rules of this project that ruff does not have."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "hf_adafisher").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
LITERAL = re.compile(r"``[^`]+``")

RULES: dict[str, Callable[[str], object]] = {
    "the first line opens with an indirect question": re.compile(
        r"(What|Whether|Where|How|Which|That|The same|Is)\b"
    ).match,
    "Sphinx role": re.compile(r":[a-z]+:`").search,
    "single backticks": lambda text: "`" in LITERAL.sub("", text),
    "the first line does not end with a period": lambda text: not text.split("\n")[0].endswith("."),
}


def public_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield the names and docstrings of a node and of the public definitions inside it, function bodies excepted."""
    if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)) is not None:
        yield name, text
    if isinstance(node, (*FUNCTIONS, ast.expr)):
        return
    for child in ast.iter_child_nodes(node):
        own = getattr(child, "name", None) if isinstance(child, DOCUMENTED) else None
        if own is None:
            yield from public_docstrings(child, name)
        elif not own.startswith("_") or own.endswith("__"):
            yield from public_docstrings(child, f"{name}.{own}")


def violations(rule: str, docstrings: list[tuple[str, str]]) -> list[str]:
    return [name for name, text in docstrings if RULES[rule](text)]


@pytest.fixture(scope="module")
def docstrings() -> list[tuple[str, str]]:
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    return [pair for name, tree in trees.items() for pair in public_docstrings(tree, name)]


@pytest.mark.parametrize("rule", RULES)
def test_public_docstrings(rule: str, docstrings: list[tuple[str, str]]) -> None:
    assert len(docstrings) > 500
    names = violations(rule, docstrings)
    assert not names, f"{rule}, {len(names)} times:\n" + "\n".join(names)


SAMPLE = '''"""{} of the module.

More.
"""

class Public:
    """{} of the class."""

    def method(self):
        """{} of the method."""

    def __call__(self):
        """{} of the call."""

    def _private(self):
        """{} of no interest."""

if True:
    async def function():
        """{} of the function."""
        def inner():
            """{} of no interest."""

class _Private:
    def method(self):
        """{} of no interest."""
'''
NAMES = ["m", "m.Public", "m.Public.method", "m.Public.__call__", "m.function"]


def sample_docstrings(opening: str) -> list[tuple[str, str]]:
    return list(public_docstrings(ast.parse(SAMPLE.replace("{}", opening)), "m"))


@pytest.mark.parametrize(
    ("rule", "opening"),
    [
        *((next(iter(RULES)), text) for text in ("What", "Whether", "Where", "How", "Which", "That", "The same", "Is")),
        ("Sphinx role", "Reads :func:`it`"),
        ("Sphinx role", "Reads :meth:`it`"),
        ("single backticks", "The ``a`` and `b`"),
        ("single backticks", "A `b`"),
        ("the first line does not end with a period", "Two\nlines"),
    ],
)
def test_violations_are_found_at_every_public_name(rule: str, opening: str) -> None:
    assert violations(rule, sample_docstrings(opening)) == NAMES


@pytest.mark.parametrize("opening", ["Selection metric", "Isotropic part", "Whatever", "The ``a`` and ``b``"])
def test_good_docstrings_pass(opening: str) -> None:
    assert [violations(rule, sample_docstrings(opening)) for rule in RULES] == [[], [], [], []]
