/* The stack protector's word, where it would lie in glibc's ld.so: musl has none of that name to be found by.

   On x86-64 it is in each thread's control block, with every C library. */

#if defined __aarch64__

#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>

__attribute__((visibility("hidden"))) uintptr_t __stack_chk_guard = UINT64_C(0x9e3779b97f4a7c00);

__attribute__((constructor, optimize("no-stack-protector"))) static void choose_guard(void)
{
    const void *random = (const void *)getauxval(AT_RANDOM);
    if (random)
        memcpy(&__stack_chk_guard, random, sizeof __stack_chk_guard);
    __stack_chk_guard &= ~UINT64_C(0xff); /* no string goes past the first byte */
}

#else

typedef int nothing_to_choose;

#endif
