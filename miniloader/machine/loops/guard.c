/* SIGBUS while a loop runs.

   A file that is cut short takes its pages out of memory; whoever reads or writes one of them gets SIGBUS, which
   ends the process.  While one of our loops runs, and in its thread alone, the signal ends the loop instead.
   Callers hold Python's lock, so that there is one loop at a time. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>

#include "loops.h"

sigjmp_buf guard_jump;
static struct sigaction before;
static pthread_t thread;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    if (info->si_code > 0 && pthread_equal(pthread_self(), thread))
        siglongjmp(guard_jump, 1);
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(number);
    else { /* somebody else's: as if we had never been there */
        sigaction(SIGBUS, &before, NULL);
        if (info->si_code <= 0)
            raise(number);
    }
}

void guard_begin(void)
{
    struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    thread = pthread_self();
    sigaction(SIGBUS, &ours, &before);
}

void guard_end(void)
{
    sigaction(SIGBUS, &before, NULL);
}
