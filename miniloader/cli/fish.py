"""Completion for fish, from the parser: shtab makes that of the other shells."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from miniloader.cli.grammar import FILES, commands_of

__all__ = ["completion"]


def completion(parser: argparse.ArgumentParser) -> str:
    """The script: a ``complete`` command for each option, command and choice of ``parser``."""
    return "\n".join(_lines(parser))


def _lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    program, commands = parser.prog, commands_of(parser)
    yield f"complete -c {program} -f"
    for name, subparser in commands.items():
        about = _quoted(subparser.description or "")
        yield f"complete -c {program} -n __fish_use_subcommand -a {name} -d {about}"
    for action in parser._actions:
        yield from _option(action, f"complete -c {program} -n __fish_use_subcommand")
    for name, subparser in commands.items():
        start = f"complete -c {program} -n '__fish_seen_subcommand_from {name}'"
        for action in subparser._actions:
            yield from _option(action, start)
            if not action.option_strings and action.metavar in FILES:
                yield f"{start} -F"


def _option(action: argparse.Action, start: str) -> Iterator[str]:
    """The line for an option; none for a positional argument, or for what no help shows."""
    if not action.option_strings or action.help == argparse.SUPPRESS:
        return
    names = " ".join(
        f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in action.option_strings
    )
    takes = ""
    if action.nargs != 0:
        choices = " ".join(map(str, action.choices or ()))
        takes = f" -x -a {_quoted(choices)}" if choices else " -r" + " -F" * (action.metavar in FILES)
    yield f"{start} {names}{takes} -d {_quoted(action.help or '')}"


def _quoted(text: str) -> str:
    """``text`` as one word of fish.

    >>> print(_quoted("the library's file"))
    'the library\\'s file'
    """
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
