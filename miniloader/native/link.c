/* Linking an ordinary library in two calls: one looks at everything and writes nothing, the other one writes.

   What is out of the ordinary, and what is wrong, is Python's, which begins anew and says it: whoever is told STRANGE
   has lost nothing.  Ordinary is a library of a few segments that share no page, with symbols, versions and
   relocations of the usual kinds, without IFUNCs of its own, and all of whose needs are met.

   The numbers of the dynamic section are those that Python has read; the tables are read where they lie, and judged
   as names.c and words.c judge them. */

#include "loops.h"
#include <stdlib.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE /* since Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

enum { POINTERS = 3, LOCATED = 9 };
enum { MOST_PAGES = 1 << 18 };         /* a byte each, and a file may claim as many as it likes */
enum { READ = 4, WRITE = 2, RUN = 1 }; /* PF_R and its like */

/* What the first call leaves for the second one, unless another library comes between. */
static struct {
    uint64_t turn, symbols, known_count, page_count, count;
    Job job;
    Span writable[MOST_LOADS], code[MOST_LOADS], pointers[POINTERS];
    Part parts[2], packed, head;
    Row known[LOCATED];
    Noted noted[MOST_NOTES];
    /* For each symbol of the file, which is longer than all of that: where it is among those wanted, and of these. */
    int64_t *places, *wanted;
    Definition *found;
    uint64_t *addresses;
    uint8_t *marks, *indirect, *late; /* none is late */
    uint8_t *pages;
    char *room; /* where all of them are: of so many bytes, as many of which have been used before */
    uint64_t size, used;
} left;

#ifndef KEPT /* bytes that most libraries do with, and that are not given back; tests keep fewer */
#define KEPT (1ull << 19)
#endif

/* Room for what is noted of each symbol and page: first for how each is used. */
static bool make_room(uint64_t symbols)
{
    const uint64_t each = 3 * sizeof(uint64_t) + sizeof(Definition) + 3;
    const uint64_t size = symbols * each + left.page_count + 8, most = size > KEPT ? size : KEPT;
    if (size > left.size) {
        free(left.room);
        left.room = malloc(most);
        left.size = left.room ? most : 0;
        left.used = 0;
    }
    if (!left.room)
        return false;
    left.symbols = symbols;
    left.places = (int64_t *)left.room;
    left.marks = (uint8_t *)(left.places + symbols);
    memset(left.marks, 0, symbols);
    return true;
}

/* Room for what is found of the symbols that are used, right behind: the kernel makes the pages of all of it at once,
   in a third of what it takes to come to each by a fault. */
static void make_more_room(uint64_t page_size)
{
    uint64_t count = 0;
    for (uint64_t symbol = 0; symbol < left.symbols; symbol++)
        count += left.marks[symbol] != 0;
    left.found = (Definition *)(left.room + ((left.symbols * (sizeof *left.places + 1) + 7) & -8ull));
    left.wanted = (int64_t *)(left.found + count), left.addresses = (uint64_t *)(left.wanted + count);
    left.indirect = (uint8_t *)(left.addresses + count), left.late = left.indirect + count;
    left.pages = left.late + count;
    left.count = count;
    const uint64_t used = (uint64_t)((char *)left.pages - left.room) + left.page_count;
    if (used > left.used) {
        uint64_t start = ((uint64_t)left.room + left.used) & -page_size;
        madvise((void *)start, (uint64_t)left.room + used - start, MADV_POPULATE_WRITE);
        left.used = used;
    }
}

/* It is not used any more: nothing is written from it. */
static void give_back(void)
{
    left.turn++;
    if (left.size > KEPT) {
        free(left.room);
        left.room = NULL;
        left.size = 0;
    }
}

/* ------------------------------------------------------------------------------------- the dynamic section */

enum { /* the tags that count, in the order in which they are gathered */
    PLTRELSZ, PLTGOT, HASH, STRTAB, SYMTAB, RELA, RELASZ, RELAENT, STRSZ, SYMENT, REL, PLTREL, TEXTREL, JMPREL,
    INIT_ARRAY, FINI_ARRAY, INIT_ARRAYSZ, FINI_ARRAYSZ, FLAGS, PREINIT_ARRAY, PREINIT_ARRAYSZ, RELRSZ, RELR,
    RELRENT, GNU_HASH, VERSYM, RELACOUNT, VERDEF, VERDEFNUM, VERNEED, VERNEEDNUM, ANDROID, TAGS
};
static const uint64_t numbers[] = {
    2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 17, 20, 22, 23, 25, 26, 27, 28, 30, 32, 33, 35, 36, 37, 0x6ffffef5, 0x6ffffff0,
    0x6ffffff9, 0x6ffffffc, 0x6ffffffd, 0x6ffffffe, 0x6fffffff};
_Static_assert(sizeof numbers / sizeof *numbers == ANDROID, "a number for each tag, but for Android's");
enum { DF_TEXTREL = 4, DT_RELA_ = 7 };

typedef struct { /* by the order above: whether it is there, its last value, and where that is */
    uint64_t is_there[TAGS], value[TAGS], place[TAGS];
} Dynamic;

static bool is_android(uint64_t tag)
{
    return (tag >= 0x6000000f && tag <= 0x60000012) || (tag >= 0x6fffe000 && tag <= 0x6fffe003);
}

static void gather_tags(Dynamic *dynamic, const uint64_t *entries, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t tag = entries[2 * i], which = 0;
        while (which < ANDROID && numbers[which] != tag)
            which++;
        if (which == ANDROID && !is_android(tag))
            continue;
        dynamic->is_there[which] = 1;
        dynamic->value[which] = entries[2 * i + 1];
        dynamic->place[which] = i;
    }
}

/* Whether the tables are of the usual kinds, with rows of the usual sizes. */
static bool is_usual(const Dynamic *d)
{
    const uint64_t *has = d->is_there, *value = d->value;
    return !has[ANDROID] && !has[REL] && !has[TEXTREL] && !(value[FLAGS] & DF_TEXTREL) &&
           (!has[PLTREL] || value[PLTREL] == DT_RELA_) && (!has[RELAENT] || value[RELAENT] == sizeof(Row)) &&
           (!has[SYMENT] || value[SYMENT] == sizeof(Symbol)) && (!has[RELRENT] || value[RELRENT] == 8) &&
           value[RELASZ] % sizeof(Row) == 0 && value[PLTRELSZ] % sizeof(Row) == 0 && value[RELRSZ] % 8 == 0 &&
           /* some linkers count the PLT's rows among the others */
           !(has[RELA] && has[JMPREL] && value[JMPREL] - value[RELA] < value[RELASZ]);
}

/* -------------------------------------------------------------------------------------- where things are */

static void add_span(Span *spans, uint64_t *count, uint64_t start, uint64_t end)
{
    if (*count && spans[*count - 1].end == start)
        spans[*count - 1].end = end;
    else
        spans[(*count)++] = (Span){start, end};
}

/* Whether the segments are in order, and no page is two's; then what may be read and written is what they say: Python
   has taken READ from those where the file has holes. */
static bool note_loads(Link *link, Job *job, const Load *loads)
{
    uint64_t count = link->load_count, size = link->page_size;
    if (link->load_count > MOST_LOADS || !count)
        return false;
    for (uint64_t i = 0; i < count; i++) {
        const Load *load = &loads[i];
        uint64_t length = load->file_end - load->start;
        if (load->end < load->start || length > load->end - load->start || load->end + size < size)
            return false;
        if (i + 1 < count && ((load->end + size - 1) & -size) > (loads[i + 1].start & -size))
            return false;
        if (load->flags & READ && length)
            add_span(link->readable, &link->table.readable_count, load->start, load->file_end);
        if (load->flags & WRITE)
            add_span(left.writable, &job->writable_count, load->start, load->end);
        if (load->flags & RUN)
            left.code[job->code_count++] = (Span){load->start, load->end};
    }
    job->start = loads[0].start & -size;
    left.page_count = (loads[count - 1].end - job->start) / size + 1;
    return left.page_count <= MOST_PAGES;
}

/* A part of a table: where it is; whether it may be read. */
static bool note_part(const Link *link, Part *part, uint64_t vaddr, uint64_t count, uint64_t each)
{
    *part = (Part){link->bias + vaddr, count};
    if (count >= UINT64_MAX / each)
        return false;
    return !count || inside(link->readable, link->table.readable_count, vaddr, count * each);
}

static bool note_parts(const Link *link, Job *job, const Dynamic *d)
{
    uint64_t all = d->is_there[RELA] ? d->value[RELASZ] / sizeof(Row) : 0, head = d->value[RELACOUNT];
    uint64_t plt = d->is_there[JMPREL] ? d->value[PLTRELSZ] / sizeof(Row) : 0, rela = d->value[RELA];
    head = head < all ? head : all;
    job->part_count = 2;
    return note_part(link, &left.head, rela, head, sizeof(Row)) &&
           note_part(link, &left.parts[0], rela + head * sizeof(Row), all - head, sizeof(Row)) &&
           note_part(link, &left.parts[1], d->value[JMPREL], plt, sizeof(Row)) &&
           note_part(link, &left.packed, d->value[RELR], d->is_there[RELR] ? d->value[RELRSZ] / 8 : 0, 8);
}

static void note_pointers(Job *job, const Dynamic *d)
{
    static const uint8_t arrays[POINTERS][2] = {
        {PREINIT_ARRAY, PREINIT_ARRAYSZ}, {INIT_ARRAY, INIT_ARRAYSZ}, {FINI_ARRAY, FINI_ARRAYSZ}};
    for (int i = 0; i < POINTERS; i++)
        if (d->is_there[arrays[i][0]]) {
            uint64_t start = d->value[arrays[i][0]];
            left.pointers[job->pointer_count++] = (Span){start, start + d->value[arrays[i][1]]};
        }
}

/* The addresses in the dynamic section that glibc adds the load bias to, unless it is read-only. */
static void note_located(const Link *link, const Job *job, const Dynamic *d, const Load *loads)
{
    static const uint8_t tags[LOCATED] = {HASH, PLTGOT, STRTAB, SYMTAB, RELA, REL, JMPREL, VERSYM, GNU_HASH};
    bool is_writable = false;
    uint32_t type = 0;
    left.known_count = 0;
    for (const Load *load = loads; load < loads + link->load_count; load++)
        is_writable |= load->flags & WRITE && load->start <= link->dynamic &&
                       link->dynamic + link->dynamic_size <= load->file_end;
    while (type < KINDS && job->kinds[type].formula != B_A)
        type++;
    for (int i = 0; i < LOCATED && link->dynamic && is_writable; i++)
        if (d->is_there[tags[i]])
            left.known[left.known_count++] = (Row){
                link->dynamic + 16 * d->place[tags[i]] + 8, type, 0, (int64_t)d->value[tags[i]]};
}

static int64_t open_names(Link *link, const Dynamic *d, uint64_t highest)
{
    Table *table = &link->table;
    const uint64_t *value = d->value;
    table->bias = link->bias;
    table->readable = link->readable;
    table->strtab = value[STRTAB], table->strsz = value[STRSZ], table->symtab = value[SYMTAB];
    table->gnu_hash = value[GNU_HASH], table->sysv_hash = value[HASH], table->versym = value[VERSYM];
    table->verneed = value[VERNEED], table->verneednum = value[VERNEEDNUM];
    table->verdef = value[VERDEF], table->verdefnum = value[VERDEFNUM];
    table->count = highest + 1;
    int64_t result = open_all(table, true);
    if (result != FINE || table->labels_count > MOST_LABELS)
        return STRANGE;
    table->labels = table->labels_count ? link->labels : NULL;
    return table->labels_count ? list_all(table) : FINE;
}

/* ------------------------------------------------------------------------------------------------- binding */

/* Only formulas that the loops compute are met, and those of thread-local words, which are counted: Python computes
   these; the highest symbol. */
static bool are_plain(Link *link, Job *job, uint64_t *highest)
{
    static uint64_t counts[KINDS];
    memset(counts, 0, sizeof counts);
    if (survey_rows(job, counts, highest) != FINE)
        return false;
    for (uint64_t type = 0; type < KINDS; type++) {
        if (!counts[type] || job->kinds[type].formula <= Z_A)
            continue;
        if (job->kinds[type].formula != THREAD_LOCAL)
            return false;
        link->local_count += counts[type];
    }
    return true;
}

/* List the symbols that are used, and where among them each is. */
static void list_wanted(void)
{
    const uint8_t *marks = left.marks;
    int64_t *places = left.places, *wanted = left.wanted, count = 0;
    for (int64_t symbol = 0; symbol < (int64_t)left.symbols; symbol++) {
        places[symbol] = count;
        if (marks[symbol])
            wanted[count++] = symbol;
    }
    memset(left.indirect, 0, left.count);
    memset(left.late, 0, left.count);
}

/* List what is asked for, ascending: to that belong the functions whose names are exits; how many. */
static uint64_t list_asked_for(
    Link *link, const Table *const *scope, const uint64_t *biases, const uint64_t *asked, uint64_t *every)
{
    uint64_t count = link->asked_count;
    for (uint64_t i = 0; i < count; i++)
        every[i] = asked[i];
    for (int i = 0; i < MOST_EXITS && link->exits[i]; i++) {
        Definition definition;
        if (look_one_up(link->exits[i], scope, biases, link->scope_count, PLAIN, &definition) != FINE)
            return UINT64_MAX;
        if (definition.owner < 0)
            continue;
        uint64_t place = count++;
        for (; place && every[place - 1] > definition.address; place--)
            every[place] = every[place - 1];
        every[place] = link->exit_addresses[i] = definition.address;
    }
    return count;
}

/* Note the addresses, and those that Python has to see to. */
static bool note_found(
    Link *link, const Table *const *scope, const uint64_t *biases, const uint8_t *ours, const uint64_t *asked)
{
    static int64_t notes[MOST_NOTES];
    uint64_t every[MOST_ASKED + MOST_EXITS];
    uint64_t count = link->asked_count > MOST_ASKED ? UINT64_MAX : list_asked_for(link, scope, biases, asked, every);
    if (count == UINT64_MAX)
        return false;
    note(left.found, left.count, ours, every, count, left.addresses, notes, MOST_NOTES, &link->noted_count);
    for (uint64_t i = 0; i < link->noted_count && link->noted_count <= MOST_NOTES; i++) {
        int64_t place = notes[i] >> 2;
        left.noted[i] = (Noted){notes[i], left.wanted[place], left.found[place]};
    }
    link->noted = left.noted;
    return link->noted_count <= MOST_NOTES;
}

/* Whether an IFUNC of ours is among what was found. */
static bool meets_own_indirect(const uint8_t *ours)
{
    for (uint64_t i = 0; i < left.count; i++)
        if (left.indirect[i] && left.found[i].owner >= 0 && ours[left.found[i].owner])
            return true;
    return false;
}

/* Where there is more than one other library of ours among the owners, number all of them in the order in which the
   rows come to what they define, from 2 on: who is bound to them notes them so.  False where there are too many. */
static bool number_owners(const Link *link, const Job *job, const uint8_t *ours, uint8_t *owners)
{
    uint64_t others = 0, number = 2;
    for (uint64_t i = 0; i < link->scope_count; i++)
        others += owners[i] && ours[i] && i != link->own;
    for (const Part *part = job->parts; part < job->parts + job->part_count && others > 1; part++) {
        const Row *rows = (const Row *)part->address;
        for (const Row *row = rows; row < rows + part->count; row++) {
            uint64_t symbol = ONCE(row->symbol);
            if (symbol >= left.symbols || !left.marks[symbol])
                continue;
            int64_t owner = left.found[left.places[symbol]].owner;
            if (owner < 0 || owners[owner] != 1)
                continue;
            if (number > UINT8_MAX)
                return false;
            owners[owner] = (uint8_t)number++;
        }
    }
    return true;
}

/* Whether a program that lies where it was linked has a PLT entry for anything that is bound to others and not only
   called: its address stands for the function there, and Python has to see to that. */
static bool meets_plt_entries(const Link *link, const Table *const *scope, const uint64_t *biases)
{
    uint64_t program = 0, met = 0;
    int64_t how = VERSIONED | PLT_ENTRIES;
    uint8_t indirect = 0, owner = 0;
    Definition entry;
    while (program < link->scope_count && biases[program])
        program++;
    if (program == link->scope_count)
        return false;
    for (uint64_t i = 0; i < left.count && !owner; i++) {
        if (left.found[i].owner <= (int64_t)program || !(left.marks[left.wanted[i]] & POINTED))
            continue;
        if (look_all_up(
                &link->table, &left.wanted[i], 1, scope + program, biases + program, 1, -1, how, &entry, &indirect,
                &owner, &met) != FINE)
            return true;
        how |= CONTINUED;
    }
    return owner;
}

static int64_t look_and_bind(
    Link *link, const Kind *kinds, const Load *loads, const uint64_t *tags, const Table *const *scope,
    const uint64_t *biases, const uint8_t *ours, uint8_t *owners, const char *const *files,
    const Table *const *needed, const uint64_t *asked)
{
    Dynamic dynamic = {0};
    uint64_t highest = 0, met = 0, missing = 0;
    Job *job = &left.job;
    link->turn = ++left.turn;
    *job = (Job){.bias = link->bias, .page_size = link->page_size, .kinds = kinds, .writable = left.writable,
                 .code = left.code, .pointers = left.pointers, .parts = left.parts};
    gather_tags(&dynamic, tags, link->tag_count);
    if (!is_usual(&dynamic) || !note_loads(link, job, loads) || !note_parts(link, job, &dynamic) ||
        !are_plain(link, job, &highest) || open_names(link, &dynamic, highest) != FINE)
        return STRANGE;
    note_pointers(job, &dynamic);
    note_located(link, job, &dynamic, loads);
    for (uint64_t i = 0; i < link->needed_count; i++)
        if (find_missing(&link->table, files[i], needed[i], &missing) != FINE || missing)
            return STRANGE;
    if (!make_room(link->table.count) || mark(job, left.marks, left.symbols) != FINE)
        return STRANGE;
    make_more_room(link->page_size);
    job->pages = left.pages;
    list_wanted();
    int64_t result = look_all_up(
        &link->table, left.wanted, left.count, scope, biases, link->scope_count, (int64_t)link->own, VERSIONED,
        left.found, left.indirect, owners, &met);
    bool is_plain = result == FINE && !(met & UNBOUND) && !meets_own_indirect(ours) &&
                    number_owners(link, job, ours, owners) && !meets_plt_entries(link, scope, biases);
    return is_plain && note_found(link, scope, biases, ours, asked) ? FINE : STRANGE;
}

static int64_t bind_all(
    Link *link, const Kind *kinds, const Load *loads, const uint64_t *tags, const Table *const *scope,
    const uint64_t *biases, const uint8_t *ours, uint8_t *owners, const char *const *files,
    const Table *const *needed, const uint64_t *asked)
{
    int64_t result = look_and_bind(link, kinds, loads, tags, scope, biases, ours, owners, files, needed, asked);
    if (result != FINE)
        give_back();
    return result;
}

/* Look at a library and bind its symbols: FINE, or STRANGE, and Python has to.  Nothing is written to it.  own is the
   place of the library in the scope, ours says of each library there whether it is of ours, owners whether any symbol
   is bound to it, and in which order; files are the names by which the library means what it needs.  What is noted
   lies in link->noted until the next call. */
int64_t bind_ordinary(
    Link *link, const Kind *kinds, const Load *loads, const uint64_t *tags, const Table *const *scope,
    const uint64_t *biases, const uint8_t *ours, uint8_t *owners, const char *const *files,
    const Table *const *needed, const uint64_t *asked)
{
    GUARDED(bind_all(link, kinds, loads, tags, scope, biases, ours, owners, files, needed, asked));
}

/* Copy the rows of thread-local words, of which there is the number that was counted, and what their symbols are bound
   to; their pages count. */
static int64_t list_local(const Link *link, Job *job, Row *rows, Definition *definitions)
{
    int64_t result = copy_rows(job, ALL_LOCAL, rows, link->local_count, left.marks, left.symbols);
    for (uint64_t i = 0; i < link->local_count && result == FINE; i++) {
        uint64_t start = rows[i].offset - job->start, last = start + job->kinds[rows[i].type].size - 1;
        definitions[i] = left.found[left.places[rows[i].symbol]];
        if (definitions[i].owner >= 0) /* else it stays as it is */
            left.pages[start / link->page_size] = left.pages[last / link->page_size] = 1;
    }
    return result;
}

static int64_t write_all(
    Link *link, const int64_t *places, const uint64_t *addresses, uint64_t count, Row *rows, Definition *definitions)
{
    if (link->turn != left.turn)
        return STRANGE;
    for (uint64_t i = 0; i < count; i++) {
        if ((uint64_t)places[i] >= left.count)
            return STRANGE;
        left.addresses[places[i]] = addresses[i];
    }
    memset(left.pages, 0, left.page_count);
    int64_t result = put_all(
        &left.job, left.known, left.known_count, &left.packed, NULL, 0, &left.head, left.places, left.places,
        left.symbols, left.addresses, left.found, left.late);
    if (result == FINE)
        result = list_local(link, &left.job, rows, definitions);
    for (uint64_t page = 0; page < left.page_count; page++)
        link->pages += left.pages[page] != 0;
    link->where = left.job.where;
    link->what = left.job.what;
    give_back();
    return result;
}

/* Write the words of the library that was bound last, with other addresses at some places; STRANGE where another one
   was bound meanwhile, and nothing is written.  The thread-local ones are Python's: there is room for their rows, and
   for what their symbols are bound to. */
int64_t write_ordinary(
    Link *link, const int64_t *places, const uint64_t *addresses, uint64_t count, Row *rows, Definition *definitions)
{
    GUARDED(write_all(link, places, addresses, count, rows, definitions));
}
