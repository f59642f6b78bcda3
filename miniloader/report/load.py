"""A loaded library, for people and as JSON: its mappings, whose libraries it uses, what calls returned."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from miniloader.errors import printable
from miniloader.json_schema import (
    BOOL,
    COUNT,
    INT,
    NUMBER,
    PROTECTION,
    TEXT,
    Schema,
    array,
    by_name,
    keys,
    record,
    words,
)
from miniloader.kernel.maps import Vma
from miniloader.lab.loaded_library import LoadedLibrary
from miniloader.loader import Event
from miniloader.loader.call import Outcome, Value, Written
from miniloader.loader.copies import Copies
from miniloader.loader.events import Stage
from miniloader.report.output import Output
from miniloader.report.search import COPIES, copies_as_json
from miniloader.report.text import Line, Part, Table

__all__ = ["SCHEMA", "Narrator", "as_json", "lines", "results"]

Kind = Literal["file", "zero", "gap"]

_KINDS: Final[dict[Kind, str]] = {
    "file": "the file's pages",
    "zero": "zero pages, anonymous",
    "gap": "nothing: a gap",
}

_STAGE: Final = 11  # columns

#: What each stage is for.
_EXPLAINED: Final[dict[Stage, str]] = {
    "parse": "Read the file's headers. Nothing is mapped yet.",
    "search": "Look for a library that it needs, as the system's loader does.",
    "need": "A library that it needs.",
    "reserve": "Reserve the whole span at once, inaccessible, so that nothing else can come between.",
    "map": "Put each segment over its part: private, so that what is written there stays in this process.",
    "guard": "Have the processor refuse indirect jumps to where no landing pad is (BTI).",
    "zero": "Zero what of a file page is bss. This first write gives the page a copy of its own.",
    "bind": "Find who defines each symbol: the process's global scope first, then it and what it needs.",
    "tls": "Ask the system's loader for thread-local storage, a block in every thread.",
    "relocate": "Write in the addresses that the file leaves open. Each page written becomes a private copy.",
    "protect": "Make read-only what only relocation had to write (RELRO).",
    "register": "Tell the unwinder where its tables are, so that exceptions can pass through.",
    "prepared": "What was relocated beforehand cannot be used here: it is loaded the plain way.",
    "open": "It opens a library itself, by dlopen(3).",
    "host": "glibc opens modules of its own inside itself: these stay with the system's loader.",
    "initialise": "Run its constructors.",
    "finalise": "Run its destructors.",
    "unmap": "Give the memory back.",
}


def kind_of(vma: Vma) -> Kind:
    """What a mapping of a library is."""
    if not vma.is_file:
        return "zero"
    return "gap" if vma.protection == "---" else "file"


# ---------------------------------------------------------------------------------------------- JSON
def as_json(library: LoadedLibrary, copies: Sequence[Copies] = ()) -> dict[str, Any]:
    """The object that ``load --json`` prints: ``result`` is that of the last call.

    ``copies`` are the libraries that the process has, and a search would have found others.
    """
    results = [_outcome_as_json(outcome) for outcome in library.outcomes]
    return {
        "path": library.path,
        "base": library.base,
        "mappings": [
            {
                "start": vma.start,
                "end": vma.end,
                "protection": vma.protection,
                "file_offset": vma.file_offset,
                "kind": kind_of(vma),
            }
            for vma in library.mappings
        ],
        "result": results[-1]["value"] if results else None,
        "results": results,
        "stages_ms": library.stages_ms,
        "libraries": [
            {"name": used.name, "path": used.path, "base": used.base, "ours": used.ours}
            for used in library.libraries
        ],
        "copies": [copies_as_json(pair) for pair in copies],
    }


def _outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "call": outcome.call.text,
        "type": outcome.call.result,
        "value": _plain(outcome.value),
        "written": [
            {
                "argument": written.argument.text,
                "value": written.value.hex() if isinstance(written.value, bytes) else _plain(written.value),
            }
            for written in outcome.written
        ],
    }


def _plain(value: Value) -> Value:
    """JSON has no infinities and no NaN: they become texts."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_VALUE: Final[Schema] = {"type": ["null", "boolean", "number", "string"]}

SCHEMA: Final = record(
    {"path": TEXT, "base": INT, "result": _VALUE, "stages_ms": by_name(NUMBER)},
    {"mappings": array(record(
        keys(COUNT, "start end file_offset"), {"protection": PROTECTION, "kind": words("file zero gap")}
    ))},
    {"results": array(record(
        {"call": TEXT, "type": TEXT, "value": _VALUE},
        {"written": array(record({"argument": TEXT, "value": _VALUE}))},
    ))},
    {"libraries": array(record(keys(TEXT, "name path"), {"base": INT, "ours": BOOL}))},
    {"copies": array(COPIES)},
)  # fmt: skip
"""What :func:`as_json` gives."""


# ---------------------------------------------------------------------------------------- for people
def lines(library: LoadedLibrary, copies: Sequence[Copies] = ()) -> Iterator[Part]:
    """How the library lies in memory, whose libraries it uses, and how long each stage took."""
    yield (printable(library.path), "bold"), f", load bias {library.base:#x}: as the kernel has it mapped"
    yield Table(
        ("from", "to", ">size", "protection", "offset", "what"),
        [
            (
                f"{vma.start:x}",
                f"{vma.end:x}",
                f"{vma.size // 1024:,} KiB",
                vma.protection,
                f"{vma.file_offset:#x}" if kind_of(vma) == "file" else "",
                _KINDS[kind_of(vma)],
            )
            for vma in library.mappings
        ],
    )
    yield ()
    yield Table(
        ("library", "base", "loaded by", "file"),
        [
            (
                printable(used.name),
                f"{used.base:x}",
                "miniloader" if used.ours else "the system's loader",
                printable(used.path),
            )
            for used in library.libraries
        ],
    )
    for pair in copies:
        yield (printable(f"{pair.name}: {pair.text()}"),)
    yield ()
    yield ("took " + " · ".join(f"{name} {took:.2f} ms" for name, took in library.stages_ms.items()),)


def results(outcomes: Sequence[Outcome]) -> Iterator[Line]:
    """What each call returned, and what it wrote."""
    if outcomes:
        yield ()
    for outcome in outcomes:
        yield printable(outcome.call.text), " = ", (described(outcome.value, outcome.call.result), "bold")
        for written in outcome.written:
            yield (printable(f"  {written.argument.text} = {_written(written)}"),)


def _written(written: Written) -> str:
    """Bytes in hexadecimal, and as text where they are one."""
    if not isinstance(written.value, bytes):
        return described(written.value, "double" if isinstance(written.value, float) else "long")
    text = written.value.partition(b"\0")[0].decode("ascii", "replace")
    return written.value.hex() + (f"  {text!r}" if text and text.isascii() and text.isprintable() else "")


def described(value: Value, result: str) -> str:
    """A value of type ``result`` as a person wants it: integers in hexadecimal, too, texts quoted."""
    match value:
        case None:
            return "nothing" if result == "void" else "NULL"
        case bool():
            return "true" if value else "false"
        case int() if result == "ptr":
            return f"{value:#x}" if value else "NULL"
        case int() if result == "char" and chr(value & 0x7F).isprintable() and value >= 0:
            return f"{value} ({chr(value)!r})"
        case int():
            return f"{value} ({value:#x})" if abs(value) > 9 else str(value)
        case str():
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            return '"' + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in escaped) + '"'
        case _:
            return str(value)


class Narrator:
    """Tells each step as it happens; the first time that a stage comes, what it is for."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._out = Output(stderr=stderr)
        self._explained: set[Stage] = set()
        self._last: Stage | None = None

    def __call__(self, event: Event) -> None:
        """Print one step, at once."""
        head = f"{'' if event.stage == self._last else event.stage:<{_STAGE}}"
        self._last = event.stage
        if event.stage not in self._explained:
            self._explained.add(event.stage)
            self._out.show([Table((), [((head, "bold"), (_EXPLAINED[event.stage], "italic"))], gap=0)])
            head = " " * _STAGE
        name = os.path.basename(event.library)
        self._out.show([((head, "bold"), printable(f"{name}: {event.text}"))], wrap=False)
