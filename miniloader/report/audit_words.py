"""One page of one process, word by word, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miniloader.errors import printable
from miniloader.report.audit_rows import short_kind
from miniloader.report.text import Part, Table, heading

if TYPE_CHECKING:
    from miniloader.lab.audit.page_words import PageView

__all__ = ["page_view"]


def page_view(view: PageView) -> Iterator[Part]:
    """One page, word by word."""
    title = printable(f"{view.path} at {view.vaddr:#x} in process {view.pid}")
    yield heading(title, printable(f"{view.section}, {view.state}" if view.section else view.state))
    if view.causes:
        reason = f" ({view.reason})" if view.reason else ""
        yield (printable(f"  causes: {', '.join(view.causes)}{reason}"),)
    if view.state in ("swapped", "unknown"):
        return
    if view.state != "private":
        yield (f"  {_OF_STATE[view.state]}",)
        return
    yield Table(
        (">vaddr", "cause", ">file", ">old", ">new", "symbol", "relocation"),
        [
            (
                f"{word.vaddr:#x}",
                word.cause or "as in the file",
                f"{word.file:#x}",
                f"{word.old:#x}",
                f"{word.new:#x}",
                printable(word.symbol),
                short_kind(word.kind),
            )
            for word in view.words
        ],
    )


_OF_STATE = {
    "shared": "no copy: every byte is the file's own",
    "anonymous": "anonymous memory at this place of the file, private: bss, or what the program put there",
    "absent": "not in memory",
}
