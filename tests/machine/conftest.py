"""objdump, whose answers disassembly is compared with."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest


class Line(NamedTuple):
    """One line of objdump's: the bytes as it writes them, the instruction, what that refers to."""

    octets: str
    text: str
    refers_to: int | None
    name: str


class Dump(NamedTuple):
    """What objdump says of a file: its lines by vaddr, and the names at which code begins."""

    lines: Mapping[int, Line]
    heads: Mapping[int, str]


_LINE = re.compile(r" *([0-9a-f]+):\t([0-9a-f ]+?) *(?:\t(.*))?")
_HEAD = re.compile(r"([0-9a-f]+) <(.*)>:")
_NAME = re.compile(r"\b([0-9a-f]+) <([^>]+)>")


@cache
def _dump(path: Path, tool: str, start: int = 0, stop: int = 0) -> Dump:
    if shutil.which(tool) is None:
        pytest.skip(f"this machine lacks {tool}")
    options = ["-Mintel"] if tool in ("objdump", "i686-linux-gnu-objdump") else []
    if stop:
        options = [*options, f"--start-address={start:#x}", f"--stop-address={stop:#x}"]
    done = subprocess.run([tool, "-dw", *options, path], capture_output=True, text=True, check=True)
    lines, heads = {}, {}
    for text in done.stdout.splitlines():
        if line := _LINE.fullmatch(text):
            named = _NAME.search(line[3] or "")
            refers_to = (int(named[1], 16), named[2]) if named else (None, "")
            lines[int(line[1], 16)] = Line(line[2].replace(" ", ""), line[3] or "", *refers_to)
        elif head := _HEAD.fullmatch(text):
            heads[int(head[1], 16)] = head[2]
    return Dump(lines, heads)


@pytest.fixture(scope="session")
def objdump() -> Callable[..., Dump]:
    """``objdump(path)``, ``objdump(path, tool)``: what it says; the test is skipped where there is none.

    With ``start`` and ``stop``, of the code between these vaddrs.
    """
    return lambda path, tool="objdump", start=0, stop=0: _dump(Path(path), tool, start, stop)


@pytest.fixture(scope="session")
def readelf_frames() -> Callable[[str], list[int]]:
    """``readelf_frames(path)``: where each function begins that ``.eh_frame`` describes."""
    if shutil.which("readelf") is None:
        pytest.skip("this machine lacks readelf")

    def frames(path: str) -> list[int]:
        done = subprocess.run(
            ["readelf", "--debug-dump=frames", path], capture_output=True, text=True, check=False
        )
        return [int(vaddr, 16) for vaddr in re.findall(r" FDE .* pc=([0-9a-f]+)\.\.", done.stdout)]

    return frames
