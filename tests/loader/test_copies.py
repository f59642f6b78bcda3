"""Two copies of a host library: dlopen(3) says which is used, `load` and `inspect --search` say both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import miniloader
from fixtures import build
from miniloader.loader.copies import Copies
from miniloader.loader.events import Event

#: Prints which file of a name the process has mapped, once it has opened the library.
DLOPEN = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if sys.argv[2] in line}))
"""


def linked(directory: Path, name: str, version: str) -> Path:
    """A library that needs ``name``, and beside it, on its DT_RUNPATH, a copy that defines ``version``."""
    directory.mkdir()
    (directory / "nothing.c").write_text("void *of_ours; int answer(void) { return 6; }")
    (directory / "map").write_text(f"{version} {{ global: of_ours; }};")
    command = ["gcc", "-shared", "-fPIC", "-nostdlib", directory / "nothing.c", "-o"]
    copy, library = directory / name, directory / "libneeds.so"
    options = f"-Wl,-soname,{name},--version-script={directory}/map"
    subprocess.run([*command, copy, options], check=True, capture_output=True)
    options = f"-Wl,--no-as-needed,-rpath,$ORIGIN,{copy}"
    subprocess.run([*command, library, options], check=True, capture_output=True)
    return library


def said(*arguments: str | Path) -> dict[str, Any]:
    """What a command prints with ``--json``, in a process of its own."""
    command = [sys.executable, "-m", "miniloader", *arguments, "--json"]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def by_dlopen(library: Path, name: str) -> list[str]:
    command = [sys.executable, "-I", "-S", "-c", DLOPEN, library, f"/{name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_what_the_process_has_is_used_and_both_are_told(tmp_path: Path) -> None:
    library = linked(tmp_path / "own", "libm.so.6", "GLIBC_9.7")
    (mapped,) = by_dlopen(library, "libm.so.6")
    assert not mapped.startswith(str(tmp_path))
    (copies,) = said("load", library)["copies"]
    (need,) = (need for need in said("inspect", "--search", library)["search"] if need["copies"])
    assert need["needed"] == "libm.so.6"
    assert need["copies"] == copies
    assert os.path.realpath(copies["used"]) == os.path.realpath(mapped)
    assert copies["used_version"].startswith("GLIBC_2.")
    assert (copies["found"], copies["found_version"]) == (str(library.parent / "libm.so.6"), "GLIBC_9.7")


@pytest.mark.parametrize("name", ["libstdc++.so.6", "libgcc_s.so.1"])
def test_what_only_numpy_would_bring_is_not_in_the_way(tmp_path: Path, name: str) -> None:
    """The command line loads without numpy, whose C++ runtime would be taken instead."""
    library = linked(tmp_path / "own", name, "GLIBCXX_9.7")
    assert by_dlopen(library, name) == [str(library.parent / name)]
    loaded, search = said("load", library), said("inspect", "--search", library)["search"]
    assert loaded["copies"] == []
    assert str(library.parent / name) in [used["path"] for used in loaded["libraries"]]
    assert [(need["path"], need["copies"]) for need in search] == [(str(library.parent / name), None)]


def test_in_a_process_that_has_one_an_event_tells_both(tmp_path: Path) -> None:
    first, second = (linked(tmp_path / place, "libstdc++.so.6", f"GLIBCXX_{place}") for place in "12")
    code = f"""
import miniloader, sys
miniloader.load({str(first)!r})
miniloader.load({str(second)!r}, on_event=lambda event: print(event.data.get("copies") or "", end=""))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    copies = [str(library.parent / "libstdc++.so.6") for library in (first, second)]
    expected = Copies("libstdc++.so.6", copies[0], "GLIBCXX_1", copies[1], "GLIBCXX_2")
    assert done.stdout == str(expected)
    assert expected.text() == (
        f"the process has {copies[0]} (GLIBCXX_1) already, and not {copies[1]} (GLIBCXX_2) is used"
    )


def test_one_file_by_two_paths_is_one(tmp_path: Path) -> None:
    library = linked(tmp_path / "own", "libm.so.6", "GLIBC_9.7")
    (library.parent / "libm.so.6").unlink()
    (library.parent / "libm.so.6").symlink_to(by_dlopen(library, "libm.so.6")[0])
    told: list[Event] = []
    with miniloader.load(library, on_event=told.append):
        needs = [event for event in told if event.stage == "need"]
    assert [event.data["copies"] for event in needs] == [None]
