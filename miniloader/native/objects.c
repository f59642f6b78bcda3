/* Pages of other processes, of which Python has copies: which are equal, and which of CPython's objects lie there.

   The bytes may be any: they are looked at, and lead nowhere.  By which signs an object is told, and why, is said in
   lab/erosion/objects.py, which finds the same without this code. */

#include "loops.h"

enum { HEAD = 48, SMALL = 512 }; /* bytes of a pool's head, and of the largest block of a pool */
static const uint64_t LEAST = 1ull << 20, MOST = 1ull << 47; /* addresses */
/* Pointers that were met lie where a sum of theirs says, or a little further: no bytes make that a long way. */
enum { BITS = 18, PLACES = 1 << BITS, MOST_MET = PLACES / 2, MOST_STEPS_ON = 64, FEW_BITS = 6 };

enum { BEFORE = 5 };
typedef struct { /* where a page lies: in a pool with blocks of a size (0: in none), used up to an end; how far its
                    mapping goes on, and the last words of the page before */
    int64_t size, end, offset, space;
    uint64_t before[BEFORE];
} Surrounding;

typedef struct { /* a pointer that was met (0: none yet), and the number of the type that it leads to (0: to none) */
    uint64_t pointer, type;
} Met;

typedef struct { /* how long its objects are, with the words in front; how many there are, and on how many pages */
    int64_t size, before, count, pages, last_page;
} Type;

typedef struct {
    uint64_t page, word, type;
} Object;

typedef struct { /* pointers that were met, ever, and those of them that are new; objects that are listed */
    uint64_t met, fresh, listed;
} Found;

typedef struct {
    const uint64_t *edges; /* of arenas */
    uint64_t edge_count, arena; /* the edge where that begins which a pointer led into last */
    Met *met;
    uint64_t *fresh;
    Found *found;
} Search;

static uint64_t sum_of(uint64_t pointer, int bits)
{
    return (pointer >> 4) * 0x9e3779b97f4a7c15u >> (64 - bits);
}

/* Which pages, of so many bytes, are equal in both. */
int64_t compare_pages(const uint8_t *first, const uint8_t *second, uint64_t count, uint64_t length, uint8_t *same)
{
    for (uint64_t i = 0; i < count; i++)
        same[i] = memcmp(first + i * length, second + i * length, length) == 0;
    return FINE;
}

/* Whether a pointer leads into an arena: between two edges, of which there is an even number. */
static bool is_in_arena(Search *search, uint64_t pointer)
{
    const uint64_t *edges = search->edges;
    uint64_t low = 0, high = search->edge_count;
    if (high && pointer >= edges[search->arena] && pointer < edges[search->arena + 1])
        return true;
    while (low < high) { /* how many edges are not above it */
        uint64_t middle = (low + high) / 2;
        if (edges[middle] <= pointer)
            low = middle + 1;
        else
            high = middle;
    }
    if (low % 2)
        search->arena = low - 1;
    return low % 2;
}

/* Where a pointer has its place among those that were met; none where it leads into an arena, or there is no room. */
static Met *meet(Search *search, uint64_t pointer)
{
    Met *met = search->met;
    Found *found = search->found;
    uint64_t place = sum_of(pointer, BITS);
    if (is_in_arena(search, pointer))
        return NULL;
    for (int i = 0; i < MOST_STEPS_ON; i++, place = (place + 1) % PLACES) {
        if (met[place].pointer == pointer)
            return &met[place];
        if (met[place].pointer)
            continue;
        if (found->met >= MOST_MET)
            return NULL;
        found->met++;
        search->fresh[found->fresh++] = place;
        met[place].pointer = pointer;
        return &met[place];
    }
    return NULL;
}

static bool is_block(const Surrounding *around, const uint64_t *page, int64_t block, int64_t needed)
{
    if (around->size) {
        int64_t offset = around->offset + 8 * block - HEAD;
        return offset >= 0 && offset < around->end - HEAD && needed <= around->size
               && (uint32_t)offset % (uint32_t)around->size == 0;
    }
    if (block <= -BEFORE)
        return false;
    uint64_t size = (block > 0 ? page[block - 1] : around->before[BEFORE - 1 + block]) & ~7ull;
    return size > SMALL && size < 1ull << 40 && !(size & 8) && (uint64_t)needed <= size - 8
           && (int64_t)size <= around->space - 8 * block + 16;
}

enum { WANTED = 1, HOLDS = 2 }; /* marks of a page: its objects are to be listed; it has some */

/* Count the objects of each type on pages of width words; list those on the pages that are wanted, by the numbers
   that these have among themselves, and mark all that hold any.  Pointers between edges of arenas lead to no type;
   where others lead that were not met before is Python's to say, and fresh has their places.  There is room for all. */
int64_t count_objects(
    const uint64_t *words, uint64_t pages, uint64_t width, const Surrounding *around, uint8_t *marks,
    const uint64_t *edges, uint64_t edge_count, Met *met, Type *types, Object *objects, uint64_t *fresh, Found *found)
{
    Search search = {edges, edge_count, 0, met, fresh, found};
    Met *recent[1 << FEW_BITS]; /* most pointers lead to the same few types, and met is large */
    uint64_t row = 0;
    int64_t last = INT64_MIN; /* the block that was found last */
    for (int i = 0; i < 1 << FEW_BITS; i++)
        recent[i] = met;
    found->fresh = found->listed = 0;
    for (uint64_t number = 0; number < pages; row += marks[number++] & WANTED) {
        const uint64_t *page = words + number * width;
        for (uint64_t word = 0; word + 1 < width; word += 2) {
            uint64_t count = page[word] & 0xffffffffffff, pointer = page[word + 1];
            if (count - 1 >= UINT32_MAX || pointer - LEAST >= MOST - LEAST || pointer & 7)
                continue;
            Met **likely = &recent[sum_of(pointer, FEW_BITS)], *place = *likely;
            if (place->pointer != pointer) {
                place = meet(&search, pointer);
                if (!place)
                    continue;
                *likely = place;
            }
            if (!place->type)
                continue;
            Type *type = &types[place->type];
            int64_t block = (int64_t)word - type->before, whole = (int64_t)(number * width) + block;
            if (!is_block(&around[number], page, block, type->size) || whole == last)
                continue;
            last = whole;
            type->count++;
            if (type->last_page != (int64_t)number + 1)
                type->last_page = (int64_t)number + 1, type->pages++;
            marks[number] |= HOLDS;
            if (marks[number] & WANTED)
                objects[found->listed++] = (Object){row, word, place->type};
        }
    }
    return FINE;
}
