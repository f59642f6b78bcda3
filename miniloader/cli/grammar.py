"""What a parser holds, for whoever writes of it: its commands, its arguments, and which are files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

__all__ = ["FILES", "actions", "commands_of"]

#: An argument shown by one of these names is a file, which shells can complete.
FILES = frozenset({"LIB", "FILE", "PATH"})


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    return next((dict(action.choices) for action in parser._actions if isinstance(action.choices, dict)), {})


def actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Every argument of the parser and of its commands' parsers."""
    for one in (parser, *commands_of(parser).values()):
        yield from one._actions
