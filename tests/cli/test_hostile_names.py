"""Names that want to be more than names: inert in a terminal, whole in JSON, in every command."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fixtures import build
from miniloader import cli
from miniloader.elf import inspect
from miniloader.elf.dynamic import DT_SYMTAB
from miniloader.elf.layout import SYM

#: What a name may do, and the bytes that would do it.
NAMES: dict[str, bytes] = {
    "space": b"lib with  spaces .so",
    "newline": b"lib\nminiloader: proven\n.so",
    "deleted": b"lib.so (deleted)",
    "not UTF-8": b"lib\xff\xfe.so",
    "escape sequence": b"lib\x1b[31m\x1b]0;title\x07\x1b[2J.so",
    "markup": b"lib[bold red]x[!]<script>alert(1)<b>&amp;:smile:.so",
    "octal": b"lib\\012x.so",
    "right to left": "lib\u202egnp.so".encode(),
    "C1 and line separator": "lib\x9b31m\u2028.so".encode(),
    "formula": b'=cmd|"x",y.so',
}
HOLD = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print(flush=True); sys.stdin.read()"


@dataclass(frozen=True)
class Named:
    """A library with such a name, and a process that has it."""

    path: bytes
    pid: int


@pytest.fixture(scope="module", params=NAMES)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    path = os.fsencode(tmp_path_factory.mktemp("names")) + b"/" + NAMES[request.param]
    shutil.copy(os.fsencode(build.build("demo")), path)
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield Named(path, process.pid)
        process.kill()


Run = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """What a command prints, when nothing in it can act on a terminal."""

    def run(*words: str | bytes) -> str:
        assert cli.main([os.fsdecode(word) for word in words]) == 0
        captured = capfd.readouterr()
        for text in captured:
            assert all(line.isprintable() for line in text.split("\n")), text
            text.encode()  # no surrogates
        assert captured.err == ""
        return captured.out

    return run


#: The commands that take a library, and what they are asked.
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("inspect", "{}"),
    ("inspect", "{}", "--search"),
    ("load", "{}", "--trace", "--call", "demo_add(2, 3)->long"),
    ("disasm", "{}", "demo_add"),
    ("disasm", "{}", "demo_add", "--loaded"),
)


def filled(command: Sequence[str], path: bytes) -> list[str | bytes]:
    return [path if word == "{}" else word for word in command]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_for_people_it_is_inert(named: Named, run: Run, command: tuple[str, ...]) -> None:
    text = run(*filled(command, named.path))
    assert "miniloader: proven" not in text.splitlines()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--trace" not in c], ids=" ".join)
def test_json_has_it_whole(named: Named, run: Run, command: tuple[str, ...]) -> None:
    answer = json.loads(run(*filled(command, named.path), "--json"))
    assert os.fsencode(answer["path"]) == named.path


def test_a_proof_and_its_page(named: Named, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    run("prove", named.path, "-n", "2", "--html", os.fspath(page))
    text = page.read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    assert "<script>alert" not in text


def audited(answer: dict[str, Any], named: Named) -> list[bytes]:
    paths = [os.fsencode(library["path"]) for library in answer["libraries"]]
    return [path for path in paths if path.startswith(os.path.dirname(named.path))]


def test_an_audit_saved_and_compared(named: Named, run: Run, tmp_path: Path) -> None:
    pid, saved = str(named.pid), os.fspath(tmp_path / "saved")
    run("audit", pid, "--library", "names", "--save", saved)
    assert audited(json.loads(Path(saved).read_text()), named) == [named.path]
    assert audited(json.loads(run("audit", pid, "--library", "names", "--json")), named) == [named.path]
    run("diff", saved, saved)
    rows = list(csv.reader(io.StringIO(run("audit", pid, "--library", "names", "--csv"))))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows) == 2


@pytest.mark.parametrize("command", ["inspect", "load", "disasm", "prove"])
def test_an_error_about_it_is_one_inert_line(
    named: Named, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    path = os.fsdecode(named.path) + ".missing"
    assert cli.main([command, path, *(["x"] if command == "disasm" else [])]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert re.match("miniloader: .*No such file or directory", err)


#: Names inside of a file, by what they replace: of symbols, sections, needs and sources.
WITHIN: dict[bytes, bytes] = {
    b"placeholder_a": b"\x1b[31mred\x07abc",
    b"placeholder_b": b"<script>alert",
    b"placeholder_c": "a\u202eb\u2028".encode() + b"\r\n\x9bm",
    b"placeholder_d": b"{{7*7}}[bold]",
    b"libplaceholder.so": b"<b>lib\x1b[2J\n.so.6",
    b".placeholder": b".place\x1b[31m",
    b"placeholder.c": b"<i>\x1b]0;t\x07\n.c",
}
_WITHIN_SOURCE = """
int placeholder_a(int n) { return n + 1; }
long placeholder_b[600] = {1};
int served(void);
int placeholder_c(int n) { return placeholder_a(n) + served(); }
__attribute__((section(".placeholder"))) int placeholder_d(int n) { return placeholder_c(n); }
int visible(int n) { placeholder_b[0] = n; return placeholder_d(n); }
"""


@pytest.fixture(scope="module")
def within(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library, with lines of its source, that has hostile names inside."""
    directory = tmp_path_factory.mktemp("within")
    (directory / "placeholder.c").write_text(_WITHIN_SOURCE)
    path, needed = directory / "lib.so", directory / "libplaceholder.so"
    common = ["gcc", "-g", "-shared", "-fPIC", "-O1", "-fno-inline", "-Wl,-Bsymbolic"]
    command = [*common, "-xc", "-", f"-Wl,-soname,{needed.name}", "-o", str(needed)]
    subprocess.run(command, input=b"int served(void) { return 2; }", check=True)
    command = [*common, "placeholder.c", needed.name, "-Wl,-rpath,$ORIGIN", "-o", path.name]
    subprocess.run(command, cwd=directory, check=True)
    for file in (path, needed):
        data = file.read_bytes()
        for old, new in WITHIN.items():
            data = data.replace(old + b"\0", new.ljust(len(old), b"x") + b"\0")
        file.write_bytes(data)
    old = needed.name.encode()
    needed.rename(directory / os.fsdecode(WITHIN[old].ljust(len(old), b"x")))
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "{}", "--symbols", "--sizes", "--bindings"),
        ("tree", "{}"),
        ("check", "{}", "--all"),
        ("disasm", "{}", "visible"),
        ("load", "{}", "--no-init"),
        ("prove", "{}", "-n", "2", "--html", "{page}"),
    ],
    ids=" ".join,
)
def test_names_within_a_file_are_inert(
    within: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert cli.main([word.format(within, page=page) for word in words]) == 0
    assert page.exists() == ("--html" in words)
    for text in (*capfd.readouterr(), page.read_text() if page.exists() else ""):
        assert all(line.isprintable() for line in text.split("\n")), text
        assert "<script>alert" not in text.partition("</head>")[2]
        assert "a fault of" not in text


def test_paths_are_as_they_are_for_a_program_and_inert_for_a_terminal(within: Path) -> None:
    command = [sys.executable, "-m", "miniloader", "tree", "--paths", within]
    piped = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    needed = next(path for path in within.parent.iterdir() if path.name.startswith("<b>lib"))
    assert os.fsencode(needed) + b"\n" in piped
    master, terminal = os.openpty()
    subprocess.run(command, stdout=terminal, check=True)
    os.close(terminal)
    output = b""
    with suppress(OSError):  # EIO: all has been read
        while part := os.read(master, 1 << 16):
            output += part
    os.close(master)
    shown = output.decode()
    assert "<b>lib\\x1b[2J\\n.so.6" in shown
    assert all(line.isprintable() for line in shown.split("\r\n"))


_LONG = 1_500_000


@pytest.fixture(scope="module")
def long_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with sixteen references to a symbol that is nowhere, whose name is a megabyte and a half."""
    path = tmp_path_factory.mktemp("long") / "liblong.so"
    lines = [f"int u{n}(void); int d{n}(void) {{ return u{n}(); }}" for n in range(16)]
    name = "n" * _LONG
    lines.append(f'int shared(void) __asm__("{name}"); int last(void) {{ return shared(); }}')
    source = "\n".join(lines)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-xc", "-", "-o", path]
    subprocess.run(command, input=source.encode(), check=True)
    image = inspect(path)
    table, data = image.symbols, bytearray(path.read_bytes())
    names = [table.name_bytes(index) for index in range(len(table))]
    offset = int(table.rows["name"][names.index(name.encode())])
    start = image.file_offset(image.dynamic.tags[DT_SYMTAB])
    for index, referred in enumerate(names):
        if re.fullmatch(rb"u[0-9]+", referred):
            struct.pack_into("<I", data, start + index * SYM.size, offset)
    image.source.close()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "--symbols", "--checks", "--bindings"),
        ("check", "--all"),
        ("tree",),
        ("disasm", "d3"),
        ("load",),
        ("prepare",),
    ],
    ids=" ".join,
)
def test_a_name_of_a_megabyte_is_never_printed_whole(
    long_names: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    command, *others = words
    for as_json, most in ((), 200_000), (("--json",), 4_000_000):
        assert cli.main([command, str(long_names), *others, *as_json]) in (0, 1)
        out, err = capfd.readouterr()
        assert out or err
        assert len(out) < most
        assert len(err) < 5000
        assert name_of_ends(out + err) <= 1 << 17


def name_of_ends(text: str) -> int:
    return max(map(len, re.findall("n{1000,}", text)), default=0)
