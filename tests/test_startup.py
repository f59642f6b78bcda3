"""A process of ours leaves out what it does not use, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures import build
from miniloader.elf import inspect
from miniloader.later import Later, leaving_out

PROBE = """
import sys
from miniloader.startup import travel_light
travel_light()
import numpy, numpy.linalg, numpy.ma
assert numpy.arange(4).reshape(2, 2).sum() == 6
assert numpy.ma.masked_array([1, 2], [0, 1]).sum() == 1
print(numpy.ndarray.__doc__ is None)
print(len(__import__("os").listdir("/proc/self/task")))
"""


def test_numpy_without_its_docstrings_and_threads() -> None:
    pytest.importorskip("numpy", "2")
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    answer = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**environment, "PYTHONPATH": str(build.ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == ["True", "1"]


BARE = """
import sys
from miniloader.startup import import_numpy
import_numpy()
left_out = ("inspect", "pickle", "platform", "numpy.lib._npyio_impl", "numpy.linalg", "numpy._typing")
left_out += ("ast",) * (sys.version_info < (3, 14))  # from there on dataclasses imports it
print(*[name for name in left_out if name in sys.modules])
import numpy, inspect, pickle, platform
from numpy.typing import NDArray
assert isinstance(NDArray[numpy.uint8], type)
print("numpy._typing" in sys.modules)
from numpy.typing import ArrayLike
print("numpy._typing" in sys.modules, numpy.typing.__name__)
assert pickle.loads(numpy.arange(3).dumps()).sum() == 3
assert numpy.polyfit([1, 2, 3], [1, 2, 3], 1).round() @ [1, 0] == 1 and numpy.packbits([1, 0, 1]) == [160]
import io, numpy.linalg
file = io.BytesIO()
numpy.save(file, numpy.linalg.inv(numpy.eye(2)))
file.seek(0)
assert numpy.load(file).sum() == 2
assert inspect.signature(len) and inspect.cleandoc("  a") == "a"
numpy.fft, numpy.polynomial, numpy.ma, numpy.random, numpy.testing
numpy.show_runtime()
"""


def test_numpy_without_what_describes_it() -> None:
    pytest.importorskip("numpy", "2")
    command = [sys.executable, "-c", BARE]
    answer = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("\nFalse\nTrue numpy.typing\n")


LOADING = """
import ctypes, os, sys
import miniloader
library = miniloader.load(sys.argv[1])
symbol = library.function(sys.argv[2], ctypes.c_char_p)
symbol()
unneeded = ("numpy", "hashlib", "rich", "jinja2", "capstone", "miniloader.loader.from_inside")
print(*[name for name in unneeded if name in sys.modules])
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.parametrize(
    ("library", "function"), [("libz.so.1", "zlibVersion"), ("libsqlite3.so.0", "sqlite3_libversion")]
)
def test_loading_needs_no_arrays_and_no_threads(library: str, function: str) -> None:
    """From ``import miniloader`` to a running function: what few libraries ask for is imported for them."""
    command = [sys.executable, "-c", LOADING, library, function]
    answer = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "\n1\n"


def test_nor_does_an_unwind_table_whose_last_function_is_described_first(tmp_path: Path) -> None:
    """Extension modules of Debian's Python have such tables: their end is far from that entry."""
    functions = "".join(f"int function_{number}(void) {{ return {number}; }}\n" for number in range(100))
    last = '__attribute__((section(".text_z"))) int last(void) { return 5; }\n'
    (tmp_path / "far.c").write_text(last + functions)
    library = tmp_path / "libfar.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "far.c"], check=True)
    load = "import sys, miniloader; library = miniloader.load(sys.argv[1])"
    code = f"{load}; print(library.last(), 'numpy' in sys.modules)"
    command = [sys.executable, "-c", code, str(library)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "5 False\n"


@pytest.mark.parametrize("bind", ["now", "lazy"])
@pytest.mark.parametrize("name", ["demo_relr", "tls_general", "cxx", "ifunc", "versions", "lazy"])
def test_nor_do_the_rarer_relocations(name: str, bind: str) -> None:
    code = (
        f"import sys, miniloader; miniloader.load(sys.argv[1], bind={bind!r}); print('numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(build.build(name))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_is_left_out_is_there_for_whoever_imports_it() -> None:
    """From Python 3.12 on ``dataclasses`` asks ``inspect`` for the annotations of each class."""
    code = (
        "import sys, miniloader\n"
        "miniloader.load(sys.argv[1])\n"
        "left_out = ('inspect', 'pdb', 'traceback')[sys.version_info >= (3, 12) :]\n"
        "print(*[name for name in left_out if name in sys.modules])\n"
        "import dataclasses, inspect, pdb, traceback\n"
        "from elftools.construct import debug\n"
        "print(debug.pdb.Pdb is pdb.Pdb, dataclasses.inspect.signature is inspect.signature)\n"
        "print([type(module).__name__ for module in (inspect, pdb, traceback)])"
    )
    command = [sys.executable, "-c", code, "libz.so.1"]
    answer = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "\nTrue True\n['module', 'module', 'module']\n"


def test_the_command_line_loads_without_arrays() -> None:
    """Its child, too: what numpy brings with it would serve the library that is loaded."""
    command = [sys.executable, "-X", "importtime", "-m", "miniloader", "load", "libz.so.1", "--json"]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert "miniloader.loader.link" in imported
    assert [name for name in imported if name.partition(".")[0] == "numpy"] == []


def test_a_worker_loads_touches_and_writes_without_arrays() -> None:
    code = """
import os, sys
from miniloader.lab.workers.worker import _Commands
commands = _Commands(os.open("/dev/null", os.O_RDONLY))
commands.do_load(sys.argv[1])
commands.do_touch([(0, 1 << 12)])
vaddr = int(sys.argv[2])
before = commands.do_fetch(vaddr)["value"]
assert commands.do_store(vaddr, before) == {"before": before}
print("numpy" in sys.modules)
"""
    path = build.build("demo")
    data = next(load for load in inspect(path).loads if "w" in load.flags)
    vaddr = (data.file_end - 1) & -8
    command = [sys.executable, "-c", code, str(path), str(vaddr)]
    answer = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"


def test_to_leave_a_module_out_asks_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``import`` asks a module for its specification: the stand-in would ask itself, in 3.13 for ever."""
    asked: list[str] = []
    monkeypatch.setattr(Later, "__getattr__", lambda stand_in, name: asked.append(name))
    with leaving_out("antigravity"):
        import antigravity  # noqa: F401
    assert asked == []


#: What a worker has beyond a process that has loaded the library: to be asked and led, and to die in time.
FOR_A_WORKER = {
    *("faulthandler", "gc", "resource", "select", "signal"),
    *("json", "json.decoder", "json.encoder", "json.scanner", "_json"),
    *("miniloader.lab", "miniloader.lab.workers", "miniloader.lab.workers.child"),
    *("miniloader.lab.workers.fault_teller", "miniloader.lab.workers.worker", "miniloader.startup"),
}


def test_a_worker_imports_what_loading_does_and_what_it_is_led_by() -> None:
    worker = (
        "import os, sys; from miniloader.lab.workers.worker import _Commands\n"
        "commands = _Commands(os.open('/dev/null', os.O_RDONLY)); commands.do_map(sys.argv[1])\n"
        "commands.do_touch([(0, 4096)]); commands.do_link(); commands.do_initialise()"
    )
    load = "import sys, miniloader; library = miniloader.load(sys.argv[1])"
    imported = []
    for code in (worker, load):
        command = [sys.executable, "-c", f"{code}\nprint(*sys.modules)", str(build.build("demo"))]
        answer = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
        imported.append(set(answer.stdout.split()))
    assert imported[0] - imported[1] <= FOR_A_WORKER


#: What `run` needs before its program begins; what few programs ask for comes when they do.
NOT_BEFORE_A_PROGRAM = (
    *("numpy", "json", "signal", "elftools.construct.lib.binary"),
    *("miniloader.startup", "miniloader.elf.inspecting"),
    *(
        "miniloader.loader.lazy_binding",
        "miniloader.loader.beside_glibc.stack",
        "miniloader.machine.stub_code",
    ),
    *("miniloader.loader.from_inside.information", "miniloader.loader.from_inside.words"),
)


def test_a_program_begins_without_what_few_ask_for() -> None:
    code = f"import sys; print(*[name for name in {NOT_BEFORE_A_PROGRAM} if name in sys.modules])"
    command = [sys.executable, "-m", "miniloader", "run", "--no-bill", "-c", code]
    answer = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    assert (answer.stdout, answer.stderr) == ("\n", "")


#: What an audit that only counts does without: translations, judges of files and of single pages.
NOT_TO_COUNT = (
    *("gettext", "locale", "heapq", "queue"),
    *("inspect",) * (sys.version_info < (3, 12)),  # from there on dataclasses imports it
    *("miniloader.elf.checks", "miniloader.evidence.cause", "miniloader.evidence.layout"),
    *("miniloader.evidence.space", "miniloader.lab.audit.explain", "miniloader.lab.erosion.erode"),
)


def test_an_audit_that_counts_begins_without_what_explains() -> None:
    code = (
        "import os, sys\n"
        "from miniloader.cli import main\n"
        "assert main(['audit', '--no-causes', str(os.getpid())]) == 0\n"
        f"print(*[name for name in {NOT_TO_COUNT} if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True)
    assert answer.stderr == "\n"


def test_argparse_says_the_same_without_translations() -> None:
    code = (
        "import sys\n"
        "if len(sys.argv) > 1:\n"
        "    from miniloader.startup import import_argparse; import_argparse()\n"
        "import argparse\n"
        "parser = argparse.ArgumentParser(prog='p')\n"
        "parser.add_argument('a', nargs=2, help='an a')\n"
        "parser.print_help()\n"
        "try: parser.parse_args(['x'])\n"
        "except SystemExit: print('gettext' in sys.modules)\n"
        "import gettext; assert gettext.gettext('a') == 'a' and gettext.find('nothing') is None"
    )
    said = [
        subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        for words in ((), ("without",))
    ]
    assert said[0].stderr == said[1].stderr != ""
    assert said[0].stdout.replace("True", "False") == said[1].stdout


def test_pyelftools_has_its_bits_when_they_are_asked_for() -> None:
    code = (
        "import sys, miniloader.elf\n"
        "from elftools.construct import BitField, BitStruct\n"
        "print('elftools.construct.lib.binary' in sys.modules)\n"
        "print(BitStruct('bits', BitField('high', 3), BitField('low', 5)).parse(b'\\xa7'))\n"
        "from elftools.construct.lib import binary, int_to_bin\n"
        "print(int_to_bin(19, 5) == binary.int_to_bin(19, 5) == bytes([1, 0, 0, 1, 1]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=build.ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines() == ["False", "Container({'high': 5, 'low': 7})", "True"]
