/* dlopen(3) and its like, as libraries that glibc does not know call them: Python answers.

   A library of ours is bound to these instead of glibc's.  Who calls is found as glibc finds it, by the return
   address.  What Python has no part in goes straight on to glibc's own: handles that are glibc's, and everything before
   Python is asked to answer, and after it has ended.  What a library needs then is its end: exit(3) finalises ours.

   Source: <dlfcn.h> and <link.h>; errors are kept as glibc's dlfcn/dlerror.c keeps them, one for each thread. */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { OPEN, SYMBOL, VERSIONED, CLOSE, INFORMATION, NAMESPACE, END }; /* what is asked */

typedef struct { /* see __init__.py, which declares the same for Python */
    uint64_t function, caller, handle, name, version, number, where;
    uint64_t begun;         /* when Python was asked: nanoseconds by the monotonic clock */
    uint64_t result, error; /* of malloc(3), or 0 */
} Question;

typedef struct { /* a function of glibc's, and what libraries of ours call instead; an audit reads them, too */
    uint64_t ours, theirs;
} StandIn;

enum { STAND_INS = 24 };

__attribute__((visibility("default"))) StandIn stand_ins[STAND_INS];

static struct { /* glibc's own, in the order of Python's */
    void *(*open)(const char *, int);
    void *(*symbol)(void *, const char *);
    void *(*versioned)(void *, const char *, const char *);
    int (*close)(void *);
    int (*information)(void *, int, void *);
    void *(*namespace)(long, const char *, int);
    char *(*error)(void);
} theirs;

static struct { /* of CPython's C interface what it takes to ask, in the order of Python's */
    int (*lock)(void);
    void (*unlock)(int);
    void *(*number)(uint64_t);
    void *(*call)(const void *function, void *argument);
    int (*truth)(void *);
    void (*forget)(void *);
    void (*complain)(const void *function);
    void (*put_by)(void **type, void **value, void **traceback); /* what is being raised */
    void (*raise)(void *type, void *value, void *traceback);
    int (*do_pending)(void);
    int (*later)(int (*function)(void *), void *argument); /* in Python's main thread, between its instructions */
    void (*hush)(void *state); /* who traces or profiles it */
    void (*unhush)(void *state);
    void *(*own)(void); /* the thread's state by which it takes the lock, of a thread that Python knows */
    void *(*current)(void); /* the state that holds the lock: this thread's, or until 3.11 any thread's */
    void *(*interpreter)(const void *state);
    void *(*main)(void);
    void *(*head)(void); /* an interpreter, and the one behind it */
    void *(*next)(const void *interpreter);
    void *(*let_go)(void); /* of the lock: the state that had it */
    void (*take)(void *state);
    void *(*create)(void *interpreter); /* another state of this thread */
    void (*clear)(void *state);
    void (*end)(void); /* of the current state, and let go */
    int (*start)(uint64_t *thread, const void *attributes, void *(*function)(void *), void *argument); /* pthread_ */
    int (*detach)(uint64_t thread);
    int (*clock)(int which, struct timespec *now); /* clock_gettime(2): glibc's own came to libc with 2.17 */
    int (*is_there)(void); /* whether Python has begun, and not ended: who clears atexit's list has nobody tell us */
    const void *handler_of; /* a function of Python: its handler of a signal */
    int (*is_callable)(void *);
    void (*handler)(int); /* of signals: makes Python call its own handlers, between its instructions; or NULL */
    uint64_t innermost;   /* where a state has the address of its innermost frame on the stack; 0: need not be known */
} interface;
static long process, lost; /* the one that Python knows of, and one in which its lock is nobody's to give */
static const void *_Atomic answerer;          /* a function of Python, which gets a question's address */
static uint64_t first_handle, last_handle;    /* of ours */
static uint64_t program;                      /* the handle of the program, by which all that is global is found */

/* Sixteen bytes: by descriptors, for which glibc takes what it has to spare of static storage, and musl what it has. */
#define EACH_THREADS static __thread
EACH_THREADS char *message;
EACH_THREADS bool pending;

static bool is_ours(const void *handle)
{
    return (uint64_t)handle >= first_handle && (uint64_t)handle < last_handle;
}

/* Python answers in the main interpreter.  A thread may hold the lock in another one, which imports there or uses
   ctypes, or be one of that one's threads: then it lets go of that lock meanwhile, as whoever calls what may block. */
typedef struct {
    void *left, *created; /* states, or NULL */
    int lock;
} Visitor;

/* Whether this thread is where that state runs.  Until 3.11 no state tells whose it is: then the frames tell, which
   are on the stack of who runs them.  At the end of a thread's stack glibc has what the thread pointer points at; that
   of the first thread is above all others. */
static bool runs_here(const void *state)
{
    uint64_t here = (uint64_t)__builtin_frame_address(0), end = (uint64_t)__builtin_thread_pointer();
    uint64_t frame = interface.innermost ? *(const uint64_t *)((const char *)state + interface.innermost) : 0;
    return !interface.innermost || (frame > here && (end < here || frame < end));
}

static bool is_of_main(const void *state)
{
    return !state || interface.interpreter(state) == interface.main();
}

/* What Python's handlers of signals do, and raise, must not come to those who answer: as while dlopen(3) runs, they are
   called when that is over.  They are called in the main thread alone; so while that one asks, what has them called
   notes that it was to. */
static struct {
    struct sigaction were[_NSIG];
    bool is_handled[_NSIG], is_kept[_NSIG];
    _Atomic bool met[_NSIG];
    bool begun;
    uint64_t lookups;   /* since Python has been asked which it handles for something else */
    const void *thread; /* the main one's pointer */
} signals;

static void note_signal(int number)
{
    signals.met[number] = true;
}

/* Python tells in a twentieth of the time which signals it has handlers for: to ask the kernel is a call each. */
static bool has_handler(int number)
{
    void *boxed = interface.number((uint64_t)number);
    void *handler = boxed ? interface.call(interface.handler_of, boxed) : NULL;
    bool result = handler && interface.is_callable(handler);
    if (handler)
        interface.forget(handler);
    if (boxed)
        interface.forget(boxed);
    return result;
}

/* Before each answer, but for what takes least: of names that are looked up one after the other, before every eighth. */
static void look_at_signals(bool is_lookup)
{
    enum { OFTEN = 8 };
    signals.lookups = is_lookup ? signals.lookups + 1 : 0;
    if (signals.lookups % OFTEN)
        return;
    for (int i = 1; i < _NSIG; i++)
        signals.is_handled[i] = has_handler(i);
}

/* The kernel has a function called: with the flags and the mask that this one has. */
static bool put_in_place(int number, void (*function)(int), void (*expected)(int), struct sigaction *were)
{
    struct sigaction ours = *were;
    ours.sa_handler = function;
    if (sigaction(number, &ours, were))
        return false;
    if (were->sa_handler == expected && were->sa_flags == ours.sa_flags)
        return true;
    ours = *were;
    if (were->sa_handler == expected)
        ours.sa_handler = function;
    sigaction(number, &ours, NULL);
    return were->sa_handler == expected;
}

static bool is_main_thread(void)
{
    if (signals.thread == __builtin_thread_pointer())
        return true;
    if (syscall(SYS_gettid) != syscall(SYS_getpid))
        return false;
    signals.thread = __builtin_thread_pointer();
    return true;
}

static bool keep_signals(bool is_lookup)
{
    if (!interface.handler || !is_main_thread() || signals.begun)
        return false;
    signals.begun = true;
    look_at_signals(is_lookup);
    for (int i = 1; i < _NSIG; i++)
        signals.is_kept[i] =
            signals.is_handled[i] && put_in_place(i, note_signal, interface.handler, &signals.were[i]);
    return true;
}

/* Who has installed another handler meanwhile, a constructor maybe, keeps it. */
static void release_signals(void)
{
    for (int i = 1; i < _NSIG; i++)
        if (signals.is_kept[i])
            put_in_place(i, interface.handler, note_signal, &signals.were[i]);
    signals.begun = false;
    for (int i = 1; i < _NSIG; i++)
        if (atomic_load_explicit(&signals.met[i], memory_order_relaxed) && atomic_exchange(&signals.met[i], false))
            interface.handler(i);
}

enum { MOST_DUE = 32 }; /* pending calls, which Python keeps no more of */

typedef struct {
    void *type, *value, *traceback;
} Raised;

static int raise_again(void *place)
{
    Raised *raised = place;
    interface.raise(raised->type, raised->value, raised->traceback);
    free(raised);
    return -1;
}

/* What has been raised is the program's: it is raised there, when dlopen(3) and its like are over. */
static void raise_later(Raised due, const void *function)
{
    Raised *raised = malloc(sizeof *raised);
    if (raised) {
        *raised = due;
        if (interface.later(raise_again, raised) == 0)
            return;
        free(raised);
    }
    interface.raise(due.type, due.value, due.traceback);
    interface.complain(function);
}

static Visitor enter_main(void)
{
    Visitor visitor = {0};
    bool is_only = !interface.next(interface.head());
    const void *current = is_only ? NULL : interface.current();
    if (!is_of_main(current) && runs_here(current))
        visitor.left = interface.let_go();
    if (is_only || is_of_main(interface.own())) {
        visitor.lock = interface.lock();
        return visitor;
    }
    visitor.created = interface.create(interface.main());
    interface.take(visitor.created);
    return visitor;
}

static void leave_main(Visitor visitor)
{
    if (visitor.created) {
        interface.clear(visitor.created);
        interface.end();
    } else
        interface.unlock(visitor.lock);
    if (visitor.left)
        interface.take(visitor.left);
}

static struct timespec now(void)
{
    struct timespec time;
    interface.clock(CLOCK_MONOTONIC, &time);
    return time;
}

/* Whether Python's function has answered.  Not by a callback of ctypes': libffi asks the kernel whether it is SELinux
   before it makes its first one, which takes as long as all else that dlopen(3) takes. */
static bool has_answered(const void *function, Question *question)
{
    struct timespec begun = now();
    question->begun = (uint64_t)begun.tv_sec * 1000000000 + (uint64_t)begun.tv_nsec;
    Visitor visitor = enter_main();
    Raised earlier;
    interface.put_by(&earlier.type, &earlier.value, &earlier.traceback); /* who asks may clean up for that */
    void *state = interface.current();
    interface.hush(state);
    bool is_first = keep_signals(question->function == SYMBOL || question->function == VERSIONED);
    Raised due[MOST_DUE]; /* by handlers of signals that have come before; raised now, it would end the answer */
    int due_count = 0;
    for (; is_first && due_count < MOST_DUE && interface.do_pending(); due_count++)
        interface.put_by(&due[due_count].type, &due[due_count].value, &due[due_count].traceback);
    void *place = interface.number((uint64_t)question);
    void *result = place ? interface.call(function, place) : NULL;
    int truth = result ? interface.truth(result) : -1;
    if (truth < 0)
        interface.complain(function);
    if (result)
        interface.forget(result);
    if (place)
        interface.forget(place);
    for (int i = 0; i < due_count; i++)
        raise_later(due[i], function);
    interface.unhush(state);
    interface.raise(earlier.type, earlier.value, earlier.traceback);
    leave_main(visitor);
    if (is_first)
        release_signals();
    return truth > 0;
}

/* Called in each process that Python has forked: it sees to its lock there. */
void set_process(void)
{
    process = syscall(SYS_getpid);
}

/* A process that a library has forked by itself has this thread alone, and Python's lock as it was: another thread
   may have had it, which is not there. */
static bool is_stray(void)
{
    return process != syscall(SYS_getpid);
}

static bool is_lost(void)
{
    return lost && lost == syscall(SYS_getpid);
}

static bool has_lock(void)
{
    const void *current = interface.current();
    return current && (current == interface.own() || runs_here(current));
}

/* A thread that Python does not know may be asking for somebody who holds Python's lock and waits for it: who started
   it, and joins it; or who holds it is not there.  ld.so knows of no such lock.  So another thread waits in its
   place, and where that one is not given the lock for some time, glibc answers. */
enum { PATIENCE = 2 }; /* seconds */
enum { WAITING, GIVEN, LEFT };
typedef struct {
    _Atomic uint32_t state;
} Turn;

static void *wait_for_turn(void *place)
{
    Turn *turn = place;
    interface.unlock(interface.lock());
    if (atomic_exchange(&turn->state, GIVEN) == LEFT)
        free(turn);
    else
        syscall(SYS_futex, &turn->state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    return NULL;
}

/* Whether the thread will get Python's lock. */
static bool has_turn(void)
{
    uint64_t thread;
    if (is_lost())
        return false;
    bool is_sure = interface.own() && (!is_stray() || has_lock());
    Turn *turn = is_sure ? NULL : calloc(1, sizeof *turn);
    if (!turn)
        return true;
    if (interface.start(&thread, NULL, wait_for_turn, turn)) {
        free(turn);
        return true;
    }
    interface.detach(thread);
    struct timespec end = now();
    end.tv_sec += PATIENCE;
    long result = 0;
    while (turn->state == WAITING && (result == 0 || errno != ETIMEDOUT))
        result = syscall(SYS_futex, &turn->state, FUTEX_WAIT_BITSET_PRIVATE, WAITING, &end, NULL,
                         FUTEX_BITSET_MATCH_ANY);
    if (atomic_exchange(&turn->state, LEFT) == WAITING) {
        if (is_stray())
            lost = syscall(SYS_getpid);
        return false;
    }
    free(turn);
    return true;
}

/* Whether Python, which is still there, has answered.  As with ld.so, whose errno is its own, the caller's stays. */
static bool is_answered(Question *question)
{
    const void *python = answerer;
    int number = errno;
    bool result = python && interface.is_there() && has_turn() && has_answered(python, question);
    errno = number;
    return result;
}

/* Whatever is called has no error to tell of at first: neither we nor glibc. */
static bool ask(Question *question)
{
    free(message);
    message = NULL;
    pending = false;
    theirs.error();
    if (!is_answered(question))
        return false;
    message = (char *)question->error;
    pending = message != NULL;
    return true;
}

static void *meant(void *function)
{
    for (StandIn *stand_in = stand_ins; stand_in < stand_ins + STAND_INS; stand_in++)
        if (function && stand_in->theirs == (uint64_t)function)
            return (void *)stand_in->ours;
    return function;
}

const void *glibcs_own(const void *function)
{
    for (StandIn *stand_in = stand_ins; stand_in < stand_ins + STAND_INS; stand_in++)
        if (stand_in->ours && stand_in->ours == (uint64_t)function)
            return (const void *)stand_in->theirs;
    return function;
}

#define CALLER (uint64_t)__builtin_return_address(0)

/* When Python has ended, or cannot be asked, libraries may still open: what is there already, or what glibc loads.  For
   each library of ours that may ask, where it lies (its first address, bytes) and at which byte of all this its
   directories begin: each ends with a slash and a NUL, and behind the last one is another NUL. */
static struct {
    char *table;
    uint64_t count;
} askers;

void set_askers(const void *table, uint64_t count, uint64_t length)
{
    free(askers.table);
    askers.table = malloc(length + !length);
    askers.count = askers.table ? count : 0;
    if (askers.table && length)
        memcpy(askers.table, table, length);
}

static const char *directories_of(uint64_t caller)
{
    const uint64_t *row = (const uint64_t *)askers.table;
    for (uint64_t i = 0; i < askers.count; i++, row += 3)
        if (caller - row[0] < row[1])
            return askers.table + row[2];
    return "";
}

void *handle_called(const char *name); /* answers.c */

static void *open_at_end(const char *name, int flags, uint64_t caller)
{
    enum { LONGEST = 4096 };
    char path[LONGEST];
    void *known = name && *name ? handle_called(name) : NULL;
    const char *directory = !known && name && *name && !strchr(name, '/') ? directories_of(caller) : "";
    for (; *directory && !known; directory += strlen(directory) + 1) {
        size_t length = strlen(directory), more = strlen(name);
        if (length + more >= sizeof path)
            continue;
        memcpy(path, directory, length);
        memcpy(path + length, name, more + 1);
        known = handle_called(path);
        if (!known && access(path, R_OK) == 0)
            return theirs.open(path, flags);
    }
    return known ? known : theirs.open(name, flags);
}

void *inside_open(const char *name, int flags)
{
    Question question = {.function = OPEN, .caller = CALLER, .name = (uint64_t)name, .number = (uint64_t)flags};
    if (ask(&question))
        return (void *)question.result;
    return answerer && !is_lost() ? theirs.open(name, flags) : open_at_end(name, flags, question.caller);
}

void *symbol_of(const void *handle, const char *name); /* answers.c */
void *symbol_for(uint64_t caller, const char *name);

bool is_of_ours(uint64_t caller);

typedef struct {
    void *address;
    bool is_left; /* to glibc, which has to see who calls */
} Found;

static Found look_up(void *handle, const char *name, const char *version, uint64_t caller)
{
    Question question = {.function = version ? VERSIONED : SYMBOL, .caller = caller, .handle = (uint64_t)handle,
                         .name = (uint64_t)name, .version = (uint64_t)version};
    bool is_next = handle == (void *)-1;
    bool is_asked = is_ours(handle) || !handle || is_next;
    if (is_asked && ask(&question))
        return (Found){(void *)question.result, false};
    free(message);
    message = NULL;
    pending = false;
    if (is_ours(handle)) {
        void *last = symbol_of(handle, name);
        if (!last) {
            message = strdup("undefined symbol, in the library itself: miniloader has ended");
            pending = message != NULL;
        }
        return (Found){last, false};
    }
    if (is_next) { /* glibc refuses it to a caller that it does not know */
        if (!is_of_ours(caller))
            return (Found){NULL, true};
        handle = NULL;
    }
    void *found = version ? theirs.versioned(handle, name, version) : theirs.symbol(handle, name);
    if (!found && (uint64_t)handle == program) { /* a library of ours may have been made global */
        if (ask(&question))
            return (Found){(void *)question.result, false};
        found = version ? theirs.versioned(handle, name, version) : theirs.symbol(handle, name); /* for its error */
    }
    if (!found && !handle && (!answerer || is_lost()) && (found = symbol_for(caller, name)))
        theirs.error();
    return (Found){meant(found), false};
}

/* Glibc's own, where it is left to that, comes in place of these: to where they were called from it returns. */
void *inside_symbol(void *handle, const char *name)
{
    Found found = look_up(handle, name, NULL, CALLER);
    return found.is_left ? theirs.symbol(handle, name) : found.address;
}

void *inside_versioned(void *handle, const char *name, const char *version)
{
    Found found = look_up(handle, name, version, CALLER);
    return found.is_left ? theirs.versioned(handle, name, version) : found.address;
}

int inside_close(void *handle)
{
    Question question = {.function = CLOSE, .caller = CALLER, .handle = (uint64_t)handle};
    if (ask(&question))
        return (int)question.result;
    return is_ours(handle) ? 0 : theirs.close(handle); /* at the end of the process nothing is unmapped */
}

int inside_information(void *handle, int request, void *where)
{
    Question question = {.function = INFORMATION, .caller = CALLER, .handle = (uint64_t)handle,
                         .number = (uint64_t)request, .where = (uint64_t)where};
    if (is_ours(handle) && ask(&question))
        return (int)question.result;
    return is_ours(handle) ? -1 : theirs.information(handle, request, where);
}

void *inside_namespace(long namespace, const char *name, int flags)
{
    Question question = {.function = NAMESPACE, .caller = CALLER, .handle = (uint64_t)namespace,
                         .name = (uint64_t)name, .number = (uint64_t)flags};
    return ask(&question) ? (void *)question.result : theirs.namespace(namespace, name, flags);
}

/* Each error once. */
char *inside_error(void)
{
    bool ours = pending;
    pending = false;
    return ours ? message : theirs.error();
}

/* The end of the process: exit(3) calls what it has been told of, the last first, and then glibc finalises what it has
   loaded.  It is told of finalise() when the first library of ours is there, so that what is registered from then on
   comes before the destructors of ours, as with glibc's own, and they before those of what they need of glibc's. */
static struct {
    void (**functions)(void);
    uint64_t count, called;
} destructors;

/* These are left, in this order. */
void set_destructors(const uint64_t *addresses, uint64_t count)
{
    free(destructors.functions);
    destructors.functions = malloc(count * sizeof *destructors.functions + !count);
    destructors.count = destructors.functions ? count : 0;
    destructors.called = 0;
    if (destructors.count)
        memcpy(destructors.functions, addresses, count * sizeof *addresses);
}

/* Where Python has not ended, since a library has called exit(3), it is asked which are left. */
void finalise(void *unused)
{
    Question question = {.function = END};
    (void)unused;
    is_answered(&question);
    free((char *)question.error);
    while (destructors.called < destructors.count)
        destructors.functions[destructors.called++]();
}

/* From now on Python's function answers (NULL: nobody does), which lives as long as Python.  The interface is CPython's
   and the functions are glibc's own, as above; the handles of ours are from first on, so many bytes. */
void set_inside(const void *python, const void *its_interface, const void *functions, uint64_t first,
                uint64_t length, uint64_t global)
{
    if (its_interface) {
        __builtin_memcpy(&interface, its_interface, sizeof interface);
        set_process();
    }
    if (functions)
        __builtin_memcpy(&theirs, functions, sizeof theirs);
    if (first) {
        first_handle = first;
        last_handle = first + length;
        program = global;
    }
    answerer = python;
}
