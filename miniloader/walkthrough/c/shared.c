/* Two processes talk through a shared mapping of a file.   cc -Wall -Wextra shared.c && ./a.out */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
    long page = sysconf(_SC_PAGESIZE);
    char name[] = "/tmp/board-XXXXXX", in_the_file[16] = "";
    int fd = mkstemp(name);
    unlink(name);
    if (ftruncate(fd, page))
        return 1;
    pid_t child = fork();
    char *board = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);  /* each maps it for itself */
    if (board == MAP_FAILED)
        return 1;
    if (child == 0) {
        strcpy(board, "are you there?");
        _exit(0);                                                                /* no msync, no close */
    }
    waitpid(child, NULL, 0);
    if (pread(fd, in_the_file, sizeof in_the_file - 1, 0) < 0)
        return 1;
    printf("loaded: \"%s\"; read(2) gives: \"%s\"\n", board, in_the_file);
    return strcmp(board, "are you there?") || strcmp(in_the_file, "are you there?");
}
