/* gdb's JIT interface, by which a debugger sees what ld.so does not know: two symbols that it looks for in every
   library of the process.  The list is Python's (loader/beside_glibc/debugger.py).

   Source: the gdb manual, "JIT Compilation Interface". */

#include <stdint.h>

struct jit_code_entry;

struct jit_descriptor {
    uint32_t version, action;
    struct jit_code_entry *relevant, *first;
};

__attribute__((visibility("default"))) struct jit_descriptor __jit_debug_descriptor = {.version = 1};

/* gdb has a breakpoint here. */
__attribute__((visibility("default"), noinline)) void __jit_debug_register_code(void)
{
    __asm__ volatile("" ::: "memory");
}
