/* A page gets a frame when it is touched.   cc -Wall -Wextra memory.c && ./a.out */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

static long faults(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt;
}

int main(void)
{
    long page = sysconf(_SC_PAGESIZE);
    volatile char *p = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return 1;
    printf("addresses %p to %p, and no memory yet\n", (void *)p, (void *)(p + 4 * page));
    int right = 1;
    for (int round = 1; round <= 2; round++)
        for (int number = 0; number < 4; number++) {
            long before = faults();
            p[number * page] = 'x';
            long fault = faults() - before;
            printf("write %d to page %d: %ld page faults\n", round, number, fault);
            right = right && fault == (round == 1);
        }
    return !right;
}
