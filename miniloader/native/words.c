/* Relocating: what the rows of the tables make of the words of a library.

   The tables are read, and the words written, where they lie in memory.  The file may change at any time, and with
   it what has been looked at before; so each row is judged when it is used.

   Sources: gABI chapter 4, "Relocation"; the AMD64 psABI, table 4.9; the order is that of glibc's
   elf/dynamic-link.h. */

#include "loops.h"
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE /* since Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

enum { WRITTEN = 1, EXPECTED = 2 }; /* a page of the job */
enum { BLOCK = 4096 };              /* rows, which the processor's cache holds while they are looked at again */

static int64_t fault(Job *job, int64_t reason, uint64_t where, uint64_t what)
{
    job->where = where;
    job->what = what;
    return reason;
}

static const Kind *kind_of(const Job *job, uint32_t type)
{
    return &job->kinds[type < KINDS ? type : KINDS - 1]; /* the last is UNKNOWN */
}

int64_t survey_rows(Job *job, uint64_t *counts, uint64_t *highest)
{
    for (const Part *part = job->parts; part < job->parts + job->part_count; part++) {
        const Row *rows = (const Row *)part->address;
        for (const Row *row = rows; row < rows + part->count; row++) {
            uint64_t vaddr = ONCE(row->offset), symbol = ONCE(row->symbol);
            uint32_t type = ONCE(row->type);
            const Kind *kind = kind_of(job, type);
            if (kind->formula == UNKNOWN)
                return fault(job, NO_KIND, vaddr, type);
            counts[type]++;
            if (kind->formula != NONE && !inside(job->writable, job->writable_count, vaddr, kind->size))
                return fault(job, OUTSIDE, vaddr, type);
            if (symbol > *highest)
                *highest = symbol;
        }
    }
    return FINE;
}

/* Look through all rows but the heads of the tables: how many there are of each kind, and the highest symbol. */
int64_t survey(Job *job, uint64_t *counts, uint64_t *highest)
{
    GUARDED(survey_rows(job, counts, highest));
}

int64_t mark(Job *job, uint8_t *used, uint64_t symbols)
{
    for (const Part *part = job->parts; part < job->parts + job->part_count; part++) {
        const Row *rows = (const Row *)part->address;
        for (const Row *row = rows; row < rows + part->count; row++) {
            const Kind *kind = kind_of(job, ONCE(row->type));
            if (kind->formula == NONE || kind->formula == B_A || kind->formula == INDIRECT)
                continue;
            uint64_t symbol = ONCE(row->symbol);
            if (symbol >= symbols)
                return fault(job, NO_SYMBOL, row->offset, symbol);
            used[symbol] |= kind->call ? CALLED : POINTED;
        }
    }
    return FINE;
}

/* Which of the symbols have to be bound. */
int64_t use(Job *job, uint8_t *used, uint64_t symbols)
{
    GUARDED(mark(job, used, symbols));
}

int64_t copy_rows(
    Job *job, uint64_t type, Row *copies, uint64_t count, const uint8_t *used, uint64_t symbols)
{
    uint64_t found = 0;
    for (const Part *part = job->parts; part < job->parts + job->part_count; part++) {
        const Row *rows = (const Row *)part->address;
        for (const Row *at = rows; at < rows + part->count && found < count; at++) {
            Row row = COPY(at);
            const Kind *kind = kind_of(job, row.type);
            if (type == ALL_LOCAL ? kind->formula != THREAD_LOCAL : row.type != type)
                continue;
            if (kind->formula != INDIRECT && (row.symbol >= symbols || !used[row.symbol]))
                return fault(job, NO_SYMBOL, row.offset, row.symbol);
            if (!inside(job->writable, job->writable_count, row.offset, kind->size))
                return fault(job, OUTSIDE, row.offset, row.type);
            copies[found++] = row;
        }
    }
    return found == count ? FINE : fault(job, NO_KIND, 0, type);
}

/* Copy the rows of a kind, of which there are count, and whose symbols are used. */
int64_t gather(
    Job *job, uint64_t type, Row *copies, uint64_t count, const uint8_t *used, uint64_t symbols)
{
    GUARDED(copy_rows(job, type, copies, count, used, symbols));
}

/* Whether a word that gets the load bias leads where it has to: constructors and destructors into code. */
static bool leads(const Job *job, uint64_t vaddr, uint64_t value)
{
    return !inside(job->pointers, job->pointer_count, vaddr, 1) || inside(job->code, job->code_count, value, 1);
}

/* From the first to the last vaddr of spans: what is outside is in none of them, which one comparison tells. */
static Span hull(const Span *spans, uint64_t count)
{
    Span all = {UINT64_MAX, 0};
    for (const Span *span = spans; span < spans + count; span++) {
        all.start = span->start < all.start ? span->start : all.start;
        all.end = span->end > all.end ? span->end : all.end;
    }
    return all;
}

/* Which page of the job a vaddr is in: pages have a power of two of bytes, and dividing would take long. */
static uint64_t page_of(const Job *job, uint64_t vaddr)
{
    return (vaddr - job->start) >> __builtin_ctzll(job->page_size);
}

static void store(Job *job, uint64_t vaddr, uint64_t value, uint64_t size)
{
    memcpy((char *)(job->bias + vaddr), &value, size);
    job->pages[page_of(job, vaddr)] = WRITTEN;
    job->pages[page_of(job, vaddr + size - 1)] = WRITTEN;
}

/* The span to write to that a word is in; NULL for none. */
static const Span *span_of(const Job *job, uint64_t vaddr)
{
    for (const Span *span = job->writable; span < job->writable + job->writable_count; span++)
        if (inside(span, 1, vaddr, sizeof(uint64_t)))
            return span;
    return NULL;
}

static int64_t add_bias(Job *job, const uint64_t *vaddrs, uint64_t count)
{
    const Span *span = NULL; /* that of the last one: most are in it */
    for (uint64_t i = 0; i < count; i++) {
        uint64_t value;
        if (!span || !inside(span, 1, vaddrs[i], sizeof value))
            span = span_of(job, vaddrs[i]);
        if (!span)
            return fault(job, OUTSIDE, vaddrs[i], 0);
        memcpy(&value, (const char *)(job->bias + vaddrs[i]), sizeof value);
        if (!leads(job, vaddrs[i], value))
            return fault(job, NO_CODE, vaddrs[i], value);
        store(job, vaddrs[i], job->bias + value, sizeof value);
    }
    return FINE;
}

/* A RELR table: even entries are the vaddrs of words; the odd ones behind are bitmaps of the 63 words that follow. */
static int64_t add_packed(Job *job, const u64 *entries, uint64_t count)
{
    uint64_t vaddr = 0, vaddrs[64];
    bool started = false; /* a bitmap before any vaddr is of no words */
    for (uint64_t i = 0; i < count; i++) {
        uint64_t entry = ONCE(entries[i]), many = 0;
        if (!(entry & 1)) {
            vaddrs[many++] = vaddr = entry;
            vaddr += sizeof entry;
            started = true;
        } else if (started) {
            for (uint64_t bits = entry >> 1, word = vaddr; bits; bits >>= 1, word += sizeof entry)
                if (bits & 1)
                    vaddrs[many++] = word;
            vaddr += 63 * sizeof entry;
        }
        int64_t result = add_bias(job, vaddrs, many);
        if (result != FINE)
            return result;
    }
    return FINE;
}

/* Have the kernel copy, all at once, the pages that the rows are about to write to and no word has been written to:
   half of what it takes to come to each by a fault.  Where it cannot, each word's own fault does. */
static void copy_pages_of(const Job *job, const Row *rows, uint64_t count)
{
    uint64_t low = UINT64_MAX, high = 0, size = job->page_size, last = -size; /* where the last one's page begins */
    for (const Row *row = rows; row < rows + count; row++) {
        uint64_t vaddr = ONCE(row->offset);
        if (vaddr - last < size)
            continue;
        unsigned formula = kind_of(job, ONCE(row->type))->formula;
        if (formula < B_A || formula > Z_A || !inside(job->writable, job->writable_count, vaddr, 1))
            continue;
        uint64_t page = page_of(job, vaddr);
        last = vaddr & -size;
        if (job->pages[page])
            continue;
        job->pages[page] = EXPECTED;
        low = page < low ? page : low;
        high = page > high ? page : high;
    }
    for (uint64_t page = low; page <= high && low != UINT64_MAX; page++) {
        uint64_t first = page;
        while (page <= high && job->pages[page] == EXPECTED)
            job->pages[page++] = WRITTEN;
        if (page > first)
            madvise((char *)(job->bias + job->start + first * size), (page - first) * size, MADV_POPULATE_WRITE);
    }
}

/* Where, on the page of a word of this span, words may begin about which nothing has to be found out: none of them
   has to lead into code, and none lies on two pages. */
static Span words_alike(const Job *job, const Span *span, const Span *pointers, uint64_t vaddr)
{
    uint64_t start = vaddr & -job->page_size, end = start + job->page_size;
    Span words = {start > span->start ? start : span->start, (end < span->end ? end : span->end) - sizeof end + 1};
    bool is_plain = words.start < words.end && (pointers->start >= words.end || pointers->end <= words.start);
    return is_plain ? words : (Span){0, 0};
}

/* Rows that do nothing but add the load bias: nearly all of a large library's, and each instruction here is done
   hundreds of thousands of times; so what was found of one is kept for those of its page that follow. */
static int64_t put_relative(Job *job, const Row *rows, uint64_t count)
{
    uint64_t bias = job->bias, relative = UINT64_MAX; /* the type of the last one */
    Span alike = {0, 0}, pointers = hull(job->pointers, job->pointer_count);
    for (uint64_t begin = 0; begin < count; begin += BLOCK) {
        const Row *end = rows + (count - begin < BLOCK ? count : begin + BLOCK);
        copy_pages_of(job, rows + begin, (uint64_t)(end - rows) - begin);
        for (const Row *row = rows + begin; row < end; row++) {
            uint64_t vaddr = ONCE(row->offset), addend = (uint64_t)ONCE(row->addend), value = bias + addend;
            uint32_t type = ONCE(row->type);
            if (type == relative && vaddr - alike.start < alike.end - alike.start) {
                memcpy((char *)(bias + vaddr), &value, sizeof value);
                continue;
            }
            if (kind_of(job, type)->formula != B_A)
                return fault(job, NOT_RELATIVE, vaddr, type);
            const Span *span = span_of(job, vaddr);
            if (!span)
                return fault(job, OUTSIDE, vaddr, type);
            if (!leads(job, vaddr, addend))
                return fault(job, NO_CODE, vaddr, addend);
            store(job, vaddr, value, sizeof value);
            relative = type;
            alike = words_alike(job, span, &pointers, vaddr);
        }
    }
    return FINE;
}

/* The rows of the tables but for their heads; places say where in found and addresses each symbol is, for calls and
   for all else.  What is late, and what is Python's, is left. */
static int64_t put_symbolic(
    Job *job, const int64_t *called, const int64_t *pointed, uint64_t symbols, const uint64_t *addresses,
    const Definition *found, const uint8_t *late)
{
    for (const Part *part = job->parts; part < job->parts + job->part_count; part++) {
        const Row *rows = (const Row *)part->address;
        for (const Row *at = rows; at < rows + part->count; at++) {
            uint64_t done = (uint64_t)(at - rows);
            if (done % BLOCK == 0)
                copy_pages_of(job, at, part->count - done < BLOCK ? part->count - done : BLOCK);
            Row row = COPY(at);
            const Kind *kind = kind_of(job, row.type);
            if (kind->formula < B_A || kind->formula > Z_A)
                continue;
            uint64_t value = (uint64_t)row.addend;
            if (!inside(job->writable, job->writable_count, row.offset, kind->size))
                return fault(job, OUTSIDE, row.offset, row.type);
            if (kind->formula == B_A) {
                if (!leads(job, row.offset, value))
                    return fault(job, NO_CODE, row.offset, value);
                value += job->bias;
            } else {
                if (row.symbol >= symbols)
                    return fault(job, NO_SYMBOL, row.offset, row.symbol);
                int64_t place = (kind->call ? called : pointed)[row.symbol];
                if (kind->formula == Z_A)
                    value += found[place].size;
                else if (late[place])
                    continue;
                else if (kind->formula == S)
                    value = addresses[place];
                else
                    value += addresses[place] - (kind->formula == S_A_P ? job->bias + row.offset : 0);
            }
            if (kind->size == 4 && value != (kind->is_signed ? (uint64_t)(int32_t)value : (uint32_t)value))
                return fault(job, TOO_FAR, row.offset, value);
            store(job, row.offset, value, kind->size);
        }
    }
    return FINE;
}

/* Relocate: known rows, the RELR table, the words at added, the head of the file's table, then all else. */
int64_t put_all(
    Job *job, const Row *known, uint64_t known_count, const Part *packed, const uint64_t *added, uint64_t adds,
    const Part *head,
    const int64_t *called, const int64_t *pointed, uint64_t symbols, const uint64_t *addresses,
    const Definition *found, const uint8_t *late)
{
    int64_t result = put_relative(job, known, known_count);
    if (result == FINE)
        result = add_packed(job, (const u64 *)packed->address, packed->count);
    if (result == FINE)
        result = add_bias(job, added, adds);
    if (result == FINE)
        result = put_relative(job, (const Row *)head->address, head->count);
    return result == FINE ? put_symbolic(job, called, pointed, symbols, addresses, found, late) : result;
}

int64_t relocate(
    Job *job, const Row *known, uint64_t known_count, const Part *packed, const uint64_t *added, uint64_t adds,
    const Part *head,
    const int64_t *called, const int64_t *pointed, uint64_t symbols, const uint64_t *addresses,
    const Definition *found, const uint8_t *late)
{
    GUARDED(put_all(
        job, known, known_count, packed, added, adds, head, called, pointed, symbols, addresses, found, late));
}
