/* Which fault has ended a process: a signal's handler notes it in memory that another process has, too. */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { IS_WRITE = 2, IS_FETCH = 16 }; /* as x86's page faults say it: the kernel's asm/trap_pf.h */

typedef struct { /* see lab/workers/fault.py */
    int64_t number, code;
    uint64_t address, instruction, how, back;
} Fault;

enum { FAULTS = 4 };
static const int faults[FAULTS] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
static struct sigaction earlier[FAULTS]; /* who was to handle each, faulthandler of Python maybe */
static Fault *record;
static char *const *teller; /* a command, with room behind its words */

/* Have another program tell of the fault, which gets the process and its numbers as words, in hexadecimal.  What runs
   here may have been interrupted anywhere: only what signal-safety(7) allows is called. */
static void tell(const Fault *fault)
{
    enum { WORDS = 7, MOST = 61 };
    uint64_t numbers[WORDS] = {(uint64_t)getpid(), (uint64_t)fault->number, (uint64_t)fault->code, fault->address,
                               fault->instruction, fault->how, fault->back};
    static char texts[WORDS][17];
    static char *words[MOST + WORDS + 1];
    int count = 0;
    while (teller[count] && count < MOST) {
        words[count] = teller[count];
        count++;
    }
    for (int i = 0; i < WORDS; i++) {
        for (int digit = 0; digit < 16; digit++)
            texts[i][digit] = "0123456789abcdef"[numbers[i] >> (60 - 4 * digit) & 15];
        words[count + i] = texts[i];
    }
    pid_t child = fork();
    if (child == 0) {
        execve(words[0], words, environ);
        _exit(127);
    }
    if (child > 0)
        waitpid(child, NULL, 0);
}

/* From now on the command tells of the fault that ends this process, besides or instead of noting it. */
void tell_faults(char *const *command)
{
    teller = command;
}

#if defined __aarch64__
#include <asm/sigcontext.h>

/* Whether an access was a write, or the fetching of an instruction, by its syndrome: Arm ARM, ESR_EL1. */
static uint64_t how_of(const ucontext_t *context)
{
    enum { FETCH_BELOW = 0x20, FETCH = 0x21, WRITE_NOT_READ = 1 << 6 };
    const uint8_t *at = (const uint8_t *)context->uc_mcontext.__reserved;
    const uint8_t *end = at + sizeof context->uc_mcontext.__reserved;
    while (at + sizeof(struct esr_context) <= end) {
        const struct _aarch64_ctx *head = (const void *)at;
        if (!head->magic || head->size < sizeof *head)
            break;
        if (head->magic == ESR_MAGIC) {
            uint64_t syndrome = ((const struct esr_context *)head)->esr, class = syndrome >> 26 & 63;
            if (class == FETCH_BELOW || class == FETCH)
                return IS_FETCH;
            return syndrome & WRITE_NOT_READ ? IS_WRITE : 0;
        }
        at += head->size;
    }
    return 0;
}
#endif

#if defined __x86_64__
/* Whether eight bytes can be read: the kernel reads them first, and then refuses to do what it does not know. */
static bool is_readable(uint64_t address)
{
    return syscall(SYS_rt_sigprocmask, -1, address, NULL, sizeof address) == -1 && errno == EINVAL;
}
#endif

/* Whether somebody was to handle the signal before, and does so from now on. */
static bool is_handled_by_earlier(int number)
{
    for (int i = 0; i < FAULTS; i++) {
        bool is_default = earlier[i].sa_handler == SIG_DFL || earlier[i].sa_handler == SIG_IGN;
        if (faults[i] == number && !is_default)
            return sigaction(number, &earlier[i], NULL) == 0;
    }
    return false;
}

static void note(int number, siginfo_t *info, void *data)
{
    const ucontext_t *context = data;
    Fault fault = {.number = number, .code = info->si_code, .address = (uint64_t)info->si_addr};
#if defined __x86_64__
    const greg_t *registers = context->uc_mcontext.gregs;
    fault.instruction = (uint64_t)registers[REG_RIP];
    fault.how = (uint64_t)registers[REG_ERR];
    /* Of a jump to where nothing can be run: where it would have returned to. */
    if (fault.how & IS_FETCH && is_readable((uint64_t)registers[REG_RSP]))
        fault.back = *(const uint64_t *)registers[REG_RSP];
#elif defined __aarch64__
    fault.instruction = context->uc_mcontext.pc;
    fault.how = how_of(context);
    fault.back = context->uc_mcontext.regs[30];
#else
    (void)context;
#endif
    if (record)
        *record = fault;
    if (teller)
        tell(&fault);
    if (!teller || !is_handled_by_earlier(number))
        kill(getpid(), number); /* ends the process: the handler was for once */
    else if (info->si_code <= 0) /* somebody has sent it; a fault comes again by itself, where it was */
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), number);
}

/* From now on the first fault of this thread, in whatever code, is noted at a place, and ends the process as it would
   have done.  A stack of its own (so many bytes from its start on) serves where the thread's has overflown. */
void note_faults(Fault *place, void *start, uint64_t size)
{
    stack_t stack = {.ss_sp = start, .ss_size = size};
    struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    action.sa_flags |= (int)SA_RESETHAND;
    record = place;
    sigaltstack(&stack, NULL);
    for (int i = 0; i < FAULTS; i++)
        sigaction(faults[i], &action, &earlier[i]);
}
