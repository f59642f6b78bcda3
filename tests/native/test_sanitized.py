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
from fixtures.sanitized import SOURCES, build_fuzzer, fuzzed


def test_loops_read_and_write_where_they_may(tmp_path: Path) -> None:
    fuzzer = build_fuzzer(tmp_path)
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    status, said = fuzzed(fuzzer, build("demo"), seed=1, runs=3000, seconds=20)
    assert status == 0, said
    counts = re.fullmatch(r"(\d+) runs, (\d+) edges", said)
    assert counts is not None
    assert int(counts[2]) > 400


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
    status, said = fuzzed(fuzzer, build("demo"), seed=1, runs=3000, seconds=20)
    assert status != 0
    assert "AddressSanitizer" in said


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
