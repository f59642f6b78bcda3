"""Options that several commands have, each declared once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from miniloader.errors import UsageError, printable

if TYPE_CHECKING:
    from miniloader.report.text import Line

__all__ = [
    "PERMISSIONS",
    "everywhere",
    "examples",
    "html",
    "level",
    "library",
    "number",
    "page_alone",
    "page_written",
    "permissions",
    "permitted",
    "prepared",
]

#: What a library may ask of the loader that costs safety: (option, keyword of ``miniloader.load``, help).
PERMISSIONS = (
    ("--allow-text-relocations", "text_relocations", "let it relocate its code"),
    ("--allow-executable-stack", "executable_stack", "load it though it asks for one"),
    ("--allow-writable-code", "writable_code", "map segments writable and executable"),
)


def everywhere(parser: argparse.ArgumentParser) -> None:
    """The options of every command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def library(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """``LIB``, read as ``library``; where a command takes ``several``, ``LIB…``, read as ``libraries``."""
    text = "a path, or a name searched as the system does"
    if several:
        parser.add_argument("libraries", metavar="LIB", nargs="+", help=text)
    else:
        parser.add_argument("library", metavar="LIB", help=text)


def permissions(parser: argparse.ArgumentParser) -> None:
    """The options of PERMISSIONS, which :func:`permitted` reads."""
    for option, keyword, text in PERMISSIONS:
        parser.add_argument(option, dest=keyword, action="store_true", help=text)


def permitted(arguments: argparse.Namespace) -> dict[str, bool]:
    """What was permitted, as keywords of ``miniloader.load`` and ``miniloader.prove``."""
    return {keyword: getattr(arguments, keyword) for _, keyword, _ in PERMISSIONS}


def prepared(parser: argparse.ArgumentParser) -> None:
    """``--prepared``."""
    parser.add_argument(
        "--prepared", action="store_true", help="take the relocated pages that `miniloader prepare` has kept"
    )


def level(parser: argparse.ArgumentParser, levels: Sequence[str] = ()) -> None:
    """``--level``: one of ``levels``, by default every level of evidence that rests on something."""
    from miniloader.kernel.features import LEVELS

    every = tuple(level.name for level in LEVELS if level.feature)
    text = "use this level of evidence, not the best that works here"
    parser.add_argument("--level", choices=levels or every, help=text)


def html(parser: argparse._ActionsContainer, text: str) -> None:
    """``--html FILE``; ``text`` says what the page shows.  For ``-`` see :func:`page_alone`."""
    parser.add_argument("--html", metavar="FILE", help=f"{text}; - is standard output")


def page_alone(arguments: argparse.Namespace) -> bool:
    """Whether the page goes to standard output; UsageError where something else does so, too."""
    alone: bool = arguments.html == "-"
    if alone and (arguments.json or getattr(arguments, "csv", False)):
        raise UsageError("--html - is the page on standard output, and --json or --csv something else there")
    return alone


def page_written(arguments: argparse.Namespace) -> Iterator[Line]:
    """Where the page is, if one was asked for, as the last line."""
    if arguments.html is not None:
        yield ()
        yield (printable(f"The page is {arguments.html}"),)


def examples(parser: argparse.ArgumentParser, text: str) -> None:
    """Print ``text`` as it is below the help of the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = text


def number(what: str, such_as: str) -> Callable[[str], int]:
    """What argparse makes of a decimal, hexadecimal (0x) or octal (0o) number; ``what`` it is names it.

    >>> number("address", "0x200000000")("0x1000")
    4096
    """

    def parse(text: str) -> int:
        try:
            return int(text, 0)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}, such as {such_as}") from None

    return parse
