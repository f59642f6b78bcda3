"""What threads of a library's own ask, which Python does not know; each story is ld.so's as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

SOURCE: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *handle, *begun;
static pthread_t beginner;
static void *opens(void *name) { return dlopen(name, RTLD_NOW); }
static void *in_thread(void *(*function)(void *), void *argument) {
    pthread_t thread;
    void *result = "no thread";
    if (pthread_create(&thread, NULL, function, argument) == 0)
        pthread_join(thread, &result);
    return result;
}
__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("BEGIN");
    if (name) pthread_create(&beginner, NULL, opens, (void *)name);
    if (getenv("HOLD")) handle = dlopen(getenv("HOLD"), RTLD_NOW);
}
__attribute__((destructor)) static void end(void) {
    if (handle) printf("closed: %d\n", dlclose(handle)), fflush(stdout);
}
int opens_in_thread(const char *name) { return in_thread(opens, (void *)name) != NULL; }
int begins(void) { pthread_join(beginner, &begun); return begun != NULL; }

static void *fails(void *name) {
    dlopen(name, RTLD_NOW);
    char *error = dlerror();
    return error ? strdup(error) : NULL;
}
/* Another thread's error is not this one's, nor the other way about. */
int errors_are_a_threads_own(const char *name) {
    dlopen("/no/such/one.so", RTLD_NOW);
    char *theirs = in_thread(fails, (void *)name), *here = dlerror();
    return theirs && strstr(theirs, name) && here && strstr(here, "/no/such/one.so") && !dlerror();
}

static int counted(struct dl_phdr_info *info, size_t size, void *names) {
    *(int *)names += info->dlpi_name != NULL && info->dlpi_phnum > 0;
    return 0;
}
static volatile int stop;
static void *iterates(void *unused) {
    long rounds = 0;
    for (int names = 0; !stop || !rounds; rounds++) {
        dl_iterate_phdr(counted, &names);
        if (names <= 0) return NULL;
        names = 0;
    }
    return (void *)rounds;
}
/* Threads look at all that is there while a library comes and goes. */
int iterate_meanwhile(const char *name) {
    pthread_t threads[3];
    void *rounds;
    int all = 1;
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, iterates, NULL);
    for (int i = 0; i < 10; i++) {
        void *opened = dlopen(name, RTLD_NOW);
        all &= opened && dlclose(opened) == 0;
    }
    stop = 1;
    for (int i = 0; i < 3; i++) pthread_join(threads[i], &rounds), all &= rounds != NULL;
    return all;
}
/* Who an address belongs to, with its symbol and its link map. */
int knows_addresses(void) {
    Dl_info info;
    ElfW(Sym) *symbol = NULL;
    struct link_map *map = NULL;
    return dladdr1(knows_addresses, &info, (void **)&symbol, RTLD_DL_SYMENT) && symbol
        && !strcmp(info.dli_sname, "knows_addresses") && info.dli_saddr == (void *)knows_addresses
        && symbol->st_size > 0 && dladdr1(knows_addresses, &info, (void **)&map, RTLD_DL_LINKMAP) && map
        && map->l_addr == (ElfW(Addr))info.dli_fbase && strstr(map->l_name, "threads.so") != NULL;
}
"""
#: How the library is loaded and its functions called: by ld.so, by us, and by ctypes that is led to us.
WAYS: Final = {
    "ld.so": "library = ctypes.CDLL(PATH)",
    "load": "library = miniloader.load(PATH)",
    "importing": "stack.enter_context(miniloader.importing(strict=True)); library = ctypes.CDLL(PATH)",
    "with Python's lock": """
stack.enter_context(miniloader.importing(strict=True))
library = ctypes.PyDLL(PATH)  # whose functions do not give up the lock: what is asked meanwhile glibc answers
""",
}


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, and beside it one that it opens."""
    at = tmp_path_factory.mktemp("threads")
    for name, text in (("threads", SOURCE), ("opened", "int opened(void) { return 1; }\n")):
        (at / f"{name}.c").write_text(text)
        command = [
            "gcc",
            "-shared",
            "-fPIC",
            "-w",
            "-o",
            at / f"{name}.so",
            at / f"{name}.c",
            "-pthread",
            "-ldl",
        ]
        subprocess.run(command, check=True)
    return at / "threads.so"


def told(way: str, library: Path, story: str, **environment: str) -> list[str]:
    """What a new process prints."""
    code = f"""
import contextlib, ctypes, os, miniloader
PATH, OPENED = {str(library)!r}, {str(library.with_name("opened.so"))!r}.encode()
os.environ.update({environment!r})
with contextlib.ExitStack() as stack:
    {WAYS[way].strip().replace(chr(10), chr(10) + "    ")}
    {story}
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("way", WAYS)
def test_a_thread_opens_a_library_for_who_waits_for_it(way: str, threads: Path) -> None:
    function = "library.opens_in_thread"
    story = f"{function}.argtypes = [ctypes.c_char_p]; print({function}(OPENED))"
    story += "; print(OPENED.decode() in open('/proc/self/maps').read())"
    assert told(way, threads, story) == ["1", "True"]


@pytest.mark.parametrize("way", ["ld.so", "load", "importing"])
def test_threads_of_a_library_ask_as_beside_ld_so(way: str, threads: Path) -> None:
    """One that a constructor has begun; errors, lists of what is loaded, and addresses, in several."""
    story = """
    names = ["begins", "errors_are_a_threads_own", "iterate_meanwhile", "knows_addresses"]
    for name, arguments in zip(names, [(), (b"/no/such/other.so",), (OPENED,), ()]):
        getattr(library, name).argtypes = [ctypes.c_char_p] * len(arguments)
        print(name, getattr(library, name)(*arguments))
"""
    expected = ["begins 1", "errors_are_a_threads_own 1", "iterate_meanwhile 1", "knows_addresses 1"]
    assert told(way, threads, story.strip(), BEGIN=str(threads.with_name("opened.so"))) == expected


@pytest.mark.parametrize("way", ["ld.so", "load", "importing"])
def test_a_destructor_closes_what_its_library_has_opened(way: str, threads: Path) -> None:
    close = "library.close()" if way == "load" else "import _ctypes; _ctypes.dlclose(library._handle)"
    story = f"{close}; print([name in open('/proc/self/maps').read() for name in (PATH, OPENED.decode())])"
    opened = str(threads.with_name("opened.so"))
    assert told(way, threads, story, HOLD=opened) == ["closed: 0", "[False, False]"]
