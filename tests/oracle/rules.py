"""ld.so and miniloader side by side on trees that hypothesis makes: see :mod:`tests.oracle.rule_trees`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.oracle.rule_trees import Call, RuleTree, clear

ROOT: Final = Path(__file__).resolve().parents[2]
#: What LD_LIBRARY_PATH is in the processes that load: None where it is not set.
LIBRARY_PATHS: Final = (None, "b:a/c", ":l", "$ORIGIN:d;b//")
_BYTES: Final = 400


@dataclass
class Differences:
    """How many trees were compared, how they ended, and those that differ, with both answers."""

    outcomes: Counter[str] = field(default_factory=Counter)
    found: list[tuple[str, RuleTree, object]] = field(default_factory=list)

    @property
    def trees(self) -> int:
        """How many were compared."""
        return self.outcomes.total()


class Host:
    """One process that loads trees; ``python`` is the program in whose process it happens."""

    def __init__(self, library_path: str | None, python: str = sys.executable) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        if library_path is not None:
            environment["LD_LIBRARY_PATH"] = library_path
        self.name = f"{python} with LD_LIBRARY_PATH={library_path!r}"
        self._process = subprocess.Popen(
            [python, "-m", "tests.oracle.rule_host"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd="/", env=environment,
        )  # fmt: skip

    def answers(self, directory: Path, calls: Sequence[Call]) -> list[list[str]]:
        """What ld.so and what miniloader made of ``calls``, from within ``directory``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(directory), calls]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: ended, {self._process.wait()}")
        answers: list[list[str]] = json.loads(line)
        return answers

    def close(self) -> None:
        """End it."""
        self._process.communicate()


@contextmanager
def hosts(pythons: Sequence[str] = (sys.executable,)) -> Iterator[list[Host]]:
    """A process for each LD_LIBRARY_PATH in each of ``pythons``."""
    with ExitStack() as stack:
        started = [Host(path, python) for python in pythons for path in LIBRARY_PATHS]
        for host in started:
            stack.callback(host.close)
        yield started


def compare(count: int, seed_number: int, pythons: Sequence[str] = (sys.executable,)) -> Differences:
    """Make ``count`` trees and load each in one of the hosts; the first that differ are kept."""
    differences = Differences()
    with hosts(pythons) as started, tempfile.TemporaryDirectory(prefix="rules-", dir=_memory()) as directory:
        tree = Path(directory) / "tree"

        @seed(seed_number)
        @settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.binary(min_size=_BYTES, max_size=_BYTES), st.integers(0, len(started) - 1))
        def one(data: bytes, number: int) -> None:
            if differences.trees < count:
                _compare(data, started[number], tree, differences)

        one()
    return differences


def _compare(data: bytes, host: Host, tree: Path, differences: Differences) -> None:
    made = RuleTree.of(data)
    clear(tree)
    calls = made.write(tree)
    theirs, ours = host.answers(tree, calls)
    differences.outcomes[theirs[0]] += 1
    if theirs[:2] != ours[:2] or theirs[0].startswith("died"):
        differences.found.append((host.name, made, (theirs, ours)))


def python_with_rpath(directory: str | os.PathLike[str]) -> list[str]:
    """This Python with a DT_RPATH of its own, made in ``directory``; none where there is no patchelf."""
    patchelf, program = shutil.which("patchelf"), os.path.realpath(sys.executable)
    if patchelf is None:
        return []
    before = subprocess.run([patchelf, "--print-rpath", program], capture_output=True, text=True, check=True)
    made = os.path.join(directory, "python3")
    shutil.copy(program, made)
    rpath = ":".join(filter(None, ["d:l/../a/c", before.stdout.strip(), ""]))
    subprocess.run([patchelf, "--force-rpath", "--set-rpath", rpath, made], check=True)
    return [made]


def described(name: str, tree: RuleTree, answers: object) -> str:
    """One difference, for people."""
    lines = [name]
    for place, library in tree.libraries:
        values = {key: value for key, value in library.__dict__.items() if value}
        lines.append(f"    {place}: {values}")
    lines += [f"    links {tree.links}, hard links {tree.hard_links}, odd files {tree.odd}"]
    lines += [f"    {tree.calls}", f"    {answers}"]
    return "\n".join(lines)


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
