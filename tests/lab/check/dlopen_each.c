/* Opens each file named on standard input as dlopen(RTLD_NOW) does, in a process of its own, and says how it went. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
    static char buffer[1 << 20], path[4200], word[2000];
    setvbuf(stdin, buffer, _IOFBF, sizeof buffer); /* all at once: children share the offset */
    while (fgets(path, sizeof path, stdin)) {
        path[strcspn(path, "\n")] = 0;
        int ends[2], length = 0, got;
        fflush(stdout);
        if (pipe(ends))
            return 1;
        pid_t child = fork();
        if (!child) {
            alarm(20);
            freopen("/dev/null", "w", stdout);
            freopen("/dev/null", "w", stderr);
            const char *said = dlopen(path, RTLD_NOW) ? "loads" : dlerror();
            _exit(write(ends[1], said, strlen(said)) < 0);
        }
        close(ends[1]);
        while ((got = (int)read(ends[0], word + length, sizeof word - 1 - (size_t)length)) > 0)
            length += got;
        word[length] = 0;
        close(ends[0]);
        waitpid(child, NULL, 0);
        printf("%s\t%s\n", path, length ? word : "died");
    }
}
