"""Libraries are found where ld.so finds them: against ``ldconfig -p``, ``ldd`` and ``LD_DEBUG=libs``."""

from __future__ import annotations

import ast
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import miniloader
from miniloader.loader.search import Asker, Found
from miniloader.loader.surroundings import directories_in, find_needed, find_path
from miniloader.loader.surroundings import find_here as find

ROOT = Path(miniloader.__file__).parents[1]


def _output(*command: str, **environment: str) -> str:
    environment = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine lacks x86-64 libraries")
def test_default_directories_are_the_longest_row_in_ld_so() -> None:
    """As an expression for all of it finds them, which takes a hundred times as long."""
    row, choice = re.compile(rb"(?:/[\x21-\x7e]*/\0)+"), random.Random(1)
    for _ in range(5000):
        data = bytes(choice.choices(b"/\0a /\0/", k=choice.randint(0, 40)))
        assert directories_in(data) == max(row.findall(data), key=len, default=b""), data
    began = time.process_time()
    assert directories_in(b"/" * (1 << 22) + b"\1/\0") == b""
    assert time.process_time() - began < 2


def test_the_cache_says_what_ldconfig_says() -> None:
    expected: dict[str, str] = {}
    for line in _output("ldconfig", "-p").splitlines():
        match = re.fullmatch(r"\t(\S+) \(libc6,x86-64\) => (.+)", line)
        if match:
            expected.setdefault(match[1], match[2])
    assert len(expected) > 100
    wrong = {}
    for name, path in expected.items():
        steps = [step for step in find(name).steps if step.rule == "/etc/ld.so.cache"]
        if [step.path for step in steps][:1] != [path]:
            wrong[name] = (path, steps)
    assert not wrong


@pytest.mark.parametrize("name", ["libsqlite3.so.0", "libcrypto.so.3", "libxml2.so.2", "libLLVM-14.so.1"])
def test_every_dependency_is_where_ldd_has_it(name: str) -> None:
    try:
        image = miniloader.inspect(name)
    except miniloader.LoadError:
        pytest.skip(f"this machine lacks {name}")
    expected = dict(re.findall(r"\t(\S+) => (/\S+) \(", _output("ldd", image.path)))
    found = {need.found.name: need.found.path for need in find_needed(image)}
    assert expected
    assert {key: os.path.realpath(found[key] or "") for key in expected} == {
        key: os.path.realpath(path) for key, path in expected.items()
    }


@pytest.mark.parametrize("name", ["chain_a", "chain_a_rpath"])
def test_origin_in_rpath_and_runpath(name: str, fixture_library: Callable[[str], Path]) -> None:
    image = miniloader.inspect(fixture_library(name))
    found = {need.found.name: need.found for need in find_needed(image)}
    assert found["libchain_b.so"].path == str(fixture_library("chain_b"))
    rule = "DT_RPATH" if name.endswith("rpath") else "DT_RUNPATH"
    assert found["libchain_b.so"].steps[-1].rule == rule


def test_rpath_serves_what_is_needed_further_down_and_runpath_does_not(tmp_path: Path) -> None:
    (tmp_path / "libfound.so").write_bytes(Path(find_path("libz.so.1")).read_bytes())
    root = Asker(str(tmp_path / "libroot.so"), ("$ORIGIN",), ())
    assert find("libfound.so", Asker("/nowhere/libmiddle.so", (), (), root)).path is not None
    both = Asker(str(tmp_path / "libroot.so"), ("$ORIGIN",), ("/nowhere",))
    assert find("libfound.so", Asker("/nowhere/libmiddle.so", (), (), both)).path is None
    assert find("libfound.so", both).path is None, "DT_RPATH counts for nothing beside a DT_RUNPATH"


def test_library_path_of_the_program_s_start(tmp_path: Path) -> None:
    libz = Path(find_path("libz.so.1"))
    shutil.copy(libz, tmp_path / "libz.so.1")
    program = (
        "import os\n"
        "from miniloader.loader.surroundings import find_here as find\n"
        "os.environ['LD_LIBRARY_PATH'] = '/nowhere'  # too late for ld.so, and so for us\n"
        "print(find('libz.so.1').path)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": f"/nonexistent:{tmp_path}"},
    )
    assert done.stdout.strip() == str(tmp_path / "libz.so.1")


def test_a_relative_directory_is_looked_at_where_the_process_is_then(tmp_path: Path, demo: Path) -> None:
    """As ld.so does, which finds out about absolute ones once."""
    for place, level in (("first", ""), ("second", "glibc-hwcaps/x86-64-v2")):
        (tmp_path / place / "lib" / level).mkdir(parents=True)
    (tmp_path / "first" / "lib").rmdir()
    shutil.copy(demo, tmp_path / "second/lib/glibc-hwcaps/x86-64-v2/libdemo_here.so")
    program = (
        "import ctypes, os, sys, miniloader\n"
        "load = {'dlopen': ctypes.CDLL, 'ours': miniloader.load}[sys.argv[1]]\n"
        "load('libz.so.1')\n"
        "os.chdir('../second')\n"
        "load('libdemo_here.so')\n"
    )
    for loader in ("dlopen", "ours"):
        done = subprocess.run(
            [sys.executable, "-c", program, loader],
            cwd=tmp_path / "first",
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LD_LIBRARY_PATH": "lib", "PYTHONPATH": str(ROOT)},
        )
        assert (done.returncode, done.stderr) == (0, ""), loader


def test_hwcaps_directories_come_first_and_best_first(tmp_path: Path) -> None:
    """Against the places ld.so says it tries (``LD_DEBUG=libs``)."""
    for level in ("x86-64-v4", "x86-64-v3", "x86-64-v2"):
        (tmp_path / "glibc-hwcaps" / level).mkdir(parents=True)
    debug = subprocess.run(
        [sys.executable, "-c", "import ctypes; ctypes.CDLL('libnowhere.so')"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "LD_DEBUG": "libs"},
    ).stderr
    tried = re.findall(rf"trying file=({re.escape(str(tmp_path))}/.*libnowhere\.so)", debug)
    asker = Asker("/nowhere/lib.so", (), (str(tmp_path),))
    ours = [step.path for step in find("libnowhere.so", asker).steps if step.rule == "DT_RUNPATH"]
    hwcaps = [path for path in tried if "glibc-hwcaps" in path]
    assert ours == [*hwcaps, str(tmp_path / "libnowhere.so")]


TUNABLES = (
    "glibc.cpu.hwcaps=-AVX512F", "glibc.cpu.hwcaps=-AVX2,-BMI2", "glibc.cpu.hwcaps=-SSE4_2",
    "glibc.malloc.check=0:glibc.cpu.hwcaps=,-LZCNT", "glibc.cpu.hwcaps=-avx2,- AVX,-SSE3,AVX2",
    "glibc.cpu.hwcaps=-SSSE3:glibc.cpu.hwcaps=-FMA", "glibc.cpu.hwcaps=-OSXSAVE", "glibc.cpu.hwcaps",
)  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine lacks x86-64 libraries")
@pytest.mark.parametrize("tunables", TUNABLES)
def test_what_glibc_is_not_to_use_of_the_processor_has_no_directories(tunables: str, tmp_path: Path) -> None:
    for level in ("x86-64-v4", "x86-64-v3", "x86-64-v2"):
        (tmp_path / "glibc-hwcaps" / level).mkdir(parents=True)
    program = (
        "import ctypes\n"
        "from miniloader.loader.surroundings import find_here\n"
        "steps = find_here('libnowhere.so').steps\n"
        "print([step.path for step in steps if step.rule == 'LD_LIBRARY_PATH'])\n"
        "ctypes.CDLL('libnowhere.so')"
    )
    variables = {"LD_LIBRARY_PATH": str(tmp_path), "LD_DEBUG": "libs", "GLIBC_TUNABLES": tunables}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **variables},
    )
    tried = re.findall(rf"trying file=({re.escape(str(tmp_path))}/\S*libnowhere\.so)", done.stderr)
    ours = ast.literal_eval(done.stdout)
    hwcaps = [path for path in tried if "glibc-hwcaps" in path]
    assert ours == [*hwcaps, str(tmp_path / "libnowhere.so")]


def test_files_for_another_machine_are_passed_over(tmp_path: Path) -> None:
    other = ROOT / "miniloader" / "lab" / "demo" / "libdemo-aarch64.so"
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    shutil.copy(other, first / "libz.so.1")
    shutil.copy(find_path("libz.so.1"), second / "libz.so.1")
    found = find("libz.so.1", Asker("/nowhere/lib.so", (), (str(first), str(second))))
    if platform.machine() == "x86_64":
        assert found.steps[0].outcome == "for another machine"
        assert found.path == str(second / "libz.so.1")


def test_what_is_nowhere_says_what_to_do() -> None:
    with pytest.raises(miniloader.LoadError, match=r"no library of that name.*give its path"):
        find_path("libnowhere.so.7")


@pytest.mark.parametrize("meant", ["z", "libz", "zlib", "libz.so", "LIBZ", "libzz"])
def test_a_name_as_people_write_it(meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody develops: there, ``libz.so`` is found."""
    names = ["libc.so.6", "libcrypto.so.3", "libz.so", "libz.so.1", "libzstd.so.1"]
    monkeypatch.setattr("miniloader.loader.surroundings.find_here", lambda name: Found(name, None, ()))
    monkeypatch.setattr("miniloader.loader.ld_so_cache.Cache.names", lambda cache: names)
    with pytest.raises(miniloader.LoadError, match=r"did you mean libz\.so\.1\?$"):
        find_path(meant)
