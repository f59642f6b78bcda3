/* What would take Python too long: calling many functions, resolvers. */

#define _GNU_SOURCE
#include <stdint.h>
#include <sys/auxv.h>

/* Call constructors, which all get the same arguments. */
void call_each(void (*const *functions)(int, void *, void *), uint64_t count, int argc, void *argv, void *envp)
{
    for (uint64_t i = 0; i < count; i++)
        functions[i](argc, argv, envp);
}

/* The function that the resolver of an IFUNC chooses, called as ld.so calls it: glibc's sysdeps/ARCH/dl-irel.h and
   sys/ifunc.h. */
uint64_t choose(uint64_t resolver)
{
#if defined __aarch64__
    enum { HWCAP3 = 29, HWCAP4 = 30 };
    struct {
        unsigned long size, hwcap, hwcap2, hwcap3, hwcap4;
    } processor = {
        sizeof processor, getauxval(AT_HWCAP), getauxval(AT_HWCAP2), getauxval(HWCAP3), getauxval(HWCAP4)};
    const uint64_t has_structure = UINT64_C(1) << 62; /* _IFUNC_ARG_HWCAP */
    return ((uint64_t(*)(uint64_t, const void *))resolver)(processor.hwcap | has_structure, &processor);
#else
    return ((uint64_t(*)(void))resolver)();
#endif
}

/* Call resolvers, in the order of the places of their addresses, and put what they choose there. */
void resolve(uint64_t *addresses, const int64_t *places, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        addresses[places[i]] = choose(addresses[places[i]]);
}

/* From where thread-local storage is counted, in the calling thread. */
uint64_t thread_pointer(void)
{
    return (uint64_t)__builtin_thread_pointer();
}

/* Code has been written here: on aarch64 no processor sees it before its caches do.  As libgcc's __clear_cache does it,
   which is not marked for BTI, and would take the mark from all of this. */
void flush_code(uint64_t start, uint64_t end)
{
#if defined __aarch64__
    uint64_t type, at;
    __asm__ volatile("mrs %0, ctr_el0" : "=r"(type));
    uint64_t data = UINT64_C(4) << (type >> 16 & 15), code = UINT64_C(4) << (type & 15); /* lengths of cache lines */
    for (at = start & -data; at < end; at += data)
        __asm__ volatile("dc cvau, %0" : : "r"(at) : "memory");
    __asm__ volatile("dsb ish" : : : "memory");
    for (at = start & -code; at < end; at += code)
        __asm__ volatile("ic ivau, %0" : : "r"(at) : "memory");
    __asm__ volatile("dsb ish\n\tisb" : : : "memory");
#else
    (void)start, (void)end;
#endif
}
