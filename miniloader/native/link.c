/* Linking an ordinary library in two calls: one looks at everything and writes nothing, the other one writes.

   What is out of the ordinary, and what is wrong, is Python's, which begins anew and says it: whoever is told STRANGE
   has lost nothing.  Ordinary is a library of a few segments that share no page, with symbols, versions and
   relocations of the usual kinds, without thread-local storage and IFUNCs of its own, and all of whose needs are met.

   The numbers of the dynamic section are those that Python has read; the tables are read where they lie, and judged
   as names.c and words.c judge them. */

#include "loops.h"

enum { MOST_SYMBOLS = 1 << 14, MOST_BOUND = 1 << 12, MOST_PAGES = 1 << 14, POINTERS = 3, LOCATED = 9 };
enum { READ = 4, WRITE = 2, RUN = 1 };           /* PF_R and its like */
enum { LARGE = 1 << 21 };                        /* bytes of the file from which on there may be holes in it */

/* What the first call leaves for the second one, unless another library comes between. */
static struct {
    uint64_t turn, symbols, known_count, page_count;
    Job job;
    Span writable[MOST_LOADS], code[MOST_LOADS], pointers[POINTERS];
    Part parts[2], packed, head;
    Row known[LOCATED];
    uint8_t pages[MOST_PAGES], marks[MOST_SYMBOLS];
    int64_t places[MOST_SYMBOLS], wanted[MOST_BOUND];
    Definition found[MOST_BOUND];
    uint64_t addresses[MOST_BOUND];
    uint8_t indirect[MOST_BOUND], late[MOST_BOUND]; /* none is late */
} left;

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

/* Whether the segments are in order, and no page is two's; then what may be read and written is what they say.  But no
   table is read where the file may have holes. */
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
        if (load->flags & READ && length && length < LARGE)
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
    if (result != FINE || table->labels_count > MOST_LABELS || table->count > MOST_SYMBOLS)
        return STRANGE;
    table->labels = table->labels_count ? link->labels : NULL;
    return table->labels_count ? list_all(table) : FINE;
}

/* ------------------------------------------------------------------------------------------------- binding */

/* Only formulas that the loops compute are met; the highest symbol. */
static bool are_plain(Job *job, uint64_t *highest)
{
    static uint64_t counts[KINDS];
    memset(counts, 0, sizeof counts);
    if (survey_rows(job, counts, highest) != FINE)
        return false;
    for (uint64_t type = 0; type < KINDS; type++)
        if (counts[type] && job->kinds[type].formula > Z_A)
            return false;
    return true;
}

/* List the symbols that are used, and where among them each is; how many; UINT64_MAX for too many. */
static uint64_t list_wanted(uint64_t symbols)
{
    uint64_t count = 0;
    for (uint64_t symbol = 0; symbol < symbols; symbol++) {
        left.places[symbol] = (int64_t)count;
        if (!left.marks[symbol])
            continue;
        if (count == MOST_BOUND)
            return UINT64_MAX;
        left.wanted[count++] = (int64_t)symbol;
    }
    return count;
}

/* Note the addresses, and those that Python has to see to. */
static bool note_found(Link *link, uint64_t count, const uint8_t *ours, const uint64_t *asked, Noted *noted)
{
    int64_t notes[MOST_NOTES];
    note(left.found, count, ours, asked, link->asked_count, left.addresses, notes, MOST_NOTES, &link->noted);
    for (uint64_t i = 0; i < link->noted && link->noted <= MOST_NOTES; i++)
        noted[i] = (Noted){notes[i], left.addresses[notes[i] >> 2]};
    return link->noted <= MOST_NOTES;
}

/* Whether an IFUNC of ours is among what was found, or two other libraries of ours: who is bound to which first is
   Python's to say. */
static bool is_mixed(const Link *link, uint64_t count, const uint8_t *ours, const uint8_t *owners)
{
    uint64_t others = 0;
    for (uint64_t i = 0; i < link->scope_count; i++)
        others += owners[i] && ours[i] && i != link->own;
    for (uint64_t i = 0; i < count && others < 2; i++)
        if (left.indirect[i] && left.found[i].owner >= 0 && ours[left.found[i].owner])
            return true;
    return others > 1;
}

/* Whether a program that lies where it was linked has a PLT entry for anything that is bound to others and not only
   called: its address stands for the function there, and Python has to see to that. */
static bool meets_plt_entries(
    const Link *link, uint64_t count, const Table *const *scope, const uint64_t *biases)
{
    uint64_t program = 0, met = 0;
    uint8_t indirect = 0, owner = 0;
    Definition entry;
    while (program < link->scope_count && biases[program])
        program++;
    if (program == link->scope_count)
        return false;
    for (uint64_t i = 0; i < count && !owner; i++)
        if (left.found[i].owner > (int64_t)program && left.marks[left.wanted[i]] & POINTED &&
            look_all_up(
                &link->table, &left.wanted[i], 1, scope + program, biases + program, 1, -1, VERSIONED | PLT_ENTRIES,
                &entry, &indirect, &owner, &met) != FINE)
            return true;
    return owner;
}

static int64_t bind_all(
    Link *link, const Kind *kinds, const Load *loads, const uint64_t *tags, const Table *const *scope,
    const uint64_t *biases, const uint8_t *ours, uint8_t *owners, const char *const *files,
    const Table *const *needed, const uint64_t *asked, Noted *noted)
{
    Dynamic dynamic = {0};
    uint64_t highest = 0, met = 0, missing = 0;
    Job *job = &left.job;
    link->turn = ++left.turn;
    *job = (Job){.bias = link->bias, .page_size = link->page_size, .kinds = kinds, .writable = left.writable,
                 .code = left.code, .pointers = left.pointers, .parts = left.parts, .pages = left.pages};
    gather_tags(&dynamic, tags, link->tag_count);
    if (!is_usual(&dynamic) || !note_loads(link, job, loads) || !note_parts(link, job, &dynamic) ||
        !are_plain(job, &highest) || open_names(link, &dynamic, highest) != FINE)
        return STRANGE;
    note_pointers(job, &dynamic);
    note_located(link, job, &dynamic, loads);
    for (uint64_t i = 0; i < link->needed_count; i++)
        if (find_missing(&link->table, files[i], needed[i], &missing) != FINE || missing)
            return STRANGE;
    left.symbols = link->table.count;
    memset(left.marks, 0, left.symbols);
    uint64_t count = mark(job, left.marks, left.symbols) == FINE ? list_wanted(left.symbols) : UINT64_MAX;
    if (count == UINT64_MAX)
        return STRANGE;
    memset(left.indirect, 0, count);
    int64_t result = look_all_up(
        &link->table, left.wanted, count, scope, biases, link->scope_count, (int64_t)link->own, VERSIONED, left.found,
        left.indirect, owners, &met);
    bool is_plain = result == FINE && !(met & (UNBOUND | UNIQUE)) && !is_mixed(link, count, ours, owners) &&
                    !meets_plt_entries(link, count, scope, biases);
    return is_plain && note_found(link, count, ours, asked, noted) ? FINE : STRANGE;
}

/* Look at a library and bind its symbols: FINE, or STRANGE, and Python has to.  Nothing is written to it.  own is the
   place of the library in the scope, ours says of each library there whether it is of ours, owners whether any symbol
   is bound to it; files are the names by which the library means what it needs.  There is room for MOST_NOTES. */
int64_t bind_ordinary(
    Link *link, const Kind *kinds, const Load *loads, const uint64_t *tags, const Table *const *scope,
    const uint64_t *biases, const uint8_t *ours, uint8_t *owners, const char *const *files,
    const Table *const *needed, const uint64_t *asked, Noted *noted)
{
    GUARDED(bind_all(link, kinds, loads, tags, scope, biases, ours, owners, files, needed, asked, noted));
}

static int64_t write_all(Link *link, const int64_t *places, const uint64_t *addresses, uint64_t count)
{
    if (link->turn != left.turn)
        return STRANGE;
    for (uint64_t i = 0; i < count; i++) {
        if ((uint64_t)places[i] >= MOST_BOUND)
            return STRANGE;
        left.addresses[places[i]] = addresses[i];
    }
    memset(left.pages, 0, left.page_count);
    int64_t result = put_all(
        &left.job, left.known, left.known_count, &left.packed, NULL, 0, &left.head, left.places, left.places,
        left.symbols, left.addresses, left.found, left.late);
    for (uint64_t page = 0; page < left.page_count; page++)
        link->pages += left.pages[page] != 0;
    link->where = left.job.where;
    link->what = left.job.what;
    return result;
}

/* Write the words of the library that was bound last, with other addresses at some places; STRANGE where another one
   was bound meanwhile, and nothing is written. */
int64_t write_ordinary(Link *link, const int64_t *places, const uint64_t *addresses, uint64_t count)
{
    GUARDED(write_all(link, places, addresses, count));
}
