"""The races of read against mmap in C, where there is a compiler: what Python adds is on neither side."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from miniloader.walkthrough.c_sources import c_source

__all__ = ["Times", "compiled_races"]

Times = tuple[tuple[float, ...], tuple[float, ...]]
"""What each round took, in microseconds: by read, and by mmap."""

_COMPILERS: Final = ("cc", "gcc", "clang")
_SECONDS: Final = 60
_LINE: Final = re.compile(r"(\d+) (random words|pages, each once): read (\d+) us, mmap (\d+) us")


def compiled_races(directory: str) -> dict[str, Times] | None:
    """Compile the chapter's program in ``directory``, run it, and tell what it printed, by its patterns.

    None where there is no compiler, or it does not compile here.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    source, program = Path(directory, "copies.c"), Path(directory, "copies")
    source.write_text(c_source("copies"))
    command: list[str | Path] = [compiler, "-O2", "-o", program, source]
    if subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS).returncode:
        return None
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=_SECONDS)
    times: dict[str, list[tuple[float, float]]] = {}
    for number, what, by_read, by_mmap in _LINE.findall(done.stdout):
        times.setdefault(f"{int(number):,} {what}", []).append((float(by_read), float(by_mmap)))
    return {pattern: (tuple(read for read, _ in rounds), tuple(mapped for _, mapped in rounds))
            for pattern, rounds in times.items()}  # fmt: skip
