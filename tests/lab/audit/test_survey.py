"""One look at one process that changes meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from miniloader.errors import ProcessGone
from miniloader.kernel.pagemap import PageMap
from miniloader.lab.audit.survey import Memo, survey

_VFORK = """
#include <stdio.h>
#include <unistd.h>
int main(void) {
    char byte;
    if (vfork() == 0) {
        printf("%d\\n", getpid()), fflush(stdout);
        if (read(0, &byte, 1) == 1) execl("/bin/sleep", "sleep", "20", (char *)0);
        _exit(1);
    }
    return pause();
}
"""


def test_a_child_by_vfork_that_executes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening of its page table, which is its parent's and lives on, and the reading of maps."""
    (tmp_path / "vfork.c").write_text(_VFORK)
    subprocess.run(["gcc", "-O0", "-o", tmp_path / "vfork", tmp_path / "vfork.c"], check=True)
    original = PageMap.__init__
    with subprocess.Popen(
        [tmp_path / "vfork"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        child = int(parent.stdout.readline())

        def executes(self: PageMap, pid: int | None = None) -> None:
            original(self, pid)
            assert parent.stdin is not None
            parent.stdin.write(b"x")
            while Path(f"/proc/{child}/comm").read_text() != "sleep\n":
                time.sleep(0.01)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(PageMap, "__init__", executes)
                with pytest.raises(ProcessGone, match="has executed another program"):
                    survey(child, Memo())
            assert survey(child, Memo()).known.name == "sleep"
        finally:
            os.kill(child, signal.SIGKILL)
            parent.kill()
