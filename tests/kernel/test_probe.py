"""The probe against what is known otherwise, against failures, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import os

import pytest

from miniloader.kernel import privileges as module
from miniloader.kernel import syscalls
from miniloader.kernel.features import FEATURES, LEVELS
from miniloader.kernel.maps import read_maps
from miniloader.kernel.privileges import privileges
from miniloader.kernel.probe import Capabilities, Trial, best_level, probe
from tests.memory import failing

ALWAYS = {"smaps", "pagemap"}  # what the project cannot do without; every kernel of today has it
PRIVILEGED = {"frames", "kpagecount", "kpageflags"}


def test_one_finding_for_each_feature() -> None:
    found = probe()
    assert tuple(one.feature for one in found.trials) == FEATURES
    assert all(found.works(name) for name in ALWAYS)
    assert all(bool(one.why) != one.works for one in found.trials)
    with pytest.raises(KeyError):
        found.works("nonsense")


@pytest.mark.needs_root("the privileged features")
def test_root_sees_frames() -> None:
    found = probe()
    assert all(found.works(name) for name in PRIVILEGED)
    assert (found.level.name, found.next_level, best_level()) == ("frames", None, "frames")


def test_an_ordinary_user_sees_flags(as_nobody) -> None:
    found, best, rights = as_nobody(lambda: (probe(), best_level(), privileges()))
    assert not any(found.works(name) for name in PRIVILEGED)
    assert all(found.works(name) for name in ALWAYS)
    assert found.level.name == best == "flags"
    assert "CAP_SYS_ADMIN" in found.next_level.get
    assert rights.capabilities == ()
    assert rights.uid != 0
    # What takes no privilege works as it does for us.
    ours = probe()
    for feature in FEATURES:
        if feature.name not in PRIVILEGED:
            assert found.works(feature.name) == ours.works(feature.name)


def test_without_frames_there_are_reasons(as_nobody) -> None:
    why = {one.feature.name: one.why for one in as_nobody(probe).trials}
    assert "CAP_SYS_ADMIN" in why["frames"]
    assert why["kpagecount"] == "/proc/kpagecount: Permission denied"


@pytest.mark.parametrize(
    ("call", "number", "lost"),
    [
        ("ioctl", errno.ENOTTY, {"pagemap-scan", "procmap-query", "userfaultfd"}),
        ("syscall", errno.ENOSYS, {"userfaultfd", "page-faults"}),
        ("mmap", errno.ENOMEM, {feature.name for feature in FEATURES}),
    ],
)
def test_what_fails_does_not_work(call: str, number: int, lost: set[str]) -> None:
    usual = probe()
    with syscalls.injected(call, failing(number)):
        found = probe()
    for one in found.trials:
        if (call, one.feature.name) == ("ioctl", "page-faults"):
            continue  # by which the events of several threads share rings: there may be one alone
        if one.feature.name in lost:
            assert not one.works
            assert one.why
        else:
            assert one.works == usual.works(one.feature.name)
    if call == "mmap":
        assert found.level.name == "none"
        assert found.next_level.name == "totals"


def test_every_level_rests_on_one_feature() -> None:
    """Level by level down, as the features go that each rests on."""
    gone: set[str] = set()
    for level in LEVELS:
        found = Capabilities(tuple(Trial(f, f.name not in gone, "") for f in FEATURES))
        assert found.level is level
        gone.add(level.feature or "")


def test_nothing_is_left_behind() -> None:
    probe()
    mappings, descriptors = len(read_maps()), os.listdir("/proc/self/fd")
    for _ in range(3):
        probe()
    assert os.listdir("/proc/self/fd") == descriptors
    assert len(read_maps()) <= mappings + 1  # the allocator's, at most


def test_each_capability_by_its_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of capabilities(7), include/uapi/linux/capability.h."""
    for bit, name in {2: "CAP_DAC_READ_SEARCH", 19: "CAP_SYS_PTRACE", 21: "CAP_SYS_ADMIN"}.items():
        status = f"Name:\tx\nCapPrm:\tffff\nCapEff:\t{1 << bit:016x}\n".encode()
        texts = {"status": status, "mounts": b"proc /proc proc rw,hidepid=invisible,nosuid 0 0\n"}
        monkeypatch.setattr(module, "read_process_file", lambda _, file, texts=texts: texts[file])
        assert privileges().capabilities == (name,)
        assert privileges().hidepid == "invisible"


@pytest.mark.needs_root("it has capabilities to show")
def test_privileges_of_root() -> None:
    assert privileges().uid == 0
    assert "CAP_SYS_ADMIN" in privileges().capabilities
