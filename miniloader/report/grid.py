"""The page grid: processes down, pages across; the same sign in one column is the same frame.

A grid of few pages has a sign for each.  In a larger one neighbouring pages that look the same in every
process are one run: of up to four pages it has a sign for each, else it is as wide as the logarithm of its
pages, whose number stands above it, so that a page on its own can still be seen beside a thousand.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, groupby
from math import ceil, log2
from string import ascii_lowercase, ascii_uppercase
from typing import Final

from miniloader.elf import LoadPlan, PlannedMapping
from miniloader.evidence.sharing import (
    ABSENT,
    COPIED,
    COPIED_SHARED,
    SHARED,
    SOLE,
    STATES,
    ZERO,
    Run,
    analyse,
)
from miniloader.evidence.snapshot import ProcessPages, Snapshot
from miniloader.report.numbers import PROTECTION_STYLES
from miniloader.report.text import Cell, Line, Piece, Table, plain, stripped
from miniloader.values import dataclass

__all__ = ["Mark", "explained", "grid_legend", "matrix", "matrix_legend", "page_grid"]

_FEW: Final = 24  # pages of a grid that has a sign for each
_DRAWN_SINGLY: Final = 4  # pages of a run, in a larger grid
_EXACT: Final = 0.0  # the stretch of a grid that has a sign for each page
_MOST_SIGNS: Final = 8  # of one meaning, in the legend
_NUMBERED: Final = -1  # stands among states for: what the numbers mean
_STRETCHES: Final = (4.0, 3.0, 2.5, 2.0, 1.5, 1.0)  # columns by which a run grows when its pages double
_STYLES: Final = {SHARED: "green", SOLE: "blue", ABSENT: "bright_black", ZERO: "bright_black"}
_FILE_SIGNS: Final = "█▓▚▞"  # more than the first only if processes have different files there
_COPY_STYLES: Final = ("yellow", "cyan", "magenta", "bright_blue", "bright_red", "bright_cyan")


@dataclass(frozen=True)
class Mark:
    """A page to point at from below the grid, by its vaddr, and what to say of it."""

    vaddr: int
    text: str


@dataclass(frozen=True)
class _Block:
    """Neighbouring runs under one heading: their protection, and what they are."""

    protection: str
    role: str
    runs: tuple[Run, ...]


def page_grid(snapshot: Snapshot, plan: LoadPlan, width: int, mark: Mark | None = None) -> list[Line]:
    """The grid of a snapshot (level frames or flags) within ``width`` columns."""
    marked = {mark.vaddr, mark.vaddr + plan.page_size} if mark is not None else set()
    blocks = [*_blocks(_runs(snapshot, plan, marked), plan, snapshot.processes)]
    return _drawn(blocks, _labels(snapshot.processes), width, mark)


def matrix(
    snapshot: Snapshot, rows: Sequence[str], parts: Sequence[tuple[int, str]], width: int
) -> list[Line]:
    """The grid of any mapping: ``rows`` name the processes, ``parts`` are (vaddr, name) where each begins."""
    runs = analyse(snapshot).runs([vaddr for vaddr, _ in parts])
    blocks = []
    for (protection, name), members in groupby(runs, lambda run: _part(run, parts, snapshot.processes)):
        blocks.append(_Block(protection, "" if name == protection else name, tuple(members)))
    longest = max(map(len, rows), default=0)
    lines = _drawn(blocks, [f"{label:{longest}}  " for label in ("", *rows)], width, None)
    return [line for line in lines if plain(line)]


def matrix_legend(snapshot: Snapshot, parts: Sequence[tuple[int, str]], told: Collection[int] = ()) -> Table:
    """What the signs of :func:`matrix` mean, but for the states that are ``told`` already."""
    runs = analyse(snapshot).runs([vaddr for vaddr, _ in parts])
    return _legend(runs, _first_number(runs), told)


def explained(snapshot: Snapshot, parts: Sequence[tuple[int, str]]) -> frozenset[int]:
    """What :func:`matrix_legend` of this has told: states, and _NUMBERED where there are numbers."""
    runs = analyse(snapshot).runs([vaddr for vaddr, _ in parts])
    numbered = {_NUMBERED} if _first_number(runs) else set()
    return frozenset(state for run in runs for state in run.states) | numbered


def grid_legend(snapshots: Iterable[Snapshot], plan: LoadPlan) -> Table:
    """What the signs in the grids of ``snapshots`` mean, and how to read the numbers."""
    grids = [_runs(snapshot, plan) for snapshot in snapshots]
    return _legend([*chain.from_iterable(grids)], next(filter(None, map(_first_number, grids)), ""))


def _legend(runs: Sequence[Run], number: str, told: Collection[int] = ()) -> Table:
    drawn: dict[int, dict[str, str]] = {}
    for run in runs:
        for process, state in enumerate(run.states):
            sign, style = _sign(run, process)
            drawn.setdefault(state, {})[sign] = style
    rows: list[tuple[Cell, Cell]] = []
    for state in sorted(drawn.keys() - {*told}):
        signs: list[Piece] = []
        for sign, style in sorted(drawn[state].items())[:_MOST_SIGNS]:
            signs += [" "] * bool(signs) + [(sign, style)]
        signs += [" …"] * (len(drawn[state]) > _MOST_SIGNS)
        rows.append((signs, (STATES[state].help, "dim")))
    if number and _NUMBERED not in told:
        text = "pages in the run below the number; where there is none, one sign is one page"
        rows.append(((number, "dim"), (text, "dim")))
    return Table((), rows)


def _runs(snapshot: Snapshot, plan: LoadPlan, edges: Collection[int] = ()) -> tuple[Run, ...]:
    """The runs of all pages but those of gaps; none goes over the edge of a mapping."""
    bounds = {vaddr for mapping in plan.mappings for vaddr in (mapping.start, mapping.end)}
    runs = analyse(snapshot).runs(bounds | {plan.relro.start, plan.relro.end} | {*edges})
    gaps = [mapping for mapping in plan.mappings if mapping.kind == "gap"]
    return tuple(run for run in runs if not any(gap.start <= run.vaddr < gap.end for gap in gaps))


# --------------------------------------------------------------------------------------- what is drawn
def _blocks(runs: Iterable[Run], plan: LoadPlan, processes: Sequence[ProcessPages]) -> Iterator[_Block]:
    for (mapping, relro), members in groupby(runs, lambda run: _place(run, plan)):
        block_runs = tuple(members)
        yield _Block(_protection(block_runs[0], mapping, processes), _role(mapping, relro=relro), block_runs)


def _place(run: Run, plan: LoadPlan) -> tuple[PlannedMapping, bool]:
    mapping = next(planned for planned in plan.mappings if planned.start <= run.vaddr < planned.end)
    return mapping, plan.relro.start <= run.vaddr < plan.relro.end


def _part(run: Run, parts: Sequence[tuple[int, str]], processes: Sequence[ProcessPages]) -> tuple[str, str]:
    """The protection, where all processes have the same, and the name of the part that the run is in."""
    indices = [(process, int(process.pages["mapping"][run.start])) for process in processes]
    protections = {process.mappings[index].vma.protection for process, index in indices if index >= 0}
    name = next((name for vaddr, name in reversed(parts) if vaddr <= run.vaddr), "")
    return protections.pop() if len(protections) == 1 else "", name


def _protection(run: Run, mapping: PlannedMapping, processes: Sequence[ProcessPages]) -> str:
    """As the kernel has it, in the first process that is there."""
    for process in processes:
        index = int(process.pages["mapping"][run.start])
        if index >= 0:
            return process.mappings[index].vma.protection
    return mapping.protection


def _role(mapping: PlannedMapping, *, relro: bool) -> str:
    if mapping.kind == "zero":
        return "bss"
    if "x" in mapping.protection:
        return "code"
    if "w" not in mapping.protection:
        return "constants"
    return "relro" if relro else "data"


def _sign(run: Run, process: int) -> tuple[str, str]:
    """The sign of a run in one process, and its style."""
    state, partner = run.states[process], run.partners[process]
    if state in (COPIED, COPIED_SHARED) and partner >= 0:
        letters = ascii_lowercase if state == COPIED_SHARED else ascii_uppercase  # a sign has one meaning
        return letters[partner % 26], _COPY_STYLES[partner % len(_COPY_STYLES)]
    if state == SHARED:
        files = sorted(
            {frame for frame, run_state in zip(run.partners, run.states, strict=True) if run_state == SHARED}
        )
        return _FILE_SIGNS[files.index(partner) % len(_FILE_SIGNS)], _STYLES[SHARED]
    return STATES[state].sign, _STYLES.get(state, "red")


# ------------------------------------------------------------------------------------- how wide it is
def _is_exact(runs: Iterable[Run]) -> bool:
    return sum(run.pages for run in runs) <= _FEW


def _first_number(runs: Sequence[Run]) -> str:
    """The first number of pages that stands above these runs, "" where none does."""
    stretch = _EXACT if _is_exact(runs) else _STRETCHES[-1]
    return next(filter(None, (_number(run, stretch) for run in runs)), "")


def _width(run: Run, stretch: float) -> int:
    number = _number(run, stretch)
    return max(2 + ceil(stretch * log2(run.pages)), len(number) + 2) if number else run.pages


def _number(run: Run, stretch: float) -> str:
    return f"{run.pages:,}" if run.pages > _DRAWN_SINGLY and stretch != _EXACT else ""


def _block_width(block: _Block, stretch: float) -> int:
    drawn = sum(_width(run, stretch) for run in block.runs)
    return max(drawn, len(block.role), len(block.protection))


def _total(blocks: Sequence[_Block], stretch: float) -> int:
    return sum(_block_width(block, stretch) + 1 for block in blocks)


def _bands(blocks: Iterable[_Block], room: int, stretch: float) -> Iterator[list[_Block]]:
    """Blocks that fit side by side; one that is too wide by itself goes on in the next band."""
    band: list[_Block] = []
    for block in chain.from_iterable(_parts(whole, room, stretch) for whole in blocks):
        if band and _total([*band, block], stretch) > room:
            yield band
            band = []
        band.append(block)
    yield band


def _parts(block: _Block, room: int, stretch: float) -> Iterator[_Block]:
    part: list[Run] = []
    for run in block.runs:
        if part and sum(_width(drawn, stretch) for drawn in (*part, run)) >= room:
            yield _Block(block.protection, block.role, tuple(part))
            part = []
        part.append(run)
    yield _Block(block.protection, block.role, tuple(part))


# ------------------------------------------------------------------------------------------- the lines
def _labels(processes: Sequence[ProcessPages]) -> list[str]:
    """A heading, then one label for each process, all of one width."""
    pids = [str(process.pid) for process in processes]
    width = max(len("pid"), *map(len, pids))
    heading = f"{'pid':>{width}} base "
    labels = [f"{pid:>{width}} {process.base:x} " for pid, process in zip(pids, processes, strict=True)]
    longest = max(map(len, (heading, *labels)))
    return [f"{label:{longest}}" for label in (heading, *labels)]


def _drawn(blocks: Sequence[_Block], labels: Sequence[str], width: int, mark: Mark | None) -> list[Line]:
    room = max(width - len(labels[0]), 20)
    if _is_exact(run for block in blocks for run in block.runs):
        stretch = _EXACT
    else:
        fitting = (candidate for candidate in _STRETCHES if _total(blocks, candidate) <= room)
        stretch = next(fitting, _STRETCHES[-1])
    return [line for band in _bands(blocks, room, stretch) for line in _band(band, labels, stretch, mark)]


def _band(band: Sequence[_Block], labels: Sequence[str], stretch: float, mark: Mark | None) -> Iterator[Line]:
    blank = " " * len(labels[0])
    yield _headings(blank, band, stretch, "role")
    yield _headings(labels[0], band, stretch, "protection")
    if any(_number(run, stretch) for block in band for run in block.runs):
        yield (((blank + "".join(_numbers(block, stretch) for block in band)).rstrip(), "dim"),)
    for process, label in enumerate(labels[1:]):
        line: list[Piece] = [label]
        for block in band:
            for run in block.runs:
                sign, style = _sign(run, process)
                line.append((sign * _width(run, stretch), style))
            line.append(
                " " * (_block_width(block, stretch) + 1 - sum(_width(run, stretch) for run in block.runs))
            )
        yield stripped(line)
    column = len(blank) if mark is None else _column(band, stretch, mark.vaddr)
    if mark is not None and column is not None:
        yield _pointer(len(blank) + column, mark.text)


def _headings(label: str, band: Sequence[_Block], stretch: float, attribute: str) -> Line:
    line: list[Piece] = [(label, "dim" if label.strip() else "")]
    for block in band:
        text = getattr(block, attribute)
        style = PROTECTION_STYLES.get(text, "bold")
        line.append((f"{text:{_block_width(block, stretch) + 1}}", style))
    return stripped(line)


def _numbers(block: _Block, stretch: float) -> str:
    numbers = "".join(f"{_number(run, stretch):^{_width(run, stretch)}}" for run in block.runs)
    return f"{numbers:{_block_width(block, stretch) + 1}}"


def _column(band: Sequence[_Block], stretch: float, vaddr: int) -> int | None:
    """Where the run that begins at ``vaddr`` is drawn."""
    column = 0
    for block in band:
        start = column
        for run in block.runs:
            if run.vaddr == vaddr:
                return start
            start += _width(run, stretch)
        column += _block_width(block, stretch) + 1
    return None


def _pointer(column: int, text: str) -> Line:
    """The text below the sign it is about: to the right of an arrow, or to the left where it needs room."""
    pointer = f"{' ' * column}▲ {text}" if column < len(text) + 3 else f"{text + ' ▲':>{column + 1}}"
    return ((pointer, "bold"),)
