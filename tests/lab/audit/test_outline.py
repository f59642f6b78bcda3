"""The mappings of a process, in columns."""

from __future__ import annotations

import os
import pickle

from miniloader.kernel.maps import Vma, read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.file_in_process import FileInProcess
from miniloader.lab.audit.outline import Outlines
from miniloader.lab.audit.survey import Memo, survey

_FILE = (3, "/lib/one.so", False)


def _vma(start: int, protection: str, offset: int = 0, behind: tuple[int, str, bool] = (0, "", False)) -> Vma:
    return Vma(start, start + PAGE_SIZE, protection, False, offset, (8, 1), *behind)


def test_the_columns_are_those_of_the_mappings() -> None:
    vmas = read_maps()
    outline = Outlines().of(vmas)
    assert outline.starts.tolist() == [vma.start for vma in vmas]
    assert outline.sizes.tolist() == [vma.size for vma in vmas]
    assert outline.offsets.tolist() == [vma.file_offset for vma in vmas]
    assert outline.nameless.tolist() == [vma.inode == 0 for vma in vmas]
    assert [vmas[index].path for index in outline.stacks] == ["[stack]"]
    assert {vmas[index].path for index in outline.unnamed} == {""}
    assert "[vsyscall]" in {vmas[index].path for index in outline.outside} or not os.path.exists("/lib64")
    private = [index for index, vma in enumerate(vmas) if vma.inode and not vma.shared]
    assert sorted(index for file in outline.files for index in file) == private
    assert outline.writable == [index for index in private if "w" in vmas[index].protection]
    for file in outline.files:
        assert len({(vmas[index].device, vmas[index].inode, vmas[index].path) for index in file}) == 1


def test_equal_lines_have_one_number_in_all_processes_wherever_they_are() -> None:
    """However many there are."""
    outlines = Outlines()
    first = outlines.of([_vma(0x5000, "r--", behind=_FILE), _vma(0x9000, "rw-", 0x1000, _FILE)])
    many = outlines.of([_vma(number << 20, "r--", number << 12, _FILE) for number in range(2_000)])
    second = outlines.of(
        [_vma(0x1000, "rw-"), _vma(0x6000, "rw-", 0x1000, _FILE), _vma(0x7000, "r--", 0, _FILE)]
    )
    assert second.lines[1:] == first.lines[::-1]
    assert many.lines[0] == first.lines[0]
    assert len({*many.lines, *first.lines, *second.lines}) == 2_002
    assert many.offsets.tolist() == [number << 12 for number in range(2_000)]
    assert (second.files, second.writable, second.unnamed) == ([[1, 2]], [1], [0])


def test_a_file_in_a_process_is_the_same_when_a_helper_has_sent_it() -> None:
    files = survey(os.getpid(), Memo(), causes=False, frames=False).files
    for sent, placed in zip(pickle.loads(pickle.dumps(files)), files, strict=True):
        assert isinstance(sent, FileInProcess)
        assert sent.file.identity == placed.file.identity
        for name in ("base", "start", "end", "mapped", "private", "shared", "beforehand", "reasons"):
            assert getattr(sent, name) == getattr(placed, name)
        for name in ("addresses", "vaddrs", "is_common", "file_offsets", "own_offsets", "bss_vaddrs"):
            assert (getattr(sent, name) == getattr(placed, name)).all()
