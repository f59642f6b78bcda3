/* dlopen(3) and its like, as libraries that glibc does not know call them: Python answers.

   A library of ours is bound to these instead of glibc's.  Who calls is found as glibc finds it, by the return
   address.  What Python has no part in goes straight on to glibc's own: handles that are glibc's, and everything before
   Python is asked to answer, and after it has ended.  What a library needs then is its end: exit(3) finalises ours.

   Source: <dlfcn.h> and <link.h>; errors are kept as glibc's dlfcn/dlerror.c keeps them, one for each thread. */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
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
    uint64_t result, error; /* of malloc(3), or 0 */
} Question;

typedef struct { /* a function of glibc's, and what libraries of ours call instead; an audit reads them, too */
    uint64_t ours, theirs;
} StandIn;

enum { STAND_INS = 16 };

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
    void *(*state)(void); /* the thread's own, of a thread that Python knows */
    int (*start)(uint64_t *thread, const void *attributes, void *(*function)(void *), void *argument); /* pthread_ */
    int (*detach)(uint64_t thread);
} interface;
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

/* Whether Python's function has answered.  Not by a callback of ctypes': libffi asks the kernel whether it is SELinux
   before it makes its first one, which takes as long as all else that dlopen(3) takes. */
static bool has_answered(const void *function, Question *question)
{
    int state = interface.lock();
    void *place = interface.number((uint64_t)question);
    void *result = place ? interface.call(function, place) : NULL;
    int truth = result ? interface.truth(result) : -1;
    if (truth < 0)
        interface.complain(function);
    if (result)
        interface.forget(result);
    if (place)
        interface.forget(place);
    interface.unlock(state);
    return truth > 0;
}

/* A thread that Python does not know may be asking for somebody who holds Python's lock and waits for it: who started
   it, and joins it.  ld.so knows of no such lock.  So another thread waits in its place, and where that one is not given
   the lock for some time, glibc answers. */
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
    Turn *turn = interface.state() ? NULL : calloc(1, sizeof *turn);
    if (!turn)
        return true;
    if (interface.start(&thread, NULL, wait_for_turn, turn)) {
        free(turn);
        return true;
    }
    interface.detach(thread);
    struct timespec end;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &end); /* glibc's own came to libc with 2.17 */
    end.tv_sec += PATIENCE;
    long result = 0;
    while (turn->state == WAITING && (result == 0 || errno != ETIMEDOUT))
        result = syscall(SYS_futex, &turn->state, FUTEX_WAIT_BITSET_PRIVATE, WAITING, &end, NULL,
                         FUTEX_BITSET_MATCH_ANY);
    if (atomic_exchange(&turn->state, LEFT) == WAITING)
        return false;
    free(turn);
    return true;
}

/* Whatever is called has no error to tell of at first: neither we nor glibc. */
static bool ask(Question *question)
{
    const void *python = answerer;
    free(message);
    message = NULL;
    pending = false;
    if (!python || !has_turn())
        return false;
    theirs.error();
    if (!has_answered(python, question))
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

#define CALLER (uint64_t)__builtin_return_address(0)

/* When Python has ended, destructors may still open: what is there already, or what glibc loads.  For each library of
   ours that may ask, where it lies (its first address, bytes) and at which byte of all this its directories begin: each
   ends with a slash and a NUL, and behind the last one is another NUL. */
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
    return answerer ? theirs.open(name, flags) : open_at_end(name, flags, question.caller);
}

/* CPython imports an extension module: it holds its lock, in the interpreter of the importing thread.  Python answers in
   the main interpreter alone: in another one, where it would wait for a lock that its own thread holds, glibc does. */
static struct {
    void *(*thread)(void);              /* the thread state that holds the lock */
    void *(*interpreter)(const void *); /* its interpreter */
    const void *main;
} python;

void *inside_import(const char *name, int flags)
{
    Question question = {.function = OPEN, .caller = CALLER, .name = (uint64_t)name, .number = (uint64_t)flags};
    if (python.main && python.interpreter(python.thread()) != python.main)
        return theirs.open(name, flags);
    return ask(&question) ? (void *)question.result : theirs.open(name, flags);
}

void set_python(void *(*thread)(void), void *(*interpreter)(const void *), const void *main)
{
    python.thread = thread;
    python.interpreter = interpreter;
    python.main = main;
}

void *symbol_of(const void *handle, const char *name); /* answers.c */
void *symbol_for(uint64_t caller, const char *name);

static void *look_up(Question *question, void *handle)
{
    const char *name = (const char *)question->name, *version = (const char *)question->version;
    bool is_asked = is_ours(handle) || !handle || handle == (void *)-1;
    if (is_asked && ask(question))
        return (void *)question->result;
    free(message);
    message = NULL;
    pending = false;
    if (is_ours(handle)) {
        void *last = symbol_of(handle, name);
        if (!last) {
            message = strdup("undefined symbol, in the library itself: miniloader has ended");
            pending = message != NULL;
        }
        return last;
    }
    if (handle == (void *)-1) /* glibc refuses RTLD_NEXT to a caller that it does not know */
        handle = NULL;
    void *found = version ? theirs.versioned(handle, name, version) : theirs.symbol(handle, name);
    if (!found && (uint64_t)handle == program) { /* a library of ours may have been made global */
        if (ask(question))
            return (void *)question->result;
        found = version ? theirs.versioned(handle, name, version) : theirs.symbol(handle, name); /* for its error */
    }
    if (!found && !handle && !answerer && (found = symbol_for(question->caller, name)))
        theirs.error();
    return meant(found);
}

void *inside_symbol(void *handle, const char *name)
{
    Question question = {
        .function = SYMBOL, .caller = CALLER, .handle = (uint64_t)handle, .name = (uint64_t)name};
    return look_up(&question, handle);
}

void *inside_versioned(void *handle, const char *name, const char *version)
{
    Question question = {.function = VERSIONED, .caller = CALLER, .handle = (uint64_t)handle,
                         .name = (uint64_t)name, .version = (uint64_t)version};
    return look_up(&question, handle);
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
    const void *python = answerer;
    (void)unused;
    if (python && has_turn())
        has_answered(python, &question);
    free((char *)question.error);
    while (destructors.called < destructors.count)
        destructors.functions[destructors.called++]();
}

/* From now on Python's function answers (NULL: nobody does), which lives as long as Python.  The interface is CPython's
   and the functions are glibc's own, as above; the handles of ours are from first on, so many bytes. */
void set_inside(const void *python, const void *its_interface, const void *functions, uint64_t first,
                uint64_t length, uint64_t global)
{
    if (its_interface)
        __builtin_memcpy(&interface, its_interface, sizeof interface);
    if (functions)
        __builtin_memcpy(&theirs, functions, sizeof theirs);
    if (first) {
        first_handle = first;
        last_handle = first + length;
        program = global;
    }
    answerer = python;
}
