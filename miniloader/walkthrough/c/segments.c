/* The program headers of libc, and the mapping that each asks for.   cc -Wall -Wextra segments.c && ./a.out */
#define _GNU_SOURCE
#include <link.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int told(struct dl_phdr_info *library, size_t size, void *found)
{
    (void)size;
    if (!strstr(library->dlpi_name, "libc.so"))
        return 0;
    long page = sysconf(_SC_PAGESIZE);
    printf("%s, load bias %#lx\n", library->dlpi_name, (unsigned long)library->dlpi_addr);
    for (int number = 0; number < library->dlpi_phnum; number++) {
        const ElfW(Phdr) *header = &library->dlpi_phdr[number];
        if (header->p_type != PT_LOAD)
            continue;
        unsigned long start = header->p_vaddr / page * page, file = header->p_offset / page * page;
        unsigned long end = (header->p_vaddr + header->p_memsz + page - 1) / page * page;
        printf("mmap(base + %#lx, %#lx, %c%c%c, file from %#lx)%s\n", start, end - start,
               header->p_flags & PF_R ? 'r' : '-', header->p_flags & PF_W ? 'w' : '-',
               header->p_flags & PF_X ? 'x' : '-', file, header->p_memsz > header->p_filesz ? ", then bss" : "");
        ++*(int *)found;
    }
    return 0;
}

int main(void)
{
    int loads = 0;
    dl_iterate_phdr(told, &loads);
    return loads < 2;
}
