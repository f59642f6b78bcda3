/* Pages that were relocated beforehand: whether they are what was written, and the words that differ. */

#include "loops.h"

typedef struct { /* see loader/prepared/pages.py */
    u64 offset, addend, definer;
} Value;

static int64_t compare(const uint64_t *words, uint64_t count, uint64_t length, const u64 *sums, uint64_t sum_count)
{
    for (uint64_t i = 0; i < sum_count; i++) {
        uint64_t sum[4] = {0}, end = count - i * length < length ? count - i * length : length;
        const uint64_t *part = words + i * length;
        for (uint64_t j = 0; j + 4 <= end; j += 4)
            for (int k = 0; k < 4; k++)
                sum[k] += part[j + (uint64_t)k];
        for (uint64_t j = end / 4 * 4; j < end; j++)
            sum[0] += part[j];
        if (sum[0] + sum[1] + sum[2] + sum[3] != sums[i])
            return DAMAGED;
    }
    return FINE;
}

/* Whether the sum of each part, so many words long, is what it was; the last part is what is left over. */
int64_t compare_sums(const uint64_t *words, uint64_t count, uint64_t length, const u64 *sums, uint64_t sum_count)
{
    if (!length || sum_count != count / length + 1)
        return DAMAGED;
    GUARDED(compare(words, count, length, sums, sum_count));
}

/* What each value is in this process, without what is added: an offset in a definer's library, by its bias. */
int64_t compute_values(const Value *values, uint64_t count, const uint64_t *biases, uint64_t definers, uint64_t *results)
{
    for (uint64_t i = 0; i < count; i++) {
        if (values[i].definer >= definers)
            return OUTSIDE;
        results[i] = biases[values[i].definer] + values[i].offset;
    }
    return FINE;
}

static int64_t put(char *room, uint64_t size, const u32 *slots, const u32 *numbers, uint64_t count, const Value *values,
                   const uint64_t *results, uint64_t value_count)
{
    for (uint64_t i = 0; i < count; i++) {
        if (size < 8 || slots[i] > size - 8 || numbers[i] >= value_count)
            return OUTSIDE;
        *(u64 *)(room + slots[i]) = results[numbers[i]] + values[numbers[i]].addend;
    }
    return FINE;
}

/* Store the words that differ, each at its slot: the value of its number, and what is added to that. */
int64_t fill_slots(char *room, uint64_t size, const u32 *slots, const u32 *numbers, uint64_t count, const Value *values,
                   const uint64_t *results, uint64_t value_count)
{
    GUARDED(put(room, size, slots, numbers, count, values, results, value_count));
}
