"""Small libraries that ask, each by ld.so and by ours: what they are told is put side by side."""

from __future__ import annotations

import _ctypes
import ctypes
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import pytest

import miniloader
from tests.loader.conftest import InChild
from tests.loader.running.test_like_ld_so import made

HEAD: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static char text[1 << 16], *end = text;
#define tell(...) (end += sprintf(end, __VA_ARGS__))
static void tell_error(void) { const char *error = dlerror(); tell("%s\n", error ? error : "-"); }
static int count(struct dl_phdr_info *info, size_t size, void *counts) {
    unsigned long long *of = counts;
    of[0]++;
    of[1] = info->dlpi_adds;
    of[2] = info->dlpi_subs;
    return 0;
}
static const char *last(const char *path) { return path ? strrchr(path, '/') : "-"; }
"""
#: What a library asks, and the libraries beside it, with the options that they are made with.
CASES: Final[dict[str, tuple[str, dict[str, tuple[str, ...]]]]] = {
    "what has no versions is found by any": (
        """
        const char *names[] = {"plain", "nothing", "both", "old"}, *versions[] = {"V1", "V2", "V9"};
        const char *files[] = {"./without.so", "./with.so"};
        for (int file = 0; file < 2; file++)
            for (int name = 0; name < 4; name++)
                for (int version = 0; version < 3; version++) {
                    int (*f)(void) = dlvsym(dlopen(files[file], RTLD_NOW), names[name], versions[version]);
                    tell("%s %s %d ", names[name], versions[version], f ? f() : 0);
                    tell_error();
                }
        """,
        {
            "without.so": ("int plain(void) { return 1; }",),
            "with.so": (
                "int both(void) { return 2; } int first(void) { return 3; }"
                'int plain(void) { return 4; } __asm__(".symver first, old@V1");',
                "-Wl,--version-script=two.map",
            ),
        },
    ),
    "where what a library needs is searched": (
        """
        const char *files[] = {"./runpath.so", "./rpath.so"};
        for (int file = 0; file < 2; file++) {
            Dl_serinfo sizes, *found;
            void *handle = dlopen(files[file], RTLD_NOW);
            tell("%d ", dlinfo(handle, RTLD_DI_SERINFOSIZE, &sizes));
            found = malloc(sizes.dls_size);
            *found = sizes;
            tell("%d %d %d", dlinfo(handle, RTLD_DI_SERINFO, found), (int)sizes.dls_size, sizes.dls_cnt);
            for (unsigned place = 0; place < found->dls_cnt; place++)
                tell(" %s", found->dls_serpath[place].dls_name);
            tell("\\n");
        }
        """,
        {
            "runpath.so": ("", "-Wl,--enable-new-dtags,-rpath,$ORIGIN/a:/nowhere::b//:/:."),
            "rpath.so": ("", "-Wl,--disable-new-dtags,-rpath,$ORIGIN/a:/nowhere::b//:/:."),
        },
    ),
    "what lies at an address": (
        """
        void *handle = dlopen("./parts.so", RTLD_NOW);
        const char *names[] = {"function", "data", "large", "alias", "local", "of_thread", "absolute"};
        for (int name = 0; name < 7; name++)
            for (int more = 0; more < 3; more++) {
                Dl_info info = {0};
                const ElfW(Sym) *symbol = 0;
                struct link_map *map = 0;
                char *place = dlsym(handle, names[name]);
                if (!strcmp(names[name], "local")) place = ((void *(*)(void))dlsym(handle, "where"))();
                place += more * 40;
                int known = dladdr1(place, &info, (void **)&symbol, RTLD_DL_SYMENT);
                tell("%s+%d %d %s %s", names[name], more * 40, known, last(info.dli_fname),
                     info.dli_sname ? info.dli_sname : "-");
                if (symbol) tell(" size %d info %x", (int)symbol->st_size, symbol->st_info);
                dladdr1(place, &info, (void **)&map, RTLD_DL_LINKMAP);
                if (map) tell(" in %s %d %d", last(map->l_name), (void *)map == handle,
                              map->l_addr == (ElfW(Addr))info.dli_fbase);
                tell("\\n");
            }
        """,
        {
            "parts.so": (
                "int function(void) { return 1; } int data = 3; char large[9000]; static int local = 2;"
                'void *where(void) { return &local; } int alias(void) __attribute__((alias("function")));'
                '__thread int of_thread; __asm__(".globl absolute; absolute = 0x1234");',
            )
        },
    ),
    "whose the functions are that ask": (
        """
        void *functions[] = {dlopen, dlsym, dlvsym, dlclose, dlinfo, dlmopen, dladdr, dl_iterate_phdr};
        for (int function = 0; function < 8; function++) {
            Dl_info info = {0};
            struct link_map *map = 0;
            int known = dladdr1(functions[function], &info, (void **)&map, RTLD_DL_LINKMAP);
            tell("%d %s %s", known, last(info.dli_fname), info.dli_sname ? info.dli_sname : "-");
            tell(" %s %d\\n", map ? last(map->l_name) : "-", dladdr(functions[function], &info));
        }
        """,
        {},
    ),
    "how many libraries there are": (
        """
        unsigned long long counts[3][3] = {0};
        void *handle = 0;
        for (int time = 0; time < 3; time++) {
            dl_iterate_phdr(count, counts[time]);
            if (time == 0) handle = dlopen("./storage.so", RTLD_NOW);
            if (time == 1) tell("closed %d\\n", dlclose(handle));
        }
        for (int time = 1; time < 3; time++)
            for (int number = 0; number < 3; number++)
                tell("%lld ", counts[time][number] - counts[time - 1][number]);
        """,
        {"storage.so": ("__thread int of_thread = 3; int ask(void) { return of_thread; }",)},
    ),
    "who comes next": (
        """
        void *handle = dlopen("./first.so", RTLD_NOW);
        tell("%d\\n", ((int (*)(void))dlsym(handle, "number"))());
        dlopen("./apart.so", RTLD_NOW | RTLD_GLOBAL);
        tell("%d\\n", ((int (*)(void))dlsym(handle, "number"))());
        """,
        {
            f"{name}.so": (
                "#define _GNU_SOURCE\n#include <dlfcn.h>\nint number(void) {"
                f'int (*next)(void) = dlsym(RTLD_NEXT, "number"); return {number} + (next ? next() : 0); }}',
                *(["-Wl,--no-as-needed", f"./{needs}.so"] if needs else []),
            )
            for name, number, needs in (
                ("third", 1, ""), ("second", 10, "third"), ("first", 100, "second"), ("apart", 1000, ""),
            )
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_told_as_by_ld_so(name: str, tmp_path: Path, in_child: InChild) -> None:
    asks, beside = CASES[name]
    (tmp_path / "two.map").write_text("V1 { global: old; }; V2 { global: both; plain; } V1;")
    for file, (source, *options) in beside.items():
        made(tmp_path / file, source, *options)
    made(tmp_path / "asks.so", f"{HEAD} const char *ask(void) {{ {asks} return text; }}")

    def told(ours: bool) -> list[str]:
        os.chdir(tmp_path)
        with miniloader.importing(strict=True) if ours else nullcontext():
            handle = _ctypes.dlopen("./asks.so", os.RTLD_NOW)
            text = ctypes.CFUNCTYPE(ctypes.c_char_p)(_ctypes.dlsym(handle, "ask"))()
        return text.decode().splitlines()  # type: ignore[no-any-return]  # what a function of C returns

    theirs, ours = (in_child(told, by_us) for by_us in (False, True))
    assert ours == theirs
    assert theirs
