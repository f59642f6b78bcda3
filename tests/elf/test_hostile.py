"""Files with something wrong: a result or an error that says what, never a crash; glibc's crash list."""

from __future__ import annotations

import json
import os
import runpy
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import hostile
from fixtures.bombs import BOMBS, SIZE, bomb
from fixtures.build import ROOT, build
from fixtures.campaign import Campaign, minimised
from fixtures.hostile import FILE_STEPS, STEPS, Outcome, outcomes_of
from fixtures.malformed import MALFORMED, dlopened, malformed
from fixtures.running import RUNNING_STEPS
from fixtures.sparse import GIB, SPARSE, sparse


def test_two_thousand_mutations() -> None:
    """``tools/fuzz`` tries more of them, with any seed."""
    campaign = Campaign.of_everything(seed=6)
    found = list(campaign.outcomes(2000))
    counts = Counter((outcome.step, outcome.kind) for outcome in found)
    bad = [outcome for outcome in found if not outcome.allowed]
    assert not bad, bad[:3]
    assert counts.total() == len(STEPS) * 2000
    # Not all of them are refused at the first look.
    assert counts["inspect", "result"] > 1000
    assert counts["load", "result"] > 300
    assert counts["load", "ElfError"] > 500
    assert counts["load", "SymbolError"] > 0


@pytest.mark.parametrize("name", MALFORMED)
def test_each_file_of_the_crash_list_is_refused_by_name_or_harmless(name: str) -> None:
    found = {outcome.step: outcome for outcome in outcomes_of(malformed(name))}
    assert all(outcome.allowed for outcome in found.values()), found
    kind = "LoadError" if name == "no PT_TLS" else "ElfError"
    assert found["load"].kind == (kind if MALFORMED[name].message else "result")
    assert MALFORMED[name].message in found["load"].detail
    assert "\n" not in found["load"].detail


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_read_is_in_proportion_to_the_file(name: str) -> None:
    """A megabyte that asks for gigabytes: at most 2 s of processor time and 500 MB."""
    data = bomb(name)
    assert len(data) == SIZE
    found = outcomes_of(data)
    assert [outcome for outcome in found if not outcome.allowed] == []
    assert len(found) == len(STEPS)


@pytest.mark.parametrize("kind", SPARSE)
def test_what_a_table_claims_over_a_hole_costs_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a GiB, 4 and 64 GiB in a file of kilobytes: at most 2 s of processor time and 300 MB a step."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hostile, "MEMORY", 300 << 20)
    files = [sparse(kind, size, tmp_path / f"{size:x}.so") for size in (GIB // 2, 4 * GIB, 64 * GIB)]
    assert all(file.stat().st_blocks * 512 < 1 << 20 < GIB // 2 < file.stat().st_size for file in files)
    found = list(hostile.run(len(files), files.__getitem__, tuple(FILE_STEPS)))
    assert [outcome for outcome in found if not outcome.allowed] == []
    assert len(found) == len(files) * len(FILE_STEPS)


@pytest.mark.parametrize(
    "kind", ["RELR", "REL", "Android RELA", "hash chains", "symbols", "everything at once"]
)
def test_crumbs_of_data_between_holes_make_no_table_of_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GiB whose every two megabytes begin with a byte that is written: no hole is longer than that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hostile, "MEMORY", 300 << 20)
    file = sparse(kind, GIB, tmp_path / "crumbs.so", crumbs=1_900_000)
    assert file.stat().st_blocks * 512 < 1 << 24
    found = outcomes_of(file, tuple(FILE_STEPS))
    assert [outcome for outcome in found if not outcome.allowed] == []
    assert len(found) == len(FILE_STEPS)


def test_code_that_is_cut_short_crashes_by_name() -> None:
    """``_fini`` lacks its last byte, its return: each command that runs it says where that crashed."""
    data = bytearray(build("relocations").read_bytes())
    code = next(at for at in range(64, 64 + 56 * 8, 56) if struct.unpack_from("<II", data, at) == (1, 5))
    size = struct.unpack_from("<Q", data, code + 32)[0]
    struct.pack_into("<Q", data, code + 32, size - 1)
    found = list(hostile.run(1, lambda _: bytes(data), RUNNING_STEPS))
    assert [outcome for outcome in found if not outcome.allowed] == []
    assert len(found) == len(RUNNING_STEPS)


def test_what_dlopen_makes_of_the_crash_list() -> None:
    """The notes are true where they were taken; elsewhere they are only notes."""
    assert dlopened(build("demo").read_bytes()) == "loads"
    if os.confstr("CS_GNU_LIBC_VERSION") == "glibc 2.36":
        left = {name: each.glibc for name, each in MALFORMED.items()}
        # In fresh processes: what a segment that is too long is mapped over depends on what lies behind it.
        for _ in range(5):
            found = _outcomes_of_dlopen()
            left = {name: noted for name, noted in left.items() if not found[name].startswith(noted)}
        assert not left


_OUTCOMES = """
import json
from fixtures.malformed import MALFORMED, dlopened, malformed
print(json.dumps({name: dlopened(malformed(name)) for name in MALFORMED}))
"""


def _outcomes_of_dlopen() -> dict[str, str]:
    done = subprocess.run([sys.executable, "-c", _OUTCOMES], cwd=ROOT, capture_output=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_a_bad_outcome_is_found_and_minimised() -> None:
    """With a class of outcome that is not bad, as there is no bad one: the bytes that matter are few."""
    good = build("demo").read_bytes()
    bad = bytearray(good)
    bad[18] = 183  # e_machine
    bad[0x2000:0x2100] = bytes(range(256))
    (outcome,) = outcomes_of(bytes(bad), ("load",))
    small = minimised(bytes(bad), good, outcome)
    assert [at for at in range(len(good)) if small[at] != good[at]] == [18]


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"signal", "signal SIGSEGV"), (b"foreign", "foreign ValueError"), (b"left", "foreign Left")],
)
def test_what_is_bad_is_seen(monkeypatch: pytest.MonkeyPatch, data: bytes, kind: str) -> None:
    """A fuzzer that finds nothing must be one that could."""

    def step(data: bytes) -> None:
        if data == b"signal":
            os.kill(os.getpid(), 11)
        if data == b"foreign":
            raise ValueError
        if data == b"left":
            raise hostile.Left

    outcomes_of(b"")  # everything is imported by now
    monkeypatch.setitem(hostile.STEPS, "load", step)
    found = list(hostile.run(3, lambda index: data if index == 1 else b"fine", ("load",)))
    assert [(one.index, one.kind) for one in found] == [(0, "result"), (1, kind), (2, "result")]
    assert [one.allowed for one in found] == [True, False, True]
    assert isinstance(found[1], Outcome)


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """``tools/fuzz`` in this process, with these arguments."""
    script = ROOT / "tools" / "fuzz"
    namespace = runpy.run_path(str(script), run_name="fuzz")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fuzz", "--keep", str(tmp_path / "crashers"), *arguments])
        return int(namespace["main"]())

    return run


def test_the_tool_tables_what_it_finds(
    fuzz: Callable[..., int], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fuzz("--runs", "60", "--seed", "9") == 0
    said = capfd.readouterr().out
    assert "60 files made of" in said
    assert "BAD" not in said
    assert not (tmp_path / "crashers").exists()


def test_the_tool_keeps_crashers_and_minimises_them(
    fuzz: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step(data: bytes) -> None:
        if data[:4] != b"\x7fELF":
            raise ZeroDivisionError

    outcomes_of(build("demo").read_bytes())  # everything is imported by now
    monkeypatch.setitem(hostile.STEPS, "plan", step)
    assert fuzz("--runs", "400", "--seed", "9") == 1
    assert "foreign ZeroDivisionError" in capfd.readouterr().out
    small = next((tmp_path / "crashers").glob("plan-foreign-ZeroDivisionError-9-*-small.so"))
    whole = small.with_name(small.name.replace("-small", ""))
    assert whole.read_bytes()[:4] != b"\x7fELF" != small.read_bytes()[:4]
