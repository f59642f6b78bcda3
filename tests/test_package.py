"""The package's face: its public names and where they come from; what holds for each of its modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import miniloader

PACKAGE: Final = Path(miniloader.__file__).parent
#: Where a function may import without :data:`miniloader.forking.importing`, and why no fork meets it there.
UNGUARDED: Final = {
    "__main__.py": "the command begins there: no other thread is there yet",
    "cli": "the command line: its first thread does all this, and forks itself",
    "lab/workers/scripted.py": "a process of ours, whose only thread carries out one command at a time",
    "lab/workers/worker.py": "a process of ours, whose only thread carries out one command at a time",
    "loader/running/follow/sitecustomize.py": "an interpreter that is just starting",
}


@pytest.mark.parametrize("name", miniloader.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(miniloader, name)
    assert value is getattr(miniloader, name)
    assert getattr(value, "__name__", name) == name
    assert name in dir(miniloader)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = miniloader.nonsense  # type: ignore[attr-defined]


def test_errors_are_one_family() -> None:
    errors = [getattr(miniloader, name) for name in miniloader.__all__ if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, miniloader.MiniloaderError) for error in errors)


def unguarded(node: ast.AST, *, waits: bool = False) -> Iterator[int]:
    """The lines below ``node`` that import when a function runs (``waits``), without the lock for forks."""
    for part in ast.iter_child_nodes(node):
        match part:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.With(items=[ast.withitem(context_expr=ast.Name(id="importing" | "_importing"))]):
                continue
            case ast.Import() | ast.ImportFrom() if waits:
                yield part.lineno
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module")
            ):
                yield part.lineno
        function = isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from unguarded(part, waits=waits or function)


def test_imports_that_wait_for_need_are_made_under_the_lock_for_forks() -> None:
    """A thread that imports while another forks leaves the child with locks that nobody opens again."""
    places, needed = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        excuse = {module, module.partition("/")[0]} & UNGUARDED.keys()
        lines = [*unguarded(ast.parse(path.read_bytes()))]
        if lines:
            needed |= excuse
        places += [f"miniloader/{module}:{line}" for line in lines if not excuse]
    assert places == [], "put each under `with importing:` (miniloader/forking.py)"
    assert needed == UNGUARDED.keys()
