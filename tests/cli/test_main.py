"""The frame of the command line: errors, exit statuses, what is imported when."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import miniloader
from miniloader import cli, shortage
from miniloader.errors import ElfError, EvidenceError, MiniloaderError, SymbolError, UsageError

HEAVY = {"numpy", "capstone", "elftools", "rich", "jinja2", "shtab"}
ROOT = Path(miniloader.__file__).parent.parent

USAGE = "usage: miniloader fake [-h] [--json] [FILE]"

Run = Callable[[argparse.Namespace], int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Run], None]]:
    """``command(run)``: the command line knows one command, ``fake``, which does ``run``."""

    def install(run: Run) -> None:
        module = types.ModuleType("miniloader.cli.fake")
        module.HELP = "a command of the tests"  # type: ignore[attr-defined]
        module.configure = lambda parser: parser.add_argument("file", metavar="FILE", nargs="?")  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "miniloader.cli.fake", module)
        monkeypatch.setattr(cli, "COMMANDS", ("fake",))

    return install


def raising(error: BaseException) -> Run:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


def miniloader_process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniloader", *arguments]
    return subprocess.run(command, text=True, check=False, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------- exit statuses
@pytest.mark.parametrize("status", [0, 1, 3])
def test_the_exit_status_is_the_commands(command: Callable[[Run], None], status: int) -> None:
    command(lambda arguments: status)
    assert cli.main(["fake"]) == status


def test_an_interrupt_that_python_hides_comes_again(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is raised in a callback is told and no more: whoever pressed Ctrl-C would wait on."""

    class Watched: ...

    def run(_: argparse.Namespace) -> int:
        watched = Watched()
        callback = weakref.ref(watched, lambda _: signal.raise_signal(signal.SIGINT))
        del watched
        assert callback() is None
        time.sleep(20)
        return 0

    command(run)
    hook, start = sys.unraisablehook, time.monotonic()
    assert cli.main(["fake"]) == 130
    assert time.monotonic() - start < 10
    assert capsys.readouterr() == ("", "miniloader: interrupted\n")
    assert sys.unraisablehook is hook


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MiniloaderError("cannot"), 1, "cannot"),
        (
            ElfError("a.so", "e_machine", "EM_ARM", "EM_X86_64", hint="use inspect"),
            1,
            "a.so: e_machine: found EM_ARM, expected EM_X86_64; use inspect",
        ),
        (SymbolError("no such\nname \x1b[31m"), 1, "no such\\nname \\x1b[31m"),
        (UsageError("a number, please"), 2, "a number, please"),
        (
            PermissionError(1, "Operation not permitted"),
            1,
            "Operation not permitted: a system call is forbidden here (seccomp?); --debug shows which",
        ),
        (
            OSError(38, "Function not implemented"),
            1,
            "Function not implemented: a system call is forbidden here (seccomp?); --debug shows which",
        ),
        (EvidenceError("/proc is not there"), 3, "/proc is not there"),
        (
            FileNotFoundError(2, "No such file or directory", "x\n\x07.so"),
            1,
            "x\\n\\x07.so: No such file or directory",
        ),
        (IsADirectoryError(21, "Is a directory", b"/tmp/\xff"), 1, "/tmp/\\udcff: Is a directory"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            MemoryError(),
            1,
            "too little memory (ulimit -v, a control group, vm.overcommit_memory, vm.max_map_count)",
        ),
        (
            ImportError("READ THIS\nfor: libx.so.3: failed to map segment from shared object\n"),
            1,
            "libx.so.3: too little memory, or too few mappings"
            " (ulimit -v, a control group, vm.overcommit_memory, vm.max_map_count)",
        ),
        (
            ImportError("libx.so.3: undefined symbol: f"),
            1,
            "a fault of miniloader's own, ImportError: libx.so.3: undefined symbol: f; --debug shows where",
        ),
        (
            ModuleNotFoundError("No module named 'elftools'", name="elftools"),
            3,
            "this Python lacks pyelftools, which miniloader needs; "
            f"{sys.executable} -m pip install pyelftools",
        ),
        (
            ModuleNotFoundError("gone", name="miniloader.gone"),
            1,
            "a fault of miniloader's own, ModuleNotFoundError: gone; --debug shows where",
        ),
        (
            ZeroDivisionError("division by zero"),
            1,
            "a fault of miniloader's own, ZeroDivisionError: division by zero; --debug shows where",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line(
    command: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    command(raising(error))
    assert cli.main(["fake"]) == status
    assert capsys.readouterr() == ("", f"miniloader: {line}\n")

    assert cli.main(["fake", "--json"]) == status
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"kind": type(error).__name__, "message": line}}
    assert err == f"miniloader: {line}\n"


def test_debug_lets_the_traceback_through(command: Callable[[Run], None]) -> None:
    command(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake", "--debug"])


@pytest.mark.parametrize(
    "words", [["fake", "--nonsense"], ["nonsense"], ["--nonsense"], ["fake", "one", "two"]], ids=" ".join
)
def test_wrong_usage_is_one_line_and_2(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    command(lambda arguments: 0)
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("miniloader: ")
    assert err.count("\n") == 1
    assert "--help" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fak"], "no command 'fak'; did you mean fake?; see miniloader --help"),
        (
            ["fake", "--jsn"],
            "unknown option --jsn; did you mean --json?; usage: miniloader fake [-h] [--json] [FILE];",
        ),
        (
            ["fake", "a", "b"],
            "unexpected b; usage: miniloader fake [-h] [--json] [FILE]; see miniloader fake --help",
        ),
        (["--versio=3"], "argument -V/--version: ignored explicit argument '3'"),
        (["--json", "fake"], "unknown option --json; miniloader fake has it: write it behind fake; usage:"),
        (["--wersion"], "unknown option --wersion; did you mean --version?; usage: miniloader [-h]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_was_meant_and_what_there_is(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    command(lambda arguments: 0)
    assert cli.main(words) == 2
    assert f"miniloader: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["help", "fake"], ["fake", "--help"], ["fake", "-h"]], ids=" ".join)
def test_help_of_a_command(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    command(lambda arguments: 0)
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("usage: miniloader fake")


def test_help_alone_is_that_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    assert "130 interrupted" in " ".join(shown.split())


def test_no_command_prints_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: miniloader")


def test_every_command_has_help_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
        out, _ = capsys.readouterr()
        assert "--json" in out
        assert "--debug" not in out


# ---------------------------------------------------------------------------------------------- output
@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert cli.main([word]) == 0
    assert capsys.readouterr().out == f"miniloader {miniloader.__version__}\n"


def test_python_m_miniloader() -> None:
    done = miniloader_process("--version", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, f"miniloader {miniloader.__version__}\n")


ENDING = """
import atexit, ctypes, sys, threading, weakref
from miniloader import cli
class Value: pass
value = Value()
ctypes.CDLL(None).puts(b"written by C")
atexit.register(print, "at exit")
weakref.finalize(value, print, "finalized")
threading.Thread(target=lambda: (threading.main_thread().join(), print("a thread has ended"))).start()
sys.argv[1:] = ["audit", "99999999"]
cli.main()
print("taken down")
"""


def test_a_process_ends_with_all_that_belongs_to_an_end() -> None:
    """It is not taken down: threads are awaited, exit functions called, what C has printed is written."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # which has C print at once, too
    command = [sys.executable, "-c", ENDING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[-4:] == ["a thread has ended", "finalized", "at exit", "written by C"]
    assert "taken down" not in lines


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as pipe:
        done = miniloader_process("--completion", "bash", stdout=pipe)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_is_one_line(buffered: bool) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    with open("/dev/full", "w") as full:
        done = miniloader_process("--version", stdout=full, env=environment)
    assert (done.returncode, done.stderr) == (1, "miniloader: No space left on device\n")


def test_closed_standard_output() -> None:
    done = subprocess.run(["sh", "-c", '"$0" -m miniloader --version >&-', sys.executable], check=False)
    assert done.returncode == 0


def test_what_the_locale_cannot_print_is_spelled(
    command: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(arguments: argparse.Namespace) -> int:
        print("4 × one page")
        return 0

    command(run)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["fake"]) == 0
    assert written.getvalue() == b"4 x one page\n"


# ------------------------------------------------------------------------------------------ completion
@pytest.mark.parametrize("shell", ["bash", "fish", "zsh", "tcsh"])
def test_completion(command: Callable[[Run], None], capsys: pytest.CaptureFixture[str], shell: str) -> None:
    command(lambda arguments: 0)
    assert cli.main(["--completion", shell]) == 0
    out, err = capsys.readouterr()
    assert "fake" in out
    assert err == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="this machine lacks bash")
def test_bash_completes_commands_and_files(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(lambda arguments: 0)
    assert cli.main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    complete_line = """
        function=$(complete -p miniloader | sed 's/.*-F //; s/ .*//')
        COMP_WORDS=(miniloader "$@") COMP_CWORD=$#
        "$function"
        printf '%s\\n' "${COMPREPLY[@]}"
    """

    def complete(*words: str) -> list[str]:
        command = ["bash", "-c", script + complete_line, "bash", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
        return [word.rstrip("/ ") for word in done.stdout.split()]

    assert complete("fa") == ["fake"]
    assert "--json" in complete("fake", "--j")
    assert "proc" in complete("fake", "pro")


@pytest.mark.skipif(shutil.which("fish") is None, reason="this machine lacks fish")
def test_fish_completes_commands_options_choices_and_files(tmp_path: Path) -> None:
    script = tmp_path / "miniloader.fish"
    script.write_text(miniloader_process("--completion", "fish", stdout=subprocess.PIPE).stdout)

    def complete(words: str) -> list[str]:
        command = ["fish", "-N", "-c", f"source {script}; complete -C '{words}'"]
        environment = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True, env=environment)
        assert done.stderr == ""
        return [line.partition("\t")[0] for line in done.stdout.splitlines()]

    assert complete("miniloader pro") == ["prove"]
    assert complete("miniloader prove --prep") == ["--prepared"]  # --pre would be --processes, too
    assert sorted(complete("miniloader audit --level ")) == ["flags", "frames"]
    assert "/proc/" in complete("miniloader inspect /pro")
    assert "--debug" not in complete("miniloader prove --")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="this machine lacks zsh")
def test_zsh_completes_commands_and_options(tmp_path: Path) -> None:
    """At a terminal of its own: zsh completes only where somebody types."""
    script = tmp_path / "_miniloader"
    script.write_text(miniloader_process("--completion", "zsh", stdout=subprocess.PIPE).stdout)

    def complete(words: str) -> str:
        typed = (
            "autoload -Uz compinit && compinit -u -D; zmodload zsh/zpty; "
            "zpty shell zsh -f -i; "
            f"zpty -w shell 'PROMPT=; fpath=({tmp_path} $fpath); autoload -Uz compinit && compinit -u -D'; "
            "sleep 3; "
            f"zpty -n -w shell '{words}'$'\t'; sleep 3; zpty -r -t shell shown '*' ; "
            "while zpty -r -t shell more; do shown+=$more; done; print -r -- $shown; zpty -d shell"
        )
        environment = os.environ | {"HOME": str(tmp_path), "TERM": "xterm"}
        command = ["zsh", "-f", "-c", typed]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)

    assert "miniloader prove " in complete("miniloader pro")
    assert "--prepared " in complete("miniloader prove --prep")


def test_an_unknown_shell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--completion", "cmd.exe"]) == 2
    assert "'cmd.exe' is not one of bash" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- imports
def imported_by(code: str) -> set[str]:
    """The heavy packages a fresh interpreter has imported after ``code``."""
    code += f"\nimport sys; print(*({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_loading_does_not_import_what_looks_into_sources() -> None:
    load = "from miniloader import cli; import sys; cli.main(['load', 'libz.so.1'])"
    # What colours the help of Python 3.14 brings it.
    code = f"{load}; print('inspect' in sys.modules and '_colorize' not in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n", "it takes as long as Python's start"


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join
)
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    assert imported_by(f"from miniloader.cli import main; assert main({words!r}) == 0") == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import miniloader; miniloader.MiniloaderError; dir(miniloader)") == set()
    assert imported_by("import numpy") == {"numpy"}  # the instrument itself


def test_version_needs_neither_argparse_nor_typing() -> None:
    code = (
        "import sys; from miniloader.cli import main; main(['--version'])\n"
        "print({'argparse', 'typing'} & sys.modules.keys())"
    )
    command = [sys.executable, "-S", "-c", code]  # without what the environment itself imports
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"


def test_an_interrupt_that_an_import_hides_is_one_all_the_same(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """As numpy's does; an import that fails without one is a fault."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("bad install") from None
        return 0

    before = signal.getsignal(signal.SIGINT)
    command(run)
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "miniloader: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before
    command(raising(ImportError("bad install")))
    assert cli.main(["fake"]) == 1
    assert "bad install" in capsys.readouterr().err


def test_an_interrupt_out_of_exec_ends_with_130_too(tmp_path: Path) -> None:
    """As when a dataclass is just being made; ``python -m`` would end by SIGINT after all."""
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from miniloader.cli import reported\n"
        "def interrupted():\n"
        "    exec('raise KeyboardInterrupt')\n"
        "sys.exit(reported(interrupted, as_json=False, debug=False))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(miniloader.__file__).parents[1])])
    command = [sys.executable, "-m", "program"]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (130, "miniloader: interrupted\n")


def test_in_80_columns_load_cuts_no_address(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names take several lines there; the addresses are what one came for."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["load", "libz.so.1", "--no-init"]) == 0
    shown = capfd.readouterr().out
    assert "libz.so.1" in shown
    assert "…" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


# --------------------------------------------------------------------------------------------- --html -
PAGES = (
    ("prove", "libz.so.1", "-n", "2"),
    ("audit", str(os.getpid()), "--no-causes"),
    ("walkthrough", "segments"),
)


@pytest.mark.parametrize("command", PAGES, ids=lambda words: words[0])
def test_a_page_on_standard_output_is_alone_there(command: tuple[str, ...]) -> None:
    done = miniloader_process(*command, "--html", "-", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("<!doctype html>")
    assert done.stdout.rstrip().endswith("</html>")
    refused = miniloader_process(*command, "--html", "-", "--json", stdout=subprocess.PIPE)
    assert refused.returncode == 2


@pytest.mark.parametrize("command", PAGES, ids=lambda words: words[0])
def test_what_was_written_is_said(command: tuple[str, ...], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = miniloader_process(*command, "--html", str(page), stdout=subprocess.PIPE)
    assert done.stdout.splitlines()[-1] == f"The page is {page}"
    assert page.read_text().startswith("<!doctype html>")


def test_which_way_a_prepared_library_went_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for way in ("not from the cache: it is not in the cache; miniloader prepare LIB", "pages from the cache"):
        capfd.readouterr()
        assert cli.main(["load", str(demo), "--prepared"]) == 0
        (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("prepared: ")]
        assert way in line
        assert cli.main(["prepare", str(demo)]) == 0


def test_prepare_says_where_nothing_is_saved(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["prepare", "libz.so.1"]) == 0
    shown = capfd.readouterr().out
    assert ("Nothing is saved" in shown) == ("  shared    0 pages" in shown)
    assert ("miniloader prove" in shown) != ("Nothing is saved" in shown)


def test_what_an_installation_may_lack_is_what_it_asks_for() -> None:
    asked_for = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    assert sorted(cli._PROJECTS.values()) == sorted(re.split("[<>=]", project)[0] for project in asked_for)


@pytest.mark.parametrize(
    ("left", "said"), [(3, "too few mappings (vm.max_map_count): "), (99, "a fault of ")]
)
def test_what_goes_wrong_where_no_mapping_is_left_is_no_fault_of_ours(
    left: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As numpy does where ``_datetime`` could not be mapped, and Python goes on without it."""

    def fail(*_: object) -> int:
        raise AttributeError("module 'datetime' has no attribute 'datetime_CAPI'")

    monkeypatch.setattr(cli, "_dispatch", fail)
    monkeypatch.setattr(shortage, "mappings_left", lambda: left)
    assert cli.main(["version"]) == 1
    assert capfd.readouterr().err.startswith(f"miniloader: {said}")


def test_an_error_that_python_loses_without_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As CPython raises it where a function could not even raise MemoryError: anywhere, at the top too."""

    def lose(*_: object, **__: object) -> int:
        raise SystemError("error return without exception set")

    for place in ("_dispatch", "reported"):
        with monkeypatch.context() as patch:
            patch.setattr(cli, place, lose)
            assert cli.main(["version"]) == 1
        _, err = capfd.readouterr()
        assert re.fullmatch(
            r"miniloader: too little memory \(ulimit -v.*\), or a fault of Python's own: .*\n", err
        )


def test_what_is_kept_for_errors_is_kept_once_in_a_process_that_runs_many_commands() -> None:
    for _ in range(2):
        assert cli.main(["version"]) == 0
        assert [len(each) for each in cli._spare] == [4 << 20]


# ------------------------------------------------------------------------------------------- numbers
MANY = "9" * 5000  # more digits than int() takes


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("check", "--in", MANY, "libz.so.1"), "9: no library of that name"),
        (("check", "--libc", f"2.{MANY}", "libz.so.1"), "is no release of glibc"),
        (("audit", "--user", MANY), "no such user"),
        (("audit", "1", "--every", f"{MANY}s"), "is no time"),
        (("audit", "1", "--every", "99999999999s"), "is no time"),
        (("walkthrough", MANY), "no chapter"),
        (("load", "libz.so.1", "--call", f"crc32({MANY})"), "an integer has 64 bits"),
        (("load", "libz.so.1", "--call", f"crc32(out[{MANY}])"), "a buffer has 1 to "),
        (("load", "libz.so.1", "--call", "crc32(out[08])"), "a buffer has 1 to "),
    ],
    ids=lambda value: value[-1][:20] if isinstance(value, tuple) else "",
)
def test_a_number_of_any_length_is_no_fault_of_ours(
    command: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(list(command)) in (1, 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
    assert "fault of" not in line


@pytest.mark.parametrize("columns", ["\N{SUPERSCRIPT TWO}", MANY, "", "x", "-5"])
def test_a_width_that_is_none_is_passed_over(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["inspect", "libz.so.1"]) == 0
    assert "SONAME" in capsys.readouterr().out
