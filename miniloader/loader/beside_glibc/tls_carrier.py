"""A carrier: a tiny shared library, made of bytes, that asks glibc for thread-local storage in our name.

Only glibc can give a module its place in every thread, and it does so for libraries that it loads itself.
So for each library of ours that has ``PT_TLS`` a carrier with the same template is opened with dlopen(3)
from memory: it has no code, only the questions, as relocations against its own block or other libraries'
thread-local symbols. glibc answers them by relocating the carrier.  All of this is public interface.

The whole file is one writable segment, so that vaddr and file offset are the same::

    ELF header, program headers │ symbols │ hash │ strings │ relocations │ dynamic │ answers │ template

Section headers follow: ``info symbol`` ends gdb 16 and 17 where a library of the process has none.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import Tls
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import host
from miniloader.values import dataclass

__all__ = ["DYN", "EHDR", "PHDR", "SHDR", "SYM", "Carrier", "Question", "open_bytes", "open_carrier"]

TPOFF64: Final = 18
TLSDESC: Final = 36

EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR: Final = struct.Struct("<IIQQQQQQ")
SYM: Final = struct.Struct("<IBBHQQ")
_RELA: Final = struct.Struct("<QQq")
DYN: Final = struct.Struct("<qQ")
SHDR: Final = struct.Struct("<IIQQQQIIQQ")
_MAX_ALIGN: Final = 1 << 21
_GLOBAL_TLS: Final = (1 << 4) | 6
_numbers: Final = itertools.count(1)


@dataclass(frozen=True)
class Question:
    """A relocation for glibc to do: of ``kind``, against ``symbol`` (``None``: the carrier's own block)."""

    kind: int
    symbol: str | None
    addend: int


class Carrier:
    """An opened carrier.  ``answers`` has two words for each question; ``inside`` is an address within it."""

    def __init__(self, name: str, handle: int, fd: int, answers: NDArray[np.uint64], inside: int) -> None:
        self.name = name
        self.symbol = name.replace("-", "_")
        self.answers = answers
        self.inside = inside
        self._handle: int | None = handle
        # glibc knows libraries by their path, here /proc/PID/fd/N: N must stay taken while it is open.
        self._fd = fd

    @property
    def module(self) -> int:
        """The TLS module id that glibc gave it."""
        assert self._handle is not None
        return host.tls_module(self._handle)

    def close(self) -> bool:
        """Close it; whether it is gone.

        glibc keeps it while a thread has destructors to run for thread-local objects registered with it; then
        this returns ``False`` and may be called again later.
        """
        if self._handle is not None:
            host.close_host(self._handle)
            self._handle = None
        again = host.open_host(self.name, load=False)
        if again is not None:
            host.close_host(again)  # closing is also what makes glibc look whether it can go now
            again = host.open_host(self.name, load=False)
            if again is not None:
                host.close_host(again)
                return False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        return True


def open_carrier(
    owner: str,
    questions: Sequence[Question],
    *,
    tls: Tls | None = None,
    template: bytes = b"",
    needed: Sequence[str] = (),
) -> Carrier:
    """Make and open a carrier for library ``owner``: with its ``template``, or only to ask about others'.

    ``needed`` are the names (as glibc knows them) of the libraries whose symbols are asked about.  Raises
    :class:`LoadError` when glibc refuses, as it does when a static block does not fit its surplus.
    """
    name = f"miniloader-tls-{os.getpid()}-{next(_numbers)}"
    if tls is not None and tls.align > _MAX_ALIGN:
        raise LoadError(f"{owner}: PT_TLS: alignment {tls.align:#x} is more than {_MAX_ALIGN:#x}")
    data, answers_at = _build(name, questions, tls, template, needed)
    try:
        handle, fd = open_bytes(name, data)
    except (OSError, LoadError) as error:
        hint = None
        if "static TLS" in str(error):
            hint = "GLIBC_TUNABLES=glibc.rtld.optional_static_tls=BYTES at the program's start gives room"
        raise LoadError(f"{owner}: thread-local storage: {error}", hint=hint) from None
    start = host.load_address(handle)
    answers = host.read_words(start + answers_at, 2 * len(questions)).reshape(-1, 2)
    return Carrier(name, handle, fd, answers, start + answers_at)


def open_bytes(name: str, data: bytes) -> tuple[int, int]:
    """Open the library ``data`` with dlopen(3): its handle, and a descriptor to keep as long as it is open.

    Raises :class:`LoadError` when glibc refuses it, :class:`OSError` when it cannot be kept in memory.
    """
    fd = -1
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        # Not by /proc/self: a debugger opens it, too, and would wait for whatever is its own descriptor.
        handle = host.open_host(f"/proc/{os.readlink('/proc/self')}/fd/{fd}", load=True)
    except (OSError, LoadError):
        os.close(fd)
        raise
    assert handle is not None
    return handle, fd


def _build(
    name: str, questions: Sequence[Question], tls: Tls | None, template: bytes, needed: Sequence[str]
) -> tuple[bytes, int]:
    """The carrier's bytes, and where the answers will be."""
    strings = bytearray(b"\0")

    def string(text: str) -> int:
        at = len(strings)
        strings.extend(os.fsencode(text) + b"\0")
        return at

    foreign = list(dict.fromkeys(q.symbol for q in questions if q.symbol is not None))
    symbols = [bytes(SYM.size)]
    # An empty PT_TLS is none for glibc, which would divide by its alignment, 0.
    size = max(tls.memsz, 1) if tls is not None else 0
    if tls is not None:
        symbols.append(SYM.pack(string(name.replace("-", "_")), _GLOBAL_TLS, 0, 1, 0, size))
    first_foreign = len(symbols)
    symbols += (SYM.pack(string(text), _GLOBAL_TLS, 0, 0, 0, 0) for text in foreign)
    # One bucket with a chain through every symbol.
    hashes = struct.pack(
        f"<{3 + len(symbols)}I", 1, len(symbols), min(1, len(symbols) - 1), *range(2, len(symbols)), 0, 0
    )
    hashes = hashes[: 4 * (3 + len(symbols))]
    names = [(1, string(text)) for text in needed] + [(14, string(name))]

    headers = EHDR.size + 4 * PHDR.size
    places: dict[str, int] = {}
    at = headers
    sizes = {
        "symbols": len(symbols) * SYM.size,
        "hash": len(hashes),
        "strings": len(strings),
        "relocations": len(questions) * _RELA.size,
        "dynamic": (len(names) + 9) * DYN.size,
        "answers": 16 * len(questions),
    }
    for part, length in sizes.items():
        at = -(-at // 16) * 16
        places[part] = at
        at += length
    relocations = b"".join(
        _RELA.pack(
            places["answers"] + 16 * number,
            (0 if q.symbol is None else first_foreign + foreign.index(q.symbol)) << 32 | q.kind,
            q.addend,
        )
        for number, q in enumerate(questions)
    )
    entries = [
        *names,
        (4, places["hash"]),
        (5, places["strings"]),
        (6, places["symbols"]),
        (10, len(strings)),
        (11, SYM.size),
        (7, places["relocations"]),
        (8, len(relocations)),
        (9, _RELA.size),
        (0, 0),
    ]
    dynamic = b"".join(DYN.pack(*entry) for entry in entries)
    # The template keeps the library's place within its alignment, for so the offsets were computed.
    align = max(tls.align, 1) if tls is not None else 1
    template_at = at + ((tls.vaddr if tls is not None else 0) - at) % align
    end = template_at + len(template)
    page = 0x1000
    segments = [
        PHDR.pack(1, 6, 0, 0, 0, end, end, page),
        PHDR.pack(2, 6, *(places["dynamic"],) * 3, len(dynamic), len(dynamic), 8),
        PHDR.pack(0x6474E551, 6, 0, 0, 0, 0, 0, 16),
        PHDR.pack(7, 4, *(template_at,) * 3, len(template), size, align) if tls else bytes(PHDR.size),
    ]
    ident = b"\x7fELF\2\1\1" + bytes(9)
    names_of_sections = b"\0.data\0.shstrtab\0"
    sections_at = -(-(end + len(names_of_sections)) // 8) * 8
    sections = (
        bytes(SHDR.size),
        SHDR.pack(1, 1, 3, headers, headers, end - headers, 0, 0, 1, 0),
        SHDR.pack(7, 3, 0, 0, end, len(names_of_sections), 0, 0, 1, 0),
    )
    sizes_of_headers = (EHDR.size, PHDR.size, len(segments), SHDR.size, len(sections), len(sections) - 1)
    header = EHDR.pack(ident, 3, 62, 1, 0, EHDR.size, sections_at, 0, *sizes_of_headers)
    image = bytearray(end)
    image[:headers] = header + b"".join(segments)
    contents = {
        "symbols": b"".join(symbols),
        "hash": hashes,
        "strings": bytes(strings),
        "relocations": relocations,
        "dynamic": dynamic,
    }
    for part, data in contents.items():
        image[places[part] : places[part] + len(data)] = data
    image[template_at:end] = template
    image += names_of_sections.ljust(sections_at - end, b"\0") + b"".join(sections)
    return bytes(image), places["answers"]
