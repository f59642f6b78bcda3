/* The loops alone, on made-up tables, under gcc's sanitizers: fuzz LIBRARY SEED RUNS SECONDS.

   Each run lays a library out as it lies in memory, spoils its tables, and calls every loop that reads them; what is
   not said to be readable is poisoned, and all that is handed over is exactly as long as it is said to be.  So a byte
   read or written elsewhere ends this program.  Rows are changed between looking through them and using them, as
   somebody may change the file.  At the end it says how many runs there were, how
   many edges of the loops' code, and in which run the last of these was met first. */

#include "loops.h"

#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* ---- what guard.c does: here a fault is to be seen */
sigjmp_buf guard_jump;
uint64_t guard_where;
void guard_begin(void) {}
void guard_end(void) {}

/* ---- edges that were come by (-fsanitize-coverage=trace-pc) */
enum { EDGES = 1 << 16 };
static uint8_t edges[EDGES];
static uint64_t done, newest; /* runs until now, and the one that met an edge for the first time most lately */
extern char __executable_start;

__attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc(void)
{
    uint8_t *edge = &edges[((uintptr_t)__builtin_return_address(0) - (uintptr_t)&__executable_start) % EDGES];
    if (!*edge)
        *edge = 1, newest = done;
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
                      const uint8_t *, uint8_t *, const char *const *, const Table *const *, const uint64_t *, Noted *);
int64_t write_ordinary(Link *, const int64_t *, const uint64_t *, uint64_t);
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

/* ---- a library, as its file says it lies in memory */
static uint8_t *pristine;
static uint64_t size;
static Table told; /* what its dynamic section says */

static uint64_t word_at(const uint8_t *place, unsigned length)
{
    uint64_t value = 0;
    memcpy(&value, place, length);
    return value;
}

static void take_in(const char *path)
{
    FILE *file = fopen(path, "rb");
    static uint8_t data[1 << 22];
    if (!file || fread(data, 1, sizeof data, file) < 64)
        exit(2);
    fclose(file);
    uint64_t phoff = word_at(data + 32, 8), phnum = word_at(data + 56, 2), dynamic = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (uint64_t i = 0; i < phnum; i++) {
            const uint8_t *row = data + phoff + 56 * i;
            uint64_t type = word_at(row, 4), offset = word_at(row + 8, 8), vaddr = word_at(row + 16, 8);
            uint64_t filesz = word_at(row + 32, 8), memsz = word_at(row + 40, 8);
            if (type == 2)
                dynamic = vaddr;
            if (type == 1 && pass == 0 && vaddr + memsz > size)
                size = vaddr + memsz;
            if (type == 1 && pass == 1)
                memcpy(pristine + vaddr, data + offset, filesz);
        }
        if (pass == 0)
            pristine = calloc(1, size);
    }
    for (uint64_t at = dynamic;; at += 16) {
        uint64_t tag = word_at(pristine + at, 8), value = word_at(pristine + at + 8, 8);
        switch (tag) {
        case 0: return;
        case 4: told.sysv_hash = value; break;
        case 5: told.strtab = value; break;
        case 6: told.symtab = value; break;
        case 10: told.strsz = value; break;
        case 0x6ffffef5: told.gnu_hash = value; break;
        case 0x6ffffff0: told.versym = value; break;
        case 0x6ffffffc: told.verdef = value; break;
        case 0x6ffffffd: told.verdefnum = value; break;
        case 0x6ffffffe: told.verneed = value; break;
        case 0x6fffffff: told.verneednum = value; break;
        }
    }
}

static void spoil_at(uint8_t *image, uint64_t at)
{
    static const unsigned widths[] = {1, 2, 4, 4, 8};
    unsigned width = widths[chance(5)];
    uint64_t value = odd_number(size);
    if (at < size && size - at >= width)
        memcpy(image + at, &value, width);
}

static void spoil(uint8_t *image)
{
    const uint64_t tables[] = {told.strtab, told.symtab, told.gnu_hash, told.sysv_hash,
                               told.versym, told.verneed, told.verdef};
    for (uint64_t times = chance(12); times; times--) {
        uint64_t table = tables[chance(7)];
        spoil_at(image, table + (chance(3) ? 4 * chance(16) : chance(size - table)));
    }
}

/* A library in memory of its own, readable but for a gap, its table not opened yet. */
typedef struct {
    uint8_t *image;
    Span spans[2];
    Table table;
    u32 *labels;
} Laid;

static void lay(Laid *laid, bool good)
{
    laid->image = malloc(size);
    memcpy(laid->image, pristine, size);
    laid->labels = NULL;
    laid->spans[0] = (Span){0, size};
    laid->spans[1] = (Span){size, size};
    Table *table = &laid->table;
    *table = told;
    table->bias = (uint64_t)laid->image;
    table->readable = laid->spans;
    table->readable_count = 2;
    if (good)
        return;
    spoil(laid->image);
    if (chance(3) == 0) {
        uint64_t start = chance(size) & ~7ull, end = start + 8 * chance((size - start) / 8);
        laid->spans[0].end = start;
        laid->spans[1].start = end;
        ASAN_POISON_MEMORY_REGION(laid->image + start, end - start);
    }
    uint64_t *tags[] = {&table->strtab, &table->strsz, &table->symtab, &table->gnu_hash, &table->sysv_hash,
                        &table->versym, &table->verneed, &table->verneednum, &table->verdef, &table->verdefnum};
    for (uint64_t times = chance(3); times; times--)
        *tags[chance(10)] = odd_number(size);
    table->count = chance(4) ? chance(64) : odd_number(size);
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
    ASAN_UNPOISON_MEMORY_REGION(laid->image, size);
    free(laid->labels);
    free(laid->image);
}

/* ---- names */
static void try_names(Laid *laid, Laid *good)
{
    const Table *scope[] = {chance(2) ? &good->table : &laid->table, &laid->table};
    uint64_t biases[] = {0, laid->table.bias}, met = 0, tables = 1 + chance(2);
    uint64_t count = 1 + chance(40);
    int64_t *wanted = malloc(count * sizeof *wanted);
    for (uint64_t i = 0; i < count; i++)
        wanted[i] = (int64_t)(chance(20) ? chance(laid->table.count ? laid->table.count : 1) : odd_number(size));
    Definition *found = malloc(count * sizeof *found);
    uint8_t *indirect = calloc(count, 1), *owners = calloc(tables, 1);
    int64_t own = (int64_t)chance(tables + 1) - 1;
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
    look_name_up(chance(2) ? "demo_add" : "", scope, biases, tables, (int64_t)chance(8), &one);
    const char *file = chance(2) ? good->table.strings + chance(good->table.strsz) : "libc.so.6";
    if (told.verneed && chance(2)) /* what it needs indeed: of its first record the file */
        file = good->table.strings + word_at(pristine + told.verneed + 4, 4);
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
    kinds[5] = (Kind){INDIRECT, 0, 0, 0};
    kinds[6] = (Kind){S, 8, 0, 0};
    kinds[7] = (Kind){S, 8, 0, 1};
    kinds[8] = (Kind){B_A, 8, 0, 0};
    kinds[10] = (Kind){S_A, 4, 0, 0};
    kinds[32] = (Kind){Z_A, 4, 0, 0};
    kinds[36] = (Kind){INDIRECT, 16, 0, 0};
    kinds[37] = (Kind){INDIRECT, 8, 0, 0};
}

static Row some_row(const Span *writable)
{
    static const uint32_t types[] = {0, 1, 2, 5, 6, 7, 8, 8, 8, 10, 32, 36, 37};
    const Span *span = &writable[chance(2)];
    uint64_t inside_it = span->start + chance(span->end - span->start + 1);
    Row row = {chance(12) ? inside_it : odd_number(size), types[chance(13)], (uint32_t)chance(12), (int64_t)chance(size)};
    if (chance(40) == 0)
        row.type = (uint32_t)odd_number(KINDS);
    if (chance(40) == 0)
        row.symbol = (uint32_t)odd_number(size);
    return row;
}

static void try_words(Laid *laid)
{
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
    if (survey(&job, counts, &highest) == FINE && highest < 4096) {
        uint64_t symbols = highest + 1, last = 0, served = 0;
        uint8_t *used = calloc(symbols, 1);
        int64_t marked = use(&job, used, symbols);
        for (uint64_t symbol = 0; symbol < symbols; symbol++)
            if (used[symbol])
                last = symbol + 1, served++;
        for (uint64_t times = chance(2) ? chance(4) : 0; times && count; times--) /* somebody changes the file */
            rows[chance(count)] = some_row(writable);
        uint64_t type = chance(40), many = counts[type];
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
        uint64_t *entries = (uint64_t *)(laid->image + 1024 + 512); /* of a RELR table */
        for (int i = 0; i < 6; i++)
            entries[i] = chance(3) ? (writable[0].start & ~1ull) + 8 * chance(200) : odd_number(size);
        packed = (Part){(uint64_t)entries, chance(7)};
        for (int i = 0; i < 4; i++)
            added[i] = some_row(writable).offset;
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
}

/* ---- both at once */
static void try_link(Laid *laid, Laid *good)
{
    uint64_t middle = 4096 * (1 + chance(size / 4096 - 1)), count = chance(24), plt = chance(6), rows_at = chance(512);
    Load loads[] = {{chance(2) ? 0 : chance(2048), middle - chance(64), middle, 4 | chance(2)},
                    {middle + chance(64), size - chance(64), size, 6}};
    for (uint64_t times = chance(8) ? 0 : 2; times; times--)
        ((uint64_t *)loads)[chance(8)] = odd_number(size);
    for (int i = 0; i < 2; i++) /* what is mapped is what the loader has mapped */
        if (loads[i].start > size || loads[i].end > size || loads[i].start > loads[i].end)
            return;
    const Span writable[] = {{loads[1].start, loads[1].end}, {loads[1].start, loads[1].end}};
    Row *rows = (Row *)(laid->image + rows_at);
    if (rows_at + (count + plt) * sizeof *rows > 2048 || loads[1].flags != 6)
        return;
    for (uint64_t i = 0; i < count + plt; i++) {
        rows[i] = some_row(writable);
        if (chance(20) && (kinds[rows[i].type % KINDS].formula == INDIRECT || rows[i].type > KINDS))
            rows[i].type = 8;
    }
    uint64_t tags[][2] = {
        {7, rows_at}, {8, 24 * count}, {23, rows_at + 24 * count}, {2, 24 * plt}, {0x6ffffff9, chance(count + 1)},
        {5, told.strtab}, {10, told.strsz}, {6, told.symtab}, {0x6ffffef5, told.gnu_hash}, {4, told.sysv_hash},
        {0x6ffffff0, told.versym}, {0x6ffffffe, told.verneed}, {0x6fffffff, told.verneednum}, {0x6ffffffc, told.verdef},
        {0x6ffffffd, told.verdefnum}, {25, middle + 256}, {27, 64}, {3, middle + 8}, {36, 1536}, {35, 8 * chance(7)},
        {20, chance(30) ? 7 : 17}, {9, chance(30) ? 24 : 16}, {11, chance(30) ? 24 : 16}, {37, chance(30) ? 8 : 4},
        {chance(30) ? 1 : 22, 0}, {30, chance(30) ? 0 : 4}};
    uint64_t tag_count = sizeof tags / sizeof *tags;
    for (uint64_t i = 9; i < 15; i++) /* what the library does not have */
        if (!tags[i][1])
            tags[i][0] = 1;
    uint64_t *entries = (uint64_t *)(laid->image + 1536); /* of a RELR table */
    for (int i = 0; i < 6; i++)
        entries[i] = chance(3) ? (writable[0].start & ~1ull) + 8 * chance(200) : odd_number(size);
    for (uint64_t times = chance(3) ? 0 : chance(4); times; times--)
        tags[chance(tag_count)][chance(6) ? 1 : 0] = chance(6) ? odd_number(size) : 0x60000010;
    Link *link = calloc(1, sizeof *link);
    *link = (Link){.bias = laid->table.bias, .page_size = 4096, .load_count = chance(30) ? 2 : odd_number(2),
                   .tag_count = tag_count, .dynamic = chance(2) ? middle + 64 : 0, .dynamic_size = 16 * tag_count,
                   .scope_count = 2 + chance(2), .own = 1, .needed_count = 1, .asked_count = 1};
    if (link->load_count <= MOST_LOADS) /* what is given is as long as it is said to be */
        link->load_count = 2;
    const Table *scope[] = {&good->table, &link->table, &good->table}, *needed[] = {&good->table};
    const uint64_t fixed = chance(4) ? good->table.bias - chance(100) / 99 : 0; /* a program at the addresses it was linked for */
    const uint64_t biases[] = {fixed, laid->table.bias, good->table.bias}, asked[] = {chance(size)};
    const uint8_t ours[] = {(uint8_t)chance(2), 1, (uint8_t)chance(2)};
    uint8_t *owners = calloc(3, 1);
    const char *files[] = {"libc.so.6"};
    Noted *noted = calloc(MOST_NOTES, sizeof *noted);
    if (bind_ordinary(link, kinds, loads, tags[0], scope, biases, ours, owners, files, needed, asked, noted) == FINE) {
        for (uint64_t times = chance(2) ? chance(4) : 0; times && count; times--) /* somebody changes the file */
            rows[chance(count)] = some_row(writable);
        link->turn -= !chance(16); /* another library has come between */
        const int64_t places[] = {(int64_t)chance(12), chance(8) ? 0 : (int64_t)odd_number(4096)};
        const uint64_t addresses[] = {chance(size), odd_number(size)};
        write_ordinary(link, places, addresses, chance(3));
    }
    free(noted);
    free(owners);
    free(link);
}

/* ---- lists: each is as long as it can be, and is compared with the plainest way to make it */
static void differs(const char *loop)
{
    fprintf(stderr, "%s answers otherwise than the plainest way\n", loop);
    exit(1);
}

static void try_lists(void)
{
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
    if (argc != 5)
        return 2;
    take_in(words[1]);
    know_kinds();
    state = strtoull(words[2], NULL, 10) * 0x9e3779b97f4a7c15u + 1;
    uint64_t runs = strtoull(words[3], NULL, 10);
    time_t end = time(NULL) + atol(words[4]);
    Laid good;
    lay(&good, true);
    if (!opened(&good))
        return 3;
    for (; done < runs && time(NULL) < end; done++) {
        Laid laid;
        lay(&laid, false);
        if (opened(&laid))
            try_names(&laid, &good);
        ASAN_UNPOISON_MEMORY_REGION(laid.image, size);
        try_words(&laid);
        if (chance(2)) /* as it was, but for what follows */
            memcpy(laid.image, pristine, size);
        try_link(&laid, &good);
        try_lists();
        clear_away(&laid);
    }
    uint64_t met = 0;
    for (int edge = 0; edge < EDGES; edge++)
        met += edges[edge];
    clear_away(&good);
    free(pristine);
    printf("%llu runs, %llu edges, the last of them first in run %llu\n", (unsigned long long)done, (unsigned long long)met,
           (unsigned long long)newest);
    return 0;
}
