/* What mmap says of a pipe, a TCP socket, /dev/null and a file.   cc -Wall -Wextra unmappable.c && ./a.out */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

static int answer(const char *what, int fd)
{
    void *address = mmap(NULL, sysconf(_SC_PAGESIZE), PROT_READ, MAP_SHARED, fd, 0);
    int number = address == MAP_FAILED ? errno : 0;
    printf("%-12s %s\n", what, number ? strerror(number) : "mapped");
    return number;
}

int main(void)
{
    int pipes[2];
    if (pipe(pipes))
        return 1;
    int of_pipe = answer("a pipe", pipes[0]), of_null = answer("/dev/null", open("/dev/null", O_RDONLY));
    answer("a TCP socket", socket(AF_INET, SOCK_STREAM, 0));
    int of_file = answer("a file", open("/proc/self/exe", O_RDONLY));
    return !(of_pipe == ENODEV && of_null == ENODEV && of_file == 0);
}
