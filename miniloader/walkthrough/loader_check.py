"""A learner's loader, step by step: what each of its functions gives beside what it should, in words.

What it should give is the file's, ld.so's and the reference loader's; the chapter's claims hold the last to
the first two.  Each step is given what the steps before it should have made, so that one that is wrong does
not hide those behind it from whoever mends it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from elftools.elf.enums import ENUM_P_TYPE_BASE

from miniloader.elf import ElfImage
from miniloader.elf.symbols import STT_GNU_IFUNC, STT_TLS
from miniloader.errors import EvidenceError
from miniloader.kernel.maps import Vma, read_maps
from miniloader.loader import inspect
from miniloader.values import dataclass
from miniloader.walkthrough import reference_loader as ours
from miniloader.walkthrough.chapter import Answer
from miniloader.walkthrough.given import (
    DT_INIT_ARRAY,
    DT_INIT_ARRAYSZ,
    DT_STRTAB,
    DT_SYMTAB,
    PAGE,
    PROT_READ,
    PT_LOAD,
    Header,
    dynamic,
    peek,
    poke,
    text,
    up,
)
from miniloader.walkthrough.workbench import shipped

__all__ = [
    "STEPS",
    "LoaderStep",
    "Studied",
    "check_loader",
    "first_difference",
    "slots",
    "studied",
    "where",
]

Names = Mapping[str, Any]
Difference = str | None

_HELLO: Final = b"hello"
_NOBODY: Final = b"no_library_defines_this"
_FORMATS: Final = {1: "B", 8: "Q"}
_PACKAGE: Final = os.path.dirname(os.path.dirname(ours.__file__))
_PROTECTIONS: Final = {1: "r", 2: "w", 4: "x"}


@dataclass(frozen=True, eq=False)
class Studied:
    """A library as the file has it, and as ld.so has loaded it: its base there is ``by_ld_so``."""

    path: str
    image: ElfImage
    content: bytes
    headers: tuple[Header, ...]
    by_ld_so: int

    @property
    def name(self) -> str:
        """The name of the file."""
        return os.path.basename(self.path)

    def mapped(self) -> int:
        """The library, mapped as it should be; its base."""
        with open(self.path, "rb") as file:
            return ours.map_library(file.fileno(), ours.plan(self.headers))

    def taken(self, *steps: Callable[[int, ours.Headers], None]) -> int:
        """The library, mapped, and ``steps`` taken as they should be; its base."""
        base = self.mapped()
        for step in steps:
            step(base, self.headers)
        return base


def studied(name: str = "libz.so.1") -> Studied:
    """The library of that name, or path; EvidenceError where it is not one for a first loader."""
    image = inspect(name)
    if image.header.machine != "X86_64" or os.uname().machine != "x86_64":
        raise EvidenceError("a loader of one's own is built for x86-64, and this is another machine")
    if len(image.relocations.relr):
        raise EvidenceError(
            f"{image.path}: has packed relocations (DT_RELR), which the seven steps leave out"
        )
    with open(image.path, "rb") as file:
        content = file.read()
    handle = ctypes.CDLL(image.path)
    a_symbol = next(_plain_symbols(image))
    address = ctypes.cast(getattr(handle, a_symbol[0].decode()), ctypes.c_void_p).value or 0
    headers = tuple(
        (_type_number(segment.type), _flag_bits(segment.flags), segment.file_offset, segment.vaddr,
         segment.filesz, segment.memsz)
        for segment in image.segments
    )  # fmt: skip
    return Studied(image.path, image, content, headers, address - a_symbol[1])


def _type_number(name: str) -> int:
    return int(ENUM_P_TYPE_BASE[name]) if name in ENUM_P_TYPE_BASE else int(name, 16)


def _flag_bits(flags: str) -> int:
    """``r-x`` as PF_R, PF_W, PF_X."""
    return sum(bit for sign, bit in zip(flags, (4, 2, 1), strict=True) if sign != "-")


def _plain_symbols(image: ElfImage) -> Iterator[tuple[bytes, int]]:
    """Names that are defined once, and their vaddrs."""
    table = image.symbols
    usable = table.defined & (table.type != STT_TLS) & (table.type != STT_GNU_IFUNC)
    indices, values = usable.nonzero()[0].tolist(), table.rows["value"].tolist()
    named = [(table.name_bytes(index), int(values[index])) for index in indices]
    names = [name for name, _ in named]
    return ((name, value) for name, value in named if names.count(name) == 1 and value)


# ------------------------------------------------------------------------------------------- the steps
def _headers(names: Names, library: Studied) -> Difference:
    given = [tuple(header) for header in names["program_headers"](_other_paddrs(library))]
    fields = ("type", "flags", "file offset", "vaddr", "filesz", "memsz")
    for number, (header, expected) in enumerate(zip(given, library.headers, strict=False)):
        if len(header) != len(fields):
            return f"program header {number} has {len(header)} values, expected {len(fields)}"
        for field, value, right in zip(fields, header, expected, strict=True):
            if value != right:
                return f"the {field} of program header {number} is {value:#x}, the file's is {right:#x}"
    if len(given) != len(library.headers):
        return f"there are {len(given)} program headers, the file has {len(library.headers)}"
    return None


def _other_paddrs(library: Studied) -> bytes:
    """The file with each p_paddr changed, which no loader looks at; linkers make it equal p_vaddr."""
    content = bytearray(library.content)
    (start,) = struct.unpack_from("<Q", content, 32)
    for number in range(len(library.headers)):
        struct.pack_into("<Q", content, start + 56 * number + 24, 0x5000 * (number + 1))
    return bytes(content)


def _plan(names: Names, library: Studied) -> Difference:
    """Page by page, so that whoever maps the same in other pieces is right, too."""
    given, expected = (
        _pages(mappings) for mappings in (names["plan"](library.headers), ours.plan(library.headers))
    )
    for page in sorted(given.keys() | expected.keys()):
        if given.get(page) != expected.get(page):
            told, should = _said(given.get(page)), _said(expected.get(page))
            return f"the page at vaddr {page:#x} is {told}; it should be {should}"
    return None


def _pages(mappings: Any) -> dict[int, tuple[int, int | None]]:
    """What each page of a plan is; later mappings lie over earlier ones."""
    pages: dict[int, tuple[int, int | None]] = {}
    for start, length, protection, offset in mappings:
        for at in range(start, start + length, PAGE):
            pages[at] = protection, None if offset is None else offset + at - start
    return pages


def _said(page: tuple[int, int | None] | None) -> str:
    if page is None:
        return "in no mapping"
    behind = "zeros" if page[1] is None else f"the file from {page[1]:#x}"
    return f"{_letters(page[0])}, {behind}"


def _letters(protection: int) -> str:
    return "".join(sign if protection & bit else "-" for bit, sign in _PROTECTIONS.items())


def _map(names: Names, library: Studied) -> Difference:
    with open(library.path, "rb") as file:
        base = names["map_library"](file.fileno(), ours.plan(library.headers))
    if not isinstance(base, int) or base % PAGE:
        return f"it returns {base!r}; expected the address of vaddr 0, a whole page"
    vmas = read_maps()
    for vaddr, (protection, offset) in sorted(_pages(ours.plan(library.headers)).items()):
        vma = next((vma for vma in vmas if base + vaddr in vma), None)
        kernel = _seen(vma, base + vaddr)
        if kernel != (_letters(protection), offset) or (vma is not None and vma.shared):
            shared = ", and shared" if vma is not None and vma.shared else ""
            told = "not mapped" if vma is None else f"{kernel[0]}, {_behind(kernel[1])}{shared}"
            should = f"{_letters(protection)}, {_behind(offset)}, private"
            return f"/proc/self/maps says of base + {vaddr:#x}: {told}; it should be {should}"
        if offset is not None and "r" in _letters(protection):
            expected = library.content[offset : offset + PAGE]
            if peek(base + vaddr, len(expected)) != expected:
                return f"the bytes at base + {vaddr:#x} are not those of the file from {offset:#x}"
    return None


def _seen(vma: Vma | None, address: int) -> tuple[str, int | None]:
    """Protection and file offset of the page at ``address``."""
    if vma is None:
        return "", None
    return vma.protection, vma.file_offset + address - vma.start if vma.is_file else None


def _behind(offset: int | None) -> str:
    return "no file" if offset is None else f"the file from {offset:#x}"


def _zero(names: Names, library: Studied) -> Difference:
    base, right = library.mapped(), library.taken(ours.zero)
    for kind, _, _, vaddr, filesz, memsz in library.headers:
        end = base + vaddr + filesz
        if kind == PT_LOAD and memsz > filesz:  # a file may have anything there
            poke(end, b"\xaa" * (up(end) - end))
    names["zero"](base, library.headers)
    return _compared(library, base, right, lambda vaddr: f"the byte at base + {vaddr:#x}", 1, relative=False)


def _relocate(names: Names, library: Studied) -> Difference:
    base, right = library.taken(ours.zero), library.taken(ours.zero, ours.relocate)
    names["relocate"](base, library.headers)
    return _compared(library, base, right, lambda vaddr: f"the word at base + {vaddr:#x}", 8, relative=True)


def _bind(names: Names, library: Studied) -> Difference:
    base = library.taken(ours.zero, ours.relocate)
    for name, value in _plain_symbols(library.image):
        address = names["find_symbol"](base, library.headers, name)
        if address != base + value:
            told = f"base + {address - base:#x}" if isinstance(address, int) and address else repr(address)
            return f"find_symbol({name!r}) gives {told}, and ld.so has it at base + {value:#x}"
    for name in (_NOBODY, *_twins(library.image), *_elsewhere(library.image)):
        if address := names["find_symbol"](base, library.headers, name):
            return f"find_symbol({name!r}) gives {address:#x}; this library does not define it: expected 0"
    right = library.taken(ours.zero, ours.relocate, ours.bind)
    names["bind"](base, library.headers)
    symbols = dict(slots(library, base))
    named = lambda vaddr: f"the slot of {symbols.get(vaddr, 'nothing')} at base + {vaddr:#x}"  # noqa: E731
    return _compared(library, base, right, named, 8, relative=True)


def _elsewhere(image: ElfImage) -> list[bytes]:
    """Some names that the library needs and does not define."""
    return image.symbols.names(image.symbols.undefined.nonzero()[0])[:4]


def _twins(image: ElfImage) -> list[bytes]:
    """Names that nobody defines, with hashes of names that are: 33x + y = 33(x + 1) + (y - 33)."""
    names = [name for name, _ in _plain_symbols(image) if len(name) > 1 and name[0] < 0x7E and name[1] > 0x60]
    return [bytes((name[0] + 1, name[1] - 33)) + name[2:] for name in names[:4]]


def slots(library: Studied, base: int) -> Iterator[tuple[int, str]]:
    """The vaddr of each slot of a symbol, and its name."""
    tags = dynamic(base, library.headers)
    for offset, info, _ in ours.relocations(base, tags):
        at = int.from_bytes(peek(base + tags[DT_SYMTAB] + 24 * (info >> 32), 4), "little")
        yield offset, text(base + tags[DT_STRTAB] + at).decode(errors="replace")


def _compared(
    library: Studied, base: int, right: int, named: Callable[[int], str], size: int, *, relative: bool
) -> Difference:
    """The first of ``size`` bytes of writable memory that differ from ``right``, another copy.

    ``relative``: words may be addresses in the library, and differ by the distance of the two copies.
    """
    for start, length, protection, _ in ours.plan(library.headers):
        if "w" not in _letters(protection):
            continue
        words = (
            struct.unpack(f"<{length // size}{_FORMATS[size]}", peek(at + start, length))
            for at in (base, right)
        )
        for vaddr, value, expected in zip(range(start, start + length, size), *words, strict=True):
            if value != expected and not (
                relative and value - base == expected - right and expected >= right
            ):
                told = [_place(number, at) for number, at in ((value, base), (expected, right))]
                return f"{named(vaddr)} is {told[0]}, it should be {told[1]}"
    return None


def _place(value: int, base: int) -> str:
    """A word as an address in the library where it is one."""
    return f"base + {value - base:#x}" if 0 <= value - base < 1 << 32 else f"{value:#x}"


def _start(names: Names, library: Studied) -> Difference:
    base, called = library.taken(ours.zero, ours.relocate, ours.bind), list[int]()
    tags = dynamic(base, library.headers)
    number = tags.get(DT_INIT_ARRAYSZ, 0) // 8
    callbacks = [ctypes.CFUNCTYPE(None)(lambda at=at: called.append(at)) for at in range(number)]
    for at, callback in enumerate(callbacks):  # constructors that tell that they were run
        address = ctypes.cast(callback, ctypes.c_void_p).value or 0
        poke(base + tags[DT_INIT_ARRAY] + 8 * at, address.to_bytes(8, "little"))
    names["start"](base, library.headers)
    vmas = read_maps()
    relro = library.image.plan(PAGE).relro
    for vaddr, (protection, _) in sorted(_pages(ours.plan(library.headers)).items()):
        frozen = relro.start <= vaddr < relro.end
        should = _letters(PROT_READ if frozen else protection)
        kernel = next((vma.protection for vma in vmas if base + vaddr in vma), "not mapped")
        if kernel != should:
            why = "RELRO" if frozen else "not of RELRO"
            return f"the page at base + {vaddr:#x} is {kernel}, it should be {should} ({why})"
    if called != [*range(number)]:
        return f"of {number} constructors in DT_INIT_ARRAY these were run, in this order: {called or 'none'}"
    return _runs(names, library)


def _runs(names: Names, library: Studied) -> Difference:
    """The last of it: crc32 of libz, through the learner's loader."""
    if not library.image.soname or not library.image.soname.startswith("libz."):
        return None
    base, headers = names["load"](library.path)
    address = names["find_symbol"](base, headers, b"crc32")
    prototype = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_uint)
    value, expected = prototype(address)(0, _HELLO, len(_HELLO)), zlib.crc32(_HELLO)
    return None if value == expected else f"crc32 of {_HELLO!r} is {value:#x}, and zlib says {expected:#x}"


@dataclass(frozen=True)
class LoaderStep:
    """One of the seven steps: the function that is looked at, what it is about, how it is judged, a hint."""

    function: str
    about: str
    difference: Callable[[Names, Studied], Difference]
    hint: str


STEPS: Final = (
    LoaderStep(
        "program_headers", "read the program headers", _headers,
        'struct.unpack_from("<IIQQQQQQ", file, at): p_paddr is the fifth, and of no use',
    ),
    LoaderStep(
        "plan", "plan the mappings", _plan,
        "the start rounds down to a page, the file offset with it; ends round up; pages behind the file's "
        "last one are a mapping of zeros, without a file; PF_R is 4, PROT_READ is 1",
    ),
    LoaderStep(
        "map_library", "map them", _map,
        "reserve the whole span first; then MAP_FIXED at base + start, MAP_ANONYMOUS where there is no file",
    ),
    LoaderStep(
        "zero", "zero the bss", _zero,
        "from vaddr + filesz to the end of that page, and only where memsz is larger than filesz",
    ),
    LoaderStep(
        "relocate", "relocate", _relocate,
        "poke base + addend, 8 bytes, the lowest first, at base + offset; only where the kind is R_RELATIVE",
    ),
    LoaderStep(
        "bind", "bind symbols", _bind,
        "compare names, not only hashes; a chain ends with its lowest bit set; ask dlsym for all else",
    ),
    LoaderStep(
        "start", "protect, and run constructors", _start,
        "RELRO rounds down at both ends; DT_INIT_ARRAY is read in memory, where step 5 has relocated it",
    ),
)  # fmt: skip
"""The steps, in order."""

_RIGHT: Final = {1: "", 2: "step 1 is right; ", 3: "steps 1 and 2 are right; "}  # before step 1, 2, 3
_doing: Final = mmap.mmap(-1, PAGE)  # where a learner's process is, for who started it


def where() -> str:
    """The step that the last check was at, "" where it was at none; to be asked by who started it."""
    told = bytes(_doing[:]).rstrip(b"\0").decode()
    _doing[:] = bytes(PAGE)
    return told


def first_difference(names: Names, library: Studied, step: LoaderStep) -> Difference:
    """What the function of ``step`` does otherwise than it should, None where it does not."""
    told = f"in step {STEPS.index(step) + 1} of {len(STEPS)}, {step.function}".encode()
    _doing[: len(told)] = told
    try:
        return step.difference(names, library)
    except NotImplementedError:
        return "is not written yet"
    except KeyError as error:
        if error.args and error.args[0] in {"load", "find_symbol", *(step.function for step in STEPS)}:
            return f"there is no function {error.args[0]}"
        return f"raised KeyError: {error}{_line(error)}"
    except Exception as error:  # noqa: BLE001 - the learner's function may raise whatever it likes
        return f"raised {type(error).__name__}: {error}{_line(error)}"
    finally:
        _doing[:] = bytes(PAGE)


def _line(error: BaseException) -> str:
    """Where in the learner's file it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if not frame.filename.startswith(_PACKAGE)]
    return f" (line {lines[-1]})" if lines else ""


def check_loader(names: Names) -> Answer:
    """Judge a learner's loader: the first step that is not right, and how."""
    libraries = (studied(str(shipped("demo"))), studied())
    for number, step in enumerate(STEPS, 1):
        for library in libraries:
            difference = first_difference(names, library, step)
            if difference is not None:
                right = _RIGHT.get(number, f"steps 1 to {number - 1} are right; ")
                place = f"step {number} of {len(STEPS)}, {step.function} of {library.name}"
                return Answer(False, f"{right}{place}: {difference}", step.hint)
    return Answer(True, "all seven steps are right, and crc32 runs in a libz that your loader has loaded")
