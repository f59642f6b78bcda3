"""Proofs, chapters and audits as one self-contained HTML file each: no network, no framework.

The page is whole without its script (claims, tables, listings); the script draws the matrices from data
that is deflated into the file.  A policy in the page forbids everything but its own script and style, by
their hashes, so that no name from a file or a process can act.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from miniloader import __version__
from miniloader.errors import MiniloaderError, printable
from miniloader.files import write_whole
from miniloader.forking import importing
from miniloader.report.matrix_data import Film, encode, table_of
from miniloader.report.numbers import size
from miniloader.report.page_notes import short
from miniloader.report.text import VERDICT_SIGNS, more

if TYPE_CHECKING:
    from miniloader.evidence.verdict import Verdict
    from miniloader.lab.audit.library_pages import Sight
    from miniloader.lab.audit.result import Audit
    from miniloader.lab.audit.timeline import Moment
    from miniloader.lab.proof.proof import Proof
    from miniloader.walkthrough.chapter import Quiz
    from miniloader.walkthrough.run_chapter import ChapterResult

__all__ = ["refuse_unwritable", "write_audit", "write_page", "write_proof", "write_walkthrough"]

Path = str | os.PathLike[str]


def write_proof(proof: Proof, path: Path) -> None:
    """Write ``proof`` as a page to ``path``; MiniloaderError when it cannot be written."""
    with importing:
        from miniloader.report.proof_page import view_of

    write_page("proof.html", view_of(proof), path)


def write_walkthrough(results: Sequence[ChapterResult], path: Path) -> None:
    """Write the chapters that were run as one page to ``path``; MiniloaderError when it cannot be written."""
    with importing:
        from miniloader.report.walkthrough_page import view_of

    write_page("walkthrough.html", view_of(results), path)


def write_audit(audit: Audit, sights: Sequence[Sight], path: Path, moments: Iterable[Moment] = ()) -> None:
    """Write ``audit``, with the libraries in ``sights`` drawn, to ``path``; MiniloaderError likewise.

    ``moments`` are the looks of an audit over time, for its curve.
    """
    with importing:
        from miniloader.report.audit_page import view_of

    write_page("audit.html", view_of(audit, sights, moments), path)


def refuse_unwritable(path: Path, what: str = "page") -> None:
    """MiniloaderError when ``what`` could not be written to ``path``, as far as can be told beforehand."""
    try:
        directory = os.path.dirname(os.path.realpath(path))
    except FileNotFoundError:  # where this process is has been removed
        directory = ""
    why = errno.ENOENT if not os.path.isdir(directory) else errno.EISDIR if os.path.isdir(path) else 0
    if not why and not os.path.exists(path) and not os.access(directory, os.W_OK | os.X_OK):
        why = errno.EROFS if os.statvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
    if why:
        raise MiniloaderError(f"{os.fspath(path)}: cannot write the {what}: {os.strerror(why)}")


def write_page(template: str, view: Mapping[str, Any], path: Path) -> None:
    """Render ``template`` with ``view`` and write it all to ``path``, or nothing; ``-``: standard output."""
    text = _environment().get_template(template).render(view)
    if path == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
        return
    try:
        write_whole(path, [text.encode()])
    except OSError as error:
        raise MiniloaderError(f"{os.fspath(path)}: cannot write the page: {error.strerror}") from error


# ---------------------------------------------------------------------------------------- rendering
@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("miniloader.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_inert,
    )
    script, style = _text("page.js"), _text("page.css")
    environment.globals |= {
        "version": __version__,
        "script": Markup(script),
        "style": Markup(style),
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "sign_of": _sign_of,
        "encode": _encode,
        "table_of": table_of,
        "more_of": more,
    }
    environment.filters |= {
        "lines": str.splitlines,
        "hex": hex,
        "size": size,
        "pyrepr": repr,
        "short": short,
        "choices_of": _choices_of,
        "slug": lambda word: word.lower().replace(" ", "-").replace("'", ""),
    }
    return environment


def _sign_of(verdict: Verdict) -> str:
    return VERDICT_SIGNS[verdict][0]


def _choices_of(question: Quiz) -> list[tuple[str, bool, str]]:
    """Each choice, whether it is right, and why."""
    return [(one.text, at == question.answer, one.why) for at, one in enumerate(question.choices)]


def _encode(film: Film) -> Markup:
    return Markup(encode(film))  # base64


def _inert(value: object) -> object:
    """What a template prints: text from outside with every character escaped that a reader cannot see."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _text(name: str) -> str:
    return files("miniloader.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
