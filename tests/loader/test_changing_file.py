"""A file that is cut short, filled or replaced while it is being loaded: an error or a library, no signal.

Each attempt is made in a forked child, which SIGBUS would end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import miniloader
from fixtures.build import build
from miniloader.errors import LoadError, MiniloaderError

NAMES = ("demo", "demo_relr", "tls_general", "cxx", "bss")
Change = Callable[[Path], None]


def cut_to(part: float) -> Change:
    return lambda path: os.truncate(path, int(path.stat().st_size * part))


def fill(path: Path) -> None:
    """Change every byte after the ELF header, in the same file."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(64)
        file.write(b"\xa5" * (size - 64))


CHANGES: dict[str, Change] = {
    "to nothing": cut_to(0),
    "to one page": lambda path: os.truncate(path, 4096),
    "to a half": cut_to(0.5),
    "without its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "filled": fill,
}


def count_of_events(path: Path) -> int:
    events: list[object] = []
    miniloader.load(path, init=False, on_event=events.append).close()
    return len(events)


def footprint() -> tuple[int, int]:
    """Descriptors, and mappings of the file."""
    return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("changing.so")


def attempt(path: Path, at: int, change: Change) -> str:
    """Load ``path``, changing it when event ``at`` is told; what came of it, if nothing stayed."""
    before = footprint()
    told = 0

    def on_event(_: object) -> None:
        nonlocal told
        if told == at:
            change(path)
        told += 1

    try:
        miniloader.load(path, init=False, on_event=on_event).close()
        outcome = "library"
    except MiniloaderError as error:
        outcome = type(error).__name__
    assert footprint() == before
    return outcome


def in_child(function: Callable[..., str], *arguments: object) -> str:
    """What ``function`` gives, called in a child; or how the child died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            os.write(writing, function(*arguments).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return answer if status == 0 else f"status {os.waitstatus_to_exitcode(status)}"


@pytest.fixture
def good(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a library, made anew whenever it is asked for."""

    def make(name: str) -> Path:
        return Path(shutil.copy(build(name), tmp_path / "changing.so"))

    return make


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_changed_at_any_event(good: Callable[[str], Path], name: str, how: str) -> None:
    events = range(count_of_events(good(name)))
    outcomes = [in_child(attempt, good(name), at, CHANGES[how]) for at in events]
    assert set(outcomes) <= {"library", "ElfError", "LoadError", "SymbolError"}
    if how == "to nothing":  # cut before it is mapped, it cannot have been
        assert outcomes[0] in ("ElfError", "LoadError")


@contextmanager
def changing(path: Path, data: bytes) -> Iterator[None]:
    """Another process cuts ``path`` short and makes it whole again, as fast as it can."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            number = 0
            while True:
                number += 1
                os.truncate(path, len(data) * (number % 7) // 8)
                path.write_bytes(data)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["demo", "tls_general"])
def test_changed_by_another_process_all_the_time(good: Callable[[str], Path], name: str) -> None:
    """Which load sees what is chance; that none dies is not."""
    path = good(name)

    def many() -> str:
        for _ in range(150):
            attempt(path, -1, fill)
        return "alive"

    with changing(path, path.read_bytes()):
        assert in_child(many) == "alive"


def test_a_library_named_by_a_path_is_not_given_to_dlopen(tmp_path: Path) -> None:
    """By its name it could be one of the system's own, which dlopen would run."""
    trap, victim, trace = tmp_path / "libm.so.6", tmp_path / "victim.so", tmp_path / "was-run"
    source = tmp_path / "trap.c"
    source.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fopen("{trace}", "w"); }}\n'
    )
    command = ["gcc", "-shared", "-fPIC"]
    subprocess.run([*command, source, f"-Wl,-soname,{trap}", "-o", trap], check=True)
    source.write_text("int value = 1;\n")
    subprocess.run([*command, source, "-Wl,--no-as-needed", trap, "-o", victim], check=True)
    assert str(trap) in miniloader.inspect(victim).needed
    with suppress(LoadError):
        miniloader.load(victim, init=False).close()
    assert not trace.exists()
