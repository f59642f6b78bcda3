"""Loading from a descriptor, from inside a file, from bytes; where one asks; in threads; after fork."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

import miniloader
from miniloader import Source
from miniloader.kernel.syscalls import PAGE_SIZE


class InChild(Protocol):
    def __call__(self, function: Callable[..., Any], /, *arguments: Any) -> Any: ...


@pytest.fixture
def libz() -> Path:
    return Path(miniloader.inspect("libz.so.1").path)


def _version(library: miniloader.Library) -> bytes:
    version: bytes = library.function("zlibVersion", ctypes.c_char_p)()
    return version


def test_from_a_descriptor(libz: Path) -> None:
    with open(libz, "rb") as file, miniloader.load(Source.from_fd(file.fileno())) as library:
        assert _version(library).startswith(b"1.")


def test_from_bytes(libz: Path) -> None:
    with miniloader.load(Source.from_bytes(libz.read_bytes())) as library:
        assert _version(library).startswith(b"1.")


def test_from_inside_a_file(libz: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(bytes(2 * PAGE_SIZE) + libz.read_bytes())
    with (
        open(archive, "rb") as file,
        miniloader.load(Source.from_fd(file.fileno(), start=2 * PAGE_SIZE)) as library,
    ):
        assert _version(library).startswith(b"1.")


def test_from_a_place_that_cannot_be_mapped(libz: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(bytes(100) + libz.read_bytes())
    with (
        open(archive, "rb") as file,
        pytest.raises(miniloader.LoadError, match="no multiple of the page size; load a copy"),
    ):
        miniloader.load(Source.from_fd(file.fileno(), start=100))


def test_at_an_address(libz: Path) -> None:
    wanted = 0x1234_5678_0000
    with miniloader.load(libz, address=wanted) as library:
        assert library.base + library.plan.start == wanted
        assert _version(library).startswith(b"1.")
        with pytest.raises(miniloader.LoadError, match="is 0x123456780000 free"):
            miniloader.load(Source.from_bytes(libz.read_bytes()), address=wanted)


def test_the_same_file_is_loaded_once(libz: Path) -> None:
    with miniloader.load(libz) as one, miniloader.load(os.path.realpath(libz)) as other:
        assert one.base == other.base
        one.close()
        assert _version(other).startswith(b"1.")
        with pytest.raises(miniloader.LoadError, match="is closed"):
            _ = one.base


def test_what_a_process_may_have_once_is_not_loaded_again() -> None:
    with pytest.raises(miniloader.LoadError, match="a process can have it only once"):
        miniloader.load("libc.so.6")


def test_what_a_process_may_have_once_is_loaded_where_it_has_none(in_child: InChild) -> None:
    def refused_once_there() -> str:
        miniloader.load("libanl.so.1").close()
        ctypes.CDLL("libanl.so.1")
        with pytest.raises(miniloader.LoadError) as raised:
            miniloader.load("libanl.so.1")
        return str(raised.value)

    assert "libanl.so.1: a process can have it only once" in in_child(refused_once_there)


def test_in_several_threads_at_once(libz: Path) -> None:
    failures: list[BaseException] = []
    before = _ours_left(libz)  # of what an earlier test has loaded, and what stays

    def work() -> None:
        try:
            for _ in range(15):
                with miniloader.load(libz) as library:
                    assert _version(library).startswith(b"1.")
        except BaseException as failure:
            failures.append(failure)
            raise

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert _ours_left(libz) == before


def _ours_left(libz: Path) -> list[str]:
    """Mappings of libz beyond those of ld.so (numpy may have brought it)."""
    from miniloader.kernel.maps import read_maps
    from miniloader.loader.beside_glibc import host

    known = [other.bias for other in host.libraries() if "libz.so" in other.path]
    real = os.path.realpath(libz)
    starts = [vma.start for vma in read_maps() if vma.path == real and vma.file_offset == 0]
    return [f"{start:#x} libz.so.1" for start in starts if start not in known]


def test_after_fork_the_child_goes_on(libz: Path) -> None:
    with miniloader.load(libz) as library:
        pid = os.fork()
        if pid == 0:
            good = _version(library).startswith(b"1.")
            library.close()
            with miniloader.load(libz) as again:
                good = good and _version(again).startswith(b"1.")
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert _version(library).startswith(b"1.")
