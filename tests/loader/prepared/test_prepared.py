"""Prepared libraries: the words that a plain load writes, shared; the plain way if anything is amiss."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pwd
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import miniloader
from fixtures import build
from miniloader.elf import Source, read_image
from miniloader.errors import LoadError, UsageError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader import Event, Library
from miniloader.loader.beside_glibc import stand_ins
from miniloader.loader.prepare import entries, prepare, verify
from miniloader.loader.prepared import index, pages, store
from tests.loader.conftest import call_in_child

Words = NDArray[np.uint64]

_FIXTURES = ("demo", "demo_relr", "relocations", "ifunc", "symbols", "cxx", "unique", "lazy")
_THREAD_LOCAL = ("tls_general", "tls_local", "tls_initial", "tls_descriptors")
_SYSTEM = ("libz.so.1", "libcrypto.so.3", "libexpat.so.1", "libsqlite3.so.0", "libstdc++.so.6")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "miniloader" / "prepared"


class Loading:
    """A load with ``prepared``, and the reason it gave for going the plain way."""

    def __init__(self, path: str | Path, **options: object) -> None:
        self.reasons: list[str] = []
        self.library: Library = miniloader.load(path, prepared=True, on_event=self._hear, **options)  # type: ignore[arg-type]

    def _hear(self, event: Event) -> None:
        if event.stage == "prepared":
            self.reasons.append(event.data["reason"])

    @property
    def used(self) -> bool:
        return self.library.loaded.ready is not None


def words(library: Library) -> Words:
    """Everything of the library's file that may be written, and what code of ours there stands for."""
    memory = library.loaded.mapped
    parts = [
        memory.read(mapping.start, mapping.length)
        for mapping in memory.plan.mappings
        if mapping.kind == "file" and "w" in mapping.protection
    ]
    found = np.concatenate(parts).view(np.uint64)
    for function, stand_in in stand_ins.stand_ins().items():
        found[found == stand_in] = function
    return found


def compared(path: str) -> tuple[int, list[int]]:
    """How many words were relocated, and which differ from those of a plain load at the same address.

    Each is done in a process of its own, forked from this one, so that what is needed is in the same place.
    """
    for needed in miniloader.inspect(path).needed:
        ctypes.CDLL(needed)
    entry = call_in_child(prepare, path)

    def ours() -> Words:
        loading = Loading(path, init=False)
        assert loading.used, loading.reasons
        return words(loading.library)

    def plain() -> Words:
        return words(miniloader.load(path, init=False, address=entry.address))

    return entry.words, np.flatnonzero(call_in_child(ours) != call_in_child(plain)).tolist()


# ------------------------------------------------------------------------------------- the same words
@pytest.mark.parametrize("name", _FIXTURES)
def test_words_are_those_of_a_plain_load(name: str, in_child: Callable[..., tuple[int, list[int]]]) -> None:
    relocated, different = in_child(compared, str(build.build(name)))
    assert (relocated > 0, different) == (True, [])


@pytest.mark.parametrize("name", _SYSTEM)
def test_words_of_system_libraries_too(name: str, in_child: Callable[..., tuple[int, list[int]]]) -> None:
    relocated, different = in_child(compared, miniloader.inspect(name).path)
    assert relocated > 50
    assert different == []


def test_a_wrong_word_would_be_seen(in_child: Callable[..., object], demo: Path) -> None:
    def spoiled() -> tuple[bool, int]:
        prepare(demo)
        (name,) = store.names()
        path = os.path.join(store.directory(), name)
        os.chmod(path, 0o600)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
            data[-PAGE_SIZE] ^= 1  # in the cached pages
        os.chmod(path, 0o400)
        loading = Loading(demo)
        return loading.used, len(loading.reasons)

    assert in_child(spoiled) == (False, 1)


def test_it_takes_no_numpy(demo: Path) -> None:
    prepare(demo)
    code = (
        "import sys, miniloader\n"
        "library = miniloader.load(sys.argv[1], prepared=True)\n"
        "print(library.loaded.ready is not None, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(demo)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=build.ROOT)
    assert done.stdout == "True False\n"


@pytest.mark.parametrize("model", _THREAD_LOCAL)
def test_thread_local_storage(model: str, in_child: Callable[..., object]) -> None:
    def look() -> list[object]:
        path = build.build(model)
        prepare(path)
        loading = Loading(path)
        assert loading.used, loading.reasons
        library, seen = loading.library, []

        def ask() -> None:
            text = library.function("tls_get_text", ctypes.c_char_p)()
            seen.append((library.function("tls_next")(), library.function("tls_next_local")(), text))

        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        library.close()
        return seen

    assert in_child(look) == [(42, 7, b"relocated")] * 2


def test_cxx_and_ifunc_run(in_child: Callable[..., object]) -> None:
    def run() -> tuple[int, int, int, bool]:
        for name in ("cxx", "ifunc"):
            prepare(build.build(name))
        cxx, ifunc = Loading(build.build("cxx")), Loading(build.build("ifunc"))
        library = cxx.library
        caught = library.function("throw_and_catch", ctypes.c_int, [ctypes.c_int])(3)
        return (
            caught,
            library.function("catch_from_host")(),
            library.function("casts")(),
            ifunc.used and cxx.used,
        )

    assert in_child(run) == (3, 1, 1, True)


def test_a_library_that_asks_about_itself_is_answered(in_child: Callable[..., object]) -> None:
    path = build.build("asks_itself")

    def answers(ask: Any) -> list[str]:
        ask.restype = ctypes.c_char_p
        return ask().decode().splitlines()  # type: ignore[no-any-return]

    def ours() -> tuple[bool, list[str]]:
        prepare(path)
        loading = Loading(path)
        return loading.used, answers(loading.library.function("ask"))

    assert in_child(ours) == (True, in_child(lambda: answers(ctypes.CDLL(str(path)).ask)))


def test_sqlite_answers(in_child: Callable[..., object]) -> None:
    def run() -> tuple[bool, bytes]:
        prepare("libsqlite3.so.0")
        loading = Loading("libsqlite3.so.0")
        return loading.used, loading.library.function("sqlite3_libversion", ctypes.c_char_p)()

    used, version = in_child(run)  # type: ignore[misc]
    assert used
    assert version.startswith(b"3.")


def test_dependencies_of_ours_may_be_anywhere(in_child: Callable[..., object]) -> None:
    def run() -> tuple[bool, int, int]:
        call_in_child(prepare, build.build("chain_a"))
        loading = Loading(build.build("chain_a"))
        function = loading.library.function("chain_a")
        return loading.used, function(), ctypes.CDLL(str(build.build("chain_a"))).chain_a()

    used, ours, theirs = in_child(run)  # type: ignore[misc]
    assert (used, ours) == (True, theirs)


# ---------------------------------------------------------------------------------- the plain way instead
def _copy_of(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(demo, tmp_path / "libcopy.so"))


def _touch(path: Path, _: Path) -> None:
    os.utime(path, ns=(1, 1))


def _shorter(_: Path, kept: Path) -> None:
    kept.chmod(0o600)
    os.truncate(kept, kept.stat().st_size - PAGE_SIZE)
    kept.chmod(0o400)


def _spoil(kept: Path, at: int) -> None:
    data = bytearray(kept.read_bytes())
    data[at] ^= 0x40
    kept.unlink()
    kept.write_bytes(data)
    kept.chmod(0o400)


def _other_kind(_: Path, kept: Path) -> None:
    kept.unlink()
    kept.write_bytes(b"something else")
    kept.chmod(0o400)


def _link(_: Path, kept: Path) -> None:
    kept.rename(kept.with_suffix(".moved"))
    kept.symlink_to(kept.with_suffix(".moved"))


def _of_another(path: Path, kept: Path) -> None:
    entry = prepare(build.build("relocations"))
    os.rename(kept.with_name(entry.name), kept)


def _elsewhere(kept: Path) -> None:
    """The index, whole, says that the last of the cached pages belong behind the library."""
    head, data = index._HEAD, bytearray(kept.read_bytes())
    length = head.unpack_from(data)[2]
    runs = head.size + 8 + -(-length // 8) * 8
    count = json.loads(data[head.size + 8 :][:length])["counts"]["runs"]
    last = np.frombuffer(data, pages.RUN, count, runs)[-1:]
    last["vaddr"] += 1 << 30
    del last
    _checked(kept, data)


def _saying(kept: Path, text: bytes) -> None:
    """The index says in JSON, with its checksum, what no index does."""
    head, data = index._HEAD, bytearray(kept.read_bytes())
    length = head.unpack_from(data)[2]
    assert len(text) <= length
    data[head.size + 8 : head.size + 8 + length] = text.ljust(length)
    _checked(kept, data)


def _instead(kept: Path, key: str, value: object) -> bytes:
    """The JSON of the index with another ``value``, in no more bytes."""
    head, data = index._HEAD, kept.read_bytes()
    facts = json.loads(data[head.size + 8 :][: head.unpack_from(data)[2]])
    return json.dumps({**facts, key: value}, separators=(",", ":")).encode()


def _checked(kept: Path, data: bytearray) -> None:
    """Write ``data`` in place of a file of the cache, with the checksum that it then has."""
    head = index._HEAD
    magic, _, length, total = head.unpack_from(data)
    at = int.from_bytes(data[head.size : head.size + 8], "little")
    checksum = zlib.crc32(data[head.size : at], zlib.crc32(struct.pack("<QQ", length, total)))
    head.pack_into(data, 0, magic, checksum, length, total)
    kept.unlink()
    kept.write_bytes(data)
    kept.chmod(0o400)


def _endless(kept: Path) -> None:
    """A file of a terabyte, all of it index."""
    head, size = index._HEAD, 1 << 40
    kept.unlink()
    kept.write_bytes(head.pack(b"miniprep", 0, 2, size) + size.to_bytes(8, "little"))
    os.truncate(kept, size)
    kept.chmod(0o400)


_AMISS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "changed": (_touch, "its file has changed since"),
    "replaced": (lambda path, _: os.replace(shutil.copy(path, f"{path}.new"), path), "has changed since"),
    "not there": (lambda _, kept: kept.unlink(), "not in the cache"),
    "shorter": (_shorter, "damaged"),
    "head": (lambda _, kept: _spoil(kept, 9), "damaged"),
    "index": (lambda _, kept: _spoil(kept, 200), "index is damaged"),
    "pages": (lambda _, kept: _spoil(kept, -1), "pages are damaged"),
    "elsewhere": (lambda _, kept: _elsewhere(kept), "its pages are of another library"),
    "no names": (lambda _, kept: _saying(kept, _instead(kept, "names", [])), "index is damaged"),
    "no file": (lambda _, kept: _saying(kept, _instead(kept, "file", 1)), "index is damaged"),
    "no path": (lambda _, kept: _saying(kept, _instead(kept, "path", 7)), "index is damaged"),
    "a path with a zero": (lambda _, kept: _saying(kept, _instead(kept, "path", "/\0")), "index is damaged"),
    "no build-id": (lambda _, kept: _saying(kept, _instead(kept, "build_id", 1.5)), "index is damaged"),
    "no number": (lambda _, kept: _saying(kept, _instead(kept, "filled", "x")), "index is damaged"),
    "a huge number": (lambda _, kept: _saying(kept, _instead(kept, "address", 1 << 64)), "index is damaged"),
    "below nothing": (lambda _, kept: _saying(kept, _instead(kept, "end", -1)), "index is damaged"),
    "pairs of one": (lambda _, kept: _saying(kept, _instead(kept, "tls_kinds", [[16]])), "index is damaged"),
    "no such kind": (
        lambda _, kept: _saying(kept, _instead(kept, "tls_kinds", [[1, 0]])),
        "index is damaged",
    ),
    "out of scope": (lambda _, kept: _saying(kept, _instead(kept, "held", [999])), "index is damaged"),
    "no such value": (lambda _, kept: _saying(kept, _instead(kept, "special", [[9999, 0, 0]])), "index is d"),
    "endless": (lambda _, kept: _endless(kept), "index is damaged"),
    "other kind": (_other_kind, "another kind"),
    "writable": (lambda _, kept: kept.chmod(0o600), "mode 0600.*expected .* mode 0400"),
    "for others": (lambda _, kept: kept.chmod(0o444), "mode 0444"),
    "link": (_link, "symbolic link|symbolic"),
    "another's": (_of_another, "another library's"),
    "directory": (lambda _, kept: kept.parent.chmod(0o755), "mode 0755, expected one of user"),
}


@pytest.mark.parametrize("what", _AMISS)
def test_whatever_is_amiss_it_is_loaded_the_plain_way(
    what: str, demo: Path, tmp_path: Path, own_cache: Path
) -> None:
    path = _copy_of(demo, tmp_path)
    entry = prepare(path)
    spoil, reason = _AMISS[what]
    spoil(path, own_cache / entry.name)
    loading = Loading(path)
    with loading.library as library:
        assert not loading.used
        assert len(loading.reasons) == 1
        assert library.function("demo_add", ctypes.c_int, [ctypes.c_int] * 2)(40, 2) == 42
    assert re.search(reason, loading.reasons[0]), loading.reasons


def test_a_taken_address(demo: Path) -> None:
    entry = prepare(demo)
    with miniloader.load(build.build("relocations"), address=entry.address):  # in the way
        loading = Loading(demo)
        assert not loading.used
        loading.library.close()
    assert "File exists" in loading.reasons[0]


def test_another_address_is_asked_for(demo: Path) -> None:
    entry = prepare(demo)
    loading = Loading(demo, address=entry.address + (1 << 30))
    with loading.library as library:
        assert library.loaded.mapped.start == entry.address + (1 << 30)
    assert loading.reasons == [f"it was prepared for {entry.address:#x}"]


def test_other_libraries_in_the_scope(demo: Path, tmp_path: Path) -> None:
    code = (
        "import sys, miniloader\n"
        "tell = lambda event: event.stage == 'prepared' and print(event.text)\n"
        "miniloader.load(sys.argv[1], prepared=True, on_event=tell)"
    )
    prepare(demo)
    command = [sys.executable, "-c", code, str(demo)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=build.ROOT)
    assert done.stdout == ""
    preload = {**os.environ, "LD_PRELOAD": str(build.build("bss"))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=build.ROOT, env=preload)
    assert re.match(
        r"not from the cache: .*libbss.so is searched for symbols where another library was", done.stdout
    )


def test_after_the_machine_has_booted(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(demo)
    monkeypatch.setattr(store, "boot_id", lambda: "another boot")
    loading = Loading(demo)
    loading.library.close()
    assert "before the machine booted" in loading.reasons[0]
    assert prepare(demo).address != first.address  # a new secret


def test_a_secret_without_an_end_is_made_anew(demo: Path, own_cache: Path) -> None:
    first = prepare(demo)
    secret = own_cache / "secret"
    secret.chmod(0o600)
    os.truncate(secret, 1 << 40)
    secret.chmod(0o400)
    assert prepare(demo).address != first.address
    assert secret.stat().st_size < 100


def test_lazy_binding_is_another_thing(demo: Path) -> None:
    with pytest.raises(UsageError, match="lazy"):
        miniloader.load(demo, bind="lazy", prepared=True)


# Whether the page with pointers into the program is as it was prepared, and they are right.
_POINTERS = """
import ctypes, mmap, sys, miniloader
from miniloader.loader.prepare import prepare
prepare(sys.argv[1])
library = miniloader.load(sys.argv[1], prepared=True)
ready, address = library.loaded.ready, library.address("pointers")
shared = ready.pages[~ready.differing].tolist()
names = "PyList_Type", "PyDict_Type"
wanted = [ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, name)) for name in names]
found = list((ctypes.c_void_p * 2).from_address(address))
print((address - library.base) & -mmap.PAGESIZE in shared, found == wanted)
"""


@pytest.mark.parametrize("program", [sys.executable, "/usr/bin/python3"])
def test_what_leads_into_a_program_at_a_fixed_address_is_shared(program: str, tmp_path: Path) -> None:
    if not os.path.exists(program):
        pytest.skip(f"no {program}")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    if version.split(".")[:2] != f"Python {sys.version}".split(".")[:2]:
        pytest.skip(f"{program} is another version than this one, whose numpy it needs")
    fixed = read_image(Source.open(program)).header.type == "EXEC"
    library = tmp_path / "libpointers.so"
    source = "extern char PyList_Type[], PyDict_Type[]; void *pointers[512] = {PyList_Type, PyDict_Type};"
    compiler = ["gcc", "-shared", "-fPIC", "-Wl,--build-id", "-xc", "-", "-o", str(library)]
    subprocess.run(compiler, input=source, text=True, check=True)
    environment = {**os.environ, "PYTHONPATH": f"{build.ROOT}:{Path(np.__file__).parents[1]}"}
    command = [program, "-c", _POINTERS, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(fixed), "True"]


# ------------------------------------------------------------------------------------------- the cache
def test_addresses_stay_and_are_apart(demo: Path) -> None:
    names = ("demo", "relocations", "cxx", "symbols")
    made = [prepare(build.build(name)) for name in names]
    assert [prepare(build.build(name)).address for name in names] == [entry.address for entry in made]
    spans = sorted((entry.address, entry.address + entry.length) for entry in made)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))
    assert all(entry.address % PAGE_SIZE == 0 for entry in made)
    assert sorted(entries(), key=lambda entry: entry.name) == sorted(made, key=lambda entry: entry.name)
    assert all(entry.fault is None for entry in verify())
    store.clear()
    assert entries() == ()
    assert prepare(demo).address != made[0].address  # the secret has gone, too


def test_files_are_for_their_user_alone(demo: Path, own_cache: Path) -> None:
    prepare(demo)
    assert own_cache.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in own_cache.iterdir()} == {0o400}
    assert {path.suffix for path in own_cache.iterdir()} == {"", ".prepared"}  # nothing half written


@pytest.mark.needs_root("gives a file to somebody else")
@pytest.mark.parametrize("whose", ["file", "directory"])
def test_another_user_can_plant_nothing(demo: Path, own_cache: Path, whose: str) -> None:
    entry = prepare(demo)
    os.chown(own_cache / entry.name if whose == "file" else own_cache, 65534, 65534)
    loading = Loading(demo)
    assert not loading.used
    loading.library.close()
    assert "user 65534" in loading.reasons[0]


@pytest.mark.needs_root("another user puts a link there")
def test_another_users_link_leads_to_no_cache_of_ours(demo: Path, own_cache: Path) -> None:
    """What is prepared there would be theirs to exchange, and what is cleared there ours."""
    prepare(demo)
    kept, link = own_cache.parent.with_name("kept"), own_cache.parent
    link.rename(kept)
    link.symlink_to(kept)
    os.lchown(link, 65534, 65534)
    loading = Loading(demo)
    assert not loading.used
    loading.library.close()
    assert "a link of another user" in loading.reasons[0]
    for use in (store.clear, store.names, lambda: prepare(demo)):
        with pytest.raises(LoadError, match="a link of another user"):
            use()
    assert {path.suffix for path in (kept / own_cache.name).iterdir()} == {"", ".prepared"}
    os.lchown(link, os.geteuid(), -1)
    loading = Loading(demo)
    assert loading.used
    loading.library.close()


@pytest.mark.parametrize("home", [None, "", "elsewhere", "."])
@pytest.mark.parametrize("cache", [None, "", "cache"])
def test_what_is_no_absolute_path_is_no_place_for_a_cache(
    home: str | None, cache: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be below wherever a program happens to be, or below the root: the user's own home instead."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("HOME", home), ("XDG_CACHE_HOME", cache)):
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    own = pwd.getpwuid(os.geteuid()).pw_dir
    assert store.directory() == f"{own}/.cache/miniloader/prepared"

    def nobody(user: int) -> object:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(LoadError, match="this user has no home; set XDG_CACHE_HOME"):
        store.names()
    monkeypatch.setenv("HOME", "/")
    assert store.directory() == "/.cache/miniloader/prepared"


def test_a_cache_far_below_the_root(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        for depth, fails in ((1100, False), (2100, True)):  # Python's limit of calls, and PATH_MAX
            monkeypatch.setenv("XDG_CACHE_HOME", directory + "/y" * depth)
            if fails:
                with pytest.raises(LoadError, match=r"prepared.*: File name too long"):
                    prepare(demo)
            else:
                prepare(demo)
                assert len(entries()) == 1
        subprocess.run(["rm", "-rf", f"{directory}/y"], check=True)  # which Python's own way cannot


def test_a_proof_without_prepared_pages_names_the_library(demo: Path) -> None:
    with pytest.raises(LoadError, match=f"^{demo}: it is not in the cache; miniloader prepare LIB$"):
        miniloader.prove(demo, 2, prepared=True)


def test_what_is_no_directory_is_named_whole(demo: Path, own_cache: Path) -> None:
    own_cache.parent.parent.write_text("")
    with pytest.raises(LoadError, match=f"^{demo}: {own_cache}/[0-9a-f]+.prepared: Not a directory$"):
        miniloader.prove(demo, 2, prepared=True)


def test_nothing_is_kept_when_the_disk_is_full(
    demo: Path, own_cache: Path, in_child: Callable[..., object]
) -> None:
    def fill() -> str:
        import resource
        import signal

        prepare(build.build("bss"))  # the directory and the secret are there
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.dont_write_bytecode = True  # Python would keep what it has compiled cut short, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            prepare(demo)
        except LoadError as error:
            return str(error)
        return "no error"

    assert "File too large" in str(in_child(fill))
    assert len(list(own_cache.iterdir())) == 2


def test_what_cannot_be_prepared_says_why(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="relocates its code"):
        prepare(build.build("textrel"))
    source = tmp_path / "x.c"
    source.write_text("int x;")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,--build-id=none", source, "-o", tmp_path / "x.so"], check=True
    )
    with pytest.raises(LoadError, match="no build-id"):
        prepare(tmp_path / "x.so")


# ------------------------------------------------------------------------------------- what it is for
def test_relocated_pages_are_one_copy(demo: Path) -> None:
    plain = miniloader.prove(demo, 3)
    prepare(demo)
    proof = miniloader.prove(demo, 3, prepared=True)
    assert proof.verdict == "proven"
    claims = {claim.id: claim for claim in proof.claims}
    assert claims["relocated-shared"].verdict == "proven"
    assert claims["relocated-shared"].observed.startswith("4 of 4")
    assert proof.memory.used < plain.memory.used
    assert len({process.base for process in proof.processes}) == 1


def test_without_privilege(as_nobody: Callable[..., object], demo: Path) -> None:
    def use() -> tuple[bool, list[str], bool]:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as own:
            os.environ["XDG_CACHE_HOME"] = own
            prepare(demo)
            loading = Loading(demo)
            return loading.used, loading.reasons, os.stat(store.directory()).st_uid == os.geteuid() != 0

    assert as_nobody(use) == (True, [], True)


def test_an_audit_says_which_pages_were_relocated_beforehand() -> None:
    prepare("libcrypto.so.3")
    code = "import miniloader; miniloader.load('libcrypto.so.3', prepared=True); print('there'); input()"
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=build.ROOT)
        for _ in range(2)
    ]
    try:
        assert [one.stdout.readline() for one in running if one.stdout] == [b"there\n"] * 2
        audit = miniloader.audit([one.pid for one in running], library="libcrypto*")
    finally:
        for one in running:
            one.communicate(b"\n")
    (library,) = audit.libraries
    ours = [one for one in library.processes if one.beforehand > 0]  # Python may have brought its own
    assert {one.pid: one.shared >= one.beforehand for one in ours} == dict.fromkeys(
        (one.pid for one in running), True
    )
    causes = {cause for page in library.private_pages for cause in page.causes}
    assert "relocation" in causes
    assert causes <= {"relocation", "bss", "write", "loader"}


# -------------------------------------------------------------------------------------- command line
def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniloader", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)


def test_commands(demo: Path, own_cache: Path) -> None:
    assert run("cache").stdout.startswith("Nothing is prepared.")
    refused = run("prove", demo, "--prepared")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "miniloader prepare" in refused.stderr
    done = run("prepare", demo)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 pages of 4" in done.stdout
    both = json.loads(run("prepare", demo, build.build("symbols"), "--json").stdout)["libraries"]
    assert {one["path"] for one in both} == {str(demo), str(build.build("symbols"))}
    (own_cache / next(one["name"] for one in both if one["path"] != str(demo))).unlink()
    (listed,) = json.loads(run("cache", "--verify", "--json").stdout)["libraries"]
    assert (listed["path"], listed["pages"], listed["filled"], listed["fault"]) == (str(demo), 4, 0, None)
    trace = run("load", demo, "--prepared", "--trace", "--call", "demo_add(40, 2)->int")
    assert trace.returncode == 0, trace.stderr
    assert "4 pages from the cache" in trace.stdout
    assert "= 42" in trace.stdout
    _spoil(own_cache / listed["name"], -1)
    damaged = run("cache", "--verify")
    assert damaged.returncode == 1
    assert "pages are damaged" in damaged.stdout
    assert run("cache", "--clear").returncode == 0
    assert json.loads(run("cache", "--json").stdout)["libraries"] == []


# ------------------------------------------------------------------------------------- what lies about
@pytest.mark.parametrize("what", [name for name, (_, reason) in _AMISS.items() if reason[:8] == "index is"])
def test_a_damaged_index_is_listed_as_that(what: str, demo: Path, tmp_path: Path, own_cache: Path) -> None:
    path = _copy_of(demo, tmp_path)
    entry = prepare(path)
    _AMISS[what][0](path, own_cache / entry.name)
    for words, status in ((("cache",), 0), (("cache", "--verify"), 1)):
        done = run(*words)
        assert (done.returncode, done.stderr) == (status, "")
        assert "index is damaged" in done.stdout


def test_every_bit_of_the_head_is_under_the_checksum(own_cache: Path) -> None:
    """A file with any of them flipped is refused by a LoadError, and the library goes the plain way."""
    library = build.build("demo")
    prepare(library)
    (kept,) = own_cache.glob("*.prepared")
    good = kept.read_bytes()
    for bit in range(8 * 40):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        kept.unlink()
        kept.write_bytes(data)
        kept.chmod(0o400)
        with pytest.raises(LoadError):
            index.open_prepared(kept.name)
    assert entries()[0].fault
    loading = Loading(library)
    assert loading.reasons
    loading.library.close()


def test_what_is_no_file_in_the_cache_neither_hangs_nor_stays(own_cache: Path, tmp_path: Path) -> None:
    library = build.build("demo")
    prepare(library)
    (kept,) = own_cache.glob("*.prepared")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("stays")
    for make in (
        lambda path: os.mkfifo(path, 0o400),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(elsewhere),
        lambda path: path.symlink_to(tmp_path),
    ):
        for name in (kept.name, f"{'0' * 40}.prepared", "secret"):
            (own_cache / name).unlink(missing_ok=True)
            make(own_cache / name)
        (own_cache / "full").mkdir(exist_ok=True)
        (own_cache / "full" / "file").write_text("")
        assert all(entry.fault for entry in entries())
        loading = Loading(library)
        assert loading.reasons
        loading.library.close()
        store.clear()
        assert os.listdir(own_cache) == []
    assert elsewhere.read_text() == "stays"


def test_what_a_killed_process_left_is_removed_by_the_next_prepare(own_cache: Path) -> None:
    """What is still being written stays."""
    script = """
        import os, signal, sys
        from miniloader.loader.prepared import store
        def parts():
            yield b"begun"
            if sys.argv[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            print("writing", flush=True)
            sys.stdin.read()
        store.write_file("some.prepared", parts())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run([*command, "killed"], cwd=build.ROOT, check=False).returncode == -9
    assert len(list(own_cache.glob(".miniloader-*"))) == 1
    with subprocess.Popen(
        [*command, "slow"], cwd=build.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as slow:
        assert slow.stdout is not None
        assert slow.stdout.readline() == b"writing\n"
        prepare(build.build("demo"))
        assert len(list(own_cache.glob(".miniloader-*"))) == 1
        slow.communicate()
    assert (own_cache / "some.prepared").read_bytes() == b"begun"
    assert list(own_cache.glob(".miniloader-*")) == []
