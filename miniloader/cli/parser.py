"""The parser of the whole command line, made from the table of commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NoReturn, Protocol, cast

from miniloader import __version__
from miniloader.cli import options
from miniloader.cli.exit_status import EXIT_STATUSES
from miniloader.cli.grammar import FILES, actions, commands_of
from miniloader.errors import UsageError
from miniloader.suggestions import did_you_mean

__all__ = ["FILES", "Command", "actions", "build", "commands_of", "parse"]


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

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stdout).write(message)  # argparse passes over a full disk, and a reader who has gone

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        choices = action.choices
        if choices is not None and value not in choices:
            name = "/".join(action.option_strings)
            what = "no command" if action.nargs == argparse.PARSER else f"{name}: no"
            meant = did_you_mean(value, map(str, choices)) or f"there are {', '.join(map(str, choices))}"
            raise UsageError(f"{what} {value!r}", hint=f"{meant}; see {self.prog} --help")


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

        shells = (*shtab.SUPPORTED_SHELLS, "fish")
        if values not in shells:
            parser.error(f"--completion: {values!r} is not one of {', '.join(shells)}")
        if values == "fish":  # which shtab does not know
            from miniloader.cli.fish import completion

            print(completion(parser))
            parser.exit()
        for action in actions(parser):
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def build(commands: Iterable[str]) -> argparse.ArgumentParser:
    """The parser for ``commands``; the parsed ``run`` is the command's function, or None."""
    statuses = "; ".join(f"{status} {meaning}" for status, meaning in EXIT_STATUSES)
    parser = _CommandParser(
        prog="miniloader",
        description="Load a shared library as the kernel and the dynamic loader do, and prove from the "
        "kernel's own records which of its pages processes share.",
        epilog=f"`miniloader help COMMAND` tells of one. Exit status: {statuses}.",
    )
    parser.set_defaults(run=None)
    parser.add_argument("-V", "--version", action="version", version=f"miniloader {__version__}")
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
        subparser.set_defaults(run=command.run, parser=subparser)
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """What ``words`` say; UsageError for one that nothing expects, with the usage of its command."""
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(getattr(arguments, "parser", parser), unknown[0])
    return arguments


def _refuse(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    """There is no such option, or it is one word too many: say what there is."""
    usage = " ".join(parser.format_usage().split())
    what = "unknown option" if word.startswith("-") else "unexpected"
    option = word.partition("=")[0]
    meant = did_you_mean(option, parser._option_string_actions)
    if option in parser._option_string_actions:  # it stood before the command
        meant = f"{parser.prog} has it: write it behind {parser.prog.split()[-1]}"
    hints = (meant, usage, f"see {parser.prog} --help")
    raise UsageError(f"{what} {word}", hint="; ".join(filter(None, hints)))
