"""``miniloader load``: load a library, call its functions, and show how it lies in memory."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from miniloader.cli import options

if TYPE_CHECKING:
    from miniloader.lab.workers.crash_guard import Doing
    from miniloader.loader.copies import Copies

__all__ = ["HELP", "configure", "run"]

HELP = "load a library, call its functions, and show how the kernel has it mapped"

_CALLS = """\
--call takes the function's name, its arguments and the type it returns:

  --call 'crc32(0, "hello", 5)->ulong'       integers and texts
  --call 'cos(1.0)->double'                  1.0 is a double, 1.0f a float, 1 an integer
  --call 'SHA256("abc", 3, out[32])->ptr'    out[N]: a buffer of N bytes, shown after the call
  --call 'frexp(8.0, &0)->double'            &NUMBER: a variable, shown after the call

also: b"\\x00 bytes", NULL, true, false, 0x7f, name@VERSION.
types: void, bool, char, int, uint, long, ulong, size_t, int8 to uint64, float, double, str, ptr;
or as C has them: uint32_t, unsigned long, const char * (str), struct tm * (ptr).

The library's code runs in this process and can do whatever you can. If it crashes, you are told where.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The library, the calls, and what may be asked of the loader."""
    options.examples(parser, _CALLS)
    options.library(parser)
    parser.add_argument(
        "--call",
        metavar="CALL",
        action="append",
        default=[],
        help="call a function, NAME(ARGS)->TYPE; repeatable",
    )
    parser.add_argument("--trace", action="store_true", help="tell each step as it happens")
    parser.add_argument(
        "--no-init", action="store_true", help="run none of its code: no constructor, no IFUNC"
    )
    parser.add_argument("--lazy", action="store_true", help="bind functions when they are first called")
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        type=options.number("address", "0x200000000"),
        help="map it there, such as 0x200000000",
    )
    options.prepared(parser)
    parser.add_argument(
        "--gdb",
        action="store_true",
        help="show it to gdb, say how to attach, and wait for Enter before the calls",
    )
    options.permissions(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load and call in a child process: foreign code may crash."""
    from miniloader.cli import reported
    from miniloader.lab.workers.crash_guard import in_child

    def body(doing: Doing) -> int:
        return reported(lambda: _load(arguments, doing), as_json=arguments.json, debug=arguments.debug)

    return in_child(body, arguments.library)


def _load(arguments: argparse.Namespace, doing: Doing) -> int:
    import os

    import miniloader
    from miniloader.errors import UsageError, printable
    from miniloader.lab.loaded_library import look_at
    from miniloader.lab.workers.crash_guard import flush_c_output
    from miniloader.loader.beside_glibc import host
    from miniloader.loader.call import parse_call, run_call
    from miniloader.loader.events import RUN_CODE, Event
    from miniloader.loader.policy import is_module_of_libc
    from miniloader.report.json import dump
    from miniloader.report.load import Narrator, as_json, lines, results
    from miniloader.report.output import Output

    calls = [parse_call(text) for text in arguments.call]
    if calls and arguments.no_init:
        raise UsageError("--call runs the library's code, which --no-init forbids")
    narrate = Narrator(stderr=arguments.json)
    told = set[tuple[str, str]]()
    ways: list[str] = []
    copies: list[Copies] = []

    def on_event(event: Event) -> None:
        runs_code = event.stage in RUN_CODE and (event.stage, event.library) not in told
        told.add((event.stage, event.library))
        doing(f"{event.library}: {event.stage}: {event.text}", runs_code=runs_code)
        if event.stage == "prepared" or "prepared" in event.data:
            ways.append(f"{os.path.basename(event.library)}: {event.text}")
        if event.data.get("copies") is not None and event.data["copies"] not in copies:
            copies.append(event.data["copies"])
        if arguments.trace:
            narrate(event)

    with (
        _library_output_on_stderr() if arguments.json else nullcontext(),
        miniloader.load(
            arguments.library,
            init=not arguments.no_init,
            bind="lazy" if arguments.lazy else "now",
            on_event=on_event,
            address=arguments.address,
            prepared=arguments.prepared,
            gdb=arguments.gdb,
            **options.permitted(arguments),
        ) as library,
    ):
        if arguments.gdb:
            _wait_for_gdb(library.gdb_commands())
        outcomes = []
        known = set(host.libraries()) if arguments.trace else set()
        for call in calls:
            doing(f"{arguments.library}: {call.text}", runs_code=True)
            outcomes.append(run_call(library, call))
            flush_c_output()
        for opened in host.libraries() if arguments.trace else ():
            if opened not in known and is_module_of_libc(opened.path):
                narrate(Event("host", arguments.library, f"glibc has opened by itself: {opened.path}"))
        loaded = look_at(library, outcomes)
        if not arguments.json:
            out = Output()
            out.show(lines(loaded, copies))
            if arguments.prepared:
                out.show([(printable(f"prepared: {'; '.join(ways)}"),)], wrap=False)
            out.show(results(outcomes), wrap=False)
        doing(f"{arguments.library}: closing it")
    if arguments.json:
        dump(as_json(loaded, copies))
    return 0


def _wait_for_gdb(commands: Sequence[str]) -> None:
    """Say how to attach gdb, on standard output (with --json, standard error), and wait for Enter."""
    import os
    import sys

    from miniloader.errors import printable

    print(f"gdb -p {os.getpid()}   # it sees the library by itself; a debugger that does not is told:")
    for command in commands:
        print(printable(command))
    print("Enter goes on: ", end="", flush=True)
    sys.stdin.readline()


@contextmanager
def _library_output_on_stderr() -> Iterator[None]:
    """What the library itself prints goes to standard error: standard output is for one JSON object."""
    import os

    from miniloader.lab.workers.crash_guard import flush_c_output

    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush_c_output()
        os.dup2(kept, 1)
        os.close(kept)
