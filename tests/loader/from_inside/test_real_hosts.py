"""Engines that open most of themselves: a Java VM, OpenSSL's providers, Perl, Qt, iconv."""

from __future__ import annotations

import ctypes
import glob
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import miniloader
from miniloader.loader.beside_glibc import host
from miniloader.loader.surroundings import find_here
from tests.loader.conftest import InChild

FixtureLibrary = Callable[[str], Path]
POINTER, TEXT, INT, SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t


def _of_host(*words: str) -> list[str]:
    """Which libraries ld.so has of those with one of ``words`` in their path."""
    return [library.path for library in host.libraries() if any(word in library.path for word in words)]


class _Option(ctypes.Structure):
    _fields_ = (("text", TEXT), ("extra", POINTER))


class _Arguments(ctypes.Structure):
    _fields_ = (
        *(("version", INT), ("count", INT), ("options", ctypes.POINTER(_Option))),
        ("ignore", ctypes.c_ubyte),
    )


def _java(path: str) -> list[Any]:
    library = miniloader.load(path)
    create = library.function("JNI_CreateJavaVM", INT, [POINTER] * 3)
    options = (_Option * 2)(_Option(b"-Xmx64m", None), _Option(b"-Xshare:auto", None))
    arguments = _Arguments(0x00010008, 2, options, 1)
    machine, environment = POINTER(), POINTER()
    created = create(*map(ctypes.addressof, (machine, environment, arguments)))
    functions = ctypes.cast(environment, ctypes.POINTER(ctypes.POINTER(POINTER)))[0]

    def call(place: int, *arguments: Any) -> Any:
        types = [INT if isinstance(argument, int) and argument < 0 else POINTER for argument in arguments]
        texts = [ctypes.cast(a, POINTER) if isinstance(a, bytes) else a for a in arguments]
        return ctypes.CFUNCTYPE(POINTER, POINTER, *types)(functions[place])(environment, *texts)

    math = call(6, b"java/lang/Math")  # FindClass
    method = call(113, math, b"max", b"(II)I")  # GetStaticMethodID
    numbers = (ctypes.c_longlong * 2)(3, 8)
    largest = call(131, math, method, ctypes.addressof(numbers))  # CallStaticIntMethodA
    files = call(6, b"java/nio/file/Files")
    return [created, largest, bool(files), _of_host("/jvm/")]


def test_a_java_virtual_machine_starts_and_runs_a_method(in_child: InChild) -> None:
    found = sorted(glob.glob("/usr/lib/jvm/*/lib/server/libjvm.so"))
    if not found:
        pytest.skip("this machine lacks a Java virtual machine")
    assert in_child(_java, found[0]) == [0, 8, True, []]


def test_openssl_takes_a_provider_from_a_file(in_child: InChild) -> None:
    path = find_here("libcrypto.so.3").path
    if path is None or not glob.glob(os.path.join(os.path.dirname(path), "ossl-modules", "legacy.so")):
        pytest.skip("this machine lacks OpenSSL 3's legacy provider")

    def story() -> list[Any]:
        library = miniloader.load("libcrypto.so.3")
        provider = library.function("OSSL_PROVIDER_load", POINTER, [POINTER, TEXT])(None, b"legacy")
        digest = library.function("EVP_MD_fetch", POINTER, [POINTER, TEXT, TEXT])(None, b"MD4", None)
        out, length = ctypes.create_string_buffer(64), ctypes.c_uint()
        arguments = [TEXT, SIZE, POINTER, POINTER, POINTER, POINTER]
        digests = library.function("EVP_Digest", INT, arguments)
        good = digests(b"abc", 3, ctypes.addressof(out), ctypes.addressof(length), digest, None)
        answer = out.raw[: length.value].hex()
        library.function("EVP_MD_free", None, [POINTER])(digest)
        unloaded = library.function("OSSL_PROVIDER_unload", INT, [POINTER])(provider)
        return [good, answer, unloaded, _of_host("ossl-modules")]

    # RFC 1320, appendix A.5
    assert in_child(story) == [1, "a448017aaf21d8525fc10ae87aa6729d", 1, []]


_PERL = b"use POSIX qw(floor); use List::Util qw(sum); our $answer = floor(3.7) . ' ' . sum(1..10);"


def test_perl_takes_modules_that_find_it_in_the_global_scope(
    in_child: InChild, fixture_library: FixtureLibrary
) -> None:
    """Its modules do not say that they need it: whoever opens it has to make it global."""
    found = next(filter(None, (find_here(f"libperl.so.5.{minor}").path for minor in range(30, 50, 2))), None)
    if found is None or not glob.glob(os.path.join(os.path.dirname(found), "perl", "*", "auto/POSIX")):
        found = None if found is None or not glob.glob("/usr/lib/*/perl/*/auto/POSIX/POSIX.so") else found
    if found is None:
        pytest.skip("this machine lacks libperl with its modules")

    def story() -> list[Any]:
        opener = miniloader.load(fixture_library("opens"))
        handle = opener.function("opens", POINTER, [TEXT, INT])(
            os.fsencode(found), os.RTLD_NOW | os.RTLD_GLOBAL
        )
        look = opener.function("symbol", POINTER, [POINTER, TEXT])

        def function(name: bytes, result: Any, *arguments: Any) -> Any:
            return ctypes.CFUNCTYPE(result, *arguments)(look(handle, name))

        words = (TEXT * 4)(b"perl", b"-e", _PERL, None)
        count, environment = INT(3), (TEXT * 1)(None)
        pointers = POINTER(ctypes.addressof(words)), POINTER(ctypes.addressof(environment))
        initialise = function(b"Perl_sys_init3", None, POINTER, POINTER, POINTER)
        initialise(*map(ctypes.addressof, (count, *pointers)))
        perl = function(b"perl_alloc", POINTER)()
        function(b"perl_construct", None, POINTER)(perl)
        new = function(b"Perl_newXS", POINTER, POINTER, TEXT, POINTER, TEXT)
        boot = look(handle, b"boot_DynaLoader")

        @ctypes.CFUNCTYPE(None, POINTER)
        def start(interpreter: int) -> None:
            new(interpreter, b"DynaLoader::boot_DynaLoader", boot, b"test")

        parse = function(b"perl_parse", INT, POINTER, POINTER, INT, POINTER, POINTER)
        parsed = parse(perl, ctypes.cast(start, POINTER), 3, ctypes.addressof(words), None)
        ran = function(b"perl_run", INT, POINTER)(perl)
        answer = function(b"Perl_get_sv", POINTER, POINTER, TEXT, INT)(perl, b"answer", 0)
        text = function(b"Perl_sv_2pv_flags", TEXT, POINTER, POINTER, POINTER, INT)(perl, answer, None, 0)
        return [parsed, ran, text, _of_host("/perl/", "libperl")]

    assert in_child(story) == [0, 0, b"3 55", []]


_BUTTON = """
from PySide6.QtCore import Qt, QTimer
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication, QPushButton
application = QApplication([])
button = QPushButton("press")
button.clicked.connect(lambda: (print("clicked", flush=True), application.quit()))
button.show()
QTimer.singleShot(0, lambda: QTest.mouseClick(button, Qt.MouseButton.LeftButton))
application.exec()
print(application.platformName(), button.grab().toImage().size().toTuple())
"""


def test_qt_shows_a_window_and_an_event(tmp_path: Path) -> None:
    """Each of its libraries and modules, and the plugin of its platform, comes through us: --strict."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--only-binary=:all:",
    ]
    packages = tmp_path / "packages"
    try:
        brought = subprocess.run(
            [*install, "--target", packages, "PySide6-Essentials"],
            capture_output=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("this machine lacks Qt (PySide6), and pip took too long to bring it")
    if brought.returncode:
        pytest.skip("this machine lacks Qt (PySide6), and pip could not bring it")
    (tmp_path / "button.py").write_text(_BUTTON)
    root = Path(miniloader.__file__).parents[1]
    surroundings = os.environ | {
        "QT_QPA_PLATFORM": "offscreen",
        "PYTHONPATH": os.pathsep.join((str(packages), str(root))),
    }

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command, "button.py"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=surroundings,
            timeout=120,
        )

    plain = run()
    if plain.returncode:
        pytest.skip(f"this machine lacks what Qt needs: {plain.stderr.strip().splitlines()[-1]}")
    ours = run("-m", "miniloader", "run", "--strict", "--bill", "bill.txt")
    assert (ours.stdout, ours.returncode) == (plain.stdout, 0), ours.stderr
    assert "clicked" in plain.stdout
    assert "libqoffscreen.so" in (tmp_path / "bill.txt").read_text()


def test_what_glibc_opens_itself_is_told(fixture_library: FixtureLibrary) -> None:
    """iconv(3), called by a library of ours: its modules are ld.so's, and --trace says so."""
    call = 'converts("\u00e9", "ISO-8859-2//TRANSLIT")->int'
    command = [sys.executable, "-m", "miniloader", "load", str(fixture_library("converts")), "--trace"]
    root = Path(miniloader.__file__).parents[1]
    done = subprocess.run(
        [*command, "--call", call], capture_output=True, text=True, check=True, cwd=root, timeout=60
    )
    assert " = 233 " in done.stdout
    assert re.search(r"by itself: .*/gconv/ISO8859-2\.so", done.stdout), done.stdout
