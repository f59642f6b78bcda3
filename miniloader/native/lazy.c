/* What GOT[2] of a library points at while its PLT slots are bound lazily: PLT0 jumps here.

   GOT[1] has a function of Python's, which is given the relocation's index and returns the function's address; there
   the jump goes on, with every register that carries arguments as it was.

   Sources: the AMD64 psABI, sections 3.2 and 5.2, and the AMD64 manual (XSAVE); ELF for the Arm 64-bit architecture,
   "Procedure Linkage Table", and its procedure call standard. */

#if defined __x86_64__

/* PLT0 has pushed GOT[1], above the index, above the return address.  The XSAVE area has room for x87, SSE, AVX and
   AVX-512 state in the standard format; 0xee are SSE, AVX, bounds, opmask and both ZMM parts: what glibc saves.
   XRSTOR wants the unused part of its header zero.  A processor without XSAVE has none but the registers of SSE. */
#define BIND(name, save, restore)                                                                                      \
    __asm__(".text\n.p2align 4\n.globl " name "\n.type " name ", @function\n" name ":\n"                               \
            ".cfi_startproc\n.cfi_def_cfa_offset 24\n"                                                                 \
            "endbr64\n"                                                                                                \
            "push %rbp\n.cfi_def_cfa_offset 32\n.cfi_offset %rbp, -32\n"                                               \
            "mov %rsp, %rbp\n.cfi_def_cfa_register %rbp\n"                                                             \
            "push %rax\n push %rdi\n push %rsi\n push %rdx\n push %rcx\n"                                              \
            "push %r8\n push %r9\n push %r10\n push %r11\n"                                                            \
            "and $-64, %rsp\n sub $0xa80, %rsp\n"                                                                      \
            "xor %eax, %eax\n xor %edx, %edx\n"                                                                        \
            "mov %rax, 512(%rsp)\n mov %rax, 520(%rsp)\n mov %rax, 528(%rsp)\n mov %rax, 536(%rsp)\n"                  \
            "mov %rax, 544(%rsp)\n mov %rax, 552(%rsp)\n mov %rax, 560(%rsp)\n mov %rax, 568(%rsp)\n"                  \
            "mov $0xee, %eax\n" save "\n"                                                                              \
            "mov 16(%rbp), %rdi\n call *8(%rbp)\n mov %rax, 8(%rbp)\n"                                                 \
            "mov $0xee, %eax\n xor %edx, %edx\n" restore "\n"                                                          \
            "lea -72(%rbp), %rsp\n"                                                                                    \
            "pop %r11\n pop %r10\n pop %r9\n pop %r8\n"                                                                \
            "pop %rcx\n pop %rdx\n pop %rsi\n pop %rdi\n pop %rax\n"                                                   \
            "pop %rbp\n.cfi_def_cfa %rsp, 24\n.cfi_restore %rbp\n"                                                     \
            "mov (%rsp), %r11\n add $16, %rsp\n.cfi_def_cfa_offset 8\n"                                                \
            "jmp *%r11\n"                                                                                              \
            ".cfi_endproc\n.size " name ", .-" name "\n")

BIND("bind_lazily", "xsave (%rsp)", "xrstor (%rsp)");
BIND("bind_lazily_without_xsave", "fxsave (%rsp)", "fxrstor (%rsp)");

#elif defined __aarch64__

/* PLT0 has pushed x16, which its entry has pointed at the slot, and x30; now x16 points at GOT[2].  x0 to x8 and q0 to
   q7 carry arguments.  Functions that want more kept (DT_AARCH64_VARIANT_PCS) are never bound lazily. */
__asm__(".text\n.p2align 4\n.globl bind_lazily\n.type bind_lazily, %function\nbind_lazily:\n"
        ".cfi_startproc\n.cfi_def_cfa_offset 16\n.cfi_offset x30, -8\n"
        "hint #34\n" /* bti c */
        "stp x8, x9, [sp, #-208]!\n.cfi_def_cfa_offset 224\n"
        "stp x6, x7, [sp, #16]\n stp x4, x5, [sp, #32]\n stp x2, x3, [sp, #48]\n stp x0, x1, [sp, #64]\n"
        "stp q0, q1, [sp, #80]\n stp q2, q3, [sp, #112]\n stp q4, q5, [sp, #144]\n stp q6, q7, [sp, #176]\n"
        "ldr x0, [sp, #208]\n sub x0, x0, x16\n sub x0, x0, #8\n lsr x0, x0, #3\n"
        "ldr x17, [x16, #-8]\n"
        "blr x17\n"
        "mov x16, x0\n"
        "ldp q0, q1, [sp, #80]\n ldp q2, q3, [sp, #112]\n ldp q4, q5, [sp, #144]\n ldp q6, q7, [sp, #176]\n"
        "ldp x0, x1, [sp, #64]\n ldp x2, x3, [sp, #48]\n ldp x4, x5, [sp, #32]\n ldp x6, x7, [sp, #16]\n"
        "ldp x8, x9, [sp], #208\n.cfi_def_cfa_offset 16\n"
        "ldp x17, x30, [sp], #16\n.cfi_def_cfa_offset 0\n.cfi_restore x30\n"
        "br x16\n"
        ".cfi_endproc\n.size bind_lazily, .-bind_lazily\n");

#endif
