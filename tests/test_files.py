"""Files are written whole, and only where whoever asked may want them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from miniloader import files
from miniloader.files import NotRegularError, open_regular, read_regular, read_text, write_whole

NOBODY = 65534


@pytest.fixture(params=["/tmp", "/dev/shm"])
def around(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of ours that others may look into."""
    with tempfile.TemporaryDirectory(dir=request.param) as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def precious(around: Path) -> Path:
    """A file of ours, alone in its directory, that nobody else may write."""
    path = around / "ours" / "report"
    path.parent.mkdir()
    path.write_bytes(b"precious")
    return path


def everything_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def directory_of(whose: str, path: Path) -> Path:
    path.mkdir()
    if whose == "everybody's":
        path.chmod(0o1777)
    else:
        os.chown(path, NOBODY, NOBODY)
    return path


@pytest.mark.parametrize("target", ["/dev/null", "/dev/ptmx", "/dev"])
def test_what_is_no_regular_file_is_not_opened_to_be_read(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watchdog that was opened once restarts the machine, and anybody may put a link to it."""
    link, opened, opening = tmp_path / "link", list[int](), os.open
    link.symlink_to(target)

    def noted(path: str | os.PathLike[str], flags: int, *more: int, dir_fd: int | None = None) -> int:
        opened.append(flags)
        return opening(path, flags, *more, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", noted)
    with pytest.raises(NotRegularError, match="expected a regular file"):
        open_regular(link)
    assert opened
    assert all(flags & os.O_PATH for flags in opened)


def test_a_regular_file_is_read_also_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"text")
    opening = os.open

    def without_proc(path: str | os.PathLike[str], flags: int) -> int:
        if os.fspath(path).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return opening(path, flags)

    for patched in (opening, without_proc):
        monkeypatch.setattr(os, "open", patched)
        assert read_regular(tmp_path / "file", 4) == b"text"
        assert read_regular(tmp_path / "file", 3) is None
        assert read_text(tmp_path / "file") == "text"


def test_text_ends_at_the_first_byte_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "hole"
    path.write_bytes(b"text")
    os.truncate(path, 64 << 30)
    with pytest.raises(ValueError, match="a zero byte"):
        read_text(path)
    assert read_regular(path, 1 << 16) is None


def test_what_has_nothing_to_give_yet_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As trace_pipe of /sys/kernel/tracing, which is a regular file: here a pipe stands for it."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setattr(files, "open_regular", lambda path: os.dup(reading))
    for read in (lambda path: read_regular(path, 1), read_text):
        with pytest.raises(BlockingIOError) as caught:
            read(tmp_path)
        assert caught.value.filename == str(tmp_path)
    os.close(reading)
    os.close(writing)


@pytest.mark.needs_root("another user puts a link there")
@pytest.mark.parametrize("leads_to", ["precious", "precious directory", "device", "process", "their own"])
@pytest.mark.parametrize("whose", ["everybody's", "theirs"])
def test_another_users_link_leads_to_nothing_that_is_not_theirs(
    whose: str, leads_to: str, around: Path, precious: Path
) -> None:
    """Nor in a directory that everybody writes to anywhere, whatever fs.protected_symlinks is."""
    place, theirs = directory_of(whose, around / "place"), directory_of("theirs", around / "own")
    with tempfile.TemporaryFile() as output:
        target: dict[str, Path | str] = {
            "precious": precious,
            "precious directory": precious.parent,
            "device": "/dev/null",
            "process": f"/proc/self/fd/{output.fileno()}",
            "their own": theirs / "report",
        }
        link = place / "link"
        link.symlink_to(target[leads_to])
        os.lchown(link, NOBODY, NOBODY)
        path = link / "report" if leads_to == "precious directory" else link
        if (whose, leads_to) == ("theirs", "their own"):
            write_whole(path, [b"whole"])
            assert everything_in(theirs) == {"report": b"whole"}
            return
        with pytest.raises(PermissionError, match="a link of another user") as caught:
            write_whole(path, [b"spoiled"])
        assert caught.value.filename == str(path)
        assert list(place.iterdir()) == [link]
        assert everything_in(theirs) == {}
        assert everything_in(precious.parent) == {"report": b"precious"}
        assert os.fstat(output.fileno()).st_size == 0
        os.lchown(link, os.geteuid(), -1)
        write_whole(path, [b"by our own link"])
        assert os.fstat(output.fileno()).st_size == (15 if leads_to == "process" else 0)
    assert (precious.read_bytes() == b"by our own link") == leads_to.startswith("precious")


@pytest.mark.needs_root("another user puts a pipe there")
def test_another_users_pipe_is_told_nothing_where_everybody_may_write(around: Path) -> None:
    pipe = directory_of("everybody's", around / "place") / "report"
    os.mkfifo(pipe)
    os.chown(pipe, NOBODY, NOBODY)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(PermissionError, match="a pipe of another user"):
        write_whole(pipe, [b"told"])
    assert os.read(reading, 10) == b""
    os.close(reading)


@pytest.mark.needs_root("another user has a file there")
def test_another_users_file_is_replaced_and_lends_no_permissions(around: Path) -> None:
    """A file of root's that everybody may write, and that runs as root, is what they would like."""
    path = directory_of("everybody's", around / "place") / "report"
    for mode, expected in (0o6777, 0o644), (0o600, 0o600), (0o666, 0o644):
        path.write_bytes(b"theirs")
        os.chown(path, NOBODY, NOBODY)
        path.chmod(mode)
        write_whole(path, [b"ours"])
        status = path.stat()
        assert (status.st_uid, status.st_mode & 0o7777) == (os.geteuid(), expected & ~umask())
        path.unlink()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def swapped(path: Path, precious: Path, times: int) -> int:
    """Start a process of another user that puts one thing after the other at ``path``; its process ID.

    It ends with 0 when it has done so.
    """
    child = os.fork()
    if child:
        return child
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        new = path.with_name("new")
        kinds: tuple[Callable[[], object], ...] = (
            lambda: new.symlink_to(precious),
            lambda: new.write_bytes(b"theirs"),
            lambda: new.symlink_to("/dev/null"),
            lambda: new.symlink_to(precious.parent),
            lambda: new.symlink_to("report"),
        )
        for turn in range(times):
            with suppress(OSError):
                kinds[turn % len(kinds)]()
                new.replace(path)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.needs_root("another user swaps links")
@pytest.mark.parametrize("whose", ["everybody's", "theirs"])
def test_links_that_are_swapped_meanwhile_lead_to_nothing_of_ours(
    whose: str, around: Path, precious: Path
) -> None:
    path = directory_of(whose, around / "place") / "report"
    child = swapped(path, precious, 5_000)
    ended, status, refused = 0, 0, 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        for tried in (path, path / "report"):
            try:
                write_whole(tried, [b"spoiled"])
            except OSError:
                refused += 1
        with suppress(OSError):
            path.unlink()  # of ours, in the place of theirs
        assert everything_in(precious.parent) == {"report": b"precious"}
    assert status == 0
    assert refused
