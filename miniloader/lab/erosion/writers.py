"""Who writes first to each page of a worker of ours: the address that is written, and by which function.

The kernel holds up whoever writes to a page that is protected by userfaultfd, until the page is let go
(:class:`miniloader.kernel.userfault.WriteTrap`).  Meanwhile the place that is written is known to the byte,
and ``/proc/PID/task/TID/syscall`` has the address of the instruction.  What lies at that place decides the
cause: a reference count, a collector's word, or anything else.
"""

from __future__ import annotations

import os
import select
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import Source
from miniloader.errors import ElfError, EvidenceError, MiniloaderError
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.name_numbers import NameNumbers
from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.procfs import process_file
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.kernel.userfault import WriteTrap
from miniloader.lab.audit.mapped_files import facts_of
from miniloader.lab.audit.survey import Memo, locate, survey
from miniloader.lab.erosion.causes import ErosionCause
from miniloader.lab.erosion.objects import objects_on
from miniloader.lab.erosion.pools import Pools, pools_in
from miniloader.lab.erosion.present_memory import PresentMemory
from miniloader.lab.erosion.types import Types
from miniloader.values import NamedTuple, dataclass

__all__ = [
    "CodePlace",
    "FirstWrite",
    "FirstWriters",
    "FirstWrites",
    "MappedCode",
    "explain",
    "written_memory",
]

_TRIES: Final = 100
_AT_ONCE: Final = 4096  # pages
_OF_KERNEL: Final = "the kernel"


class FirstWrite(NamedTuple):
    """The address that was written, and that of the instruction: 0 where the kernel wrote, in a call."""

    address: int
    instruction: int


class CodePlace(NamedTuple):
    """The ``function`` that an instruction belongs to, "" where no symbol covers it, and its file's path."""

    function: str
    path: str = ""


class MappedCode(NamedTuple):
    """Code of the file at ``path``, from ``file_offset`` on, that a process has mapped at [start, end)."""

    start: int
    end: int
    file_offset: int
    path: str


@dataclass(frozen=True)
class FirstWrites:
    """The first writes to pages of process ``pid``, by ascending address, each with its cause and its place.

    ``unseen`` says which writes are not among them, "" where all are.
    """

    pid: int
    writes: tuple[FirstWrite, ...]
    causes: tuple[ErosionCause, ...]
    places: tuple[CodePlace, ...]
    unseen: str = ""

    @property
    def functions(self) -> Mapping[str, int]:
        """How many pages each function was the first to write to; "" is code without a symbol."""
        return Counter(place.function for place in self.places)

    def pages(self, cause: ErosionCause) -> int:
        """How many pages were first written to for that cause."""
        return self.causes.count(cause)


def written_memory(pid: int, *, files: bool = False) -> list[Vma]:
    """The private anonymous memory of ``pid`` that it may write to, now or later; that of ``files``, too.

    What it may only read now, such as code that it has made, it may make writable by mprotect(2).
    """
    return [
        vma
        for vma in read_maps(pid)
        if (files or not vma.inode)
        and not vma.shared
        and vma.protection[:2] != "--"
        and not vma.path.startswith("[v")
    ]


class FirstWriters:
    """Notes who writes first to each page of private anonymous memory of ``pid``, while the block runs.

    ``descriptor`` is a userfaultfd of that process.  A thread of this process lets each writer go on at once;
    when the block ends, however it ends, all are let go.  Where there is none, or none that watches writes:
    :class:`miniloader.lab.erosion.writers_by_faults.WritersByFaults`.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid, self.writes, self.unseen = pid, list[FirstWrite](), ""
        self._trap = WriteTrap(descriptor)
        self._stop, self._stopping = os.pipe()
        self._thread = threading.Thread(target=self._serve, name=f"first writers of {pid}", daemon=True)
        self._trouble: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            if not sum(self._trap.arm(vma.start, vma.end) for vma in written_memory(self.pid)):
                raise EvidenceError(f"process {self.pid}: userfaultfd watches none of its memory")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._trouble is not None and kind is None:
            raise self._trouble

    def _end(self) -> None:
        self._trap.disarm()
        os.write(self._stopping, b"x")
        self._thread.join()
        self._trap.close()
        os.close(self._stop)
        os.close(self._stopping)

    def _serve(self) -> None:
        """In the thread: whatever happens, nobody is held up for ever."""
        poll = select.poll()
        for descriptor in (self._stop, self._trap.fileno()):
            poll.register(descriptor, select.POLLIN)
        try:
            while all(descriptor != self._stop for descriptor, _ in poll.poll()):
                for address, thread in self._trap.read():
                    self.writes.append(FirstWrite(address, self._instruction(thread)))
                    self._trap.release(address & -PAGE_SIZE)
        except Exception as error:  # noqa: BLE001 - raised where the block ends
            self._trouble = error
            self._trap.disarm()

    def _instruction(self, thread: int) -> int:
        """Where the thread is that waits; 0 within a system call, or where that is not told."""
        for _ in range(_TRIES):
            try:
                with open(process_file(self.pid, f"task/{thread}/syscall"), "rb") as file:
                    words = file.read().split()
            except OSError:
                return 0
            if words[0] != b"running":  # it is about to wait
                return int(words[-1], 16) if words[0] == b"-1" else 0
        return 0


def explain(
    pid: int,
    writes: Sequence[FirstWrite],
    relative: int | None = None,
    unseen: str = "",
    code: Sequence[MappedCode] = (),
    memo: Memo | None = None,
) -> FirstWrites:
    """The causes of first writes to pages of ``pid``, by what was there, and the functions that wrote.

    What was there is read from ``relative``, which has the pages as they were at the fork (None: from the
    process itself, as they are now).  ``code`` is what was mapped, besides what ``pid`` has.  With one
    ``memo`` for several processes their files are read once.  Raises ProcessGone, or EvidenceError where
    memory may not be read.
    """
    memo = memo or Memo()
    by_page = {write.address & -PAGE_SIZE: write for write in reversed(writes)}  # of several the first
    ordered = tuple(by_page[page] for page in sorted(by_page))
    addresses = np.array([write.address for write in ordered], np.uint64)
    return FirstWrites(
        pid=pid,
        writes=ordered,
        causes=tuple(_causes(relative or pid, addresses, memo)),
        places=tuple(_places(pid, [write.instruction for write in ordered], code, memo)),
        unseen=unseen,
    )


def _causes(pid: int, addresses: NDArray[np.uint64], memo: Memo) -> list[ErosionCause]:
    """Whether each of these ascending addresses of ``pid`` is a count, a collector's word, or else."""
    process = survey(pid, memo, frames=False, wanted=lambda _: False)
    if process.interpreter is None or not process.interpreter.is_known or not len(addresses):
        return ["other-write"] * len(addresses)
    names: tuple[ErosionCause, ...] = ("other-write", "reference-count", "collector")
    causes = list[ErosionCause]()
    with PresentMemory(pid, process.present) as memory:
        pools = pools_in(process.copies.addresses, memory)
        types = Types(memory, pools, process.interpreter.type_address)
        for start in range(0, len(addresses), _AT_ONCE):
            marks = _marks(addresses[start : start + _AT_ONCE], memory, pools, types)
            causes += [names[mark] for mark in marks.tolist()]
    return causes


def _marks(
    addresses: NDArray[np.uint64], memory: PresentMemory, pools: Pools, types: Types
) -> NDArray[np.uint8]:
    """Of each address 1 where a count is, 2 where a collector's word is, else 0."""
    pages = addresses & ~np.uint64(PAGE_SIZE - 1)
    marks = np.zeros((len(pages), PAGE_SIZE // 8), np.uint8)
    words = memory.pages(pages)[0].view(np.uint64)
    objects = objects_on(pages, words, pools, types)
    for distance in (1, 2):
        chosen = (objects.before > 0) & (objects.word >= distance)
        marks[objects.page[chosen], objects.word[chosen] - distance] = 2
    marks[objects.page, objects.word] = 1
    place = ((addresses - pages) // np.uint64(8)).astype(np.intp)
    return marks[np.arange(len(pages)), place]


def _places(pid: int, instructions: Sequence[int], code: Sequence[MappedCode], memo: Memo) -> list[CodePlace]:
    """The function that each instruction of ``pid`` belongs to."""
    with PageMap(pid) as pagemap:
        _, _, files = locate(pid, pagemap, memo, frames=False)
    places = {0: CodePlace(_OF_KERNEL)}
    for instruction in {*instructions} - {0}:
        placed = next((file for file in files if file.start <= instruction < file.end), None)
        mapped = next((part for part in reversed(code) if part.start <= instruction < part.end), None)
        if placed is not None:
            name = _function(placed.file.facts, instruction - placed.base)
            places[instruction] = CodePlace(name, placed.file.identity.path)
        elif mapped is not None:
            places[instruction] = _place_in(mapped, instruction)
        else:
            places[instruction] = CodePlace("")
    return [places[instruction] for instruction in instructions]


def _function(facts: FileFacts | None, vaddr: int) -> str:
    if facts is None:
        return ""
    try:
        number = int(facts.symbols_at(np.array([vaddr % 2**64], np.uint64))[0])
        return facts.symbol_name(number) if number >= 0 else ""
    except (ElfError, EvidenceError):
        return ""


def _place_in(mapped: MappedCode, instruction: int) -> CodePlace:
    """The function, by the file of that path as it is now."""
    offset, function = instruction - mapped.start + mapped.file_offset, ""
    try:
        with closing(Source.open(mapped.path)) as source:
            facts = facts_of(source, NameNumbers())
            for segment in facts.image.loads if facts.image is not None else ():
                if 0 <= offset - segment.file_offset < segment.filesz:
                    function = _function(facts, offset - segment.file_offset + segment.vaddr)
    except (MiniloaderError, OSError):
        pass
    return CodePlace(function, mapped.path)
