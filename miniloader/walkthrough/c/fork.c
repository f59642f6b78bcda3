/* After fork parent and child share every page, until one writes.   cc -Wall -Wextra fork.c && ./a.out */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
    long page = sysconf(_SC_PAGESIZE);
    char *p = mmap(NULL, 8 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *board = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || board == MAP_FAILED)
        return 1;
    for (int number = 0; number < 8; number++)
        strcpy(p + number * page, "first");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        strcpy(p + 2 * page, "child");      /* the first to write page 2: the child gets a copy */
        strcpy(board, "hello");             /* MAP_SHARED stays shared over fork */
        _exit(0);
    }
    waitpid(child, NULL, 0);
    printf("page 2 here: %s; the shared page: %s\n", p + 2 * page, board);
    return strcmp(p + 2 * page, "first") || strcmp(board, "hello");
}
