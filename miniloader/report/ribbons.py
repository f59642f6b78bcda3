"""Segments drawn as ribbons: where their bytes lie in the file, above where they come to lie in memory.

Two drawings.  :func:`overview` shows the whole file above the whole span of memory, to one scale.
:func:`segment_ribbons` shows each segment in pages, since pages are what the kernel maps::

     3 rw-  offset 0x1c890 → vaddr 0x1d890, 0x708 bytes + 0x18 zero
       file   0x1c000 │2222░████│ 0x1d000
       memory 0x1d000 │2222░███·│ 0x1e000

A column is a part of a page, and whatever is in a page has at least one, however small it is.  Pages in the
middle of a segment are folded into their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from operator import itemgetter

from miniloader.elf import ElfImage, LoadPlan
from miniloader.elf.header import Segment
from miniloader.report.numbers import PROTECTION_STYLES, count
from miniloader.report.text import Line, Piece, legend
from miniloader.values import dataclass

__all__ = ["label", "overview", "ribbon_legend", "segment_ribbons", "shared_file_pages"]

_OWN, _ZERO, _REST, _NOTHING = "█", "·", "░", " "
_DIM = "bright_black"
_LEAST = 24  # columns for the ribbon itself; with less there is none


def label(segment: Segment) -> str:
    """One sign for a segment: its index among the program headers (in base 36)."""
    return "0123456789abcdefghijklmnopqrstuvwxyz"[segment.index % 36]


def _style(protection: str) -> str:
    return PROTECTION_STYLES.get(protection, "magenta")


# ------------------------------------------------------------------------------------------- overview
def overview(image: ElfImage, plan: LoadPlan, width: int) -> list[Line]:
    """The whole file and the whole span of memory, to one scale, each segment by its :func:`label`."""
    digits = max(len(f"{image.source.size:#x}"), len(f"{plan.end:#x}"))
    room = width - 2 * digits - 14
    if room < _LEAST:
        return []
    scale = max(image.source.size, plan.length)
    file = [(load.file_offset, load.file_offset + load.filesz, load) for load in image.loads if load.filesz]
    memory = [(load.vaddr - plan.start, load.end - plan.start, load) for load in image.loads]
    return [
        _scaled("file", 0, image.source.size, image.source.size, file, scale, room, digits),
        _scaled("memory", plan.start, plan.end, plan.length, memory, scale, room, digits),
    ]


def _scaled(
    name: str, start: int, end: int, length: int,
    spans: Sequence[tuple[int, int, Segment]], scale: int, room: int, digits: int,
) -> Line:  # fmt: skip
    columns = [(_NOTHING, "")] * max(1, round(length * room / scale))
    for low, high, load in sorted(spans, key=lambda span: span[0] - span[1]):  # small ones stay visible
        first = min(low * room // scale, len(columns) - 1)
        last = min(max(-(-high * room // scale), first + 1), len(columns))
        columns[first:last] = [(label(load), _style(load.flags))] * (last - first)
    drawn = [("".join(sign for sign, _ in run), style) for style, run in groupby(columns, key=itemgetter(1))]
    return (f"  {name:<7}{f'{start:#x}':>{digits}} │", *drawn, f"│ {end:#x}")


# ------------------------------------------------------------------------------------------- segments
@dataclass(frozen=True)
class _Part:
    """The bytes from ``start`` up to ``end`` of a segment's pages, counted from the start of the first."""

    start: int
    end: int
    sign: str
    style: str


#: Linkers write four to nine PT_LOADs; of a thousand, drawing all beside each would take a while.
_MOST_OTHERS = 64


@dataclass(frozen=True)
class _Unit:
    """``pages`` pages from page ``first`` on, drawn one by one (1) or as their number."""

    first: int
    pages: int

    def columns(self, per_page: int) -> int:
        return per_page if self.pages == 1 else len(self.text) + 6

    @property
    def text(self) -> str:
        return f" {self.pages:,} pages "


def segment_ribbons(image: ElfImage, plan: LoadPlan, width: int) -> Iterator[Line]:
    """Each segment: a line that says what is where, and its two ribbons where ``width`` has room for them."""
    digits = max(len(f"{plan.end:#x}"), len(f"{image.source.size:#x}"))
    room = width - 2 * digits - 16
    per_page = _columns_per_page(image.loads, plan.page_size, room)
    for load in image.loads:
        yield _title(load, plan.page_size)
        if per_page:
            yield from _ribbons(
                image, load, plan, _units(load, plan.page_size, per_page, room), per_page, digits
            )


def _title(load: Segment, page_size: int) -> Line:
    zeroes = load.memsz - load.filesz
    sizes = [f"{load.filesz:#x} bytes"] * bool(load.filesz) + [f"{zeroes:#x} zero"] * bool(zeroes)
    return (
        f"  {label(load)} ",
        (load.flags, f"bold {_style(load.flags)}"),
        f"  offset {load.file_offset:#x} → " if load.filesz else "  ",
        f"vaddr {load.vaddr:#x}, {' + '.join(sizes)}",
        "" if load.align == page_size else f", align {load.align:#x}",
    )


def _page_counts(load: Segment, page_size: int) -> tuple[int, int]:
    """How many pages of the segment come from the file, and how many are anonymous."""
    start = load.vaddr & -page_size
    file = -(-(load.file_end - start) // page_size) if load.filesz else 0
    return file, -(-(load.end - start) // page_size) - file


def _units(load: Segment, page_size: int, per_page: int, room: int) -> list[_Unit]:
    file, zero = _page_counts(load, page_size)
    if (file + zero) * (per_page + 1) < room:
        return [_Unit(page, 1) for page in range(file + zero)]
    return [*_folded(0, file, edges=True), *_folded(file, zero, edges=False)]


def _folded(first: int, pages: int, *, edges: bool) -> Iterator[_Unit]:
    if not edges and pages:
        yield _Unit(first, pages)
    elif pages > 3:
        yield from (_Unit(first, 1), _Unit(first + 1, pages - 2), _Unit(first + pages - 1, 1))
    else:
        yield from (_Unit(first + page, 1) for page in range(pages))


def _columns_per_page(loads: Sequence[Segment], page_size: int, room: int) -> int:
    """The widest page with which every segment has room, at least folded; 0 for none."""
    for per_page in (32, 24, 16, 12, 8, 6, 4):
        lengths = (
            sum(unit.columns(per_page) + 1 for unit in _units(load, page_size, per_page, room))
            for load in loads
        )
        if max(lengths) < room:
            return per_page
    return 0


def _ribbons(
    image: ElfImage, load: Segment, plan: LoadPlan, units: Sequence[_Unit], per_page: int, digits: int
) -> Iterator[Line]:
    start = load.vaddr & -plan.page_size
    file_pages, zero_pages = _page_counts(load, plan.page_size)
    file_end, end = file_pages * plan.page_size, (file_pages + zero_pages) * plan.page_size
    parts = _file_parts(image, load, load.vaddr - start, file_end)
    if file_pages:
        shown = [unit for unit in units if unit.first < file_pages]
        offset = load.file_offset - (load.vaddr - start)
        yield _line("file", offset, offset + file_end, shown, parts, plan.page_size, per_page, digits)
    parts = list(_memory_parts(load, parts, load.vaddr - start, end))
    yield _line("memory", start, start + end, units, parts, plan.page_size, per_page, digits)
    if plan.relro and start <= plan.relro.start < start + end:
        yield _relro_line(plan, start, units, per_page, digits)


def _relro_line(plan: LoadPlan, start: int, units: Sequence[_Unit], per_page: int, digits: int) -> Line:
    """Below the memory: which pages become read-only."""
    first, last = ((vaddr - start) // plan.page_size for vaddr in (plan.relro.start, plan.relro.end))
    line = " " * (digits + 12)
    for unit in units:
        pages = min(last, unit.first + unit.pages) - max(first, unit.first)
        columns = unit.columns(per_page)
        if pages <= 0:
            line += " " * (columns + 1)
            continue
        line += "└" if unit.first <= first else "─"
        line += "─" * columns if pages == unit.pages else f" {pages:,} of them ".center(columns, "─")
    return ((f"{line.rstrip()}┘ read-only once relocated", "cyan"),)


def _file_parts(image: ElfImage, load: Segment, slack: int, end: int) -> list[_Part]:
    """What the segment's whole pages hold of the file: its own bytes, others', and what none loads."""
    origin = load.file_offset - slack
    parts = [_Part(slack, slack + load.filesz, _OWN, _style(load.flags))]
    for neighbour in image.loads[:_MOST_OTHERS]:
        if neighbour is not load and neighbour.filesz:
            low, high = neighbour.file_offset - origin, neighbour.file_offset + neighbour.filesz - origin
            for first, last in ((low, min(high, slack)), (max(low, slack + load.filesz), high)):
                parts.append(_Part(max(first, 0), min(last, end), label(neighbour), _style(neighbour.flags)))
    parts.append(_Part(max(image.source.size - origin, slack + load.filesz), end, _NOTHING, _DIM))
    parts = sorted((part for part in parts if part.start < part.end), key=lambda part: part.start)
    return list(_without_holes(parts, end))


def _without_holes(parts: Sequence[_Part], end: int) -> Iterator[_Part]:
    at = 0
    for part in parts:
        if part.start > at:
            yield _Part(at, part.start, _REST, _DIM)
        if part.end > at:
            yield _Part(max(at, part.start), part.end, part.sign, part.style)
            at = part.end
    if at < end:
        yield _Part(at, end, _REST, _DIM)


def _memory_parts(load: Segment, file_parts: Sequence[_Part], slack: int, end: int) -> Iterator[_Part]:
    """As in the file, but for the zeroes: bss, and what the last page has beyond the file's end."""
    zero_from = slack + load.filesz if load.memsz > load.filesz else end
    for part in file_parts:
        if part.start < zero_from:
            sign = _ZERO if part.sign == _NOTHING else part.sign
            yield _Part(part.start, min(part.end, zero_from), sign, part.style)
    if zero_from < end:
        yield _Part(zero_from, end, _ZERO, _style(load.flags))


def _line(
    name: str, start: int, end: int,
    units: Sequence[_Unit], parts: Sequence[_Part], page_size: int, per_page: int, digits: int,
) -> Line:  # fmt: skip
    line: list[Piece] = [(f"    {name:<7}", _DIM), f"{f'{start:#x}':>{digits}} "]
    for unit in units:
        line += ["│", *_draw(unit, parts, page_size, per_page)]
    return (*line, f"│ {end:#x}")


def _draw(unit: _Unit, parts: Sequence[_Part], page_size: int, per_page: int) -> Iterator[Piece]:
    """The columns of one unit: in proportion, but at least one for each part of it."""
    low, high = unit.first * page_size, (unit.first + unit.pages) * page_size
    inside = [part for part in parts if part.start < high and part.end > low]
    columns = unit.columns(per_page)
    if unit.pages > 1:
        sides = (columns - len(unit.text)) // 2
        sign, style = inside[0].sign, inside[0].style
        yield from ((sign * sides, style), unit.text, (sign * (columns - sides - len(unit.text)), style))
        return
    inside = inside[:columns]
    at = 0
    for position, part in enumerate(inside):
        remaining = len(inside) - position - 1
        to = round((min(part.end, high) - low) * columns / page_size)
        to = columns if remaining == 0 else min(max(to, at + 1), columns - remaining)
        yield part.sign * (to - at), part.style
        at = to


def ribbon_legend(width: int) -> Iterator[Line]:
    """What the signs of the ribbons mean."""
    signs = [
        (_OWN, "", "of the segment"),
        (_ZERO, "", "zero"),
        ("1", "", "of segment 1, in the same page"),
        (_REST, _DIM, "of none, in the same page"),
        ("blank", _DIM, "not mapped, or past the end of the file"),
    ]
    return legend(signs, width)


def shared_file_pages(plan: LoadPlan) -> Iterator[str]:
    """A sentence for every run of file pages that two mappings show."""
    files = sorted((m for m in plan.mappings if m.kind == "file"), key=lambda m: m.file_offset)
    for before, after in pairwise(files):
        both = min(before.file_offset + before.length, after.file_offset + after.length) - after.file_offset
        if both > 0:
            first = before.start + after.file_offset - before.file_offset
            yield (
                f"offset {after.file_offset:#x}: {count(both // plan.page_size, 'page')} mapped twice, "
                f"at {first:#x} ({before.protection}) and {after.start:#x} ({after.protection})"
            )
