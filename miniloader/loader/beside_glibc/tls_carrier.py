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
from collections.abc import Mapping, Sequence
from typing import Final

from miniloader.elf import Tls
from miniloader.elf.dynamic import (
    DT_HASH,
    DT_NEEDED,
    DT_NULL,
    DT_RELA,
    DT_RELAENT,
    DT_RELASZ,
    DT_SONAME,
    DT_STRSZ,
    DT_STRTAB,
    DT_SYMENT,
    DT_SYMTAB,
)
from miniloader.elf.layout import DYN, EHDR, PHDR, RELA, SYM
from miniloader.elf.writer import (
    NewSection,
    Strings,
    dynamic_section,
    hash_table,
    program_header,
    shared_object,
)
from miniloader.errors import LoadError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.beside_glibc import dynamic_linker
from miniloader.machine.relocation import Formula, code_of
from miniloader.native.gate import processor
from miniloader.values import dataclass

__all__ = ["Carrier", "GlibcQuestion", "open_bytes", "open_carrier"]

_MAX_ALIGN: Final = 1 << 21
_GLOBAL_TLS: Final = (1 << 4) | 6
_NO_ROOM: Final = "cannot allocate memory in static TLS block"
_ROOM: Final = (
    "at the program's start GLIBC_TUNABLES=glibc.rtld.optional_static_tls=BYTES gives room, and LD_PRELOAD "
    "of the library does also where its alignment is more than that of the blocks that threads have here"
)
_numbers: Final = itertools.count(1)


@dataclass(frozen=True)
class GlibcQuestion:
    """A relocation for glibc to do: of ``formula``, against ``symbol`` (None: the carrier's own block)."""

    formula: Formula
    symbol: str | None
    addend: int


class Carrier:
    """An opened carrier.  ``answers`` has two words for each question; ``inside`` is an address within it."""

    def __init__(
        self,
        name: str,
        owner: str,
        handle: int,
        fd: int,
        answers: Mapping[GlibcQuestion, tuple[int, int]],
        inside: int,
    ) -> None:
        self.name = name
        self.owner = owner  # the library whose carrier it is
        self.symbol = name.replace("-", "_")
        self.answers = answers
        self.inside = inside
        self._handle: int | None = handle
        # glibc knows libraries by their path, here /proc/PID/fd/N: N must stay taken while it is open.
        self._fd = fd

    @property
    def path(self) -> str:
        """What glibc calls it."""
        return _path_of(self._fd)

    @property
    def module(self) -> int:
        """The TLS module id that glibc gave it."""
        assert self._handle is not None
        return dynamic_linker.tls_module(self._handle)

    @property
    def block(self) -> int:
        """Where the calling thread has its storage; 0 while it has none."""
        assert self._handle is not None
        return dynamic_linker.tls_data(self._handle)

    def close(self) -> bool:
        """Close it; whether it is gone.

        glibc keeps it while a thread has destructors to run for thread-local objects registered with it; then
        this returns ``False`` and may be called again later.
        """
        if self._handle is not None:
            dynamic_linker.close_host(self._handle)
            self._handle = None
        handle = dynamic_linker.open_host(self.name, load=False)
        if handle is not None:
            dynamic_linker.close_host(handle)  # closing is also what makes glibc look whether it can go now
            handle = dynamic_linker.open_host(self.name, load=False)
            if handle is not None:
                dynamic_linker.close_host(handle)
                return False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        return True

    def is_kept(self) -> bool:
        """Whether glibc keeps it, as :meth:`close` says; if so it is open again, else closed."""
        if self.close():
            return False
        self._handle = dynamic_linker.open_host(self.name, load=False)
        return self._handle is not None or not self.close()


def open_carrier(
    owner: str,
    questions: Sequence[GlibcQuestion],
    *,
    tls: Tls | None = None,
    template: bytes = b"",
    needed: Sequence[str] = (),
    others: Sequence[Carrier] = (),
) -> Carrier:
    """Make and open a carrier for library ``owner``: with its ``template``, or only to ask about others'.

    ``needed`` are the names (as glibc knows them) of the libraries whose symbols are asked about, ``others``
    those of them that are carriers themselves.  Raises :class:`LoadError` when glibc refuses, as it does when
    a static block does not fit its surplus, or is aligned to more than the static blocks of threads are.
    """
    name = f"miniloader-tls-{os.getpid()}-{next(_numbers)}"
    if tls is not None and tls.align > _MAX_ALIGN:
        raise LoadError(f"{owner}: PT_TLS: alignment {tls.align:#x} is more than {_MAX_ALIGN:#x}")
    data, answers_at = _build(name, questions, tls, template, needed)
    try:
        handle, fd = open_bytes(name, data)
    except (OSError, LoadError) as error:
        hint = ld_so = None
        if _NO_ROOM in str(error):
            hint = _ROOM
            ld_so = f"{_whose_storage(error, others) or owner}: {_NO_ROOM}"
        raise LoadError(f"{owner}: thread-local storage: {error}", hint=hint, ld_so=ld_so) from None
    start = dynamic_linker.load_address(handle)
    words = dynamic_linker.read_words(start + answers_at, 2 * len(questions))
    answers = dict(zip(questions, zip(words[::2], words[1::2], strict=True), strict=True))
    return Carrier(name, owner, handle, fd, answers, start)


def _whose_storage(error: Exception, others: Sequence[Carrier]) -> str | None:
    """The library whose storage glibc has no room for; None where that is who the carrier is made for."""
    called = (error.ld_so or "").partition(f": {_NO_ROOM}")[0] if isinstance(error, LoadError) else ""
    if not called.startswith("/proc/"):
        return called or None
    return next((carrier.owner for carrier in others if carrier.path == called), None)


def _path_of(fd: int) -> str:
    """Not by /proc/self: a debugger opens it, too, and would wait for whatever is its own descriptor."""
    return f"/proc/{os.readlink('/proc/self')}/fd/{fd}"


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
        handle = dynamic_linker.open_host(_path_of(fd), load=True)
    except (OSError, LoadError):
        os.close(fd)
        raise
    assert handle is not None
    return handle, fd


def _build(
    name: str, questions: Sequence[GlibcQuestion], tls: Tls | None, template: bytes, needed: Sequence[str]
) -> tuple[bytes, int]:
    """The carrier's bytes, and where the answers will be."""
    strings = Strings()
    codes = {q: code_of(processor().upper(), q.formula) for q in questions}
    foreign = list(dict.fromkeys(q.symbol for q in questions if q.symbol is not None))
    symbols = [bytes(SYM.size)]
    # An empty PT_TLS is none for glibc, which would divide by its alignment, 0.
    size = max(tls.memsz, 1) if tls is not None else 0
    if tls is not None:
        symbols.append(
            SYM.pack(name=strings.add(name.replace("-", "_")), info=_GLOBAL_TLS, shndx=1, size=size)
        )
    first_foreign = len(symbols)
    symbols += (SYM.pack(name=strings.add(text), info=_GLOBAL_TLS) for text in foreign)
    hashes = hash_table(len(symbols), first_foreign - 1)
    names = [(DT_NEEDED, strings.add(text)) for text in needed] + [(DT_SONAME, strings.add(name))]

    headers = EHDR.size + 4 * PHDR.size
    places: dict[str, int] = {}
    end = headers
    sizes = {
        "symbols": len(symbols) * SYM.size,
        "hash": len(hashes),
        "strings": len(strings),
        "relocations": len(questions) * RELA.size,
        "dynamic": (len(names) + 9) * DYN.size,
        "answers": 16 * len(questions),
    }
    for part, length in sizes.items():
        places[part] = -(-end // 16) * 16
        end = places[part] + length
    # The template keeps the library's place within its alignment, for so the offsets were computed.
    align = max(tls.align, 1) if tls is not None else 1
    places["template"] = end + ((tls.vaddr if tls is not None else 0) - end) % align
    end = places["template"] + len(template)
    entries = [
        *names,
        (DT_HASH, places["hash"]),
        (DT_STRTAB, places["strings"]),
        (DT_SYMTAB, places["symbols"]),
        (DT_STRSZ, len(strings)),
        (DT_SYMENT, SYM.size),
        (DT_RELA, places["relocations"]),
        (DT_RELASZ, sizes["relocations"]),
        (DT_RELAENT, RELA.size),
        (DT_NULL, 0),
    ]
    contents = {
        "symbols": b"".join(symbols),
        "hash": hashes,
        "strings": bytes(strings),
        "relocations": b"".join(
            RELA.pack(
                offset=places["answers"] + 16 * number,
                info=(0 if q.symbol is None else first_foreign + foreign.index(q.symbol)) << 32 | codes[q],
                addend=q.addend,
            )
            for number, q in enumerate(questions)
        ),
        "dynamic": dynamic_section(entries),
        "template": template,
    }
    image = bytearray(end)
    for part, data in contents.items():
        image[places[part] : places[part] + len(data)] = data
    return shared_object(
        [NewSection(".data", "SHT_PROGBITS", 3, headers, end - headers, bytes(image[headers:]))],
        [
            program_header("PT_LOAD", "rw-", 0, end, align=PAGE_SIZE),
            program_header("PT_DYNAMIC", "rw-", places["dynamic"], sizes["dynamic"], align=8),
            program_header("PT_GNU_STACK", "rw-", 0, 0, align=16),
            program_header("PT_TLS", "r--", places["template"], len(template), size, align=align)
            if tls is not None
            else bytes(PHDR.size),
        ],
    ), places["answers"]
