"""The loops alone, under sanitizers of addresses and undefined behaviour (``tools/fuzz --native``)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.build import ROOT, build
from fixtures.sanitized import SEEDS, SOURCES, build_fuzzer, edges_of, fuzzed
from miniloader.native.gate import processor

_SAID = r"(\d+) runs, (\d+) edges, the last of them first in run (\d+)"


def seeds() -> list[Path]:
    return [build(name) for name in SEEDS]


def test_loops_read_and_write_where_they_may(tmp_path: Path) -> None:
    fuzzer = build_fuzzer(tmp_path)
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    status, said = fuzzed(fuzzer, seed=1, runs=3000, seconds=20, libraries=seeds())
    assert status == 0, said
    counts = re.fullmatch(_SAID, said)
    assert counts is not None
    assert int(counts[2]) > 700


def test_what_was_not_met_is_told_by_function_and_line(tmp_path: Path) -> None:
    fuzzer = build_fuzzer(tmp_path)
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    edges = tmp_path / "edges"
    status, said = fuzzed(fuzzer, seed=1, runs=30, seconds=20, libraries=seeds(), edges=str(edges))
    counts = re.fullmatch(_SAID, said)
    assert status == 0
    assert counts is not None
    every, unmet = edges_of(fuzzer, edges)
    assert every == int(counts[2]) + len(unmet)
    assert all(
        re.fullmatch(r"\w+ ((names|words|notes|link)\.c|loops\.h):\d+( .*)?", place) for place in unmet
    )
    edges.write_text("")
    assert any(place.startswith("put_symbolic words.c:") for place in edges_of(fuzzer, edges)[1])


def test_a_loop_that_looks_beyond_what_is_readable_is_found(tmp_path: Path) -> None:
    sources = tmp_path / "native"
    shutil.copytree(SOURCES, sources)
    header = sources / "loops.h"
    text = header.read_text()
    weaker = text.replace(" && size <= spans[i].end - vaddr)", ")")
    assert weaker != text
    header.write_text(weaker)
    fuzzer = build_fuzzer(tmp_path, sources)
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    status, said = fuzzed(fuzzer, seed=1, runs=3000, seconds=20, libraries=seeds())
    assert status != 0
    assert "AddressSanitizer" in said


@pytest.mark.parametrize(
    ("part", "right", "wrong"),
    [
        ("link.c", "inside(link->readable, link->table.readable_count, vaddr, count * each)", "true"),
        ("link.c", "(uint64_t)places[i] >= left.count", "false"),
        ("link.c", "link->load_count > MOST_LOADS ||", ""),
        ("link.c", "size > left.size", "!left.room"),
        ("link.c", "    left.turn++;\n", ""),
        ("link.c", "return link->noted_count <= MOST_NOTES;", "return true;"),
        ("link.c", "left.page_count <= MOST_PAGES", "true"),
        ("words.c", " && found < count", ""),
        # What changes while it is looked at, names that are too long, pages that are gone.
        (
            "words.c",
            "uint64_t symbol = ONCE(row->symbol);\n            if (symbol >= symbols)",
            "uint64_t symbol = ONCE(row->symbol);\n            if (false)",
        ),
        ("names.c", "return total > most;", "return false;"),
        ("names.c", "GUARDED(look_all_up", "return (look_all_up"),
    ],
)
def test_what_is_wrong_with_the_loops_is_found(part: str, right: str, wrong: str, tmp_path: Path) -> None:
    sources = tmp_path / "native"
    shutil.copytree(SOURCES, sources)
    text = (sources / part).read_text()
    assert text.count(right) == 1
    (sources / part).write_text(text.replace(right, wrong))
    fuzzer = build_fuzzer(tmp_path, sources)
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    status, said = fuzzed(fuzzer, seed=1, runs=30_000, seconds=60, libraries=seeds())
    assert status != 0, said
    assert re.search(
        "Sanitizer|runtime error|too long names are allowed|for another number of|written twice", said
    )


def test_what_stands_beside_the_loops(tmp_path: Path) -> None:
    """Answers, dlopen from inside, lazy binding, callbacks, the guard and the notes of faults."""
    fuzzer = build_fuzzer(tmp_path, harness="rooms.c")
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    status, said = fuzzed(fuzzer, seed=1, runs=1000, seconds=20)
    assert status == 0, said
    counts = re.search(_SAID + "$", said)
    assert counts is not None
    assert int(counts[2]) > 400


@pytest.mark.parametrize(
    ("room", "right", "wrong"),
    [
        ("host.c", "room->used + length <= room->size", "room->used + length <= room->size + 8"),
        ("host.c", "if (length <= left)", "if (length <= left + 8)"),
        ("prepared.c", "slots[i] > size - 8", "slots[i] > size"),
        ("objects.c", "before[BEFORE - 1 + block]", "before[BEFORE + block]"),
        ("objects.c", "i < MOST_STEPS_ON", "i < 2 * MOST_STEPS_ON"),
        ("objects.c", "found->met >= MOST_MET", "false"),
        ("objects.c", "search->arena = low - 1", "search->arena = low"),
        ("objects.c", " || whole == last", ""),
        ("objects.c", "marks[number] |= HOLDS;", ";"),
        ("arguments.c", "interface.close(&buffers[--opened])", "--opened"),
        ("arguments.c", "!interface.error()", "false"),
        ("inside.c", "visitor.left = interface.let_go();", ";"),
        ("inside.c", "interface.take(visitor.left);", ";"),
        ("inside.c", "frame > here && ", ""),
        ("inside.c", "ours.sa_handler = function;", ";"),
        ("inside.c", "interface.handler(i);", ";"),
        ("inside.c", "interface.raise(earlier.type, earlier.value, earlier.traceback);", ";"),
        ("lazy.c", '"mov $0xee, %eax\\n" save', '"mov $0xe0, %eax\\n" save'),
    ],
)
def test_what_is_wrong_beside_them_is_found(room: str, right: str, wrong: str, tmp_path: Path) -> None:
    if room == "lazy.c" and processor() != "x86_64":
        pytest.skip("this machine lacks the registers that are spoiled")
    sources = tmp_path / "native"
    shutil.copytree(SOURCES, sources)
    text = (sources / room).read_text()
    assert text.count(right) >= 1
    (sources / room).write_text(text.replace(right, wrong))
    fuzzer = build_fuzzer(tmp_path, sources, "rooms.c")
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    status, said = fuzzed(fuzzer, seed=1, runs=3000, seconds=20)
    assert status != 0
    assert "Assertion" in said or "AddressSanitizer" in said


#: A sanitizer told handle_sigbus=2 and handle_segv=2: who installs a handler is told that it has been done.
_KEEPS_SIGNALS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
int sigaction(int number, const struct sigaction *wanted, struct sigaction *found)
{
    int (*real)(int, const struct sigaction *, struct sigaction *) = dlsym(RTLD_NEXT, "sigaction");
    return real(number, number == SIGBUS || number == SIGSEGV ? 0 : wanted, found);
}
"""


def test_who_keeps_the_signals_to_itself_is_noticed_and_said(demo: Path, tmp_path: Path) -> None:
    keeper = tmp_path / "keeper.so"
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(keeper), "-ldl"]
    subprocess.run(command, input=_KEEPS_SIGNALS.encode(), check=True)
    for preloaded in ({}, {"LD_PRELOAD": str(keeper)}):
        command = [sys.executable, "-m", "miniloader", "load", str(demo)]
        done = subprocess.run(
            command, env=os.environ | preloaded, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        said = "SIGBUS or SIGSEGV is kept by somebody else here" in done.stderr
        assert said == bool(preloaded)
