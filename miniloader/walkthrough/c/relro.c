/* Written, then frozen with mprotect: a later store is SIGSEGV.   cc -Wall -Wextra relro.c && ./a.out */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
    long page = sysconf(_SC_PAGESIZE);
    void **table = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (table == MAP_FAILED)
        return 1;
    table[0] = (void *)main;                     /* relocated: an address is filled in */
    if (mprotect(table, page, PROT_READ))        /* frozen: the first page alone */
        return 1;
    table[page / sizeof *table] = NULL;          /* right behind it stores are allowed */
    int status;
    pid_t child = fork();
    if (child == 0) {
        *(void *volatile *)table = NULL;
        _exit(0);
    }
    waitpid(child, &status, 0);
    printf("a store into the frozen page: %s\n", WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "allowed");
    return !(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
}
