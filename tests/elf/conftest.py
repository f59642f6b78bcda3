"""Every library on the machine, and what readelf says of many files at once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fixtures import build

Readelf = Callable[..., Iterator[tuple[Path, bytes]]]


@pytest.fixture(scope="session")
def every_library() -> list[Path]:
    """Every ELF file named ``*.so*`` on the file systems of / and of the tests, each inode once.

    What lies in directories for temporary files may go away while we look.
    """
    found: dict[tuple[int, int], Path] = {}
    for root in ("/", str(build.ROOT)):
        device = os.stat(root).st_dev
        for parent, directories, names in os.walk(root):
            directories[:] = sorted(d for d in directories if _belongs(os.path.join(parent, d), device))
            for name in sorted(names):
                if ".so" in name and "\n" not in parent + name:
                    path = Path(parent, name)
                    identity = _elf_identity(path)
                    if identity:
                        found.setdefault(identity, path)
    return list(found.values())


def _belongs(path: str, device: int) -> bool:
    try:
        return os.lstat(path).st_dev == device and path not in ("/tmp", "/var/tmp")
    except OSError:
        return False  # gone meanwhile


def _elf_identity(path: Path) -> tuple[int, int] | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return (status.st_dev, status.st_ino) if file.read(4) == b"\x7fELF" else None
    except OSError:
        return None


@pytest.fixture(scope="session")
def readelf() -> Readelf:
    """``readelf(options, paths)``: each path, and what readelf prints for it."""
    if shutil.which("readelf") is None:
        pytest.skip("this machine lacks readelf")

    def one_batch(options: str, paths: Sequence[Path]) -> list[tuple[Path, bytes]]:
        command = ["readelf", *options.split(), "--", *map(str, paths)]
        # An empty file name at the end makes readelf print names even for a single file.
        done = subprocess.run([*command, os.devnull], capture_output=True, check=False, env={"LC_ALL": "C"})
        pieces = re.split(rb"^\nFile: (.*)\n", b"\n" + done.stdout, flags=re.MULTILINE)[1:]
        said = dict(zip(pieces[::2], pieces[1::2], strict=True))
        return [(path, said.get(os.fsencode(path), b"")) for path in paths]

    def run(options: str, paths: Sequence[Path], size: int = 50) -> Iterator[tuple[Path, bytes]]:
        batches = [paths[start : start + size] for start in range(0, len(paths), size)]
        with ThreadPoolExecutor(2) as pool:
            for answers in pool.map(lambda batch: one_batch(options, batch), batches):
                yield from answers

    return run
