"""Core dumps: whose memory it was, what ended the process, its threads, and the files that it had mapped.

Source: core(5), the kernel's ``fs/binfmt_elf.c`` (``fill_note_info``, ``fill_files_note``) and
``include/uapi/linux/elfcore.h``.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from typing import Final

from miniloader.elf.image import ElfImage, numbered_notes
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["CoreDump", "DumpedMapping", "DumpedThread", "read_core", "signal_name"]

_NT_PRSTATUS, _NT_PRPSINFO, _NT_SIGINFO, _NT_FILE = 1, 3, 0x53494749, 0x46494C45
_MOST_BYTES: Final = 1 << 28  # of notes: some thousand for each thread
_MOST_NOTES: Final = 1 << 17  # four for each thread
_CORE: Final = b"CORE\0"


@dataclass(frozen=True)
class DumpedThread:
    """A thread: its number, and the signal that it was ending by or stopped at (0: none)."""

    tid: int
    signal: int


@dataclass(frozen=True)
class DumpedMapping:
    """A mapping of a file, from ``start`` to before ``end``: addresses; ``file_offset`` is in bytes."""

    start: int
    end: int
    file_offset: int
    path: str


@dataclass(frozen=True)
class CoreDump:
    """What the notes of a core dump say; ``None`` and ``()`` for what no note does.

    ``program`` is its name, cut after 15 bytes, ``command`` its arguments, cut after 79.  ``fault`` is the
    address whose access raised the signal, where it was one of those that have one.  ``faults`` are the
    notes that could not be read.
    """

    pid: int | None
    program: str | None
    command: str | None
    signal: int | None
    fault: int | None
    threads: tuple[DumpedThread, ...]
    files: tuple[DumpedMapping, ...]
    faults: tuple[ElfError, ...] = ()


#: Signals whose ``siginfo_t`` has the address of a fault.
_WITH_ADDRESS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)


def signal_name(number: int) -> str:
    """``SIGSEGV (Segmentation fault)``, or the number where Linux has none of it.

    >>> signal_name(11), signal_name(99)
    ('SIGSEGV (Segmentation fault)', 'signal 99')
    """
    try:
        named = signal.Signals(number)
    except ValueError:
        return f"signal {number}"
    return f"{named.name} ({signal.strsignal(number)})"


def read_core(image: ElfImage) -> CoreDump:
    """What the notes of ``image``, a core dump, say."""
    pid, program, command, ended_by, fault = None, None, None, None, None
    threads: list[DumpedThread] = []
    files: tuple[DumpedMapping, ...] = ()
    faults: list[ElfError] = []
    for kind, data in _notes(image, faults):
        try:
            if kind == _NT_PRSTATUS:
                threads.append(_thread(image, data))
            elif kind == _NT_PRPSINFO:
                pid, program, command = _process(image, data)
            elif kind == _NT_SIGINFO:
                ended_by, fault = _signal(image, data)
            elif kind == _NT_FILE:
                files = tuple(_files(image, data))
        except (struct.error, ValueError):
            claimed = f"note {kind:#x} of {len(data)} bytes"
            faults.append(ElfError(image.path, "PT_NOTE", claimed, "one as long as it says"))
    if ended_by is None and threads and threads[0].signal:
        ended_by = threads[0].signal
    return CoreDump(pid, program, command, ended_by, fault, tuple(threads), files, tuple(faults))


def _notes(image: ElfImage, faults: list[ElfError]) -> Iterator[tuple[int, bytes]]:
    """Type and description of each note that the kernel calls CORE."""
    room, count = _MOST_BYTES, 0
    for segment in image.segments:
        if segment.type != "PT_NOTE":
            continue
        room -= segment.filesz
        try:
            if room < 0:
                raise ElfError(image.path, "PT_NOTE", "more bytes", f"at most {_MOST_BYTES:#x} of notes")
            data = image.source.read(segment.file_offset, segment.filesz, "PT_NOTE")
        except ElfError as error:
            faults.append(error)
            continue
        for name, kind, description in numbered_notes(data, image.header.order, 4):
            count += 1
            if count > _MOST_NOTES:  # a hole is a note in each twelve bytes
                faults.append(ElfError(image.path, "PT_NOTE", "more notes", f"at most {_MOST_NOTES}"))
                return
            if name == _CORE:
                yield kind, bytes(description)


def _words(image: ElfImage) -> tuple[str, int, str]:
    """The byte order, the bytes of a long, and the letter of one."""
    return image.header.order, image.header.word, "Q" if image.header.word == 8 else "I"


def _thread(image: ElfImage, data: bytes) -> DumpedThread:
    """``struct elf_prstatus``: siginfo (3 ints), cursig (short), two longs of signals, pid."""
    order, word, _ = _words(image)
    (current,) = struct.unpack_from(f"{order}h", data, 12)
    (tid,) = struct.unpack_from(f"{order}i", data, 16 + 2 * word)
    return DumpedThread(tid, current)


def _process(image: ElfImage, data: bytes) -> tuple[int, str, str]:
    """``struct elf_prpsinfo``: four chars, a long of flags, uid and gid, four pids, 16 and 80 bytes of text.

    The name and the arguments are its last 96 bytes; uid and gid are shorts on some 32-bit machines.
    """
    if len(data) < 96 + 16:
        raise ValueError("too short")
    (pid,) = struct.unpack_from(f"{image.header.order}i", data, len(data) - 96 - 16)
    name, arguments = data[-96:-80], data[-80:]
    return pid, _text(name), _text(arguments).rstrip(" ")


def _text(data: bytes) -> str:
    return os.fsdecode(data.partition(b"\0")[0])


def _signal(image: ElfImage, data: bytes) -> tuple[int, int | None]:
    """``siginfo_t``: the signal, errno, code, and behind the next word boundary the address of the fault."""
    order, word, letter = _words(image)
    (number,) = struct.unpack_from(f"{order}i", data, 0)
    (code,) = struct.unpack_from(f"{order}i", data, 8)
    if number not in _WITH_ADDRESS or code <= 0:  # sent by a process
        return number, None
    (address,) = struct.unpack_from(f"{order}{letter}", data, -(-12 // word) * word)
    return number, address


def _files(image: ElfImage, data: bytes) -> Iterator[DumpedMapping]:
    """A count and a unit, three words for each file (its offset in that unit), and then the names."""
    order, word, letter = _words(image)
    number, unit = struct.unpack_from(f"{order}2{letter}", data, 0)
    if number > len(data) // (3 * word):
        raise ValueError("more files than fit")
    rows = struct.iter_unpack(f"{order}3{letter}", data[2 * word : (2 + 3 * number) * word])
    names = data[(2 + 3 * number) * word :].split(b"\0")
    for (start, end, offset), name in zip(rows, names, strict=False):
        yield DumpedMapping(start, end, offset * unit, os.fsdecode(name))
