/* SIGBUS and SIGSEGV while a loop runs.

   A file that is cut short takes its pages out of memory; whoever reads or writes one of them gets SIGBUS, which
   ends the process.  While one of our loops runs, and in its thread alone, the signal ends the loop instead; and so
   does SIGSEGV, which a page that forbids it gives, or a library that another thread unloads.  Callers hold Python's
   lock, so that there is one loop at a time. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>

#include "loops.h"

#ifndef SS_AUTODISARM /* linux/signal.h, which does not go with the C library's */
#define SS_AUTODISARM (1U << 31)
#endif

static const int signals[] = {SIGBUS, SIGSEGV};
enum { SIGNALS = sizeof signals / sizeof *signals };

sigjmp_buf guard_jump;
uint64_t guard_where;
static struct sigaction before[SIGNALS];
static sigset_t mask;
static pthread_t thread;

static void on_fault(int number, siginfo_t *info, void *context)
{
    const struct sigaction *theirs = &before[number == SIGSEGV];
    if (info->si_code > 0 && pthread_equal(pthread_self(), thread)) {
        const stack_t *stack = &((ucontext_t *)context)->uc_stack;
        if (stack->ss_flags & (int)SS_AUTODISARM) /* sigreturn(2) would arm it again, and is not come to */
            sigaltstack(stack, NULL);
        guard_where = (uint64_t)info->si_addr;
        siglongjmp(guard_jump, 1);
    }
    if (theirs->sa_flags & SA_SIGINFO)
        theirs->sa_sigaction(number, info, context);
    else if (theirs->sa_handler == SIG_IGN && info->si_code <= 0)
        return;
    else if (theirs->sa_handler != SIG_DFL && theirs->sa_handler != SIG_IGN)
        theirs->sa_handler(number);
    else { /* somebody else's: as if we had never been there */
        sigaction(number, theirs, NULL);
        if (info->si_code <= 0)
            raise(number);
    }
}

void guard_begin(void)
{
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigset_t wanted;
    thread = pthread_self();
    sigemptyset(&wanted);
    for (int i = 0; i < SIGNALS; i++) {
        struct sigaction found;
        sigaction(signals[i], &ours, &found);
        if (found.sa_sigaction != on_fault) /* as whoever met ours and put it back later has it */
            before[i] = found;
        sigaddset(&wanted, signals[i]);
    }
    /* What is blocked would end the process.  The mask is the thread's own, on Linux by this call, too. */
    sigprocmask(SIG_UNBLOCK, &wanted, &mask);
}

void guard_end(void)
{
    sigprocmask(SIG_SETMASK, &mask, NULL);
    for (int i = 0; i < SIGNALS; i++) {
        struct sigaction found;
        sigaction(signals[i], NULL, &found);
        if (found.sa_sigaction != on_fault) /* another thread has installed its own meanwhile: that stays */
            continue;
        sigaction(signals[i], &before[i], &found);
        if (found.sa_sigaction != on_fault) /* or between the two calls */
            sigaction(signals[i], &found, NULL);
    }
}

/* Whether the handler is ours while a loop runs: a sanitizer may keep these signals, and say that all is well. */
int64_t guard_is_kept(void)
{
    int64_t kept = 1;
    guard_begin();
    for (int i = 0; i < SIGNALS; i++) {
        struct sigaction found;
        if (sigaction(signals[i], NULL, &found) || found.sa_sigaction != on_fault)
            kept = 0;
    }
    guard_end();
    return kept;
}

static int64_t copy_bytes(void *to, const void *from, uint64_t length)
{
    memcpy(to, from, length);
    return FINE;
}

static int64_t copy_guarded(void *to, const void *from, uint64_t length)
{
    GUARDED(copy_bytes(to, from, length));
}

/* Copy bytes; where is the address that was not to be had. */
int64_t copy(void *to, const void *from, uint64_t length, uint64_t *where)
{
    int64_t result = copy_guarded(to, from, length);
    *where = result == FINE ? 0 : guard_where;
    return result;
}
