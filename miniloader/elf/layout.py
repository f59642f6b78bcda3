"""How the records of an ELF file are laid out, for what reads them and for what writes them.

No layout is written down here: each is taken from pyelftools' declaration of the record, with the names of
the values that its fields may have.  So what is read of headers, notes and versions, what numpy reads by the
million and what :mod:`miniloader.elf.writer` writes is one thing.  A declaration is looked at once; what
comes of it parses at the speed of :mod:`struct`, twenty times that of pyelftools itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any

from elftools.construct import Construct, FormatField, Struct, Value
from elftools.construct.adapters import MappingAdapter, PaddingAdapter

from miniloader.elf.parsing import structs
from miniloader.elf.source import Bytes
from miniloader.forking import cached_property
from miniloader.values import dataclass

__all__ = ["DYN", "EHDR", "PHDR", "RELA", "SHDR", "SYM", "Field", "Record", "record"]


@dataclass(frozen=True)
class Field:
    """A field of a record: its name, and its format as :mod:`struct` writes it.

    ``codes`` has the numbers of named values, ``labels`` the names of numbers.
    """

    name: str
    format: str
    codes: Mapping[str, int]
    labels: Mapping[int, str]

    @property
    def size(self) -> int:
        """Bytes."""
        return struct.calcsize(f"<{self.format}")


@dataclass(frozen=True, eq=False)
class Record:
    """The fields of a record in the order they lie in, without padding between them.

    Their names are the gABI's without prefix: ``offset`` for ``p_offset``; those of ``e_ident`` in capitals.

    >>> PHDR.size, PHDR.names
    (56, ('type', 'flags', 'offset', 'vaddr', 'paddr', 'filesz', 'memsz', 'align'))
    """

    order: str
    fields: tuple[Field, ...]

    @cached_property
    def packing(self) -> struct.Struct:
        """Packs and unpacks the values of all fields."""
        return struct.Struct(self.order + "".join(field.format for field in self.fields))

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return self.packing.size

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the fields that have one."""
        return tuple(field.name for field in self.fields if field.name)

    def offset(self, name: str) -> int:
        """How many bytes of the record lie before the field ``name``.

        >>> PHDR.offset("vaddr")
        16
        """
        place = [field.name for field in self.fields].index(name)
        return sum(field.size for field in self.fields[:place])

    def rows(self, data: Bytes, *names: str) -> Iterator[Any]:
        """The fields ``names`` of each of the whole records that ``data`` consists of, in order.

        One field is given as it is, several as a tuple.

        >>> list(DYN.rows(bytes([14, *bytes(7), 3, *bytes(7)]) * 2, "tag", "val"))
        [(14, 3), (14, 3)]
        """
        whole = memoryview(data)[: len(data) // self.size * self.size]
        return map(_picking(self, names), self.packing.iter_unpack(whole))

    def row(self, data: Bytes, *names: str, at: int = 0) -> Any:
        """The fields ``names`` of the record that begins ``at`` so many bytes into ``data``, as :meth:`rows`.

        :class:`struct.error` when it does not end in ``data``.
        """
        return _picking(self, names)(self.packing.unpack_from(data, at))

    def label(self, name: str, value: int) -> str:
        """pyelftools' name of a ``value`` of the field ``name``, or the number in hexadecimal.

        >>> PHDR.label("type", 1), PHDR.label("type", 99)
        ('PT_LOAD', '0x63')
        """
        return self.labels(name).get(value) or f"{value:#x}"

    def labels(self, name: str) -> Mapping[int, str]:
        """pyelftools' names of the values of the field ``name``."""
        return self._named[name].labels

    def code(self, name: str, label: str) -> int | None:
        """The value of the field ``name`` that pyelftools calls ``label``; None where it calls none so.

        >>> EHDR.code("machine", "EM_AARCH64"), EHDR.code("machine", "EM_NOBODY")
        (183, None)
        """
        return self._named[name].codes.get(label)

    @cached_property
    def _named(self) -> Mapping[str, Field]:
        return {field.name: field for field in self.fields}

    def pack(self, **values: int | str | bytes) -> bytes:
        """The record with these ``values``, numbers or pyelftools' names of them; other fields are 0.

        >>> SYM.pack(name=1, info=0x12, shndx="SHN_ABS").hex()
        '010000001200f1ff00000000000000000000000000000000'
        """
        given = self._zeros | values
        if len(given) > len(self._zeros):
            unknown = ", ".join(sorted(values.keys() - self._zeros.keys()))
            raise TypeError(f"no such field: {unknown}; there are {', '.join(self.names)}")
        for name, value in values.items():
            if isinstance(value, str):
                given[name] = self._named[name].codes[value]
        return self.packing.pack(*given.values())

    @cached_property
    def _zeros(self) -> dict[str, int | str | bytes]:
        """Of each field that has a name what it is without a value."""
        return {field.name: b"" if field.format.endswith("s") else 0 for field in self.fields if field.name}


@lru_cache(maxsize=64)
def _picking(layout: Record, names: tuple[str, ...]) -> itemgetter[Any]:
    return itemgetter(*map(layout.names.index, names))


@lru_cache(maxsize=64)
def record(elf_class: int, order: str, name: str, machine: str = "") -> Record:
    """The layout of ``Elf_`` + ``name`` for a class (32, 64) and a byte order (``<``, ``>``).

    >>> record(32, ">", "Sym").names
    ('name', 'value', 'size', 'info', 'other', 'shndx')
    """
    return Record(order, tuple(_fields(getattr(structs(elf_class, order, machine), f"Elf_{name}"))))


def _fields(construct: Construct) -> Iterator[Field]:
    if isinstance(construct, Struct):
        for part in construct.subcons:
            yield from _fields(part)
        return
    codes: Mapping[str, int] = {}
    labels: Mapping[int, str] = {}
    named = construct.name.partition("_")[2] if construct.name else ""
    if isinstance(construct, MappingAdapter):
        codes, labels, construct = construct.encoding, construct.decoding, construct.subcon
    if isinstance(construct, FormatField):
        yield Field(named, construct.packer.format[1:], codes, labels)
    elif isinstance(construct, PaddingAdapter):
        yield Field("", f"{construct.sizeof()}x", {}, {})
    elif not isinstance(construct, Value):  # which is computed, and takes no bytes
        size = construct.sizeof()  # bit fields in a byte, or an array of bytes
        yield Field(named, "B" if size == 1 else f"{size}s", {}, {})


EHDR, PHDR, SHDR, SYM, DYN, RELA = (
    record(64, "<", name) for name in ("Ehdr", "Phdr", "Shdr", "Sym", "Dyn", "Rela")
)
