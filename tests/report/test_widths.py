"""Nothing is cut: at any width every number is shown whole; signs and colours that all can see."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

import miniloader
from fixtures import build
from miniloader import cli
from miniloader.cli import load as load_command
from miniloader.cli import run as run_command
from miniloader.cli.parser import build as build_parser
from miniloader.loader.running.bill import Bill
from miniloader.report.output import COLOURS, Output
from miniloader.report.signs import SIGNS, spelled
from miniloader.report.text import Part, laid_out, plain
from tests.loader.conftest import call_in_child

WIDTHS = (40, 60, 80, 120, 200)
ROOT = Path(miniloader.__file__).parent
NUMBER = re.compile(r"0x[0-9a-f]+|(?<![0-9A-Za-z])[0-9a-f]{6,}(?![0-9A-Za-z])|\d+(?:[.,]\d+)*")
DEMO, SAVED = "{demo}", "{saved}"

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("inspect", "libcrypto.so.3", "--checks", "--search"),
    ("inspect", "libz.so.1", "--symbols"),
    ("tree", "libcrypto.so.3"),
    ("check", "libcrypto.so.3", "libz.so.1"),
    ("disasm", "libcrypto.so.3", "SHA256"),
    ("load", "libcrypto.so.3"),
    ("run", "--bill", "/dev/stdout", "-c", "import _decimal, _sqlite3"),
    ("prove", DEMO, "-n", "2", "--steps"),
    ("audit", str(os.getpid()), "--library", "libcrypto"),
    ("diff", SAVED, SAVED),
    ("walkthrough",),
    ("walkthrough", "cow", "--no-pause"),
    ("cache",),
    ("doctor",),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("audit") / "saved.json"
    assert cli.main(["audit", str(os.getpid()), "--no-causes", "--save", str(path)]) == 0
    return str(path)


def bill() -> Bill:
    """In a child: who holds a handle of ours goes on asking us, and ctypes gives none back."""
    with miniloader.importing() as imports:
        ctypes.CDLL("libexpat.so.1")
        ctypes.CDLL("libcrypto.so.3")
    return imports.bill


def run_here(words: list[str]) -> None:
    """A command in this process: ``load``, too, which would load in a child, and the bill of ``run``."""
    if words[0] == "load":
        load_command._load(build_parser(["load"]).parse_args(words), lambda doing, runs_code=False: None)
    elif words[0] == "run":
        run_command._write(call_in_child(bill), "-", as_json=False)
    else:
        assert cli.main(words) == 0


def test_every_command_is_looked_at() -> None:
    shown = {words[0] for words in COMMANDS}
    assert shown | {"prepare"} >= set(cli.COMMANDS)  # prepare shows what cache does


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(w for w in words if not w.isdigit()))
def test_no_number_is_cut_at_any_width(
    command: tuple[str, ...], saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out at each width: the numbers are those of lines as long as they like."""
    monkeypatch.setenv("COLUMNS", "40")  # drawings are made for this width
    shown: list[Part] = []

    def show(self: Output, parts: Iterable[Part], *, wrap: bool = True) -> None:
        shown.extend(parts)

    monkeypatch.setattr(Output, "show", show)
    run_here([{DEMO: str(build.build("demo")), SAVED: saved}.get(word, word) for word in command])
    assert shown
    whole = "\n".join(plain(line) for line in laid_out(shown, None))
    for width in WIDTHS:
        lines = [plain(line) for line in laid_out(shown, width)]
        short = Counter(number for number in NUMBER.findall(whole) if len(number) <= width // 3)
        found = Counter(NUMBER.findall("\n".join(lines)))
        assert not short - found, (width, short - found)
        assert max(map(len, lines)) <= width


# ----------------------------------------------------------------------------------- signs and colours
def test_every_sign_of_ours_has_one_in_ascii() -> None:
    """Signs in comments and docstrings count as well: it costs nothing; letters are nobody's sign."""
    used = {sign for path in ROOT.glob("**/*.py") for sign in path.read_text() if not sign.isascii()}
    assert {sign for sign in used if not sign.isalpha()} - SIGNS.keys() == set()
    assert all(sign.isascii() for sign in SIGNS.values())
    assert spelled("✔ 2 × 3 ж") == "+ 2 x 3 \\u0436"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(w for w in words if not w.isdigit()))
def test_a_locale_with_few_signs(command: tuple[str, ...], encoding: str, saved: str) -> None:
    """No crash, nothing escaped; ``×`` stays where there is one."""
    words = [{DEMO: str(build.build("demo")), SAVED: saved}.get(word, word) for word in command]
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "miniloader", *words],
        capture_output=True, check=False, cwd=build.ROOT, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    assert "\\u" not in text
    assert "\\x" not in text.replace("\\x1b", "")


def luminance(colour: int) -> float:
    """Of one of the 256 colours, as WCAG 2 has it."""
    if colour >= 232:
        parts = [8 + (colour - 232) * 10] * 3
    else:
        steps = (0, 95, 135, 175, 215, 255)
        parts = [steps[(colour - 16) // weight % 6] for weight in (36, 6, 1)]
    linear = [part / 3294.6 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("name", "colour"), COLOURS.items())
def test_a_colour_is_legible_on_white_and_on_black(name: str, colour: str) -> None:
    """3 : 1 is what WCAG asks of what is not running text; terminals' own yellow has 1.1 : 1 on white."""
    light = luminance(int(colour.removeprefix("color(").removesuffix(")")))
    assert min(1.05 / (light + 0.05), (light + 0.05) / 0.05) >= 3.5
