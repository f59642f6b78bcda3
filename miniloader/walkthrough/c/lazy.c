/* What one touch brings: a read, and a write.   cc -Wall -Wextra lazy.c && ./a.out */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* How many of the pages from an address on have an entry in our page table: bit 63 of /proc/self/pagemap. */
static int present(const volatile char *address, int pages)
{
    long page = sysconf(_SC_PAGESIZE);
    int fd = open("/proc/self/pagemap", O_RDONLY), count = 0;
    for (int number = 0; number < pages; number++) {
        uint64_t entry = 0;
        if (pread(fd, &entry, sizeof entry, ((uintptr_t)address / page + number) * sizeof entry) != sizeof entry)
            exit(1);
        count += entry >> 63;
    }
    close(fd);
    return count;
}

int main(void)
{
    enum { PAGES = 1024 };
    long page = sysconf(_SC_PAGESIZE);
    char name[] = "/tmp/lazy-XXXXXX", *content = calloc(PAGES, page);
    int fd = mkstemp(name);
    unlink(name);
    if (write(fd, content, PAGES * page) != PAGES * page)
        return 1;
    volatile char *shared = mmap(NULL, PAGES * page, PROT_READ, MAP_SHARED, fd, 0);
    volatile char *private = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    int none = present(shared, PAGES);
    (void)shared[300 * page];
    private[300 * page] = 'x';
    int by_read = present(shared, PAGES), by_write = present(private, PAGES);
    printf("mapped: %d pages; one read: %d; one write: %d\n", none, by_read, by_write);
    return !(none == 0 && by_read >= 1 && by_write == 1);
}
