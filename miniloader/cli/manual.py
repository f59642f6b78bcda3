"""Manual pages, from the parser: miniloader(1), and one for each command.  Read by man(1), groff and mandoc.

Source: man(7).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from miniloader import __version__
from miniloader.cli import EXIT_STATUSES
from miniloader.cli.parser import commands_of

__all__ = ["pages"]


def pages(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The text of each page by the name of its file, such as ``miniloader-load.1``."""
    commands = commands_of(parser)
    others = [f"{parser.prog}-{name}" for name in commands]
    made = {f"{parser.prog}.1": _page(parser, parser.prog, "load shared libraries and show how", others)}
    for name, command in commands.items():
        page = f"{parser.prog}-{name}"
        seen = [parser.prog, *(other for other in others if other != page)]
        made[f"{page}.1"] = _page(command, page, command.description or "", seen)
    return made


def _page(parser: argparse.ArgumentParser, name: str, about: str, seen: list[str]) -> str:
    return "\n".join(_lines(parser, name, about, seen)) + "\n"


def _lines(parser: argparse.ArgumentParser, name: str, about: str, seen: list[str]) -> Iterator[str]:
    yield f'.TH {_word(name.upper())} 1 "" "miniloader {__version__}" "User Commands"'
    yield ".SH NAME"
    yield f"{_text(name)} \\- {_text(about)}"
    yield ".SH SYNOPSIS"
    yield ".nh"
    yield f".B {_text(parser.prog)}"
    usage = " ".join(parser.format_usage().split()).removeprefix(f"usage: {parser.prog}").strip()
    yield _text(usage)
    yield ".hy"
    if parser.description and parser.description != about:
        yield ".SH DESCRIPTION"
        yield _text(parser.description)
    positional = [action for action in parser._actions if not action.option_strings]
    yield from _arguments("ARGUMENTS", [action for action in positional if action.nargs != argparse.PARSER])
    yield from _arguments("OPTIONS", [action for action in parser._actions if action.option_strings])
    if commands := commands_of(parser):
        yield ".SH COMMANDS"
        for command, subparser in commands.items():
            yield from _tagged(_text(command), f"{subparser.description}; see {parser.prog}-{command}(1)")
        yield from _tagged("help \\fI[COMMAND]\\fR", "what there is, or what a command takes")
        yield from _tagged("version", "say which version this is")
    elif parser.epilog:
        yield ".SH NOTES"
        yield ".nf"
        yield from (_text(line) for line in parser.epilog.strip("\n").split("\n"))
        yield ".fi"
    yield ".SH EXIT STATUS"
    for status, meaning in EXIT_STATUSES:
        yield from _tagged(str(status), meaning)
    yield ".SH SEE ALSO"
    yield ", ".join(f"{_text(page)}(1)" for page in sorted(seen)) + ", ld.so(8), proc(5)"


def _arguments(title: str, actions: list[argparse.Action]) -> Iterator[str]:
    """A section with a paragraph for each argument; none without any."""
    actions = [action for action in actions if action.help != argparse.SUPPRESS]
    if actions:
        yield f".SH {title}"
    for action in actions:
        yield from _tagged(_invocation(action), action.help or "")


def _invocation(action: argparse.Action) -> str:
    """How an argument is written: options bold, what is to be put in italic."""
    value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    shown = f"\\fI{_text(str(value))}\\fR"
    if not action.option_strings:
        return shown
    names = ", ".join(f"\\fB{_text(name)}\\fR" for name in action.option_strings)
    return names if action.nargs == 0 else f"{names} {shown}"


def _tagged(tag: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield tag
    yield _text(text)


def _word(text: str) -> str:
    return f'"{_text(text)}"'


def _text(text: str) -> str:
    """``text`` so that groff takes nothing in it for a request, and a hyphen for one that can be copied.

    >>> print(_text("--all"), _text(".so"), _text("'x' in `y`"))
    \\-\\-all \\&.so \\&'x' in \\(gay\\(ga
    """
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("^", "\\(ha")
    escaped = escaped.replace("~", "\\(ti")
    escaped = "".join(sign if sign.isascii() else f"\\[u{ord(sign):04X}]" for sign in escaped)
    return re.sub(r"(?m)^(?=[.'])", r"\\&", escaped)
