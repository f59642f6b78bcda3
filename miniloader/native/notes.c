/* One pass over what symbols are bound to: their addresses, and which of them need more than that. */

#include "loops.h"

enum { OF_UNIQUE, OF_ASKED, OF_RESOLVER }; /* why a place is noted: what is left of its note modulo 4 */

/* The addresses asked for, ascending: few, and mostly in one library. */
static bool is_asked(const uint64_t *asked, uint64_t count, uint64_t address)
{
    if (!count || address < asked[0] || address > asked[count - 1])
        return false;
    for (uint64_t i = 0; i < count; i++)
        if (asked[i] == address)
            return true;
    return false;
}

/* Copy the addresses; note the places of unique symbols, of addresses that are asked for, and of IFUNCs that are not of
   ours: one byte for each library says which are.  How many notes there are, of which as many are made as there is
   room for. */
int64_t note(
    const Definition *found, uint64_t count, const uint8_t *ours, const uint64_t *asked, uint64_t asked_count,
    uint64_t *addresses, int64_t *notes, uint64_t room, uint64_t *noted)
{
    uint64_t made = 0;
    for (uint64_t i = 0; i < count; i++) {
        const Definition *definition = &found[i];
        addresses[i] = definition->address;
        if (definition->owner < 0)
            continue;
        int64_t reasons[2], many = 0;
        if (is_unique(definition))
            reasons[many++] = OF_UNIQUE;
        else if (is_asked(asked, asked_count, definition->address))
            reasons[many++] = OF_ASKED;
        if (is_indirect(definition) && !ours[definition->owner])
            reasons[many++] = OF_RESOLVER;
        for (int64_t *reason = reasons; reason < reasons + many; reason++, made++)
            if (made < room)
                notes[made] = (int64_t)(4 * i) + *reason;
    }
    *noted = made;
    return FINE;
}

/* The places of addresses that are asked for: there is room for all; their number. */
int64_t list_asked(
    const uint64_t *addresses, uint64_t count, const uint64_t *asked, uint64_t asked_count, int64_t *places,
    uint64_t *listed)
{
    for (uint64_t i = 0; i < count; i++)
        if (is_asked(asked, asked_count, addresses[i]))
            places[(*listed)++] = (int64_t)i;
    return FINE;
}

/* The symbols of rows of some kinds, of which one byte each says so: there is room for all; how many there are. */
int64_t list_symbols(
    const Row *rows, uint64_t count, const uint8_t *kinds, int64_t *symbols, uint64_t *listed)
{
    for (uint64_t i = 0; i < count; i++)
        if (rows[i].type < KINDS && kinds[rows[i].type])
            symbols[(*listed)++] = rows[i].symbol;
    return FINE;
}

/* The numbers of the bytes that are not 0, ascending: there is room for all; how many there are. */
int64_t list_set(const uint8_t *bytes, uint64_t count, int64_t *numbers, uint64_t *listed)
{
    for (uint64_t i = 0; i < count; i++)
        if (bytes[i])
            numbers[(*listed)++] = (int64_t)i;
    return FINE;
}
