/* A file is mapped, and read like an array; the call loads nothing.   cc -Wall -Wextra mapping.c && ./a.out */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

int main(void)
{
    size_t length = 1UL << 30;
    char name[] = "/tmp/mapping-XXXXXX", read_back[8];
    int fd = mkstemp(name);
    unlink(name);
    if (ftruncate(fd, length))                          /* a gibibyte, all hole */
        return 1;
    char *file = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (file == MAP_FAILED)
        return 1;
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    char byte = *(volatile char *)(file + length / 2);  /* a load: one fault, and a page of the file */
    getrusage(RUSAGE_SELF, &after);
    printf("byte %d, by %ld page faults\n", byte, after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt);

    memcpy(file, "stored", 7);                          /* a store; read(2) sees it at once */
    if (pread(fd, read_back, 7, 0) != 7 || pwrite(fd, "written", 8, 100) != 8)
        return 1;
    printf("pread gives \"%s\", the mapping shows \"%s\"\n", read_back, file + 100);
    return strcmp(read_back, "stored") || strcmp(file + 100, "written");
}
