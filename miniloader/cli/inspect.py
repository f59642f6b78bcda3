"""``miniloader inspect``: what an ELF file says, and which calls will map it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from miniloader.cli import options
from miniloader.errors import UsageError
from miniloader.startup import import_numpy

if TYPE_CHECKING:
    from miniloader.elf import ElfImage
    from miniloader.elf.kinds.archive import Archive
    from miniloader.elf.kinds.linker_script import LinkerScript
    from miniloader.lab.check.bindings import SymbolBinding
    from miniloader.loader.beside_glibc.host import HostListing
    from miniloader.report.symbols import Symbol

__all__ = ["HELP", "configure", "run"]

_ORDERS = ("name", "address", "size")  # those of report.symbols, which --help need not import

HELP = "show what the file says, and the mmap calls that will map it"


def configure(parser: argparse.ArgumentParser) -> None:
    """The file, and which of the long lists to show."""
    parser.add_argument(
        "library",
        metavar="LIB",
        nargs="?",
        help="a path, or a name such as libz.so.1; of any machine. A library, a program, an object file, a "
        "core dump, an archive, one of its members ('libx.a(member.o)'), a linker script",
    )
    parser.add_argument(
        "--symbols",
        metavar="PATTERN",
        nargs="?",
        const="",
        help="list the symbols whose name, as in the file or demangled, has this part or fits this "
        "pattern of a shell; without one, all: the dynamic ones, or those of .symtab where there are none",
    )
    parser.add_argument("--sort", choices=_ORDERS, help="sort the symbols by this; by size: largest first")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--defined", action="store_true", default=None, help="list the symbols that are defined here"
    )
    which.add_argument(
        "--undefined", action="store_false", dest="defined", help="list the symbols that are needed"
    )
    parser.add_argument(
        "--raw", action="store_true", help="show names as they are in the file, not demangled"
    )
    parser.add_argument("--sizes", action="store_true", help="show what is large: sections and symbols")
    parser.add_argument(
        "--checks",
        action="store_true",
        help="list every rule and whether the file keeps it; without LIB, what the rules are",
    )
    parser.add_argument(
        "--search", action="store_true", help="show where each library it needs is looked for"
    )
    parser.add_argument(
        "--bindings",
        action="store_true",
        help="show who would serve each symbol that it and its libraries look up, and who else defines it",
    )
    parser.add_argument(
        "--page-size",
        metavar="BYTES",
        type=options.number("page size", "0x4000"),
        help="plan for pages of this size",
    )


def run(arguments: argparse.Namespace) -> int:
    """Read the file; print it as JSON or for a person."""
    if arguments.library is None and arguments.symbols:  # `inspect --symbols LIB`: it is no pattern
        arguments.library, arguments.symbols = arguments.symbols, ""
    if arguments.library is None:
        return _reference(arguments)
    # What `load` would find in its process: later there is, too, what numpy has brought.
    present = _present() if arguments.search else None
    import_numpy()
    from miniloader.elf import ElfImage
    from miniloader.elf.kinds.opening import open_file
    from miniloader.kernel.syscalls import PAGE_SIZE

    image = open_file(_path(arguments.library))
    page_size = arguments.page_size or PAGE_SIZE
    if not isinstance(image, ElfImage):
        _show_other(image, arguments)
    elif arguments.json:
        _print_json(image, page_size, arguments, present)
    else:
        _print(image, page_size, arguments, present)
    return 0


def _reference(arguments: argparse.Namespace) -> int:
    """What the rules are."""
    if not arguments.checks:
        raise UsageError("the following arguments are required: LIB", hint="see miniloader inspect --help")
    from miniloader.report import inspect as say
    from miniloader.report import inspect_view
    from miniloader.report.json import dump
    from miniloader.report.output import Output

    if arguments.json:
        dump({"checks": say.rules_json()})
    else:
        Output().show(inspect_view.rules())
    return 0


def _present() -> HostListing | None:
    from miniloader.loader.beside_glibc.host import listing
    from miniloader.native.gate import lacks_for_loading

    return listing() if lacks_for_loading() is None else None


def _show_other(held: Archive | LinkerScript, arguments: argparse.Namespace) -> None:
    """An archive, or a linker script, of which there is one thing to show."""
    from miniloader.report import inspect_kinds
    from miniloader.report.json import dump
    from miniloader.report.output import Output

    if arguments.json:
        dump(inspect_kinds.other_json(held))
    else:
        Output().show(inspect_kinds.other(held))


def _path(name: str) -> str:
    """Where the library is: a bare name is searched for as the system's loader does."""
    if "/" in name:
        return name
    from miniloader.loader.surroundings import find_path

    return find_path(name)


def _print_json(
    image: ElfImage, page_size: int, arguments: argparse.Namespace, present: HostListing | None
) -> None:
    from miniloader.report import inspect as say
    from miniloader.report.json import Rows, dump

    said: dict[str, Any] = say.to_json(image, page_size)
    if arguments.symbols is not None:
        rows = say.readable(lambda: _symbols(image, arguments), [])
        said["symbols"]["table"] = Rows(lambda: map(vars, rows))
    if arguments.sizes:
        from miniloader.report.sizes import to_json as sizes_json

        said["sizes"] = sizes_json(image, raw=arguments.raw)
    if arguments.checks:
        said["checks"] = say.checks_json(image)
    if arguments.search:
        from miniloader.loader.surroundings import find_needed
        from miniloader.report.search import to_json

        said["search"] = to_json(find_needed(image, present))
    if arguments.bindings:
        from miniloader.report.bindings import rows_json

        said["bindings"] = rows_json(_bindings(image))
    dump(said)


def _print(
    image: ElfImage, page_size: int, arguments: argparse.Namespace, present: HostListing | None
) -> None:
    from miniloader.report import inspect_view
    from miniloader.report.output import Output

    out = Output()
    out.show(inspect_view.page(image, page_size, out.drawing, out.width))
    if arguments.checks:
        out.show([(), *inspect_view.checks(image)])
    if arguments.search:
        from miniloader.loader.surroundings import find_needed
        from miniloader.report.search import lines

        out.show([(), *lines(find_needed(image, present))])
    if arguments.symbols is not None:
        out.show([(), *inspect_view.symbols(image, _symbols(image, arguments))])
    if arguments.sizes:
        from miniloader.report.sizes import lines as sizes_lines

        out.show([(), *sizes_lines(image, raw=arguments.raw)])
    if arguments.bindings:
        from miniloader.report.bindings import lines as bindings_lines

        out.show([(), *bindings_lines(image.path, _bindings(image))])


def _symbols(image: ElfImage, arguments: argparse.Namespace) -> list[Symbol]:
    """The symbols that are asked for, in the order that is asked for."""
    from miniloader.report.symbols import selected, symbol_list

    listed = symbol_list(image, raw=arguments.raw)
    return selected(listed, arguments.symbols or None, defined=arguments.defined, sort=arguments.sort)


def _bindings(image: ElfImage) -> list[SymbolBinding]:
    """Who binds to what, where it would be loaded."""
    from miniloader.lab.check.bindings import bindings
    from miniloader.lab.check.check import Checker

    return list(bindings(Checker().situation(image.path)))
