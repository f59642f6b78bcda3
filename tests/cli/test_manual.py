"""The manual pages: one for each command, which groff and man render without a warning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from miniloader import cli
from miniloader.cli.manual import pages
from miniloader.cli.parser import build, commands_of

PARSER = build(cli.COMMANDS)
PAGES = pages(PARSER)


def test_there_is_one_for_each_command() -> None:
    assert set(PAGES) == {"miniloader.1", *(f"miniloader-{name}.1" for name in cli.COMMANDS)}


@pytest.mark.parametrize("name", PAGES)
def test_groff_has_nothing_to_warn_of(name: str) -> None:
    if shutil.which("groff") is None:
        pytest.skip("this machine lacks groff")
    command = ["groff", "-ww", "-man", "-Tutf8", "-rLL=80n"]
    done = subprocess.run(command, input=PAGES[name], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "EXIT STATUS" in re.sub("[^\n]\x08", "", done.stdout)  # bold is struck twice


@pytest.mark.parametrize("name", PAGES)
def test_man_shows_every_option_of_the_command(name: str, tmp_path: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("this machine lacks man")
    (tmp_path / name).write_text(PAGES[name])
    environment = os.environ | {"MANWIDTH": "80", "LC_ALL": "C.UTF-8", "MANROFFOPT": "-c"}
    command = ["man", "--warnings", "-l", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    page = name.removesuffix(".1").partition("-")[2]
    parser = commands_of(PARSER)[page] if page else PARSER
    shown = [option for action in parser._actions for option in action.option_strings if option != "--debug"]
    assert shown
    assert [option for option in shown if option not in done.stdout] == []
    assert "--debug" not in done.stdout
