"""``miniloader.importing()``: what CPython, ctypes and libraries open is loaded by us, and works as ever."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import miniloader
from miniloader.loader.beside_glibc import host
from miniloader.loader.running import slots
from tests.loader.conftest import InChild

FixtureLibrary = Callable[[str], Path]
ROOT = Path(miniloader.__file__).parents[1]


def python(program: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=100,
    )


def words() -> dict[tuple[str, bytes, int], int]:
    """What is in each word through which ld.so's libraries call dlopen and its like."""
    return {
        (library.path, slot.name, slot.address): ctypes.c_uint64.from_address(slot.address).value
        for library in host.libraries()
        for slot in slots.slots_of(library)
    }


_TWO_VERSIONS = r"""
void *first(const char *, int), *second(const char *, int);
__asm__(".symver first, dlopen@GLIBC_2.34");
__asm__(".symver second, dlopen@" EARLIER);
void *(*volatile places[])(const char *, int) = {first, second};
"""


def test_a_name_in_two_versions_is_led_twice(tmp_path: Path, in_child: InChild) -> None:
    """Each version is a symbol of its own, with the very same name."""
    earlier = "GLIBC_2.2.5" if os.uname().machine == "x86_64" else "GLIBC_2.17"
    library = tmp_path / "two.so"
    command = ["gcc", "-shared", "-fPIC", f'-DEARLIER="{earlier}"', "-xc", "-", "-o", library]
    made = subprocess.run(command, input=_TWO_VERSIONS, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip("this machine lacks a C library that has dlopen in two versions")

    def look() -> list[bytes]:
        ctypes.CDLL(str(library))
        return [name for path, name, _ in words() if path == str(library)]

    assert in_child(look) == [b"dlopen", b"dlopen"]


_MODULES = """
import sys, miniloader
from miniloader.loader.beside_glibc import host
with miniloader.importing(strict=True) as imports:
    import _decimal, _sqlite3, _ssl, _json, pyexpat, numpy, ctypes
    libz = ctypes.CDLL("libz.so.1")
import sqlite3, xml.etree.ElementTree as tree
print(_decimal.Decimal("1.1") * 3, sqlite3.connect(":memory:").execute("select 6 * 7").fetchone(),
      _ssl.OPENSSL_VERSION[:8], tree.fromstring("<a b='c'/>").attrib,
      numpy.linalg.det([[1.0, 2], [3, 4]]).round(), libz.crc32(0, b"hello", 5),
      _sqlite3.__spec__.name, _sqlite3.__file__ == _sqlite3.__spec__.origin)
theirs = [library.path for library in host.libraries()]
files = [one for one in (_decimal, _sqlite3, _ssl, _json, pyexpat) if hasattr(one, "__file__")]
print([name for name in ("_decimal", "_sqlite3", "_ssl", "pyexpat", "libsqlite3", "libssl", "umath")
       if any(name in path for path in theirs)],
      len(imports.bill.opened) >= (7 if len(files) == 5 else len(files) + 1), imports.fell_back)
"""


def test_modules_are_loaded_by_us_and_work() -> None:
    done = python(_MODULES)
    assert (done.returncode, done.stderr) == (0, "")
    works, ours = done.stdout.splitlines()
    assert works == "3.3 (42,) OpenSSL  {'b': 'c'} -2.0 907060870 _sqlite3 True"
    assert ours == "[] True []"


def test_the_words_are_put_back(in_child: InChild) -> None:
    def story() -> list[bool]:
        plain = words()
        with miniloader.importing():
            led = words()
        return [led.keys() == plain.keys(), led != plain, words() == plain]

    assert in_child(story) == [True, True, True]


def test_who_has_a_handle_of_ours_may_go_on_asking(
    in_child: InChild, fixture_library: FixtureLibrary
) -> None:
    """``ctypes.CDLL`` looks a function up when it is first used, and that may be later."""
    fixture_library("opened_dep")
    path = str(fixture_library("opened"))

    def story() -> list[Any]:
        with miniloader.importing():
            library = ctypes.CDLL(path)
        later = ctypes.CDLL(str(fixture_library("demo")))
        known = [other.path for other in host.libraries()]
        return [library.plug(), path in known, later._name in known]

    assert in_child(story) == [42, False, True]


def test_what_cannot_be_loaded_falls_back_and_is_named(fixture_library: FixtureLibrary) -> None:
    program = (
        "import ctypes, sys, miniloader\n"
        "with miniloader.importing(strict='strict' in sys.argv) as imports:\n"
        "    ctypes.CDLL(sys.argv[1])\n"
        "print(len(imports.fell_back))\n"
    )
    path = fixture_library("textrel")
    done = python(program, path)
    assert (done.returncode, done.stdout) == (0, "1\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"miniloader: {path}: loaded by ld.so instead: {path}: DT_TEXTREL")
    strict = python(program, path, "strict")
    assert strict.returncode == 1
    assert strict.stderr.splitlines()[-1].startswith(f"OSError: {path}: DT_TEXTREL")


def test_what_nobody_has_is_an_error_in_the_words_of_ld_so() -> None:
    program = (
        "import ctypes, sys\n"
        "try:\n"
        "    ctypes.CDLL('libnonexistent.so.1')\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    led = f"import miniloader\nwith miniloader.importing():\n    exec({program!r})\n"
    assert python(led).stdout == python(program).stdout != ""


def test_only_what_fits_is_ours() -> None:
    program = (
        "import miniloader\n"
        "from miniloader.loader.beside_glibc import host\n"
        "with miniloader.importing('*_decimal*') as imports:\n"
        "    import _decimal, _sqlite3\n"
        "print([opened.name.rpartition('/')[2].partition('.')[0] for opened in imports.bill.opened])\n"
        "print(any('_sqlite3' in library.path for library in host.libraries()))\n"
    )
    assert python(program).stdout == "['_decimal']\nTrue\n"


def test_forked_children_and_threads_keep_it() -> None:
    program = (
        "import os, threading, miniloader\n"
        "from miniloader.loader.beside_glibc import host\n"
        "def ours(name):\n"
        "    __import__(name)\n"
        "    theirs = any(name in library.path for library in host.libraries())\n"
        "    os.write(1, f'{name} {not theirs}\\n'.encode())\n"
        "with miniloader.importing():\n"
        "    if os.fork() == 0:\n"
        "        ours('_decimal')\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "    threads = [threading.Thread(target=ours, args=(name,)) for name in ('_sqlite3', '_lsprof')]\n"
        "    for thread in threads:\n"
        "        thread.start()\n"
        "    for thread in threads:\n"
        "        thread.join()\n"
    )
    done = python(program)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split("\n")) == ["", "_decimal True", "_lsprof True", "_sqlite3 True"]


@pytest.mark.parametrize(
    "what", ["import _lsprof; print(1)", "import ctypes; ctypes.CDLL('liblzma.so.5'); print(1)"]
)
@pytest.mark.parametrize("thread", ["", "thread"])
def test_other_interpreters_load_by_us_too(what: str, thread: str) -> None:
    """They hold Python's lock, or one of their own, as they ask; the main one answers."""
    module = "_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters"
    program = f"""
import sys, threading, miniloader, {module} as interpreters
from miniloader.loader.beside_glibc import host

def in_other(what):
    interpreters.run_string(created, what)

with miniloader.importing() as imports:
    created = interpreters.create()
    if sys.argv[2]:
        asks = threading.Thread(target=in_other, args=sys.argv[1:2])
        asks.start()
        asks.join()
    else:
        in_other(sys.argv[1])
    interpreters.destroy(created)
    import _decimal
print(_decimal.Decimal(2), imports.fell_back)
print([library.path for library in host.libraries() if "_lsprof" in library.path or "lzma" in library.path])
"""
    done = python(program, what, thread)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n2 []\n[]\n", "")


_RAISES = """
#include <signal.h>
static void own(int number) { (void)number; }
__attribute__((constructor)) static void begin(void)
{
    raise(SIGUSR1);
    signal(SIGUSR2, own);
}
"""
_SIGNALS = """
import _ctypes, ctypes, signal, sys, threading, miniloader
class Late(Exception):
    pass
def handler(number, frame):
    raise Late(frame.f_code.co_filename == __file__)
__file__ = handler.__code__.co_filename
def at(number):
    words = (ctypes.c_uint64 * 32)()
    ctypes.CDLL(None).sigaction(int(number), None, words)
    return words[0]
LED = len(sys.argv) > 2
with miniloader.importing(strict=True) if LED else threading.Lock():
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, handler)
    signal.siginterrupt(signal.SIGUSR1, False)
    ours = at(signal.SIGUSR1)
    opened = []
    for name in ("libbz2.so.1.0", sys.argv[1], sys.argv[1]):
        try:
            opened.append(_ctypes.dlopen(name, 2))
            print("opened")
        except Late as error:
            print("late", error)
    print(len(opened), at(signal.SIGUSR1) == ours, at(signal.SIGUSR2) == ours)
"""


def _said_by_both(program: str, library: Path, source: str, word: str) -> str:
    """What a program prints of a library in C, as ld.so loads it and, given a ``word`` more, as we do."""
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    ours, theirs = python(program, library, word), python(program, library)
    assert (ours.stdout, ours.stderr) == (theirs.stdout, "")
    return ours.stdout


def test_handlers_of_signals_run_when_what_was_asked_is_answered(tmp_path: Path) -> None:
    """As with ld.so they are the program's, and what they raise, too.  A constructor may install others."""
    said = _said_by_both(_SIGNALS, tmp_path / "raises.so", _RAISES, "led")
    assert "late True" in said


_INTERRUPTED = """
#include <dlfcn.h>
#include <signal.h>
void *opened;
void raise_and_open(const char *name)
{
    raise(SIGUSR1);
    opened = dlopen(name, RTLD_NOW);
}
"""
_COMES_BEFORE = """
import ctypes, signal, sys, miniloader
class Late(Exception):
    pass
def handler(number, frame):
    raise Late
signal.signal(signal.SIGUSR1, handler)
if len(sys.argv) > 2:
    library = miniloader.load(sys.argv[1])
    function, opened = library["raise_and_open"], ctypes.c_void_p.from_address(library.address("opened"))
else:
    library = ctypes.CDLL(sys.argv[1])
    function, opened = library.raise_and_open, ctypes.c_void_p.in_dll(library, "opened")
for _ in range(20):
    opened.value = None
    try:
        function(b"libbz2.so.1.0")
        print("nothing was raised")
    except Late:
        print("raised", bool(opened.value))
"""


def test_what_a_handler_raises_that_was_due_before_comes_after_the_answer(tmp_path: Path) -> None:
    """A signal that came while C code ran, which then asks: the answer is made, and the program has it."""
    said = _said_by_both(_COMES_BEFORE, tmp_path / "interrupted.so", _INTERRUPTED, "ours")
    assert said == "raised True\n" * 20


def test_who_profiles_the_program_hears_nothing_of_ours() -> None:
    program = """
import _ctypes, sys, miniloader
heard = []
with miniloader.importing(strict=True) as imports:
    sys.setprofile(lambda frame, event, argument: heard.append((event, frame.f_code.co_filename)))
    handle = _ctypes.dlopen("libbz2.so.1.0", 2)
    _ctypes.dlsym(handle, "BZ2_bzlibVersion")
    sys.setprofile(None)
print({file for _, file in heard}, len(heard), len(imports.bill.opened))
"""
    done = python(program)
    assert (done.stdout, done.stderr) == ("{'<string>'} 5 1\n", "")


def test_numpy_itself_comes_from_us_where_prepared_pages_are_asked_for() -> None:
    """Which takes numpy to read them: until that is imported, the plain way."""
    program = """
import miniloader
from miniloader.loader.beside_glibc import host
with miniloader.importing(prepared=True) as imports:
    import numpy
print(imports.fell_back, [library.path for library in host.libraries() if "umath" in library.path])
"""
    done = python(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] []\n", "")


_COSTS = """
import _ctypes, json, sys, time, miniloader
from miniloader.report.bill import as_json

spent = 0.0

def timed(function, *arguments):
    global spent
    begin = time.perf_counter()
    result = function(*arguments)
    spent += time.perf_counter() - begin
    return result

with miniloader.importing() as imports:
    libcrypto = timed(_ctypes.dlopen, "libcrypto.so.3", 2)
    for name in ("SHA1", "SHA224", "SHA256", "SHA384", "SHA512", "MD5") * 20:
        timed(_ctypes.dlsym, libcrypto, name)
    timed(_ctypes.dlopen, sys.argv[1], 2)
print(json.dumps([spent, as_json(imports.bill)]))
"""


def test_the_parts_of_the_bill_are_its_whole(fixture_library: FixtureLibrary) -> None:
    """Within five per cent of what a clock around the calls of dlopen(3) and dlsym(3) shows."""
    fixture_library("opened")

    def measure() -> tuple[float, dict[str, Any]]:
        done = python(_COSTS, fixture_library("opens_more"))
        assert (done.returncode, done.stderr) == (0, "")
        spent, bill = json.loads(done.stdout)
        billed = sum(opened["ms"] for opened in bill["opened"]) + bill["lookups_ms"]
        print(f"{billed:.2f} of {spent * 1e3:.2f} ms")
        assert billed <= spent * 1e3
        return billed / (spent * 1e3), bill

    # Others may get the processor between the clock and the call.
    measured = (measure() for _ in range(8))
    bill = next((bill for share, bill in measured if share > 0.95), None)
    assert bill is not None
    crypto, inner = bill["opened"]
    parts = [library["parts_ms"] for library in crypto["libraries"]]
    total = sum(sum(each.values()) for each in parts)
    assert total == pytest.approx(crypto["ms"], rel=0.01)
    assert bill["lookups"] == 120
    assert {"search", "map", "bind", "relocate", "constructors"} <= {
        name for each in parts for name, taken in each.items() if taken > 0
    }
    assert sum(library["private_pages"] for library in crypto["libraries"]) > 10
    assert crypto["page_faults"] > 10
    (nested,) = inner["nested"]  # its constructor opens another
    assert nested["name"] == "libopened.so"
    assert nested["ms"] < inner["ms"]
    own = sum(sum(library["parts_ms"].values()) for library in inner["libraries"])
    assert own + nested["ms"] == pytest.approx(inner["ms"], rel=0.02)


def test_a_load_takes_no_longer_the_more_there_are(
    fixture_library: FixtureLibrary, in_child: InChild
) -> None:
    """A hundred libraries are there already: twice as long at most, and not for each of them again."""
    data = fixture_library("demo").read_bytes()

    def story() -> list[float]:
        def taken() -> float:
            times = []
            for _ in range(15):
                begin = time.process_time()
                miniloader.load(miniloader.Source.from_bytes(data)).close()
                times.append(time.process_time() - begin)
            return sorted(times)[len(times) // 2]

        few = taken()
        kept = [miniloader.load(miniloader.Source.from_bytes(data)) for _ in range(100)]
        many = taken()
        return [few, many, len(kept)]

    few, many, _ = in_child(story)
    assert many < 2 * few + 0.001


def test_destructors_of_modules_run_when_python_has_ended(fixture_library: FixtureLibrary) -> None:
    """As with ld.so: until then Python calls into them, and gives back what is theirs."""
    program = (
        "import atexit, ctypes, sys, miniloader\n"
        "imports = miniloader.importing()\n"
        "imports.__enter__()\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "getenv = ctypes.CDLL(None).getenv\n"
        "getenv.restype = ctypes.c_char_p\n"
        "class Last:\n"
        "    def __del__(self, get=getenv, out=sys.stdout):\n"
        "        out.write(get(b'OPENED').decode() + '\\n')\n"
        "        out.flush()\n"
        "import builtins\n"
        "builtins.last = Last()\n"
    )
    done = python(program, fixture_library("opened_dep"))
    assert (done.returncode, done.stdout, done.stderr) == (0, " +dep\n", "")
