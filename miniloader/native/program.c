/* Calling a program as CPython's own main calls it: nothing of ours is beneath it, so that who looks at frames sees its
   own alone, and it may go as deep as without us.

   Where a state of CPython has what differs between versions: Python says where, when it has looked.  Callers hold its
   lock. */

#include <stdbool.h>
#include <stdint.h>

typedef struct { /* see loader/running/outermost.py, which makes it */
    uint64_t record; /* where a state has the address of the record of its innermost frame; 0: it is its own */
    uint64_t frame;  /* where that record has the innermost frame; 0 together with the first: hide nothing */
    uint64_t depth;  /* where a state has how many calls it may still make, and behind it the limit; or 0 */
    void *(*call)(void *function, void *argument);
    void (*hold)(void *object);
    void (*raise)(void *type, void *value, void *traceback);
    void (*show)(int is_kept);
} Outermost;

typedef struct {
    uint64_t *place, frame;
    int *left, used; /* which of the calls are ours */
} Hidden;

static Hidden hide(const Outermost *known, char *state, int between)
{
    Hidden hidden = {0};
    if (known->record || known->frame) {
        char *record = known->record ? *(char **)(state + known->record) : state;
        hidden.place = (uint64_t *)(record + known->frame);
        hidden.frame = *hidden.place;
        *hidden.place = 0;
    }
    if (known->depth) {
        hidden.left = (int *)(state + known->depth);
        hidden.used = hidden.left[1] - hidden.left[0] + between;
        hidden.left[0] += hidden.used;
    }
    return hidden;
}

static void uncover(Hidden hidden)
{
    if (hidden.place)
        *hidden.place = hidden.frame;
    if (hidden.left)
        hidden.left[0] -= hidden.used; /* the limit may be another one by now */
}

/* What the function returns; or NULL, and Python's error is set.  So many calls that CPython counts are between this one
   and the program's first. */
void *call_outermost(const Outermost *known, char *state, void *function, void *argument, int between)
{
    Hidden hidden = hide(known, state, between);
    void *result = known->call(function, argument);
    uncover(hidden);
    return result;
}

/* Show an error that nobody has caught, as CPython's own main does: by sys.excepthook, whatever that is. */
void show_outermost(const Outermost *known, char *state, void *type, void *value, void *traceback)
{
    Hidden hidden = hide(known, state, 0);
    known->hold(type);
    known->hold(value);
    known->hold(traceback);
    known->raise(type, value, traceback);
    known->show(1);
    uncover(hidden);
}
