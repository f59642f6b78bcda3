/* The loops alone, on made-up tables, under gcc's sanitizers: fuzz SEED RUNS SECONDS EDGES LIBRARY...

   Each run lays a library out as it lies in memory, spoils its tables, and calls every loop that reads them; what is
   not said to be readable is poisoned, and all that is handed over is exactly as long as it is said to be.  So a byte
   read or written elsewhere ends this program.  While a loop runs, at an edge of its code, somebody changes what it
   reads, or takes pages away: what was looked at before is not what is there now.  At the end it says how many runs
   there were, how many edges of the loops' code, and in which run the last of these was met first; EDGES is a file
   that gets the place of each.

   Three edges nothing can reach, as gcc 12 compiles it: in read_text a name that begins within the strings and has no
   bytes there; in open_all a table that has no strings when it is asked first, and has some when it is asked again; in
   is_mixed symbols that are wanted in a scope of no library. */

#define _GNU_SOURCE
#include "loops.h"

#include <sanitizer/asan_interface.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

/* ---- what guard.c does, for pages that were taken away: any other fault is the sanitizer's to tell */
sigjmp_buf guard_jump;
uint64_t guard_where;
static bool is_guarded;
static uint8_t *gone, *gone_end;
static struct sigaction sanitizers;

void guard_begin(void) { is_guarded = true; }
void guard_end(void) { is_guarded = false; }

static void on_fault(int number, siginfo_t *info, void *context)
{
    const uint8_t *where = info->si_addr;
    if (is_guarded && where >= gone && where < gone_end)
        siglongjmp(guard_jump, 1);
    sigaction(number, &sanitizers, NULL); /* it comes again */
    (void)context;
}

/* ---- edges that were come by (-fsanitize-coverage=trace-pc) */
enum { EDGES = 1 << 20 };
static uint8_t edges[EDGES];
static uint64_t done, newest; /* runs until now, and the one that met an edge for the first time most lately */
static uint64_t until_change; /* how many edges on; 0 for never */
static void change_meanwhile(void);
extern char __executable_start;

__attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc(void)
{
    uint8_t *edge = &edges[((uintptr_t)__builtin_return_address(0) - (uintptr_t)&__executable_start) % EDGES];
    if (!*edge)
        *edge = 1, newest = done;
    if (until_change && --until_change == 0)
        change_meanwhile();
}

/* Where each edge that was met returned to, as objdump(1) has it. */
static void list_edges(const char *path)
{
    FILE *file = fopen(path, "w");
    for (int edge = 0; file && edge < EDGES; edge++)
        if (edges[edge])
            fprintf(file, "%x\n", edge);
    if (file)
        fclose(file);
}

/* ---- what is called */
int64_t open_table(Table *, int64_t);
int64_t list_versions(Table *);
int64_t missing_version(const Table *, const char *, const Table *, uint64_t *);
int64_t text_at(const Table *, uint64_t, int64_t, char *, uint64_t, uint64_t *);
int64_t look_up(const Table *, const int64_t *, uint64_t, const Table *const *, const uint64_t *, uint64_t, int64_t,
                int64_t, Definition *, uint8_t *, uint8_t *, uint64_t *);
int64_t list_asked(const uint64_t *, uint64_t, const uint64_t *, uint64_t, int64_t *, uint64_t *);
int64_t list_symbols(const Row *, uint64_t, const uint8_t *, int64_t *, uint64_t *);
int64_t list_set(const uint8_t *, uint64_t, int64_t *, uint64_t *);
int64_t list_places(const int64_t *, uint64_t, uint64_t, int64_t *, uint64_t);
int64_t look_name_up(const char *, const Table *const *, const uint64_t *, uint64_t, int64_t, Definition *);
int64_t bind_ordinary(Link *, const Kind *, const Load *, const uint64_t *, const Table *const *, const uint64_t *,
                      const uint8_t *, uint8_t *, const char *const *, const Table *const *, const uint64_t *);
int64_t write_ordinary(Link *, const int64_t *, const uint64_t *, uint64_t, Row *, Definition *);
int64_t survey(Job *, uint64_t *, uint64_t *);
int64_t use(Job *, uint8_t *, uint64_t);
int64_t gather(Job *, uint64_t, Row *, uint64_t, const uint8_t *, uint64_t);
int64_t relocate(Job *, const Row *, uint64_t, const Part *, const uint64_t *, uint64_t, const Part *, const int64_t *,
                 const int64_t *, uint64_t, const uint64_t *, const Definition *, const uint8_t *);

/* ---- chance */
static uint64_t state;

static uint64_t chance(uint64_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return below ? state % below : 0;
}

static uint64_t odd_number(uint64_t size)
{
    const uint64_t numbers[] = {
        0, 1, 2, 7, 8, 255, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, UINT64_MAX, UINT64_MAX - 7,
        (uint64_t)INT64_MAX, size - 1, size, size + 1, size - 8, size - 24, size / 2};
    uint64_t which = chance(sizeof numbers / sizeof *numbers + 6);
    return which < sizeof numbers / sizeof *numbers ? numbers[which] : chance(2 * size);
}

/* ---- libraries, as their files say they lie in memory */
typedef struct { /* a library in memory of its own, readable but for a gap, its table not opened yet */
    uint8_t *image;
    Span spans[2];
    Table table;
    u32 *labels;
    bool is_arena;
} Laid;

typedef struct {
    uint8_t *pristine;
    uint64_t size, room; /* and where there is room for tables of relocations, of so many bytes: */
    Table told; /* what its dynamic section says */
    Laid good, neighbour; /* as it is, and with some of its symbols and tables spoiled */
} Seed;

enum { SEEDS = 64, PAGE = 4096, ARENA = 1 << 22, TABLES = 2048, PACKED = 1536 };
static Seed seeds[SEEDS];
static uint64_t seed_count;
static Seed *seed;     /* that of this run */
static Seed *beside;   /* one whose neighbour is in the scope */
static uint8_t *arena;   /* whose pages can be taken away */
static Laid *changing;
static Row *changing_rows;
static uint64_t changing_count;

static uint64_t word_at(const uint8_t *place, unsigned length)
{
    uint64_t value = 0;
    memcpy(&value, place, length);
    return value;
}

static void put_word(uint8_t *place, uint64_t number, uint32_t value) { memcpy(place + 4 * number, &value, 4); }

/* Zeros behind a library: where they begin. */
static uint64_t add_bytes(Seed *library, uint64_t length)
{
    uint64_t start = (library->size + 7) & ~7ull;
    library->pristine = realloc(library->pristine, start + length);
    memset(library->pristine + library->size, 0, start + length - library->size);
    library->size = start + length;
    return start;
}

/* Lay a SysV hash table behind a library, as linkers made them for all libraries. */
static void add_sysv_hash(Seed *library, uint64_t count)
{
    enum { BUCKETS = 7 };
    uint64_t start = add_bytes(library, 4 * (2 + BUCKETS + count));
    uint8_t *table = library->pristine + start, *buckets = table + 8, *chains = buckets + 4 * BUCKETS;
    put_word(table, 0, BUCKETS), put_word(table, 1, (uint32_t)count);
    for (uint64_t symbol = count - 1; symbol; symbol--) {
        const uint8_t *row = library->pristine + library->told.symtab + sizeof(Symbol) * symbol;
        uint32_t hash = 0;
        for (const uint8_t *at = library->pristine + library->told.strtab + word_at(row, 4); *at; at++) {
            hash = (hash << 4) + *at;
            hash = (hash ^ ((hash & 0xf0000000) >> 24)) & 0x0fffffff;
        }
        put_word(chains, symbol, (uint32_t)word_at(buckets + 4 * (hash % BUCKETS), 4));
        put_word(buckets, hash % BUCKETS, (uint32_t)symbol);
    }
    library->told.sysv_hash = start;
}

static void lay(Laid *, bool);
static bool opened(Laid *);

static void take_in(Seed *library, const char *path)
{
    FILE *file = fopen(path, "rb");
    static uint8_t data[ARENA];
    if (!file || fread(data, 1, sizeof data, file) < 64)
        exit(2);
    fclose(file);
    uint64_t phoff = word_at(data + 32, 8), phnum = word_at(data + 56, 2), dynamic = 0;
    Table *told = &library->told;
    for (int pass = 0; pass < 2; pass++) {
        for (uint64_t i = 0; i < phnum; i++) {
            const uint8_t *row = data + phoff + 56 * i;
            uint64_t type = word_at(row, 4), offset = word_at(row + 8, 8), vaddr = word_at(row + 16, 8);
            uint64_t filesz = word_at(row + 32, 8), memsz = word_at(row + 40, 8);
            if (type == 2)
                dynamic = vaddr;
            if (type == 1 && pass == 0 && vaddr + memsz > library->size)
                library->size = vaddr + memsz;
            if (type == 1 && pass == 1)
                memcpy(library->pristine + vaddr, data + offset, filesz);
        }
        if (pass == 0)
            library->pristine = calloc(1, library->size);
    }
    for (uint64_t at = dynamic, tag; (tag = word_at(library->pristine + at, 8)); at += 16) {
        uint64_t value = word_at(library->pristine + at + 8, 8);
        switch (tag) {
        case 4: told->sysv_hash = value; break;
        case 5: told->strtab = value; break;
        case 6: told->symtab = value; break;
        case 10: told->strsz = value; break;
        case 0x6ffffef5: told->gnu_hash = value; break;
        case 0x6ffffff0: told->versym = value; break;
        case 0x6ffffffc: told->verdef = value; break;
        case 0x6ffffffd: told->verdefnum = value; break;
        case 0x6ffffffe: told->verneed = value; break;
        case 0x6fffffff: told->verneednum = value; break;
        }
    }
    seed = library;
    library->room = add_bytes(library, TABLES);
    lay(&library->good, true);
    if (!opened(&library->good))
        exit(3);
    if (told->sysv_hash)
        return;
    free(library->good.labels);
    free(library->good.image);
    add_sysv_hash(library, library->good.table.count);
    lay(&library->good, true);
    if (!opened(&library->good))
        exit(3);
}

/* Bytes that may be poisoned. */
__attribute__((no_sanitize("address"))) static void put_bytes(
    uint8_t *image, uint64_t at, uint64_t value, unsigned width)
{
    if (at < seed->size && seed->size - at >= width)
        for (unsigned i = 0; i < width; i++)
            ((volatile uint8_t *)image)[at + i] = (uint8_t)(value >> 8 * i);
}

static void spoil_at(uint8_t *image, uint64_t at)
{
    static const unsigned widths[] = {1, 2, 4, 4, 8};
    put_bytes(image, at, odd_number(seed->size), widths[chance(5)]);
}

/* Make a symbol one of another kind: of its binding and type, visibility, section, or value. */
static void spoil_symbol(uint8_t *image)
{
    static const uint8_t kinds_of[] = {0x10, 0x11, 0x12, 0x20, 0x22, 0x02, 0x16, 0x1a, 0x2a, 0xa1, 0x13};
    static const uint16_t sections[] = {0, 0, 1, 12, 0xfff1};
    uint64_t count = seed->good.table.count, index = chance(chance(2) ? 12 : count);
    uint64_t at = seed->told.symtab + sizeof(Symbol) * index, version = chance(chance(2) ? 2 : 6) | chance(2) << 15;
    switch (chance(5)) {
    case 0: put_bytes(image, at + 4, kinds_of[chance(sizeof kinds_of)], 1); break;
    case 1: put_bytes(image, at + 5, chance(4), 1); break;
    case 2: put_bytes(image, at + 6, sections[chance(5)], 2); break;
    case 3: put_bytes(image, at + 8, chance(3) * chance(seed->size), 8); break;
    case 4: put_bytes(image, seed->told.versym ? seed->told.versym + 2 * index : seed->size, version, 2); break;
    }
}

static void spoil_once(uint8_t *image)
{
    const Table *told = &seed->told;
    const uint64_t tables[] = {told->strtab, told->symtab, told->gnu_hash, told->sysv_hash,
                               told->versym, told->verneed, told->verdef};
    uint64_t table = tables[chance(7)];
    if (chance(2))
        spoil_symbol(image);
    else if (chance(8) == 0) { /* a chain that leads to itself */
        uint64_t start = told->sysv_hash, symbol = chance(seed->good.table.count);
        put_bytes(image, start + 8 + 4 * (word_at(seed->pristine + start, 4) + symbol), symbol, 4);
    } else if (chance(8) == 0) /* where the last string ends */
        put_bytes(image, told->strtab + told->strsz - 1, 'n', 1);
    else
        spoil_at(image, table + (chance(3) ? 4 * chance(16) : chance(seed->size - table)));
}

static void lay(Laid *laid, bool good)
{
    uint64_t size = seed->size;
    laid->is_arena = !good && chance(4) == 0 && size <= ARENA;
    laid->image = laid->is_arena ? arena : malloc(size);
    ASAN_UNPOISON_MEMORY_REGION(laid->image, size);
    memcpy(laid->image, seed->pristine, size);
    laid->labels = NULL;
    laid->spans[0] = (Span){0, size};
    laid->spans[1] = (Span){size, size};
    Table *table = &laid->table;
    *table = seed->told;
    table->bias = (uint64_t)laid->image;
    table->readable = laid->spans;
    table->readable_count = 2;
    if (good)
        return;
    for (uint64_t times = chance(12); times; times--)
        spoil_once(laid->image);
    if (chance(3) == 0) {
        uint64_t start = chance(size) & ~7ull, end = start + 8 * chance((size - start) / 8);
        laid->spans[0].end = start;
        laid->spans[1].start = end;
        ASAN_POISON_MEMORY_REGION(laid->image + start, end - start);
    }
    *(chance(2) ? &table->gnu_hash : &table->sysv_hash) *= chance(2); /* libraries have one of them, or both */
    uint64_t *tags[] = {&table->strtab, &table->strsz, &table->symtab, &table->gnu_hash, &table->sysv_hash,
                        &table->versym, &table->verneed, &table->verneednum, &table->verdef, &table->verdefnum};
    for (uint64_t times = chance(3); times; times--)
        *tags[chance(10)] = odd_number(size);
    table->count = chance(4) ? chance(64) : odd_number(size);
}

/* Take some pages away, or forbid writing to them; have them back. */
static void vanish(Laid *laid)
{
    if (!laid->is_arena || gone)
        return;
    uint64_t pages = (seed->size + PAGE - 1) / PAGE, first = chance(3) ? chance(pages) : 0;
    gone = arena + PAGE * first;
    gone_end = gone + PAGE * (chance(3) ? 1 : pages - first);
    mprotect(gone, (size_t)(gone_end - gone), chance(4) ? PROT_NONE : PROT_READ);
}

static void come_back(void)
{
    if (gone)
        mprotect(gone, (size_t)(gone_end - gone), PROT_READ | PROT_WRITE);
    gone = gone_end = NULL;
}

static void maybe_vanish(Laid *laid)
{
    if (laid->is_arena && chance(8) == 0)
        vanish(laid);
}

static Row some_row(const Span *);
static Span changing_spans[2];
static Symbol *changing_symbols;

/* What somebody does to the file while a loop looks at it. */
static void change_meanwhile(void)
{
    if (changing_symbols)
        changing_symbols[chance(changing_count)].name = (uint32_t)odd_number(1 << 20);
    if (!changing || gone)
        return;
    uint64_t way = chance(5);
    if (way == 0)
        vanish(changing);
    else if (way == 4) {
        Seed *own = seed;
        seed = beside;
        spoil_once(seed->neighbour.image);
        seed = own;
    } else if (way == 1 && changing_count)
        changing_rows[chance(changing_count)] = some_row(changing_spans);
    else
        for (uint64_t times = 1 + chance(3); times; times--)
            spoil_once(changing->image);
    until_change = chance(2) ? 1 + chance(200) : 0;
}

static bool opened(Laid *laid)
{
    Table *table = &laid->table;
    if (open_table(table, (int64_t)chance(2)) != FINE)
        return false;
    if (!table->labels_count)
        return true;
    table->labels = laid->labels = calloc(table->labels_count, sizeof *laid->labels);
    return list_versions(table) == FINE;
}

static void clear_away(Laid *laid)
{
    changing = NULL;
    come_back();
    free(laid->labels);
    if (laid->is_arena)
        ASAN_POISON_MEMORY_REGION(laid->image, seed->size);
    else {
        ASAN_UNPOISON_MEMORY_REGION(laid->image, seed->size);
        free(laid->image);
    }
}

/* Another neighbour, which can be opened. */
static void move_in(Seed *library)
{
    Laid *neighbour = &library->neighbour;
    free(neighbour->image);
    free(neighbour->labels);
    seed = library;
    const Table told = seed->told;
    const uint64_t count = seed->good.table.count;
    lay(neighbour, true);
    for (uint64_t times = chance(12); times; times--)
        spoil_once(neighbour->image);
    for (uint64_t at = told.symtab, times = chance(3) ? 0 : count; times; times--, at += sizeof(Symbol))
        if (chance(3) == 0) /* it does not define all that it did */
            put_bytes(neighbour->image, at + 6, 0, 2);
    *(chance(2) ? &neighbour->table.gnu_hash : &neighbour->table.sysv_hash) *= chance(2);
    if (opened(neighbour))
        return;
    free(neighbour->labels);
    free(neighbour->image);
    lay(neighbour, true);
    opened(neighbour);
}

/* A frame of its own, each time: a jump out of a loop ends what the sanitizer knows of the frames there are. */
#define APART __attribute__((noinline))

/* ---- names */
APART static void try_names(Laid *laid, const Laid *good)
{
    const uint64_t size = seed->size;
    const Table *scope[] = {chance(2) ? &good->table : &laid->table, &laid->table};
    uint64_t biases[] = {0, laid->table.bias}, met = 0, tables = 1 + chance(2);
    uint64_t count = 1 + chance(40);
    int64_t *wanted = malloc(count * sizeof *wanted);
    for (uint64_t i = 0; i < count; i++)
        wanted[i] = (int64_t)(chance(20) ? chance(laid->table.count ? laid->table.count : 1) : odd_number(size));
    Definition *found = malloc(count * sizeof *found);
    uint8_t *indirect = calloc(count, 1), *owners = calloc(tables, 1);
    int64_t own = (int64_t)chance(tables + 1) - 1;
    maybe_vanish(laid);
    if (look_up(&laid->table, wanted, count, scope, biases, tables, own, (int64_t)chance(8), found, indirect, owners,
                &met) == FINE) {
        uint64_t asked[] = {found[0].address, 0}, *addresses = malloc(count * sizeof *addresses), noted = 0;
        uint64_t space = chance(2 * count + 1);
        int64_t *notes = malloc(space ? space * sizeof *notes : 1);
        note(found, count, owners, asked, 2, addresses, notes, space, &noted);
        free(notes);
        free(addresses);
    }
    uint64_t room = chance(40), length = 0, missing = 0;
    char *copy = malloc(room ? room : 1);
    text_at(&laid->table, odd_number(size), chance(2) ? -1 : (int64_t)odd_number(size), copy, room, &length);
    Definition one;
    const char *names[] = {"", "demo_add", good->table.strings + chance(good->table.strsz)};
    look_name_up(names[chance(3)], scope, biases, tables, (int64_t)chance(8), &one);
    const char *file = chance(2) ? good->table.strings + chance(good->table.strsz) : "libc.so.6";
    if (seed->told.verneed && chance(4)) { /* what it needs indeed: the file of one of its records */
        const uint8_t *record = seed->pristine + seed->told.verneed;
        while (word_at(record + 12, 4) && chance(2))
            record += word_at(record + 12, 4);
        file = (const char *)seed->pristine + seed->told.strtab + word_at(record + 4, 4);
    }
    maybe_vanish(laid);
    missing_version(&laid->table, file, &good->table, &missing);
    missing_version(&good->table, file, &laid->table, &missing);
    free(copy);
    free(owners);
    free(indirect);
    free(found);
    free(wanted);
}

/* ---- words */
static Kind kinds[KINDS];

static void know_kinds(void)
{
    kinds[0] = (Kind){NONE, 0, 0, 0};
    kinds[1] = (Kind){S_A, 8, 0, 0};
    kinds[2] = (Kind){S_A_P, 4, 1, 0};
    kinds[5] = (Kind){COPIED, 8, 0, 0};
    kinds[6] = (Kind){S, 8, 0, 0};
    kinds[7] = (Kind){S, 8, 0, 1};
    kinds[8] = (Kind){B_A, 8, 0, 0};
    kinds[10] = (Kind){S_A, 4, 0, 0};
    kinds[16] = (Kind){THREAD_LOCAL, 8, 0, 0};
    kinds[21] = (Kind){THREAD_LOCAL, 4, 1, 0};
    kinds[32] = (Kind){Z_A, 4, 0, 0};
    kinds[36] = (Kind){THREAD_LOCAL, 16, 0, 0};
    kinds[37] = (Kind){INDIRECT, 8, 0, 0};
}

static Row some_row(const Span *writable)
{
    static const uint32_t types[] = {0, 1, 2, 5, 6, 7, 8, 8, 8, 10, 16, 21, 32, 36, 37};
    const Span *span = &writable[chance(2)];
    uint64_t size = seed->size;
    uint64_t inside_it = span->start + chance(span->end - span->start + 1);
    Row row = {chance(12) ? inside_it : odd_number(size), types[chance(15)], (uint32_t)chance(12), (int64_t)chance(size)};
    if (chance(40) == 0)
        row.type = (uint32_t)odd_number(KINDS);
    if (chance(40) == 0)
        row.symbol = (uint32_t)odd_number(size);
    return row;
}

APART static void try_words(Laid *laid)
{
    const uint64_t size = seed->size;
    uint64_t middle = 4096 + 8 * chance((size - 8192) / 8), page = 4096;
    Span writable[] = {{2048 + chance(2048), middle}, {middle + chance(64), size - chance(64)}};
    Span code[] = {{0, chance(size)}}, pointers[] = {{middle + 256, middle + 320}};
    uint64_t count = chance(24), rows_at = chance(1024);
    if (middle + 400 > size || rows_at + count * sizeof(Row) > 2048 || writable[0].start > middle)
        return;
    Row *rows = (Row *)(laid->image + rows_at);
    for (uint64_t i = 0; i < count; i++)
        rows[i] = some_row(writable);
    uint64_t pages = size / page + 1, counts[KINDS] = {0}, highest = 0;
    Part parts[] = {{(uint64_t)rows, count}}, head = {(uint64_t)rows, chance(count + 1)}, packed = {0, 0};
    uint8_t *dirty = calloc(pages, 1);
    Job job = {laid->table.bias, page, 0, kinds, writable, code, pointers, parts, 2, 1, 1, 1, dirty, 0, 0};
    memcpy(changing_spans, writable, sizeof writable);
    changing_rows = rows, changing_count = count;
    maybe_vanish(laid);
    if (survey(&job, counts, &highest) == FINE && highest < 4096) {
        uint64_t symbols = highest + 1, last = 0, served = 0;
        uint8_t *used = calloc(symbols, 1);
        int64_t marked = use(&job, used, symbols);
        for (uint64_t symbol = 0; symbol < symbols; symbol++)
            if (used[symbol])
                last = symbol + 1, served++;
        come_back();
        for (uint64_t times = chance(2) ? chance(4) : 0; times && count; times--) /* somebody changes the file */
            rows[chance(count)] = some_row(writable);
        maybe_vanish(laid);
        uint64_t type = chance(40) ? chance(40) : ALL_LOCAL, many = type < KINDS ? counts[type] : chance(4);
        Row *copies = malloc((many ? many : 1) * sizeof *copies);
        gather(&job, type, copies, many, used, symbols);
        int64_t *places = calloc(last ? last : 1, sizeof *places);
        uint64_t *addresses = calloc(served ? served : 1, sizeof *addresses), *added = malloc(4 * sizeof *added);
        Definition *found = calloc(served ? served : 1, sizeof *found);
        uint8_t *late = calloc(served ? served : 1, 1);
        for (uint64_t symbol = 0, place = 0; symbol < last; symbol++)
            if (used[symbol])
                places[symbol] = (int64_t)place++;
        for (uint64_t place = 0; place < served; place++) {
            addresses[place] = odd_number(size);
            late[place] = chance(8) == 0;
        }
        come_back();
        uint64_t *entries = (uint64_t *)(laid->image + 1024 + 512); /* of a RELR table */
        for (int i = 0; i < 6; i++)
            entries[i] = chance(3) ? (writable[0].start & ~1ull) + 8 * chance(200) : odd_number(size);
        packed = (Part){(uint64_t)entries, chance(7)};
        for (int i = 0; i < 4; i++)
            added[i] = some_row(writable).offset;
        maybe_vanish(laid);
        if (marked == FINE)
            relocate(&job, rows, chance(count + 1), &packed, added, chance(5), &head, places, places, last, addresses,
                     found, late);
        free(late);
        free(found);
        free(added);
        free(addresses);
        free(places);
        free(copies);
        free(used);
    }
    free(dirty);
    changing_count = 0;
    come_back();
}

static void is_to_be(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "%s\n", what);
    abort();
}

/* ---- both at once */
static uint32_t defined_symbol(void)
{
    uint64_t count = seed->good.table.count, index = chance(count);
    for (int times = 9; times && !seed->good.table.rows[index].shndx; times--)
        index = chance(count);
    return (uint32_t)index;
}

APART static void try_link(Laid *laid, const Laid *good, const Laid *third)
{
    const bool is_family = chance(3) == 0; /* all that is needed is what the library and others of its kind have */
    if (is_family && chance(2))
        good = &seed->neighbour, third = &seed->good, beside = seed;
    const uint64_t size = seed->size;
    const Table told = seed->told;
    uint64_t middle = 4096 * (1 + chance(size / 4096 - 1)), count = chance(24), plt = chance(6);
    const uint64_t room = is_family ? seed->room : 0, rows_at = room + (is_family ? 0 : chance(512));
    Load loads[] = {{chance(2) ? 0 : chance(2048), middle - chance(64), middle, 4 | chance(2)},
                    {middle + chance(64), size - chance(4) / 3 * chance(64), size, 6}};
    for (uint64_t times = chance(8) ? 0 : 2; times; times--)
        ((uint64_t *)loads)[chance(8)] = odd_number(size);
    for (int i = 0; i < 2; i++) /* what is mapped is what the loader has mapped */
        if (loads[i].start > size || loads[i].end > size || loads[i].start > loads[i].end)
            return;
    const Span writable[] = {{loads[1].start, loads[1].end}, {loads[1].start, loads[1].end}};
    Row *rows = (Row *)(laid->image + rows_at);
    if (rows_at + (count + plt) * sizeof *rows > room + TABLES || loads[1].flags != 6)
        return;
    for (uint64_t i = 0; i < count + plt; i++) {
        rows[i] = some_row(writable);
        unsigned formula = kinds[rows[i].type % KINDS].formula;
        if (chance(20) && (formula == INDIRECT || formula == COPIED || rows[i].type > KINDS))
            rows[i].type = 8;
        if (rows[i].symbol < 12 && chance(3) == 0)
            rows[i].symbol = (uint32_t)chance(seed->good.table.count);
        if (is_family)
            rows[i].symbol = defined_symbol();
        if (is_family && chance(2)) /* and is another's */
            put_bytes(laid->image, told.symtab + sizeof(Symbol) * rows[i].symbol + 6, 0, 2);
    }
    uint64_t tags[][2] = {
        {7, rows_at}, {8, 24 * count}, {23, rows_at + 24 * count}, {2, 24 * plt}, {0x6ffffff9, chance(count + 1)},
        {5, told.strtab}, {10, told.strsz}, {6, told.symtab}, {0x6ffffef5, told.gnu_hash}, {4, told.sysv_hash},
        {0x6ffffff0, told.versym}, {0x6ffffffe, told.verneed}, {0x6fffffff, told.verneednum}, {0x6ffffffc, told.verdef},
        {0x6ffffffd, told.verdefnum}, {25, middle + 256}, {27, 64}, {3, middle + 8}, {36, room + PACKED},
        {35, 8 * chance(7)},
        {20, chance(30) ? 7 : 17}, {9, chance(30) ? 24 : 16}, {11, chance(30) ? 24 : 16}, {37, chance(30) ? 8 : 4},
        {chance(30) ? 1 : 22, 0}, {30, chance(30) ? 0 : 4}};
    uint64_t tag_count = sizeof tags / sizeof *tags;
    for (uint64_t i = 9; i < 15; i++) /* what the library does not have */
        if (!tags[i][1])
            tags[i][0] = 1;
    tags[8 + chance(2)][0] *= chance(2); /* of the hash tables one */
    for (uint64_t times = chance(2) ? chance(4) : 0; times; times--)
        spoil_symbol(laid->image);
    uint64_t *entries = (uint64_t *)(laid->image + room + PACKED); /* of a RELR table */
    for (int i = 0; i < 6; i++)
        entries[i] = chance(3) ? (writable[0].start & ~1ull) + 8 * chance(200) : odd_number(size);
    for (uint64_t times = chance(3) ? 0 : chance(4); times; times--)
        tags[chance(tag_count)][chance(6) ? 1 : 0] = chance(6) ? odd_number(size) : 0x60000010;
    Link *link = calloc(1, sizeof *link);
    *link = (Link){.bias = laid->table.bias, .page_size = 4096, .load_count = chance(30) ? 2 : odd_number(2),
                   .tag_count = tag_count, .dynamic = chance(2) ? middle + 64 : 0, .dynamic_size = 16 * tag_count,
                   .scope_count = 2 + chance(2), .own = 1, .needed_count = 1, .asked_count = 1,
                   .exits = {chance(2) ? "demo_add" : NULL, "__cxa_thread_atexit"}};
    if (link->load_count <= MOST_LOADS) /* what is given is as long as it is said to be */
        link->load_count = 2;
    const Table none = {0}, *needed[] = {&good->table};
    const Table *scope[] = {chance(4) ? &good->table : &none, &link->table, &third->table};
    const uint64_t fixed = chance(4) ? good->table.bias - chance(100) / 99 : 0; /* a program at the addresses it was linked for */
    const uint64_t biases[] = {fixed, laid->table.bias, third->table.bias};
    const uint64_t defined = good->table.bias + good->table.rows[chance(good->table.count)].value;
    const uint64_t asked[] = {chance(2) ? chance(size) : defined};
    const uint8_t ours[] = {(uint8_t)chance(2), 1, (uint8_t)chance(2)};
    uint8_t *owners = calloc(3, 1);
    const char *files[] = {"libc.so.6"};
    changing_rows = rows, changing_count = count + plt;
    memcpy(changing_spans, writable, sizeof writable);
    maybe_vanish(laid);
    if (bind_ordinary(link, kinds, loads, tags[0], scope, biases, ours, owners, files, needed, asked) == FINE) {
        come_back();
        for (const Noted *noted = link->noted; noted < link->noted + link->noted_count; noted++)
            is_to_be((uint64_t)noted->found.owner < link->scope_count, "something is noted of nobody's symbol");
        Row *local = malloc(link->local_count * sizeof *local);
        Definition *definitions = malloc(link->local_count * sizeof *definitions);
        for (uint64_t times = chance(2) ? chance(4) : 0; times && count; times--) /* somebody changes the file */
            rows[chance(count)] = some_row(writable);
        maybe_vanish(laid);
        link->turn -= !chance(16); /* another library has come between */
        const int64_t places[] = {(int64_t)chance(12), chance(8) ? 0 : (int64_t)odd_number(4096)};
        const uint64_t addresses[] = {chance(size), odd_number(size)};
        write_ordinary(link, places, addresses, chance(3), local, definitions);
        free(local), free(definitions);
    }
    changing_count = 0;
    free(owners);
    free(link);
}

/* ---- more than there may be: names that are far longer than their table, and bounds of linking at once */
APART static void try_long_names(void)
{
    const uint64_t longest = 1 + chance(1 << 20), strsz = longest + chance(9000), count = 1 + chance(80);
    const uint64_t symtab = (strsz + 7) & ~7ull, all = symtab + count * sizeof(Symbol);
    uint8_t *image = calloc(1, all);
    Symbol *rows = (Symbol *)(image + symtab);
    memset(image, 'n', longest - 1);
    for (uint64_t times = chance(2) ? chance(chance(2) ? 300 : 9000) : 0; times; times--) /* or shorter names */
        image[chance(longest)] = 0;
    for (uint64_t at = longest; at < strsz; at++)
        image[at] = chance(50) ? 'n' : 0;
    uint64_t total = 0;
    bool is_right = true;
    for (uint64_t i = 0; i < count; i++)
        rows[i].name = (uint32_t)(chance(4) ? chance(20) : chance(strsz + (chance(40) == 0)));
    const char *last = memrchr(image, 0, strsz);
    uint64_t names = (uint64_t)(last - (const char *)image) + 1;
    for (uint64_t i = 0; i < count; i++) {
        is_right &= rows[i].name < names;
        total += rows[i].name < names ? strlen((char *)image + rows[i].name) : 0;
    }
    const Span readable[] = {{8, all + 8}}; /* a vaddr of 0 is none */
    Table table = {.bias = (uint64_t)image - 8, .readable = readable, .readable_count = 1, .strtab = 8,
                   .strsz = strsz, .symtab = symtab + 8, .count = count};
    bool has_long = false; /* only these are counted */
    for (uint64_t at = 0, length = 0; at < names; at++) {
        length = image[at] ? length + 1 : 0;
        has_long |= length > 2 * 4096;
    }
    if (chance(2)) { /* and somebody changes the names */
        changing_symbols = rows, changing_count = count, until_change = 1 + chance(6 * count);
        open_table(&table, 1);
        changing_symbols = NULL, changing_count = 0;
        free(image);
        return;
    }
    int64_t result = open_table(&table, 1);
    is_to_be(is_right || result == NO_TABLE, "a name outside of its table is allowed");
    bool is_long = total > 16 * names + (1 << 24);
    is_to_be(!is_right || is_long || result == FINE, "names that are not too long are refused");
    is_to_be(!is_right || !has_long || !is_long || result == NO_TABLE, "too long names are allowed");
    free(image);
}

/* As many pages and notes as there may be, and some more, and many symbols; all of them are the library's own. */
APART static void try_many(void)
{
    const uint64_t kinds_of_many[][2] = {{chance(100), 1 + chance(100)}, {MOST_NOTES - 4 + chance(8), 1100},
                                         {chance(64), 16380 + chance(10)}, {5000 + chance(5000), 9000}};
    const uint64_t which = chance(4), count = kinds_of_many[which][0], page = 16ull << chance(9), most = 1 << 18;
    uint64_t symbols = kinds_of_many[which][1] > count ? kinds_of_many[which][1] : count + 1;
    const uint64_t hash = 64, symtab = hash + 16 + 8 * ((4 * symbols + 7) / 8);
    const uint64_t rows_at = symtab + symbols * sizeof(Symbol);
    const uint64_t data = (rows_at + count * sizeof(Row) + 65535) & ~65535ull, all = data + 16 + chance(65536);
    const uint64_t claimed = chance(2) ? page * (most - 2 + chance(4)) + chance(page) : all, local = chance(2);
    const uint64_t end = claimed > all ? claimed : all;
    uint8_t *image = calloc(1, all);
    put_word(image + hash, 0, 1), put_word(image + hash, 1, (uint32_t)symbols);
    Row *rows = (Row *)(image + rows_at);
    for (uint64_t i = 0; i < count; i++)
        rows[i] = (Row){data + chance(all - data - 15), local && chance(2) ? 36 : 1, (uint32_t)(i + 1), 0};
    const Load loads[] = {{0, rows_at + count * sizeof(Row), rows_at + count * sizeof(Row), 4}, {data, all, end, 6}};
    const uint64_t tags[][2] = {{7, rows_at}, {8, count * sizeof(Row)}, {5, 16}, {10, 1}, {6, symtab}, {4, hash}};
    const Table *needed[1] = {NULL}, *scope[1];
    const uint64_t bias = (uint64_t)image, biases[] = {bias}, asked[] = {chance(2) ? bias : 1};
    const uint8_t ours[] = {1};
    uint8_t owners[] = {0};
    const char *files[] = {NULL};
    Link *link = calloc(1, sizeof *link);
    *link = (Link){.bias = bias, .page_size = page, .load_count = 2, .tag_count = 6, .asked_count = 1};
    link->scope_count = count || chance(2);
    scope[0] = &link->table;
    int64_t result = bind_ordinary(link, kinds, loads, tags[0], scope, biases, ours, owners, files, needed, asked);
    bool fits = end / page + 1 <= most && (count <= MOST_NOTES || asked[0] != bias);
    is_to_be((result == FINE) == fits, "linking at once is for another number of pages, or notes");
    const int64_t none[] = {0};
    if (result == FINE) {
        uint64_t others = 0, listed = 0;
        Row *copies = malloc(link->local_count * sizeof *copies);
        Definition *definitions = malloc(link->local_count * sizeof *definitions);
        is_to_be(link->noted_count == (asked[0] == bias ? count : 0), "another number is noted");
        result = write_ordinary(link, none, biases, 0, copies, definitions);
        is_to_be(result == FINE, "what was bound is not written");
        for (uint64_t i = 0; i < count; i++)
            if (rows[i].type == 1)
                others++;
            else {
                is_to_be(copies[listed].offset == rows[i].offset, "another word is thread-local");
                is_to_be(definitions[listed].symbol == (int64_t)i + 1, "a thread-local word is of another symbol");
                listed++;
            }
        is_to_be(link->local_count == listed, "another number of words is thread-local");
        for (uint64_t i = 0; i < count; i++)
            is_to_be(others > 1 || rows[i].type != 1 || word_at(image + rows[i].offset, 8) == bias,
                     "another word is written");
        is_to_be(write_ordinary(link, none, biases, 0, copies, definitions) == STRANGE, "it is written twice");
        free(copies), free(definitions);
    }
    free(link), free(image);
}

/* A program whose PLT entries are all compared with a name, and are others: linking at once waits only so long. */
APART static void try_program(void)
{
    const uint64_t length = 1 + chance(600), entries = 1 + chance(600), strsz = 2 * length + 3;
    const uint64_t strtab = 16, hashes[] = {strtab + ((strsz + 7) & ~7ull), strtab + ((strsz + 7) & ~7ull) + 16};
    const uint64_t symtab = hashes[1] + 16 + 8 * (entries / 2 + 1), theirs = symtab + 2 * sizeof(Symbol);
    const uint64_t rows_at = theirs + (entries + 1) * sizeof(Symbol), end = rows_at + sizeof(Row);
    const uint64_t data = (end + PAGE - 1) & -(uint64_t)PAGE, all = data + 8;
    uint8_t *image = calloc(1, all);
    memset(image + strtab + 1, 'n', length);
    memset(image + strtab + length + 2, 'n', length);
    image[strtab + length + 2] = 'm';
    put_word(image + hashes[0], 0, 1), put_word(image + hashes[0], 1, 2), put_word(image + hashes[0], 2, 1);
    put_word(image + hashes[1], 0, 1), put_word(image + hashes[1], 1, (uint32_t)entries + 1);
    Symbol *rows = (Symbol *)(image + theirs);
    put_word(image + hashes[1], 2, 1);
    for (uint64_t i = 1; i <= entries; i++) {
        put_word(image + hashes[1] + 12, i, i < entries ? (uint32_t)i + 1 : 0);
        rows[i] = (Symbol){.name = (uint32_t)length + 2, .info = 0x12, .value = 8};
    }
    ((Symbol *)(image + symtab))[1] = (Symbol){.name = 1, .info = 0x12, .shndx = 1, .value = 8};
    *(Row *)(image + rows_at) = (Row){data, 1, 1, 0};
    const Span readable[] = {{0, all}};
    Table program = {.bias = (uint64_t)image, .readable = readable, .readable_count = 1, .strtab = strtab,
                     .strsz = strsz, .symtab = theirs, .sysv_hash = hashes[1]};
    is_to_be(open_table(&program, 1) == FINE, "a program is not opened");
    const Load loads[] = {{0, end, end, 4}, {data, all, all, 6}};
    const uint64_t tags[][2] = {{7, rows_at}, {8, sizeof(Row)}, {5, strtab}, {10, strsz}, {6, symtab}, {4, hashes[0]}};
    Link *link = calloc(1, sizeof *link);
    *link = (Link){.bias = (uint64_t)image, .page_size = PAGE, .load_count = 2, .tag_count = 6, .scope_count = 2,
                   .own = 1};
    const Table *scope[] = {&program, &link->table};
    const uint64_t biases[] = {0, link->bias}, steps = entries * (length + 1) + length;
    const uint8_t ours[] = {0, 1};
    uint8_t owners[] = {0, 0};
    int64_t result = bind_ordinary(link, kinds, loads, tags[0], scope, biases, ours, owners, NULL, NULL, NULL);
    is_to_be(steps + 2 > MOST_STEPS || result == FINE, "what takes no time is not linked at once");
    is_to_be(steps < MOST_STEPS + length + 1 || result == STRANGE, "what takes too long is waited for");
    free(link), free(image);
}

/* Two names of a version that are the same to where their tables end, and, sometimes, end there in no NUL any more. */
APART static void try_version(void)
{
    enum { SYMTAB = 8, VERSYM = 32, VERNEED = 40, VERDEF = 72, STRINGS = 100, ALL = STRINGS + 5 };
    static const uint16_t records[] = {0, 0, 0, 0, 1, 1, 1, 0, 16, 0, 0, 0, 7, 0, 0, 2, 3, 0, 0, 0,
                                       1, 0, 2, 1, 7, 0, 20, 0, 0, 0, 3, 0, 0, 0};
    const Span readable[] = {{SYMTAB, ALL}};
    const bool is_spoiled = chance(2);
    uint8_t *images[2];
    Table tables[2];
    for (int i = 0; i < 2; i++) {
        images[i] = calloc(1, ALL);
        memcpy(images[i] + VERSYM, records, sizeof records);
        memcpy(images[i] + STRINGS, "\0f\0V", 5);
        tables[i] = (Table){.bias = (uint64_t)images[i], .readable = readable, .readable_count = 1, .strtab = STRINGS,
                            .strsz = 5, .symtab = SYMTAB, .versym = VERSYM, .verneed = VERNEED, .verneednum = 1,
                            .verdef = VERDEF, .verdefnum = 1, .count = 1};
        is_to_be(open_table(&tables[i], 1) == FINE, "a table with versions is not opened");
        images[i][ALL - 1] = is_spoiled ? 'n' : 0;
    }
    uint64_t missing = 0;
    is_to_be(missing_version(&tables[0], "f", &tables[1], &missing) == FINE, "versions are not compared");
    is_to_be(missing == (is_spoiled ? 3 : 0), "another version is missing");
    free(images[0]), free(images[1]);
}

/* ---- lists: each is as long as it can be, and is compared with the plainest way to make it */
static void differs(const char *loop)
{
    fprintf(stderr, "%s answers otherwise than the plainest way\n", loop);
    exit(1);
}

APART static void try_lists(void)
{
    const uint64_t size = seed->size;
    uint64_t count = chance(64), few = chance(4), listed = 0, kept = 0, length = chance(80);
    uint64_t *addresses = malloc(count * sizeof *addresses), *asked = malloc(few * sizeof *asked);
    int64_t *numbers = malloc(count * sizeof *numbers), *places = malloc((count > length ? count : length) * sizeof *places);
    uint8_t *bytes = malloc(count), marked[KINDS] = {0};
    Row *rows = malloc(count * sizeof *rows);
    for (uint64_t i = 0; i < few; i++) /* ascending */
        asked[i] = (i ? asked[i - 1] : 0) + 1 + chance(20);
    for (uint64_t i = 0; i < count; i++) {
        addresses[i] = chance(60), bytes[i] = (uint8_t)(chance(3) * chance(200)), numbers[i] = (int64_t)chance(82) - 1;
        rows[i] = (Row){odd_number(size), (uint32_t)(chance(9) ? chance(40) : odd_number(size)), (uint32_t)i, 0};
    }
    for (int i = 0; i < 20; i++)
        marked[chance(40)] = 1;
    list_asked(addresses, count, asked, few, places, &listed);
    for (uint64_t i = 0; i < count; i++)
        for (uint64_t j = 0; j < few; j++)
            if (addresses[i] == asked[j] && (kept >= listed || places[kept++] != (int64_t)i))
                differs("list_asked");
    if (kept != listed)
        differs("list_asked");
    kept = listed = 0;
    list_set(bytes, count, places, &listed);
    for (uint64_t i = 0; i < count; i++)
        if (bytes[i] && (kept >= listed || places[kept++] != (int64_t)i))
            differs("list_set");
    if (kept != listed)
        differs("list_set");
    kept = listed = 0;
    list_symbols(rows, count, marked, places, &listed);
    for (uint64_t i = 0; i < count; i++)
        if (rows[i].type < KINDS && marked[rows[i].type] && (kept >= listed || places[kept++] != (int64_t)i))
            differs("list_symbols");
    if (kept != listed)
        differs("list_symbols");
    uint64_t first = chance(count + 2), wrong = count;
    for (uint64_t i = count; i-- > first;)
        if ((uint64_t)numbers[i] >= length)
            wrong = i;
    if ((list_places(numbers, first, count, places, length) == FINE) != (wrong == count))
        differs("list_places");
    for (uint64_t i = first; i < wrong; i++) /* the last of those that are the same */
        if (places[numbers[i]] < (int64_t)i || numbers[places[numbers[i]]] != numbers[i])
            differs("list_places");
    free(rows);
    free(bytes);
    free(places);
    free(numbers);
    free(asked);
    free(addresses);
}

int main(int argc, char **words)
{
    if (argc < 6 || argc > 5 + SEEDS)
        return 2;
    memset(edges, 0, sizeof edges); /* those of the sanitizers' own beginning */
    know_kinds();
    state = strtoull(words[1], NULL, 10) * 0x9e3779b97f4a7c15u + 1;
    arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASAN_POISON_MEMORY_REGION(arena, ARENA);
    for (; (int)seed_count < argc - 5; seed_count++) {
        take_in(&seeds[seed_count], words[5 + seed_count]);
        move_in(&seeds[seed_count]);
    }
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = (int)(SA_SIGINFO | SA_NODEFER)};
    sigaction(SIGSEGV, &ours, &sanitizers);
    uint64_t runs = strtoull(words[2], NULL, 10);
    time_t end = time(NULL) + atol(words[3]);
    for (; done < runs && time(NULL) < end; done++) {
        Laid laid;
        seed = &seeds[chance(seed_count)];
        Seed *other = chance(2) ? seed : &seeds[chance(seed_count)];
        Seed *third = chance(2) ? seed : &seeds[chance(seed_count)];
        const Laid *good = chance(2) ? &other->good : &other->neighbour;
        beside = chance(2) ? other : third;
        lay(&laid, false);
        changing = &laid;
        until_change = chance(3) ? 0 : 1 + chance(chance(2) ? 100 : 5000);
        if (opened(&laid))
            try_names(&laid, good);
        come_back();
        ASAN_UNPOISON_MEMORY_REGION(laid.image, seed->size);
        try_words(&laid);
        if (chance(2)) /* as it was, but for what follows */
            memcpy(laid.image, seed->pristine, seed->size);
        until_change = chance(3) ? 0 : 1 + chance(chance(2) ? 100 : 5000);
        try_link(&laid, good, chance(2) ? &third->good : &third->neighbour);
        clear_away(&laid);
        try_lists();
        if (chance(128) == 0)
            try_long_names();
        if (chance(128) == 0)
            try_many();
        if (chance(128) == 0)
            try_program(), try_version();
        if (chance(16) == 0)
            move_in(&seeds[chance(seed_count)]);
    }
    uint64_t met = 0;
    for (int edge = 0; edge < EDGES; edge++)
        met += edges[edge];
    list_edges(words[4]);
    printf("%llu runs, %llu edges, the last of them first in run %llu\n", (unsigned long long)done, (unsigned long long)met,
           (unsigned long long)newest);
    return 0;
}
