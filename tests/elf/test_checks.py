"""Each rule: it holds for good files of every class and byte order, and is broken by what it is there for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from fixtures.build import HERE, build
from fixtures.mutate import map_of
from miniloader.cli import main
from miniloader.elf import Source, read_image
from miniloader.elf import dynamic as dt
from miniloader.elf.checks import RULES, outcomes, refuse_other_types
from miniloader.errors import ElfError

PREBUILT = sorted((HERE / "prebuilt").glob("*.so"))
OURS = ("demo", "demo_sysv_hash", "tls_general", "init_fini", "versions")
SEGMENT = {
    64: "type flags offset vaddr paddr filesz memsz align",
    32: "type offset vaddr paddr filesz memsz flags align",
}
HUGE = 0x7FFF_F000


class Editor:
    """Changes fields of a good file, by name."""

    def __init__(self, data: bytes) -> None:
        self.data, self.map = bytearray(data), map_of(data)
        self.fields = SEGMENT[8 * self.map.word].split()

    def number(self, region: str, row: int, column: int, value: int | None = None) -> int:
        """Field ``column`` of a row (counted from the end when negative), after setting it to ``value``."""
        where = self.map.regions[region]
        offset, width = where.fields[column]
        at = where.offset + row % (where.length // where.size) * where.size + offset
        if value is not None:
            self.data[at : at + width] = value.to_bytes(width, self.map.order)
        return int.from_bytes(self.data[at : at + width], self.map.order)

    def rows(self, region: str) -> range:
        where = self.map.regions.get(region)
        return range(where.length // where.size if where else 0)

    def segment(self, kind: int, place: int = 0, **values: int) -> bool:
        """Set fields of program header ``place`` of those of type ``kind``; False when there is none."""
        found = [row for row in self.rows("segments") if self.number("segments", row, 0) == kind]
        for name, value in values.items() if found else ():
            self.number("segments", found[place], self.fields.index(name), value)
        return bool(found)

    def entry(self, tag: int, value: int, *, new_tag: int | None = None) -> bool:
        found = [row for row in self.rows("dynamic") if self.number("dynamic", row, 0) == tag]
        if found:
            self.number("dynamic", found[-1], 0, tag if new_tag is None else new_tag)
            self.number("dynamic", found[-1], 1, value)
        return bool(found)

    def field(self, region: str, row: int, column: int, value: int) -> bool:
        if self.rows(region):
            self.number(region, row, column, value)
        return bool(self.rows(region))

    def info(self, value: int) -> bool:
        """Set the halves of the last relocation's r_info."""
        return self.field("relocations", -1, 1, value) and self.field("relocations", -1, 2, value)


LOAD, DYNAMIC, NOTE, TLS, STACK, RELRO = 1, 2, 4, 7, 0x6474E551, 0x6474E552
#: Name: the rule, and the edit that breaks it; the edit is False for files without such a part.
CASES: dict[str, tuple[str, Callable[[Editor], bool]]] = {
    "EI_OSABI": ("identification", lambda e: e.field("header", 0, 7, 9)),
    "p_filesz": ("segments-in-file", lambda e: e.segment(LOAD, -1, filesz=1 << 24, memsz=1 << 24)),
    "p_offset": ("segments-in-file", lambda e: e.segment(LOAD, -1, offset=HUGE)),
    "p_align": ("segments-mappable", lambda e: e.segment(LOAD, 0, align=3)),
    "p_filesz > p_memsz": ("segments-mappable", lambda e: e.segment(LOAD, 0, memsz=1)),
    "overlap": ("segments-mappable", lambda e: e.segment(LOAD, 0, memsz=0x4000000)),
    "no congruence": ("segments-mappable", lambda e: e.segment(LOAD, -1, offset=1)),
    "no PT_DYNAMIC": ("dynamic-section", lambda e: e.segment(DYNAMIC, type=0x6ABCDEF0)),
    "PT_DYNAMIC outside": ("dynamic-section", lambda e: e.segment(DYNAMIC, vaddr=HUGE)),
    "two PT_DYNAMIC": ("one-of-each", lambda e: e.segment(STACK, type=DYNAMIC)),
    "DT_SYMTAB": ("symbol-tables", lambda e: e.entry(dt.DT_SYMTAB, HUGE)),
    "DT_SYMENT": ("symbol-tables", lambda e: e.entry(dt.DT_SYMENT, 17)),
    "DT_GNU_HASH": ("symbol-tables", lambda e: e.entry(dt.DT_GNU_HASH, HUGE)),
    "DT_HASH": ("symbol-tables", lambda e: e.entry(dt.DT_HASH, HUGE)),
    "Bloom filter": ("symbol-tables", lambda e: e.field("gnu hash", 0, 2, 3)),
    "no buckets": ("symbol-tables", lambda e: e.field("gnu hash", 0, 0, 0)),
    "versions": ("symbol-tables", lambda e: e.entry(dt.DT_VERNEED, HUGE)),
    "name of a version": ("symbol-tables", lambda e: e.field("versions needed", 0, 2, HUGE)),
    "DT_STRSZ": ("strings", lambda e: e.entry(dt.DT_STRSZ, 1)),
    "DT_SONAME": ("strings", lambda e: e.entry(dt.DT_SONAME, HUGE)),
    "st_name": ("strings", lambda e: e.field("symbols", -1, 0, HUGE)),
    "unended strings": ("strings", lambda e: e.field("strings", -1, 0, 0x41)),
    "DT_RELA": ("relocation-targets", lambda e: e.entry(dt.DT_RELA, HUGE)),
    "DT_REL": ("relocation-targets", lambda e: e.entry(dt.DT_REL, HUGE)),
    "DT_RELAENT": ("relocation-targets", lambda e: e.entry(dt.DT_RELAENT, 7)),
    "DT_RELASZ": ("relocation-targets", lambda e: e.entry(dt.DT_RELASZ, 25)),
    "r_offset": ("relocation-targets", lambda e: e.field("relocations", -1, 0, HUGE)),
    "symbol of a relocation": ("relocation-symbols", lambda e: e.info(0x7FFF)),
    "DT_INIT_ARRAY": ("init-arrays", lambda e: e.entry(dt.DT_INIT_ARRAY, HUGE)),
    "DT_INIT_ARRAYSZ": ("init-arrays", lambda e: e.entry(dt.DT_INIT_ARRAYSZ, 5)),
    "DT_RELACOUNT": ("relative-relocations", lambda e: e.entry(dt.DT_RELACOUNT, 1 << 20)),
    "DT_INIT": ("code-pointers", lambda e: e.entry(dt.DT_INIT, 8)),
    "DT_FINI": ("code-pointers", lambda e: e.entry(dt.DT_FINI, HUGE)),
    "PT_TLS": ("tls-template", lambda e: e.segment(TLS, align=3)),
    "endless PT_TLS": ("tls-template", lambda e: e.segment(TLS, memsz=1 << 50) if e.map.word == 8 else False),
    "PT_GNU_RELRO": ("relro", lambda e: e.segment(RELRO, memsz=HUGE)),
    "PT_GNU_STACK": ("executable-stack", lambda e: e.segment(STACK, flags=7)),
    "p_flags": ("writable-code", lambda e: e.segment(LOAD, 0, flags=7)),
    "DT_TEXTREL": ("text-relocations", lambda e: e.entry(dt.DT_SONAME, 0, new_tag=dt.DT_TEXTREL)),
}  # fmt: skip


def files() -> list[Path]:
    return [*PREBUILT, *map(build, OURS)]


def broken(data: bytes) -> set[str]:
    source = Source.from_bytes(data)
    try:
        return {rule.name for rule, problems in outcomes(read_image(source)) if problems}
    finally:
        source.close()


def test_good_files_keep_every_rule() -> None:
    kinds = Counter[tuple[int, str]]()
    for path in files():
        assert broken(path.read_bytes()) <= {"text-relocations", "executable-stack", "writable-code"}, path
        header = read_image(Source.open(path)).header
        kinds[header.elf_class, header.byte_order] += 1
    assert set(kinds) == {(32, "little"), (32, "big"), (64, "little"), (64, "big")}


@pytest.mark.parametrize("name", CASES)
def test_what_breaks_a_rule(name: str) -> None:
    rule, edit = CASES[name]
    tried = Counter[int]()
    for path in files():
        good = path.read_bytes()
        editor = Editor(good)
        if edit(editor) and bytes(editor.data) != good:
            tried[editor.map.word] += 1
            assert rule in broken(bytes(editor.data)), path
    assert tried, "no file has such a part"
    assert tried[4] or name in ("DT_RELASZ", "symbol of a relocation", "PT_TLS", "endless PT_TLS", "versions",
                                "name of a version", "DT_INIT_ARRAY", "DT_INIT_ARRAYSZ", "DT_INIT",
                                "DT_FINI")  # fmt: skip


def test_each_rule_has_a_case() -> None:
    tested = {rule for rule, _ in CASES.values()} | {
        "header-sizes", "file-type", "hash-links", "array-pointers",  # below
        "relr-marker",  # tests/loader/test_asked_for.py
    }  # fmt: skip
    assert tested == {rule.name for rule in RULES}


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_headers_that_make_a_file_unreadable(path: Path) -> None:
    for column, value, field in (
        (0, 0x7E, "magic"), (4, 7, "EI_CLASS"), (5, 7, "EI_DATA"), (6, 7, "EI_VERSION"), (18, 7, "e_version"),
        (20, HUGE, "program headers"), (24, 7, "e_phentsize"), (25, 0, "e_phnum"), (25, 0xFFFF, "e_phnum"),
        (25, 0xFFFE, "e_phnum"),
    ):  # fmt: skip
        editor = Editor(path.read_bytes())
        editor.field("header", 0, column, value)
        with pytest.raises(ElfError) as caught:
            read_image(Source.from_bytes(editor.data))
        assert caught.value.field == field
        assert caught.value.found
        assert caught.value.expected


def test_the_type_of_the_file() -> None:
    editor = Editor(build("demo").read_bytes())
    good = bytes(editor.data)
    editor.field("header", 0, 16, 2)
    program = bytes(editor.data)
    editor.field("header", 0, 16, 3)
    editor.entry(dt.DT_FLAGS_1, dt.DF_1_PIE)
    for data, refused in ((good, ""), (program, "ET_EXEC"), (bytes(editor.data), "DF_1_PIE")):
        assert not broken(data)  # a program is nothing wrong, but no library
        image = read_image(Source.from_bytes(data))
        with pytest.raises(ElfError, match=refused) if refused else nullcontext():
            refuse_other_types(image)
    editor.field("header", 0, 16, 5)  # of no type that there is
    assert broken(bytes(editor.data)) == {"file-type"}


@pytest.mark.parametrize(("word", "value"), [(2, 0x7FFF), (-1, 0x7FFF)], ids=["bucket", "chain"])
def test_links_of_a_hash_table_that_lead_out_of_it(word: int, value: int) -> None:
    editor = Editor(build("demo_sysv_hash").read_bytes())
    row = 2 if word == 2 else 2 + editor.number("hash", 0, 0) + 1  # the first bucket; the first symbol's link
    editor.field("hash", row, 0, value)
    assert broken(bytes(editor.data)) == {"hash-links"}


def test_a_chain_that_never_ends() -> None:
    editor = Editor(build("demo_sysv_hash").read_bytes())
    row = 2 + editor.number("hash", 0, 0)
    editor.field("hash", row + 1, 0, 2)
    editor.field("hash", row + 2, 0, 1)
    assert broken(bytes(editor.data)) == {"hash-links"}


def test_a_constructor_that_is_no_code() -> None:
    editor = Editor(build("init_fini").read_bytes())
    arrays = {editor.number("dynamic", row, 1) for row in editor.rows("dynamic")
              if editor.number("dynamic", row, 0) == dt.DT_INIT_ARRAY}  # fmt: skip
    for row in editor.rows("relocations"):
        if editor.number("relocations", row, 0) in arrays:
            editor.number("relocations", row, 3, 0)  # the ELF header
            break
    assert broken(bytes(editor.data)) == {"array-pointers"}


def test_the_reference_is_made_from_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--checks"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for rule in RULES:
        assert rule.name in text
    assert main(["inspect", "--checks", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["checks"]
    assert [(each["name"], each["protects"], each["source"]) for each in said] == [
        (rule.name, rule.protects, rule.source) for rule in RULES
    ]
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err == (
        "miniloader: the following arguments are required: LIB; see miniloader inspect --help\n"
    )


def test_inspect_lists_each_rule_with_its_outcome(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    editor = Editor(build("demo").read_bytes())
    CASES["p_align"][1](editor)
    path = tmp_path / "bad.so"
    path.write_bytes(editor.data)
    assert main(["inspect", "--checks", "--json", str(path)]) == 0
    said = {each["name"]: each for each in json.loads(capsys.readouterr().out)["checks"]}
    assert set(said) == {rule.name for rule in RULES}
    assert {name for name, each in said.items() if each["outcome"] == "broken"} == {"segments-mappable"}
    assert said["segments-mappable"]["problems"][0]["found"] == "0x3"
