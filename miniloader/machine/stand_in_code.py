"""What a library asks the system's loader about itself, answered for libraries that it does not know.

x86-64 code for dladdr(3), dladdr1, dl_iterate_phdr(3), ``_dl_find_object``, dlopen(3), dlclose(3), dlinfo(3),
dlsym(3) and dlvsym(3) that looks into a table, which lies a page behind the code, or asks glibc's own.
Nothing here waits for Python, since an unwinder may ask in any thread, at any time, even at the end of the
process.  Source: the AMD64 psABI, section 3.2, ``<link.h>`` and ``<dlfcn.h>``, and glibc's manual, "Dynamic
Linker Introspection".
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import Final

__all__ = ["CODE", "ENTRY", "FUNCTIONS", "HEAD", "TABLE", "stand_ins"]

#: Where the table begins, from the beginning of the code.
TABLE: Final = 0x1000
#: How it begins: the addresses of :data:`FUNCTIONS`, in their order; how many entries follow, how many
#: libraries have ever been listed, and how many withdrawn.
HEAD: Final = struct.Struct("<9Q3Q")
#: A library: its struct dl_phdr_info (whose counts are filled in); at 64 its first address, at 72 the one
#: behind its last (0: this entry is free), at 80 .eh_frame_hdr, at 88 its symbols, their number and names, at
#: 112 its struct link_map, which is its handle, at 152 how often it is held by one (the last byte: for ever),
#: at 160 its soname.
ENTRY: Final = struct.Struct("<QQQH6xQQQQ 3Q 3Q 5Q Q Q")

# dlsym(handle, name): RTLD_NEXT is of no use to a caller that ld.so does not know
_DLSYM: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\x48\x83\xff\xff\x74\x10",  # endbr64; cmp rdi, -1; je by_default
    b"\xe8\xe1\x00\x00\x00\x48\x85\xc0\x75\x4c",  # call mine; test rax, rax; jne lookup
    b"\xff\x25\xfe\x0f\x00\x00",  # jmp [DLSYM]
    b"\x31\xff\xff\x25\xf6\x0f\x00\x00",  # by_default: xor edi, edi; jmp [DLSYM]
))  # fmt: skip

# dlvsym(handle, name, version): versions count only in glibc's own libraries
_DLVSYM: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\x48\x83\xff\xff\x74\x10",  # endbr64; cmp rdi, -1; je version_by_default
    b"\xe8\xb1\x00\x00\x00\x48\x85\xc0\x75\x1c",  # call mine; test rax, rax; jne lookup
    b"\xff\x25\xd6\x0f\x00\x00",  # jmp [DLVSYM]
    b"\x31\xff\xff\x25\xce\x0f\x00\x00",  # version_by_default: xor edi, edi; jmp [DLVSYM]
))  # fmt: skip

# lookup(-, name), rax the entry: the symbol there, or in the global scope
_LOOKUP: Final = b"".join((
    b"\x53\x48\x89\xc3\x48\x89\xf7",  # push rbx; mov rbx, rax; mov rdi, rsi
    b"\x4c\x8b\x43\x58\x4c\x8b\x4b\x60",  # mov r8, [rbx + 88]; mov r9, [rbx + 96]
    b"\x4c\x8b\x53\x68",  # mov r10, [rbx + 104]
    b"\x49\xff\xc9\x78\x44",  # each_name: dec r9; js missing
    b"\x66\x41\x83\x78\x06\x00\x74\x17",  # cmp word [r8 + 6], 0; je next_name
    b"\x41\x8a\x40\x04\x24\x0f\x3c\x06",  # mov al, [r8 + 4]; and al, 15; cmp al, 6
    b"\x74\x0d\x41\x8b\x30\x4c\x01\xd6",  # je next_name; mov esi, [r8]; add rsi, r10
    b"\xe8\x3b\x00\x00\x00\x74\x06",  # call same; je hit
    b"\x49\x83\xc0\x18\xeb\xd6",  # next_name: add r8, 24; jmp each_name
    b"\x49\x8b\x40\x08\x66\x41\x83\x78\x06\xf1",  # hit: mov rax, [r8 + 8]; cmp word [r8 + 6], -15
    b"\x74\x03\x48\x03\x03",  # je absolute; add rax, [rbx]
    b"\x41\x8a\x48\x04\x80\xe1\x0f\x80\xf9\x0a",  # absolute: mov cl, [r8 + 4]; and cl, 15; cmp cl, 10
    b"\x75\x02\xff\xd0",  # jne resolved; call rax
    b"\x5b\xc3",  # resolved: pop rbx; ret
    b"\x48\x89\xfe\x31\xff\x5b",  # missing: mov rsi, rdi; xor edi, edi; pop rbx
    b"\xff\x25\x50\x0f\x00\x00",  # jmp [DLSYM]
))  # fmt: skip

# same(string, other): whether they are equal, in the zero flag; keeps rdi, r8 and on
_SAME: Final = b"".join((
    b"\x31\xd2",  # xor edx, edx
    b"\x8a\x04\x17\x3a\x04\x16",  # each_byte: mov al, [rdi + rdx]; cmp al, [rsi + rdx]
    b"\x75\x07\x48\xff\xc2\x84\xc0\x75\xf1",  # jne differs; inc rdx; test al, al; jne each_byte
    b"\xc3",  # differs: ret
))  # fmt: skip

# mine(handle): the entry behind it, or 0; keeps rdi, rsi, rdx
_MINE: Final = b"".join((
    b"\x48\x8d\x47\x90\x48\x8d\x0d\x65\x0f\x00\x00",  # lea rax, [rdi - 112]; lea rcx, [ENTRIES]
    b"\x48\x29\xc8\x48\x69\x0d\x3f\x0f\x00\x00\xa8\x00\x00\x00",  # sub rax, rcx; imul rcx, [SLOTS], 168
    b"\x48\x39\xc8\x73\x05\x48\x8d\x47\x90\xc3",  # cmp rax, rcx; jae theirs; lea rax, [rdi - 112]; ret
    b"\x31\xc0\xc3",  # theirs: xor eax, eax; ret
))  # fmt: skip

# dlopen(name, flags): of ours with RTLD_NOLOAD or RTLD_NODELETE (0x1004), by which one holds what is there
_DLOPEN: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\x48\x85\xff\x74\x6c",  # endbr64; test rdi, rdi; je open
    b"\xf7\xc6\x04\x10\x00\x00\x74\x64\x57\x56",  # test esi, 0x1004; je open; push rdi; push rsi
    b"\x53\x48\x8d\x1d\x25\x0f\x00\x00",  # push rbx; lea rbx, [ENTRIES]
    b"\x4c\x8b\x05\x06\x0f\x00\x00",  # mov r8, [SLOTS]
    b"\x49\xff\xc8\x78\x4b",  # each_library: dec r8; js unknown
    b"\x48\x83\x7b\x48\x00\x74\x19",  # cmp qword [rbx + 72], 0; je next_library
    b"\x48\x8b\x73\x08\xe8\x79\xff\xff\xff\x74\x17",  # mov rsi, [rbx + 8]; call same; je known
    b"\x48\x8b\xb3\xa0\x00\x00\x00\xe8\x6b\xff\xff\xff",  # mov rsi, [rbx + 160]; call same
    b"\x74\x09",  # je known
    b"\x48\x81\xc3\xa8\x00\x00\x00\xeb\xd2",  # next_library: add rbx, 168; jmp each_library
    b"\xf0\xff\x83\x98\x00\x00\x00",  # known: lock inc dword [rbx + 152]
    b"\xf7\x44\x24\x08\x00\x10\x00\x00\x74\x07",  # test dword [rsp + 8], 0x1000; je held
    b"\xc6\x83\x9f\x00\x00\x00\x01",  # mov byte [rbx + 159], 1
    b"\x48\x8d\x43\x70\x5b\x48\x83\xc4\x10",  # held: lea rax, [rbx + 112]; pop rbx; add rsp, 16
    b"\xc3",  # ret
    b"\x5b\x5e\x5f",  # unknown: pop rbx; pop rsi; pop rdi
    b"\xff\x25\x95\x0e\x00\x00",  # open: jmp [DLOPEN]
))  # fmt: skip

# dlclose(handle)
_DLCLOSE: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\xe8\x47\xff\xff\xff\x48\x85\xc0",  # endbr64; call mine; test rax, rax
    b"\x74\x0a\xf0\xff\x88\x98\x00\x00\x00",  # je close; lock dec dword [rax + 152]
    b"\x31\xc0\xc3",  # xor eax, eax; ret
    b"\xff\x25\x7a\x0e\x00\x00",  # close: jmp [DLCLOSE]
))  # fmt: skip

# dlinfo(handle, request, where): of ours RTLD_DI_LINKMAP (2)
_DLINFO: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\xe8\x27\xff\xff\xff\x48\x85\xc0",  # endbr64; call mine; test rax, rax
    b"\x74\x0f\x83\xfe\x02\x75\x06",  # je information; cmp esi, 2; jne cannot
    b"\x48\x89\x3a\x31\xc0\xc3",  # mov [rdx], rdi; xor eax, eax; ret
    b"\x83\xc8\xff\xc3",  # cannot: or eax, -1; ret
    b"\xff\x25\x5d\x0e\x00\x00",  # information: jmp [DLINFO]
))  # fmt: skip

# dl_iterate_phdr(callback, data) calls glibc's twice, for those that it knows and for ours: both are told
# while it holds its lock.  The context of both is callback, data, result.
_ITERATE: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\x6a\x00\x56\x57",  # endbr64; push 0; push rsi; push rdi
    b"\x48\x89\xe6\x48\x8d\x3d\x2e\x00\x00\x00",  # mov rsi, rsp; lea rdi, [forward]
    b"\xff\x15\xf8\x0d\x00\x00\x85\xc0\x75\x14",  # call [ITERATE]; test eax, eax; jne iterated
    b"\x48\x89\xe6\x48\x8d\x3d\x4a\x00\x00\x00",  # mov rsi, rsp; lea rdi, [tell]
    b"\xff\x15\xe4\x0d\x00\x00\x8b\x44\x24\x10",  # call [ITERATE]; mov eax, [rsp + 16]
    b"\x48\x83\xc4\x18\xc3",  # iterated: add rsp, 24; ret
))  # fmt: skip

# forward(info, size, context): passes it on, with ours counted
_FORWARD: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\x48\x8b\x05\x15\x0e\x00\x00",  # endbr64; mov rax, [ADDS]
    b"\x48\x01\x47\x20\x48\x8b\x05\x12\x0e\x00\x00",  # add [rdi + 32], rax; mov rax, [SUBS]
    b"\x48\x01\x47\x28\x48\x89\xd0",  # add [rdi + 40], rax; mov rax, rdx
    b"\x48\x8b\x50\x08\xff\x20",  # mov rdx, [rax + 8]; jmp [rax]
))  # fmt: skip

# tell(info, size, context): passes ours on; returns 1, so that it is called once
_TELL: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\x53\x55\x41\x54\x41\x55",  # endbr64; push rbx; push rbp; push r12; push r13
    b"\x41\x56\x48\x89\xd3\x4c\x8b\x6f\x20",  # push r14; mov rbx, rdx; mov r13, [rdi + 32]
    b"\x4c\x03\x2d\xd6\x0d\x00\x00\x4c\x8b\x77\x28",  # add r13, [ADDS]; mov r14, [rdi + 40]
    b"\x4c\x03\x35\xd3\x0d\x00\x00\x4c\x8d\x25\xd4\x0d\x00\x00",  # add r14, [SUBS]; lea r12, [ENTRIES]
    b"\x48\x8b\x2d\xb5\x0d\x00\x00",  # mov rbp, [SLOTS]
    b"\x48\xff\xcd\x78\x46",  # each_entry: dec rbp; js told_all
    b"\x49\x83\x7c\x24\x48\x00\x74\x35",  # cmp qword [r12 + 72], 0; je next_entry
    b"\x48\x83\xec\x40\x4c\x89\xe6\x48\x89\xe7",  # sub rsp, 64; mov rsi, r12; mov rdi, rsp
    b"\xb9\x08\x00\x00\x00\xf3\x48\xa5",  # mov ecx, 8; rep movsq
    b"\x4c\x89\x6c\x24\x20\x4c\x89\x74\x24\x28",  # mov [rsp + 32], r13; mov [rsp + 40], r14
    b"\x48\x89\xe7\xbe\x40\x00\x00\x00",  # mov rdi, rsp; mov esi, 64
    b"\x48\x8b\x53\x08\xff\x13\x48\x83\xc4\x40",  # mov rdx, [rbx + 8]; call [rbx]; add rsp, 64
    b"\x89\x43\x10\x85\xc0\x75\x09",  # mov [rbx + 16], eax; test eax, eax; jne told_all
    b"\x49\x81\xc4\xa8\x00\x00\x00\xeb\xb5",  # next_entry: add r12, 168; jmp each_entry
    b"\xb8\x01\x00\x00\x00\x41\x5e\x41\x5d\x41\x5c",  # told_all: mov eax, 1; pop r14; pop r13; pop r12
    b"\x5d\x5b\xc3",  # pop rbp; pop rbx; ret
))  # fmt: skip

# which(address): the entry it lies in, or 0; keeps rdi, rsi
_WHICH: Final = b"".join((
    b"\x48\x8d\x05\x69\x0d\x00\x00\x48\x8b\x0d\x4a\x0d\x00\x00",  # lea rax, [ENTRIES]; mov rcx, [SLOTS]
    b"\x48\xff\xc9\x78\x14\x48\x3b\x78\x40",  # compare: dec rcx; js nowhere; cmp rdi, [rax + 64]
    b"\x72\x06\x48\x3b\x78\x48\x72\x0a",  # jb no_match; cmp rdi, [rax + 72]; jb found
    b"\x48\x05\xa8\x00\x00\x00\xeb\xe7",  # no_match: add rax, 168; jmp compare
    b"\x31\xc0",  # nowhere: xor eax, eax
    b"\xc3",  # found: ret
))  # fmt: skip

# _dl_find_object(address, result)
_FIND: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\x57\x56\x50",  # endbr64; push rdi; push rsi; push rax
    b"\xff\x15\xe3\x0c\x00\x00\x85\xc0\x74\x3a",  # call [FIND]; test eax, eax; je find_done
    b"\x48\x8b\x7c\x24\x10\xe8\xb5\xff\xff\xff",  # mov rdi, [rsp + 16]; call which
    b"\x48\x85\xc0\x74\x30\x48\x8b\x74\x24\x08",  # test rax, rax; je find_none; mov rsi, [rsp + 8]
    b"\x48\x83\x26\x00\x48\x8b\x48\x40",  # and qword [rsi], 0; mov rcx, [rax + 64]
    b"\x48\x89\x4e\x08\x48\x8b\x48\x48",  # mov [rsi + 8], rcx; mov rcx, [rax + 72]
    b"\x48\x89\x4e\x10\x48\x8d\x48\x70",  # mov [rsi + 16], rcx; lea rcx, [rax + 112]
    b"\x48\x89\x4e\x18\x48\x8b\x48\x50",  # mov [rsi + 24], rcx; mov rcx, [rax + 80]
    b"\x48\x89\x4e\x20\x31\xc0",  # mov [rsi + 32], rcx; xor eax, eax
    b"\x48\x83\xc4\x18\xc3",  # find_done: add rsp, 24; ret
    b"\xff\xc8\xeb\xf7",  # find_none: dec eax; jmp find_done
))  # fmt: skip

# dladdr(address, info)
_DLADDR: Final = b"".join((
    b"\xf3\x0f\x1e\xfa\x31\xc9\xeb\x0c",  # endbr64; xor ecx, ecx; jmp ask
))  # fmt: skip

# dladdr1(address, info, extra, flags)
_DLADDR1: Final = b"".join((
    b"\xf3\x0f\x1e\xfa",  # endbr64
    b"\x57\x56\x52\x51\x50",  # ask: push rdi; push rsi; push rdx; push rcx; push rax
    b"\xff\x15\x69\x0c\x00\x00\x85\xc0",  # call [DLADDR1]; test eax, eax
    b"\x0f\x85\xb6\x00\x00\x00\x48\x8b\x7c\x24\x20",  # jne dladdr_done; mov rdi, [rsp + 32]
    b"\xe8\x3f\xff\xff\xff\x48\x85\xc0",  # call which; test rax, rax
    b"\x0f\x84\xa3\x00\x00\x00\x48\x8b\x74\x24\x18",  # je dladdr_done; mov rsi, [rsp + 24]
    b"\x48\x8b\x48\x08\x48\x89\x0e",  # mov rcx, [rax + 8]; mov [rsi], rcx
    b"\x48\x8b\x48\x40\x48\x89\x4e\x08",  # mov rcx, [rax + 64]; mov [rsi + 8], rcx
    b"\x48\x2b\x38\x4c\x8b\x40\x58",  # sub rdi, [rax]; mov r8, [rax + 88]
    b"\x4c\x8b\x48\x60\x31\xd2",  # mov r9, [rax + 96]; xor edx, edx
    b"\x49\xff\xc9\x78\x3e\x41\x8a\x48\x04",  # each_symbol: dec r9; js searched; mov cl, [r8 + 4]
    b"\x80\xe1\x0f\x80\xf9\x06\x74\x2c",  # and cl, 15; cmp cl, 6; je next_symbol
    b"\x4d\x8b\x50\x08\x41\x0f\xb7\x48\x06",  # mov r10, [r8 + 8]; movzx ecx, word [r8 + 6]
    b"\x4c\x09\xd1\x74\x1e\x49\x89\xfb",  # or rcx, r10; je next_symbol; mov r11, rdi
    b"\x4d\x29\xd3\x72\x16\x74\x06",  # sub r11, r10; jb next_symbol; je inside
    b"\x4d\x3b\x58\x10\x73\x0e",  # cmp r11, [r8 + 16]; jae next_symbol
    b"\x48\x85\xd2\x74\x06\x4c\x39\x52\x08",  # inside: test rdx, rdx; je better; cmp [rdx + 8], r10
    b"\x73\x03",  # jae next_symbol
    b"\x4c\x89\xc2",  # better: mov rdx, r8
    b"\x49\x83\xc0\x18\xeb\xbd",  # next_symbol: add r8, 24; jmp each_symbol
    b"\x31\xc9\x45\x31\xc0\x48\x85\xd2",  # searched: xor ecx, ecx; xor r8d, r8d; test rdx, rdx
    b"\x74\x0d\x8b\x0a\x48\x03\x48\x68",  # je named; mov ecx, [rdx]; add rcx, [rax + 104]
    b"\x4c\x8b\x42\x08\x4c\x03\x00",  # mov r8, [rdx + 8]; add r8, [rax]
    b"\x48\x89\x4e\x10\x4c\x89\x46\x18",  # named: mov [rsi + 16], rcx; mov [rsi + 24], r8
    b"\x48\x8d\x48\x70\x8b\x7c\x24\x08\xff\xcf",  # lea rcx, [rax + 112]; mov edi, [rsp + 8]; dec edi
    b"\x74\x07\xff\xcf\x75\x0b\x48\x89\xca",  # je extra; dec edi; jne told; mov rdx, rcx
    b"\x48\x8b\x4c\x24\x10\x48\x89\x11",  # extra: mov rcx, [rsp + 16]; mov [rcx], rdx
    b"\xb8\x01\x00\x00\x00",  # told: mov eax, 1
    b"\x48\x83\xc4\x28\xc3",  # dladdr_done: add rsp, 40; ret
))  # fmt: skip

_ROUTINES: Final = {
    b"dlsym": _DLSYM,
    b"dlvsym": _DLVSYM,
    b"lookup": _LOOKUP,
    b"same": _SAME,
    b"mine": _MINE,
    b"dlopen": _DLOPEN,
    b"dlclose": _DLCLOSE,
    b"dlinfo": _DLINFO,
    b"dl_iterate_phdr": _ITERATE,
    b"forward": _FORWARD,
    b"tell": _TELL,
    b"which": _WHICH,
    b"_dl_find_object": _FIND,
    b"dladdr": _DLADDR,
    b"dladdr1": _DLADDR1,
}
_ALIGNED: Final = [routine.ljust(-(-len(routine) // 16) * 16, b"\xcc") for routine in _ROUTINES.values()]
_STARTS: Final = dict(zip(_ROUTINES, accumulate(map(len, _ALIGNED), initial=0), strict=False))
#: The code, position-independent: each routine at a multiple of 16.
CODE: Final = b"".join(_ALIGNED)
#: Where the code for each of glibc's functions is, from its beginning.
FUNCTIONS: Final = {
    name: _STARTS[name]
    for name in (
        *(b"dl_iterate_phdr", b"dladdr1", b"_dl_find_object", b"dlsym", b"dlvsym", b"dladdr"),
        *(b"dlopen", b"dlclose", b"dlinfo"),
    )
}


def stand_ins(base: int, head: bytes) -> dict[int, int]:
    """What stands for each of glibc's functions, by that one's address.

    The code is at ``base``, and its table begins with ``head``.
    """
    functions = HEAD.unpack(head)
    return {address: base + at for address, at in zip(functions, FUNCTIONS.values(), strict=False) if address}
