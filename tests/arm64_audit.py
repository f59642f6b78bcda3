"""Audits processes that hold libraries of ours, and compares its sums with the kernel's, in smaps.

One of them has relocated the libraries itself, one has them from prepared pages, and so owns fewer.
``tools/arm64 --test`` runs it on an aarch64 kernel, as ``python -m tests.arm64_audit``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE

import miniloader
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.result import Audit
from miniloader.loader.prepare import prepare

LIBRARIES = ("libcrypto.so.3", "libsqlite3.so.0")
_LOAD = """
import sys, miniloader
prepared = sys.argv[1] == "prepared"
kept = [miniloader.load(name, prepared=prepared) for name in sys.argv[2:]]
print("loaded", flush=True)
sys.stdin.read()
"""


@contextmanager
def process(how: str) -> Iterator[int]:
    """A process that has loaded the libraries, ``how`` one of plain, prepared; its PID."""
    command = [sys.executable, "-c", _LOAD, how, *LIBRARIES]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as started:
        assert started.stdout is not None
        if started.stdout.readline() != "loaded\n":
            raise SystemExit(f"the {how} process did not load {' and '.join(LIBRARIES)}")
        yield started.pid
        started.kill()


def numbers(text: str) -> dict[str, int]:
    """The fields of smaps of one mapping, or of smaps_rollup, in kB."""
    return {name: int(kb) for name, kb in re.findall(r"(\w+): +(\d+) kB", text)}


def by_kernel(pid: int) -> tuple[dict[str, int], list[int]]:
    """The kernel's sums of a process, and of all its private mappings of files: Size, Rss, Anonymous."""
    sections = re.split(r"(?m)^(?=[0-9a-f]+-)", Path(f"/proc/{pid}/smaps").read_text())
    files = [numbers(text) for text in sections if re.match(r"\S+ ...p (\S+ +){3}/", text)]
    rollup = numbers(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return rollup, [sum(fields[name] for fields in files) for name in ("Size", "Rss", "Anonymous")]


def differences(audit: Audit, kernel: Sequence[tuple[dict[str, int], list[int]]]) -> Iterator[str]:
    """What the audit and the kernel do not agree on, in kB."""
    for seen, (rollup, of_files) in zip(audit.processes, kernel, strict=True):
        uss = rollup["Private_Clean"] + rollup["Private_Dirty"]
        if (seen.rss, seen.uss) != (rollup["Rss"] * 1024, uss * 1024):
            yield f"RSS, USS of {seen.pid}: {seen.rss}, {seen.uss}, in smaps {rollup['Rss']}, {uss} kB"
        if seen.pss is not None and abs(seen.pss - rollup["Pss"] * 1024) >= PAGE_SIZE:
            yield f"PSS of {seen.pid}: {seen.pss}, in smaps {rollup['Pss']} kB"
        rows = [row for library in audit.libraries for row in library.processes if row.pid == seen.pid]
        pages = [sum(getattr(row, name) for row in rows) for name in ("mapped", "present", "private")]
        ours = [number * PAGE_SIZE // 1024 for number in pages]
        if ours != of_files:
            yield f"size, resident, own of files of {seen.pid}: {ours} kB, in smaps {of_files}"


def main() -> int:
    for name in LIBRARIES:
        prepare(name)
    with ExitStack() as stack:
        pids = [stack.enter_context(process(how)) for how in ("plain", "prepared")]
        for _ in range(10):  # a process may touch a page yet until it waits for us
            kernel = [by_kernel(pid) for pid in pids]
            audit = miniloader.audit(pids)
            if [by_kernel(pid) for pid in pids] == kernel:
                break
    wrong = list(differences(audit, kernel))
    wrong += [f"{path} could not be read" for path in audit.unreadable]
    causes = {cause for library in audit.libraries for page in library.private_pages for cause in page.causes}
    wrong += ["a private page of no known cause"] if "unknown" in causes else []
    for name in LIBRARIES:
        (library,) = [library for library in audit.libraries if Path(library.path).name.startswith(name)]
        own = [row.private for pid in pids for row in library.processes if row.pid == pid]
        print(f"{name}: own pages of the plain and the prepared process: {own}; {library.path}")
        if not own[1] < own[0]:
            wrong.append(f"{name}: prepared pages save nothing: {own}")
    print(f"level {audit.level}, causes {', '.join(sorted(causes))}")
    print(
        f"{len(audit.libraries)} files of {len(pids)} processes; different from smaps, or wrong: {len(wrong)}"
    )
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
