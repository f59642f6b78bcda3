/* What stands beside the loops, under gcc's sanitizers: rooms SEED RUNS SECONDS EDGES.

   Answers about libraries, what libraries call instead of dlopen(3), lazy binding, callbacks, the guard and the notes
   of faults: each is asked at random, everything that is handed over is exactly as long as it is said to be, and what
   comes of it is compared with the plainest way to find it.  At the end it says how many runs there were, how many edges,
   and in which run the last of these was met first; EDGES is a file that gets the place of each. */

#define _GNU_SOURCE
#include <assert.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- edges that were come by (-fsanitize-coverage=trace-pc), also by children */
enum { EDGES = 1 << 20 };
static struct {
    uint64_t newest; /* the run that met an edge for the first time most lately */
    uint8_t met[EDGES];
} *edges;
static uint64_t done;         /* runs until now */
static uint64_t until_change; /* how many edges on somebody does something meanwhile; 0 for never */
static void change_meanwhile(void);
extern char __executable_start;

__attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc(void)
{
    if (!edges)
        return;
    uint8_t *edge = &edges->met[((uintptr_t)__builtin_return_address(0) - (uintptr_t)&__executable_start) % EDGES];
    if (!*edge)
        *edge = 1, edges->newest = done;
    if (until_change && --until_change == 0)
        change_meanwhile();
}

/* Where each edge that was met returned to, as objdump(1) has it; their number. */
static uint64_t list_edges(const char *path)
{
    FILE *file = fopen(path, "w");
    uint64_t count = 0;
    for (int edge = 0; file && edge < EDGES; edge++)
        if (edges->met[edge])
            fprintf(file, "%x\n", edge), count++;
    if (file)
        fclose(file);
    return count;
}

const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

static uint64_t state;

static uint64_t chance(uint64_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return below ? state % below : 0;
}

/* ---- answers.c */
typedef struct {
    struct dl_phdr_info info;
    uint64_t start;
    _Atomic uint64_t end;
    const void *unwind_table;
    const ElfW(Sym) *symbols;
    uint64_t symbol_count;
    const char *strings;
    struct {
        uint64_t bias;
        const char *name;
        const void *dynamic, *next, *previous;
    } map;
} Entry;
typedef struct {
    uint64_t flags;
    const void *start, *end, *map, *unwind_table;
} Object;
typedef int Callback(struct dl_phdr_info *, size_t, void *);
extern Entry entries[];
void set_answers(const void *);
void list_entry(uint64_t, const Entry *, uint64_t);
void withdraw_entry(uint64_t);
int answer_dladdr1(const void *, Dl_info *, void **, int);
int answer_dladdr(const void *, Dl_info *);
int answer_dl_iterate_phdr(Callback *, void *);
int answer_dl_find_object(void *, Object *);
char **answer_backtrace_symbols(void *const *, int);
void answer_backtrace_symbols_fd(void *const *, int, int);
void *symbol_of(const void *, const char *);
void *symbol_for(uint64_t, const char *);
void *handle_called(const char *);

enum { LIBRARIES = 12, SPACE = 1 << 16 };
static Entry models[LIBRARIES];
static uint64_t ends[LIBRARIES];
static const uint64_t theirs_start = 100, theirs_end = 200; /* what glibc knows */
enum { MODULE = 3 };                                       /* whose thread-local storage it knows */
static int no_file;                                        /* to write to */

static int iterate(Callback *callback, void *data)
{
    struct dl_phdr_info info = {
        .dlpi_name = "theirs", .dlpi_adds = 1, .dlpi_tls_modid = MODULE, .dlpi_tls_data = &state};
    return callback(&info, sizeof info, data);
}

static int address_of_theirs(const void *address, Dl_info *info, void **extra, int flags)
{
    (void)extra, (void)flags;
    if ((uint64_t)address < theirs_start || (uint64_t)address >= theirs_end)
        return 0;
    *info = (Dl_info){.dli_fname = "theirs"};
    return 1;
}

static int object_of_theirs(void *address, Object *object)
{
    Dl_info info;
    (void)object;
    return address_of_theirs(address, &info, NULL, 0) ? 0 : -1;
}

static char **symbols_of_theirs(void *const *addresses, int count)
{
    char **lines = chance(8) ? malloc((size_t)count * sizeof *lines + 7) : NULL;
    if (!lines)
        return NULL;
    for (int i = 0; i < count; i++)
        lines[i] = memcpy((char *)(lines + count), "theirs", 7);
    return (void)addresses, lines;
}

static int written;
static void write_of_theirs(void *const *addresses, int count, int fd) { (void)addresses, written += count + fd; }

static uint64_t visited, most_visits;

static int count_visit(struct dl_phdr_info *info, size_t size, void *data)
{
    assert(size == sizeof *info && data == &visited);
    assert(info->dlpi_tls_data == (info->dlpi_tls_modid == MODULE ? &state : NULL));
    return ++visited == most_visits ? 7 : 0;
}

static void relist(uint64_t number)
{
    if (ends[number]) {
        withdraw_entry(number);
        ends[number] = 0;
        free((void *)models[number].symbols);
        free((void *)models[number].strings);
        free((void *)models[number].map.dynamic);
        return;
    }
    uint64_t count = chance(20), bytes = 1 + chance(30), start = 1000 * (number + 1);
    ElfW(Sym) *symbols = malloc(count * sizeof *symbols + !count);
    char *strings = calloc(bytes, 1);
    for (uint64_t i = 0; i < count; i++)
        symbols[i] = (ElfW(Sym)){.st_name = (uint32_t)chance(bytes), .st_info = (uint8_t)(chance(3) << 4 | chance(12)),
                                 .st_shndx = (uint16_t)chance(3), .st_value = chance(1200), .st_size = chance(200)};
    for (uint64_t i = 0; i + 1 < bytes; i++)
        strings[i] = (char)(chance(3) ? 'a' + chance(2) : 0);
    ElfW(Dyn) *dynamic = chance(3) ? calloc(3, sizeof *dynamic) : NULL;
    if (dynamic)
        dynamic[0].d_tag = DT_NEEDED, dynamic[1] = (ElfW(Dyn)){chance(2) ? DT_SONAME : DT_NULL, {chance(bytes)}};
    models[number] = (Entry){.info = {.dlpi_addr = start - chance(2) * 500, .dlpi_name = chance(4) ? strings : "/proc",
                                      .dlpi_tls_modid = chance(2) * (MODULE - 1 + chance(2))},
                             .start = start, .symbols = symbols, .symbol_count = count, .strings = strings,
                             .map = {.dynamic = dynamic}};
    ends[number] = start + 1 + chance(999);
    list_entry(number, &models[number], ends[number]);
}

/* The plainest ways to find what is asked for when Python has ended. */
static void *plain_symbol(uint64_t number, const char *name)
{
    for (uint64_t i = 0; number < LIBRARIES && ends[number] && i < models[number].symbol_count; i++) {
        const ElfW(Sym) *symbol = &models[number].symbols[i];
        unsigned type = symbol->st_info & 15;
        bool is_right = symbol->st_shndx && symbol->st_info >> 4 && type != STT_TLS && type != STT_GNU_IFUNC;
        if (is_right && !strcmp(models[number].strings + symbol->st_name, name))
            return (void *)(models[number].info.dlpi_addr + symbol->st_value);
    }
    return NULL;
}

static void *plain_symbol_for(uint64_t owner, const char *name)
{
    void *found = plain_symbol(owner, name);
    for (uint64_t i = 0; i < LIBRARIES && !found; i++)
        found = plain_symbol(i, name);
    return found;
}

static void *plain_handle(const char *name)
{
    for (uint64_t i = 0; i < LIBRARIES; i++) {
        const ElfW(Dyn) *dynamic = models[i].map.dynamic;
        const char *path = models[i].info.dlpi_name;
        if (ends[i] && (!strcmp(path, name) || (!strcmp(path, "/proc") && !strcmp(name, "/proc/.")) ||
                        (dynamic && dynamic[1].d_tag && !strcmp(models[i].strings + dynamic[1].d_un.d_val, name))))
            return &entries[i].map;
    }
    return NULL;
}

static const char *some_name(void)
{
    static const char *const names[] = {"a", "b", "ab", "", "/proc", "/proc/.", "/no such", "a name"};
    return names[chance(8)];
}

static void try_answers(void)
{
    relist(chance(LIBRARIES));
    uint64_t address = chance(15000), owner = LIBRARIES, listed = 0, edge = chance(LIBRARIES);
    if (ends[edge] && chance(2)) /* at one of its edges */
        address = (chance(2) ? ends[edge] : models[edge].start) + chance(3) - 1;
    for (uint64_t i = 0; i < LIBRARIES; i++) {
        listed += ends[i] != 0;
        if (ends[i] && address >= models[i].start && address < ends[i])
            owner = i;
    }
    Dl_info info = {0};
    Object object = {0};
    void *extra = NULL;
    int flags = (int)chance(3), known = answer_dladdr1((void *)address, &info, &extra, flags);
    bool is_theirs = address >= theirs_start && address < theirs_end;
    assert(known == (is_theirs || owner < LIBRARIES));
    if (known && !is_theirs) {
        uint64_t vaddr = address - models[owner].info.dlpi_addr, best = 0;
        bool any = false;
        for (uint64_t i = 0; i < models[owner].symbol_count; i++) {
            const ElfW(Sym) *symbol = models[owner].symbols + i;
            uint64_t value = symbol->st_value, size = symbol->st_size ? symbol->st_size : 1;
            if ((symbol->st_shndx || value) && (symbol->st_info & 15) != STT_TLS && vaddr >= value &&
                vaddr - value < size && (!any || value > best))
                best = value, any = true;
        }
        assert((info.dli_saddr != NULL) == any || models[owner].info.dlpi_addr + best == 0);
        assert(!any || (uint64_t)info.dli_saddr == models[owner].info.dlpi_addr + best);
        assert(info.dli_fbase == (void *)models[owner].start && info.dli_fname == models[owner].info.dlpi_name);
        assert(flags != RTLD_DL_LINKMAP || extra == &entries[owner].map);
    }
    assert(answer_dladdr((void *)address, &info) == known);
    int unknown = answer_dl_find_object((void *)address, &object);
    assert((unknown == 0) == known);
    assert(is_theirs || !known || (uint64_t)object.end == ends[owner]);
    void *addresses[] = {(void *)address, (void *)theirs_start};
    char **lines = answer_backtrace_symbols(addresses, 2), line[64];
    snprintf(line, sizeof line, "[%p]", (void *)address);
    bool is_ours = owner < LIBRARIES;
    assert(!lines || !strcmp(is_ours ? strstr(lines[0], "[") : lines[0], is_ours ? line : "theirs"));
    assert(!lines || !strcmp(lines[1], "theirs"));
    free(lines);
    free(answer_backtrace_symbols(addresses, 0));
    written = 0;
    answer_backtrace_symbols_fd(addresses, 2, no_file);
    assert(written == (2 - is_ours) * (1 + no_file));
    const char *name = some_name();
    uint64_t number = chance(LIBRARIES + 4);
    assert(symbol_of(&entries[number].map, name) == plain_symbol(number, name) && !symbol_of(&number, name));
    assert(symbol_for(address, name) == plain_symbol_for(owner, name) && handle_called(name) == plain_handle(name));
    visited = 0;
    most_visits = chance(LIBRARIES + 2);
    int result = answer_dl_iterate_phdr(count_visit, &visited);
    bool is_carrier = false; /* theirs, which is not told then */
    for (uint64_t i = 0; i < LIBRARIES; i++)
        is_carrier |= ends[i] && models[i].info.dlpi_tls_modid == MODULE;
    uint64_t told = listed + !is_carrier;
    bool stopped = most_visits && most_visits <= told;
    assert(result == (stopped ? 7 : 0) && visited == (stopped ? most_visits : told));
}

/* ---- inside.c */
typedef struct {
    uint64_t function, caller, handle, name, version, number, where, begun, result, error;
} Question;
typedef struct {
    uint64_t ours, theirs;
} StandIn;
extern StandIn stand_ins[];
void *inside_open(const char *, int);
void *inside_symbol(void *, const char *);
void *inside_versioned(void *, const char *, const char *);
int inside_close(void *);
int inside_information(void *, int, void *);
void *inside_namespace(long, const char *, int);
char *inside_error(void);
void set_inside(const void *, const void *, const void *, uint64_t, uint64_t, uint64_t);
void set_askers(const void *, uint64_t, uint64_t);
void set_destructors(const uint64_t *, uint64_t);
void finalise(void *);

enum { THEIRS = 0x111, FIRST = 0x5000, LENGTH = 0x100, PROGRAM = 0x77 };
static uint64_t answered, asked, locks, handlers;
static const void *raised; /* what Python is raising, if anything */
static bool is_hushed;
static volatile bool signalled;
static int signals; /* whether one comes while an answer is made, and whether it is known to be Python's */
enum { PENDING = 8 };
static struct {
    int (*function)(void *);
    void *argument;
} pending[PENDING];
static int pending_count;
static bool answers, fails, with_error;

static char opened[64];
static void *their_open(const char *name, int flags)
{
    (void)flags;
    snprintf(opened, sizeof opened, "%s", name ? name : "the program");
    return (void *)THEIRS;
}
static bool knows;
static void *their_symbol(void *handle, const char *name)
{
    return (void)name, handle || !knows ? NULL : (void *)THEIRS;
}
static void *their_version(void *handle, const char *name, const char *version)
{
    return (void)version, their_symbol(handle, name);
}
static int their_close(void *handle) { return (void)handle, 1; }
static int their_information(void *handle, int request, void *where)
{
    return (void)handle, (void)request, (void)where, 1;
}
static void *their_namespace(long namespace, const char *name, int flags)
{
    return (void)namespace, (void)name, (void)flags, (void *)THEIRS;
}
static char *their_error(void) { return NULL; }

/* Python's lock, and who has it: a state of this thread or of another one, in one of two interpreters. */
typedef struct {
    const char *interpreter;
    const void *frame; /* its innermost */
} State;
static const char interpreters[] = {'m', 'o'};
static State in_main, in_other, created;
static State *holder, *own;
static bool holds, is_created; /* whether the holder is this thread's; whether there is one state more */
static bool is_only;           /* whether there is one interpreter */

static void *own_state(void) { return own; }
static void *current_state(void) { return holder; }
static void *interpreter_of(const void *thread) { return (void *)((const State *)thread)->interpreter; }
static void *main_interpreter(void) { return (void *)&interpreters[0]; }
static void *head_interpreter(void) { return (void *)&interpreters[!is_only]; }
static void *next_interpreter(const void *first) { return first == &interpreters[1] ? main_interpreter() : NULL; }
static bool is_of_main(const State *thread) { return thread->interpreter == &interpreters[0]; }

static __thread bool is_first = true; /* thread */
static unsigned delay;
static int lock(void)
{
    if (!is_first)
        usleep(delay);
    assert(!is_first || !holds || holder == own); /* else it would wait for itself */
    assert(!own || is_of_main(own));
    return (int)++locks;
}
static void unlock(int held) { assert(held == (int)locks--); }
static void *let_go(void)
{
    assert(holds && holder);
    holds = false;
    return holder;
}
static void take(void *thread)
{
    assert(!holds && thread);
    holder = thread, holds = true;
}
static void *create(void *interpreter)
{
    assert(interpreter == &interpreters[0] && !is_created);
    is_created = true;
    created.interpreter = interpreter;
    return &created;
}
static void clear(void *thread) { assert(thread == &created && holder == thread && holds); }
static void end(void)
{
    assert(holder == &created && holds && is_created);
    holder = NULL, holds = is_created = false;
}
static bool is_gone; /* Python */
static int is_there(void) { return !is_gone; }
static void *number(uint64_t value)
{
    uint64_t *boxed = fails && value > 64 && chance(2) ? NULL : malloc(sizeof *boxed); /* small ones are there */
    if (boxed)
        *boxed = value;
    else
        raised = &answered;
    return boxed;
}
static void *call(const void *function, void *argument)
{
    if (function == &handlers)
        return number(*(uint64_t *)argument == SIGUSR1 || *(uint64_t *)argument == SIGUSR2);
    assert(function == &answered && !raised && is_hushed);
    assert((locks && !is_created) || (holds && holder == &created)); /* in the main interpreter */
    assert(!pending_count); /* or Python would do it before the first instruction of the answer */
    asked++;
    if (signals) { /* they are kept for later, where they can be told */
        bool is_kept = signals == 2;
        signalled = false;
        raise(SIGUSR1);
        assert(signalled == !is_kept);
    }
    Question *question = (Question *)*(uint64_t *)argument;
    if (fails)
        return chance(2) ? (raised = &answered, NULL) : number(0);
    assert(question->begun);
    question->result = 0x222;
    if (with_error)
        question->error = (uint64_t)strdup("an error of ours");
    return number(answers || with_error);
}
static int truth(void *value)
{
    if (fails)
        raised = &answered;
    return fails ? -1 : *(uint64_t *)value != 0;
}
static void complain(const void *function)
{
    assert(function == &answered && raised);
    raised = NULL;
}
static void hush(void *thread)
{
    assert(thread == holder || (!holder && !holds));
    is_hushed = true;
}
static void unhush(void *thread) { hush(thread), is_hushed = false; }
static void put_by(void **type, void **value, void **traceback)
{
    *type = (void *)raised, *value = *traceback = NULL;
    raised = NULL;
}
static void raise_it(void *type, void *value, void *traceback)
{
    assert(!value && !traceback);
    raised = type;
}
static int do_pending(void)
{
    if (pending_count) {
        const int result = pending[0].function(pending[0].argument);
        memmove(pending, pending + 1, (size_t)--pending_count * sizeof *pending);
        return result;
    }
    bool is_raised = chance(2);
    if (is_raised)
        raised = &handlers;
    return -is_raised;
}
static int later(int (*function)(void *), void *argument)
{
    if (pending_count == PENDING || !chance(4))
        return -1;
    pending[pending_count].function = function;
    pending[pending_count++].argument = argument;
    return 0;
}
static int is_callable(void *value) { return *(uint64_t *)value != 0; }
static void on_signal(int signal) { signalled = signal == SIGUSR1; }

/* One thread more, which waits for its turn: mostly it is over at once. */
static bool is_unknown, is_running;
static struct {
    void *(*function)(void *);
    void *argument;
} task;
static void *run_task(void *unused) { return is_first = false, (void)unused, task.function(task.argument); }
static int start(uint64_t *thread, const void *attributes, void *(*function)(void *), void *argument)
{
    assert(!attributes);
    *thread = 1;
    is_running = is_unknown || chance(64) == 0;
    task.function = function, task.argument = argument;
    if (is_running)
        return pthread_create((pthread_t *)thread, NULL, run_task, NULL);
    State *const left = holder;
    bool held = holds;
    holder = NULL, holds = false; /* it is no thread that holds it */
    int result = chance(4) ? function(argument) != NULL : 11;
    holder = left, holds = held;
    return result;
}
static int detach(uint64_t thread)
{
    if (is_running)
        pthread_detach((pthread_t)thread);
    return assert(is_running || thread == 1), 0;
}

static uint64_t ended;
static void destructor(void) { ended++; }

/* Where Python has ended: along the caller's directories, then as glibc has it. */
static void try_askers(void)
{
    struct {
        uint64_t row[3];
        char directories[16];
    } table = {{0, chance(2) ? UINT64_MAX : 0, 24}, "/no such/\0/\0"};
    static char far_too_long[5000];
    memset(far_too_long, 'n', sizeof far_too_long - 1);
    const char *names[] = {"proc", "/proc", "no such file", "", NULL, "a", far_too_long}, *name = names[chance(7)];
    set_askers(&table, 1, sizeof table);
    bool is_found = table.row[1] && name && !strcmp(name, "proc");
    void *known = name && *name ? plain_handle(name) : NULL;
    if (is_found && !known)
        known = plain_handle("/proc");
    strcpy(opened, "");
    assert(inside_open(name, 1) == (known ? known : (void *)THEIRS));
    assert(known || !strncmp(opened, is_found ? "/proc" : name ? name : "the program", sizeof opened - 1));
    set_askers(NULL, 0, 0);
}

static void try_inside(void)
{
    signals = (int)chance(3), signalled = false, pending_count = 0;
    const struct sigaction python = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    sigaction(SIGUSR1, &python, NULL);
    raised = chance(2) ? &raised : NULL;
    const void *const is_raised = raised;
    const void *const interface[] = {
        lock, unlock, number, call, truth, free, complain, put_by, raise_it, do_pending, later, hush, unhush,
        own_state, current_state, interpreter_of, main_interpreter, head_interpreter, next_interpreter, let_go, take,
        create, clear, end, start, detach, clock_gettime, is_there, &handlers, is_callable,
        signals == 1 ? NULL : on_signal, (const void *)(chance(2) ? __builtin_offsetof(State, frame) : 0)};
    static const void *const functions[] = {
        their_open, their_symbol, their_version, their_close, their_information, their_namespace, their_error};
    set_inside(chance(8) ? &answered : NULL, interface, functions, FIRST, LENGTH, PROGRAM);
    bool tells = !interface[sizeof interface / sizeof *interface - 1]; /* then no state is there but of this thread */
    is_only = chance(2), is_gone = !chance(8);
    in_main = (State){&interpreters[0], NULL}, in_other = (State){&interpreters[1], NULL};
    own = chance(3) ? is_only || chance(2) ? &in_main : &in_other : NULL;
    State *const before = holder = chance(3) ? is_only || chance(2) ? &in_main : &in_other : NULL;
    holds = holder && (tells || (own && chance(2)));
    if (holds && (is_of_main(holder) || tells))
        own = holder; /* since 3.12 whichever this thread has; before that the first one */
    if (holder)
        holder->frame = holds ? __builtin_frame_address(0) : (const void *)&in_main;
    const bool held = holds, cannot_ask = is_gone;
    stand_ins[3] = (StandIn){chance(2) ? 0x333 : 0, THEIRS};
    answers = chance(2), fails = !chance(6), with_error = !fails && !chance(4);
    void *const handles[] = {NULL, (void *)-1, (void *)FIRST, (void *)(FIRST + LENGTH), (void *)PROGRAM};
    void *handle = handles[chance(5)], *found = NULL;
    const char *name = some_name();
    char where[8];
    asked = 0, knows = chance(4), delay = 500;
    switch (chance(6)) {
    case 0: found = inside_open(chance(2) ? name : NULL, 1); break;
    case 1: found = inside_symbol(handle, name); break;
    case 2: found = inside_versioned(handle, name, "V"); break;
    case 3: inside_close(handle); break;
    case 4: inside_information(handle, 1, where); break;
    case 5: found = inside_namespace(0, name, 1); break;
    }
    assert(raised == is_raised && !is_hushed && signalled == (signals && asked));
    struct sigaction there;
    assert(!sigaction(SIGUSR1, NULL, &there) && there.sa_handler == on_signal);
    assert(locks == 0 && asked <= 2 * !cannot_ask && !is_created && holds == held && (!held || holder == before));
    assert(!found || found == (void *)THEIRS || found == (void *)0x222 || found == (void *)0x333 ||
           found == plain_handle(name) || found == plain_symbol_for(LIBRARIES, name));
    char *said = inside_error();
    bool is_told = asked && with_error && said && !strcmp(said, "an error of ours");
    assert(!said || is_told || (handle == (void *)FIRST && strstr(said, "has ended")));
    assert(!inside_error()); /* each once */

    uint64_t count = chance(4), ends[3];
    for (uint64_t i = 0; i < count; i++)
        ends[i] = (uint64_t)destructor;
    ended = 0;
    set_destructors(ends, count);
    finalise(NULL);
    finalise(NULL); /* each once */
    assert(ended == count && locks == 0);
    set_destructors(NULL, 0);
    set_inside(NULL, NULL, NULL, 0, 0, 0);
    for (int i = 0; i < pending_count; i++) {
        assert(pending[i].function(pending[i].argument) == -1);
        assert(raised == &handlers || raised == &answered);
    }
    try_askers();
}

/* Who waits for too long is answered by glibc, and the thread that waited in its place goes alone. */
static void try_patience(void)
{
    static const void *const interface[] = {
        lock, unlock, number, call, truth, free, complain, put_by, raise_it, do_pending, later, hush, unhush,
        own_state, current_state, interpreter_of, main_interpreter, head_interpreter, next_interpreter, let_go, take,
        create, clear, end, start, detach, clock_gettime, is_there, &handlers, is_callable, NULL, NULL};
    static const void *const functions[] = {
        their_open, their_symbol, their_version, their_close, their_information, their_namespace, their_error};
    set_inside(&answered, interface, functions, FIRST, LENGTH, PROGRAM);
    is_unknown = is_only = true, is_gone = false, own = holder = NULL, holds = false, delay = 2300000, asked = 0;
    assert(inside_open("a name", 1) == (void *)THEIRS && asked == 0);
    usleep(600000);
    assert(locks == 0);
    is_unknown = false, delay = 0;
    set_inside(NULL, NULL, NULL, 0, 0, 0);
}

/* Where there is not enough memory nobody asks, and nothing is left to call. */
static void try_shortage(void)
{
    const uint64_t row[3] = {0, UINT64_MAX, 24};
    set_askers(row, 1, UINT64_C(1) << 60);
    strcpy(opened, "");
    inside_open("no such file", 1);
    assert(!strcmp(opened, "no such file"));
    ended = 0;
    set_destructors(row, UINT64_C(1) << 58);
    finalise(NULL);
    assert(ended == 0);
}

/* ---- host.c */
int collect(struct dl_phdr_info *, size_t, void *);
int is_global(void *(*)(void *, const char *), void *, uint64_t, const ElfW(Phdr) *, uint64_t);

static void *looked_up(void *scope, const char *name)
{
    assert(strlen(name) < 4096);
    return chance(3) ? scope : NULL;
}

/* A library whose dynamic section leads anywhere, in memory that is exactly as long as its segments say. */
static void try_host(void)
{
    const int64_t tags[] = {DT_STRTAB, DT_STRSZ, DT_SYMTAB, DT_VERSYM, DT_GNU_HASH, DT_HASH, DT_SONAME, DT_NULL};
    uint64_t size = 128 + 8 * chance(64), entries = 1 + chance(8), half = 64 + 8 * chance(size / 8 - 8);
    uint64_t *memory = malloc(size), bias = (uint64_t)memory;
    for (uint64_t i = 0; i < size / 8; i++)
        memory[i] = chance(8) == 0 ? chance(size) | UINT64_C(0x1001200000000) /* a function has this name */
                    : chance(4)    ? chance(4)
                                   : chance(UINT64_MAX);
    for (uint64_t i = 0; i < entries && 16 * i + 16 <= size; i++) {
        memory[2 * i] = (uint64_t)tags[chance(8)];
        memory[2 * i + 1] = chance(4) ? chance(size + 8) + (chance(2) ? bias : 0) : chance(UINT64_MAX);
    }
    ((char *)memory)[size - 1] = 0;
    const ElfW(Phdr) headers[] = {{.p_type = PT_LOAD, .p_flags = PF_R, .p_memsz = half},
                                  {.p_type = PT_LOAD, .p_flags = PF_R, .p_vaddr = half, .p_memsz = size - half},
                                  {.p_type = PT_DYNAMIC, .p_memsz = 16 * entries}};
    struct dl_phdr_info info = {.dlpi_addr = bias, .dlpi_name = "made up", .dlpi_phdr = headers, .dlpi_phnum = 3};
    uint64_t room[256] = {16, sizeof room};
    collect(&info, sizeof info, room);
    assert(room[0] >= 16 + 16 + sizeof info + sizeof headers + 9);
    is_global(looked_up, chance(2) ? memory : room, bias, headers, 3);
    free(memory);
}

static uint8_t *pages; /* one that can be read, one that cannot, one whose file is gone, one that can be read */
enum { PAGE = 4096, ROOM = 4 * PAGE };
enum { FINE, GONE };

/* ---- objects.c */
typedef struct {
    int64_t size, end, offset, space;
    uint64_t before[5];
} Surrounding;
typedef struct {
    uint64_t pointer, type;
} Met;
typedef struct {
    int64_t size, before, count, pages, last_page;
} Type;
typedef struct {
    uint64_t page, word, type;
} Listed;
typedef struct {
    uint64_t met, fresh, listed;
} Found;
int64_t compare_pages(const uint8_t *, const uint8_t *, uint64_t, uint64_t, uint8_t *);
int64_t count_objects(const uint64_t *, uint64_t, uint64_t, const Surrounding *, uint8_t *, const uint64_t *,
                      uint64_t, Met *, Type *, Listed *, uint64_t *, Found *);

enum { BITS = 18, PLACES = 1 << BITS, MOST_MET = PLACES / 2, TYPES = 4, WIDTH = 32, STEPS = 64 };
static const uint64_t arena_edges[] = {1 << 21, 1 << 22, 1 << 23, 1 << 24};
/* The first three are types; what follows is in a pool, or not aligned, or too low or too high. */
static const uint64_t pointers[] = {
    1 << 25, (1 << 25) + 8, UINT64_C(0x7fffffffffe8), 1 << 22, (1 << 22) - 8, 1 << 23, (1 << 25) + 4, 1 << 19,
    UINT64_C(1) << 47, 0};
enum { POINTERS = sizeof pointers / sizeof *pointers };

static uint64_t type_of(uint64_t pointer)
{
    for (uint64_t type = 1; type < TYPES; type++)
        if (pointers[type - 1] == pointer)
            return type;
    return 0;
}

/* Where a pointer is looked for first. */
static uint64_t place_of_pointer(uint64_t pointer) { return (pointer >> 4) * 0x9e3779b97f4a7c15u >> (64 - BITS); }

static bool is_plainly_block(const Surrounding *around, const uint64_t *page, int64_t block, int64_t needed)
{
    if (around->size) {
        for (int64_t start = 48; start < around->end; start += around->size)
            if (start == around->offset + 8 * block)
                return needed <= around->size;
        return false;
    }
    uint64_t length = (block < 1 ? around->before[4 + block] : page[block - 1]) / 8 * 8;
    if (length + 8 * (uint64_t)(block + 4) > (uint64_t)around->space + 48) /* it would go on behind the mapping */
        return false;
    return length > 512 && length >> 40 == 0 && length % 16 == 0 && (uint64_t)needed + 8 <= length;
}

static void try_pages(void)
{
    uint64_t count = chance(4), length = 1 + chance(40);
    uint8_t *first = malloc(count * length + 1), *second = malloc(count * length + 1), *same = malloc(count + 1);
    for (uint64_t i = 0; i < count * length; i++)
        first[i] = second[i] = (uint8_t)chance(256);
    uint64_t place = chance(count * length), changes = count * length && chance(2);
    second[place] = (uint8_t)(second[place] + changes);
    first = realloc(first, count * length + !count), second = realloc(second, count * length + !count);
    compare_pages(first, second, count, length, same);
    for (uint64_t i = 0; i < count; i++)
        assert(same[i] == !(changes && place / length == i));
    free(first), free(second), free(same);
}

static void try_objects(void)
{
    static Met *met;
    met = met ? met : calloc(PLACES, sizeof *met);
    uint64_t count = chance(4), wanted_count = 0, listed = 0;
    uint64_t *words = malloc(8 * WIDTH * count + !count);
    Surrounding *around = malloc(count * sizeof *around + !count);
    uint8_t *wanted = malloc(count + !count);
    for (uint64_t i = 0; i < count; i++) {
        int64_t size = chance(3) ? 16 + 16 * (int64_t)chance(8) : 0;
        around[i] = (Surrounding){size, size ? 48 + size * (int64_t)chance(12) : 0, (int64_t)(8 * WIDTH * chance(4)),
                                  chance(2) ? INT64_C(1) << 41 : 16 * (int64_t)chance(50), {0}};
        for (int word = 0; word < 5; word++)
            around[i].before[word] = chance(2) ? 0x221 : chance(2) ? 0x229 : chance(UINT64_MAX);
        wanted_count += wanted[i] = (uint8_t)chance(2);
        for (uint64_t word = 0; word < WIDTH; word++) {
            const uint64_t numbers[] = {0, 1, 3, UINT64_C(0xffff000000000002), 0xffffffff, UINT64_C(1) << 32, 0x221,
                                        0x229, UINT64_C(1) << 41, chance(UINT64_MAX)};
            words[WIDTH * i + word] = chance(2) ? pointers[chance(POINTERS)] : numbers[chance(10)];
        }
    }
    Type types[TYPES] = {{0}};
    for (uint64_t type = 1; type < TYPES; type++) {
        types[type].before = 2 * (int64_t)chance(3);
        types[type].size = 16 + 8 * types[type].before + 8 * (int64_t)chance(8);
    }
    /* Where something is in the way, or too much is known already, a pointer is not met. */
    uint64_t hidden = chance(4) ? 0 : pointers[chance(TYPES)], start = place_of_pointer(hidden);
    for (uint64_t i = 0; hidden && i < STEPS; i++)
        met[(start + i) % PLACES] = (Met){UINT64_MAX - i, 0};
    Found found = {chance(4) ? chance(100) : MOST_MET - chance(3), 0, 0};
    Listed *objects = malloc(wanted_count * WIDTH / 2 * sizeof *objects + !wanted_count);
    uint64_t room = WIDTH / 2 * count, *fresh = malloc(8 * room + !room), places[POINTERS], place_count = 0;
    for (bool again = true; again;) {
        again = false;
        for (uint64_t type = 0; type < TYPES; type++)
            types[type].count = types[type].pages = types[type].last_page = 0;
        count_objects(words, count, WIDTH, around, wanted, arena_edges, 4, met, types, objects, fresh, &found);
        for (uint64_t i = 0; i < found.fresh; i++) {
            uint64_t pointer = met[fresh[i]].pointer;
            assert(place_count < POINTERS && pointer != hidden);
            places[place_count++] = fresh[i];
            again |= met[fresh[i]].type = type_of(pointer);
        }
        assert(found.met <= MOST_MET);
    }
    uint64_t numbers[TYPES] = {0}, pages_of[TYPES] = {0}, row = 0;
    const uint64_t *last = NULL; /* where the block before began */
    for (uint64_t i = 0; i < count; row += wanted[i++] & 1) {
        bool holds = false;
        uint64_t before[TYPES];
        memcpy(before, numbers, sizeof before);
        for (uint64_t word = 0; word < WIDTH; word += 2) {
            const uint64_t *page = words + WIDTH * i, least = page[word] % (UINT64_C(1) << 48);
            uint64_t type = 0;
            for (uint64_t place = 0; place < place_count; place++)
                if (met[places[place]].pointer == page[word + 1])
                    type = met[places[place]].type;
            int64_t block = (int64_t)word - types[type].before;
            if (!type || !least || least >> 32 || !is_plainly_block(&around[i], page, block, types[type].size)
                || page + block == last)
                continue;
            last = page + block;
            numbers[type]++;
            holds = true;
            if (wanted[i] & 1) {
                assert(objects[listed].page == row && objects[listed].word == word && objects[listed].type == type);
                listed++;
            }
        }
        assert(wanted[i] / 2 == holds);
        for (uint64_t type = 1; type < TYPES; type++)
            pages_of[type] += numbers[type] > before[type];
    }
    assert(found.listed == listed);
    for (uint64_t type = 1; type < TYPES; type++)
        assert(types[type].count == (int64_t)numbers[type] && types[type].pages == (int64_t)pages_of[type]);
    for (uint64_t i = 0; hidden && i < STEPS; i++)
        met[(start + i) % PLACES] = (Met){0, 0};
    while (place_count)
        met[places[--place_count]] = (Met){0, 0};
    free(words), free(around), free(wanted), free(objects), free(fresh);
}

/* ---- prepared.c */
typedef struct { uint64_t offset, addend, definer; } Value;
int64_t compare_sums(const uint64_t *, uint64_t, uint64_t, const uint64_t *, uint64_t);
int64_t compute_values(const Value *, uint64_t, const uint64_t *, uint64_t, uint64_t *);
int64_t fill_slots(char *, uint64_t, const uint32_t *, const uint32_t *, uint64_t, const Value *, const uint64_t *,
                   uint64_t);

static void try_prepared(void)
{
    uint64_t count = chance(40), length = 1 + chance(9), parts = count / length + 1;
    uint64_t *words = malloc(8 * count + 8), *sums = calloc(parts, 8);
    for (uint64_t i = 0; i < count; i++)
        sums[i / length] += words[i] = chance(UINT64_MAX);
    assert(compare_sums(words, count, length, sums, parts) == 0);
    assert(compare_sums(words, count, length, sums, parts + 1) && compare_sums(words, count, 0, sums, parts));
    if (count) {
        words[chance(count)] ^= UINT64_C(1) << chance(64);
        assert(compare_sums(words, count, length, sums, parts));
    }

    uint64_t values = chance(6), definers = chance(4), slots = chance(8), size = chance(64);
    Value *table = malloc((values + !values) * sizeof *table);
    uint64_t *biases = calloc(definers + !definers, 8), *results = calloc(values + !values, 8);
    uint32_t *places = malloc(4 * slots + 4), *numbers = malloc(4 * slots + 4);
    char *room = malloc(size + !size);
    bool fits = true;
    for (uint64_t i = 0; i < values; i++) {
        table[i] = (Value){chance(UINT64_MAX), chance(UINT64_MAX), chance(definers + !chance(8))};
        fits &= table[i].definer < definers;
    }
    assert((compute_values(table, values, biases, definers, results) == 0) == fits);
    fits = true;
    for (uint64_t i = 0; i < slots; i++) {
        places[i] = (uint32_t)(chance(8) ? chance(size + 1) : chance(UINT64_MAX));
        numbers[i] = (uint32_t)(chance(8) ? chance(values) : chance(UINT64_MAX));
        fits &= numbers[i] < values && places[i] + UINT64_C(8) <= size;
    }
    assert((fill_slots(room, size, places, numbers, slots, table, results, values) == 0) == fits);
    const uint32_t place = 0;
    const uint64_t sum[2] = {0};
    assert(compare_sums((uint64_t *)(pages + (1 + chance(2)) * PAGE), 8, 8, sum, 2) == GONE);
    assert(fill_slots((char *)pages + PAGE, PAGE, &place, &place, 1, &(Value){0, 0, 0}, sum, 1) == GONE);
    free(room), free(numbers), free(places), free(results), free(biases), free(table), free(sums), free(words);
}

/* ---- calls.c */
void call_each(void (*const *)(int, void *, void *), uint64_t, int, void *, void *);
void resolve(uint64_t *, const int64_t *, uint64_t);
uint64_t thread_pointer(void);
void flush_code(uint64_t, uint64_t);
static uint64_t called;
static void constructor(int argc, void *argv, void *envp) { called += (uint64_t)argc, (void)argv, (void)envp; }
static uint64_t chosen(void) { return 0x444; }

static void try_calls(void)
{
    uint64_t size = 16 + 8 * chance(200), count = chance(5), headers = chance(6);
    uint64_t *room = calloc(1, size), *addresses = malloc((count + 1) * sizeof *addresses);
    ElfW(Phdr) *table = calloc(headers + !headers, sizeof *table);
    char *name = malloc(1 + chance(40));
    strcpy(name, "");
    room[0] = 16, room[1] = size;
    for (uint64_t i = 0; i < 8; i++) {
        struct dl_phdr_info info = {.dlpi_name = name, .dlpi_phdr = table, .dlpi_phnum = (uint16_t)headers};
        collect(&info, sizeof info, room);
    }
    dl_iterate_phdr(collect, room);
    void (**functions)(int, void *, void *) = malloc((count + 1) * sizeof *functions);
    int64_t *places = malloc((count + 1) * sizeof *places);
    for (uint64_t i = 0; i < count; i++) {
        functions[i] = constructor;
        addresses[i] = (uint64_t)chosen;
        places[i] = (int64_t)(count - 1 - i);
    }
    called = 0;
    call_each(functions, count, 3, NULL, NULL);
    resolve(addresses, places, count);
    assert(thread_pointer() == (uint64_t)__builtin_thread_pointer());
    flush_code((uint64_t)room, (uint64_t)room + size);
    assert(called == 3 * count && (!count || addresses[0] == 0x444));
    free(places), free(functions), free(name), free(table), free(addresses), free(room);
}

/* ---- guard.c */
int64_t copy(void *, const void *, uint64_t, uint64_t *);
int64_t guard_is_kept(void);
static void lay_pages(void)
{
    FILE *file = tmpfile();
    pages = mmap(NULL, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert(file && !ftruncate(fileno(file), PAGE));
    mprotect(pages + PAGE, PAGE, PROT_NONE);
    mmap(pages + 2 * PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, fileno(file), 0);
    assert(!ftruncate(fileno(file), 0));
}

static void try_guard(void)
{
    uint8_t *buffer = malloc(ROOM);
    uint64_t length = 1 + chance(chance(2) ? 64 : ROOM / 2), from = chance(ROOM - length), where = 0, end = from + length;
    bool is_fine = end <= PAGE || from >= 3 * PAGE;
    bool reading = chance(2);
    int64_t result = reading ? copy(buffer, pages + from, length, &where) : copy(pages + from, buffer, length, &where);
    assert((result == FINE) == is_fine);
    assert(is_fine || (where >= (uint64_t)pages + PAGE && where < (uint64_t)pages + 3 * PAGE));
    if (!chance(64))
        assert(guard_is_kept());
    free(buffer);
}

void guard_begin(void);
void guard_end(void);
static volatile int met_by_others;
static void their_handler(int number) { met_by_others += number == SIGSEGV; }
static void their_action(int number, siginfo_t *info, void *context)
{
    their_handler(number);
    if (info->si_code > 0) /* a fault of another thread's */
        mprotect(pages + PAGE, PAGE, PROT_READ);
    (void)context;
}

static void *fault_of_another(void *unused) { return (void)*(volatile uint8_t *)&pages[PAGE], unused; }

static void install_theirs(uint64_t which)
{
    struct sigaction theirs = {.sa_handler = which == 1 ? their_handler : which == 2 ? SIG_IGN : SIG_DFL};
    if (which == 0)
        theirs = (struct sigaction){.sa_sigaction = their_action, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &theirs, NULL);
}

static void change_meanwhile(void) { install_theirs(1); }

/* Another one's handler gets what is not the guard's, and stays when it comes meanwhile. */
static void try_other_handlers(void)
{
    struct sigaction old, now;
    sigaction(SIGSEGV, NULL, &old);
    uint64_t which = chance(2);
    pthread_t thread;
    met_by_others = 0;
    install_theirs(which);
    guard_begin();
    raise(SIGSEGV);
    assert(met_by_others == 1);
    if (which == 0) {
        pthread_create(&thread, NULL, fault_of_another, NULL);
        pthread_join(thread, NULL);
        assert(met_by_others == 2);
        mprotect(pages + PAGE, PAGE, PROT_NONE);
    }
    guard_end();
    install_theirs(2);
    guard_begin();
    raise(SIGSEGV);
    guard_end();
    for (uint64_t edge = 1; edge < 30; edge++) {
        install_theirs(0);
        until_change = edge;
        guard_begin();
        guard_end();
        sigaction(SIGSEGV, NULL, &now);
        assert(until_change || now.sa_handler == their_handler);
        until_change = 0;
    }
    sigaction(SIGSEGV, &old, NULL);
    pid_t child = fork();
    if (child == 0) {
        which = 2 + chance(2);
        install_theirs(which);
        guard_begin();
        if (which == 3 && chance(2))
            raise(SIGSEGV);
        pthread_create(&thread, NULL, fault_of_another, NULL);
        pthread_join(thread, NULL);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
}

static void *guard_on_a_stack(void *unused)
{
    stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16, .ss_flags = (int)(1U << 31)}, old;
    sigaltstack(&stack, &old); /* SS_AUTODISARM: the signal's handler finds it disarmed */
    for (int i = 0; i < 4; i++) {
        uint64_t where;
        char byte;
        stack_t now;
        assert(copy(&byte, pages + PAGE, 1, &where) == GONE && where == (uint64_t)pages + PAGE);
        sigaltstack(NULL, &now);
        assert(now.ss_sp == stack.ss_sp && now.ss_size == stack.ss_size); /* and is armed again */
    }
    sigaltstack(&old, NULL);
    free(stack.ss_sp);
    return unused;
}

/* ---- fault.c */
typedef struct {
    int64_t number, code;
    uint64_t address, instruction, how, back;
} Fault;
void note_faults(Fault *, void *, uint64_t);
void tell_faults(char *const *);

static void end_quietly(int number) { _exit(number); }

/* A command that is told of the fault says what it was told; one that cannot be run does not hurt.  Who was to handle
   the fault before does so then. */
static void try_teller(void)
{
    int ends[2];
    bool is_handled = chance(2);
    char script[64], said[256] = "";
    assert(!pipe(ends));
    snprintf(script, sizeof script, "echo \"$*\" >&%d", ends[1]);
    char *command[] = {chance(2) ? "/bin/sh" : "/no such program", "-c", script, "tell", NULL};
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, is_handled ? end_quietly : SIG_DFL);
        note_faults(NULL, malloc(1 << 16), 1 << 16);
        tell_faults(command);
        ((volatile uint8_t *)pages)[PAGE] = 1;
    }
    int status = 0;
    waitpid(child, &status, 0);
    close(ends[1]);
    ssize_t length = read(ends[0], said, sizeof said - 1);
    close(ends[0]);
    unsigned long told[4] = {0};
    if (!strcmp(command[0], "/bin/sh"))
        assert(length == 7 * 17 && sscanf(said, "%lx %lx %lx %lx", told, told + 1, told + 2, told + 3) == 4 &&
               told[0] == (unsigned long)child && told[1] == SIGSEGV && told[3] == (unsigned long)pages + PAGE);
    assert(is_handled ? WIFEXITED(status) && WEXITSTATUS(status) == SIGSEGV
                      : WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
}

static void try_fault(void)
{
    static const int numbers[] = {SIGSEGV, SIGSEGV, SIGSEGV, SIGBUS, SIGILL, SIGSEGV};
#if defined __x86_64__
    enum { WAYS = 6 };
#else
    enum { WAYS = 5 };
#endif
    Fault *fault = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint64_t which = done / 64 % WAYS;
    volatile uint8_t *const nowhere = (uint8_t *)8;
    pid_t child = fork();
    if (child == 0) {
        note_faults(fault, malloc(1 << 16), 1 << 16);
        switch (which) {
        case 0: ((volatile uint8_t *)pages)[PAGE] = 1; break;
        case 1: (void)((volatile uint8_t *)pages)[PAGE + 8]; break;
        case 2: ((void (*)(void))(uintptr_t)nowhere)(); break;
        case 3: (void)((volatile uint8_t *)pages)[2 * PAGE]; break;
        case 4: __builtin_trap();
#if defined __x86_64__
        case 5: __asm__ volatile("mov $64, %%rsp\n jmp *%0" ::"r"(nowhere)); /* and its stack is nowhere, too */
#endif
        }
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    assert(WIFSIGNALED(status) && WTERMSIG(status) == numbers[which] && fault->number == numbers[which]);
    const uint64_t places[] = {(uint64_t)pages + PAGE, (uint64_t)pages + PAGE + 8, 8, (uint64_t)pages + 2 * PAGE, 0, 8};
    assert(which == 4 || fault->address == places[which]);
    assert((fault->how & 2) == (which == 0 ? 2 : 0) || which == 4);
    assert(which != 5 || !fault->back);
    munmap(fault, PAGE);
}

/* ---- lazy.c: what PLT0 does, with the index of a relocation and GOT[1] */
#if defined __x86_64__
uint64_t bind_with(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, double, double, double, double, uint64_t);
uint64_t bind_without(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, double, double, double, double, uint64_t);
#define PLT(name, to)                                                                                                  \
    __asm__(".globl " name "\n" name ": push 8(%rsp)\n lea answer_binding(%rip), %r11\n push %r11\n jmp " to "\n")
PLT("bind_with", "bind_lazily");
PLT("bind_without", "bind_lazily_without_xsave");

static uint64_t bound(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, double g, double h,
                      double i, double j, uint64_t k)
{
    assert(g == (double)a && h == (double)b && i == (double)c && j == (double)d);
    return a ^ b << 1 ^ c << 2 ^ d << 3 ^ e << 4 ^ f << 5 ^ k << 6;
}

uint64_t answer_binding(uint64_t index) /* and every register that carries arguments has something else */
{
    volatile double spoiled[16];
    for (int i = 0; i < 16; i++)
        spoiled[i] = (double)index * i + 0.5;
    __asm__ volatile("pcmpeqd %%xmm0, %%xmm0\n pcmpeqd %%xmm1, %%xmm1\n pcmpeqd %%xmm2, %%xmm2\n pcmpeqd %%xmm3, %%xmm3"
                     ::: "xmm0", "xmm1", "xmm2", "xmm3");
    return spoiled[1] > 0 ? (uint64_t)bound : 0;
}

static void try_lazy(void)
{
    uint64_t a = chance(1 << 20), b = chance(1 << 20), c = chance(9), d = chance(1 << 30), e = state, f = ~state;
    uint64_t expected = a ^ b << 1 ^ c << 2 ^ d << 3 ^ e << 4 ^ f << 5;
    uint64_t k = chance(1 << 20);
    uint64_t found = chance(2) ? bind_with(a, b, c, d, e, f, (double)a, (double)b, (double)c, (double)d, k)
                               : bind_without(a, b, c, d, e, f, (double)a, (double)b, (double)c, (double)d, k);
    assert(found == (expected ^ k << 6));
}
#else
static void try_lazy(void) {}
#endif

/* ---- arguments.c: values are numbers, buffers, and what is neither */
typedef struct {
    void *start, *object;
    int64_t length, item_size;
    int is_readonly, dimensions;
    void *others[5];
} GivenBuffer;
enum { MOST_VALUES = 13, NUMBER = 0, BUFFER, NEITHER };
typedef struct {
    int64_t kind;
    uint64_t number, length;
    int64_t opened; /* how often it is */
} Given;
static Given all_given[MOST_VALUES + 3];
static uint64_t value_count;
static bool is_refused, is_called;
void set_arguments(const void *);
int64_t call_loop(void *, const void *);

static int64_t count_values(const void *unused) { return (int64_t)value_count; }
static void *value_at(const void *unused, int64_t place) { return &all_given[place]; }
static int is_buffer(const Given *value) { return value->kind == BUFFER; }
static int open_buffer(Given *value, GivenBuffer *buffer, int flags)
{
    if (value->number == 0) { /* one that may not be written */
        is_refused = true;
        return -1;
    }
    *buffer = (GivenBuffer){.start = (void *)value->number, .object = value, .length = (int64_t)value->length};
    value->opened++;
    return 0;
}
static void close_buffer(GivenBuffer *buffer) { ((Given *)buffer->object)->opened--; }
static uint64_t number_of(const Given *value)
{
    is_refused |= value->kind == NEITHER;
    return value->kind == NEITHER ? UINT64_MAX : value->number;
}
static const void *error_of(void) { return is_refused ? &is_refused : NULL; }

static int64_t note_values(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h,
                           uint64_t i, uint64_t j, uint64_t k, uint64_t l, uint64_t m)
{
    const uint64_t given[] = {a, b, c, d, e, f, g, h, i, j, k, l, m};
    for (uint64_t place = 0; place < MOST_VALUES; place++) {
        const Given *value = &all_given[place];
        assert(given[place] == (place < value_count && (value->kind == NUMBER || value->length) ? value->number : 0));
        assert(place >= value_count || value->opened == (value->kind == BUFFER));
    }
    is_called = true;
    return -7;
}

static void try_arguments(void)
{
    static const void *const interface[] = {count_values, value_at, is_buffer, open_buffer, close_buffer, number_of, error_of};
    set_arguments(interface);
    value_count = chance(MOST_VALUES + 4);
    bool is_right = true;
    for (uint64_t i = 0; i < value_count; i++) {
        all_given[i] = (Given){.kind = (int64_t)chance(2), .number = chance(8) ? state : UINT64_MAX, .length = chance(3)};
        if (chance(32) == 0)
            all_given[i].kind = NEITHER;
        if (chance(32) == 0)
            all_given[i].number = 0;
        bool is_wrong = all_given[i].kind == NEITHER || (all_given[i].kind == BUFFER && !all_given[i].number);
        is_right &= i >= MOST_VALUES || !is_wrong;
    }
    is_refused = is_called = false;
    assert(call_loop(note_values, all_given) == (is_right ? -7 : 0));
    assert(is_called == is_right && is_refused != is_right);
    for (uint64_t i = 0; i < value_count; i++)
        assert(all_given[i].opened == 0);
}

int main(int argc, char **words)
{
    if (argc != 5)
        return 2;
    static const void *const theirs[] = {
        iterate, address_of_theirs, object_of_theirs, NULL, symbols_of_theirs, write_of_theirs};
    edges = mmap(NULL, sizeof *edges, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    no_file = open("/dev/null", O_WRONLY);
    set_answers(theirs);
    lay_pages();
    state = strtoull(words[1], NULL, 10) * 0x9e3779b97f4a7c15u + 1;
    uint64_t runs = strtoull(words[2], NULL, 10);
    time_t end = time(NULL) + atol(words[3]);
    for (; done < runs && time(NULL) < end; done++) {
        try_answers();
        try_inside();
        try_host();
        try_prepared();
        try_pages();
        try_objects();
        try_calls();
        try_guard();
        try_lazy();
        try_arguments();
        if (done % 64 == 0) {
            pthread_t thread;
            pthread_create(&thread, NULL, guard_on_a_stack, NULL);
            pthread_join(thread, NULL);
            try_fault();
            try_teller();
            try_other_handlers();
        }
        if (done % 65536 == 1)
            try_patience(), try_shortage();
    }
    for (uint64_t i = 0; i < LIBRARIES; i++)
        if (ends[i])
            relist(i);
    uint64_t met = list_edges(words[4]);
    printf("%llu runs, %llu edges, the last of them first in run %llu\n", (unsigned long long)done, (unsigned long long)met,
           (unsigned long long)edges->newest);
    return 0;
}
