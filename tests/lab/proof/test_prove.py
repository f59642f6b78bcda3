"""Proofs: of real libraries and of ours, against records that others keep, and proofs that must fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import miniloader
from miniloader.errors import ElfError, EvidenceError, UsageError, WorkerError
from miniloader.evidence.sharing import ABSENT, COPIED, SHARED, ZERO, analyse
from miniloader.evidence.verdict import Claim
from miniloader.kernel.maps import mappings_of, read_maps
from miniloader.kernel.probe import best_level
from miniloader.kernel.smaps import read_smaps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.proof.proof import STEPS, Proof
from miniloader.lab.proof.prove import prove
from tests.lab.conftest import Ordinary, lives

IDS = ["code-shared", "untouched-data-shared", "written-data-private", "writes-isolated", "file-unchanged"]
NAMES = [step.name for step in STEPS]


def verdicts(proof: Proof) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in proof.claims}


def claim(proof: Proof, id: str) -> Claim:
    return next(claim for claim in proof.claims if claim.id == id)


def at(step: str, do: Callable[[tuple[int, ...]], None]) -> Callable[[str, tuple[int, ...]], None]:
    """For ``on_step``: ``do`` with the pids when ``step`` begins."""
    return lambda name, pids: do(pids) if name == step else None


def row(proof: Proof, step: str) -> list[str]:
    """One string a process: S hared, C opied, 0 zero, - absent; a letter for each page."""
    letters = {SHARED: "S", COPIED: "C", ZERO: "0", ABSENT: "-"}
    states = analyse(proof.snapshot(step)).states
    return ["".join(letters.get(state, "?") for state in process) for process in states.tolist()]


# ------------------------------------------------------------------------------------------ what is proven
FAR = """
static char room[1UL << 30];
char *at(long place) { return room + place; }
__attribute__((constructor)) static void write_far(void) { room[3UL << 28] = 1; }
"""


def test_pages_that_nobody_has_are_runs_not_rows(tmp_path: Path) -> None:
    """A gigabyte of bss, in which code of the library writes to one page."""
    library = tmp_path / "far.so"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=FAR, text=True, check=True)
    proof = prove(library, 2)
    assert proof.verdict == "proven"
    assert "1 written by the library's own code" in claim(proof, "written-data-private").expected
    told = proof.to_json()
    sizes = {len(step["pages"]) for step in told["steps"]}
    assert len(sizes) == 1
    assert sizes.pop() + sum(run["pages"] for run in told["left_out"]) == proof.plan.length // PAGE_SIZE
    assert len(json.dumps(told)) < 1_000_000
    (far,) = (
        [page["state"] for page in pages]
        for pages in zip(*(step["pages"] for step in told["steps"]), strict=True)
        if pages[0]["vaddr"] > 3 << 28
    )
    assert far == [["absent"] * 2, ["absent"] * 2, ["copied"] * 2, ["copied"] * 2, ["copied", "absent"]]


def test_the_demonstration_library_page_by_page(demo: Path) -> None:
    """Which pages are what is known from fixtures/demo.c; see the sections that readelf -S lists."""
    proof = prove(demo, 3)
    assert verdicts(proof) == dict.fromkeys(IDS, "proven")
    assert proof.verdict == "proven"
    assert proof.path == str(demo)
    assert (
        [snapshot.step for snapshot in proof.snapshots]
        == NAMES
        == ["mapped", "touched", "relocated", "written", "exited"]
    )
    assert len({process.base for process in proof.processes}) == 3
    # headers, code, constants, relro, three pages of data that nobody relocates and one with a pointer, bss
    assert row(proof, "mapped") == ["-" * 15] * 3
    assert row(proof, "touched") == ["S" * 12 + "000"] * 3
    assert row(proof, "relocated") == ["S" + "SSS" + "S" + "CCC" + "SSS" + "C" + "000"] * 3
    assert row(proof, "written") == ["S" + "SSS" + "S" + "CCC" + "CSS" + "C" + "000"] * 3
    assert row(proof, "exited") == [*row(proof, "written")[:2], "-" * 15]
    assert proof.word is not None
    assert (proof.word.vaddr, proof.word.fresh, proof.word.section) == (0x8000, True, ".data")
    written = claim(proof, "written-data-private")
    assert "5 pages" in written.expected
    assert "4 relocated, 1 written by the workers" in written.expected
    assert written.observed.startswith("15 of 15 copies; page 0x8000 was the file's own until then")


@pytest.mark.needs_root("frame numbers need CAP_SYS_ADMIN")
def test_frames_prove_it(demo: Path) -> None:
    """The claims again, from nothing but the frame numbers in the snapshot."""
    proof = prove(demo, 3)
    assert proof.evidence == "frames"
    frames = np.array([process.pages["frame"] for process in proof.snapshot("written").processes])
    code, written = slice(1, 4), [5, 6, 7, 8, 11]
    assert (frames[:, code] != 0).all()
    assert (frames[0, code] == frames[:, code]).all()
    assert len(np.unique(frames[:, written])) == 3 * len(written)
    distinct = len(np.unique(frames[:, :12]))
    assert proof.memory.used == distinct * PAGE_SIZE == (7 + 3 * 5) * PAGE_SIZE
    assert proof.memory.unshared == 3 * 12 * PAGE_SIZE


@pytest.mark.parametrize(
    "name", ["libz.so.1", "libcrypto.so.3", "libsqlite3.so.0", "libm.so.6", "libexpat.so.1"]
)
def test_libraries_of_the_system(name: str) -> None:
    try:
        proof = prove(name, 2)
    except miniloader.LoadError as error:
        if "no library of that name" not in str(error):
            raise
        pytest.skip(f"this machine lacks {name}")
    assert verdicts(proof) == dict.fromkeys(IDS, "proven")
    assert proof.evidence == best_level()


def test_counts_are_the_kernel_s_own(demo: Path) -> None:
    """smaps' ``Anonymous`` and ``Rss``, read at the same moment, count the pages that the grid shows."""
    found: list[tuple[int, int]] = []

    def look(pids: tuple[int, ...]) -> None:
        for pid in pids:
            mine = [one for one in read_smaps(pid) if one.vma.path == str(demo)]
            found.append(
                tuple(sum(one.sizes[name] for one in mine) // PAGE_SIZE for name in ("Rss", "Anonymous"))
            )

    # When the step "written" begins, all is as the snapshot "relocated" saw it.
    proof = prove(demo, 2, on_step=at("written", look))
    states = analyse(proof.snapshot("relocated")).states
    assert found == [
        (int(np.isin(one, (SHARED, COPIED)).sum()), int((one == COPIED).sum())) for one in states
    ]


def test_flags_prove_it_too(demo: Path) -> None:
    proof = prove(demo, 3, level="flags")
    assert proof.evidence == "flags"
    assert verdicts(proof) == dict.fromkeys(IDS, "proven")
    assert not any(process.pages["frame"].any() for one in proof.snapshots for process in one.processes)
    assert row(proof, "written") == ["S" + "SSS" + "S" + "CCC" + "CSS" + "C" + "000"] * 3
    assert "page cache" in claim(proof, "code-shared").expected


def test_totals_prove_nothing_about_pages(demo: Path) -> None:
    proof = prove(demo, 2, level="totals")
    assert proof.evidence == "totals"
    assert verdicts(proof) == dict(zip(IDS, ["unknown"] * 3 + ["proven"] * 2, strict=True))
    assert proof.verdict == "unknown"
    for id in IDS[:3]:
        assert claim(proof, id).reason == "level totals: sums that suggest, and prove nothing"
        assert "Rss 96 KiB, Pss" in claim(proof, id).observed
    assert proof.memory.estimated


def test_an_ordinary_user_proves_it_by_flags(demo: Path, ordinary: Ordinary) -> None:
    done = ordinary(["-m", "miniloader", "prove", str(demo), "-n", "3", "--json"])
    assert (done.returncode, done.stderr) == (0, "")
    proof = json.loads(done.stdout)
    assert (proof["verdict"], proof["evidence"]) == ("proven", "flags")
    assert {claim["id"]: claim["verdict"] for claim in proof["claims"]} == dict.fromkeys(IDS, "proven")
    assert all(frame is None for page in proof["steps"][3]["pages"] for frame in page["frame"])


def test_what_constructors_write_is_told_apart(misbehaves: Callable[[str], str]) -> None:
    proof = prove(misbehaves("write"), 2)
    assert proof.verdict == "proven"
    assert (
        "1 written by the library's own code, 1 written by the workers"
        in claim(proof, "written-data-private").expected
    )
    assert (
        "written by the library's own code"
        not in claim(prove(misbehaves("print"), 2), "written-data-private").expected
    )


def test_while_a_thread_of_the_library_runs_only_padding_is_written(misbehaves: Callable[[str], str]) -> None:
    proof = prove(misbehaves("thread"), 2)
    assert proof.word is not None
    assert proof.word.padding
    assert proof.verdict == "proven"


def test_the_word_is_put_back(demo: Path) -> None:
    """When the last step begins, memory holds what the file has there."""
    seen: list[bytes] = []

    def read_back(pids: tuple[int, ...]) -> None:
        for pid in pids:
            base = mappings_of(read_maps(pid), demo)[0].start
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                seen.append(os.pread(memory.fileno(), 8, base + 0x8000))

    proof = prove(demo, 2, on_step=at("exited", read_back))
    assert proof.word is not None
    assert proof.word.vaddr == 0x8000
    assert seen == [miniloader.inspect(demo).read(0x8000, 8)] * 2


# ----------------------------------------------------------------------------------------- what is refuted
def test_relocated_code_is_not_shared(fixture_library: Callable[[str], Path]) -> None:
    """Text relocations: the teaching case, and a proof that the claim about code can fail."""
    library = fixture_library("textrel")
    with pytest.raises(ElfError, match="text_relocations=True"):
        prove(library, 2)
    proof = prove(library, 2, text_relocations=True)
    assert verdicts(proof)["code-shared"] == "refuted"
    assert claim(proof, "code-shared").observed == "0 of 1; 1 page not, the first at vaddr 0x1000"
    assert proof.verdict == "refuted"
    by_flags = prove(library, 2, text_relocations=True, level="flags")
    assert verdicts(by_flags)["code-shared"] == "refuted"


def poke(pid: int, path: Path, page: int) -> None:
    """Write to a page of the library in another process as a debugger does: even code is copied then."""
    base = mappings_of(read_maps(pid), path)[0].start
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
    try:
        octet = os.pread(memory, 1, base + page * PAGE_SIZE)
        os.pwrite(memory, octet, base + page * PAGE_SIZE)
    finally:
        os.close(memory)


@pytest.mark.parametrize("level", ["frames", "flags"])
@pytest.mark.parametrize(
    ("page", "id"), [(2, "code-shared"), (4, "untouched-data-shared"), (10, "untouched-data-shared")]
)
@pytest.mark.parametrize("step", ["touched", "written"])
def test_one_page_copied_in_one_process_is_enough(
    demo: Path, step: str, page: int, id: str, level: Any
) -> None:
    if level == "frames" and best_level() != "frames":
        level = "flags"
    proof = prove(demo, 3, level=level, on_step=at(step, lambda pids: poke(pids[1], demo, page)))
    assert verdicts(proof) == dict.fromkeys(IDS, "proven") | {id: "refuted"}
    assert f"1 page not, the first at vaddr {page * PAGE_SIZE:#x}" in claim(proof, id).observed
    assert row(proof, "written")[1][page] == "C"


@pytest.mark.parametrize(
    ("change", "observed"),
    [
        (lambda file: os.utime(file, (1, 1)), "modified meanwhile"),
        (
            lambda file: file.write_bytes(file.read_bytes() + b"x"),
            "bytes, SHA-256 [0-9a-f]{16}…, modified meanwhile",
        ),
        (lambda file: file.unlink(), "the file is gone"),
        (lambda file: os.replace(shutil.copy2(file, f"{file}.new"), file), "another file"),
    ],
    ids=["touched", "appended to", "removed", "replaced"],
)
def test_a_file_that_changes_meanwhile(
    copied_demo: Path, change: Callable[[Path], Any], observed: str
) -> None:
    proof = prove(copied_demo, 2, on_step=at("exited", lambda pids: change(copied_demo)))
    assert verdicts(proof) == dict.fromkeys(IDS, "proven") | {"file-unchanged": "refuted"}
    assert re.fullmatch(f".*{observed}", claim(proof, "file-unchanged").observed)


@pytest.mark.parametrize(
    ("change", "observed"),
    [
        (
            lambda file: os.truncate(file, 1 << 42),
            r"4,398,046,511,104 bytes, SHA-256 [0-9a-f]{16}… without its holes, modified meanwhile",
        ),
        (lambda file: (file.unlink(), os.mkfifo(file)), "the file is gone"),
        (lambda file: (file.unlink(), file.symlink_to("/dev/zero")), "the file is gone"),
    ],
    ids=["a hole", "a pipe", "a device"],
)
def test_what_has_come_in_the_place_of_the_file_is_neither_waited_for_nor_read(
    copied_demo: Path, change: Callable[[Path], Any], observed: str
) -> None:
    signal.alarm(60)
    try:
        proof = prove(copied_demo, 2, on_step=at("exited", lambda pids: change(copied_demo)))
    finally:
        signal.alarm(0)
    assert re.fullmatch(observed, claim(proof, "file-unchanged").observed)


def test_a_file_with_a_hole_is_as_it_was(copied_demo: Path) -> None:
    os.truncate(copied_demo, 1 << 42)
    finding = claim(prove(copied_demo, 2), "file-unchanged")
    assert (finding.verdict, finding.observed) == ("proven", "the same")
    assert "without its holes" in finding.expected


# ------------------------------------------------------------------------------------------ what goes wrong
@pytest.mark.parametrize("step", NAMES)
def test_a_worker_killed_at_any_step(demo: Path, step: str) -> None:
    met: list[int] = []

    def kill_the_second(pids: tuple[int, ...]) -> None:
        met.extend(pids)
        os.kill(pids[1], signal.SIGKILL)
        os.waitid(os.P_PID, pids[1], os.WEXITED | os.WNOWAIT)  # dead, not about to die

    with pytest.raises(WorkerError, match=rf"^step {step}: worker 2 of 3 \(pid \d+\) was killed by SIGKILL"):
        prove(demo, 3, on_step=at(step, kill_the_second))
    assert len(met) == 3
    assert not any(map(lives, met))


def test_an_interrupt_leaves_nobody(demo: Path) -> None:
    met: list[int] = []

    def interrupt(pids: tuple[int, ...]) -> None:
        met.extend(pids)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        prove(demo, 2, on_step=at("relocated", interrupt))
    assert len(met) == 2
    assert not any(map(lives, met))


def test_what_cannot_be_loaded_is_the_loader_s_own_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 processes: expected at least 2"):
        prove("libz.so.1", 1)
    with pytest.raises(ElfError, match="expected a regular file"):
        prove(tmp_path, 2)
    with pytest.raises(miniloader.LoadError, match="only once"):
        prove("libc.so.6", 2)
    with pytest.raises(miniloader.LoadError, match="no library of that name"):
        prove("libnonesuch.so.9", 2)


def test_a_level_that_does_not_work_here(demo: Path, as_nobody: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import miniloader.lab.proof.experiment as experiment

    monkeypatch.setattr("miniloader.kernel.probe.best_level", lambda: "flags")
    with pytest.raises(EvidenceError, match="evidence level frames: only flags works here"):
        prove(demo, 2, level="frames")
    monkeypatch.setattr(experiment, "best_level", lambda: "none")
    with pytest.raises(EvidenceError, match="/proc"):
        prove(demo, 2)


# --------------------------------------------------------------------------------------------------- JSON
def test_json_is_the_contract(demo: Path) -> None:
    proof = prove(demo, 3)
    value = json.loads(json.dumps(proof.to_json()))
    assert [process.keys() for process in value["processes"]] == [{"pid", "base"}] * 3
    assert [one["id"] for one in value["claims"]] == IDS
    assert all(
        {"id", "statement", "verdict", "observed", "expected"} <= one.keys() for one in value["claims"]
    )
    assert [step["name"] for step in value["steps"]] == NAMES
    pages = value["steps"][3]["pages"]
    assert [page["vaddr"] for page in pages] == [PAGE_SIZE * page for page in range(15)]
    assert pages[1]["state"] == ["shared"] * 3
    assert pages[1]["present"] == pages[1]["file"] == [True] * 3
    assert pages[5]["state"] == ["copied"] * 3
    assert pages[5]["file"] == [False] * 3
    gone = value["steps"][4]["pages"][1]
    assert (gone["present"][2], gone["file"][2], gone["frame"][2], gone["state"][2]) == (
        False,
        None,
        None,
        "absent",
    )
    if proof.evidence == "frames":
        assert len(set(pages[1]["frame"])) == 1
        assert len(set(pages[5]["frame"])) == 3
        assert pages[5]["map_count"] == [1] * 3
        assert all(word >> 12 & 1 for word in pages[5]["flags"])  # KPF_ANON
        assert not any(word >> 12 & 1 for word in pages[1]["flags"])


def test_json_without_pages(demo: Path) -> None:
    value = json.loads(json.dumps(prove(demo, 2, level="totals").to_json()))
    assert value["verdict"] == "unknown"
    assert all(claim["reason"] for claim in value["claims"][:3])
    assert value["steps"][3]["pages"] == []
    assert value["steps"][3]["totals"][0]["Rss"] == 12 * PAGE_SIZE
