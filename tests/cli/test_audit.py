"""``miniloader audit`` as it is used: what it prints, how it exits, how it is interrupted."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fixtures import build
from miniloader.kernel.frames import has_merged
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.result import Audit
from miniloader.report.numbers import size
from tests.lab.audit.told_processes import Told, told, told_children

_COMMAND = [sys.executable, "-m", "miniloader"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=build.ROOT,
        env={**os.environ, "COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def family() -> Iterator[tuple[Told, list[int]]]:
    """A process with the demonstration library, and its two children."""
    path = str(build.build("demo"))
    with told(f"lib = ctypes.CDLL({path!r})") as parent, told_children(parent, 2) as children:
        yield parent, children


def test_the_answer_comes_first(family: tuple[Told, list[int]]) -> None:
    parent, _ = family
    done = run("audit", "--tree", parent.pid)
    assert (done.returncode, done.stderr) == (0, "")
    first = done.stdout.splitlines()[0]
    assert re.match(r"3 processes: .* in proportion \(PSS\), of it .* their own \(USS\); RSS ", first)
    assert ", where separate copies would take " in done.stdout
    assert "evidence: " in done.stdout
    assert "libdemo.so: 0 own pages in each process: 4 besides, copied, are still shared" in done.stdout
    assert any(row.split()[:1] == [str(parent.pid)] for row in done.stdout.splitlines())


def test_processes_are_told_in_sizes_and_nothing_that_is_said_is_called_hidden(
    family: tuple[Told, list[int]],
) -> None:
    """A count of pages beside sizes is read as one: "1,536 in huge pages" as so many huge ones."""
    parent, _ = family
    done = run("audit", parent.pid, "--level", "flags")
    assert re.search(r": [0-9.]+ [KM]iB in proportion \(PSS\)", done.stdout)
    assert "PSS and who" not in done.stdout
    (process,) = json.loads(run("audit", parent.pid, "--json", "--no-causes").stdout)["processes"]
    (row,) = [line for line in done.stdout.splitlines() if line.startswith(str(parent.pid))]
    assert size(process["anonymous"] * PAGE_SIZE) in row


def test_json_keeps_its_keys(family: tuple[Told, list[int]], demo: Path) -> None:
    parent, children = family
    done = run("audit", parent.pid, *children, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    assert value["unreadable"] == []
    (library,) = [one for one in value["libraries"] if one["path"] == str(demo)]
    assert {"path", "build_id", "processes", "private_pages"} <= library.keys()
    assert [row["pid"] for row in library["processes"]] == [parent.pid, *children]
    for row in library["processes"]:
        assert {"pid", "base", "present", "shared", "private", "bss"} <= row.keys()
        merged = row.pop("merged")
        assert all(isinstance(number, int) for number in row.values())
        assert merged == 0 or (merged is None and has_merged())  # by another test, for pages of its own
        assert row["present"] == row["shared"] + row["private"]
    for page in library["private_pages"]:
        assert {"vaddr", "section", "symbols", "causes", "pids"} <= page.keys()
        assert page["pids"] == [parent.pid, *children]
        assert page["vaddr"] % PAGE_SIZE == 0
    assert Audit.from_json(value).library(str(demo)).present == sum(
        row["present"] for row in library["processes"]
    )


def test_csv_has_a_row_for_each_library_and_process(family: tuple[Told, list[int]], demo: Path) -> None:
    parent, children = family
    done = run("audit", "--tree", parent.pid, "--csv", "--no-causes")
    rows = [row for row in csv.DictReader(done.stdout.splitlines()) if row["path"] == str(demo)]
    assert sorted(int(row["pid"]) for row in rows) == sorted([parent.pid, *children])
    assert all(int(row["present"]) == int(row["shared"]) + int(row["private"]) for row in rows)


def test_csv_has_rows_of_processes_and_of_mappings(family: tuple[Told, list[int]]) -> None:
    parent, children = family
    pids = sorted([parent.pid, *children])
    processes = run("audit", "--tree", parent.pid, "--csv", "processes", "--no-causes")
    rows = list(csv.DictReader(processes.stdout.splitlines()))
    assert sorted(int(row["pid"]) for row in rows) == pids
    mappings = run("audit", "--tree", parent.pid, "--csv", "mappings", "--no-causes")
    heaps = [row for row in csv.DictReader(mappings.stdout.splitlines()) if row["kind"] == "heap"]
    assert sorted(int(row["pid"]) for row in heaps) == pids
    for row in heaps:
        parts = sum(int(row[column]) for column in ("own", "inherited", "shared"))
        assert int(row["resident"]) == parts > 0
    plain = run("audit", "--csv", parent.pid)  # a number behind it is a process, as it always was
    assert {row["pid"] for row in csv.DictReader(plain.stdout.splitlines())} == {str(parent.pid)}
    assert run("audit", parent.pid, "--csv", "everything").returncode == 2


def test_grouped_with_totals(family: tuple[Told, list[int]]) -> None:
    """A row for each group and the sum; the same numbers in text, JSON and CSV."""
    parent, children = family
    done = run("audit", "--tree", parent.pid, "--by", "command", "--no-causes")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    everybody = next(row for row in rows if row[:1] == ["all"])
    assert everybody[1] == "3"
    value = json.loads(run("audit", "--tree", parent.pid, "--by", "command", "--no-causes", "--json").stdout)
    (group,) = value["groups"]
    assert group["pids"] == sorted([parent.pid, *children])
    assert group["uss"] == sum(process["uss"] for process in value["processes"])
    assert group["name"] == value["processes"][0]["command"]
    printed = run("audit", "--tree", parent.pid, "--by", "name", "--no-causes", "--csv", "groups").stdout
    (record,) = csv.DictReader(printed.splitlines())
    assert (record["name"], record["processes"]) == (value["processes"][0]["name"], "3")


def test_metrics_for_a_collector(family: tuple[Told, list[int]], tmp_path: Path) -> None:
    """On standard output alone, or in a file that each look of --every writes anew."""
    parent, _ = family
    done = run("audit", parent.pid, "--no-causes", "--openmetrics", "-", "--by", "user")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# HELP ")
    assert done.stdout.endswith("\n# EOF\n")
    assert 'miniloader_group_uss_bytes{by="user"' in done.stdout
    path = tmp_path / "pool.prom"
    done = run("audit", parent.pid, "--every", "100ms", "--for", "250ms", "--openmetrics", path)
    assert f"The metrics are {path}" in done.stdout
    assert path.read_text().endswith("\n# EOF\n")
    nowhere = run("audit", parent.pid, "--no-causes", "--openmetrics", tmp_path / "none" / "pool.prom")
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert "cannot write the metrics: No such file or directory" in nowhere.stderr
    both = run("audit", parent.pid, "--openmetrics", "-", "--csv")
    assert (both.returncode, both.stdout) == (2, "")


def test_whoever_cannot_be_audited_is_told_once_for_all(family: tuple[Told, list[int]]) -> None:
    parent, _ = family
    done = run("audit", parent.pid, 999_999_998, 999_999_999)
    assert "2 processes (999999998, 999999999): process PID: there is none (any more)" in done.stdout


def test_one_library_and_one_page(family: tuple[Told, list[int]], demo: Path) -> None:
    parent, _ = family
    done = run("audit", parent.pid, "--library", "libdemo*")
    assert done.returncode == 0
    assert "[heap]" not in done.stdout
    assert ".data.rel.ro" in done.stdout
    found = json.loads(run("audit", parent.pid, "--library", "libdemo*", "--json").stdout)
    assert [one["path"] for one in found["libraries"]] == [str(demo)]
    vaddr = next(
        page["vaddr"] for page in found["libraries"][0]["private_pages"] if page["section"] == ".data.rel.ro"
    )
    done = run("audit", parent.pid, "--library", "libdemo*", "--page", hex(vaddr))
    assert done.returncode == 0
    assert "demo_operations" in done.stdout
    view = json.loads(
        run("audit", parent.pid, "--library", "libdemo*", "--page", hex(vaddr), "--json").stdout
    )
    assert view["causes"] == ["relocation"]
    beside = run("audit", parent.pid, "--library", "libdemo*", "--page", hex(vaddr), "--every", "1s")
    assert (beside.returncode, beside.stdout) == (2, "")
    assert "--page needs one process, and goes without --every" in beside.stderr
    assert {word["symbol"] for word in view["words"]} == {"demo_operations"}


def test_over_time_and_saved(demo: Path, tmp_path: Path) -> None:
    """What is written between two looks is what differs; ``diff`` says the same of the saved files."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    with told(f"lib = ctypes.CDLL({str(demo)!r})") as one:
        assert run("audit", one.pid, "--save", before).returncode == 0
        one("lib.demo_next()")
        done = run("audit", one.pid, "--every", "100ms", "--for", "300ms", "--save", after)
        assert done.returncode == 0
        assert "as at the start" in done.stdout
        assert "no page went private" in done.stdout
    assert Audit.load(after).page_size == PAGE_SIZE
    done = run("diff", before, after)
    assert done.returncode == 0
    assert "1 page went private" in done.stdout
    assert "demo_counters" in done.stdout
    (change,) = json.loads(run("diff", before, after, "--json").stdout)["changes"]
    assert (change["path"], change["change"], change["causes"]) == (str(demo), "private", ["write"])


def test_over_time_the_family_is_followed() -> None:
    """Who is forked is looked at from then on, who executes or ends is told; JSON has one object a line."""
    grow = "import threading; block = []\ndef act():\n"
    grow += "    global child; child = os.fork()\n    if child == 0:\n        while True: signal.pause()\n"
    grow += "    block.append(b'x' * (8 << 20))\n"
    grow += "def end(): os.kill(child, 9); os.waitpid(child, 0)\n"
    with told(grow) as parent:
        command = [*_COMMAND, "audit", str(parent.pid), "--every", "300ms", "--no-causes", "--json"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=build.ROOT
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            parent("act(); answer = child")
            looks = [json.loads(process.stdout.readline()) for _ in range(2)]
            parent("end()")
            looks += [json.loads(process.stdout.readline()) for _ in range(2)]
            process.send_signal(signal.SIGINT)
            out, ticks = process.communicate()
    looks += [json.loads(line) for line in out.splitlines()]
    numbers = [len(look["processes"]) for look in looks]
    assert 2 in numbers
    assert numbers[-1] == 1
    assert {process["pid"] for look in looks for process in look["processes"]} >= {parent.pid}
    (child,) = {process["pid"] for look in looks for process in look["processes"]} - {parent.pid}
    assert f"forked {child}" in ticks
    assert f"ended {child}" in ticks
    assert "anonymous +8" in ticks or "heap +8" in ticks
    assert "changes" in looks[-1]


def test_over_time_on_a_terminal_the_table_is_all_that_is_shown(demo: Path) -> None:
    """However long a look takes: no line of progress comes between, which would leave the table standing."""
    slow = "from miniloader.report import progress; progress._PATIENCE = 0.0"
    start = f"{slow}; import sys; from miniloader.cli import main; sys.exit(main(sys.argv[1:]))"
    ours, theirs = pty.openpty()
    with told(f"lib = ctypes.CDLL({str(demo)!r})") as one, subprocess.Popen(
        [sys.executable, "-c", start, "audit", str(one.pid), "--every", "200ms", "--for", "700ms"],
        stdout=theirs, stderr=theirs, cwd=build.ROOT, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # EIO: the other side is closed
            while part := os.read(ours, 1 << 16):
                shown += part
        os.close(ours)
    assert process.returncode == 0
    on_its_screen = shown.split(b"\x1b[?1049h")[1].split(b"\x1b[?1049l")[0]
    assert len(on_its_screen.split(b"since start")) > 2 * 3  # two tables have such a column
    assert b"looking at processes" not in on_its_screen


@pytest.mark.parametrize("command", [("audit",), ("load", "libz.so.1", "--call", "zlibVersion()->str")])
def test_where_sigchld_is_ignored(command: tuple[str, ...]) -> None:
    """As some daemons leave it to whom they start: it survives exec(), and nobody could wait for a child."""
    ignored = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    ignored += "; os.execv(sys.executable, sys.argv[1:])"
    with told() as parent, told_children(parent, 29) as children:
        arguments = [*command, *(map(str, children) if command == ("audit",) else ())]
        done = subprocess.run(
            [sys.executable, "-c", ignored, *_COMMAND, *arguments],
            cwd=build.ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_who_ends_meanwhile_is_told_as_it_was(demo: Path, tmp_path: Path) -> None:
    with told(f"lib = ctypes.CDLL({str(demo)!r})") as one:
        saved = tmp_path / "last.json"
        command = [*_COMMAND, "audit", str(one.pid), "--every", "200ms", "--for", "60s", "--save", str(saved)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=build.ROOT) as done:
            assert done.stdout is not None
            first = done.stdout.readline()
            one.process.kill()
            out = first + done.communicate()[0]
    assert done.returncode == 0
    assert "all of them have ended" in out
    assert [process.pid for process in Audit.load(tmp_path / "last.json").processes] == [one.pid]


def test_csv_says_who_could_not_be_audited(family: tuple[Told, list[int]]) -> None:
    parent, _ = family
    done = run("audit", parent.pid, 999_999_999, "--csv")
    assert done.returncode == 0
    assert done.stdout.startswith("path,build_id,pid,")
    assert done.stderr == "not audited: 999999999: process 999999999: there is none (any more)\n"


def test_saved_audits_that_cannot_be_compared(family: tuple[Told, list[int]], tmp_path: Path) -> None:
    parent, _ = family
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    assert run("audit", parent.pid, "--save", good).returncode == 0
    value = json.loads(good.read_text())
    for change, said in (
        ({"page_size": 16384}, f"found pages of {PAGE_SIZE} and of 16384 bytes"),
        (
            {"libraries": [{"private_pages": [{"vaddr": "0"}]}]},
            f"{bad}: no audit as --save or --json writes it: ",
        ),
        ({"format": "older"}, f"{bad}: no audit: found format 'older', expected 'miniloader audit 1'"),
    ):
        bad.write_text(json.dumps(value | change))
        done = run("diff", good, bad)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_interrupted_it_ends_with_the_summary(demo: Path) -> None:
    with told(f"lib = ctypes.CDLL({str(demo)!r})") as one, subprocess.Popen(
        [*_COMMAND, "audit", str(one.pid), "--every", "100ms"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=build.ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()  # it has looked once more
        one("lib.demo_next()")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "stopped" in out
    assert "since the start" in out
    assert "1 page went private" in out
    assert "demo_counters" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no process"),
        (("1", "--for", "1s"), "--for needs --every"),
        (("1", "--csv", "--json"), "one of them"),
        (("1", "2", "--page", "0"), "one process"),
        (("x",), "no process number"),
        (("1", "--every", "soon"), "no time"),
        (("--user", "nobody-is-called-so"), "no such user"),
        (("1", "--csv", "groups"), "--csv groups needs --by"),
        (("1", "--by", "colour"), "--by: no 'colour'"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    done = run("audit", *arguments)
    assert done.returncode == 2
    assert message in (done.stdout if "--json" in arguments else done.stderr)
    assert "Traceback" not in done.stderr


def test_nobody_left_to_audit() -> None:
    with told() as one:
        pass
    done = run("audit", one.pid)
    assert done.returncode == 1
    assert done.stdout.startswith("not audited")  # and no sums of nothing


def test_what_is_saved_is_there_though_nobody_reads_the_rest(tmp_path: Path, demo: Path) -> None:
    saved = tmp_path / "saved.json"
    with told(f"lib = ctypes.CDLL({str(demo)!r})") as one:
        reading, writing = os.pipe()
        os.close(reading)
        command = [*_COMMAND, "audit", str(one.pid), "--save", str(saved)]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, cwd=build.ROOT)
        os.close(writing)
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    assert [found.pid for found in Audit.load(saved).processes] == [one.pid]
