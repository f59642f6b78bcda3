"""``audit --html``: what is in the page, and what happens when it cannot be made."""

from __future__ import annotations

import base64
import ctypes
import json
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import miniloader
from fixtures import build
from miniloader.evidence.sharing import STATES
from miniloader.kernel.probe import best_level
from tests.lab.audit.told_processes import told
from tests.memory import still_child

pytestmark = pytest.mark.skipif(
    best_level() not in ("frames", "flags"), reason="this kernel lacks a pagemap that tells of pages"
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniloader", "audit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)


def films(page: Path) -> list[dict[str, Any]]:
    """The data of the page's matrices."""
    packed = re.findall(r'class="data">([^<]+)</script>', page.read_text())
    return [json.loads(zlib.decompress(base64.b64decode(one))) for one in packed]


def load_and_write(demo: Path) -> None:
    miniloader.load(demo).function("demo_next", ctypes.c_long)()


@pytest.fixture(scope="module")
def pids(demo: Path) -> Iterator[tuple[int, int]]:
    with still_child(load_and_write, demo) as (one, _), still_child(load_and_write, demo) as (other, _):
        yield one, other


@pytest.mark.parametrize("level", [[], ["--level", "flags"]])
def test_a_page_draws_what_the_audit_counted(
    pids: tuple[int, int], demo: Path, tmp_path: Path, level: list[str]
) -> None:
    page = tmp_path / "page.html"
    done = run(*pids, "--library", demo.name, "--json", "--html", page, *level)
    assert (done.returncode, done.stderr) == (0, "")
    (library,) = json.loads(done.stdout)["libraries"]
    (film,) = films(page)
    assert film["pids"] == [one["pid"] for one in library["processes"]]
    assert [scene["name"] for scene in film["scenes"]] == ["now"]
    copied = {state.code for state in STATES if state.name.startswith("copied")}
    of_file = sum(stop - start for start, stop, name, _ in film["groups"] if "bss" not in name)
    for row, number in enumerate(film["scenes"][0]["cells"]):
        runs = film["encoded"][number]
        states = [
            value % 16 for count, value in zip(runs[::2], runs[1::2], strict=True) for _ in range(count)
        ]
        assert sum(state in copied for state in states[:of_file]) == library["processes"][row]["private"]
    causes = {start: text for start, _, heading, text in film["ranges"] if heading == "cause"}
    for private in library["private_pages"]:
        assert all(cause in causes[private["vaddr"] // film["page_size"]] for cause in private["causes"])


def test_the_files_that_a_row_stands_for_are_where_it_says(
    pids: tuple[int, int], demo: Path, tmp_path: Path
) -> None:
    """In a terminal they come after it, on the page before."""
    page = tmp_path / "page.html"
    assert run(*pids, "--library", demo.name, "--html", page).returncode == 0
    text = page.read_text()
    assert "1 file, above" in text
    assert text.index(f">{demo.name}") < text.index("1 file, above")
    assert "below" not in text[text.index("1 file, above") :][:100]


def test_two_looks_are_two_steps(pids: tuple[int, int], demo: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run(*pids, "--library", demo.name, "--every", "200ms", "--for", "300ms", "--html", page)
    assert (done.returncode, done.stderr) == (0, "")
    (film,) = films(page)
    names = [scene["name"] for scene in film["scenes"]]
    assert names[0] == "start"
    assert re.fullmatch(r"\d+ s later", names[1])
    assert len(names) == 3  # one look between, at 200 ms


def test_over_time_there_is_a_curve(demo: Path, tmp_path: Path) -> None:
    """Each look is a point as high as its memory, also in a table; a fork is marked; steps are bounded."""
    page, lines = tmp_path / "page.html", list[dict[str, Any]]()
    fork = "child = os.fork()\nif child == 0:\n    while True: signal.pause()"
    with told("answer = 0", f"lib = ctypes.CDLL({str(demo)!r})") as parent:
        command = [sys.executable, "-m", "miniloader", "audit", str(parent.pid), "--every", "50ms", "--json"]
        with subprocess.Popen(
            [*command, "--library", demo.name, "--html", str(page)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=build.ROOT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for number in range(16):
                lines.append(json.loads(process.stdout.readline()))
                if number == 8:
                    parent(fork)
            process.send_signal(signal.SIGINT)
            lines += map(json.loads, process.communicate()[0].splitlines())
        parent("os.kill(child, 9); os.waitpid(child, 0)")
    text = page.read_text()
    points = dict(re.findall(r'class="line-(rss|uss|eroded)" points="([^"]+)"', text))
    assert ("eroded" in points) == (lines[0]["level"] == "frames")
    for column, drawn in points.items():
        heights = [220 - float(point.partition(",")[2]) for point in drawn.split()][1:]  # all but the start
        sums = [
            sum(row["proven"] for row in look["erosion"])
            if column == "eroded"
            else sum(process[column] for process in look["processes"] if process["memory_of"] is None)
            for look in lines
        ]
        top = max(sum(process["rss"] for process in look["processes"]) for look in lines)
        assert heights == pytest.approx([number / top * 220 for number in sums], abs=0.1)
    marks = re.findall(r"<title>(\d+) s: forked (\d+)</title>", text)
    assert [int(pid) for _, pid in marks] == _children(lines, parent.pid)
    assert re.search(rf"<td>forked {marks[0][1]}</td>", text)
    (film,) = films(page)
    assert 6 <= len(film["scenes"]) <= 12 < len(lines)
    assert film["scenes"][0]["name"] == "start"


def _children(looks: list[dict[str, Any]], parent: int) -> list[int]:
    return sorted({process["pid"] for look in looks for process in look["processes"]} - {parent})


def test_files_that_are_no_images_are_told_and_not_drawn(pids: tuple[int, int], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run(*pids, "--no-causes", "--html", page)
    assert done.returncode == 0
    assert 0 < len(films(page)) <= 6
    assert "libdemo.so" in page.read_text()


def test_nothing_to_draw_is_a_page_all_the_same(pids: tuple[int, int], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run(pids[0], "--library", "no such library", "--html", page)
    assert done.returncode == 0
    assert films(page) == []


def test_what_cannot_be(pids: tuple[int, int], demo: Path, tmp_path: Path) -> None:
    missing = run(pids[0], "--library", demo.name, "--html", tmp_path / "none" / "page.html")
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
    assert "cannot write the page: No such file" in missing.stderr
    both = run(pids[0], "--library", demo.name, "--page", "0", "--html", tmp_path / "page.html")
    assert both.returncode == 2
    assert "--html and --page: one of them" in both.stderr
    assert not list(tmp_path.iterdir())
