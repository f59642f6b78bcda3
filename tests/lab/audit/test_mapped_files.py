"""Which file it really is that a process has mapped."""

from __future__ import annotations

import os
import pickle
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import miniloader
from miniloader.kernel.maps import read_maps
from miniloader.kernel.probe import best_level
from miniloader.lab.audit.mapped_files import MappedFiles
from miniloader.lab.workers.fork_map import share_out
from tests.conftest import NOBODY, AsNobody
from tests.lab.audit.older_kernels import KERNELS, before_6_7
from tests.lab.audit.told_processes import (
    BECOME_NOBODY,
    copy,
    own_child,
    told,
    told_children,
)

needs_frames = pytest.mark.skipif(best_level() != "frames", reason="needs root: frames")


def test_a_replaced_file_is_another_of_the_same_build(demo: Path, tmp_path: Path) -> None:
    path = copy(demo, tmp_path / "lib.so")
    with told(f"lib = ctypes.CDLL({str(path)!r})") as old:
        os.rename(copy(demo, tmp_path / "new.so"), path)
        with told(f"lib = ctypes.CDLL({str(path)!r})") as new:
            audit = miniloader.audit([old.pid, new.pid])
    libraries = [library for library in audit.libraries if library.path == str(path)]
    assert [row.pid for library in libraries for row in library.processes] == [old.pid, new.pid]
    if best_level() != "frames":  # what was deleted cannot be opened: who can say that it is the same build?
        assert [library.files for library in libraries] == [1, 1]
        return
    (found,) = libraries
    assert found.files == 2
    assert found.build_id == miniloader.inspect(demo).build_id
    assert found.frames == found.present


def test_two_names_of_one_file_are_one(demo: Path, tmp_path: Path) -> None:
    path = copy(demo, tmp_path / "one.so")
    os.link(path, tmp_path / "two.so")
    one = told(f"lib = ctypes.CDLL({str(path)!r})")
    two = told(f"lib = ctypes.CDLL({str(tmp_path / 'two.so')!r})")
    with one as first, two as second:
        (found,) = miniloader.audit([first.pid, second.pid], library=str(tmp_path)).libraries
    assert found.files == 1
    assert len(found.processes) == 2


def test_a_deleted_file(demo: Path, tmp_path: Path) -> None:
    path = copy(demo, tmp_path / "gone.so")
    with told(f"lib = ctypes.CDLL({str(path)!r})") as one:
        path.unlink()
        found = miniloader.audit([one.pid]).library("gone.so")
    assert found.build_id == miniloader.inspect(demo).build_id
    causes = {cause for page in found.private_pages for cause in page.causes}
    if best_level() == "frames":  # CAP_SYS_ADMIN opens it through /proc/PID/map_files
        assert causes == {"relocation", "loader", "bss"}
    else:
        assert causes == {"unknown"}
        assert all("deleted" in page.reason for page in found.private_pages)


@pytest.fixture
def overlay(demo: Path) -> Iterator[tuple[Path, Path]]:
    """The demonstration library below an overlay and in it, as in containers, for every user."""
    if os.geteuid():
        pytest.skip("needs root: to mount an overlay")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        here = Path(directory)
        here.chmod(0o755)
        for name in ("lower", "upper", "work", "merged"):
            (here / name).mkdir()
        path = copy(demo, here / "lower" / "lib.so")
        layers = f"lowerdir={here}/lower,upperdir={here}/upper,workdir={here}/work"
        command = ["mount", "-t", "overlay", "overlay", "-o", layers, str(here / "merged")]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this kernel lacks overlayfs here")
        try:
            yield path, here / "merged" / "lib.so"
        finally:
            subprocess.run(["umount", str(here / "merged")], check=True)


@needs_frames
def test_the_same_file_through_an_overlay(overlay: tuple[Path, Path]) -> None:
    """Whatever device maps tells, the frames are the same."""
    path, merged = overlay
    inside = told(f"lib = ctypes.CDLL({str(merged)!r})")
    with told(f"lib = ctypes.CDLL({str(path)!r})") as outer, inside as inner:
        (found,) = miniloader.audit([outer.pid, inner.pid], library=str(merged.parent.parent)).libraries
    assert found.files == 1
    assert found.frames < found.present


@KERNELS
def test_an_overlay_s_file_is_found_without_privilege(
    overlay: tuple[Path, Path], as_nobody: AsNobody, kernel: Callable[[], AbstractContextManager[None]]
) -> None:
    """By the kernel's build-id; before 6.11 by the inode.  Not when another file has taken its name."""
    path, merged = overlay

    def look() -> tuple[str, set[str], set[str]]:
        with kernel():
            return own_child(str(merged))

    assert as_nobody(look) == ("flags", {"relocation", "loader", "bss", "write"}, {"demo_counters"})

    def look_at_replaced() -> tuple[str, set[str], set[str]]:
        with kernel():
            return own_child(str(merged), replace=True)

    def look_by_the_device_below(inode: int) -> bool:
        """As maps had it until 6.12."""
        import ctypes

        library = ctypes.CDLL(str(merged))
        assert library is not None
        mine = next(vma for vma in read_maps() if vma.path == str(merged))
        below = os.stat(path).st_dev
        vma = mine._replace(device=(os.major(below), os.minor(below)), inode=inode)
        with before_6_7():
            return MappedFiles().of(os.getpid(), vma).facts is not None

    assert as_nobody(look_by_the_device_below, os.stat(path).st_ino)
    assert not as_nobody(look_by_the_device_below, os.stat(path).st_ino + 1)

    os.chown(merged.parent, NOBODY, NOBODY)
    level, causes, written = as_nobody(look_at_replaced)
    assert (level, causes, written) == ("flags", {"unknown"}, set())


def test_what_only_a_helper_could_read(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has ended since, and its file is gone: the causes are known, the names are not."""
    path = copy(demo, tmp_path / "gone.so")
    load = f"lib = ctypes.CDLL({str(path)!r}); ctypes.c_long.in_dll(lib, 'demo_spare').value = 7"
    with told() as parent, told_children(parent, 29) as children, told(load) as last:

        def gone_meanwhile(*arguments: Any) -> Any:
            answers = share_out(*arguments)
            last.process.kill()
            last.process.wait()
            path.unlink()
            return answers

        monkeypatch.setattr("miniloader.lab.audit.audit.share_out", gone_meanwhile)
        pids = [*children[:15], last.pid, *children[15:]]  # it is in the middle, the helper's own piece
        found = miniloader.audit(pids, jobs=2).library(str(path))
    assert found.build_id == miniloader.inspect(demo).build_id
    assert {cause for page in found.private_pages for cause in page.causes} >= {"relocation", "write"}
    assert all("not to be found" in page.reason for page in found.private_pages)


def test_a_file_that_another_process_offers_a_way_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that has it mapped may not: whoever has met it, it is tried again."""
    libc = next(vma for vma in read_maps() if vma.path.endswith("libc.so.6"))
    files = MappedFiles()
    with monkeypatch.context() as patch:
        patch.setattr(MappedFiles, "_open", lambda *_: None)
        met = pickle.loads(pickle.dumps(files.of(os.getpid(), libc)))
    assert files.same(met).facts is not None


#: A process that has, at a path which only its mount namespace has, a copy of a library of its own.
_IN_NAMESPACE = """
libc = ctypes.CDLL(None, use_errno=True)
def alone(source, directory):
    content, user, group = open(source, "rb").read(), os.geteuid(), os.getegid()
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        return os.strerror(ctypes.get_errno())
    open("/proc/self/setgroups", "w").write("deny")
    open("/proc/self/uid_map", "w").write(f"0 {user} 1")
    open("/proc/self/gid_map", "w").write(f"0 {group} 1")
    if libc.mount(b"none", directory.encode(), b"tmpfs", 0, None):
        return os.strerror(ctypes.get_errno())
    open(directory + "/lib.so", "wb").write(content)
    global lib
    lib = ctypes.CDLL(directory + "/lib.so")
    lib.demo_next()
"""


def test_files_of_other_mount_namespaces_are_found_and_told_apart(demo: Path, as_nobody: AsNobody) -> None:
    """Two processes have different files at one path, which is none for the auditor: root or their owner."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.chmod(directory, 0o755)
        path, source = f"{directory}/lib.so", str(copy(demo, Path(directory) / "source.so"))
        os.chmod(source, 0o644)
        lines = BECOME_NOBODY, _IN_NAMESPACE
        with told(*lines) as first, told(*lines) as second:
            for process in (first, second):
                trouble = process(f"answer = alone({source!r}, {directory!r})")
                if trouble:
                    pytest.skip(f"this kernel lacks user namespaces for everybody: {trouble}")
            assert not os.path.exists(path)
            pids = [first.pid, second.pid]
            for audit in (miniloader.audit(pids, library=path), as_nobody(_audited, pids, path)):
                found = audit.library(path)
                assert found.files == 2
                assert {cause for page in found.private_pages for cause in page.causes} == {
                    *("relocation", "loader", "bss", "write")
                }
                assert "demo_counters" in {name for page in found.private_pages for name in page.written}


def _audited(pids: list[int], path: str) -> miniloader.Audit:
    return miniloader.audit(pids, library=path)
