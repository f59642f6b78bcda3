/* Looking up symbols: which definition a name is bound to.

   The tables are read where they lie in memory.  Nothing here trusts them: extents are compared with what may be
   read when a table is opened, and every index, every time, with its table's length; the file may change meanwhile.
   What takes too long ends, too.

   Sources: gABI chapter 5, "Hash Table"; binutils' description of DT_GNU_HASH; the LSB, "Symbol Versioning";
   glibc's do_lookup_x and check_match (elf/dl-lookup.c) for which definition a name is bound to. */

#define _GNU_SOURCE
#include "loops.h"

enum { STB_LOCAL = 0, STB_GLOBAL = 1, STB_WEAK = 2 };
enum { STT_SECTION = 3, STT_FILE = 4, STT_TLS = 6 };
enum { STV_INTERNAL = 1, STV_HIDDEN = 2, STV_PROTECTED = 3 };
enum { VERSION_HIDDEN = 0x8000, VERSION = 0x7fff, OLDEST = 2, BASE = 1, WEAK = 2 };
enum { LONGEST = 4096, LONG_NAMES = 1 << 24, SHORT_CHAIN = 64 };

/* ------------------------------------------------------------------------------------------- tables */

/* Where the length bytes at a vaddr are; NULL where they may not be read. */
static const void *at(const Table *table, uint64_t vaddr, uint64_t length)
{
    return inside(table->readable, table->readable_count, vaddr, length) ? (const char *)(table->bias + vaddr) : NULL;
}

static int64_t open_gnu_hash(Table *table)
{
    const u32 *head = at(table, table->gnu_hash, 16);
    if (!head)
        return NO_TABLE;
    uint64_t buckets = ONCE(head[0]), first = ONCE(head[1]), words = ONCE(head[2]), shift = ONCE(head[3]);
    uint64_t vaddr = table->gnu_hash + 16, last = 0;
    if (buckets == 0 || words == 0 || (words & (words - 1)) || shift >= 32)
        return NO_TABLE;
    table->shift = shift;
    table->bloom = at(table, vaddr, words * 8);
    table->buckets = at(table, vaddr + words * 8, buckets * 4);
    if (!table->bloom || !table->buckets)
        return NO_TABLE;
    for (uint64_t i = 0; i < buckets; i++) {
        uint64_t bucket = ONCE(table->buckets[i]);
        if (bucket && bucket < first)
            return NO_TABLE;
        last = bucket > last ? bucket : last;
    }
    table->bloom_mask = words - 1;
    table->bucket_count = buckets;
    table->first = first;
    vaddr += words * 8 + buckets * 4;
    table->chains = at(table, vaddr, last ? (last - first) * 4 : 0);
    if (last && !table->chains) /* a gap before the last chain */
        return NO_TABLE;
    for (uint64_t end = last; last; end++) { /* the last chain goes on until its end mark */
        const u32 *hash = at(table, vaddr + (end - first) * 4, 4);
        if (!hash)
            return NO_TABLE;
        table->chain_count = end - first + 1;
        if (*hash & 1)
            break;
    }
    return FINE;
}

static int64_t open_sysv_hash(Table *table)
{
    const u32 *head = at(table, table->sysv_hash, 8);
    if (!head)
        return NO_TABLE;
    table->sysv_bucket_count = ONCE(head[0]);
    table->sysv_chain_count = ONCE(head[1]);
    table->sysv_buckets = at(table, table->sysv_hash + 8, (table->sysv_bucket_count + table->sysv_chain_count) * 4);
    if (!table->sysv_buckets)
        return NO_TABLE;
    table->sysv_chains = table->sysv_buckets + table->sysv_bucket_count;
    return FINE;
}

/* Whether any stretch without NUL is longer than names are; in steps of that length, from its end. */
static bool has_long(const Table *table)
{
    for (uint64_t start = 0; start + LONGEST < table->strsz;) {
        const char *end = memrchr(table->strings + start, 0, LONGEST);
        if (!end)
            return true;
        start = (uint64_t)(end - table->strings) + 1;
    }
    return false;
}

/* Whether the names together are far longer than the table they lie in: linkers let names share their ends, but not
   so many.  The same is asked in elf/symbols.py, which then says it. */
static bool too_long(const Table *table)
{
    uint64_t total = 0, most = 16 * table->strsz + LONG_NAMES;
    if (!table->strsz || table->count <= LONG_NAMES / table->strsz || !has_long(table))
        return false;
    for (uint64_t i = 0; i < table->count && total <= most; i++) {
        uint64_t at = ONCE(table->rows[i].name), room = at < table->strsz ? table->strsz - at : 0;
        const char *text = table->strings + at, *end = room ? memchr(text, 0, room) : NULL;
        total += end ? (uint64_t)(end - text) : room;
    }
    return total > most;
}

/* -------------------------------------------------------------------------------------------- versions */

typedef struct { /* Elf64_Verneed */
    u16 version, count;
    u32 file, aux, next;
} Verneed;

typedef struct { /* Elf64_Vernaux */
    u32 hash;
    u16 flags, other;
    u32 name, next;
} Vernaux;

typedef struct { /* Elf64_Verdef */
    u16 version, flags, index, count;
    u32 hash, aux, next;
} Verdef;

typedef struct { /* Elf64_Verdaux */
    u32 name, next;
} Verdaux;

/* Whether the record at a vaddr is linked to another, to which that is moved; more than the file can have are not. */
static bool onward(uint64_t *vaddr, uint64_t step, uint64_t size, uint64_t *left)
{
    *vaddr += step;
    return step >= size && --*left > 0;
}

static bool ends_soon(const Table *table, uint64_t text)
{
    uint64_t room = text < table->strsz ? table->strsz - text : 0;
    return room && memchr(table->strings + text, 0, room < LONGEST ? room : LONGEST);
}

static int64_t note_label(Table *table, uint64_t index, uint64_t text, bool base)
{
    if (!ends_soon(table, text))
        return NO_TABLE;
    if (!table->labels)
        table->labels_count = index + 1 > table->labels_count ? index + 1 : table->labels_count;
    else if (index < table->labels_count)
        table->labels[index] = base ? 0 : (u32)text;
    return FINE;
}

static int64_t list_needed(Table *table)
{
    uint64_t vaddr = table->verneed, left = table->verneednum, many = VERSION_HIDDEN;
    int64_t result = left > VERSION_HIDDEN ? NO_TABLE : FINE;
    while (left && result == FINE) {
        const Verneed *record = at(table, vaddr, sizeof *record);
        if (!record)
            return NO_TABLE;
        Verneed need = COPY(record);
        if (!ends_soon(table, need.file) || need.count > many || (need.next && need.next < sizeof need))
            return NO_TABLE;
        uint64_t there = vaddr + need.aux, rest = need.count;
        many -= need.count;
        while (rest && result == FINE) {
            const Vernaux *inner = at(table, there, sizeof *inner);
            if (!inner)
                return NO_TABLE;
            Vernaux version = COPY(inner);
            if (version.next && version.next < sizeof version)
                return NO_TABLE;
            result = note_label(table, version.other & VERSION, version.name, false);
            if (!onward(&there, version.next, sizeof version, &rest))
                break;
        }
        if (!onward(&vaddr, need.next, sizeof need, &left))
            break;
    }
    return result;
}

static int64_t list_defined(Table *table)
{
    uint64_t vaddr = table->verdef, left = table->verdefnum;
    int64_t result = left > VERSION_HIDDEN ? NO_TABLE : FINE;
    while (left && result == FINE) {
        const Verdef *record = at(table, vaddr, sizeof *record);
        if (!record)
            return NO_TABLE;
        Verdef definition = COPY(record);
        if (definition.next && definition.next < sizeof definition)
            return NO_TABLE;
        const Verdaux *label = at(table, vaddr + definition.aux, sizeof *label);
        if (!label)
            return NO_TABLE;
        result = note_label(table, definition.index & VERSION, ONCE(label->name), definition.flags & BASE);
        if (!onward(&vaddr, definition.next, sizeof definition, &left))
            break;
    }
    return result;
}

int64_t list_all(Table *table)
{
    int64_t result = table->verneed ? list_needed(table) : FINE;
    return table->verdef && result == FINE ? list_defined(table) : result;
}

int64_t open_all(Table *table, bool check)
{
    int64_t result = FINE;
    table->strings = table->strtab ? at(table, table->strtab, table->strsz) : NULL;
    if (check && table->strtab && !table->strings)
        return NO_TABLE;
    /* What is behind the last NUL is no name: patchelf up to 0.14 leaves the beginning of one there. */
    const char *last = table->strings ? memrchr(table->strings, 0, table->strsz) : NULL;
    table->strsz = last ? (uint64_t)(last - table->strings) + 1 : 0;
    if (!table->symtab) {
        result = table->count > 1 ? NO_TABLE : FINE;
        table->count = 0;
        return result;
    }
    if (table->gnu_hash)
        result = open_gnu_hash(table);
    if (table->sysv_hash && result == FINE)
        result = open_sysv_hash(table);
    if (result != FINE)
        return result;
    uint64_t hashed = table->gnu_hash ? table->first + table->chain_count : 0;
    table->count = table->count > hashed ? table->count : hashed;
    table->count = table->count > table->sysv_chain_count ? table->count : table->sysv_chain_count;
    table->rows = at(table, table->symtab, table->count * sizeof(Symbol));
    table->versions = table->versym ? at(table, table->versym, table->count * 2) : NULL;
    if ((!table->rows && table->count) || (table->versym && !table->versions && table->count))
        return NO_TABLE;
    if (check) {
        for (uint64_t i = 0, size = table->strsz ? table->strsz : 1; i < table->count; i++)
            if (table->rows[i].name >= size)
                return NO_TABLE;
        if (too_long(table))
            return NO_TABLE;
    }
    return table->versions ? list_all(table) : FINE;
}

/* Find the tables, how many symbols there are, and how many labels; check: whether every name is in the string table. */
int64_t open_table(Table *table, int64_t check)
{
    GUARDED(open_all(table, check));
}

/* Fill in the labels. */
int64_t list_versions(Table *table)
{
    GUARDED(list_all(table));
}

#ifndef MOST_STEPS /* bytes and links looked at: a third of a second, a hundred times the usual; tests have fewer */
#define MOST_STEPS (1 << 28)
#endif
static int64_t steps;

/* Whether two strings of tables are the same. */
static bool same(const Table *one, uint64_t text, const Table *other, uint64_t another)
{
    if (text >= one->strsz || another >= other->strsz)
        return false;
    if (one == other && text == another)
        return true;
    uint64_t most = one->strsz - text, least = other->strsz - another, length = 0;
    const char *left = one->strings + text, *right = other->strings + another;
    most = most < least ? most : least;
    while (length < most && left[length] && left[length] == right[length])
        length++;
    steps -= (int64_t)length;
    return length < most && left[length] == right[length];
}

/* Whether a table defines the version that another one needs, whose hash is the same then. */
static bool defines(const Table *table, const Table *other, uint32_t hash, uint64_t text)
{
    uint64_t vaddr = table->verdef, left = table->verdefnum < VERSION_HIDDEN ? table->verdefnum : VERSION_HIDDEN;
    while (left && steps-- > 0) {
        const Verdef *definition = at(table, vaddr, sizeof *definition);
        const Verdaux *one = definition ? at(table, vaddr + definition->aux, sizeof *one) : NULL;
        if (!one)
            return false;
        if (definition->hash == hash && same(table, one->name, other, text))
            return true;
        if (!onward(&vaddr, definition->next, sizeof *definition, &left))
            break;
    }
    return false;
}

int64_t find_missing(const Table *table, const char *file, const Table *other, uint64_t *missing)
{
    uint64_t vaddr = table->verneed, left = table->verneednum;
    steps = MOST_STEPS;
    while (table->versions && table->verneed && other->verdef && other->verdefnum && left && steps-- > 0) {
        const Verneed *record = at(table, vaddr, sizeof *record);
        if (!record)
            return NO_TABLE;
        Verneed need = COPY(record);
        if (need.file >= table->strsz)
            return NO_TABLE;
        bool asked = strncmp(table->strings + need.file, file, table->strsz - need.file) == 0;
        uint64_t there = vaddr + need.aux, rest = asked ? need.count : 0;
        while (rest && steps-- > 0) {
            const Vernaux *one = at(table, there, sizeof *one);
            if (!one)
                return NO_TABLE;
            Vernaux version = COPY(one);
            if (!(version.flags & WEAK) && !defines(other, table, version.hash, version.name) && steps > 0) {
                *missing = version.name;
                return FINE;
            }
            if (!onward(&there, version.next, sizeof version, &rest))
                break;
        }
        if (!onward(&vaddr, need.next, sizeof need, &left))
            break;
    }
    return steps > 0 ? FINE : TOO_MUCH;
}

/* The first version (its name in the string table) that the table needs of a file, unless that lets it be missing,
   and that the other table, which is that file's, does not define although it defines versions; 0 for none. */
int64_t missing_version(const Table *table, const char *file, const Table *other, uint64_t *missing)
{
    GUARDED(find_missing(table, file, other, missing));
}

/* ---------------------------------------------------------------------------------------------- names */

typedef struct { /* what is looked for */
    const char *text; /* NULL until it is needed: often the hash suffices */
    uint64_t length;
    const Table *table; /* whose symbol it is */
    uint64_t index, version; /* the name of its version in that one's strings; 0 for none */
    uint32_t hash;
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

/* The name of a symbol's version in the table's strings; 0 for the base version and for none. */
static uint64_t label(const Table *table, uint64_t index)
{
    uint64_t version = table->versions ? ONCE(table->versions[index]) & VERSION : 0;
    return version < table->labels_count ? table->labels[version] : 0;
}

static void read_text(Name *name)
{
    const Table *table = name->table;
    uint64_t text = ONCE(table->rows[name->index].name), room = text < table->strsz ? table->strsz - text : 0;
    const char *end = room ? memchr(table->strings + text, 0, room) : NULL;
    name->text = room ? table->strings + text : "";
    name->length = end ? (uint64_t)(end - name->text) : room;
    steps -= (int64_t)name->length;
}

/* The hash of a symbol that its own table has, without reading its name: a chain has all of it but for the lowest bit,
   and only one of the two leads to the chain that it is in, if there are several. */
static bool know_hash(Name *name)
{
    const Table *table = name->table;
    if (!table->gnu_hash || table->bucket_count < 2 || name->index < table->first ||
        name->index - table->first >= table->chain_count)
        return false;
    name->hash = ONCE(table->chains[name->index - table->first]) & ~1u;
    uint64_t here = ONCE(table->buckets[name->hash % (uint32_t)table->bucket_count]), most = here + SHORT_CHAIN;
    while (here >= table->first && here < name->index && here < most && !(table->chains[here - table->first] & 1))
        here++;
    name->hash |= here != name->index;
    return here != most; /* a long chain is not gone through for each of its symbols */
}

static Name name_of(const Table *table, uint64_t index, bool versioned)
{
    Name name = {.table = table, .index = index, .version = versioned ? label(table, index) : 0};
    if (!know_hash(&name)) {
        read_text(&name);
        name.hash = gnu_hash(name.text, name.length);
    }
    return name;
}

typedef enum { OTHER, EXACT, VISIBLE } Match;

/* Whether the table's symbol is what is looked for.  A name without a version may mean a symbol that has one
   (VISIBLE), if that is the only one.  PLT_ENTRIES are undefined symbols that have a value. */
static Match matches(const Table *table, uint64_t index, Name *name, int64_t how)
{
    if (index >= table->count)
        return OTHER;
    const Symbol *symbol = &table->rows[index];
    unsigned binding = symbol->info >> 4, type = symbol->info & 0xf, visibility = symbol->other & 3;
    bool undefined = symbol->shndx == SHN_UNDEF, entry = undefined && symbol->value;
    if ((how & PLT_ENTRIES) ? !entry : undefined)
        return OTHER;
    if (visibility == STV_INTERNAL || visibility == STV_HIDDEN)
        return OTHER;
    if (binding != STB_GLOBAL && binding != STB_WEAK && binding != STB_GNU_UNIQUE)
        return OTHER;
    if (type == STT_SECTION || type == STT_FILE || (type > STT_TLS && type != STT_GNU_IFUNC))
        return OTHER;
    if (symbol->value == 0 && symbol->shndx != SHN_ABS && type != STT_TLS)
        return OTHER;
    if (!name->text)
        read_text(name);
    uint64_t start = ONCE(symbol->name);
    if (start >= table->strsz || table->strsz - start <= name->length)
        return OTHER;
    const char *text = table->strings + start;
    steps -= (int64_t)name->length;
    if (text[name->length] != 0 || memcmp(text, name->text, name->length) != 0)
        return OTHER;
    if (!table->versions)
        return EXACT;
    bool hidden = table->versions[index] & VERSION_HIDDEN;
    if (name->version) {
        uint64_t version = label(table, index);
        if (version)
            return same(table, version, name->table, name->version) ? EXACT : OTHER;
        return hidden ? OTHER : EXACT;
    }
    /* The base version, and for who is bound without versions the oldest one, even where it is hidden. */
    if ((table->versions[index] & VERSION) <= (how & NEWEST ? BASE : OLDEST))
        return EXACT;
    return hidden ? OTHER : VISIBLE;
}

/* Whether the Bloom filter lets a hash pass. */
static bool may_have(const Table *table, uint32_t hash)
{
    uint64_t word = table->bloom[(hash >> 6) & table->bloom_mask];
    return (word >> (hash & 63)) & (word >> ((hash >> table->shift) & 63)) & 1;
}

/* The table's symbol that the name is bound to; -1 for none. */
static int64_t find(const Table *table, Name *name, int64_t how)
{
    int64_t visible = -1; /* that is, if there is only one */
    uint64_t index = 0, last = table->count;
    uint32_t hash = 0;
    if (table->gnu_hash) {
        if (!table->bloom || !may_have(table, name->hash))
            return -1;
        index = ONCE(table->buckets[name->hash % (uint32_t)table->bucket_count]);
        last = index < table->first ? 0 : table->first + table->chain_count;
    } else if (table->sysv_hash) {
        if (!table->sysv_bucket_count)
            return -1;
        if (!name->text)
            read_text(name);
        index = ONCE(table->sysv_buckets[sysv_hash(name->text, name->length) % table->sysv_bucket_count]);
        last = index ? table->sysv_chain_count : 0;
    }
    while (index < last && steps-- > 0) {
        if (table->gnu_hash)
            hash = table->chains[index - table->first];
        Match match = table->gnu_hash && (hash ^ name->hash) > 1 ? OTHER : matches(table, index, name, how);
        if (match == EXACT)
            return (int64_t)index;
        if (match == VISIBLE)
            visible = visible < 0 ? (int64_t)index : INT64_MAX;
        if (table->gnu_hash && (hash & 1))
            break;
        index = table->gnu_hash || !table->sysv_hash ? index + 1 : (uint64_t)ONCE(table->sysv_chains[index]);
        if (!index)
            break;
    }
    return visible == INT64_MAX ? -1 : visible;
}

/* Search the tables before the last, in order, and note what is found. */
static bool search(
    const Table *const *scope, const uint64_t *biases, uint64_t last, Name *name, int64_t how, Definition *found)
{
    for (uint64_t place = 0; place < last; place++) {
        int64_t symbol = find(scope[place], name, how);
        if (symbol < 0)
            continue;
        const Symbol *there = &scope[place]->rows[symbol];
        *found = (Definition){
            (int64_t)place, symbol, there->value, there->value, there->size, there->info, there->shndx};
        if (there->shndx != SHN_ABS)
            found->address += biases[place];
        return true;
    }
    return false;
}

int64_t look_all_up(
    const Table *mine, const int64_t *wanted, uint64_t count, const Table *const *scope, const uint64_t *biases,
    uint64_t tables, int64_t own, int64_t how, Definition *found, uint8_t *indirect, uint8_t *owners,
    uint64_t *met)
{
    if (!(how & CONTINUED))
        steps = MOST_STEPS;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t index = (uint64_t)wanted[i], last = tables;
        if (index >= mine->count)
            return NO_TABLE;
        Symbol asked = mine->rows[index];
        unsigned visibility = asked.other & 3;
        bool hidden = visibility == STV_INTERNAL || visibility == STV_HIDDEN, defined = asked.shndx != SHN_UNDEF;
        bool at_home = hidden || asked.info >> 4 == STB_LOCAL || (visibility == STV_PROTECTED && defined);
        bool mine_too = own >= 0 && (at_home || defined);
        if (mine_too)
            last = at_home ? 0 : (uint64_t)own;
        found[i] = (Definition){.owner = -1, .info = asked.info};
        if (at_home && (how & PLT_ENTRIES))
            continue;
        if (last) {
            Name name = name_of(mine, index, how & VERSIONED);
            search(scope, biases, last, &name, how, &found[i]);
        }
        if (mine_too && found[i].owner < 0) {
            uint64_t address = asked.value + (asked.shndx == SHN_ABS ? 0 : biases[own]);
            found[i] =
                (Definition){own, (int64_t)index, address, asked.value, asked.size, asked.info, asked.shndx};
        }
        if (found[i].owner < 0) {
            *met |= index && asked.info >> 4 != STB_WEAK ? UNBOUND : 0;
        } else {
            owners[found[i].owner] = 1;
            *met |= is_unique(&found[i]) ? UNIQUE : 0;
            indirect[i] = is_indirect(&found[i]);
            *met |= indirect[i] ? INDIRECT_FUNCTION : 0;
        }
        if (steps <= 0)
            return TOO_MUCH;
    }
    return FINE;
}

/* Look the wanted symbols of a table up in a scope, whose libraries lie at biases; own is the place in it of the
   table's library.

   What is local, hidden, internal or protected is bound at home; so is all that no library before it defines, if it
   defines it itself.  Where own is negative there is no home: names are looked for, no more; but nobody's PLT entry
   stands for what is bound at home.  indirect says which are IFUNCs, owners of each library
   whether it defines any. */
int64_t look_up(
    const Table *mine, const int64_t *wanted, uint64_t count, const Table *const *scope, const uint64_t *biases,
    uint64_t tables, int64_t own, int64_t how, Definition *found, uint8_t *indirect, uint8_t *owners,
    uint64_t *met)
{
    GUARDED(look_all_up(mine, wanted, count, scope, biases, tables, own, how, found, indirect, owners, met));
}

int64_t look_one_up(
    const char *text, const Table *const *scope, const uint64_t *biases, uint64_t tables, int64_t how,
    Definition *found)
{
    Name name = {.text = text, .length = strlen(text), .hash = gnu_hash(text, strlen(text))};
    steps = MOST_STEPS;
    *found = (Definition){.owner = -1};
    search(scope, biases, tables, &name, how, found);
    return steps > 0 ? FINE : TOO_MUCH;
}

/* Look a name up in a scope: PLAIN, as who asks for no version, or the NEWEST. */
int64_t look_name_up(
    const char *text, const Table *const *scope, const uint64_t *biases, uint64_t tables, int64_t how,
    Definition *found)
{
    GUARDED(look_one_up(text, scope, biases, tables, how, found));
}

/* Note of numbers where among them each is: places has room for all up to the highest. */
int64_t list_places(const int64_t *numbers, uint64_t first, uint64_t count, int64_t *places, uint64_t length)
{
    for (uint64_t i = first; i < count; i++) {
        if ((uint64_t)numbers[i] >= length)
            return NO_SYMBOL;
        places[numbers[i]] = (int64_t)i;
    }
    return FINE;
}

static int64_t copy_text(
    const Table *table, uint64_t text, int64_t symbol, char *copy, uint64_t room, uint64_t *length)
{
    if (symbol >= (int64_t)table->count)
        return NO_TABLE;
    text = symbol < 0 ? text : table->rows[symbol].name;
    uint64_t rest = text < table->strsz ? table->strsz - text : 0;
    if (!rest)
        return NO_TABLE;
    const char *end = memchr(table->strings + text, 0, rest);
    *length = end ? (uint64_t)(end - (table->strings + text)) : rest;
    memcpy(copy, table->strings + text, *length < room ? *length : room);
    return FINE;
}

/* Copy a string of the table, or the name of a symbol (unless that is negative), as much of it as there is room for;
   its length. */
int64_t text_at(
    const Table *table, uint64_t text, int64_t symbol, char *copy, uint64_t room, uint64_t *length)
{
    GUARDED(copy_text(table, text, symbol, copy, room, length));
}
