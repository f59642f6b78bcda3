"""The few instructions that have to be real code, as bytes, for x86-64.

Source: the AMD64 psABI, sections 3.2 (which registers carry arguments) and 5.2 (the procedure linkage
table), and the AMD64 manual for the encodings.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = [
    "SAVE_AREA",
    "call_each",
    "collect",
    "jumps_to",
    "lazy_trampoline",
    "note_fault",
    "with_third_argument",
]

#: Bytes of an XSAVE area with x87, SSE, AVX and AVX-512 state in the standard format, rounded up to 64.
SAVE_AREA = 0xA80
_SAVED = 0xEE  # SSE, AVX, bounds, opmask and both ZMM parts: what glibc saves, too
#: How to save and restore these registers: a processor without XSAVE has none but SSE's.
_XSAVE = b"\x0f\xae\x24\x24", b"\x0f\xae\x2c\x24"  # xsave [rsp], xrstor [rsp]
_FXSAVE = b"\x0f\xae\x04\x24", b"\x0f\xae\x0c\x24"  # fxsave [rsp], fxrstor [rsp]


#: endbr64; mov rdx, value; mov rax, function; jmp rax
_WITH_THIRD: Final = struct.Struct("<4s2sQ2sQ2s")
_THIRD: Final = b"\xf3\x0f\x1e\xfa", b"\x48\xba", b"\x48\xb8", b"\xff\xe0"


def with_third_argument(function: int, value: int) -> bytes:
    """Jump to ``function`` with its third argument replaced by ``value``."""
    marker, into_rdx, into_rax, jump = _THIRD
    return _WITH_THIRD.pack(marker, into_rdx, value, into_rax, function, jump)


def jumps_to(code: bytes) -> int | None:
    """The function that the code of :func:`with_third_argument` jumps to; ``None`` for any other code.

    >>> hex(jumps_to(with_third_argument(0x401000, 7)))
    '0x401000'
    """
    marker, into_rdx, _, into_rax, function, jump = _WITH_THIRD.unpack(code[: _WITH_THIRD.size])
    return function if (marker, into_rdx, into_rax, jump) == _THIRD else None


def call_each() -> bytes:
    """``void f(void (**functions)(int, void *, void *), size_t count, int, void *, void *)``, which calls all
    ``functions`` with its last three arguments.
    """
    return b"".join((
        b"\xf3\x0f\x1e\xfa",  # endbr64
        b"\x55\x48\x89\xe5",  # push rbp; mov rbp, rsp
        b"\x53\x41\x54\x41\x55\x41\x56\x41\x57\x50",  # push rbx, r12, r13, r14, r15, rax
        b"\x48\x89\xfb",  # mov rbx, rdi
        b"\x4c\x8d\x24\xf7",  # lea r12, [rdi + rsi * 8]
        b"\x41\x89\xd5\x49\x89\xce\x4d\x89\xc7",  # mov r13d, edx; mov r14, rcx; mov r15, r8
        b"\xeb\x0f",  # jmp to the comparison
        b"\x44\x89\xef\x4c\x89\xf6\x4c\x89\xfa",  # mov edi, r13d; mov rsi, r14; mov rdx, r15
        b"\xff\x13",  # call [rbx]
        b"\x48\x83\xc3\x08",  # add rbx, 8
        b"\x4c\x39\xe3",  # cmp rbx, r12
        b"\x72\xec",  # jb to the first mov
        b"\x58\x41\x5f\x41\x5e\x41\x5d\x41\x5c\x5b\x5d",  # pop rax, r15, r14, r13, r12, rbx, rbp
        b"\xc3",  # ret
    ))  # fmt: skip


def collect() -> bytes:
    """A callback for dl_iterate_phdr(3) that copies what it is shown to the room that ``data`` points at.

    The room begins with two words: how much of it is used, and its size.  Each record is the ``struct
    dl_phdr_info``, its program headers and its name, up to a multiple of 8 bytes.  What does not fit is only
    counted.
    """
    return b"".join((
        b"\xf3\x0f\x1e\xfa",  # endbr64
        b"\x44\x0f\xb7\x47\x18\x45\x6b\xc0\x38",  # movzx r8d, word [rdi + 24]; imul r8d, r8d, 56
        b"\x4c\x8b\x4f\x08\x4d\x89\xca",  # mov r9, [rdi + 8]; mov r10, r9
        b"\x41\x80\x3a\x00\x4d\x8d\x52\x01\x75\xf6",  # cmp byte [r10], 0; lea r10, [r10 + 1]; jne to cmp
        b"\x4d\x29\xca",  # sub r10, r9
        b"\x4b\x8d\x44\x10\x47\x48\x83\xe0\xf8",  # lea rax, [r8 + r10 + 71]; and rax, -8
        b"\x4c\x8b\x1a\x4c\x01\xd8\x48\x89\x02",  # mov r11, [rdx]; add rax, r11; mov [rdx], rax
        b"\x48\x3b\x42\x08\x77\x20",  # cmp rax, [rdx + 8]; ja to the end
        b"\x48\x89\xfe\x4a\x8d\x3c\x1a",  # mov rsi, rdi; lea rdi, [rdx + r11]
        b"\xb9\x08\x00\x00\x00\xf3\x48\xa5",  # mov ecx, 8; rep movsq
        b"\x48\x8b\x77\xd0\x44\x89\xc1\xf3\xa4",  # mov rsi, [rdi - 48]; mov ecx, r8d; rep movsb
        b"\x4c\x89\xce\x44\x89\xd1\xf3\xa4",  # mov rsi, r9; mov ecx, r10d; rep movsb
        b"\x31\xc0\xc3",  # xor eax, eax; ret
    ))  # fmt: skip


def note_fault(record: int) -> bytes:
    """``void f(int, siginfo_t *, ucontext_t *)``, a signal's handler, which notes six words at ``record``.

    They are the signal's number, its ``si_code`` and ``si_addr``, the instruction's address, the page fault's
    error code, and, of a jump to where nothing can be run, where it would have returned to.  It sends the
    process the signal again, which ends it where the handler is for once (``SA_RESETHAND``).  Source: glibc's
    ``sys/ucontext.h`` (``uc_mcontext.gregs`` begins at byte 40), the kernel's ``asm/trap_pf.h``.
    """
    return b"".join((
        b"\xf3\x0f\x1e\xfa",  # endbr64
        b"\x48\xb8" + struct.pack("<Q", record),  # mov rax, record
        b"\x48\x63\xcf\x48\x89\x08",  # movsxd rcx, edi; mov [rax], rcx
        b"\x48\x63\x4e\x08\x48\x89\x48\x08",  # movsxd rcx, dword [rsi + 8]; mov [rax + 8], rcx
        b"\x48\x8b\x4e\x10\x48\x89\x48\x10",  # mov rcx, [rsi + 16]; mov [rax + 16], rcx
        b"\x48\x8b\x8a\xa8\x00\x00\x00\x48\x89\x48\x18",  # mov rcx, [rdx + 168]; mov [rax + 24], rcx
        b"\x48\x8b\x8a\xc0\x00\x00\x00\x48\x89\x48\x20",  # mov rcx, [rdx + 192]; mov [rax + 32], rcx
        b"\xf6\xc1\x10\x74\x0e",  # test cl, 16; jz over the next
        b"\x48\x8b\x8a\xa0\x00\x00\x00\x48\x8b\x09",  # mov rcx, [rdx + 160]; mov rcx, [rcx]
        b"\x48\x89\x48\x28",  # mov [rax + 40], rcx
        b"\x89\xfe",  # mov esi, edi
        b"\xb8\x27\x00\x00\x00\x0f\x05",  # getpid()
        b"\x89\xc7\xb8\x3e\x00\x00\x00\x0f\x05",  # kill(pid, signal)
        b"\xc3",  # ret
    ))  # fmt: skip


def lazy_trampoline(callback: int, *, xsave: bool = True) -> bytes:
    """What ``GOT[2]`` points at while PLT slots are bound lazily.

    PLT0 comes here with ``GOT[1]`` and the relocation's index pushed above the return address.  It calls
    ``callback(index)``, which returns the function's address, and jumps there with every argument register as
    it was.  ``xsave``: whether the processor (and the system) has XSAVE.
    """
    save, restore = _XSAVE if xsave else _FXSAVE
    header = range(512, 576, 8)  # XRSTOR wants the header's unused part zero
    return b"".join((
        b"\xf3\x0f\x1e\xfa",  # endbr64
        b"\x55\x48\x89\xe5",  # push rbp; mov rbp, rsp
        b"\x50\x57\x56\x52\x51",  # push rax, rdi, rsi, rdx, rcx
        b"\x41\x50\x41\x51\x41\x52\x41\x53",  # push r8, r9, r10, r11
        b"\x48\x83\xe4\xc0",  # and rsp, -64
        b"\x48\x81\xec" + struct.pack("<I", SAVE_AREA),  # sub rsp, SAVE_AREA
        b"\x31\xc0\x31\xd2",  # xor eax, eax; xor edx, edx
        *(b"\x48\x89\x84\x24" + struct.pack("<I", at) for at in header),  # mov [rsp + at], rax
        b"\xb8" + struct.pack("<I", _SAVED),  # mov eax, _SAVED
        save,
        b"\x48\x8b\x7d\x10",  # mov rdi, [rbp + 16]: the index
        b"\x48\xb8" + struct.pack("<Q", callback),  # mov rax, callback
        b"\xff\xd0",  # call rax
        b"\x48\x89\x45\x08",  # mov [rbp + 8], rax: over GOT[1]
        b"\xb8" + struct.pack("<I", _SAVED),  # mov eax, _SAVED
        b"\x31\xd2",  # xor edx, edx
        restore,
        b"\x48\x8d\x65\xb8",  # lea rsp, [rbp - 72]
        b"\x41\x5b\x41\x5a\x41\x59\x41\x58",  # pop r11, r10, r9, r8
        b"\x59\x5a\x5e\x5f\x58\x5d",  # pop rcx, rdx, rsi, rdi, rax, rbp
        b"\x4c\x8b\x1c\x24",  # mov r11, [rsp]: the function
        b"\x48\x83\xc4\x10",  # add rsp, 16
        b"\x41\xff\xe3",  # jmp r11
    ))  # fmt: skip
