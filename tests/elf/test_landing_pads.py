"""Code marked for landing pads (BTI on aarch64): what the file says, and who asks the kernel for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import miniloader
from fixtures import build
from miniloader.elf import ElfImage, inspect
from miniloader.kernel import syscalls
from miniloader.loader import mapping

MARKED = build.LOOPS["aarch64"]
FILES = (*build.LOOPS.values(), *(how.prebuilt for how in build.MACHINES.values()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_marked_is_what_readelf_calls_marked(path: Path) -> None:
    command = ["readelf", "--notes", "--wide", path]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={"LC_ALL": "C"}).stdout
    assert inspect(path).has_landing_pads == ("AArch64 feature: BTI" in said)
    assert (path == MARKED) == inspect(path).has_landing_pads


@pytest.mark.parametrize("page_size", [0x1000, 0x4000, 0x10000])
def test_a_plan_guards_code_before_any_of_it_runs(page_size: int) -> None:
    plan = inspect(MARKED).plan(page_size)
    guards = [call for call in plan.calls() if call.step == "guard"]
    code = [part for part in plan.mappings if "x" in part.protection]
    assert [(call.start, call.end, call.protection) for call in guards] == [
        (part.start, part.end, "r-xb") for part in code
    ]
    assert guards[0].text().endswith(", PROT_READ|PROT_EXEC|PROT_BTI)")
    steps = [call.step for call in plan.calls()]
    assert steps == sorted(steps, key=["reserve", "map", "guard", "zero", "protect"].index)


@pytest.mark.parametrize("known", [True, False])
def test_only_a_processor_that_knows_them_is_asked(
    *, known: bool, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on aarch64; the kernel of this machine may refuse the flag, and does not see it."""
    asked: list[int] = []

    def mprotect(start: int, length: int, protection: int, call=syscalls.mprotect) -> None:
        asked.append(protection)
        call(start, length, protection & ~syscalls.PROT_BTI)

    monkeypatch.setattr(ElfImage, "has_landing_pads", True)
    monkeypatch.setattr(mapping, "features", lambda: frozenset({"bti"} if known else ()))
    monkeypatch.setattr(syscalls, "mprotect", mprotect)
    library = miniloader.load(demo)
    guarded = [part for part in library.plan.mappings if "x" in part.protection]
    library.close()
    assert guarded
    assert asked.count(syscalls.PROT_READ | syscalls.PROT_EXEC | syscalls.PROT_BTI) == known * len(guarded)
