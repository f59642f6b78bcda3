"""The parser of the whole command line, made from the table of commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NoReturn, Protocol, cast

from miniloader import __version__
from miniloader.cli import EXIT_STATUSES, options
from miniloader.errors import UsageError

__all__ = ["Command", "build"]

#: An argument shown by one of these names is a file, which shells can complete.
_FILES = frozenset({"LIB", "FILE", "PATH"})


class Command(Protocol):
    """What a module ``miniloader.cli.NAME`` holds."""

    #: One line for the list of commands.
    HELP: str

    def configure(self, parser: argparse.ArgumentParser, /) -> None:
        """Add the command's own arguments (``--json`` is there already, for every command)."""

    def run(self, arguments: argparse.Namespace, /) -> int:
        """Do it, print the result, return the exit status.

        Errors are raised as :class:`~miniloader.errors.MiniloaderError`; :func:`miniloader.cli.main`
        reports them.
        """


class _CommandParser(argparse.ArgumentParser):
    """Raises :class:`UsageError` instead of printing several lines and leaving.

    Each argument that is added is formatted once, to see that it can be: not for the width of the terminal,
    which argparse would import shutil to find.
    """

    _shown = False

    def _get_formatter(self) -> argparse.HelpFormatter:
        return super()._get_formatter() if self._shown else argparse.HelpFormatter(self.prog, width=80)

    def format_help(self) -> str:
        self._shown = True
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


class _Completion(argparse.Action):
    """Prints the completion script for one shell, and leaves."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        import shtab

        if values not in shtab.SUPPORTED_SHELLS:
            parser.error(f"--completion: {values!r} is not one of {', '.join(shtab.SUPPORTED_SHELLS)}")
        for action in _all_actions(parser):
            if action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def build(commands: Iterable[str]) -> argparse.ArgumentParser:
    """The parser for ``commands``; the parsed ``run`` is the command's function, or None."""
    parser = _CommandParser(
        prog="miniloader",
        description="Load a shared library as the kernel and the dynamic loader do, and prove from the "
        "kernel's own records which of its pages processes share.",
        epilog="Exit status: " + "; ".join(f"{status} {meaning}" for status, meaning in EXIT_STATUSES) + ".",
    )
    parser.set_defaults(run=None)
    parser.add_argument("--version", action="version", version=f"miniloader {__version__}")
    parser.add_argument(
        "--completion", metavar="SHELL", action=_Completion, help="print a completion script for this shell"
    )
    # Without prog, argparse would format a usage line to find it, for which it imports shutil.
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", prog="miniloader")
    for name in commands:
        command = cast(Command, import_module(f"miniloader.cli.{name}"))
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.configure(subparser)
        options.everywhere(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _all_actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Every argument of the parser and of its commands' parsers."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _all_actions(subparser)
