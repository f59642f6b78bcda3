/* MAP_PRIVATE: a write gets its own copy.   cc -Wall -Wextra cow.c && ./a.out */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Bit 61 of a page's entry in /proc/self/pagemap: the page is the file's own, in the page cache. */
static int is_the_files(const volatile char *address)
{
    uint64_t entry = 0;
    long page = sysconf(_SC_PAGESIZE);
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (pread(fd, &entry, sizeof entry, (uintptr_t)address / page * sizeof entry) != sizeof entry)
        exit(1);
    close(fd);
    return entry >> 61 & 1;
}

int main(void)
{
    long page = sysconf(_SC_PAGESIZE);
    char name[] = "/tmp/letters-XXXXXX", byte;
    int fd = mkstemp(name);
    unlink(name);
    for (int number = 0; number < 8; number++)
        for (long at = 0; at < page; at++)
            if (write(fd, &(char){'A' + number}, 1) != 1)
                return 1;

    volatile char *p = mmap(NULL, 8 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED)
        return 1;
    for (int number = 0; number < 8; number++)
        (void)p[number * page];                /* read: the page table leads to the page cache */
    p[3 * page] = 'h';                         /* write: a fault, a copy, and then the store */

    for (int number = 0; number < 8; number++)
        printf("page %d: %s\n", number, is_the_files(p + number * page) ? "the file's own" : "a copy");
    if (pread(fd, &byte, 1, 3 * page) != 1)
        return 1;
    printf("here '%c', in the file '%c'\n", p[3 * page], byte);
    return !(p[3 * page] == 'h' && byte == 'D');
}
