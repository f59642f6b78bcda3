"""``miniloader disasm``: the code of a function, with what it calls and refers to named."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from miniloader.cli import options

if TYPE_CHECKING:
    from miniloader.lab.disassembly import Disassembly
    from miniloader.lab.workers.crash_guard import Doing

__all__ = ["HELP", "configure", "run"]

HELP = "show a function's code, and what its calls and GOT slots lead to"

_SYMBOLS = """\
SYMBOL is one of

  crc32                 a function, also a static one where the library is not stripped
  shop::Cart::add       a function of C++ or Rust, also with its parameters: 'shop::Cart::add(int)'
  memcpy@GLIBC_2.14     that version of it
  free@plt              the stub that leads to a function of another library
  0x3f10, 0x3f10:64     what is at a vaddr; so many bytes of it

Names behind ; say what an operand refers to: NAME is code or data of the library itself, NAME@plt a stub,
NAME@got a slot that relocation fills with an address, "TEXT" a constant. For x86-64, i386, arm, aarch64 and
riscv64; with --loaded only for this machine's own.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The library, the symbol, and whether to load it first."""
    options.examples(parser, _SYMBOLS)
    options.library(parser)
    parser.add_argument("symbol", metavar="SYMBOL", help="what to show")
    parser.add_argument(
        "--no-lines", action="store_false", dest="lines", help="do not look for the lines of the source code"
    )
    parser.add_argument("--raw", action="store_true", help="show names as in the file, not demangled")
    parser.add_argument(
        "--loaded",
        action="store_true",
        help="load it first (which runs its constructors), and show what each GOT slot holds then",
    )


def run(arguments: argparse.Namespace) -> int:
    """From the file; or in a child process that has loaded the library: foreign code may crash."""
    if not arguments.loaded:
        return _show(_from_file(arguments), arguments)
    from miniloader.cli import reported
    from miniloader.lab.workers.crash_guard import in_child

    def body(doing: Doing) -> int:
        return reported(lambda: _loaded(arguments, doing), as_json=arguments.json, debug=arguments.debug)

    return in_child(body, arguments.library)


def _from_file(arguments: argparse.Namespace) -> Disassembly:
    import miniloader
    from miniloader.lab.disassembly import disassembly_of
    from miniloader.machine.names_at import Landmarks

    landmarks = Landmarks(miniloader.inspect(arguments.library))
    return disassembly_of(landmarks, arguments.symbol, lines=arguments.lines and not arguments.loaded)


def _loaded(arguments: argparse.Namespace, doing: Doing) -> int:
    import miniloader
    from miniloader.lab.disassembly import disassembly_of
    from miniloader.loader.events import RUN_CODE
    from miniloader.machine.names_at import Landmarks

    def on_event(event: miniloader.loader.Event) -> None:
        runs_code = event.stage in RUN_CODE
        doing(f"{event.library}: {event.stage}: {event.text}", runs_code=runs_code)

    _from_file(arguments)  # no reason to load what cannot be shown
    with miniloader.load(arguments.library, on_event=on_event) as library:
        doing(f"{arguments.library}: looking at it")
        listing = disassembly_of(Landmarks(library.image), arguments.symbol, library, lines=arguments.lines)
        status = _show(listing, arguments)
        doing(f"{arguments.library}: closing it")
    return status


def _show(listing: Disassembly, arguments: argparse.Namespace) -> int:
    from miniloader.report.disasm import as_json, page
    from miniloader.report.json import dump
    from miniloader.report.output import Output

    if arguments.json:
        dump(as_json(listing))
    else:
        out = Output()
        out.show(page(listing, out.width, raw=arguments.raw))
    return 0
