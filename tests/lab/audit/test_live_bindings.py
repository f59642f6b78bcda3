"""Who serves the references of a running process, beside what ld.so said of the same start."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from miniloader import cli
from miniloader.errors import UsageError
from miniloader.lab.audit.live_bindings import LiveBinding, live_bindings

_LINE = re.compile(r"binding file (\S+) \[0\] to (\S+) \[0\]: \w+ symbol `([^']*)'(?: \[(.*)\])?")
_OF_LD_SO = ("malloc", "calloc", "realloc", "free")  # elf/dl-minimal.c looks them up for itself

_CXX = """
#include <iostream>
#include <mutex>
#include <stdexcept>
#include <string>
std::once_flag once;
int main() {
    std::call_once(once, [] { std::cout << "ready" << std::endl; });
    try { throw std::runtime_error("x"); } catch (std::exception &) { }
    std::string line;
    std::getline(std::cin, line);
}
"""

_LIBRARY = """
int variable = 7;
int function(void) { return 1; }
int (*own_function(void))(void) { return function; }
int *own_variable(void) { return &variable; }
int served(void) { return 2; }
int own_served(void) { return served(); }
static int choice(void) { return 3; }
static int (*choose(void))(void) { return choice; }
int chosen(void) __attribute__((ifunc("choose")));
_Thread_local int of_thread = 4;
int never(void) { return 5; }
int hooked(void) { return 6; }
int hook(void) { return 60; }
"""

_PROGRAM = """
#include <stdio.h>
extern int variable, function(void), chosen(void), never(void), own_served(void), hooked(void);
extern _Thread_local int of_thread;
int main(int count, char **words) {
    int (*volatile pointer)(void) = function;
    int sum = variable + pointer() + chosen() + of_thread + own_served() + hooked();
    if (count > 9) never();
    printf("%d\\n", sum); fflush(stdout);
    return getchar() < 0 ? 0 : hooked();
}
"""


@contextmanager
def held(command: Sequence[str], directory: Path, **settings: str) -> Iterator[tuple[int, Path]]:
    """The process of ``command``, once it has said a line, and where ld.so writes what it binds."""
    output = directory / "bindings"
    environment = os.environ | {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(output)} | settings
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "the process has ended"
        yield process.pid, Path(f"{output}.{process.pid}")
    finally:
        process.kill()
        process.communicate()


@cache
def referred(path: str) -> frozenset[str]:
    """What the relocations of a file refer to, as readelf names it: ``symbol@version``."""
    output = subprocess.run(["readelf", "-rW", path], capture_output=True, check=True).stdout
    words = [line.split() for line in output.decode(errors="replace").splitlines()]
    return frozenset(row[4].replace("@@", "@") for row in words if len(row) > 4)


def told_by_ld_so(output: Path, program: str) -> set[tuple[str, str, str | None, str]]:
    """(referrer, symbol, version, provider) of all look-ups but those of dlsym(3), the vDSO's and its own."""
    real, text = os.path.realpath, output.read_text(errors="replace")
    return {
        (real(who), name, version, real(to))
        for who, to, name, version in (match.groups() for match in _LINE.finditer(text))
        if "vdso" not in who
        and f"{name}@{version}" * bool(version) + name * (not version) in referred(real(who))
        and not (name in _OF_LD_SO and real(who) == program)
    }


def told_by_slots(rows: Sequence[LiveBinding], program: str) -> set[tuple[str, str, str | None, str]]:
    real = os.path.realpath
    return {
        (real(row.referrer), row.symbol, row.version, real(row.provider))
        for row in rows
        if row.provider is not None and not (row.symbol in _OF_LD_SO and real(row.referrer) == program)
    }


def compiled(path: Path, text: str, *options: str) -> Path:
    compiler = "g++" if "iostream" in text else "gcc"
    if shutil.which(compiler) is None:
        pytest.skip(f"this machine lacks {compiler}")
    command = [compiler, "-x", "c++" if compiler == "g++" else "c", "-", "-o", str(path), *options]
    subprocess.run(command, input=text.encode(), check=True)
    return path


def fixed_program(directory: Path) -> Path:
    """A program at a fixed address, and its library beside it; both are bound lazily."""
    compiled(directory / "libserves.so", _LIBRARY, "-shared", "-fPIC", "-O0", "-Wl,-z,lazy")
    where = ("-L" + str(directory), "-Wl,-rpath," + str(directory), "-Wl,-z,lazy", "-x", "none", "-lserves")
    return compiled(directory / "fixed", _PROGRAM, "-no-pie", "-fno-pie", "-O0", *where)


@pytest.mark.parametrize("name", ["python", "bash", "cxx", "fixed"])
def test_slots_lead_where_ld_so_said(name: str, tmp_path: Path) -> None:
    if name == "python":
        code = "import ctypes, json, math, zlib; print(1, flush=True); input()"
        command = [os.path.realpath(sys.executable), "-c", code]
    elif name == "bash":
        command = [os.path.realpath(shutil.which("bash") or "bash"), "-c", "echo 1; read line"]
    elif name == "cxx":
        command = [str(compiled(tmp_path / "cxx", _CXX, "-O1"))]
    else:
        command = [str(fixed_program(tmp_path))]
    with held(command, tmp_path) as (pid, output):
        live, started = live_bindings(pid), os.path.realpath(command[0])
        told, shown = told_by_ld_so(output, started), told_by_slots(live.bindings, started)
    assert told - shown == set()
    assert shown - told == set()
    assert len(told) > 50
    assert live.unreadable == ()


def test_each_state(tmp_path: Path) -> None:
    program = fixed_program(tmp_path)
    library, preloaded = str(tmp_path / "libserves.so"), str(tmp_path / "libfirst.so")
    compiled(Path(preloaded), "int served(void) { return 20; }", "-shared", "-fPIC")
    with held([str(program)], tmp_path, LD_PRELOAD=preloaded) as (pid, _):
        rows = {(row.referrer, row.symbol): row for row in live_bindings(pid).bindings}

    def shown(referrer: str, symbol: str) -> tuple[str, str | None]:
        row = rows[referrer, symbol]
        return row.state, row.provider

    fixed = str(program)
    assert shown(fixed, "own_served") == ("bound", library)
    assert shown(library, "served") == ("preempted", preloaded)
    assert rows[library, "served"].also == (library,)
    # What a program at a fixed address has of a library is no preemption, though it looks like that.
    assert shown(library, "function") == ("entry", fixed)
    assert shown(library, "variable") == ("copy", fixed)
    assert shown(fixed, "variable") == ("copied", library)
    assert shown(fixed, "chosen") == ("chosen", library)
    assert rows[fixed, "chosen"].leads_to == f"{library}: choice"
    assert shown(fixed, "of_thread") == ("offset", library)
    assert shown(fixed, "never") == ("lazy", None)
    assert rows[fixed, "never"].also == (library,)
    assert shown(fixed, "__gmon_start__") == ("nobody", None)


def test_a_slot_that_somebody_has_led_elsewhere(tmp_path: Path) -> None:
    program = fixed_program(tmp_path)
    library = str(tmp_path / "libserves.so")
    with held([str(program)], tmp_path) as (pid, _):
        output = subprocess.run(["readelf", "-rW", str(program)], capture_output=True, text=True, check=True)
        slot = next(int(line.split()[0], 16) for line in output.stdout.splitlines() if " hooked " in line)
        symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
        vaddr = {line.split()[-1]: line.split()[0] for line in symbols.splitlines() if len(line.split()) == 3}
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        try:
            now = int.from_bytes(os.pread(memory, 8, slot), "little")
            hook = now - int(vaddr["hooked"], 16) + int(vaddr["hook"], 16)
            os.pwrite(memory, hook.to_bytes(8, "little"), slot)
        finally:
            os.close(memory)
        (row,) = [row for row in live_bindings(pid).bindings if row.symbol == "hooked"]
        assert (row.state, row.provider, row.leads_to) == ("rebound", None, f"{library}: hook")


def test_a_file_that_is_mapped_to_be_read_has_no_bindings(tmp_path: Path) -> None:
    library = compiled(tmp_path / "libserves.so", _LIBRARY, "-shared", "-fPIC")
    code = f"f = open({str(library)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)"
    code = f"import mmap; {code}; m[0]; print(1, flush=True); input()"
    with held([sys.executable, "-c", code], tmp_path) as (pid, _):
        assert str(library) in Path(f"/proc/{pid}/maps").read_text()
        assert {row.referrer for row in live_bindings(pid).bindings} & {str(library)} == set()
        with pytest.raises(UsageError, match="no such library"):
            live_bindings(pid, "libserves.so")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = fixed_program(tmp_path)
    with held([str(program)], tmp_path) as (pid, _):
        assert cli.main(["audit", "--bindings", str(pid), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert cli.main(["audit", "--bindings", str(pid)]) == 0
        text = capsys.readouterr().out
        assert cli.main(["audit", str(pid), "--bindings", "--library", "fixed"]) == 0
        of_program = capsys.readouterr().out
    assert (said["pid"], said["name"]) == (pid, "fixed")
    states = {row["symbol"]: row["state"] for row in said["bindings"] if row["referrer"] == str(program)}
    assert states["never"] == "lazy"
    assert "has not been called yet" in text
    assert "never" not in text
    assert "never" in of_program
    assert cli.main(["audit", "--bindings", "--json", "1", "2"]) == 2
    assert cli.main(["audit", "--bindings", "--every", "1s", "1"]) == 2
