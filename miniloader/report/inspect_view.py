"""What ``miniloader inspect`` shows a person: one function a part, from the image to what rich prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from miniloader.elf import ElfImage, LoadPlan
from miniloader.elf.checks import RULES, outcomes
from miniloader.elf.symbols import GnuHash
from miniloader.errors import ElfError
from miniloader.report import inspect as say
from miniloader.report import ribbons
from miniloader.report.terminal import (
    PROTECTION_STYLES,
    count,
    heading,
    legend,
    level,
    pairs,
    safe,
    size,
    table,
)

__all__ = ["checks", "load_plan", "overview", "page", "problems", "relocations", "segments", "symbols"]

Parts: TypeAlias = Iterator[Text | Table]
#: Columns from which on there is room for remarks beside the calls.
_ROOMY: Final = 130
#: How many lines the drawing of the written pages may take, about.
_MOST_LINES: Final = 12


def page(image: ElfImage, page_size: int, width: int) -> Parts:
    """Everything but the long lists.  A part that cannot be read says so in its place."""
    yield from overview(image)
    for title, part in (("Segments", segments), ("Load plan", load_plan), ("Relocations", relocations)):
        yield Text()
        try:
            yield from list(part(image, page_size, width))
        except ElfError as error:
            yield heading(
                title, f"cannot be read: {error.field}: found {error.found}, expected {error.expected}"
            )
    yield Text()
    yield from problems(image)


# ------------------------------------------------------------------------------------------- overview
def overview(image: ElfImage) -> Parts:
    """What kind of file it is, and what the dynamic linker is told."""
    header = image.header
    kind = (
        f"{header.elf_class}-bit {header.byte_order} endian {say.machine_name(image)}, "
        f"{say.type_name(image)}, {size(image.source.size)}"
    )
    yield safe(image.path, "bold")
    rows: list[tuple[str, Callable[[], Text | str | None]]] = [
        ("file", lambda: kind),
        ("soname", lambda: _names([image.soname] if image.soname is not None else [])),
        ("build-id", lambda: image.build_id),
        ("needed", lambda: _names(image.needed)),
        ("RUNPATH", lambda: _names(image.runpath, ":")),
        ("RPATH", lambda: _names(image.rpath, ":")),
        ("TLS", lambda: _tls(image)),
        ("symbols", lambda: _symbol_counts(image)),
        ("binding", lambda: _binding(image)),
    ]
    always = ("file", "soname", "build-id", "needed", "symbols")
    shown = [(name, _fact(read)) for name, read in rows]
    yield pairs([(name, value or Text("none", "dim")) for name, value in shown if value or name in always])


def _fact(read: Callable[[], Text | str | None]) -> Text | str | None:
    try:
        return read()
    except ElfError as error:
        return Text(f"cannot be read: {error.field}: found {error.found}, expected {error.expected}", "red")


def _names(names: Iterable[str], between: str = " ") -> Text:
    return Text(between).join(safe(name) for name in names)


def _tls(image: ElfImage) -> str | None:
    tls = image.tls
    if tls is None:
        return None
    return f"{tls.filesz:#x} bytes of the file, {tls.memsz:#x} in each thread, aligned to {tls.align:#x}"


def _symbol_counts(image: ElfImage) -> str:
    defined, undefined = say.symbol_counts(image)
    by = {GnuHash: "GNU hash", type(None): "no hash table"}.get(type(image.symbols.hash), "SysV hash")
    return f"{defined:,} defined, {undefined:,} undefined; {by}"


def _binding(image: ElfImage) -> str:
    when = "at once (BIND_NOW)" if image.dynamic.bind_now else "functions when first called (lazy)"
    return when + "; its own symbols first (SYMBOLIC)" * image.dynamic.symbolic


# ------------------------------------------------------------------------------------------- segments
def segments(image: ElfImage, page_size: int, width: int) -> Parts:
    """The segments as ribbons, first all to one scale, then each in pages."""
    plan = image.plan(page_size)
    yield heading(
        "Segments", f"from the file (offsets) into memory (vaddrs), in pages of {page_size:#x} bytes"
    )
    yield from ribbons.overview(image, plan, width)
    yield Text()
    yield from ribbons.segment_ribbons(image, plan, width)
    yield Text()
    for sentence in ribbons.shared_file_pages(plan):
        yield Text(f"  {sentence}")
    yield ribbons.ribbon_legend(width)


# ------------------------------------------------------------------------------------------ load plan
def load_plan(image: ElfImage, page_size: int, width: int) -> Parts:
    """The calls to come."""
    plan = image.plan(page_size)
    pages = count(plan.length // page_size, "page")
    yield heading("Load plan", f"{plan.length:#x} bytes of address space, {pages}; base is the load bias")
    yield _calls(say.calls(plan), width)


def _calls(planned: Iterable[say.Call], width: int) -> Table:
    """Step, call and, where there is room, what it is for."""
    grid = table("", "", "")
    grid.show_header = False
    for call in planned:
        grid.add_row(
            Text(f"  {call.step}", "dim"), call.text, Text(call.why if width >= _ROOMY else "", "dim")
        )
    return grid


# ---------------------------------------------------------------------------------------- relocations
#: What each kind of relocation writes, by how its name ends: the psABIs agree on that much.
_WRITES: Final = (
    (("RELATIVE64", "RELATIVE", "RELR"), "the load bias + a vaddr: needs no symbol"),
    (("IRELATIVE",), "the address that a resolver function returns (IFUNC)"),
    (("GLOB_DAT",), "a symbol's address, into the GOT"),
    (("JUMP_SLOT", "JMP_SLOT"), "a function's address, into the GOT, for the PLT"),
    (("DTPMOD64", "DTPMOD32", "DTPMOD"), "the TLS module of a variable"),
    (
        ("DTPOFF64", "DTPOFF32", "DTPREL64", "DTPREL32", "DTPOFF", "DTPREL"),
        "a TLS variable's place in its module",
    ),
    (("TPOFF64", "TPOFF32", "TPREL64", "TPREL32", "TPOFF", "TPREL"), "a TLS variable's place in each thread"),
    (("TLSDESC", "TLS_DESC"), "a function that finds a TLS variable"),
    (("COPY",), "the bytes of another library's variable"),
    (("NONE",), "nothing"),
    (("ABS64", "ABS32", "ADDR64", "ADDR32", "_64", "_32"), "a symbol's address + an offset"),
)


def _writes(kind: str) -> str:
    best = max(
        ((len(ending), text) for endings, text in _WRITES for ending in endings if kind.endswith(ending)),
        default=(0, ""),
    )
    return best[1]


def relocations(image: ElfImage, page_size: int, width: int) -> Parts:
    """How many of each kind, and which pages they make private to each process."""
    found = image.relocations
    if not len(found):
        yield heading("Relocations", "none: no page is written before the library runs")
        return
    yield heading("Relocations", f"{len(found):,}, which write to the pages below")
    kinds = table(">  count", "kind", "writes")
    for kind, number in found.by_kind().items():
        kinds.add_row(f"  {number:,}", kind, Text(_writes(kind), "dim"))
    yield kinds
    yield Text()
    yield from _by_page(image, image.plan(page_size), width)


def _by_page(image: ElfImage, plan: LoadPlan, width: int) -> Parts:
    page_size = plan.page_size
    written, counts = image.relocations.by_page(page_size)
    sealed = int(np.count_nonzero((written >= plan.relro.start) & (written < plan.relro.end)))
    zeroed = len({span.start & -page_size for span in plan.zeroed} - set(written.tolist()))
    private = len(written) + zeroed
    pages = count(plan.length // page_size, "page")
    yield heading("Private pages", f"{private:,} of {pages}, {size(private * page_size)} in every process")
    because = "  since relocation writes to them" + f"; {zeroed} for its end is zeroed" * bool(zeroed)
    yield Text(because + f"; {sealed:,} read-only afterwards (RELRO)" * bool(sealed))

    digits = len(f"{plan.end:#x}")
    columns = max(16, width - digits - 8)
    runs = list(_runs(plan, written))
    all_pages = sum(end - start for start, end, _ in runs) // page_size
    each = max(1, -(-all_pages // (columns * _MOST_LINES)))
    for start, end, protection in runs:
        first, last = np.searchsorted(written, np.array([start, end], np.uint64)).tolist()
        shares = np.zeros((end - start) // page_size)
        places = (written[first:last] - np.uint64(start)) // np.uint64(page_size)
        shares[places.astype(np.intp)] = counts[first:last] * image.header.word / page_size
        signs = "".join(level(max(shares[at : at + each])) for at in range(0, len(shares), each))
        for at in range(0, len(signs), columns):
            line = Text(f"  {f'{start + at * each * page_size:#x}':>{digits}} {protection} ")
            yield line.append(signs[at : at + columns], PROTECTION_STYLES.get(protection, ""))
    unit = "a page" if each == 1 else f"{each} pages, by the fullest"
    signs_meant = [("·", "", "not written"), ("▁", "", "a few words of it"), ("█", "", "every word")]
    yield legend([("each sign:", "dim", unit), *signs_meant], width)


def _runs(plan: LoadPlan, written: NDArray[np.uint64]) -> Iterator[tuple[int, int, str]]:
    """The mappings that hold a written page: start, end and protection, those of RELRO on their own."""
    for mapping in plan.mappings:
        cuts = [cut for cut in (plan.relro.start, plan.relro.end) if mapping.start < cut < mapping.end]
        for start, end in pairwise([mapping.start, *cuts, mapping.end]):
            first, last = np.searchsorted(written, np.array([start, end], np.uint64)).tolist()
            if first < last:
                yield start, end, "r--" if plan.relro.start <= start < plan.relro.end else mapping.protection


# --------------------------------------------------------------------------------- problems and checks
def problems(image: ElfImage) -> Parts:
    """What is wrong with the file."""
    if not image.problems:
        yield heading("Problems", f"none: {len(RULES)} rules hold (--checks lists them)")
        return
    errors = sum(problem.severity == "error" for problem in image.problems)
    verdict = "this file cannot be loaded" if errors else "it can be loaded all the same"
    yield heading("Problems", f"{len(image.problems)}: {verdict}")
    rows = table("", "field", "found", "expected")
    for problem in image.problems:
        style = "red" if problem.severity == "error" else "yellow"
        rows.add_row(
            Text(f"  {problem.severity}", style),
            safe(problem.field),
            safe(problem.found),
            safe(problem.expected),
        )
    yield rows


def checks(image: ElfImage) -> Parts:
    """Every rule with its outcome."""
    yield heading("Checks", "what must hold before anything is mapped")
    rows = table("", "rule", "protects", "source")
    for rule, broken in outcomes(image):
        outcome = Text("  broken", "red" if broken and broken[0].severity == "error" else "yellow")
        rows.add_row(outcome if broken else Text("  holds", "green"), rule.name, rule.protects, rule.source)
        for problem in broken:
            rows.add_row(
                "", "", safe(f"{problem.field}: found {problem.found}, expected {problem.expected}"), ""
            )
    yield rows


# -------------------------------------------------------------------------------------------- symbols
def symbols(image: ElfImage) -> Parts:
    """Every symbol of the dynamic symbol table, in its order."""
    listed = list(say.symbol_list(image))
    yield heading(
        "Symbols", f"{len(listed):,}; name@@V is a default version, name@V one that must be asked for"
    )
    digits = max((len(f"{symbol.value:#x}") for symbol in listed), default=5)
    yield Text(f"  {'value':>{digits}} {'size':>8} {'type':<8}{'bind':<8}{'section':<11}name", "bold")
    for symbol in listed:
        hidden = "" if symbol.visibility == "default" else f" ({symbol.visibility})"
        of = f" ({symbol.file})" if symbol.file else ""
        where = f"{symbol.value:#x}" if symbol.section != "undefined" else ""
        line = f"  {where:>{digits}} {symbol.size:>8,} {symbol.type:<8}{symbol.bind:<8}{symbol.section:<11}"
        yield safe(f"{line}{symbol.versioned_name}{of}{hidden}")
