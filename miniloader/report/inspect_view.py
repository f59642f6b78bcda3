"""What ``miniloader inspect`` shows a person: one function a part, from the image to lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage, LoadPlan, kind_of
from miniloader.elf.asked import TABLE, asked_for
from miniloader.elf.checks import RULES, Problem, applying, outcomes, problems_of
from miniloader.elf.kinds.file_kind import FileKind
from miniloader.elf.kinds.program import kernel_calls
from miniloader.elf.symbols import GnuHash
from miniloader.errors import ElfError, printable
from miniloader.forking import importing
from miniloader.report import inspect as say
from miniloader.report import inspect_kinds as kinds
from miniloader.report import ribbons
from miniloader.report.numbers import PROTECTION_STYLES, count, level, size
from miniloader.report.symbols import Symbol
from miniloader.report.text import Cell, Line, Part, Piece, Table, heading, legend, pairs

__all__ = ["checks", "overview", "page", "rules", "symbols"]

#: Columns from which on there is room for remarks beside the calls.
_ROOMY: Final = 130
#: How many lines the drawing of the written pages may take, about.
_MOST_LINES: Final = 12


def page(image: ElfImage, page_size: int, drawing: int, width: int | None) -> Iterator[Part]:
    """Everything but the long lists, for lines of ``width`` (``None``: any), drawings in ``drawing`` columns.

    A part that cannot be read says so in its place.
    """
    kind = kind_of(image)
    yield from overview(image)
    parts: dict[str, Callable[[], Iterator[Part]]] = {
        "Segments": lambda: _segments(image, page_size, drawing),
        "Load plan": lambda: _load_plan(image, page_size, width),
        "Dynamic section": lambda: _dynamic(image),
        "Relocations": lambda: _relocations(image, page_size, drawing),
    }
    if kind.is_program:
        parts["Load plan"] = lambda: _kernel_plan(image, kind, page_size, width)
        if image.segment("PT_DYNAMIC") is None:
            del parts["Relocations"], parts["Dynamic section"]
    elif kind.name in ("object", "debug-only"):
        parts = {"Sections": lambda: kinds.sections(image)}
    elif kind.name == "core":
        parts = {"Core dump": lambda: kinds.core(image)}
    for title, part in parts.items():
        yield ()
        try:
            yield from list(part())
        except ElfError as error:
            yield heading(title, f"cannot be read: {_fault(error)}")
    if applying(image):
        yield ()
        yield from _problems(image, kind)


def _fault(fault: ElfError | Problem) -> str:
    return printable(f"{fault.field}: found {fault.found}, expected {fault.expected}")


# ------------------------------------------------------------------------------------------- overview
def overview(image: ElfImage) -> Iterator[Part]:
    """What kind of file it is, and what the dynamic linker is told."""
    header, kind_of_file = image.header, kind_of(image)
    kind = (
        f"{header.elf_class}-bit {header.byte_order} endian {say.machine_name(image)}, "
        f"{say.type_name(image)}, {size(image.source.size)}"
    )
    yield ((printable(image.path), "bold"),)
    linked = kind_of_file.name in ("library", "program", "pie", "other")
    facts: list[tuple[str, Callable[[], str | None]]] = [
        ("file", lambda: kind),
        ("kind", lambda: None if kind_of_file.name == "library" else kind_of_file.words),
        ("interpreter", lambda: image.interpreter if kind_of_file.is_program else None),
        ("entry", lambda: _entry(image) if kind_of_file.is_program else None),
        ("stack", lambda: _stack(image) if kind_of_file.is_program else None),
        ("soname", lambda: image.soname),
        ("build-id", lambda: image.build_id),
        ("needed", lambda: " ".join(image.needed)),
        ("RUNPATH", lambda: ":".join(image.runpath)),
        ("RPATH", lambda: ":".join(image.rpath)),
        ("TLS", lambda: _tls(image)),
        ("symbols", lambda: _symbol_counts(image) if linked or kind_of_file.name == "object" else None),
        ("binding", lambda: _binding(image) if linked else None),
    ]
    always = ("soname", "build-id", "needed") if kind_of_file.name == "library" else ()
    if kind_of_file.name in ("object", "core", "debug-only"):
        facts = [fact for fact in facts if fact[0] in ("file", "kind", "build-id", "symbols")]
    shown = [(name, _fact(read)) for name, read in facts]
    yield pairs(((name, said or ("none", "dim")) for name, said in shown if said or name in always), indent=2)


def _fact(read: Callable[[], str | None]) -> Piece | None:
    try:
        said = read()
    except ElfError as error:
        return f"cannot be read: {_fault(error)}", "red"
    return said and printable(said)


def _tls(image: ElfImage) -> str | None:
    tls = image.tls
    if tls is None:
        return None
    return f"{tls.filesz:#x} bytes of the file, {tls.memsz:#x} in each thread, aligned to {tls.align:#x}"


def _symbol_counts(image: ElfImage) -> str:
    defined, undefined = say.symbol_counts(image)
    by = {GnuHash: "; GNU hash", type(None): "; no hash table"}.get(type(image.symbols.hash), "; SysV hash")
    return f"{defined:,} defined, {undefined:,} undefined{'' if image.header.type == 'REL' else by}"


def _entry(image: ElfImage) -> str:
    with importing:
        from miniloader.machine.names_at import Landmarks  # for programs: libraries have no entry

    place = Landmarks(image).at(image.header.entry)
    return f"{image.header.entry:#x}" + (f", {place.name}" if place is not None else ", outside the image")


def _stack(image: ElfImage) -> str:
    if image.segment("PT_GNU_STACK") is None:
        return "no PT_GNU_STACK: " + ("executable" if image.executable_stack else "not executable")
    return "executable" if image.executable_stack else "not executable"


def _binding(image: ElfImage) -> str:
    when = "at once (BIND_NOW)" if image.dynamic.bind_now else "functions when first called (lazy)"
    return when + "; its own symbols first (SYMBOLIC)" * image.dynamic.symbolic


# ------------------------------------------------------------------------------------------- segments
def _segments(image: ElfImage, page_size: int, drawing: int) -> Iterator[Line]:
    """The segments as ribbons, first all to one scale, then each in pages."""
    plan = image.plan(page_size)
    yield heading("Segments", f"from the file (offset) into memory (vaddr), in pages of {page_size:#x} bytes")
    yield from ribbons.overview(image, plan, drawing)
    yield ()
    yield from ribbons.segment_ribbons(image, plan, drawing)
    yield ()
    for sentence in ribbons.shared_file_pages(plan):
        yield (f"  {sentence}",)
    yield from ribbons.ribbon_legend(drawing)


# ------------------------------------------------------------------------------------------ load plan
def _load_plan(image: ElfImage, page_size: int, width: int | None) -> Iterator[Part]:
    """The calls to come, and, where there is room, what each is for."""
    plan = image.plan(page_size)
    pages = count(plan.length // page_size, "page")
    yield heading("Load plan", f"{plan.length:#x} bytes of address space, {pages}; base is the load bias")
    remarks = width is None or width >= _ROOMY
    rows: list[list[Cell]] = [
        [(call.step, "dim"), call.text(), *([(call.why, "dim")] if remarks else [])] for call in plan.calls()
    ]
    yield Table((), rows, 2)


def _kernel_plan(image: ElfImage, kind: FileKind, page_size: int, width: int | None) -> Iterator[Part]:
    """What the kernel maps where as it starts the program, and what its linker or itself does then."""
    calls = kernel_calls(image, page_size)
    fixed = kind.name in ("program", "static-program")
    about = "at its own vaddrs" if fixed else "base is where the kernel puts it"
    yield heading("Load plan", f"how the kernel maps it: {about}")
    remarks = width is None or width >= _ROOMY
    rows: list[list[Cell]] = [
        [(call.step, "dim"), call.text(0 if fixed else None), *([(call.why, "dim")] if remarks else [])]
        for call in calls
    ]
    yield Table((), rows, 2)


# ------------------------------------------------------------------------------------ dynamic section
_OUTCOMES: Final = {"honoured": "green", "refused": "red", "ignored": "yellow"}


def _dynamic(image: ElfImage) -> Iterator[Part]:
    """What the file asks its loader for, and what becomes of it."""
    asked = list(asked_for(image))
    shown = [entry for entry in asked if entry.why != TABLE]
    yield heading("Dynamic section", "what it asks its loader for, and what becomes of that")
    rows: list[tuple[Cell, ...]] = []
    for entry in shown:
        value = printable(entry.text) if entry.text is not None else f"{entry.value:#x}"
        rows.append((entry.name, value, (entry.outcome, _OUTCOMES[entry.outcome]), (entry.why, "dim")))
    yield Table((), rows, 2)
    yield (f"  and {len(asked) - len(shown)} that say where its tables are (--json lists them)",)


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
    (
        ("ABS64", "ABS32", "ADDR64", "ADDR32", "REFQUAD", "MIPS_REL32", "_64", "_32"),
        "a symbol's address + an offset",
    ),
)


def _writes(kind: str) -> str:
    best = max(
        ((len(ending), text) for endings, text in _WRITES for ending in endings if kind.endswith(ending)),
        default=(0, ""),
    )
    return best[1]


def _relocations(image: ElfImage, page_size: int, drawing: int) -> Iterator[Part]:
    """How many of each kind, and which pages they make private to each process."""
    relocations = image.relocations
    if not len(relocations):
        yield heading("Relocations", "none: no page is written before the library runs")
        return
    yield heading("Relocations", f"{len(relocations):,}, which write to the pages below")
    kinds = relocations.by_kind().items()
    rows = [(f"{number:,}", kind, (_writes(kind), "dim")) for kind, number in kinds]
    yield Table((">count", "kind", "writes"), rows, 2)
    yield ()
    yield from _private_pages(image, image.plan(page_size), drawing)


def _private_pages(image: ElfImage, plan: LoadPlan, drawing: int) -> Iterator[Line]:
    page_size = plan.page_size
    written, counts = image.relocations.by_page(page_size)
    sealed = int(np.count_nonzero((written >= plan.relro.start) & (written < plan.relro.end)))
    zeroed = len({span.start & -page_size for span in plan.zeroed} - set(written.tolist()))
    private = len(written) + zeroed
    pages = count(plan.length // page_size, "page")
    yield heading("Private pages", f"{private:,} of {pages}, {size(private * page_size)} in every process")
    yield ("  since relocation writes to them" + f"; {zeroed} because its end is zeroed" * bool(zeroed),)
    if sealed:
        yield (f"  {sealed:,} of them read-only afterwards (RELRO)",)

    digits = len(f"{plan.end:#x}")
    columns = max(16, drawing - digits - 8)
    runs = list(_runs(plan, written))
    pages_a_sign = max(
        1, -(-sum(end - start for start, end, _ in runs) // page_size // (columns * _MOST_LINES))
    )
    fullness = counts * image.header.word / page_size
    for start, end, protection in runs:
        first, last = np.searchsorted(written, np.array([start, end], np.uint64)).tolist()
        cells = np.zeros(-(-(end - start) // (pages_a_sign * page_size)))
        places = (written[first:last] - np.uint64(start)) // np.uint64(pages_a_sign * page_size)
        np.maximum.at(cells, places.astype(np.intp), fullness[first:last])
        signs = "".join(map(level, cells.tolist()))
        for at in range(0, len(signs), columns):
            where = f"  {f'{start + at * pages_a_sign * page_size:#x}':>{digits}} {protection} "
            yield where, (signs[at : at + columns], PROTECTION_STYLES.get(protection, ""))
    unit = "a page" if pages_a_sign == 1 else f"{pages_a_sign:,} pages, by the fullest"
    meanings = [("·", "", "not written"), ("▁", "", "a few words of it"), ("█", "", "every word")]
    yield from legend([("each sign:", "dim", unit), *meanings], drawing)


def _runs(plan: LoadPlan, written: NDArray[np.uint64]) -> Iterator[tuple[int, int, str]]:
    """The mappings that hold a written page: start, end and protection, those of RELRO on their own."""
    for mapping in plan.mappings:
        cuts = [cut for cut in (plan.relro.start, plan.relro.end) if mapping.start < cut < mapping.end]
        for start, end in pairwise([mapping.start, *cuts, mapping.end]):
            first, last = np.searchsorted(written, np.array([start, end], np.uint64)).tolist()
            if first < last:
                yield start, end, "r--" if plan.relro.start <= start < plan.relro.end else mapping.protection


# --------------------------------------------------------------------------------- problems and checks
_STYLES: Final = {"error": "red", "warning": "yellow"}


def _problems(image: ElfImage, kind: FileKind) -> Iterator[Part]:
    """What is wrong with the file."""
    problems = problems_of(image)
    if not problems:
        yield heading("Problems", f"none: {len(applying(image))} rules hold (--checks lists them)")
        return
    errors = any(problem.severity == "error" for problem in problems)
    verdict = "this file cannot be loaded" if errors else "it can be loaded all the same"
    if kind.is_program:
        verdict = "it may not start" if errors else "it starts all the same"
    yield heading("Problems", f"{len(problems)}: {verdict}")
    rows = [((problem.severity, _STYLES[problem.severity]), _fault(problem)) for problem in problems]
    yield Table((), rows, 2)


def checks(image: ElfImage) -> Iterator[Part]:
    """Every rule with its outcome, what it protects from, and who asks for it."""
    yield heading("Checks", "what must hold before anything is mapped")
    rows: list[tuple[Cell, ...]] = []
    for rule, broken in outcomes(image):
        outcome = ("broken", _STYLES[broken[0].severity]) if broken else ("holds", "green")
        rows.append((outcome, rule.name, f"{rule.protects} ({rule.source})"))
        rows += [("", "", (_fault(problem), "bold")) for problem in broken]
    yield Table((), rows, 2)


def rules() -> Iterator[Part]:
    """Every rule: what it protects from, and who asks for it."""
    yield heading("Checks", "what must hold before anything is mapped")
    rows = [
        ((rule.severity, _STYLES[rule.severity]), rule.name, f"{rule.protects} ({rule.source})")
        for rule in RULES
    ]
    yield Table((), rows, 2)


# -------------------------------------------------------------------------------------------- symbols
def symbols(image: ElfImage, listed: Sequence[Symbol]) -> Iterator[Line]:
    """The symbols ``listed``, a line each."""
    of_all = max(len(image.symbols) - 1, 0)
    part = f" of {of_all:,}" if 0 < len(listed) < of_all else ""
    yield heading("Symbols", f"{len(listed):,}{part}; name@@V is a default version, name@V must be asked for")
    digits = max((len(f"{symbol.value:#x}") for symbol in listed), default=5)
    yield ((f"  {'value':>{digits}} {'size':>8} {'type':<8}{'bind':<8}{'section':<11}name", "bold"),)
    for symbol in listed:
        hidden = "" if symbol.visibility == "default" else f" ({symbol.visibility})"
        of = f" ({symbol.file})" if symbol.file else ""
        where = f"{symbol.value:#x}" if symbol.section != "undefined" else ""
        line = f"  {where:>{digits}} {symbol.size:>8,} {symbol.type:<8}{symbol.bind:<8}{symbol.section:<11}"
        yield (line + printable(f"{symbol.shown}{of}{hidden}"),)
