"""What is told of a program beside its own output: on standard error, or in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from miniloader.errors import printable, tell
from miniloader.forking import importing

if TYPE_CHECKING:
    from miniloader.report.text import Part

__all__ = ["tell_aside"]


def tell_aside(path: str, parts: Iterable[Part], value: dict[str, Any] | None = None) -> None:
    """Write ``parts``, or ``value`` as JSON where there is one, to the file ``path``; - is standard error."""
    with importing:
        if path == "-":
            from miniloader.report.output import Output
        else:
            from miniloader.files import write_whole
            from miniloader.report.text import laid_out, plain

    text = None if value is None else _in_json(value)
    if path == "-":
        if text is not None:
            tell(text)
        elif sys.stderr is not None:
            Output(stderr=True).show(parts)
        return
    if text is None:
        text = "".join(f"{plain(line).rstrip()}\n" for line in laid_out(parts, None))
    try:
        write_whole(path, [text.encode(errors="surrogateescape")])
    except OSError as error:  # the program has ended, and its status stays
        tell(f"miniloader: {printable(path)}: {error.strerror}")


def _in_json(value: dict[str, Any]) -> str:
    with importing:
        import json
    return json.dumps(value)
