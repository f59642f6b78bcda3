"""Each chapter's program in C compiles without a warning, runs, and sees what the chapter claims."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from miniloader.walkthrough.c_sources import c_source
from miniloader.walkthrough.chapters import CHAPTERS
from miniloader.walkthrough.compiled_races import compiled_races

PROGRAMS = tuple(name for name in CHAPTERS if c_source(name))
WITHOUT = {"textrel", "prepared", "build", "erosion"}  # of a loader's own work, or Python's


def ran(name: str, directory: Path) -> tuple[int, str]:
    source = directory / f"{name}.c"
    source.write_text(c_source(name))
    flags = ("-O1", "-Wall", "-Wextra", "-Werror", "-pthread")
    compiled = subprocess.run(
        ["gcc", *flags, "-o", directory / name, source], capture_output=True, text=True, check=False
    )
    if compiled.returncode:
        return compiled.returncode, compiled.stderr
    done = subprocess.run([directory / name], capture_output=True, text=True, check=False, timeout=30)
    return done.returncode, done.stdout


def test_programs_compile_and_hold(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("this machine lacks gcc")
    assert {*PROGRAMS} == {*CHAPTERS} - WITHOUT
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(PROGRAMS, pool.map(lambda name: ran(name, tmp_path), PROGRAMS), strict=True))
    assert {name: told for name, (status, told) in results.items() if status or not told} == {}


def test_a_listing_fits_a_page_and_says_how_it_is_compiled() -> None:
    for name in PROGRAMS:
        lines = c_source(name).splitlines()
        assert f"{name}.c && ./a.out" in lines[0]
        assert len(lines) <= 70
        assert max(map(len, lines)) <= 132


def test_races_are_run_in_c_if_there_is_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("this machine lacks gcc")
    times = compiled_races(str(tmp_path))
    assert times is not None
    assert [*times] == ["20,000 random words", "64 pages, each once"]
    for by_read, by_mmap in times.values():
        assert len(by_read) == len(by_mmap) == 5
        assert min(*by_read, *by_mmap) > 0
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiled_races(str(tmp_path)) is None
