"""Small libraries made of bytes, whose constructors and destructors say who they are and what they got.

Each has a constructor in machine code that writes to descriptor :data:`LOG`: its letter and a colon, then,
for each symbol that it refers to, three letters: the library that it is bound to, the symbol, the version of
that definition.  Then it may open others by dlopen(3), and writes ``(`` before and ``)`` after each, or ``!``
for a refusal.  Its destructor may close them, and writes its letter and a semicolon.  So the log says who is
loaded, in which order constructors and destructors ran, and who is bound to whom; it is the same code for
ld.so and for miniloader.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from miniloader.elf import dynamic as tags
from miniloader.elf.layout import RELA, SYM
from miniloader.elf.writer import Strings, dynamic_section, elf_header, hash_table, program_header

__all__ = ["LOG", "Definition", "NewLibrary", "Reference", "library_bytes"]

LOG: Final = 77
_PAGE: Final = 0x1000
_CODE: Final = 0xC00
_HEADERS: Final = 64 + 4 * 56
_GLOB_DAT, _JUMP_SLOT = 6, 7
_GLOBAL, _WEAK = 0x10, 0x20
_OBJECT, _FUNCTION = 1, 2
_HIDDEN, _BASE = 0x8000, 1
_LETTERS: Final = "A:---a;()!"
_VERDEF, _VERDAUX = struct.Struct("<HHHHIII"), struct.Struct("<II")
_VERNEED, _VERNAUX = struct.Struct("<HHIII"), struct.Struct("<IHHII")
#: By kind: the tag, as its entry stands among the others.
NEEDS: Final = {"needed": tags.DT_NEEDED, "auxiliary": tags.DT_AUXILIARY, "filter": tags.DT_FILTER}


class Definition(NamedTuple):
    """A symbol that a library defines, in a ``version`` ("": in none), which may be hidden (``s@V1``)."""

    symbol: str
    version: str = ""
    hidden: bool = False


class Reference(NamedTuple):
    """A symbol that a library refers to, in a ``version`` that it needs of ``file``; weakly, if it may be
    missing, and so may its version."""

    symbol: str
    version: str = ""
    file: str = ""
    weak: bool = True
    weak_version: bool = False


@dataclass(frozen=True)
class NewLibrary:
    """A library to be made.  ``letter`` names it in the log; symbols and versions are single letters.

    ``needs`` are names by kind, in order: see :data:`NEEDS`.  ``versions`` are those that it defines (it has
    a table of them, with the base version, unless they are None).  ``unbound`` says whether it calls, by its
    PLT, a function that nobody has.  Its constructor ``opens`` others, each with these flags, and closes them
    at once, or its destructor ``closes`` them, or nobody.
    """

    letter: str
    soname: str | None = None
    needs: tuple[tuple[str, str], ...] = ()
    rpath: str | None = None
    runpath: str | None = None
    defines: tuple[Definition, ...] = ()
    refers: tuple[Reference, ...] = ()
    versions: str | None = None
    symbolic: bool = False
    flags: int = 0
    flags_1: int = 0
    unbound: bool = False
    opens: tuple[tuple[str, int], ...] = ()
    closes: bool = False
    closes_at_once: bool = False


@dataclass
class _Symbols:
    """The table: symbols that are defined first, then those that are only referred to."""

    rows: list[tuple[str, int, int, int]] = field(default_factory=list)  # name, info, section, version
    functions: dict[str, int] = field(default_factory=dict)  # of glibc's that are called
    places: dict[tuple[str, str], int] = field(default_factory=dict)  # by name and version


def library_bytes(library: NewLibrary) -> bytes:
    """The file of ``library``, for x86-64."""
    strings = Strings()
    versions = _Versions(library, strings)
    symbols = _symbols(library, versions)
    names = {name: strings.add(name) for name in dict.fromkeys(row[0] for row in symbols.rows)}
    entries = [(NEEDS[kind], strings.add(name)) for kind, name in library.needs]
    texts = ((tags.DT_SONAME, library.soname), (tags.DT_RPATH, library.rpath))
    for tag, text in (*texts, (tags.DT_RUNPATH, library.runpath)):
        if text is not None:
            entries.append((tag, strings.add(text)))
    numbers = ((tags.DT_FLAGS, library.flags), (tags.DT_FLAGS_1, library.flags_1))
    entries += [(tag, number) for tag, number in numbers if number]
    entries += [(tags.DT_SYMBOLIC, 0)] if library.symbolic else []

    # The segment that is only read: headers, symbols, their names, versions, relocations, code.
    defined, wanted = len(library.defines), [_symbol_of(symbols, each) for each in library.refers]
    of_glibc = len(wanted), len(wanted) + 1  # the slots of dlopen and dlclose, where they are called
    wanted += [symbols.functions[name] for name in ("dlopen", "dlclose") if library.opens]
    hashed = hash_table(1 + len(symbols.rows), defined)
    calls = [len(symbols.rows)] if library.unbound else []
    parts = {
        "hash": hashed,
        "symbols": bytes(SYM.size * (1 + len(symbols.rows))),
        "versym": struct.pack(f"<{1 + len(symbols.rows)}H", 0, *(row[3] for row in symbols.rows)),
        "verneed": versions.needed,
        "verdef": versions.defined,
        "relocations": bytes(RELA.size * len(wanted)),
        "calls": bytes(RELA.size * len(calls)),
        "strings": bytes(strings),
        "opens": b"".join(os.fsencode(name) + b"\0" for name, _ in library.opens),
    }
    places, at = {}, _HEADERS
    for part, data in parts.items():
        places[part] = at = -(-at // 8) * 8
        at += len(data)
    code = -(-max(at, _CODE) // 16) * 16

    # The segment that is written: the dynamic section, slots, the words of the PLT, objects, the letter.
    dynamic_size = 16 * (len(entries) + 24)
    slots = -(-(code + _PAGE) // _PAGE) * _PAGE + dynamic_size
    dynamic = slots - dynamic_size
    table = slots + 8 * len(wanted)
    objects = table + 8 * (3 + len(calls))
    letter = objects + 3 * defined
    handles = letter + len(_LETTERS)
    end = handles + 8 * len(library.opens)
    opened, at = [], places["opens"]
    for number, (name, mode) in enumerate(library.opens):
        opened.append((at, mode, handles + 8 * number))
        at += len(os.fsencode(name)) + 1
    functions = [slots + 8 * slot for slot in of_glibc]
    closes = functions[1] if library.closes_at_once else None
    constructor = _constructor(code, slots, len(library.refers), letter, opened, functions[0], closes)
    destructor = code + -(-len(constructor) // 16) * 16
    closed = [handle for *_, handle in opened] if library.closes and not library.closes_at_once else []
    read_only = (
        constructor
        + bytes(destructor - code - len(constructor))
        + _destructor(destructor, letter, closed, functions[1])
    )
    assert code + len(read_only) <= dynamic

    parts["symbols"] = SYM.pack() + b"".join(
        SYM.pack(name=names[name], info=info, shndx=section, value=section and objects + 3 * place, size=3)
        for place, (name, info, section, _) in enumerate(symbols.rows)
    )
    parts["relocations"] = b"".join(
        RELA.pack(offset=slots + 8 * place, info=symbol << 32 | _GLOB_DAT)
        for place, symbol in enumerate(wanted)
    )
    parts["calls"] = b"".join(
        RELA.pack(offset=table + 8 * (3 + place), info=symbol << 32 | _JUMP_SLOT)
        for place, symbol in enumerate(calls)
    )
    entries += [
        (tags.DT_HASH, places["hash"]), (tags.DT_SYMTAB, places["symbols"]), (tags.DT_SYMENT, SYM.size),
        (tags.DT_STRTAB, places["strings"]), (tags.DT_STRSZ, len(strings)), (tags.DT_INIT, code),
        (tags.DT_FINI, destructor),
    ]  # fmt: skip
    if wanted:
        entries += [
            (tags.DT_RELA, places["relocations"]), (tags.DT_RELASZ, len(parts["relocations"])),
            (tags.DT_RELAENT, RELA.size),
        ]  # fmt: skip
    if calls:
        entries += [
            (tags.DT_PLTGOT, table), (tags.DT_JMPREL, places["calls"]), (tags.DT_PLTREL, tags.DT_RELA),
            (tags.DT_PLTRELSZ, len(parts["calls"])),
        ]  # fmt: skip
    if versions.needed or versions.defined:
        entries.append((tags.DT_VERSYM, places["versym"]))
    if versions.needed:
        entries += [(tags.DT_VERNEED, places["verneed"]), (tags.DT_VERNEEDNUM, versions.files)]
    if versions.defined:
        entries += [(tags.DT_VERDEF, places["verdef"]), (tags.DT_VERDEFNUM, 1 + len(library.versions or ""))]
    entries.append((tags.DT_NULL, 0))
    assert 16 * len(entries) <= dynamic_size

    image = bytearray(end)
    image[:64] = elf_header(segments=4)
    image[64:_HEADERS] = b"".join((
        program_header("PT_LOAD", "r-x", 0, code + len(read_only), align=_PAGE),
        program_header("PT_LOAD", "rw-", dynamic, end - dynamic, align=_PAGE),
        program_header("PT_DYNAMIC", "rw-", dynamic, 16 * len(entries), align=8),
        program_header("PT_GNU_STACK", "rw-", 0, 0, align=16),
    ))  # fmt: skip
    for part, data in parts.items():
        image[places[part] : places[part] + len(data)] = data
    image[code : code + len(read_only)] = read_only
    image[dynamic : dynamic + 16 * len(entries)] = dynamic_section(entries)
    for place in range(len(calls)):  # where a slot leads until it is bound
        struct.pack_into("<Q", image, table + 8 * (3 + place), destructor)
    for place, definition in enumerate(library.defines):
        text = f"{library.letter}{definition.symbol}{definition.version or '-'}"
        image[objects + 3 * place : objects + 3 * place + 3] = text.encode()
    image[letter:handles] = f"{library.letter}:---{library.letter.lower()};()!".encode()
    return bytes(image)


def _symbols(library: NewLibrary, versions: _Versions) -> _Symbols:
    table = _Symbols()
    for each in library.defines:
        version = versions.of_definition(each)
        table.rows.append((f"symbol_{each.symbol}", _GLOBAL | _OBJECT, 5, version))
        table.places.setdefault((each.symbol, each.version), len(table.rows))
        if not each.hidden:
            table.places[each.symbol, ""] = len(table.rows)
    for wanted in library.refers:
        if (wanted.symbol, wanted.version) not in table.places:
            info = (_WEAK if wanted.weak else _GLOBAL) | _OBJECT
            table.rows.append((f"symbol_{wanted.symbol}", info, 0, versions.of_reference(wanted)))
            table.places[wanted.symbol, wanted.version] = len(table.rows)
    for name in ("dlopen", "dlclose") if library.opens else ():
        table.rows.append((name, _GLOBAL | _FUNCTION, 0, 1))
        table.functions[name] = len(table.rows)
    if library.unbound:
        table.rows.append(("function_of_nobody", _GLOBAL | _FUNCTION, 0, 1))
    return table


def _symbol_of(symbols: _Symbols, wanted: Reference) -> int:
    return symbols.places[wanted.symbol, wanted.version]


class _Versions:
    """The tables of versions that a library defines and needs, as bytes; ``files`` counts the latter."""

    def __init__(self, library: NewLibrary, strings: Strings) -> None:
        defined = library.versions
        self._defined = {version: 2 + place for place, version in enumerate(defined or "")}
        self.defined = b""
        names = (
            [library.soname or f"{library.letter}.so", *map(_name, defined)] if defined is not None else []
        )
        for place, name in enumerate(names):
            onward = _VERDEF.size + _VERDAUX.size if place + 1 < len(names) else 0
            head = 1, int(place == 0), place + 1, 1, _hash(name), _VERDEF.size, onward
            self.defined += _VERDEF.pack(*head) + _VERDAUX.pack(strings.add(name), 0)
        wanted = [each for each in library.refers if each.version and not self._is_own(library, each)]
        self._needed: dict[tuple[str, str], int] = {}
        of_file: dict[str, list[tuple[int, int, int, int]]] = {}
        for each in wanted:
            if (each.file, each.version) not in self._needed:
                number = 2 + len(self._defined) + len(self._needed)
                self._needed[each.file, each.version] = number
                name = _name(each.version)
                row = _hash(name), 2 * each.weak_version, number, strings.add(name)
                of_file.setdefault(each.file, []).append(row)
        self.files, self.needed = len(of_file), b""
        for place, (file, rows) in enumerate(of_file.items()):
            onward = _VERNEED.size + _VERNAUX.size * len(rows) if place + 1 < self.files else 0
            self.needed += _VERNEED.pack(1, len(rows), strings.add(file), _VERNEED.size, onward)
            for number, row in enumerate(rows):
                self.needed += _VERNAUX.pack(*row, _VERNAUX.size if number + 1 < len(rows) else 0)

    @staticmethod
    def _is_own(library: NewLibrary, wanted: Reference) -> bool:
        return any(each[:2] == wanted[:2] for each in library.defines)

    def of_definition(self, definition: Definition) -> int:
        """The number in its version's table, with the bit of those that are hidden."""
        return self._defined.get(definition.version, _BASE) | _HIDDEN * definition.hidden

    def of_reference(self, wanted: Reference) -> int:
        """The number in the version's table; 1 of a symbol without one."""
        return self._needed.get((wanted.file, wanted.version), 1) if wanted.version else 1


def _name(version: str) -> str:
    return f"VERSION_{version}"


def _hash(name: str) -> int:
    """The hash function of the gABI."""
    value = 0
    for character in name.encode():
        value = (value << 4) + character
        value = (value ^ (value >> 24 & 0xF0)) & 0x0FFFFFFF
    return value


class _Code:
    """Machine code that is put at ``start``, and grows."""

    def __init__(self, start: int) -> None:
        self._start, self.text = start, bytearray()

    def relative(self, opcode: str, target: int) -> None:
        """An instruction of seven bytes that refers to ``target`` by its distance."""
        distance = target - (self._start + len(self.text) + 7)
        self.text += bytes.fromhex(opcode) + struct.pack("<i", distance)

    def call(self, slot: int) -> None:
        """Call what the word at ``slot`` points to, with the stack as it has to be."""
        self.text += bytes.fromhex("4883ec08")  # sub rsp, 8
        distance = slot - (self._start + len(self.text) + 6)
        self.text += b"\xff\x15" + struct.pack("<i", distance)  # call [rip + slot]
        self.text += bytes.fromhex("4883c408")  # add rsp, 8

    def close(self, handle: int, slot: int) -> None:
        """Call dlclose(3) by its ``slot`` for the ``handle`` that is kept there, unless that is none."""
        self.relative("488b3d", handle)  # mov rdi, [rip + handle]
        call = _Code(self._start + len(self.text) + 5)
        call.call(slot)
        self.text += bytes.fromhex("4885ff74") + bytes([len(call.text)]) + call.text  # test rdi, rdi; jz

    def write(self, count: int) -> None:
        """write(LOG, rsi, count)."""
        self.text += b"\xbf" + struct.pack("<I", LOG)  # mov edi, LOG
        self.text += b"\xba" + struct.pack("<I", count)  # mov edx, count
        self.text += bytes.fromhex("b801000000 0f05")  # mov eax, 1; syscall


def _constructor(
    start: int,
    slots: int,
    count: int,
    letter: int,
    opened: Sequence[tuple[int, int, int]],
    dlopen: int,
    dlclose: int | None,
) -> bytes:
    """write(2) the letter and a colon, then for each slot the three bytes it points to, or dashes.

    Then open what is ``opened`` (where the name is, the flags, where its handle is kept) by the slot of
    ``dlopen``, and close each again by that of ``dlclose``, if there is one.
    """
    code = _Code(start)
    code.relative("488d35", letter)  # lea rsi, [rip + letter]
    code.write(2)
    for position in range(count):
        code.relative("488b35", slots + 8 * position)  # mov rsi, [rip + slot]
        code.relative("488d0d", letter + 2)  # lea rcx, [rip + dashes]
        code.text += bytes.fromhex("4885f6 480f44f1")  # test rsi, rsi; cmovz rsi, rcx
        code.write(3)
    for name, mode, handle in opened:
        code.relative("488d35", letter + 7)
        code.write(1)
        code.relative("488d3d", name)  # lea rdi, [rip + name]
        code.text += b"\xbe" + struct.pack("<I", mode)  # mov esi, mode
        code.call(dlopen)
        code.relative("488905", handle)  # mov [rip + handle], rax
        code.relative("488d35", letter + 8)
        code.relative("488d0d", letter + 9)
        code.text += bytes.fromhex("4885c0 480f44f1")  # test rax, rax; cmovz rsi, rcx
        code.write(1)
        if dlclose is not None:
            code.close(handle, dlclose)
    return bytes(code.text + b"\xc3")


def _destructor(start: int, letter: int, closed: Sequence[int], dlclose: int) -> bytes:
    """Close what has been opened, by the slot of ``dlclose``; write(2) the small letter and a semicolon."""
    code = _Code(start)
    for handle in closed:
        code.close(handle, dlclose)
    code.relative("488d35", letter + 5)
    code.write(2)
    return bytes(code.text + b"\xc3")


def letters(symbols: str, versions: Sequence[str] = ("",)) -> tuple[Definition, ...]:
    """Definitions of each of the letters ``symbols`` in each of ``versions``, all but the last hidden.

    >>> letters("st")
    (Definition(symbol='s', version='', hidden=False), Definition(symbol='t', version='', hidden=False))
    """
    return tuple(
        Definition(symbol, version, version != versions[-1]) for symbol in symbols for version in versions
    )
