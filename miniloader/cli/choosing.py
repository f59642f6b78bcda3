"""Options by which a command's processes are chosen, as operators speak of them."""

from __future__ import annotations

import argparse
from typing import Final

__all__ = ["asks", "chosen", "configure", "fitting", "pid"]

#: Each criterion of :func:`miniloader.lab.audit.select.choose`: its name, what follows it, and its help.
_CRITERIA: Final = (
    ("name", "PATTERN", "processes whose name fits (a part, or with * and ?)"),
    ("command", "PATTERN", "processes whose command line fits, such as http.server"),
    ("user", "USER", "processes of this user"),
    ("cgroup", "PATTERN", "processes in a control group whose path fits"),
    ("unit", "UNIT", "processes of a unit of systemd: nginx, nginx.service, 'app-*.scope'"),
    ("container", "ID", "processes of a container, by how its identifier begins"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """``PID…`` and every option that chooses; together they say who fits all of them."""
    parser.add_argument("pids", metavar="PID", type=pid, nargs="*", help="a process")
    for name, metavar, text in _CRITERIA:
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
    parser.add_argument("--tree", metavar="PID", type=pid, help="a process and its descendants")
    parser.add_argument("--all", action="store_true", dest="everybody", help="every process")


def pid(text: str) -> int:
    """The process number in ``text``, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no process number")
    return int(text)


def asks(arguments: argparse.Namespace) -> bool:
    """Whether processes are asked for by what fits, and not by number alone."""
    named = [arguments.tree, *(getattr(arguments, name) for name, _, _ in _CRITERIA)]
    return arguments.everybody or any(value is not None for value in named)


def chosen(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The processes that are named, and those that fit; UsageError when nobody was asked for.

    Raises MiniloaderError when nobody fits.
    """
    from miniloader.errors import MiniloaderError, UsageError

    named = tuple(arguments.pids)
    if not asks(arguments):
        if not named:
            raise UsageError("no process", hint="name some: PID…, --name, --command, --user, --tree or --all")
        return named
    pids = (*named, *fitting(arguments))
    if not pids:
        hint = None
        if arguments.container is not None:
            hint = "a control group has a container's identifier, its name is known to its engine alone"
        raise MiniloaderError("no process fits", hint=hint)
    return pids


def fitting(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The processes that fit all the options."""
    from miniloader.lab.audit.select import choose

    return choose(tree=arguments.tree, **{name: getattr(arguments, name) for name, _, _ in _CRITERIA})
