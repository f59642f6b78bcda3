"""Libraries as they lie linked in a process: their order, what each defines, and what its words hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage
from miniloader.elf.symbols import SHN_UNDEF, STB_LOCAL, STT_FUNC, SymbolTable
from miniloader.elf.tables import RELOCATION
from miniloader.errors import ElfError
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.slots import COPY, INDIRECT, LOADER, RELATIVE, SLOT_DTYPE
from miniloader.evidence.space import Placed, Space
from miniloader.forking import cached_property
from miniloader.kernel.frames import distinct
from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.pagemap import FILE, PRESENT, PageMap
from miniloader.kernel.process_memory import ProcessMemory
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.arrangement import Arrangements
from miniloader.lab.audit.explain import stand_ins_in
from miniloader.lab.audit.link_map import loaded_order
from miniloader.lab.audit.mapped_files import MappedFiles
from miniloader.machine.relocation import KINDS

__all__ = ["LinkedImage", "LinkedProcess"]

_PAGE_MASK: Final = np.uint64(PAGE_SIZE - 1)
_MOST_ENTRIES: Final = 256  # of the program's dynamic section that are looked at
_HIDDEN_VISIBILITIES: Final = (1, 2)  # internal, hidden (gABI 4, st_other)
_PROTECTED: Final = 3


class LinkedImage:
    """A library or program as it lies in the process; ``number`` is its place in the order of loading."""

    def __init__(
        self, facts: FileFacts, image: ElfImage, table: SymbolTable, bias: int, vmas: Sequence[Vma]
    ) -> None:
        self.path, self.facts, self.image, self.table, self.bias = vmas[0].path, facts, image, table, bias
        self._vmas = vmas
        self.number = -1
        self.needed: tuple[str, ...] = ()
        self.soname: str | None = None
        with suppress(ElfError):  # a string outside of its table
            self.needed, self.soname = image.needed, image.soname
        dynamic = image.segment("PT_DYNAMIC")
        self.dynamic = (bias + dynamic.vaddr) % 2**64 if dynamic is not None else 0
        plan = facts.plan  # of which a part may be mapped at a low address, where there is no room for all
        self.span = (0, 0) if plan is None else (max(bias + plan.start, 0), max(bias + plan.end, 0))

    @cached_property
    def visible(self) -> NDArray[np.bool_]:
        """Which symbols take part in look-ups: not local, and neither hidden nor internal."""
        visibility = self.table.rows["other"] & 3
        return np.asarray((self.table.bind != STB_LOCAL) & ~np.isin(visibility, _HIDDEN_VISIBILITIES))

    @cached_property
    def entries(self) -> NDArray[np.uint64]:
        """The names of the functions for which PLT entries stand: undefined, yet with a value."""
        rows = self.table.rows
        stands = (rows["shndx"] == SHN_UNDEF) & (self.table.type == STT_FUNC) & (rows["value"] != 0)
        return distinct(self.facts.name_numbers[stands])

    @cached_property
    def _spans(self) -> NDArray[np.uint64]:
        """Where its segments are mapped as they should be: the addresses [start, end), shape (spans, 2)."""
        spans = [
            (vma.start, vma.end)
            for vma in self._vmas
            for load in self.image.loads
            if vma.file_offset - (vma.start - self.bias) == load.file_offset - load.vaddr
            and vma.start < self.bias + load.file_end
            and self.bias + load.vaddr < vma.end
        ]
        return np.array(sorted(set(spans)), np.uint64).reshape(-1, 2)

    def addresses_of(self, slots: NDArray[Any]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """The address of each slot, and which of them lie in its own mappings."""
        addresses = slots["vaddr"] + np.uint64(self.bias % 2**64)
        if not len(self._spans):
            return addresses, np.zeros(len(addresses), np.bool_)
        at = np.searchsorted(self._spans[:, 0], addresses, side="right") - 1
        return addresses, (at >= 0) & (addresses < self._spans[at, 1])

    @cached_property
    def _copy_rows(self) -> NDArray[Any]:
        """The copy relocations: variables of libraries that are brought into the program."""
        if not len(self.facts.slots):  # none, or none that can be read
            return np.empty(0, RELOCATION)
        kinds = KINDS[self.image.header.machine]
        codes = [code for code, kind in kinds.items() if kind.formula == "copy"]
        rows = [table.rows[np.isin(table.rows["type"], codes)] for table in self.image.relocations.tables]
        return np.concatenate([np.empty(0, RELOCATION), *rows])

    @cached_property
    def copies(self) -> NDArray[np.uint64]:
        """The vaddrs of the variables that copy relocations bring here."""
        return distinct(self._copy_rows["offset"])

    @cached_property
    def references(self) -> NDArray[Any]:
        """The slots of symbols that are looked up, as SLOT_DTYPE; one for each copy."""
        slots = self.facts.slots  # none of a machine that is not known
        copied = np.zeros(len(self._copy_rows), SLOT_DTYPE)
        copied["vaddr"], copied["symbol"], copied["what"] = (
            self._copy_rows["offset"], self._copy_rows["symbol"], COPY,
        )  # fmt: skip
        slots = np.concatenate([slots[~np.isin(slots["what"], (RELATIVE, INDIRECT, LOADER, COPY))], copied])
        slots = slots[(slots["symbol"] > 0) & (slots["symbol"] < len(self.table))]
        symbols = self.table.rows[slots["symbol"]]
        protected = (symbols["other"] & 3 == _PROTECTED) & (symbols["shndx"] != SHN_UNDEF)
        return np.asarray(slots[self.visible[slots["symbol"]] & ~protected])


class LinkedProcess:
    """What is mapped where, and what the memory holds."""

    def __init__(self, pid: int, pagemap: PageMap, memory: ProcessMemory) -> None:
        self._pagemap, self._memory = pagemap, memory
        files = MappedFiles()
        self.vmas, prepared = files.prepared.in_place(pid, read_maps(pid))
        self._prepared = [self.vmas[index] for index in prepared]
        arrangements = list(Arrangements().of_process(pid, files, self.vmas))
        troubles = {
            a.file.identity.path: a.file.trouble
            for a in arrangements
            if a.file.facts is None and any("x" in self.vmas[index].protection for index in a.indices)
        }
        mapped = [
            LinkedImage(facts, facts.image, facts.symbols, a.bias, [self.vmas[index] for index in a.indices])
            for a in arrangements
            if (facts := a.file.facts) is not None and facts.image is not None and facts.symbols is not None
        ]
        self.images = self._in_order([image for image in mapped if self._is_linked(image)])
        for number, image in enumerate(self.images):
            image.number = number
        troubles |= {image.path: image.facts.trouble for image in mapped if image.facts.trouble}
        self.unreadable = tuple(troubles.items())
        placed = [
            Placed(a.bias, self.vmas[a.indices[0]].start, self.vmas[a.indices[-1]].end, a.file.facts)
            for a in arrangements
        ]
        code = [(vma.start, vma.end) for vma in self.vmas if "x" in vma.protection]
        self.space = Space(placed, code, stand_ins=stand_ins_in(pid, self.vmas))
        self._by_span = sorted(self.images, key=lambda image: image.span)
        self._starts = np.array([image.span[0] for image in self._by_span], np.uint64)
        self._ends = np.array([image.span[1] for image in self._by_span], np.uint64)

    def _is_linked(self, image: LinkedImage) -> bool:
        """Whether anybody relocated it: else somebody has mapped the file to read it."""
        if not len(image.references):
            return bool(len(image.table))
        return bool(self.slot_words(image)[1].any())

    def slot_words(self, image: LinkedImage) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """What each of the references of ``image`` holds, and which could be read."""
        addresses, inside = image.addresses_of(image.references)
        values, done = self.words(addresses, image.facts.word)
        return values, done & inside

    def words(self, addresses: NDArray[np.uint64], size: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """The word of ``size`` bytes at each address, and whether it was read: from pages in memory that are
        not the file's.
        """
        values, done = np.zeros(len(addresses), np.uint64), np.zeros(len(addresses), np.bool_)
        wanted = distinct(addresses & ~_PAGE_MASK)
        pages = wanted[self._copied(wanted)]
        if not len(pages):
            return values, done
        data, read = self._memory.pages(pages)
        at = np.minimum(np.searchsorted(pages, addresses & ~_PAGE_MASK), len(pages) - 1)
        offset = (addresses & _PAGE_MASK).astype(np.intp)
        done = (pages[at] == addresses & ~_PAGE_MASK) & read[at] & (offset <= PAGE_SIZE - size)
        octets = data[at[done, np.newaxis], offset[done, np.newaxis] + np.arange(size)]
        values[done] = octets.view(f"u{size}")[:, 0]
        return values, done

    def _copied(self, pages: NDArray[np.uint64]) -> NDArray[np.bool_]:
        entries = np.zeros(len(pages), np.uint64)
        edges = [0, *(np.flatnonzero(np.diff(pages) != PAGE_SIZE) + 1).tolist(), len(pages)]
        for first, last in pairwise(edges):
            if first < last:
                entries[first:last] = self._pagemap.read(int(pages[first]), int(pages[last - 1]) + PAGE_SIZE)
        copied = (entries & PRESENT != 0) & (entries & FILE == 0)
        for vma in self._prepared:
            inside = (pages >= np.uint64(vma.start)) & (pages < np.uint64(vma.end))
            copied |= inside & (entries & PRESENT != 0)
        return np.asarray(copied)

    def _in_order(self, images: Sequence[LinkedImage]) -> list[LinkedImage]:
        """The images as ld.so has loaded them, then those that it has not."""
        for program in images:
            order = loaded_order(self.words, program.dynamic, _MOST_ENTRIES, program.facts.word)
            if order:
                places = {dynamic: place for place, dynamic in enumerate(order)}
                return sorted(images, key=lambda image: places.get(image.dynamic, len(places)))
        return list(images)

    # -- who defines what -------------------------------------------------------------------------

    @cached_property
    def _definers(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The names that are defined, sorted; and of each the image and the symbol."""
        names, places = [np.empty(0, np.uint64)], [np.empty((0, 2), np.int64)]
        for image in self.images:
            symbols = np.flatnonzero(image.visible & (image.table.rows["shndx"] != SHN_UNDEF))
            names.append(image.facts.name_numbers[symbols])
            places.append(np.stack([np.full(len(symbols), image.number), symbols], axis=1))
        name, place = np.concatenate(names), np.concatenate(places)
        order = np.argsort(name, kind="stable")
        return name[order], place[order]

    def counts(self, names: NDArray[np.uint64]) -> NDArray[np.intp]:
        """How many definitions there are of each name, of whatever version."""
        ordered = self._definers[0]
        first = np.searchsorted(ordered, names)
        return np.asarray(np.searchsorted(ordered, names, side="right") - first)

    def definers(self, image: LinkedImage, symbol: int) -> list[tuple[LinkedImage, int]]:
        """Who defines what ``symbol`` of ``image`` asks for, in order of scope, and as which symbol."""
        names, places = self._definers
        name, wanted = image.facts.name_numbers[symbol], image.table.version(symbol)
        first, last = (int(np.searchsorted(names, name, side=side)) for side in ("left", "right"))
        version = None if wanted is None else wanted.name
        candidates = [(self.images[number], index) for number, index in places[first:last].tolist()]
        serving = [place for place in candidates if _serves(place[0].table, place[1], version)]
        return sorted(serving, key=lambda place: self._rank(image, place[0]))

    def _rank(self, image: LinkedImage, definer: LinkedImage) -> tuple[int, int]:
        """Where ``definer`` comes in the scope of ``image``: what the program started with is first."""
        if definer.number <= self._last_at_start:
            return 0, definer.number
        return (1 if definer in self._tree(image) else 2), definer.number

    @cached_property
    def _last_at_start(self) -> int:
        """The number of the last library that the program was started with."""
        return max((image.number for image in self._tree(self.images[0])), default=-1) if self.images else -1

    def _tree(self, image: LinkedImage) -> list[LinkedImage]:
        """An image and what it needs, by the names of files, breadth first."""
        trees = self._trees
        if image.number not in trees:
            tree = [image]
            for member in tree:  # grows meanwhile
                tree += [
                    other for name in member.needed
                    if (other := self._by_name.get(name)) is not None and other not in tree
                ]  # fmt: skip
            trees[image.number] = tree
        return trees[image.number]

    @cached_property
    def _trees(self) -> dict[int, list[LinkedImage]]:
        return {}

    @cached_property
    def _by_name(self) -> dict[str, LinkedImage]:
        names: dict[str, LinkedImage] = {}
        for image in self.images:
            for name in (image.soname, os.path.basename(image.path)):
                if name:
                    names.setdefault(name, image)
        return names

    def image_at(self, addresses: NDArray[np.uint64]) -> NDArray[np.intp]:
        """The number of the image that holds each address, its end included; -1: none."""
        if not len(self._starts):
            return np.full(len(addresses), -1)
        numbers = np.array([image.number for image in self._by_span])
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        return np.asarray(np.where((at >= 0) & (addresses <= self._ends[at]), numbers[at], -1), np.intp)

    def place(self, address: int) -> str:
        """What is at ``address``, in words: file and function, or the kernel's name of the mapping."""
        number = int(self.image_at(np.array([address], np.uint64))[0])
        if number >= 0:
            image = self.images[number]
            vaddr = address - image.bias
            symbol = int(image.facts.symbols_at(np.array([vaddr % 2**64], np.uint64))[0])
            name = image.facts.symbol_name(symbol) if symbol >= 0 else ""
            return f"{image.path}: {name or hex(vaddr)}"
        vma = next((vma for vma in self.vmas if address in vma), None)
        return hex(address) if vma is None else f"{vma.path or 'memory of no file'}: {address:#x}"


def _serves(table: SymbolTable, symbol: int, version: str | None) -> bool:
    """Whether a definition is of the ``version`` that is asked for: ``check_match`` of elf/dl-lookup.c."""
    if version is None or not len(table.versym):
        return True
    defined = table.version(symbol)
    return defined.name == version if defined is not None else not table.hidden(symbol)
