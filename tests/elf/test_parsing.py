"""pyelftools parses what is shown and mapped; the layouts of tables and of what is written are its own."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.enums import ENUM_E_MACHINE
from elftools.elf.structs import ELFStructs

from fixtures.build import HERE, build
from fixtures.mutate import map_of, mutated
from miniloader.elf import Source, inspect, read_image
from miniloader.elf.header import WITH_SEGMENT_TYPES
from miniloader.elf.layout import record
from miniloader.elf.parsing import structs
from miniloader.errors import ElfError

PREBUILT = sorted((HERE / "prebuilt").glob("*.so"))
RECORDS = "Phdr Shdr Sym Rel Rela Dyn Nhdr Verneed Vernaux Verdef Verdaux".split()


@pytest.mark.parametrize("path", [*PREBUILT, build("demo"), build("versions")], ids=lambda path: path.stem)
def test_what_pyelftools_reads_is_what_we_have(path: Path) -> None:
    image = inspect(path)
    file = image.elffile
    assert file.header.e_type == f"ET_{image.header.type}"
    assert file.header.e_machine in (f"EM_{image.header.machine}", 0x9026)  # it has no name for Alpha's
    assert [(s.vaddr, s.filesz, s.memsz) for s in image.segments] == [
        (s["p_vaddr"], s["p_filesz"], s["p_memsz"]) for s in file.iter_segments()
    ]
    assert [section.name for section in image.sections] == [section.name for section in file.iter_sections()]
    (dynamic,) = (segment for segment in file.iter_segments() if segment["p_type"] == "PT_DYNAMIC")
    assert [value for _, value in image.dynamic.entries] == [tag["d_val"] for tag in dynamic.iter_tags()][:-1]


@pytest.mark.parametrize("elf_class", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("machine", ["X86_64", "MIPS"])
@pytest.mark.parametrize("name", RECORDS)
def test_a_layout_reads_what_pyelftools_parses(elf_class: int, order: str, machine: str, name: str) -> None:
    layout = record(elf_class, order, name, machine)
    declared = getattr(structs(elf_class, order, machine), f"Elf_{name}")
    assert layout.size == declared.sizeof()
    chance = random.Random(5)
    for _ in range(20):
        data = chance.randbytes(layout.size)
        found = dict(zip(layout.names, layout.packing.unpack(data), strict=True))
        parsed = {key.partition("_")[2]: value for key, value in declared.parse(data).items()}
        codes = {field.name: field.codes for field in layout.fields}
        for key, value in found.items():
            if isinstance(parsed[key], (int, str)):  # not the bit fields of st_info
                assert value == codes[key].get(parsed[key], parsed[key]), key
                assert layout.row(data, key) == value
                named = isinstance(parsed[key], str)
                assert layout.label(key, value) == (parsed[key] if named else f"{value:#x}"), key
        assert layout.pack(**found) == data


def test_values_have_the_names_pyelftools_has_for_them() -> None:
    header = record(64, "<", "Ehdr")
    data = header.pack(type="ET_DYN", machine=62)
    assert header.row(data, "type", "machine") == (3, 62)
    assert (header.label("type", 3), header.label("machine", 62)) == ("ET_DYN", "EM_X86_64")
    assert record(64, "<", "Phdr", "ARM").label("type", 0x70000001) == "PT_ARM_EXIDX"
    assert record(64, "<", "Phdr", "X86_64").label("type", 0x70000001) == "0x70000001"


def test_rows_are_the_whole_records_of_the_bytes() -> None:
    assert list(record(32, ">", "Dyn").rows(bytes(range(20)), "val")) == [0x04050607, 0x0C0D0E0F]


def test_an_elffile_of_a_malformed_file_is_one_or_an_error_of_ours() -> None:
    good = build("demo").read_bytes()
    where, refused = map_of(good), 0
    for seed in range(300):
        source = Source.from_bytes(mutated(good, where, seed))
        try:
            assert read_image(source).elffile.header.e_phoff >= 0
        except ElfError:
            refused += 1
        finally:
            source.close()
    assert 0 < refused < 300


def test_loading_has_no_use_for_the_rest_of_pyelftools() -> None:
    code = "import sys, miniloader as m; m.load(sys.argv[1]); print('elftools.elf.elffile' in sys.modules)"
    command = [sys.executable, "-c", code, str(build("demo"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_structs_are_made_once() -> None:
    assert structs(64, "<", "X86_64") is structs(64, "<", "X86_64")
    assert isinstance(structs(32, ">"), ELFStructs)


def test_machines_with_segment_types_of_their_own() -> None:
    machines = [name.removeprefix("EM_") for name in ENUM_E_MACHINE if name.startswith("EM_")]
    types = {
        machine: [dict(field.labels) for field in record(64, "<", "Phdr", machine).fields]
        for machine in ["", *machines]
    }
    assert {machine for machine in machines if types[machine] != types[""]} == WITH_SEGMENT_TYPES
