"""The one gate before machine code of ours: no other processor and no other C library ever meets it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import miniloader
from fixtures import build
from miniloader import cli
from miniloader.errors import UnsupportedError
from miniloader.native import functions, gate

MISSING_LIBC = ("dlvsym", "dlinfo", "gnu_get_libc_version")


class AnotherLibc(ctypes.CDLL):
    """This process's C library without what musl's does not have."""

    def __getattr__(self, name: str) -> object:
        if name in MISSING_LIBC:
            raise AttributeError(name)
        return super().__getattr__(name)


@pytest.fixture(params=["riscv64", "musl"])
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A process of another processor, or with another C library: what it must say."""
    if request.param == "musl":
        monkeypatch.setattr(gate.ctypes, "CDLL", AnotherLibc)
        gate.missing_of_glibc.cache_clear()
        yield "has no gnu_get_libc_version, dlvsym, dlinfo"
    else:
        monkeypatch.setattr(gate, "processor", lambda: "riscv64")
        yield "this process is riscv64 code"
    functions.cache_clear()
    gate.missing_of_glibc.cache_clear()


@pytest.mark.parametrize(
    "words",
    [
        ("load", "{}"),
        ("load", "{}", "--no-init"),
        ("prove", "{}"),
        ("prepare", "{}"),
        ("prepare", "/proc/self/exe"),  # which is refused for another reason elsewhere
        ("run", "-c", "print('it ran')"),
        ("disasm", "{}", "demo_add", "--loaded"),
        *(
            ("walkthrough", chapter)
            for chapter in ("relocation", "processes", "textrel", "relro", "tls", "prepared")
        ),
    ],
    ids=" ".join,
)
def test_what_needs_loading_says_so_in_one_line(
    words: tuple[str, ...], elsewhere: str, demo: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([word.format(demo) for word in words]) == 3
    shown = capfd.readouterr()
    if words[0] == "walkthrough":  # tells what it can, and why no more
        assert "nothing can be loaded here" in shown.out
        return
    assert elsewhere in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "{}"),
        ("inspect", "libc.so.6", "--search"),
        ("inspect", "{}", "--bindings"),
        ("tree", "{}"),
        ("check", "{}", "{python}"),
        ("disasm", "{}", "demo_add"),
        ("audit", "{pid}"),
        ("audit", "{pid}", "--bindings"),
        ("doctor",),
        ("cache",),
        ("walkthrough", "mapping"),
        ("walkthrough", "build"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("elsewhere")
def test_what_needs_no_loading_works(
    words: tuple[str, ...], demo: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"pid": os.getpid(), "python": os.path.realpath(sys.executable)}
    status = cli.main([word.format(demo, **given) for word in words])
    assert (status, capfd.readouterr().err) == (0, "")


def test_chapters_that_load_nothing_are_told(elsewhere: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert elsewhere
    assert cli.main(["walkthrough", "lazy", "cow", "shared", "unmappable", "segments", "--no-pause"]) == 0
    shown = capfd.readouterr()
    assert ("nothing can be loaded here" in shown.out, shown.err) == (False, "")


@pytest.mark.usefixtures("elsewhere")
def test_audits_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    looks = [str(tmp_path / name) for name in ("first", "second")]
    for look in looks:
        assert cli.main(["audit", str(os.getpid()), "--save", look]) == 0
    assert (cli.main(["diff", *looks]), capfd.readouterr().err) == (0, "")


def test_doctor_tells_what_is_missing(elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loading"]["works"] is False
    assert elsewhere.removeprefix("has ") in told["loading"]["why"]
    assert (told["compiled_code"]["sha256"] is None) == ("riscv64" in elsewhere)


def test_doctor_tells_which_code_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    path, checksum = told["compiled_code"]["path"], told["compiled_code"]["sha256"]
    said = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == checksum
    assert told["loading"] == {"works": True, "why": ""}
    assert told["compiled_code"]["origin"].startswith("of a source tree: there is no list ")
    assert cli.main(["doctor"]) == 0
    assert checksum in capsys.readouterr().out


def test_doctor_tells_whose_the_code_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "loops.so"
    monkeypatch.setattr(gate, "own_code", lambda: str(code))
    assert gate.compiled_code() == (str(code), None, "missing")
    code.write_bytes(b"as it ships")
    said = subprocess.run(["sha256sum", code], capture_output=True, text=True, check=True).stdout
    (tmp_path / gate.CHECKSUMS).write_text(said)
    assert gate.compiled_code()[2] == "as it ships"
    code.write_bytes(b"another's")
    assert gate.compiled_code()[2].startswith("not ours: its SHA-256 is not the one in ")


def test_without_loops_check_tells_what_is_wrong_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.build("tls_user_alone")
    expected = miniloader.check(path)
    monkeypatch.setattr(gate, "own_code", lambda: "/nowhere/loops.so")
    functions.cache_clear()
    assert miniloader.check(path) == expected
    assert [problem.kind for problem in expected.problems if problem.severity == "error"]
    with pytest.raises(UnsupportedError, match=r"loops are missing: .* no file /nowhere/loops.so"):
        functions()


@pytest.mark.usefixtures("elsewhere")
def test_no_page_of_ours_becomes_code(demo: Path) -> None:
    from miniloader.loader.beside_glibc.code_page import CodePage

    with pytest.raises(UnsupportedError):
        CodePage()
    with pytest.raises(UnsupportedError):
        miniloader.load(demo)
    assert issubclass(UnsupportedError, miniloader.LoadError)


def test_the_processor_is_the_programs_not_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An i386 program that the same kernel runs, of which uname(2) says x86_64."""
    program = tmp_path / "program"
    monkeypatch.setattr("builtins.open", lambda *_, opened=open: opened(program, "rb"))
    for head, name in (
        (struct.pack("<4sBB12xH", b"\x7fELF", 1, 1, 3), "i386"),
        (struct.pack("<4sBB12xH", b"\x7fELF", 2, 1, 183), "aarch64"),
        (struct.pack(">4sBB12xH", b"\x7fELF", 1, 2, 8), f"32-bit {os.uname().machine}"),
    ):
        program.write_bytes(head)
        assert gate.processor.__wrapped__() == name


# ------------------------------------------------------------------------------------- our own code, damaged
def _cut(data: bytes) -> bytes:
    return data[:20_000]


def _of_another(data: bytes) -> bytes:
    other = next(machine for machine in build.LOOPS if machine != gate.processor())
    return build.LOOPS[other].read_bytes()


DAMAGED = {
    "cut short": (_cut, "loops cannot be used: {path} is cut short: it has 20,000 bytes, of "),
    "empty": (lambda data: b"", "loops cannot be used: {path} is no library"),
    "another machine's": (_of_another, "loops cannot be used: {path} is "),
    "missing": (None, "loops are missing: there is none for "),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=list(DAMAGED))
def test_every_command_says_what_is_wrong_with_our_own_code(
    damage: Callable[[bytes], bytes] | None, said: str, demo: Path, tmp_path: Path
) -> None:
    """In one line, whether the command loads in a child, in workers, or in another program's process."""
    package = tmp_path / "miniloader"
    shutil.copytree(build.ROOT / "miniloader", package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "native" / build.LOOPS[gate.processor()].name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    for words in (["load", str(demo)], ["prove", str(demo), "-n", "2"], ["prepare", str(demo)]):
        command = [sys.executable, "-m", "miniloader", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 3, done.stderr
        (line,) = done.stderr.splitlines()
        assert said.format(path=path) in line
        assert line.endswith("; install miniloader again")


@pytest.mark.needs_root("it mounts a file system")
def test_a_library_where_nothing_may_be_run(demo: Path, tmp_path: Path, own_mounts: list[str]) -> None:
    script = (
        'mount -t tmpfs -o noexec none "$1" && cp -L "$2" "$1/lib.so" && "$3" -m miniloader load "$1/lib.so"'
    )
    command = [*own_mounts, script, "sh", str(tmp_path), str(demo), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith(f"miniloader: {tmp_path}/lib.so: mmap(")
    assert done.stderr.endswith(
        "; its file system is mounted noexec: copy it to another, or mount that with exec\n"
    )
    assert done.stderr.count("\n") == 1
