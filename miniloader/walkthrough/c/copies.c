/* read against mmap, with a clock: who wins depends on the pattern.   cc -O2 -Wall -Wextra copies.c && ./a.out */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 20000, PAGES = 64, ROUNDS = 5 };

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

int main(void)
{
    size_t size = 32 << 20, page_size = sysconf(_SC_PAGESIZE);
    char name[] = "/tmp/race-XXXXXX", *page = malloc(page_size), *content = calloc(1, size);
    int fd = mkstemp(name);
    unlink(name);
    if (write(fd, content, size) != (ssize_t)size)
        return 1;
    uint64_t word, *mapping = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0), sum = 0;
    for (int round = 0; round < ROUNDS; round++) {
        srand(round);
        double start = now();
        for (int i = 0; i < WORDS; i++)
            sum += pread(fd, &word, 8, rand() % (size / 8) * 8) == 8 ? word : 1;
        double by_read = now() - start;
        start = now();
        for (int i = 0; i < WORDS; i++)
            sum += mapping[rand() % (size / 8)];
        double by_mmap = now() - start;
        printf("%d random words: read %.0f us, mmap %.0f us\n", WORDS, by_read, by_mmap);
        start = now();
        for (int i = 0; i < PAGES; i++)
            sum += pread(fd, page, page_size, i * page_size) == (ssize_t)page_size ? page[0] : 1;
        by_read = now() - start;
        start = now();
        for (int i = 0; i < PAGES; i++) {
            uint64_t *once = mmap(NULL, page_size, PROT_READ, MAP_SHARED, fd, i * page_size);
            sum += *once;
            munmap(once, page_size);
        }
        printf("%d pages, each once: read %.0f us, mmap %.0f us\n", PAGES, by_read, now() - start);
    }
    return sum != 0;
}
