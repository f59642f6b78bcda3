"""The examples in docstrings (``>>>``) do what they say: each is run, with the names of its module."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import miniloader
from fixtures.build import ROOT

EXAMPLES = ">>> "
MODULES = sorted(
    path for path in (ROOT / "miniloader").rglob("*.py") if EXAMPLES in path.read_text(encoding="utf-8")
)
#: Rooms whose public functions show how they are used.
ROOMS = ("elf", "evidence", "kernel", "lab", "loader")


def examples_of(path: Path) -> Iterator[doctest.DocTest]:
    """The docstrings of a module that have examples; those of properties and decorated functions, too."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    names = {"miniloader": miniloader, **vars(import_module(name))}
    parser = doctest.DocTestParser()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            if text is not None and EXAMPLES in text:
                line = node.body[0].lineno - 1
                yield parser.get_doctest(text, names, getattr(node, "name", name), str(path), line)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "miniloader")))
def test_examples_do_what_they_say(path: Path) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for example in examples_of(path):
        runner.run(example, out=said.append)
    assert runner.tries, "no example was found"
    assert not runner.failures, "".join(said)


def test_the_rooms_have_examples() -> None:
    """In each room some functions show how they are used."""
    for room in ROOMS:
        within = [path for path in MODULES if path.is_relative_to(ROOT / "miniloader" / room)]
        assert sum(1 for path in within for _ in examples_of(path)) >= 3, room


def test_a_wrong_example_is_seen() -> None:
    parser, said = doctest.DocTestParser(), list[str]()
    runner = doctest.DocTestRunner()
    runner.run(parser.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0), out=said.append)
    assert runner.failures == 1
