/* Calling a loop with what Python has: numbers, and buffers, of which it gets the addresses.

   ctypes would have each of them looked at in Python first, which takes longer than most loops.  Callers hold Python's
   lock. */

#include <stdbool.h>
#include <stdint.h>

enum { MOST = 13, WRITABLE = 1 }; /* numbers that a loop gets; what is asked of a buffer, which is contiguous then */

typedef struct { /* Py_buffer of CPython's stable interface, from 3.11 on */
    void *start, *object;
    int64_t length, item_size;
    int is_readonly, dimensions;
    char *format;
    int64_t *shape, *strides, *suboffsets;
    void *internal;
} Buffer;

static struct { /* of CPython's C interface, in the order of Python's */
    int64_t (*count)(const void *tuple);
    void *(*item)(const void *tuple, int64_t place);
    int (*is_buffer)(const void *value);
    int (*open)(void *value, Buffer *buffer, int flags);
    void (*close)(Buffer *buffer);
    uint64_t (*number)(const void *value);
    const void *(*error)(void);
} interface;

void set_arguments(const void *its_interface)
{
    __builtin_memcpy(&interface, its_interface, sizeof interface);
}

/* What the loop returns, called with the values of a tuple, as many as it takes.  Where one is neither a number nor a
   buffer that may be written, Python's error is set, and nothing is called. */
int64_t call_loop(int64_t (*loop)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                  uint64_t, uint64_t, uint64_t, uint64_t, uint64_t),
                  const void *values)
{
    uint64_t numbers[MOST] = {0};
    Buffer buffers[MOST];
    int opened = 0;
    int64_t count = interface.count(values), result = 0;
    bool is_complete = true;
    for (int64_t i = 0; i < count && i < MOST && is_complete; i++) {
        void *value = interface.item(values, i);
        if (interface.is_buffer(value)) {
            Buffer *buffer = &buffers[opened];
            is_complete = interface.open(value, buffer, WRITABLE) == 0;
            opened += is_complete;
            numbers[i] = is_complete && buffer->length ? (uint64_t)buffer->start : 0;
        } else {
            numbers[i] = interface.number(value);
            is_complete = numbers[i] != UINT64_MAX || !interface.error();
        }
    }
    if (is_complete)
        result = loop(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7],
                      numbers[8], numbers[9], numbers[10], numbers[11], numbers[12]);
    while (opened)
        interface.close(&buffers[--opened]);
    return result;
}
