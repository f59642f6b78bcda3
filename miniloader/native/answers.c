/* What a library asks glibc about itself, answered for libraries that glibc does not know: dladdr(3), dl_iterate_phdr(3),
   _dl_find_object, backtrace_symbols(3).

   Each asks glibc's own first, then looks into a table of our libraries.  Nothing here waits for Python: an unwinder
   may ask in any thread, at any time, even at the end of the process.

   Sources: <link.h>, <dlfcn.h>; glibc's manual, "Dynamic Linker Introspection". */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct { /* a library of ours as glibc would tell of it; see loader/beside_glibc/stand_ins.py */
    struct dl_phdr_info info; /* whose counts are filled in */
    uint64_t start;
    _Atomic uint64_t end; /* 0: this entry is free */
    const void *unwind_table;
    const ElfW(Sym) *symbols;
    uint64_t symbol_count;
    const char *strings;
    struct { /* the public part of struct link_map: its address is the library's handle */
        uint64_t bias;
        const char *name;
        const void *dynamic, *next, *previous;
    } map;
} Entry;

typedef struct { /* struct dl_find_object, without what is for later versions */
    uint64_t flags;
    const void *start, *end, *map, *unwind_table;
} Object;

enum { MOST = 27000 }; /* a mapping of so many libraries would be refused long before */

Entry entries[MOST];
static _Atomic uint64_t used; /* entries */
/* How many libraries there ever were, and went, that glibc does not count: it counts a carrier for each that has
   thread-local storage. */
static _Atomic uint64_t listed, withdrawn;

typedef int Callback(struct dl_phdr_info *, size_t, void *);

static struct { /* glibc's own, in the order of Python's */
    int (*iterate)(Callback *, void *);
    int (*address)(const void *, Dl_info *, void **, int);
    int (*object)(void *, Object *);
    int (*plain_address)(const void *, Dl_info *); /* not asked: its stand-in asks the first one */
    char **(*symbols)(void *const *, int);
    void (*write_symbols)(void *const *, int, int);
} theirs;

void set_answers(const void *functions)
{
    __builtin_memcpy(&theirs, functions, sizeof theirs);
}

/* Put a library into the table: it is there when all of it is. */
void list_entry(uint64_t number, const Entry *new, uint64_t end)
{
    Entry *entry = entries + number;
    __builtin_memcpy(entry, new, sizeof *entry);
    atomic_store_explicit(&entry->end, end, memory_order_release);
    if (number >= used)
        used = number + 1;
    listed += !new->info.dlpi_tls_modid;
}

void withdraw_entry(uint64_t number)
{
    atomic_store_explicit(&entries[number].end, 0, memory_order_release);
    withdrawn += !entries[number].info.dlpi_tls_modid;
}

static uint64_t end_of(const Entry *entry)
{
    return atomic_load_explicit(&entry->end, memory_order_acquire);
}

static const Entry *entry_at(uint64_t address)
{
    for (const Entry *entry = entries; entry < entries + used; entry++)
        if (address < end_of(entry) && address >= entry->start)
            return entry;
    return NULL;
}

/* ------------------------------------------------------------------------------------------ dladdr(3) */

/* The symbol that covers a vaddr, or begins there, and begins last. */
static const ElfW(Sym) *nearest(const Entry *entry, uint64_t vaddr)
{
    const ElfW(Sym) *best = NULL;
    for (const ElfW(Sym) *symbol = entry->symbols; symbol < entry->symbols + entry->symbol_count; symbol++) {
        bool is_defined = symbol->st_shndx || symbol->st_value, is_thread_local = (symbol->st_info & 15) == STT_TLS;
        uint64_t distance = vaddr - symbol->st_value;
        bool covers = vaddr >= symbol->st_value && (!distance || distance < symbol->st_size);
        if (is_defined && !is_thread_local && covers && (!best || best->st_value < symbol->st_value))
            best = symbol;
    }
    return best;
}

const void *glibcs_own(const void *function); /* inside.c */

int answer_dladdr1(const void *address, Dl_info *info, void **extra, int flags)
{
    address = glibcs_own(address); /* who asks for dlopen(3) itself means glibc's, and where that is */
    int known = theirs.address(address, info, extra, flags);
    const Entry *entry = known ? NULL : entry_at((uint64_t)address);
    if (!entry)
        return known;
    const ElfW(Sym) *symbol = nearest(entry, (uint64_t)address - entry->info.dlpi_addr);
    info->dli_fname = entry->info.dlpi_name;
    info->dli_fbase = (void *)entry->start;
    info->dli_sname = symbol ? entry->strings + symbol->st_name : NULL;
    info->dli_saddr = symbol ? (void *)(entry->info.dlpi_addr + symbol->st_value) : NULL;
    if (flags == RTLD_DL_SYMENT)
        *extra = (void *)symbol;
    else if (flags == RTLD_DL_LINKMAP)
        *extra = (void *)&entry->map;
    return 1;
}

int answer_dladdr(const void *address, Dl_info *info)
{
    return answer_dladdr1(address, info, NULL, 0);
}

/* ------------------------------------------------------------------------------------ backtrace_symbols(3) */

typedef struct {
    const char *file, *symbol;
    uint64_t offset; /* from the symbol, or from the load bias */
} Place;

static bool is_placed(const void *address, Place *place)
{
    const Entry *entry = entry_at((uint64_t)address);
    if (!entry)
        return false;
    uint64_t vaddr = (uint64_t)address - entry->info.dlpi_addr;
    const ElfW(Sym) *symbol = nearest(entry, vaddr);
    *place = (Place){entry->info.dlpi_name, "", vaddr};
    if (symbol) {
        place->symbol = entry->strings + symbol->st_name;
        place->offset = vaddr - symbol->st_value;
    }
    return true;
}

/* The line of an address, ours or the one that glibc has, as snprintf(3) puts it. */
static size_t put(char *to, size_t size, const void *address, const char *known)
{
    Place place;
    bool ours = is_placed(address, &place);
    unsigned long offset = ours ? (unsigned long)place.offset : 0;
    int length = ours ? snprintf(to, size, "%s(%s+%#lx) [%p]", place.file, place.symbol, offset, address)
                      : snprintf(to, size, "%s", known);
    return length > 0 ? (size_t)length : 0;
}

/* glibc's own lines, and ours where it knows nothing: in one piece of memory, that the caller frees. */
char **answer_backtrace_symbols(void *const *addresses, int count)
{
    char **lines = theirs.symbols(addresses, count);
    size_t size = 0;
    for (int i = 0; lines && i < count; i++)
        size += put(NULL, 0, addresses[i], lines[i]) + 1;
    char **answer = lines ? malloc((size_t)count * sizeof *answer + size) : NULL;
    char *text = (char *)(answer + (answer ? count : 0)), *end = text + size;
    for (int i = 0; answer && i < count; i++) {
        /* What is there may have changed since it was measured: a byte stays for each line to come. */
        size_t room = (size_t)(end - text) - (size_t)(count - 1 - i);
        size_t length = put(text, room, addresses[i], lines[i]);
        answer[i] = text;
        text += (length < room ? length : room - 1) + 1;
    }
    free(lines);
    return answer;
}

void answer_backtrace_symbols_fd(void *const *addresses, int count, int fd)
{
    Place place;
    for (int i = 0; i < count; i++)
        if (is_placed(addresses[i], &place))
            dprintf(fd, "%s(%s+0x%lx)[%p]\n", place.file, place.symbol, (unsigned long)place.offset, addresses[i]);
        else
            theirs.write_symbols(addresses + i, 1, fd);
}

/* ---------------------------------------------------------------------------------------- when Python has ended */

/* What dlsym(3) gives by a library's own handle when Python has ended, and nobody else can tell: what it defines itself.
   Thread-local symbols are not looked for, nor is what needs a resolver. */
void *symbol_of(const void *handle, const char *name)
{
    uint64_t number = ((uint64_t)handle - (uint64_t)entries) / sizeof *entries;
    const Entry *entry = entries + number;
    if ((uint64_t)handle < (uint64_t)entries || number >= used || !end_of(entry))
        return NULL;
    for (const ElfW(Sym) *symbol = entry->symbols; symbol < entry->symbols + entry->symbol_count; symbol++) {
        unsigned type = symbol->st_info & 15, bind = symbol->st_info >> 4;
        bool is_found = symbol->st_shndx && bind != STB_LOCAL && type != STT_TLS && type != STT_GNU_IFUNC;
        if (is_found && !strcmp(entry->strings + symbol->st_name, name))
            return (void *)(entry->info.dlpi_addr + symbol->st_value);
    }
    return NULL;
}

bool is_of_ours(uint64_t caller)
{
    return entry_at(caller) != NULL;
}

/* What a caller finds by default: in its own library, then in all of ours. */
void *symbol_for(uint64_t caller, const char *name)
{
    const Entry *own = entry_at(caller);
    void *found = own ? symbol_of(&own->map, name) : NULL;
    for (const Entry *entry = entries; entry < entries + used && !found; entry++)
        found = symbol_of(&entry->map, name);
    return found;
}

static bool is_there(const char *path, struct stat *status)
{
    return syscall(SYS_newfstatat, AT_FDCWD, path, status, 0) == 0; /* glibc's own came to libc with 2.33 */
}

static bool has_soname(const Entry *entry, const char *name)
{
    for (const ElfW(Dyn) *row = entry->map.dynamic; row && row->d_tag != DT_NULL; row++)
        if (row->d_tag == DT_SONAME)
            return !strcmp(entry->strings + row->d_un.d_val, name);
    return false;
}

/* The handle of the library that is called so: by its path, by its SONAME, or by another path of its file. */
void *handle_called(const char *name)
{
    struct stat wanted, status;
    bool is_file = strchr(name, '/') && is_there(name, &wanted);
    for (const Entry *entry = entries; entry < entries + used; entry++) {
        if (!end_of(entry))
            continue;
        const char *path = entry->info.dlpi_name;
        if (!strcmp(path, name) || has_soname(entry, name) ||
            (is_file && is_there(path, &status) && status.st_dev == wanted.st_dev && status.st_ino == wanted.st_ino))
            return (void *)&entry->map;
    }
    return NULL;
}

/* ---------------------------------------------------------------------------- dl_iterate_phdr(3), unwinding */

typedef struct {
    Callback *callback;
    void *data;
    int result;
} Visit;

/* Whether it has the thread-local storage of a library of ours: see tls_carrier.py.  That one is told instead. */
static bool is_carrier(const struct dl_phdr_info *info)
{
    for (const Entry *entry = entries; info->dlpi_tls_modid && entry < entries + used; entry++)
        if (end_of(entry) && entry->info.dlpi_tls_modid == info->dlpi_tls_modid)
            return true;
    return false;
}

static int visit_theirs(struct dl_phdr_info *info, size_t size, void *context)
{
    const Visit *visit = context;
    if (is_carrier(info))
        return 0;
    info->dlpi_adds += listed;
    info->dlpi_subs += withdrawn;
    return visit->callback(info, size, visit->data);
}

/* Where the calling thread has the thread-local storage of a module, which for glibc is its carrier's: see
   tls_carrier.py. */
static int find_block(struct dl_phdr_info *info, size_t size, void *context)
{
    struct dl_phdr_info *ours = context;
    (void)size;
    if (info->dlpi_tls_modid != ours->dlpi_tls_modid)
        return 0;
    ours->dlpi_tls_data = info->dlpi_tls_data;
    return 1;
}

static int visit_ours(struct dl_phdr_info *first, size_t size, void *context)
{
    Visit *visit = context;
    (void)size;
    for (const Entry *entry = entries; entry < entries + used && !visit->result; entry++) {
        if (!end_of(entry))
            continue;
        struct dl_phdr_info info = entry->info;
        info.dlpi_adds = first->dlpi_adds + listed;
        info.dlpi_subs = first->dlpi_subs + withdrawn;
        if (info.dlpi_tls_modid)
            theirs.iterate(find_block, &info);
        visit->result = visit->callback(&info, sizeof info, visit->data);
    }
    return 1; /* called once: what is wanted of glibc are its lock and its counts */
}

/* glibc's is called twice, for those that it knows and for ours: both are told while it holds its lock. */
int answer_dl_iterate_phdr(Callback *callback, void *data)
{
    Visit visit = {callback, data, 0};
    int result = theirs.iterate(visit_theirs, &visit);
    if (result)
        return result;
    theirs.iterate(visit_ours, &visit);
    return visit.result;
}

int answer_dl_find_object(void *address, Object *result)
{
    int unknown = theirs.object(address, result);
    const Entry *entry = unknown ? entry_at((uint64_t)address) : NULL;
    if (!entry)
        return unknown;
    *result = (Object){
        .start = (const void *)entry->start,
        .end = (const void *)end_of(entry),
        .map = &entry->map,
        .unwind_table = entry->unwind_table,
    };
    return 0;
}
