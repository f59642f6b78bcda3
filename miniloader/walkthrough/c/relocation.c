/* The relocations of this program and its libraries that need no symbol.   cc -Wall -Wextra relocation.c && ./a.out */
#define _GNU_SOURCE
#include <link.h>
#include <stdio.h>
#include <string.h>

#if defined __aarch64__                                 /* what each processor calls base + addend */
enum { RELATIVE = R_AARCH64_RELATIVE };
#elif defined __riscv
enum { RELATIVE = R_RISCV_RELATIVE };
#else
enum { RELATIVE = R_X86_64_RELATIVE };
#endif

static int told(struct dl_phdr_info *library, size_t size, void *relative)
{
    const ElfW(Rela) *table = NULL;
    size_t length = 0;
    long here = 0;
    (void)size;
    if (strstr(library->dlpi_name, "vdso"))             /* the kernel's own: nobody relocates it */
        return 0;
    for (int number = 0; number < library->dlpi_phnum; number++) {
        if (library->dlpi_phdr[number].p_type != PT_DYNAMIC)
            continue;
        const ElfW(Dyn) *entry = (void *)(library->dlpi_addr + library->dlpi_phdr[number].p_vaddr);
        for (; entry->d_tag != DT_NULL; entry++) {
            if (entry->d_tag == DT_RELA)
                table = (void *)entry->d_un.d_ptr;      /* ld.so has relocated it, too */
            if (entry->d_tag == DT_RELASZ)
                length = entry->d_un.d_val / sizeof *table;
        }
    }
    for (size_t number = 0; table && number < length; number++) {
        if (ELF64_R_TYPE(table[number].r_info) != RELATIVE)
            continue;
        if (++here <= 2)
            printf("slot %#lx holds %#lx, base + %#lx\n", (long)table[number].r_offset,
                   *(long *)(library->dlpi_addr + table[number].r_offset), (long)table[number].r_addend);
    }
    printf("%ld words of %s are base + a number from the file\n", here, *library->dlpi_name ? library->dlpi_name : "this program");
    *(long *)relative += here;
    return 0;
}

int main(void)
{
    long relative = 0;
    dl_iterate_phdr(told, &relative);
    return relative == 0;
}
