/* What names.c, notes.c, words.c and prepared.c share.  See __init__.py, which declares the same for Python, field by field. */

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Numbers as they lie in a file, which may be anywhere in it. */
typedef uint16_t __attribute__((aligned(1))) u16;
typedef uint32_t __attribute__((aligned(1))) u32;
typedef uint64_t __attribute__((aligned(1))) u64;
typedef int64_t __attribute__((aligned(1))) i64;

enum { FINE, GONE, NO_TABLE, TOO_MUCH, OUTSIDE, NO_KIND, NO_SYMBOL, NOT_RELATIVE, NO_CODE, TOO_FAR, DAMAGED, STRANGE };

/* What is in memory now, read once: a file that is mapped may change at any time, and what was checked has to be what
   is used.  Without this a compiler may read it again. */
#define ONCE(expression)                                                                                               \
    ({                                                                                                                 \
        __typeof__(0 ? (expression) : 0) once_ = (expression);                                                         \
        __asm__("" : "+r"(once_));                                                                                     \
        once_;                                                                                                         \
    })

/* The same of a whole record. */
#define COPY(pointer)                                                                                                  \
    ({                                                                                                                 \
        __typeof__(({ *(pointer); })) copy_;                                                                           \
        __builtin_memcpy(&copy_, (pointer), sizeof copy_);                                                             \
        __asm__("" : "+m"(copy_));                                                                                     \
        copy_;                                                                                                         \
    })

typedef struct {
    uint64_t start, end; /* vaddrs */
} Span;

static inline bool inside(const Span *spans, uint64_t count, uint64_t vaddr, uint64_t size)
{
    for (uint64_t i = 0; i < count; i++)
        if (vaddr >= spans[i].start && vaddr < spans[i].end && size <= spans[i].end - vaddr)
            return true;
    return false;
}

/* ------------------------------------------------------------------------------------------- names */

enum { SHN_UNDEF = 0, SHN_ABS = 0xfff1 };

typedef struct { /* Elf64_Sym */
    u32 name;
    uint8_t info, other;
    u16 shndx;
    u64 value, size;
} Symbol;

typedef struct { /* the dynamic symbols of one library, in memory */
    uint64_t bias;
    const Span *readable; /* what may be read */
    uint64_t readable_count;
    /* From the dynamic section: vaddrs, and numbers. */
    uint64_t strtab, strsz, symtab, gnu_hash, sysv_hash, versym, verneed, verneednum, verdef, verdefnum;
    uint64_t count;        /* of symbols: at first as many as are known to be there, then all */
    uint64_t labels_count; /* the highest index of a version, and one more */
    u32 *labels;           /* of each version by its index: where its name is in strings; 0 for base and none */
    const Symbol *rows;
    const char *strings;
    const u16 *versions; /* of each symbol, or none */
    const u64 *bloom;
    const u32 *buckets, *chains, *sysv_buckets, *sysv_chains;
    uint64_t bloom_mask, shift, bucket_count, chain_count, first, sysv_bucket_count, sysv_chain_count;
} Table;

typedef struct { /* what a symbol is bound to: a library of the scope (-1 for none), and its symbol */
    int64_t owner, symbol;
    uint64_t address, value, size, info, shndx; /* of that one; where there is none, info is its own */
} Definition;

enum { STB_GNU_UNIQUE = 10, STT_GNU_IFUNC = 10 };

static inline bool is_unique(const Definition *definition)
{
    return definition->info >> 4 == STB_GNU_UNIQUE;
}

static inline bool is_indirect(const Definition *definition)
{
    return (definition->info & 0xf) == STT_GNU_IFUNC && definition->shndx != SHN_UNDEF;
}

/* ------------------------------------------------------------------------------------------- words */

/* Formulas; from INDIRECT on they are Python's, and nobody applies COPIED. */
enum { UNKNOWN, NONE, B_A, S_A, S, S_A_P, Z_A, INDIRECT, COPIED, THREAD_LOCAL };
enum { KINDS = 1088 }; /* aarch64 has the highest numbers: those of dynamic relocations are from 1024 on */

typedef struct { /* Elf64_Rela */
    u64 offset;
    u32 type, symbol;
    i64 addend;
} Row;

typedef struct {
    uint8_t formula, size, is_signed, call;
} Kind;

typedef struct { /* a part of a table of relocations, in memory */
    uint64_t address, count;
} Part;

typedef struct {
    uint64_t bias, page_size, start; /* of the pages that are counted, the first vaddr */
    const Kind *kinds;
    const Span *writable; /* what is relocated has to be inside one of them */
    const Span *code;
    const Span *pointers; /* what is relocated here has to point to code */
    const Part *parts;
    uint64_t writable_count, code_count, pointer_count, part_count;
    uint8_t *pages; /* of each page: whether it is written to */
    /* What is wrong: the vaddr that was to be written to, and the kind, or the value that does not fit. */
    uint64_t where, what;
} Job;

/* ------------------------------------------------------------------------------------------- guard.c */

/* Run a loop.  A page that is gone, since the file has been cut short meanwhile, or that may not be read or written,
   ends it with GONE. */
#define GUARDED(loop)                                                                                                  \
    do {                                                                                                               \
        volatile int64_t result_ = GONE;                                                                               \
        guard_begin();                                                                                                 \
        if (sigsetjmp(guard_jump, 0) == 0)                                                                             \
            result_ = (loop);                                                                                          \
        else                                                                                                           \
            result_ = GONE;                                                                                            \
        guard_end();                                                                                                   \
        return result_;                                                                                                \
    } while (0)

extern sigjmp_buf guard_jump;
extern uint64_t guard_where; /* the address that was not to be had */
void guard_begin(void);
void guard_end(void);

/* ------------------------------------------------------------------------------------------- link.c */

enum { MOST_LOADS = 16, MOST_LABELS = 256, MOST_NOTES = 1024, MOST_ASKED = 64, MOST_EXITS = 2 };

typedef struct { /* a PT_LOAD: vaddrs */
    uint64_t start, file_end, end, flags;
} Load;

typedef struct { /* what Python has to see to: see notes.c */
    int64_t note, symbol;
    Definition found;
} Noted;

typedef struct { /* the linking of one library */
    Table table; /* in which others look names up from now on */
    Span readable[MOST_LOADS];
    u32 labels[MOST_LABELS];
    /* What is given. */
    uint64_t bias, page_size, load_count, tag_count, dynamic, dynamic_size, scope_count, own, needed_count,
        asked_count;
    const char *exits[MOST_EXITS];
    /* What is found: which call it was, where the functions are whose names exits has, how many words are thread-local,
       what was noted and how much of it, how many pages were written to, and what is wrong. */
    uint64_t turn, exit_addresses[MOST_EXITS], local_count, noted_count;
    const Noted *noted;
    uint64_t pages, where, what;
} Link;

/* what link.c calls while it is guarded itself */

#define WITHIN __attribute__((visibility("hidden")))
WITHIN int64_t open_all(Table *table, bool check);
WITHIN int64_t list_all(Table *table);
WITHIN int64_t find_missing(const Table *table, const char *file, const Table *other, uint64_t *missing);
/* How to look; CONTINUED takes no longer than the rest of what the look-up before it may have taken. */
enum { PLAIN = 0, VERSIONED = 1, PLT_ENTRIES = 2, NEWEST = 4, CONTINUED = 8 };
enum { UNBOUND = 1, UNIQUE = 2, INDIRECT_FUNCTION = 4 }; /* what was met: needs without a definition, and such symbols */
WITHIN int64_t look_all_up(
    const Table *mine, const int64_t *wanted, uint64_t count, const Table *const *scope, const uint64_t *biases,
    uint64_t tables, int64_t own, int64_t how, Definition *found, uint8_t *indirect, uint8_t *owners,
    uint64_t *met);
WITHIN int64_t look_one_up(
    const char *text, const Table *const *scope, const uint64_t *biases, uint64_t tables, int64_t how,
    Definition *found);
enum { CALLED = 1, POINTED = 2 }; /* how a symbol is used: by slots that only calls go through, and by all else */
WITHIN int64_t survey_rows(Job *job, uint64_t *counts, uint64_t *highest);
WITHIN int64_t mark(Job *job, uint8_t *used, uint64_t symbols);
enum { ALL_LOCAL = KINDS }; /* no type: those of all thread-local words */
WITHIN int64_t copy_rows(
    Job *job, uint64_t type, Row *copies, uint64_t count, const uint8_t *used, uint64_t symbols);
WITHIN int64_t put_all(
    Job *job, const Row *known, uint64_t known_count, const Part *packed, const uint64_t *added, uint64_t adds,
    const Part *head,
    const int64_t *called, const int64_t *pointed, uint64_t symbols, const uint64_t *addresses,
    const Definition *found, const uint8_t *late);
int64_t note(
    const Definition *found, uint64_t count, const uint8_t *ours, const uint64_t *asked, uint64_t asked_count,
    uint64_t *addresses, int64_t *notes, uint64_t room, uint64_t *noted);
