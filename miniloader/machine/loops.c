/* The loops that every word and every name of a library goes through: looking up symbols, writing relocations.

   A library of medium size has a hundred thousand words to relocate.  What one of them takes in Python, or what
   numpy takes for each pass over all of them, is a hundred times what ld.so takes; so these loops are C, and
   nothing else is: which libraries there are, in which order, with which rules, is Python's to say (see loops.py,
   which declares what is here, field by field).  Compiled by "python -m fixtures.build --prebuilt".

   Nothing here trusts the file.  Every index and every vaddr is compared with where it has to be; what does not
   fit ends the loop and is reported by its number.  Pages are filled in a copy and then written by
   process_vm_writev(2): where the file has been cut short meanwhile that fails, a store would end in SIGBUS.

   Sources: gABI chapters 4 and 5, the AMD64 psABI, binutils' description of DT_GNU_HASH, glibc's do_lookup_x
   and check_match (elf/dl-lookup.c) for which definition a name is bound to. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------- names */

enum { SHN_UNDEF = 0, SHN_ABS = 0xfff1 };
enum { STB_LOCAL = 0, STB_GLOBAL = 1, STB_WEAK = 2, STB_GNU_UNIQUE = 10 };
enum { STT_COMMON = 5, STT_TLS = 6, STT_GNU_IFUNC = 10 };
enum { STV_INTERNAL = 1, STV_HIDDEN = 2, STV_PROTECTED = 3 };
enum { VERSION_HIDDEN = 0x8000, VERSION = 0x7fff, OLDEST = 2 };
enum { NO_HASH, GNU_HASH, SYSV_HASH };

typedef struct { /* Elf64_Sym */
    uint32_t name;
    uint8_t info, other;
    uint16_t shndx;
    uint64_t value, size;
} Symbol;

typedef struct { /* the symbols of one library */
    const Symbol *rows;
    const char *strings;
    const uint16_t *versym;   /* of each symbol, or none */
    const uint32_t *versions; /* where in labels the name of each version begins; 0 for base and for none */
    const char *labels;
    const uint64_t *bloom;
    const uint32_t *buckets, *chains;
    uint64_t count, size, version_count;
    uint32_t hash, shift, bloom_mask, bucket_count, chain_count, first;
} Table;

typedef struct { /* what a symbol is bound to: a library of the scope (-1 for none), and its symbol */
    int64_t owner, symbol;
    uint64_t address, value, size, info, shndx;
} Definition;

typedef struct { /* what is looked for */
    const char *text;
    uint64_t length;
    const char *version; /* or none */
    uint32_t gnu; /* its hash */
} Name;

static uint32_t gnu_hash(const char *text, uint64_t length)
{
    uint32_t value = 5381;
    for (uint64_t i = 0; i < length; i++)
        value = value * 33 + (uint8_t)text[i];
    return value;
}

static uint32_t sysv_hash(const char *text, uint64_t length)
{
    uint32_t value = 0;
    for (uint64_t i = 0; i < length; i++) {
        value = (value << 4) + (uint8_t)text[i];
        value = (value ^ ((value & 0xf0000000) >> 24)) & 0x0fffffff;
    }
    return value;
}

/* The name of the symbol's version, unless that is the base version, or it has none. */
static const char *label(const Table *table, uint64_t index)
{
    uint64_t version = table->versym ? table->versym[index] & VERSION : 0;
    uint32_t at = version < table->version_count ? table->versions[version] : 0;
    return at ? table->labels + at : NULL;
}

static Name name_of(const Table *table, uint64_t index, bool versioned)
{
    uint64_t at = table->rows[index].name;
    Name name = {.text = "", .version = versioned ? label(table, index) : NULL};
    if (at < table->size) {
        const char *end = memchr(table->strings + at, 0, table->size - at);
        name.text = table->strings + at;
        name.length = end ? (uint64_t)(end - name.text) : table->size - at;
    }
    name.gnu = gnu_hash(name.text, name.length);
    return name;
}

typedef enum { OTHER, EXACT, VISIBLE } Match;

/* Whether the table's symbol is what is looked for.  A name without a version may mean a symbol that has one
   (VISIBLE), if that is the only one. */
static Match matches(const Table *table, uint64_t index, const Name *name)
{
    if (index >= table->count)
        return OTHER;
    const Symbol *symbol = &table->rows[index];
    unsigned binding = symbol->info >> 4, type = symbol->info & 0xf, visibility = symbol->other & 3;
    if (symbol->shndx == SHN_UNDEF || visibility == STV_INTERNAL || visibility == STV_HIDDEN)
        return OTHER;
    if (binding != STB_GLOBAL && binding != STB_WEAK && binding != STB_GNU_UNIQUE)
        return OTHER;
    if (type == 3 || type == 4 || (type > STT_TLS && type != STT_GNU_IFUNC)) /* sections, files, unknown */
        return OTHER;
    if (symbol->value == 0 && symbol->shndx != SHN_ABS && type != STT_TLS)
        return OTHER;
    if (symbol->name >= table->size || table->size - symbol->name <= name->length)
        return OTHER;
    const char *text = table->strings + symbol->name;
    if (text[name->length] != 0 || memcmp(text, name->text, name->length) != 0)
        return OTHER;
    if (!table->versym)
        return EXACT;
    bool hidden = table->versym[index] & VERSION_HIDDEN;
    if (name->version) {
        const char *version = label(table, index);
        return version ? (strcmp(version, name->version) == 0 ? EXACT : OTHER) : (hidden ? OTHER : EXACT);
    }
    if ((table->versym[index] & VERSION) <= OLDEST)
        return EXACT;
    return hidden ? OTHER : VISIBLE;
}

/* Whether the Bloom filter lets a hash pass; the bits in lowest may be anything. */
static bool may_have(const Table *table, uint32_t hash, uint32_t lowest)
{
    uint64_t word = table->bloom[(hash >> 6) & table->bloom_mask];
    bool first = (word >> (hash & 63)) & 1, second = (word >> ((hash >> table->shift) & 63)) & 1;
    if (!lowest)
        return first && second;
    bool other = (word >> ((hash ^ lowest) & 63)) & 1;
    return (first || other) && (second || !table->shift);
}

/* The table's symbol that the name is bound to; -1 for none. */
static int64_t find(const Table *table, const Name *name)
{
    int64_t visible = -1; /* that is, if there is only one */
    uint64_t index, steps = 0;
    if (table->hash == GNU_HASH) {
        if (!may_have(table, name->gnu, 0))
            return -1;
        index = table->buckets[name->gnu % table->bucket_count];
        index = index >= table->first ? index : UINT64_MAX;
    } else if (table->hash == SYSV_HASH) {
        uint32_t hash = sysv_hash(name->text, name->length);
        index = table->bucket_count ? table->buckets[hash % table->bucket_count] : 0;
    } else {
        index = 0;
    }
    for (;; steps++) {
        bool same = true;
        if (table->hash == GNU_HASH) {
            if (index == UINT64_MAX || index - table->first >= table->chain_count)
                break;
            same = (table->chains[index - table->first] | 1) == (name->gnu | 1);
        } else if (table->hash == SYSV_HASH) {
            if (index == 0 || index >= table->chain_count || steps >= table->chain_count) /* a cycle ends, too */
                break;
        } else if (index >= table->count) {
            break;
        }
        Match match = same ? matches(table, index, name) : OTHER;
        if (match == EXACT)
            return (int64_t)index;
        if (match == VISIBLE)
            visible = visible < 0 ? (int64_t)index : INT64_MAX;
        if (table->hash == GNU_HASH) {
            if (table->chains[index - table->first] & 1)
                break;
            index++;
        } else {
            index = table->hash == SYSV_HASH ? table->chains[index] : index + 1;
        }
    }
    return visible == INT64_MAX ? -1 : visible;
}

/* Look the wanted symbols of a table up in a scope, whose libraries lie at biases; own is the place in it of the
   table's library.

   What is local, hidden, internal or protected is bound at home; so is all that no library before it defines,
   if it defines it itself.  Where own is negative there is no home: names are looked for, no more. */
void look_up(
    const Table *mine, const int64_t *wanted, uint64_t count, const Table *const *scope, const uint64_t *biases,
    uint64_t tables, int64_t own, int64_t versioned, Definition *found)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t index = (uint64_t)wanted[i], last = tables;
        int64_t owner = -1, symbol = -1;
        found[i] = (Definition){.owner = -1};
        if (index >= mine->count)
            continue;
        const Symbol *asked = &mine->rows[index];
        unsigned binding = asked->info >> 4, visibility = asked->other & 3;
        bool defined = asked->shndx != SHN_UNDEF;
        bool at_home = binding == STB_LOCAL || visibility == STV_INTERNAL || visibility == STV_HIDDEN ||
                       (visibility == STV_PROTECTED && defined);
        bool suspect = true;
        if (own >= 0 && (at_home || defined)) {
            last = at_home ? 0 : (uint64_t)own;
            if (mine->hash == GNU_HASH && index >= mine->first && index - mine->first < mine->chain_count) {
                /* Its hash is known but for the lowest bit, and most pass nobody's filter. */
                uint32_t hash = mine->chains[index - mine->first];
                suspect = false;
                for (uint64_t place = 0; place < last && !suspect; place++)
                    suspect = scope[place]->hash != GNU_HASH || may_have(scope[place], hash, 1);
            }
        }
        if (suspect && last) {
            Name name = name_of(mine, index, versioned);
            for (uint64_t place = 0; place < last && symbol < 0; place++) {
                symbol = find(scope[place], &name);
                owner = symbol < 0 ? -1 : (int64_t)place;
            }
        }
        if (owner < 0 && own >= 0 && (at_home || defined)) {
            owner = own;
            symbol = (int64_t)index;
        }
        if (owner < 0)
            continue;
        const Symbol *there = &scope[owner]->rows[symbol];
        found[i] = (Definition){
            owner, symbol, there->value, there->value, there->size, there->info, there->shndx};
        if (there->shndx != SHN_ABS)
            found[i].address += biases[owner];
    }
}

/* ------------------------------------------------------------------------------------------- words */

typedef struct { /* RELOCATION of elf/tables.py, which is Elf64_Rela */
    uint64_t offset;
    uint32_t type, symbol;
    int64_t addend;
} Row;

enum { UNKNOWN, NONE, B_A, S_A, S, S_A_P, Z_A, INDIRECT }; /* formulas; this one and the rest are Python's */
enum { KINDS = 256 };

typedef struct {
    uint8_t formula, size, is_signed, call;
} Kind;

typedef struct {
    uint64_t start, end;
} Span;

typedef struct { /* whole pages that can be written to: of the file (from there on), or anonymous (-1) */
    uint64_t start, end;
    int64_t file_offset;
    uint64_t first; /* the number of its first window */
} Range;

typedef struct {
    uint64_t vaddr, value, size;
} Word;

enum { WINDOW = 1 << 16 }; /* bytes that are worked on at a time: they stay in the processor's cache */
enum { FINE, OUTSIDE, NO_KIND, NO_SYMBOL, NOT_RELATIVE, NO_CODE, TOO_FAR, CUT_SHORT, FAILED };

typedef struct {
    uint64_t bias, page_size;
    int64_t fd;
    const Kind *kinds;
    const Span *segments; /* what is relocated has to be inside one of them */
    const Span *code;
    const Span *pointers; /* what is relocated here has to point to code */
    const Range *ranges;
    uint64_t symbols, segment_count, code_count, pointer_count, range_count, window_count;
    uint16_t *copied;   /* of each window: which of its pages are not as in the file, before */
    uint16_t *written;  /* and which are, besides, now */
    uint64_t *words_of; /* of each window: its first word; and one more */
    Word *words;
    uint8_t *laid; /* of each window: whether its words are written */
    /* What is wrong: a row's number or a vaddr, and errno, or the value that does not fit. */
    uint64_t where, error;
} Job;

static bool inside(const Span *spans, uint64_t count, uint64_t vaddr, uint64_t size)
{
    for (uint64_t i = 0; i < count; i++)
        if (vaddr >= spans[i].start && vaddr < spans[i].end && size <= spans[i].end - vaddr)
            return true;
    return false;
}

/* Whether a word that gets the load bias leads where it has to: constructors and destructors into code. */
static bool leads(const Job *job, uint64_t vaddr, uint64_t value)
{
    return !inside(job->pointers, job->pointer_count, vaddr, 1) || inside(job->code, job->code_count, value, 1);
}

static int64_t fault(Job *job, int64_t reason, uint64_t where)
{
    job->where = where;
    return reason;
}

static const Range *range_at(const Job *job, uint64_t vaddr)
{
    for (const Range *range = job->ranges; range < job->ranges + job->range_count; range++)
        if (vaddr >= range->start && vaddr < range->end)
            return range;
    return NULL;
}

/* The number of the window that a vaddr is in; -1 for none. */
static int64_t window_at(const Job *job, uint64_t vaddr)
{
    const Range *range = range_at(job, vaddr);
    return range ? (int64_t)(range->first + (vaddr - range->start) / WINDOW) : -1;
}

/* Look through rows: how many there are of each kind, and which symbols have to be bound for them. */
int64_t survey(Job *job, const Row *rows, uint64_t count, uint64_t *counts, uint8_t *used)
{
    for (uint64_t i = 0; i < count; i++) {
        const Row *row = &rows[i];
        const Kind *kind = &job->kinds[row->type < KINDS ? row->type : 0];
        if (row->type >= KINDS || kind->formula == UNKNOWN)
            return fault(job, NO_KIND, i);
        counts[row->type]++;
        if (kind->formula == NONE)
            continue;
        if (!inside(job->segments, job->segment_count, row->offset, kind->size))
            return fault(job, OUTSIDE, i);
        if (kind->formula == B_A || kind->formula == INDIRECT)
            continue;
        if (row->symbol >= job->symbols)
            return fault(job, NO_SYMBOL, i);
        used[row->symbol] = 1;
    }
    return FINE;
}

/* What a row makes of its word. */
static uint64_t value_of(
    const Job *job, const Row *row, unsigned formula, uint64_t place, const uint64_t *addresses,
    const Definition *found)
{
    switch (formula) {
    case B_A: return job->bias + (uint64_t)row->addend;
    case S: return addresses[place];
    case S_A: return addresses[place] + (uint64_t)row->addend;
    case Z_A: return found[place].size + (uint64_t)row->addend;
    default: return addresses[place] + (uint64_t)row->addend - (job->bias + row->offset);
    }
}

/* Compute the words of rows that survey found right, and put them in job->words window by window.

   called and pointed say where in found and addresses each symbol is, for calls and for all else; those that are
   late are left for later.  job->words_of is all zero, and has room for one more, at first. */
int64_t compute(
    Job *job, const Row *rows, uint64_t count, const int64_t *called, const int64_t *pointed,
    const uint64_t *addresses, const Definition *found, const uint8_t *late)
{
    uint64_t *words_of = job->words_of;
    for (int turn = 0; turn < 2; turn++) { /* count them, then put them in their places */
        for (uint64_t i = 0; i < count; i++) {
            const Row *row = &rows[i];
            const Kind *kind = &job->kinds[row->type];
            if (kind->formula < B_A || kind->formula > Z_A)
                continue;
            uint64_t place = kind->formula == B_A ? 0 : (uint64_t)(kind->call ? called : pointed)[row->symbol];
            if (kind->formula != B_A && kind->formula != Z_A && late[place])
                continue;
            int64_t window = window_at(job, row->offset);
            if (window < 0)
                return fault(job, OUTSIDE, i);
            if (turn == 0) {
                words_of[window + 2]++;
                continue;
            }
            uint64_t value = value_of(job, row, kind->formula, place, addresses, found);
            if (kind->formula == B_A && !leads(job, row->offset, (uint64_t)row->addend))
                return fault(job, NO_CODE, i);
            if (kind->size == 4 && value != (kind->is_signed ? (uint64_t)(int32_t)value : (uint32_t)value)) {
                job->error = value;
                return fault(job, TOO_FAR, i);
            }
            job->words[words_of[window + 1]++] = (Word){row->offset, value, kind->size};
        }
        for (uint64_t window = 0; turn == 0 && window < job->window_count; window++)
            words_of[window + 2] += words_of[window + 1];
    }
    return FINE;
}

/* A copy of the pages that are worked on.  There is one: callers hold the loader's lock. */
static struct {
    int64_t number; /* of the window; -1 for none */
    uint64_t start, end;
    uint16_t touched; /* which of its pages are changed */
    char bytes[WINDOW];
} now;
static Row rows_read[WINDOW / sizeof(Row)];

/* Copy from or to this process's own memory, at a vaddr.  Where a page is gone, so is the call: EFAULT. */
static int64_t transfer(Job *job, bool writing, uint64_t vaddr, char *bytes, uint64_t length)
{
    uint64_t done = 0;
    while (done < length) {
        char *there = (char *)(job->bias + vaddr + done);
        struct iovec mine = {bytes + done, length - done}, theirs = {there, length - done};
        ssize_t count = writing ? process_vm_writev(getpid(), &mine, 1, &theirs, 1, 0)
                                : process_vm_readv(getpid(), &mine, 1, &theirs, 1, 0);
        if (count < 0 && (errno == EPERM || errno == ENOSYS)) { /* forbidden by a seccomp filter */
            char *page = (char *)((uintptr_t)there & -job->page_size);
            int advice = writing ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
            count = (ssize_t)(length - done);
            if (madvise(page, (size_t)(there + count - page), advice) != 0 && errno != EINVAL) /* before 5.14 */
                count = -1;
            else
                memcpy(writing ? there : bytes + done, writing ? bytes + done : there, (size_t)count);
        }
        if (count <= 0) {
            job->error = (uint64_t)(count < 0 ? errno : EFAULT);
            return fault(job, FAILED, vaddr + done);
        }
        done += (uint64_t)count;
    }
    return FINE;
}

/* Copy the pages of the window that are set in pages. */
static int64_t transfer_pages(Job *job, bool writing, unsigned pages)
{
    for (unsigned page = 0; pages >> page;) {
        if (!((pages >> page) & 1)) {
            page++;
            continue;
        }
        unsigned first = page;
        while ((pages >> page) & 1)
            page++;
        uint64_t start = first * job->page_size, end = page * job->page_size;
        int64_t result = transfer(job, writing, now.start + start, now.bytes + start, end - start);
        if (result != FINE)
            return result;
    }
    return FINE;
}

static void touch(const Job *job, uint64_t vaddr, uint64_t size)
{
    uint64_t first = (vaddr - now.start) / job->page_size, last = (vaddr - now.start + size - 1) / job->page_size;
    now.touched |= (uint16_t)(1u << first | 1u << last);
}

/* Write the window back, its words on it. */
static int64_t leave(Job *job)
{
    if (now.number < 0)
        return FINE;
    uint64_t window = (uint64_t)now.number;
    for (uint64_t i = job->words_of[window]; i < job->words_of[window + 1]; i++) {
        const Word *word = &job->words[i];
        if (word->size > now.end - word->vaddr)
            continue; /* it goes on in the next: see lay_rest */
        memcpy(now.bytes + (word->vaddr - now.start), &word->value, word->size);
        touch(job, word->vaddr, word->size);
    }
    job->laid[window] = 1;
    job->written[window] |= now.touched;
    now.number = -1;
    return transfer_pages(job, true, now.touched);
}

/* Turn to the window that a vaddr is in. */
static int64_t enter(Job *job, uint64_t vaddr)
{
    int64_t result = leave(job);
    if (result != FINE)
        return result;
    const Range *range = range_at(job, vaddr);
    if (!range)
        return fault(job, OUTSIDE, vaddr);
    uint64_t window = range->first + (vaddr - range->start) / WINDOW;
    uint64_t from = (window - range->first) * WINDOW, length = range->end - range->start - from;
    length = length < WINDOW ? length : WINDOW;
    now.start = range->start + from;
    now.end = now.start + length;
    now.touched = 0;
    now.number = (int64_t)window;
    ssize_t got = 0;
    if (range->file_offset >= 0) {
        got = pread((int)job->fd, now.bytes, length, range->file_offset + (int64_t)from);
        if (got < 0) {
            job->error = (uint64_t)errno;
            return fault(job, FAILED, now.start);
        }
    }
    memset(now.bytes + got, 0, length - (uint64_t)got);
    return transfer_pages(job, false, job->copied[window] | job->written[window]);
}

/* Store a word that lies in two windows. */
static int64_t put_across(Job *job, uint64_t vaddr, uint64_t value, uint64_t size)
{
    for (uint64_t end = vaddr; end < vaddr + size; end += size - 1) {
        const Range *range = range_at(job, end);
        if (!range)
            return fault(job, OUTSIDE, vaddr);
        uint64_t page = (end - range->start) % WINDOW / job->page_size;
        job->written[range->first + (end - range->start) / WINDOW] |= (uint16_t)(1u << page);
    }
    return transfer(job, true, vaddr, (char *)&value, size);
}

/* Store, or add to, a word of 8 bytes; where it lies in two windows, in memory itself. */
static int64_t put(Job *job, uint64_t vaddr, uint64_t value, bool add)
{
    uint64_t word = 0;
    if (!inside(job->segments, job->segment_count, vaddr, sizeof word))
        return fault(job, OUTSIDE, vaddr);
    int64_t result = now.number >= 0 && vaddr >= now.start && vaddr < now.end ? FINE : enter(job, vaddr);
    if (result != FINE)
        return result;
    bool whole = sizeof word <= now.end - vaddr;
    char *bytes = now.bytes + (vaddr - now.start);
    if (!whole) {
        result = leave(job);
        bytes = (char *)&word;
        if (result == FINE)
            result = transfer(job, false, vaddr, bytes, sizeof word);
        if (result != FINE)
            return result;
    }
    memcpy(&word, bytes, sizeof word);
    word = (add ? word : 0) + value;
    if (add && !leads(job, vaddr, word - job->bias))
        return fault(job, NO_CODE, vaddr);
    memcpy(bytes, &word, sizeof word);
    if (whole) {
        touch(job, vaddr, sizeof word);
        return FINE;
    }
    return put_across(job, vaddr, word, sizeof word);
}

static int64_t put_relative(Job *job, const Row *rows, uint64_t count, uint64_t number)
{
    /* Most words lie in the window and the segment that the last one was in. */
    uint64_t low = 1, high = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t vaddr = rows[i].offset, value = job->bias + (uint64_t)rows[i].addend;
        unsigned type = rows[i].type;
        if (type >= KINDS || job->kinds[type].formula != B_A)
            return fault(job, NOT_RELATIVE, number + i);
        if (job->pointer_count && !leads(job, vaddr, (uint64_t)rows[i].addend))
            return fault(job, NO_CODE, number + i);
        if (vaddr >= low && vaddr <= high) {
            memcpy(now.bytes + (vaddr - now.start), &value, sizeof value);
            touch(job, vaddr, sizeof value);
            continue;
        }
        int64_t result = put(job, vaddr, value, false);
        if (result != FINE)
            return result;
        low = 1, high = 0;
        for (uint64_t s = 0; now.number >= 0 && s < job->segment_count; s++) {
            const Span *segment = &job->segments[s];
            if (vaddr >= segment->start && vaddr < segment->end) {
                low = segment->start > now.start ? segment->start : now.start;
                high = (segment->end < now.end ? segment->end : now.end) - sizeof value;
                break;
            }
        }
    }
    return FINE;
}

/* Write what is left: windows that were never entered but have words, and words that lie in two windows. */
static int64_t lay_rest(Job *job)
{
    int64_t result = leave(job);
    for (uint64_t window = 0; window < job->window_count && result == FINE; window++) {
        if (job->laid[window] || job->words_of[window] == job->words_of[window + 1])
            continue;
        result = enter(job, job->words[job->words_of[window]].vaddr);
        if (result == FINE)
            result = leave(job);
    }
    for (uint64_t i = 0; i < job->words_of[job->window_count] && result == FINE; i++) {
        Word *word = &job->words[i];
        if (window_at(job, word->vaddr) != window_at(job, word->vaddr + word->size - 1))
            result = put_across(job, word->vaddr, word->value, word->size);
    }
    return result;
}

/* Relocate, in glibc's order: the bias is added to the words at added, then come the words that get bias + addend
   (known rows, then count rows of the file's table at offset), then job->words. */
int64_t relocate(
    Job *job, const uint64_t *added, uint64_t adds, const Row *known, uint64_t known_count, int64_t offset,
    uint64_t count)
{
    now.number = -1;
    int64_t result = put_relative(job, known, known_count, 0);
    for (uint64_t i = 0; i < adds && result == FINE; i++)
        result = put(job, added[i], job->bias, true);
    for (uint64_t done = 0; done < count && result == FINE;) {
        uint64_t part = count - done < WINDOW / sizeof(Row) ? count - done : WINDOW / sizeof(Row);
        size_t length = part * sizeof(Row);
        if (pread((int)job->fd, rows_read, length, offset + (int64_t)(done * sizeof(Row))) != (ssize_t)length)
            return fault(job, CUT_SHORT, done);
        result = put_relative(job, rows_read, part, done);
        done += part;
    }
    return result == FINE ? lay_rest(job) : result;
}
