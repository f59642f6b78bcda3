"""How a value shows itself in Python: a few lines of text for ``str``, HTML for a notebook.

Both are made of the parts that the command line shows; :class:`miniloader.showing.Showing` asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from html import escape
from itertools import groupby
from typing import Any, Final

from miniloader.elf import ElfImage, LoadPlan
from miniloader.errors import printable
from miniloader.forking import importing
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.report.text import Cell, Line, Part, Piece, Table, laid_out, pairs, plain

__all__ = [
    "audit_rows",
    "html_of",
    "image_json",
    "symbol_rows",
    "text_of",
    "write_audit",
    "write_proof",
]

Path = str | os.PathLike[str]

_WIDTH: Final = 100
#: Styles of the text system as CSS, legible on white and on black.
_COLOURS: Final = {
    "red": "#d70000", "green": "#008700", "yellow": "#af5f00", "blue": "#0087d7", "magenta": "#af5faf",
    "cyan": "#008787", "bright_black": "#767676", "bright_red": "#d75f5f", "bright_blue": "#5f5fd7",
    "bright_cyan": "#0087af", "dim": "#767676",
}  # fmt: skip
_PRE: Final = "margin:0;line-height:1.25;overflow-x:auto"


def text_of(value: object) -> str:
    """``value`` in a few lines, none of which ends in a space."""
    short, _ = _looks(value)
    return "\n".join(plain(line).rstrip() for line in laid_out(short(value), None))


def html_of(value: object) -> str:
    """``value`` as HTML that needs no style sheet and no script: tables, and drawings in ``<pre>``."""
    _, whole = _looks(value)
    groups = groupby(whole(value), lambda part: isinstance(part, Table))
    blocks = (map(_table, parts) if tables else [_pre(parts)] for tables, parts in groups)
    return f"<div>{''.join(block for group in blocks for block in group)}</div>"


# ------------------------------------------------------------------------------------- what is shown
Look = Callable[[Any], Iterable[Part]]


def _looks(value: object) -> tuple[Look, Look]:
    """How a value of this class looks: in short, and in a notebook."""
    return next(_LOOKS[base.__name__] for base in type(value).__mro__ if base.__name__ in _LOOKS)


def _proof_short(proof: Any) -> Iterator[Part]:
    with importing:
        from miniloader.report.prove import verdicts

    return verdicts(proof)


def _proof(proof: Any) -> Iterator[Part]:
    with importing:
        from miniloader.report.prove import lines

    return lines(proof, _WIDTH)


def _audit_short(audit: Any) -> Iterator[Part]:
    with importing:
        from miniloader.report.audit import summary

    return summary(audit)


def _audit(audit: Any) -> Iterator[Part]:
    with importing:
        from miniloader.report.audit import lines

    return lines(audit)


def _image_short(image: ElfImage) -> Iterator[Part]:
    with importing:
        from miniloader.report.inspect_view import overview

    return overview(image)


def _image(image: ElfImage) -> Iterator[Part]:
    with importing:
        from miniloader.report.inspect_view import page

    return page(image, PAGE_SIZE, _WIDTH, None)


def _plan(plan: LoadPlan) -> Iterator[Part]:
    yield Table(("call", "why"), [(call.text(), call.why) for call in plan.calls()])


def _library(library: Any) -> Iterator[Part]:
    yield ((printable(repr(library)[1:-1]), "bold"),)
    if not library.closed:
        needed = ", ".join(printable(loaded.name) for loaded in library.libraries[1:])
        took = ", ".join(f"{name} {ms:.1f} ms" for name, ms in library.stages_ms.items())
        yield pairs([("with", needed or "nothing else"), ("took", took)], indent=2)


_LOOKS: Final[dict[str, tuple[Look, Look]]] = {
    "Proof": (_proof_short, _proof),
    "Audit": (_audit_short, _audit),
    "ElfImage": (_image_short, _image),
    "LoadPlan": (_plan, _plan),
    "Library": (_library, _library),
}


# ------------------------------------------------------------------- rows, objects and whole pages
def image_json(image: ElfImage, page_size: int | None) -> dict[str, Any]:
    """What ``inspect --json`` prints."""
    with importing:
        from miniloader.report.inspect import to_json

    return to_json(image, page_size or PAGE_SIZE)


def symbol_rows(image: ElfImage) -> list[dict[str, Any]]:
    """The dynamic symbols, as ``inspect --symbols --json`` has them."""
    with importing:
        from miniloader.report.symbols import symbol_list

    return [asdict(symbol) for symbol in symbol_list(image, raw=False)]


def audit_rows(audit: Any, what: str) -> list[dict[str, Any]]:
    """The records of ``audit --csv``, each by the names of its columns."""
    with importing:
        from miniloader.report.audit_csv import records

    names, *rows = records(audit, what)
    return [dict(zip(map(str, names), row, strict=True)) for row in rows]


def write_proof(proof: Any, path: Path) -> None:
    """Write the page of a proof."""
    with importing:
        from miniloader.report import html

    html.write_proof(proof, path)


def write_audit(audit: Any, path: Path) -> None:
    """Write the page of an audit, with the libraries as they are now in processes that are still there."""
    with importing:
        from miniloader.lab.audit.library_pages import look
        from miniloader.report import html

    html.write_audit(audit, look(audit), path)


# --------------------------------------------------------------------------------------------- HTML
def _pre(lines: Iterable[Part]) -> str:
    text = "\n".join(_line(line) for line in laid_out(lines, None))
    return f'<pre style="{_PRE}">{text}\n</pre>'


def _table(table: Any) -> str:
    """A table with a heading as ``<table>``; names and values without one as text, set in as they are."""
    if not any(table.columns):
        return _pre([table])
    numbers = [name.startswith(">") for name in table.columns]
    heads = "".join(f"<th>{escape(name.removeprefix('>'))}</th>" for name in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row, numbers))}</tr>" for row in table.rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(cell: Cell, number: bool) -> str:
    style = "text-align:right;white-space:nowrap" if number else "text-align:left"
    return f'<td style="{style}">{_line(tuple(cell) if isinstance(cell, list) else (cell,))}</td>'


def _line(line: Line) -> str:
    return "".join(map(_piece, line))


def _piece(piece: Piece) -> str:
    """A piece of text, in its style."""
    if isinstance(piece, str):
        return escape(piece)
    text, style = piece
    css = [f"color:{_COLOURS[word]}" for word in style.split() if word in _COLOURS]
    css += ["font-weight:bold"] * ("bold" in style.split())
    return f'<span style="{";".join(css)}">{escape(text)}</span>' if css else escape(text)
