"""The command as a user runs it: as root and not, wide and narrow, piped, and without /proc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from miniloader.cli import main
from miniloader.kernel.features import FEATURES, LEVELS

DOCTOR = [sys.executable, "-m", "miniloader", "doctor"]


def test_json_has_the_keys_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "kernel", "architecture", "page_size", "loading", "compiled_code", "privileges", "features",
        "evidence", "shows", "next",
    ]  # fmt: skip
    assert found["kernel"] == os.uname().release
    assert found["page_size"] == os.sysconf("SC_PAGE_SIZE")
    assert [one["name"] for one in found["features"]] == [feature.name for feature in FEATURES]
    assert all(set(one) == {"name", "works", "what", "why", "get"} for one in found["features"])
    assert found["evidence"] in {level.name for level in LEVELS}
    assert found["next"] is None or set(found["next"]) == {"evidence", "shows", "get"}
    assert found["privileges"]["uid"] == os.geteuid()


def test_an_ordinary_user_is_told_how_to_get_more(as_nobody) -> None:
    assert main(["doctor"]) == 0  # imports what the child, then without the right to, would import

    def look() -> str:
        import contextlib
        import io

        with contextlib.redirect_stdout(text := io.StringIO()):
            assert main(["doctor"]) == 0
        return text.getvalue()

    text = " ".join(as_nobody(look).split())
    assert "Evidence here: flags" in text
    assert "Next level: frames" in text
    assert "To get it: run as root, or with CAP_SYS_ADMIN" in text
    assert "CAP_SYS_ADMIN no: to see page frame numbers" in text


@pytest.mark.parametrize("columns", ["80", "40"])
def test_a_pipe_gets_plain_text_that_fits(columns: str) -> None:
    done = subprocess.run(
        DOCTOR, capture_output=True, text=True, env=os.environ | {"COLUMNS": columns}, check=True
    )
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= int(columns)
    for feature in FEATURES:
        assert feature.name in done.stdout


def in_terminal(environment: dict[str, str]) -> str:
    """What doctor prints on a terminal of its own."""
    script = shutil.which("script")
    if script is None:
        pytest.skip("this machine lacks script(1)")
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [script, "-qec", " ".join(DOCTOR), "/dev/null"],
        env=clean | {"TERM": "xterm-256color"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_colour_on_a_terminal_unless_refused() -> None:
    green = "\x1b[38;5;"
    assert green in in_terminal({})
    assert green not in in_terminal({"NO_COLOR": "1"})


def test_help_lists_what_is_probed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    for row in (*FEATURES, *LEVELS):
        assert row.name in text


@pytest.mark.needs_root("it unmounts /proc in a namespace of its own")
def test_without_proc_it_says_so(own_mounts: list[str]) -> None:
    done = subprocess.run(
        [*own_mounts, 'umount -l /proc && exec "$@"', "sh", *DOCTOR],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "miniloader: /proc: not mounted here; mount it: mount -t proc proc /proc\n"


def test_wrong_usage() -> None:
    assert main(["doctor", "nonsense"]) == 2
