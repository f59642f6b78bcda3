/* The libraries that glibc has loaded: what it tells a callback of theirs, and which are in the global scope.

   Their tables are read where they lie in memory, as ld.so has read them before. */

#define _GNU_SOURCE
#include <link.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* As they lie in a library, which may be anywhere in it. */
typedef uint16_t __attribute__((aligned(1))) u16;
typedef uint32_t __attribute__((aligned(1))) u32;
typedef int64_t __attribute__((aligned(1))) i64;
typedef ElfW(Sym) __attribute__((aligned(1))) Symbol;

typedef struct {
    uint64_t bias;
    const ElfW(Phdr) *headers;
    uint64_t count;
} Host;

typedef struct { /* of its dynamic section: vaddrs, sizes, an offset in the strings */
    uint64_t strings, strings_size, symbols, versions, gnu_hash, sysv_hash, name;
    bool has_name;
    const i64 *entries; /* tag and value of each */
    uint64_t count;
} Tags;

/* Whether the bytes are in readable segments, which may follow one another. */
static bool readable(const Host *host, uint64_t vaddr, uint64_t length)
{
    for (uint64_t i = 0; i < host->count; i++) {
        const ElfW(Phdr) *load = &host->headers[i];
        if (load->p_type != PT_LOAD || !(load->p_flags & PF_R) || vaddr - load->p_vaddr >= load->p_memsz)
            continue;
        uint64_t left = load->p_memsz - (vaddr - load->p_vaddr);
        if (length <= left)
            return true;
        vaddr += left, length -= left;
    }
    return false;
}

/* The vaddr of a pointer: ld.so makes addresses of most of them. */
static uint64_t vaddr_of(const Host *host, uint64_t pointer)
{
    for (uint64_t i = host->count; i-- > 0;)
        if (host->headers[i].p_type == PT_LOAD) {
            uint64_t end = host->headers[i].p_vaddr + host->headers[i].p_memsz;
            return pointer >= host->bias && pointer - host->bias < end ? pointer - host->bias : pointer;
        }
    return pointer;
}

static Tags tags_of(const Host *host)
{
    Tags tags = {0};
    for (uint64_t i = 0; i < host->count; i++) {
        const ElfW(Phdr) *dynamic = &host->headers[i];
        if (dynamic->p_type != PT_DYNAMIC || !readable(host, dynamic->p_vaddr, dynamic->p_memsz))
            continue;
        const i64 *entry = tags.entries = (const i64 *)(host->bias + dynamic->p_vaddr);
        for (uint64_t left = dynamic->p_memsz / 16; left && entry[0] != DT_NULL; left--, entry += 2, tags.count++)
            switch (entry[0]) {
            case DT_STRTAB: tags.strings = vaddr_of(host, (uint64_t)entry[1]); break;
            case DT_STRSZ: tags.strings_size = (uint64_t)entry[1]; break;
            case DT_SYMTAB: tags.symbols = vaddr_of(host, (uint64_t)entry[1]); break;
            case DT_VERSYM: tags.versions = vaddr_of(host, (uint64_t)entry[1]); break;
            case DT_GNU_HASH: tags.gnu_hash = vaddr_of(host, (uint64_t)entry[1]); break;
            case DT_HASH: tags.sysv_hash = vaddr_of(host, (uint64_t)entry[1]); break;
            case DT_SONAME: tags.name = (uint64_t)entry[1], tags.has_name = true; break;
            }
        break;
    }
    return tags;
}

typedef struct {
    uint64_t used, size;
} Room;

/* Append bytes, as many as there is room for: all are counted. */
static void append(Room *room, const void *from, uint64_t length)
{
    if (room->used + length <= room->size)
        memcpy((char *)room + room->used, from, length);
    room->used += length;
}

/* Append a string of the library with its NUL; where it is not in its strings an empty one. */
static void append_text(Room *room, const Host *host, const Tags *tags, uint64_t offset)
{
    if (offset < tags->strings_size && readable(host, tags->strings, tags->strings_size)) {
        const char *text = (const char *)(host->bias + tags->strings + offset);
        append(room, text, strnlen(text, tags->strings_size - offset));
    }
    append(room, "", 1);
}

/* Append its build-id: the first note that is one. */
static void append_build_id(Room *room, const Host *host)
{
    enum { BUILD_ID = 3, HEAD = 12 };
    for (uint64_t i = 0; i < host->count; i++) {
        const ElfW(Phdr) *notes = &host->headers[i];
        if (notes->p_type != PT_NOTE || !readable(host, notes->p_vaddr, notes->p_memsz))
            continue;
        const char *at = (const char *)(host->bias + notes->p_vaddr);
        for (uint64_t left = notes->p_memsz; left >= HEAD;) {
            const u32 *head = (const u32 *)at; /* lengths of name and content, type */
            uint64_t name = (head[0] + UINT64_C(3)) / 4 * 4, content = head[1], length = HEAD + name + (content + 3) / 4 * 4;
            if (HEAD + name + content > left)
                break;
            if (head[2] == BUILD_ID && head[0] == 4 && !memcmp(at + HEAD, "GNU", 4)) {
                append(room, at + HEAD + name, content);
                return;
            }
            if (length > left)
                break;
            at += length, left -= length;
        }
    }
}

/* A callback for dl_iterate_phdr(3), which copies what it is shown to the room that data points at.

   The room begins with how much of it is used, and its size.  Each record begins with how long it is, with the build-id
   and without; then come the struct dl_phdr_info, the program headers, and texts: the path, the SONAME (empty without
   one), what it needs; at last the build-id.  It ends at a multiple of 8 bytes.  What does not fit is counted, and ends
   it.  glibc's lock is held meanwhile: a callback in Python would wait for the interpreter, which a thread that imports
   a module may have. */
int collect(struct dl_phdr_info *info, size_t size, void *data)
{
    Room *room = data;
    Host host = {info->dlpi_addr, info->dlpi_phdr, info->dlpi_phnum};
    Tags tags = tags_of(&host);
    uint64_t lengths[2] = {0}, start = room->used;
    (void)size;
    append(room, lengths, sizeof lengths);
    append(room, info, sizeof *info);
    append(room, info->dlpi_phdr, info->dlpi_phnum * sizeof *info->dlpi_phdr);
    append(room, info->dlpi_name, strlen(info->dlpi_name) + 1);
    append_text(room, &host, &tags, tags.has_name ? tags.name : UINT64_MAX);
    for (uint64_t i = 0; i < tags.count; i++)
        if (tags.entries[2 * i] == DT_NEEDED)
            append_text(room, &host, &tags, (uint64_t)tags.entries[2 * i + 1]);
    lengths[1] = room->used - start;
    append_build_id(room, &host);
    lengths[0] = room->used - start;
    if (room->used <= room->size)
        memcpy((char *)room + start, lengths, sizeof lengths);
    room->used = (room->used + 7) / 8 * 8;
    return room->used > room->size;
}

/* The first symbol that is defined, and the one behind the last; none without a hash table. */
static uint64_t first_symbol(const Host *host, const Tags *tags, uint64_t *end)
{
    const u32 *head = (const u32 *)(host->bias + tags->gnu_hash);
    *end = 0;
    if (tags->gnu_hash && readable(host, tags->gnu_hash, 16)) {
        uint64_t vaddr = tags->gnu_hash + 16 + UINT64_C(8) * head[2], count = head[0];
        const u32 *buckets = (const u32 *)(host->bias + vaddr);
        for (uint64_t i = 0; readable(host, vaddr, 4 * count) && i < count; i++)
            if (buckets[i] >= *end)
                *end = buckets[i] + UINT64_C(1);
        return head[1];
    }
    head = (const u32 *)(host->bias + tags->sysv_hash);
    if (tags->sysv_hash && readable(host, tags->sysv_hash, 8))
        *end = head[1];
    return 1;
}

/* Whether the symbols of a library are in the global scope.

   There is no call that tells; so some of those that it defines are looked up there, by dlsym(3) and its handle of that
   scope.  When all of them are found in other libraries, being in the scope would make no difference. */
int is_global(void *(*look_up)(void *, const char *), void *scope, uint64_t bias, const ElfW(Phdr) *headers,
              uint64_t count)
{
    enum { PROBES = 16, HIDDEN = 0x8000 };
    Host host = {bias, headers, count};
    Tags tags = tags_of(&host);
    uint64_t end, first = first_symbol(&host, &tags, &end);
    end = end > first + PROBES ? first + PROBES : end;
    for (uint64_t i = first; tags.symbols && i < end; i++) {
        const Symbol *symbol = (const Symbol *)(bias + tags.symbols) + i;
        const u16 *version = (const u16 *)(bias + tags.versions) + i;
        if (!readable(&host, (uint64_t)symbol - bias, sizeof *symbol))
            return 0;
        unsigned binding = symbol->st_info >> 4, type = symbol->st_info & 0xf;
        bool hidden =
            tags.versions && readable(&host, (uint64_t)version - bias, sizeof *version) && *version & HIDDEN;
        if (!symbol->st_shndx || hidden || binding == STB_LOCAL || (type != STT_FUNC && type != STT_OBJECT))
            continue;
        if (!readable(&host, tags.strings + symbol->st_name, 1))
            return 0;
        uint64_t address = (uint64_t)look_up(scope, (const char *)(bias + tags.strings + symbol->st_name));
        if (!address)
            return 0;
        if (readable(&host, address - bias, 1))
            return 1;
    }
    return 0;
}
