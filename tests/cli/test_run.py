"""``miniloader run``: a program runs as it does without, but that its libraries are ours."""

from __future__ import annotations

import json
import marshal
import os
import py_compile
import resource
import shlex
import signal
import subprocess
import sys
import zipapp
import zipfile
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import Final

import jsonschema
import pytest

import miniloader
from fixtures import build
from miniloader.cli.parser import build as build_parser
from miniloader.cli.parser import parse
from miniloader.cli.run import without_options
from miniloader.report.schemas import SCHEMAS

PLAIN = (sys.executable,)
RUN = (sys.executable, "-m", "miniloader", "run")
SHOW = (
    "import sys\n"
    "print(__name__, sys.argv, repr(sys.path[0]), __spec__ and __spec__.name, globals().get('__file__'))\n"
)


def run(
    command: tuple[str, ...], *words: str, cwd: Path, typed: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in ``cwd``, from where this package is found all the same; its input is what is ``typed``."""
    path = os.pathsep.join(filter(None, (str(build.ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [*command, *words],
        input=typed,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        timeout=100,
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A script, a package with a __main__, a directory with one."""
    (tmp_path / "script.py").write_text(SHOW + "import beside\n")
    (tmp_path / "beside.py").write_text("import _sqlite3; print(_sqlite3.sqlite_version.count('.'))\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("")
    (tmp_path / "package/__main__.py").write_text(SHOW)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ("script.py", "--bill", "x", "-m"),
        ("./script.py",),
        ("-m", "beside"),
        ("-m", "package", "-c", "y"),
        ("package",),
        ("-c", SHOW, "a", "--bill"),
        ("-c", SHOW, "--", "-m", "--"),
        ("script.py", "--", "--bill"),
    ],
    ids=" ".join,
)
def test_a_program_is_what_it_is_without(words: tuple[str, ...], place: Path) -> None:
    plain = run(PLAIN, *words, cwd=place)
    for options in ("--no-bill", "--strict"), ("--bill", os.devnull):
        ours = run(RUN, *options, *words, cwd=place)
        assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert plain.returncode == 0


@pytest.mark.parametrize("words", [("{}/script.py",), ("-m", "beside"), ("-c", "")], ids=" ".join)
def test_a_removed_working_directory(words: tuple[str, ...], place: Path) -> None:
    """Nothing is looked for there, and nothing of PYTHONPATH gets lost, which ``python -m`` begins with."""
    for name in ("script", "beside"):
        (place / f"{name}.py").write_text(f"import sys; print({str(place)!r}, sys.path)\n")
    removed = 'rmdir "$PWD" && exec "$@"'
    path = os.pathsep.join((str(build.ROOT), str(place)))
    shown = ("-c", "import sys; print(sys.path)") if words[0] == "-c" else words
    said = []
    for command in (PLAIN, (*RUN, "--no-bill", "--strict")):
        (directory := place / "away").mkdir()
        line = [word.format(place) if "{" in word else word for word in shown]
        said.append(run(("sh", "-c", removed, "sh", *command), *line, cwd=directory, PYTHONPATH=path))
    plain, ours = said
    assert str(build.ROOT) in plain.stdout
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, plain.stderr)


@pytest.mark.parametrize("command", ["{} -", "{} /dev/stdin", "{} /dev/fd/0 a", "{} app.pyz b"])
def test_a_program_from_a_pipe_or_behind_something_else(command: str, place: Path) -> None:
    """It is read once; a zip file may have anything before it, such as a line for the shell."""
    (place / "__main__.py").write_text(SHOW)
    target, main = place / "app.pyz", place / "package"
    zipapp.create_archive(main, target, interpreter="/usr/bin/env python3")
    said = []
    for words in (PLAIN, (*RUN, "--no-bill")):
        line = f"printf %s {shlex.quote(SHOW)} | {command.format(shlex.join(words))}"
        said.append(run(("sh", "-c", line), cwd=place))
    plain, ours = said
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, plain.stderr)
    assert "__main__" in plain.stdout


@pytest.mark.parametrize("text", ["def", "print(1)\nprint(2\n", "\tx = 1\ny"])
@pytest.mark.parametrize("how", ["script", "module", "code"])
def test_what_is_no_program_is_told_as_python_tells_it(text: str, how: str, place: Path) -> None:
    (place / "wrong.py").write_text(text)
    words = {"script": ("wrong.py",), "module": ("-m", "wrong"), "code": ("-c", text)}[how]
    plain, ours = run(PLAIN, *words, cwd=place), run(RUN, *words, cwd=place)
    assert ours.returncode == plain.returncode == 1
    if how == "script":
        assert ours.stderr == plain.stderr
    assert ours.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]
    assert "miniloader" not in ours.stderr


#: Too deep to be compiled, or to be parsed.
DEEP = "-" * (5000 if sys.version_info < (3, 13) else 100_000) + "1"

#: All of it is set in: Python 3.14 takes that away.
SET_IN = [("-c", "\n    print(1)\n    1 / 0\n")] if sys.version_info < (3, 14) else []

#: What is in a file that does not begin, or is compiled and has another name.
AMISS = {
    "latin.py": b"# caf\xe9\nprint(1)\n",
    "wide.py": "print(1)\n".encode("utf-16"),
    "unknown.py": b"# coding: nonsense\nprint(1)\n",
    "deep.py": DEEP.encode(),
    "empty.pyc": b"",
    "text.pyc": b"print(1)\n",
    "begun.pyc": MAGIC_NUMBER,
    "cut.pyc": MAGIC_NUMBER + bytes(12) + b"\xe3",
    "number.pyc": MAGIC_NUMBER + bytes(12) + marshal.dumps(5),
    "two.bytes": MAGIC_NUMBER[:2],
    "good.bytes": MAGIC_NUMBER + bytes(12) + marshal.dumps(compile("print(1); 1 / 0", "x", "exec")),
}
if sys.version_info >= (3, 11, 4):  # before, a line of a file ended there for Python
    AMISS["zero.py"] = b"print(1)\n\0x\n"


@pytest.mark.parametrize("name", AMISS)
def test_what_cannot_be_read_as_a_program_is_told_in_its_words(name: str, place: Path) -> None:
    (place / name).write_bytes(AMISS[name])
    plain, ours = run(PLAIN, name, cwd=place), run(RUN, "--no-bill", name, cwd=place)
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert plain.returncode == 1


def test_nothing_of_a_program_with_a_zero_byte_is_run(place: Path) -> None:
    """Before 3.11.4 Python itself runs what is before it."""
    (place / "zero.py").write_bytes(b"print(1)\n\0x\n")
    ours = run(RUN, "--no-bill", "zero.py", cwd=place)
    assert (ours.returncode, ours.stdout) == (1, "")
    assert ours.stderr.endswith("SyntaxError: source code cannot contain null bytes\n")


@pytest.mark.parametrize(
    "words",
    [
        *[
            (word,)
            for word in ("none.py", "./none.py", "none/", "script.py/x", "package/..", "a\nb", "x" * 300)
        ],
        ("-c", "print('\udcff')"),
        ("-c", DEEP),
        *SET_IN,
    ],
    ids=lambda words: ascii(words[-1][:20]),
)
def test_what_is_not_there_or_no_text_ends_as_with_python(words: tuple[str, ...], place: Path) -> None:
    """But with 1 where no file can be opened, as every command of miniloader does; Python has 2."""
    plain, ours = run(PLAIN, *words, cwd=place), run(RUN, *words, cwd=place)
    assert (ours.returncode, ours.stdout, ours.stderr) == (1, plain.stdout, plain.stderr)
    assert plain.returncode == (1 if words[0] in ("-c", "package/..") else 2)


@pytest.mark.parametrize("options", [(), ("-P",)], ids=" ".join)
@pytest.mark.parametrize("path", [".", "", "./.", "main.zip/", "main.zip/inner", "main.zip"])
def test_where_a_directory_or_an_archive_is_said_to_be(
    path: str, options: tuple[str, ...], place: Path
) -> None:
    """As it was named, put behind the working directory; within an archive there may be programs, too."""
    main = f"import beside\n{SHOW}print(beside.__file__, {path!r} in sys.path_importer_cache)\nbeside.f()\n"
    beside = "def f(): 1 / 0\n"
    with zipfile.ZipFile(place / "main.zip", "w") as archive:
        for directory in "", "inner/":
            archive.writestr(f"{directory}__main__.py", main)
            archive.writestr(f"{directory}beside.py", beside)
    (place / "__main__.py").write_text(main)
    (place / "beside.py").write_text(beside)
    python = (*PLAIN, *options)
    plain = run(python, path, cwd=place)
    ours = run((*python, "-m", "miniloader", "run", "--no-bill"), path, cwd=place)
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert "__main__" in plain.stdout


INSPECTED: Final = """
import atexit, sys
value = 7
atexit.register(print, "at exit")
if sys.argv[1] == "hooks": sys.excepthook = lambda kind, *_: print("hook", kind)
sys.exit(3) if sys.argv[1] == "exits" else 1 / (sys.argv[1] == "ends")
"""
TYPED: Final = """\
import traceback; traceback.print_stack()
print(value, __name__, sys.argv, getattr(sys, "last_type", None))
1 / 0
"""


@pytest.mark.parametrize("how", ["ends", "fails", "exits", "hooks"])
@pytest.mark.parametrize("options", [("-i",), ()], ids=["-i", "PYTHONINSPECT"])
def test_a_prompt_comes_behind_it_where_that_is_wanted(
    options: tuple[str, ...], how: str, place: Path
) -> None:
    """Where the environment asks for it and nobody types, there is none, and how it ends is Python's."""
    (place / "inspected.py").write_text(INSPECTED)
    environment = {} if options else {"PYTHONINSPECT": "1"}
    plain, ours = (
        run((*PLAIN, *options, *command), "inspected.py", how, cwd=place, typed=TYPED, **environment)
        for command in ((), ("-m", "miniloader", "run", "--no-bill"))
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert ("7 __main__" in plain.stdout) == bool(options)


def test_nothing_of_the_programs_own_is_imported_for_ours(place: Path) -> None:
    """Where a library lacks another one, of which a hint is made."""
    for words in (("-o", "libgone.so"), ("-o", "needs.so", "-Wl,--no-as-needed", "-xnone", "libgone.so")):
        subprocess.run(["gcc", "-shared", "-xc", "/dev/null", *words], cwd=place, check=True)
    (place / "libgone.so").unlink()
    (place / "shlex.py").write_text("print('of the program')")
    code = "import ctypes\ntry: ctypes.CDLL('./needs.so')\nexcept OSError as error: print(error)"
    (place / "opens.py").write_text(code)
    plain, ours = (run((*command, "opens.py"), cwd=place) for command in (PLAIN, (*RUN, "--no-bill")))
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, "")


#: Of modules that miniloader imports: before, while and after a program runs; and of the project's own.
#: What this Python has within itself comes first, whatever there is.
CALLED_ALIKE = sorted(
    {"resource", "fnmatch", "signal", "array", "gettext", "elftools", "textwrap", "json", "shutil"}
    - {*sys.builtin_module_names}
)


@pytest.mark.parametrize("path", ["script.py", "main.zip"])
@pytest.mark.parametrize(
    "options", [("--no-bill", "--strict"), ("--bill", "bill", "--json"), ("--writers", "writers", "--follow")]
)
def test_a_program_imports_its_own_modules_whatever_they_are_called(
    options: tuple[str, ...], path: str, place: Path
) -> None:
    """As with Python, which has not imported what miniloader has; that has what it needs all the same."""
    (directory := place / "program").mkdir()
    for name in CALLED_ALIKE:
        (directory / f"{name}.py").write_text(f"print('of the program: {name}')")
    imports = "\n".join(f"import {name}; print({name}.__file__)" for name in (*CALLED_ALIKE, "_lzma", "os"))
    (directory / "script.py").write_text(imports)
    (directory / "__main__.py").write_text(imports)
    zipapp.create_archive(directory, place / "program/main.zip")
    words = str(directory / path)
    plain, ours = run(PLAIN, words, cwd=place), run((*RUN, *options), words, cwd=place)
    assert (ours.returncode, ours.stdout) == (0, plain.stdout)
    assert plain.stdout.count("of the program") == len(CALLED_ALIKE)
    assert "Traceback" not in ours.stderr
    if "--json" in options:
        assert json.loads((place / "bill").read_text())["opened"][0]["how"] == "loaded"
    if "--writers" in options:
        assert (place / "writers").read_text().startswith("the program has forked no process")


#: Ends in a directory that is gone, with a module whose file is no text, as some packages' are.
ENDS_ODDLY: Final = """
import os, pathlib, sys, tempfile, types, _lzma
sys.modules["odd"] = types.ModuleType("odd")
sys.modules["odd"].__file__ = pathlib.Path("odd.py")
if sys.argv[1:]:
    os.chdir(gone := tempfile.mkdtemp())
    os.rmdir(gone)
"""


@pytest.mark.parametrize("words", [(), ("gone",)], ids=["odd", "gone"])
def test_a_bill_is_written_however_the_program_has_left_things(words: tuple[str, ...], place: Path) -> None:
    ours = run((*RUN, "--bill", str(place / "bill"), "--json"), "-c", ENDS_ODDLY, *words, cwd=place)
    assert (ours.returncode, ours.stderr) == (0, "")
    opened = json.loads((place / "bill").read_text())["opened"]
    assert any("_lzma" in library["name"] for library in opened)


def test_a_script_is_begun_without_what_finds_modules(place: Path) -> None:
    (place / "modules.py").write_text("import sys; print('runpy' in sys.modules)")
    begin = f"import sys; sys.path[:0] = [{str(build.ROOT)!r}]; sys.argv[1:1] = ['run', '--no-bill']\n"
    (place / "command").write_text(f"{begin}from miniloader.__main__ import command; sys.exit(command())")
    assert run(PLAIN, "command", "modules.py", cwd=place).stdout == "False\n"


@pytest.mark.parametrize("path", ["/dev/zero", "hole.py"])
def test_what_has_zero_bytes_is_no_program(path: str, place: Path) -> None:
    """A device or a hole of 10 GB is not read to its end, if it has one, as Python itself would."""
    with open(place / "hole.py", "wb") as file:
        file.write(b"print(1)\n")
        file.truncate(10 << 30)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = run(RUN, path, cwd=place)
    line = 2 if path == "hole.py" else 1
    said = f'  File "{place / path}", line {line}\nSyntaxError: source code cannot contain null bytes\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < max(before, 60 << 10) + (10 << 10)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(7)",
        "import sys; sys.exit('a word')",
        "raise SystemExit",
        "def f(): 1 / 0\nf()",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit, threading\natexit.register(print, 1)\nthreading.Timer(0.1, print, [2]).start()",
        "import sys; sys.stdout.close()",
        "print('out', end=''); import os; os.close(1)",
        "import sys; sys.excepthook = None; 1 / 0",
        "import sys; del sys.excepthook; 1 / 0",
        "import sys; sys.excepthook = lambda *error: 2 / 0; 1 / 0",
        "import sys; sys.excepthook = lambda *error: sys.exit(7); 1 / 0",
        "import sys, traceback; sys.excepthook = lambda *error: traceback.print_stack(); 1 / 0",
        "import atexit, weakref, _lzma\natexit.register(print, 1)\nweakref.finalize(exit, print, 2)",
        "import atexit, _lzma, ctypes\nctypes.CDLL('libz.so.1'); atexit._clear()",
    ],
)
def test_it_ends_as_the_program_ends(code: str, place: Path) -> None:
    (place / "ends.py").write_text(code)
    plain, ours = run(PLAIN, "ends.py", cwd=place), run(RUN, "--no-bill", "ends.py", cwd=place)
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


#: Says who has called it, as far as it can see, and how deep it can call.
STANDS = """
import inspect, sys, traceback
def f(): traceback.print_stack(file=sys.stdout); return len(inspect.stack())
print(f(), inspect.stack()[-1].filename)
def deeper(depth):
    try: return deeper(depth + 1)
    except RecursionError: return depth
print(deeper(0) // 10)
1 / 0
"""


@pytest.mark.parametrize(
    "words",
    [
        ("stands.py",),
        ("-c", STANDS),
        ("-m", "stands"),
        ("stands",),
        ("compiled.pyc",),
        ("-m", "falls"),
        ("falls",),
        ("-m", "os.path"),
        ("-m", "none.at.all"),
        ("-m", ".relative"),
        ("-m", "package.none"),
    ],
    ids=lambda words: " ".join(words)[:20],
)
def test_where_it_stands_is_where_python_puts_it(words: tuple[str, ...], place: Path) -> None:
    """Nothing of ours is beneath it: not in a traceback, for a debugger, or in how deep it may go."""
    (place / "stands.py").write_text(STANDS)
    (place / "stands").mkdir()
    (place / "stands/__main__.py").write_text(STANDS)
    (place / "falls").mkdir()
    (place / "falls/__init__.py").write_text("1 / 0")
    compiled = py_compile.compile(str(place / "stands.py"), str(place / "compiled.pyc"), doraise=True)
    assert compiled
    plain, ours = run(PLAIN, *words, cwd=place), run(RUN, "--no-bill", *words, cwd=place)
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


#: Imports and opens where so few calls are left as each of it takes at least.
IS_DEEP: Final = """
import _ctypes, ctypes, importlib, sys
def deep(depth, f): return deep(depth - 1, f) if depth else f()
modules = "_bz2", "_lzma", "_uuid", "_decimal", "_sqlite3", "_lsprof"
for left, name in zip((60, 50, 40, 36, 28, 24), modules):
    try: print(deep(1000 - left, lambda: importlib.import_module(name)).__name__)
    except RecursionError: print("too deep")
for left in range(16, 40, 3):
    try: print(deep(1000 - left, lambda: ctypes.CDLL("libexpat.so.1"))._name)
    except RecursionError: print("too deep")
for left in range(3, 12):
    try: print(deep(1000 - left, lambda: _ctypes.dlopen("libexpat.so.1", 2)) > 0)
    except RecursionError: print("too deep")
print(sys.getrecursionlimit())
sys.setrecursionlimit(2**31 - 1)
import _ssl; print(sys.getrecursionlimit())
"""


def test_what_is_opened_deep_in_calls_has_room_for_it(place: Path) -> None:
    """Where what CPython itself calls for it has room, ld.so opens it: no call of ours is the program's."""
    (place / "deep.py").write_text(IS_DEEP)
    plain, ours = (run((*command, "deep.py"), cwd=place) for command in (PLAIN, (*RUN, "--no-bill")))
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, plain.stderr)


CALLED: Final = "import sys; print(sys.argv, sys.orig_argv)"


@pytest.mark.parametrize(
    "words", [("called.py", "-m", "x"), ("-m", "called", "-c"), ("-c", CALLED, "run", "--")]
)
@pytest.mark.parametrize("options", [(), ("-X", "utf8"), ("-Wd", "-I")])
def test_it_was_called_as_if_python_had_been(
    options: tuple[str, ...], words: tuple[str, ...], place: Path
) -> None:
    """sys.orig_argv, with which programs start themselves anew; options of Python's own are its part."""
    (place / "called.py").write_text(CALLED)
    path = f"import sys; sys.path[:0] = {[str(build.ROOT), str(place)]}; "
    begin = [path + "import runpy; runpy.run_module('miniloader', run_name='__main__')"]
    (place / "command").write_text("\n".join(begin))
    if "-I" in options and words[0] == "-m":
        words = ("called.py", *words[2:])  # which isolated Python does not find
    plain = run((*PLAIN, *options), *words, cwd=place)
    for command in (place / "command",), ("-m", "miniloader"):
        if command[0] == "-m" and "-I" in options:
            continue
        ours = run((*PLAIN, *options, *map(str, command), "run", "--no-bill"), *words, cwd=place)
        assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, plain.stderr)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="later ones count calls of C apart")
def test_it_may_go_as_deep_as_there_is_to_the_last_call(place: Path) -> None:
    head, middle, tail = STANDS.partition("print(deeper(0)")
    code = f"{head}sys.setrecursionlimit(60)\n{middle}{tail.replace(' // 10', '').replace('1 / 0', '')}"
    (place / "deep.py").write_text(code)
    for words in ("deep.py",), ("-c", code), ("-m", "deep"):
        plain, ours = run(PLAIN, *words, cwd=place), run(RUN, "--no-bill", *words, cwd=place)
        assert (ours.returncode, ours.stdout) == (0, plain.stdout)


CLOSES: Final = """
import _ctypes, os, subprocess
subprocess.run(["gcc", "-shared", "-xc", "-", "-o", "a.so"], input=b"", check=True)
handle = _ctypes.dlopen("./a.so", 2)
os.closerange(3, 100)
files = [open(f"file{number}", "w") for number in range(20)]
_ctypes.dlclose(handle)
for file in files: file.write("a"); file.flush()
print(sum(os.path.getsize(f"file{number}") for number in range(20)))
"""


def test_a_program_that_closes_all_descriptors_keeps_those_that_it_opens(place: Path) -> None:
    """As daemons do: a number may be another file's when a library goes, and stays its."""
    ours = run(RUN, "--no-bill", "-c", CLOSES, cwd=place)
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, "20\n", "")


BECOMES: Final = """
import _ctypes, os, sys
way, libz, libbz2 = sys.argv[1:]
os.makedirs("root/lib")
for path in libz, libbz2:
    with open(path, "rb") as one, open(f"root/lib/{path.rpartition('/')[2]}", "wb") as two:
        two.write(one.read())
if way == "root": os.chroot("root"); os.chdir("/")
else: os.chmod(".", 0o755); os.setegid(65534); os.seteuid(65534)
for name in "libbz2.so.1.0", "/lib/libz.so.1", "libnone.so", "/lib/none.so", "./none.so":
    try: print(_ctypes.dlopen(name, 2) > 0)
    except OSError as error: print(error)
if way == "user": os.seteuid(0)
"""


#: Opens many libraries, the last one from a constructor of another, and a file.
OPENS_MANY: Final = """
import _bz2, _ctypes, _lzma, _sqlite3, _ssl, ctypes, os, resource
ctypes.CDLL("./opens.so")
print(os.open(os.devnull, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6))
for name in "_elementtree", "_decimal", "_queue", "_zoneinfo", "_lsprof", "_multibytecodec": __import__(name)
"""


def test_a_program_has_as_few_descriptors_open_as_without(place: Path) -> None:
    """Libraries by the hundred have none: neither its limit nor the numbers of its files are others."""
    text = b'#include <dlfcn.h>\n__attribute__((constructor)) static void f(void){dlopen("./in.so", 2);}'
    for name, code in ("in.so", b""), ("opens.so", text):
        command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", name]
        subprocess.run(command, input=code, cwd=place, check=True)
    (place / "many.py").write_text(OPENS_MANY)
    plain, ours = (
        run((*command, "many.py"), cwd=place) for command in (PLAIN, (*RUN, "--strict", "--no-bill"))
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, plain.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("way", ["root", "user"])
def test_a_program_that_gives_away_what_it_was_goes_on(way: str, place: Path) -> None:
    """With another root, without /proc and without any file of ours; or as another user."""
    libraries = [miniloader.tree(name).path for name in ("libz.so.1", "libbz2.so.1.0")]
    plain, ours = (
        run(command, "-c", BECOMES, way, *libraries, cwd=directory)
        for command, directory in ((PLAIN, place), ((*RUN, "--no-bill"), place / "package"))
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, plain.stderr)


@pytest.mark.parametrize("how", ["raises", "reads"])
def test_faulthandler_that_the_environment_asks_for_is_heard(how: str, place: Path) -> None:
    fault = {"raises": "import os; os.kill(os.getpid(), 11)", "reads": "import ctypes; ctypes.string_at(8)"}[
        how
    ]
    (place / "faults.py").write_text(fault)
    plain, ours = (
        run(command, "faults.py", cwd=place, PYTHONFAULTHANDLER="1")
        for command in (PLAIN, (*RUN, "--no-bill"))
    )
    assert ours.returncode == plain.returncode == -signal.SIGSEGV
    assert "miniloader: the program was killed by SIGSEGV" in ours.stderr
    assert "Fatal Python error: Segmentation fault" in ours.stderr
    of_program = [line for line in plain.stderr.splitlines() if line.lstrip().startswith("File ")]
    assert [line for line in ours.stderr.splitlines() if line.lstrip().startswith("File ")] == of_program
    assert of_program


@pytest.mark.parametrize("how", ["script", "code"])
def test_what_it_imports_from_the_future_is_its_own(how: str, place: Path) -> None:
    """Annotations are what they say, unless the program itself asks for texts."""
    text = "x: int = 3\ndef f(a: int): pass\nprint(globals().get('__annotations__'), f.__annotations__)\n"
    for code in (text, "from __future__ import annotations\n" + text):
        (place / "notes.py").write_text(code)
        words = ("notes.py",) if how == "script" else ("-c", code)
        plain, ours = run(PLAIN, *words, cwd=place), run(RUN, "--no-bill", *words, cwd=place)
        assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, plain.stderr)


def test_the_bill(place: Path) -> None:
    words = ("-c", "import _decimal, _sqlite3; print('out')")
    summary = run(RUN, *words, cwd=place)
    assert summary.stdout == "out\n"
    assert summary.stderr.startswith("miniloader loaded ")
    assert "lib-dynload/_sqlite3" in summary.stderr or "_sqlite3" in summary.stderr
    nothing = " ".join(run(RUN, "-c", "pass", cwd=place).stderr.split())
    assert nothing.startswith("miniloader loaded 0 libraries in 0.00 ms for 0 calls of dlopen; ")
    assert nothing.endswith(" ms dlsym 0.00")
    assert " for 1 call of dlopen; " in " ".join(run(RUN, "-c", "import _bz2", cwd=place).stderr.split())
    done = run(RUN, "--bill", "bill.txt", *words, cwd=place)
    assert (done.stdout, done.stderr) == ("out\n", "")
    shown = (place / "bill.txt").read_text()
    assert "private pages" in shown
    assert "the modules' own Python, and the program" in shown
    done = run(RUN, "--json", "--bill", "bill.json", "-c", "import _decimal, _sqlite3", cwd=place)
    assert (done.stdout, done.stderr) == ("", "")
    bill = json.loads((place / "bill.json").read_text())
    jsonschema.validate(bill, SCHEMAS["run"])
    names = [Path(opened["name"]).name.partition(".")[0] for opened in bill["opened"]]
    assert names[:2] == ["_decimal", "_sqlite3"]
    assert bill["fell_back"] == []


def test_a_bill_that_cannot_be_written_is_one_line(place: Path) -> None:
    """The program has ended by then, as it does: with what it printed, and its status."""
    for file, said in (("none/bill", "No such file or directory"), ("/dev/full", "No space left on device")):
        for status in (0, 7):
            done = run(RUN, "--bill", file, "-c", f"print('out'); raise SystemExit({status})", cwd=place)
            assert (done.returncode, done.stdout) == (status, "out\n")
            assert done.stderr == f"miniloader: {file}: {said}\n"


def test_what_its_threads_and_exit_handlers_import_comes_through_us(place: Path) -> None:
    code = (
        "import atexit, threading, time\n"
        "atexit.register(__import__, '_decimal')\n"
        "def wait(): threading.main_thread().join(); import _sqlite3\n"
        "threading.Thread(target=wait).start()"
    )
    bill = json.loads(run(RUN, "--json", "-c", code, cwd=place).stderr)
    names = [Path(opened["name"]).name.partition(".")[0] for opened in bill["opened"]]
    assert names == ["_sqlite3", "_decimal"]


def test_its_collections_do_not_look_at_what_is_ours(place: Path) -> None:
    code = (
        "import gc; names = [str(o.get('__name__')) for o in gc.get_objects() if type(o) is dict]\n"
        "ours = [name for name in names if name.startswith('miniloader.')]\n"
        "print(len(ours), gc.isenabled(), gc.get_threshold())"
    )
    plain, ours = run(PLAIN, "-c", code, cwd=place), run(RUN, "--no-bill", "-c", code, cwd=place)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    assert plain.stdout.startswith("0 True")


def test_in_a_process_of_another_its_garbage_is_still_looked_for(place: Path) -> None:
    code = (
        "import gc; from miniloader.cli import main\n"
        "status = main(['run', '--no-bill', '-c', 'pass'])\n"
        "print(status, gc.get_freeze_count(), gc.isenabled())"
    )
    assert run(PLAIN, "-c", code, cwd=place).stdout == "0 0 True\n"


#: Prints the most page faults that a loop of calls meets, by how many calls it is made from.
DEEPER = """
import resource
def turn(a=1, b=2, c=3, d=4, e=5, f=6, g=7, h=8): pass
def loop(depth):
    if depth:
        return loop(depth - 1)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(2000): turn()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
print(max(loop(depth) for depth in range(300)))
"""


def test_no_call_of_the_program_maps_memory_at_every_turn(place: Path) -> None:
    assert int(run(RUN, "--no-bill", "-c", DEEPER, cwd=place).stdout) < 1000, "without room: 2000 and more"


def test_interpreters_that_it_starts_follow(place: Path) -> None:
    (place / "look.py").write_text(
        "import _lsprof, sys\n"
        "print('/_lsprof' in open('/proc/self/maps').read(), 'miniloader.loader.loading' in sys.modules)\n"
    )
    (place / "starts.py").write_text("import subprocess, sys; subprocess.run([sys.executable, 'look.py'])\n")
    assert run(RUN, "--no-bill", "starts.py", cwd=place).stdout.split() == ["True", "False"]
    done = run(RUN, "--no-bill", "--follow", "starts.py", cwd=place)
    assert (done.stdout.split(), done.stderr) == (["True", "True"], "")


def test_a_crash_names_library_function_and_place(place: Path) -> None:
    library = build.build("misbehaves")
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).misbehave()"
    done = run(RUN, "--no-bill", "-c", code, cwd=place, MINILOADER_MISBEHAVE="crash")
    assert done.returncode == -signal.SIGSEGV
    assert "miniloader: the program was killed by SIGSEGV" in done.stderr
    assert "of libmisbehaves.so" in done.stderr


def test_a_crash_in_a_destructor_after_python_has_ended_is_named(place: Path) -> None:
    library = place / "ends_badly.so"
    code = b"__attribute__((destructor)) void ends_badly(void) { *(volatile int *)8 = 0; }"
    subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", library], input=code, check=True)
    done = run(RUN, "--no-bill", "-c", f"import ctypes; ctypes.CDLL({str(library)!r})", cwd=place)
    assert done.returncode == -signal.SIGSEGV
    assert "SIGSEGV writing address 0x8, in ends_badly" in done.stderr
    assert "of ends_badly.so" in done.stderr


def test_nothing_to_run(place: Path) -> None:
    done = run(RUN, cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("miniloader: nothing to run")


def test_trace_tells_on_standard_error(place: Path) -> None:
    done = run(RUN, "--no-bill", "--trace", "-c", "import _lsprof; print('out')", cwd=place)
    assert done.stdout == "out\n"
    assert "_lsprof" in done.stderr
    assert "dlopen " in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("script.py",),
        ("script.py", "--bill", "x", "-m"),
        ("-m", "package", "--json", "-c"),
        ("-c", "pass", "-x"),
        ("-c", ""),
        ("",),
    ],
    ids=" ".join,
)
def test_without_options_no_parser_is_made(words: tuple[str, ...]) -> None:
    parsed = parse(build_parser(("run",)), ["run", *words])
    told = without_options(words)
    assert told is not None
    assert vars(told).items() == {key: vars(parsed)[key] for key in vars(parsed).keys() - _OF_PARSER}.items()


@pytest.mark.parametrize(
    "words",
    [(), ("-",), ("-c",), ("--bill", "-", "x.py"), ("-cpass",), ("-h",), ("--", "x.py")],
    ids=" ".join,
)
def test_options_are_the_parsers(words: tuple[str, ...]) -> None:
    assert without_options(words) is None


_OF_PARSER = {"completion", "parser"}


def test_for_what_is_imported_first_no_garbage_is_looked_for(tmp_path: Path) -> None:
    """With ``-m`` on both sides, which costs Python four; without the pause it is 26 more than its."""
    code = (
        "import gc; print(gc.isenabled(), *gc.get_threshold(), sum(s['collections'] for s in gc.get_stats()))"
    )
    (tmp_path / "counted.py").write_text(code)
    plain, ours = (run(command, "-m", "counted", cwd=tmp_path).stdout.split() for command in (PLAIN, RUN))
    assert ours[:-1] == plain[:-1]
    assert int(ours[-1]) <= int(plain[-1]) + 4
