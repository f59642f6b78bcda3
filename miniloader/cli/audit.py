"""``miniloader audit``: what running processes share of their libraries, and why not the rest."""

from __future__ import annotations

import argparse
import re

from miniloader.cli import choosing, options

__all__ = ["HELP", "configure", "run"]

HELP = "say which pages of running processes are really shared, and why the others are not"

_LONGEST = 1 << 30  # seconds, which every clock can count
_EXAMPLES = """\
examples:

  miniloader audit 4711 4712                   these two processes
  miniloader audit --name 'gunicorn*'          all that are called so
  miniloader audit --command http.server       all whose command line has this
  miniloader audit --unit nginx                what a unit of systemd runs; --container ID, --cgroup PATTERN
  miniloader audit --all --by user             the whole machine, a row for each user
  miniloader audit --tree 4711 --every 2s      a server and its workers, as their memory erodes
  miniloader audit --tree 4711 --every 2s --for 1m --html erosion.html     the same as a page with a slider
  miniloader audit 4711 --library libcrypto    every private page of one library
  miniloader audit 4711 --library libcrypto --page 0x484000      one page, word by word
  miniloader audit 4711 --bindings             who really serves each symbol that its libraries use

A private page's causes: relocation, overwritten (a relocated slot that was changed later), loader, bss,
write (by the program), identical (copied, yet as in the file), unknown. Nothing is stopped or written.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Which processes, which files, once or repeatedly, and how to print it."""
    options.examples(parser, _EXAMPLES)
    choosing.configure(parser)
    parser.add_argument("--library", metavar="PATTERN", help="only these files, with every private page")
    parser.add_argument(
        "--page",
        metavar="VADDR",
        type=options.number("vaddr", "0x484000"),
        help="one page of the library, word by word",
    )
    parser.add_argument(
        "--bindings",
        action="store_true",
        help="read the slots of one process: who serves each symbol; with --library those that this uses",
    )
    parser.add_argument("--no-causes", action="store_true", help="count only")
    parser.add_argument(
        "--by",
        metavar="WHAT",
        choices=("name", "user", "cgroup", "command", "library"),
        help="a row for each name, user, cgroup or command of processes, or for each library, with totals",
    )
    options.level(parser, ("frames", "flags"))
    parser.add_argument("--every", metavar="TIME", type=_seconds, help="look again so often, such as 2s")
    parser.add_argument("--for", metavar="TIME", type=_seconds, dest="duration", help="stop after this time")
    parser.add_argument("--save", metavar="FILE", help="write the audit to a file, for `miniloader diff`")
    options.html(parser, "write a page to look at, the pages of files drawn")
    parser.add_argument(
        "--openmetrics",
        metavar="FILE",
        help="write metrics for a collector (Prometheus, OpenTelemetry, node_exporter); - is standard output",
    )
    parser.add_argument(
        "--csv",
        metavar="WHAT",
        nargs="?",
        const="libraries",
        type=_csv,
        help="print a row for each of the processes, mappings, libraries (the default), or groups of --by; in"
        " bytes, but in pages: of processes anonymous to swapped, of libraries mapped to merged",
    )


def _csv(text: str) -> str | int:
    """What to print; or the process that is named behind a plain ``--csv``."""
    if text in ("processes", "mappings", "libraries", "groups"):
        return text
    if text.isdecimal():
        return choosing.pid(text)
    raise argparse.ArgumentTypeError(f"{text!r}: not processes, mappings, libraries or groups")


def _seconds(text: str) -> float:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", text)
    seconds = float(parts[1]) * {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600}[parts[2]] if parts else 0.0
    if not 0 < seconds <= _LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 500ms, 2s or 1m")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Audit once or repeatedly, print, save; the exit status is that of ``audit_look.status_of``."""
    from miniloader.cli import audit_look
    from miniloader.errors import UsageError
    from miniloader.kernel.open_files import allow_open_files

    if arguments.duration is not None and arguments.every is None:
        raise UsageError("--for needs --every")
    if isinstance(arguments.csv, int):  # --csv PID
        arguments.pids, arguments.csv = [arguments.csv, *arguments.pids], "libraries"
    if arguments.csv == "groups" and arguments.by is None:
        raise UsageError("--csv groups needs --by, which says what groups them")
    if arguments.csv and arguments.json:
        raise UsageError("--csv and --json: one of them")
    if arguments.html is not None and arguments.page is not None:
        raise UsageError("--html and --page: one of them")
    audit_look.output_is_taken(arguments)
    allow_open_files()  # what is mapped stays open as long as an audit takes
    pids = choosing.chosen(arguments)
    if arguments.bindings:
        return _bindings(arguments, pids)
    if arguments.page is not None:
        return _page(arguments, pids)
    if arguments.every is not None:
        from miniloader.cli.audit_over_time import watch

        return watch(arguments, pids)
    result = audit_look.look_patiently(arguments, pids)
    audit_look.save(arguments, result)  # before a reader may close the pipe
    audit_look.draw(arguments, result, audit_look.sights_of(arguments, result))
    audit_look.show(arguments, result)
    return audit_look.status_of(result)


def _refuse_beside(option: str, arguments: argparse.Namespace, refused: tuple[str, ...]) -> None:
    """Raise UsageError where an option is given that would say nothing beside this one."""
    from miniloader.errors import UsageError

    for name in refused:
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{option} needs one process, and goes without --{name}")


def _page(arguments: argparse.Namespace, pids: tuple[int, ...]) -> int:
    from miniloader.errors import UsageError
    from miniloader.lab.audit.page_words import view_page

    _refuse_beside("page", arguments, ("every", "save", "csv", "openmetrics", "by"))
    if len(pids) != 1 or arguments.library is None:
        raise UsageError("--page needs one process, and --library to say of which file")
    view = view_page(pids[0], arguments.page, arguments.library)
    if arguments.json:
        from miniloader.report.json import dump

        dump(view.to_json())
        return 0
    from miniloader.report.audit_words import page_view
    from miniloader.report.output import Output

    Output().show(page_view(view))
    return 0


def _bindings(arguments: argparse.Namespace, pids: tuple[int, ...]) -> int:
    from miniloader.errors import UsageError
    from miniloader.lab.audit.live_bindings import live_bindings

    _refuse_beside("bindings", arguments, ("page", "every", "save", "html", "csv", "openmetrics", "by"))
    if len(pids) != 1:
        raise UsageError("--bindings needs one process")
    live = live_bindings(pids[0], arguments.library)
    if arguments.json:
        from miniloader.report.json import dump

        dump(live.to_json())
        return 0
    from miniloader.report.live_bindings import lines
    from miniloader.report.output import Output

    Output().show(lines(live, everything=arguments.library is not None))
    return 0
