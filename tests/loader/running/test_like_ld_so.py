"""Small programs that ld.so and ours run side by side: what their libraries do, and what they are told."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import miniloader
from tests.loader.conftest import InChild

NOW, LAZY, GLOBAL = os.RTLD_NOW, os.RTLD_LAZY, os.RTLD_GLOBAL
Story = Callable[[], Any]


def made(path: Path, source: str, *options: str) -> None:
    """A library from C, or from C++ where the path's last part ends in ``xx.so``."""
    language, compiler = ("c++", "g++") if path.name.endswith("xx.so") else ("c", "gcc")
    command = [compiler, "-w", "-O1", "-shared", "-fPIC", "-x", language, "-", "-x", "none", *options]
    subprocess.run([*command, "-o", path.name], input=source, text=True, cwd=path.parent, check=True)


def call(handle: int, name: str) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(_ctypes.dlsym(handle, name))())


def is_mapped(name: str) -> bool:
    return f"/{name}" in Path("/proc/self/maps").read_text()


# --------------------------------------------------------------------------- what is closed, and stays
THREAD_LOCAL: Final = """
extern "C" int setenv(const char *, const char *, int);
struct Noted { int value; Noted() : value(3) {} ~Noted() { setenv("ENDED", "yes", 1); } };
thread_local Noted noted;
extern "C" int use() { return noted.value; }
"""


def of_threads() -> Any:
    """A library whose thread-local object begins as zeros, and is built when it is first used."""
    handle = _ctypes.dlopen("./localxx.so", NOW)
    used, closed, answers = threading.Event(), threading.Event(), list[Any]()

    def work() -> None:
        answers.append(call(handle, "use"))
        used.set()
        closed.wait()

    thread = threading.Thread(target=work)
    thread.start()
    used.wait()
    _ctypes.dlclose(handle)
    answers.append(is_mapped("localxx.so"))
    closed.set()
    thread.join()
    return answers


COUNTED: Final = (
    THREAD_LOCAL
    + """
static int count;
extern "C" int next() { return ++count * 10 + noted.value; }
__attribute__((destructor)) static void end() { setenv("FINALISED", "yes", 1); }
"""
)


def is_finalised() -> bool:
    return bool(ctypes.CDLL(None).getenv(b"FINALISED"))


def of_a_thread_that_goes_on() -> Any:
    """Closed while this thread has an object of it, it is not finalised; opened again it is the same one."""
    answers: list[Any] = []
    for _ in range(3):
        handle = _ctypes.dlopen("./countedxx.so", NOW)
        answers.append(call(handle, "next"))
        _ctypes.dlclose(handle)
        answers.append(is_finalised())
    _ctypes.dlclose(_ctypes.dlopen("./user.so", NOW))
    return [*answers, is_mapped("countedxx.so"), is_mapped("user.so")]


def of_a_thread_that_has_ended() -> Any:
    """What it needs stays as long; both go when next something is closed."""
    answers: list[Any] = []

    def work() -> None:
        handle = _ctypes.dlopen("./usesxx.so", NOW)
        answers.append(call(handle, "uses"))
        _ctypes.dlclose(handle)
        answers.extend([*map(is_mapped, ("usesxx.so", "countedxx.so")), is_finalised()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):  # joined, but its destructors may yet run
        time.sleep(0.001)
    _ctypes.dlclose(_ctypes.dlopen("./user.so", NOW))
    return [*answers, *map(is_mapped, ("usesxx.so", "countedxx.so")), is_finalised()]


OPENS_BESIDE: Final = """
#include <dlfcn.h>
int ask(void) {
    void *handle = dlopen("$ORIGIN/named.so", RTLD_NOW);
    int (*number)(void) = handle ? (int (*)(void))dlsym(handle, "number") : 0;
    return number ? number() : -1;
}
"""


def asked_for_by_a_token() -> Any:
    """ld.so knows what it has by the name that it was asked for, as that was written: wherever $ORIGIN is."""
    handles = [_ctypes.dlopen(f"./{place}/opens.so", NOW) for place in ("one", "two")]
    answers = [call(handle, "ask") for handle in handles]
    return [*answers, call(_ctypes.dlopen("./two/named.so", NOW), "number")]


OPENS_NAMED: Final = OPENS_BESIDE.replace("$ORIGIN/", "")
OPENS_LEAF: Final = """
#include <dlfcn.h>
int middle(void) {
    void *handle = dlopen("leaf.so", RTLD_NOW);
    return handle ? dlclose(handle) : -1;
}
"""
OPENS_MIDDLE: Final = """
#include <dlfcn.h>
int top(void) {
    void *handle = dlopen("middle.so", RTLD_NOW);
    int (*middle)(void) = handle ? (int (*)(void))dlsym(handle, "middle") : 0;
    return middle ? middle() : -2;
}
"""


def along_the_paths_of_who_needs_it() -> Any:
    """As long as that is there; and of who has opened it none are searched for what it needs itself."""
    needs = _ctypes.dlopen("./needs.so", NOW)
    middle = _ctypes.dlopen("middle.so", NOW)
    answers = [call(needs, "top"), call(middle, "middle")]
    _ctypes.dlclose(needs)
    answers += [call(middle, "middle"), is_mapped("needs.so")]
    _ctypes.dlclose(middle)
    opens = _ctypes.dlopen("./opens.so", NOW)
    return [*answers, is_mapped("middle.so"), call(opens, "top"), is_mapped("middle.so")]


def beside_where_it_was_opened() -> Any:
    """$ORIGIN is where a relative path began when the library was opened, wherever the process is by now."""
    os.chdir("one")
    handle = _ctypes.dlopen("./opens.so", NOW)
    os.chdir("../two")
    return call(handle, "ask")


DEEP: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
int given(void) { return 2; }
int ask(void) {
    int (*found)(void) = dlsym(RTLD_DEFAULT, "given");
    return 100 * (dlsym(RTLD_DEFAULT, "other") != 0) + 10 * found() + given();
}
"""


def bound_deep() -> Any:
    """What dlsym(3) finds by default is what the library is bound to: what it has been loaded with first."""
    _ctypes.dlopen("./gives.so", NOW | GLOBAL)
    flags = (NOW | os.RTLD_DEEPBIND, NOW)
    return [call(_ctypes.dlopen(f"./deep{number}.so", flag), "ask") for number, flag in enumerate(flags)]


SETS_ERRNO: Final = """
#include <dlfcn.h>
#include <errno.h>
int ask(void) {
    errno = 7;
    void *none = dlopen("./none.so", RTLD_NOW);
    int told = errno;
    void *handle = dlopen("./sets.so", RTLD_NOW);
    dlsym(handle, "nothing");
    dlopen("none.so", RTLD_NOW);
    return !none * 10000 + told * 100 + errno;
}
"""


def without_a_trace() -> Any:
    """Neither what is found nor what is not changes errno: ld.so has its own."""
    return call(_ctypes.dlopen("./sets.so", NOW), "ask")


def without_room() -> Any:
    """What the kernel does not map is told in ld.so's words."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, resource.RLIM_INFINITY))
    try:
        _ctypes.dlopen("./large.so", NOW)
    except OSError as error:
        return str(error)


def held_for_ever() -> Any:
    """What is never unmapped may be closed more often than it was opened."""
    handle = _ctypes.dlopen("./stays.so", NOW)
    for _ in range(3):
        _ctypes.dlclose(handle)
    return [call(_ctypes.dlopen("./stays.so", NOW), "next"), is_mapped("stays.so")]


UNIQUE: Final = """
inline __attribute__((weak)) int &count() { static int value; return value; }
extern "C" int next() { return ++count(); }
"""


def unique() -> Any:
    """A unique symbol is one for all, dlsym(3) as well; who has it stays, and is finalised in its turn."""
    name, first, second = "_ZZ5countvE5value", *(_ctypes.dlopen(f"./{n}xx.so", NOW) for n in ("one", "two"))
    answers = [call(first, "next"), call(second, "next")]
    answers.append(_ctypes.dlsym(first, name) == _ctypes.dlsym(second, name))
    _ctypes.dlclose(first)
    _ctypes.dlclose(second)
    return [*answers, is_mapped("onexx.so"), is_mapped("twoxx.so")]


# -------------------------------------------------------------------------------- what is bound late
def global_since() -> Any:
    """A slot is bound late: to what has become global since the library was loaded, too."""
    handle = _ctypes.dlopen("./needy.so", LAZY)
    _ctypes.dlopen("./gives.so", NOW | GLOBAL)
    return call(handle, "ask")


# ------------------------------------------------------------- what libraries are told of themselves
ASKS: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <link.h>
#include <stdio.h>
#include <string.h>
int many[3000];
__thread int local = 5;
int use(void) { return local; }
int is_known(int more) { Dl_info info; return dladdr((char *)(many + 3000) + more, &info); }
int behind(void) { return is_known(-1) * 10 + is_known(64); }
static int visit(struct dl_phdr_info *info, size_t size, void *data) {
    const char *name = strrchr(info->dlpi_name, '/');
    if (name && !strcmp(name, "/asks.so")) *(int *)data = info->dlpi_tls_data != 0;
    return 0;
}
int has_block(void) { int found = -1; dl_iterate_phdr(visit, &found); return found; }
__attribute__((noinline)) static int frames(void) {
    void *found[64];
    int count = backtrace(found, 64), of_ours = 0;
    for (int i = 0; i < count; i++) {
        Dl_info info;
        of_ours += dladdr(found[i], &info) && strstr(info.dli_fname, "asks.so");
    }
    return of_ours * 10 + (count > 4);
}
int walk(void) { return frames() + 0 * use(); }
static char text[4096];
const char *lines(void) {
    void *places[] = {walk, (char *)walk + 1, (void *)frames, many + 1, printf, (void *)1};
    char **made = backtrace_symbols(places, 6), *end = text;
    for (int i = 0; i < 6; i++) end += sprintf(end, "%.*s\\n", (int)strcspn(made[i], "["), made[i]);
    FILE *file = tmpfile();
    backtrace_symbols_fd(places, 6, fileno(file));
    rewind(file);
    for (char line[999]; fgets(line, sizeof line, file);)
        end += sprintf(end, "%.*s\\n", (int)strcspn(line, " ["), line); /* glibc 2.43 has a blank there */
    return text;
}
"""


def itself() -> Any:
    """Where it ends, whether the thread has its thread-local storage, and who has called: by backtrace(3)."""
    handle = _ctypes.dlopen("./asks.so", NOW)
    lines = ctypes.CFUNCTYPE(ctypes.c_char_p)(_ctypes.dlsym(handle, "lines"))()
    return [call(handle, name) for name in ("behind", "has_block", "use", "has_block", "walk")] + [lines]


RPATH: Final = ["-Wl,--disable-new-dtags", "-Wl,-rpath,$ORIGIN/apart"]
STORIES: Final[dict[Story, list[tuple[str, str, list[str]]]]] = {
    of_threads: [("localxx.so", THREAD_LOCAL, [])],
    of_a_thread_that_goes_on: [("countedxx.so", COUNTED, []), ("user.so", "", [])],
    of_a_thread_that_has_ended: [
        ("countedxx.so", COUNTED, []),
        ("usesxx.so", 'extern "C" { int next(); int uses() { return next(); } }', ["./countedxx.so"]),
        ("user.so", "", []),
    ],
    asked_for_by_a_token: [
        (f"{place}/{name}.so", source, [])
        for place, number in (("one", 1), ("two", 2))
        for name, source in (("opens", OPENS_BESIDE), ("named", f"int number(void) {{ return {number}; }}"))
    ],
    along_the_paths_of_who_needs_it: [
        ("apart/leaf.so", "", []),
        ("apart/middle.so", OPENS_LEAF, ["-Wl,-soname,middle.so"]),
        ("needs.so", "int middle(void); int top(void) { return middle(); }", ["apart/middle.so", *RPATH]),
        ("opens.so", OPENS_MIDDLE, RPATH),
    ],
    beside_where_it_was_opened: [
        ("one/opens.so", OPENS_NAMED, ["-Wl,-rpath,$ORIGIN"]),
        ("one/named.so", "int number(void) { return 1; }", []),
        ("two/named.so", "int number(void) { return 2; }", []),
    ],
    bound_deep: [
        ("gives.so", "int given(void) { return 5; } int other;", []),
        ("deep0.so", DEEP, []),
        ("deep1.so", DEEP, []),
    ],
    without_a_trace: [("sets.so", SETS_ERRNO, [])],
    without_room: [("large.so", "char room[1l << 32];", [])],
    held_for_ever: [("stays.so", "static int n; int next(void) { return ++n; }", ["-Wl,-z,nodelete"])],
    unique: [("onexx.so", UNIQUE, []), ("twoxx.so", UNIQUE, [])],
    global_since: [
        ("needy.so", "int given(void); int ask(void) { return given(); }", ["-Wl,-z,lazy"]),
        ("gives.so", "int given(void) { return 5; }", []),
    ],
    itself: [("asks.so", ASKS, [])],
}


def _told(story: Story, directory: Path, by_us: bool) -> Any:
    os.chdir(directory)
    if not by_us:
        return story()
    with miniloader.importing(strict=True):
        return story()


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_as_ld_so(story: Story, in_child: InChild, tmp_path: Path) -> None:
    for name, source, options in STORIES[story]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        made(tmp_path / name, source, *options)
    theirs = in_child(_told, story, tmp_path, False)
    assert in_child(_told, story, tmp_path, True) == theirs
    assert theirs


# -------------------------------------------------------------------------- processes of their own
ENDS: Final = """
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>
static void say(const char *word) { write(1, word, 2); }
static void handler(void) { say(NAME "h"); }
__attribute__((constructor)) static void begin(void) { say(NAME "+"); }
__attribute__((destructor)) static void end(void) { say(NAME "-"); }
int registers(void) { return atexit(handler); }
int says(void) { say(NAME "."); return 0; }
int leaves(void) { exit(3); }
static void *leave(void *unused) { exit(4); }
int thread_leaves(void) {
    pthread_t thread;
    pthread_create(&thread, 0, leave, 0);
    return pthread_join(thread, 0);
}
"""
PRELUDE: Final = """
import _ctypes, atexit, builtins, ctypes, os, sys
if len(sys.argv) > 1:
    import miniloader
    imports = miniloader.importing(strict=True)
    imports.__enter__()
def call(handle, name): return ctypes.CFUNCTYPE(ctypes.c_int)(_ctypes.dlsym(handle, name))()
"""
PROGRAM: Final = """
def opened(): return _ctypes.dlopen("./two.so", os.RTLD_NOW)
class Last:
    def __init__(self, handle): self.handle = handle
    def __del__(self, call=call, close=_ctypes.dlclose):
        call(self.handle, "says")
        close(self.handle)
def returns(): call(opened(), "registers")
def has_handlers(): atexit.register(os.write, 1, b"py"); call(opened(), "registers")
def leaves(): handle = opened(); call(handle, "registers"); call(handle, "leaves")
def thread_leaves(): call(opened(), "thread_leaves")
def has_last(): builtins.last = Last(opened())
def asks_nobody():
    try: _ctypes.dlsym(opened(), "nothing")
    except OSError: pass
for story in (returns, has_handlers, leaves, thread_leaves, has_last, asks_nobody):
    child = os.fork()
    if not child:
        story()
        sys.exit(5)
    os.write(1, f" {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])} {story.__name__}\\n".encode())
"""


def by_both(program: str, directory: Path, **variables: str) -> tuple[str, str]:
    """What ``program`` writes with ld.so and with ours, with these ``variables`` in its environment."""
    environment = os.environ | {"PYTHONPATH": str(Path(miniloader.__file__).parents[1]), **variables}
    theirs, ours = (
        subprocess.run(
            [sys.executable, "-c", PRELUDE + program, *way],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            env=environment,
            check=True,
        ).stdout
        for way in ([], ["ours"])
    )
    return theirs, ours


def test_a_process_ends_as_with_ld_so(tmp_path: Path) -> None:
    """In order: what exit(3) has been told of, then destructors; also where a library has called it."""
    made(tmp_path / "one.so", ENDS, '-DNAME="1"')
    made(tmp_path / "two.so", ENDS, '-DNAME="2"', "-Wl,--no-as-needed", "./one.so", "-Wl,-rpath,$ORIGIN")
    theirs, ours = by_both(PROGRAM, tmp_path)
    assert ours.splitlines() == theirs.splitlines()
    assert theirs.splitlines()[2] == "1+2+2h2-1- 3 leaves"


THROWS: Final = """
extern "C" int apply(int (*)());
static int throwing() { throw 7; }
extern "C" int go() { try { return apply(throwing); } catch (int number) { return number; } }
"""


def test_an_exception_comes_through_what_was_loaded_without_libgcc(tmp_path: Path) -> None:
    made(tmp_path / "apply.so", "int apply(int (*f)(void)) { return f() + 1; }")
    made(tmp_path / "throwxx.so", THROWS, "./apply.so")
    program = """
handles = [_ctypes.dlopen(f"./{name}.so", os.RTLD_NOW) for name in ("apply", "throwxx")]
print(call(handles[1], "go"))
"""
    assert by_both(program, tmp_path) == ("7\n", "7\n")


WRAPS: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
void *dlopen(const char *name, int flags) {
    void *(*after)(const char *, int) = dlsym(RTLD_NEXT, "dlopen");
    return after(name, flags);
}
int atoi(const char *text) {
    int (*after)(const char *) = dlsym(RTLD_NEXT, "atoi");
    return after(text) + 1000;
}
static int place_of(const char *version) {
    char *place = version ? dlvsym(RTLD_NEXT, "realpath", version) : dlsym(RTLD_NEXT, "realpath");
    return place ? place - (char *)dlsym(RTLD_NEXT, "free") : 0;
}
int oldest(void) { return place_of("GLIBC_2.2.5"); }
int newer(void) { return place_of("GLIBC_2.3"); }
int newest(void) {
    char *(*after)(const char *, char *) = dlsym(RTLD_NEXT, "realpath");
    char *made = after("/", 0);  /* the oldest refuses this */
    return made && *made == '/';
}
"""


def test_who_stands_before_libc_finds_what_is_after_it(tmp_path: Path) -> None:
    """A preloaded library that wraps functions, dlopen(3) itself among them; in the version that it wants."""
    made(tmp_path / "wraps.so", WRAPS)
    names = ("oldest", "newer", "newest")
    asking = "".join(f"int {name}(void); int ask_{name}(void) {{ return {name}(); }}" for name in names)
    made(tmp_path / "user.so", f'int atoi(const char *); int go(void) {{ return atoi("7"); }} {asking}')
    program = """
handle = _ctypes.dlopen("./user.so", os.RTLD_NOW)
for name in ("go", "ask_oldest", "ask_newer", "ask_newest"): print(call(handle, name))
"""
    preload = {"LD_PRELOAD": str(tmp_path / "wraps.so")}
    theirs, ours = (told.splitlines() for told in by_both(program, tmp_path, **preload))
    assert ours[:3] == theirs[:3]
    assert (ours[0], ours[3]) == ("1007", "1")  # before glibc 2.36 ld.so gives the oldest for the newest


WRAPS_LATE: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
int dlclose(void *handle) {
    static int (*after)(void *);
    if (!after) after = dlsym(RTLD_NEXT, "dlclose");
    return after(handle);
}
int atoi(const char *text) {
    int (*after)(const char *) = dlsym(RTLD_NEXT, "atoi");
    return after ? after(text) + 1000 : 0;
}
char *realpath(const char *name, char *room) {
    char *(*after)(const char *, char *) = dlvsym(RTLD_NEXT, "realpath", VERSION);
    return after ? after(name, room) : 0;
}
"""
CALLS_LATE: Final = """
#include <dlfcn.h>
#include <unistd.h>
int atoi(const char *);
char *realpath(const char *, char *);
__attribute__((destructor)) static void end(void) {
    char room[4096];
    void *handle = dlopen("libz.so.1", RTLD_NOW);
    write(1, handle && !dlclose(handle) ? "c+" : "c-", 2);
    write(1, atoi("7") == 1007 ? "a+" : "a-", 2);
    write(1, realpath("/", room) == room ? "r+" : "r-", 2);
}
"""


def test_who_wraps_functions_finds_them_at_the_very_end(tmp_path: Path) -> None:
    """A preloaded library that looks up what it wraps when it is called first, by a destructor."""
    version = "GLIBC_2.3" if platform.machine() == "x86_64" else "GLIBC_2.17"
    made(tmp_path / "wraps.so", WRAPS_LATE, f'-DVERSION="{version}"')
    made(tmp_path / "late.so", CALLS_LATE)
    program = 'handle = _ctypes.dlopen("./late.so", os.RTLD_NOW)'
    theirs, ours = by_both(program, tmp_path, LD_PRELOAD=str(tmp_path / "wraps.so"))
    assert ours == theirs == "c+a+r+"


FORKS: Final = """
#include <dlfcn.h>
#include <unistd.h>
#include <sys/wait.h>
static int tries(void) {
    void *here = dlopen("./there.so", RTLD_NOW | RTLD_NOLOAD), *new = dlopen("./new.so", RTLD_NOW);
    int (*old)(void) = here ? dlsym(here, "answer") : 0, (*answer)(void) = new ? dlsym(new, "answer") : 0;
    int sum = (old ? old() : 1) + (answer ? answer() : 2);
    return sum + (new && dlclose(new) ? 4 : 0) + (dlopen("./no.so", RTLD_NOW) ? 8 : 0);
}
int forks(void) {
    int status;
    usleep(100000);  /* another thread takes the lock */
    pid_t child = fork();
    if (!child) { alarm(20); _exit(tries()); }
    waitpid(child, &status, 0);
    return status;
}
"""


@pytest.mark.parametrize("busy", [0, 3])
def test_a_library_forks_while_others_have_the_lock(tmp_path: Path, busy: int) -> None:
    """By fork(2), of which Python does not know: in the child a thread holds the lock that is not there."""
    made(tmp_path / "forks.so", FORKS)
    for number, name in (30, "there"), (70, "new"):
        made(tmp_path / f"{name}.so", f"int answer(void) {{ return {number}; }}")
    program = f"""
import threading
handle, there = _ctypes.dlopen("./forks.so", os.RTLD_NOW), _ctypes.dlopen("./there.so", os.RTLD_NOW)
ended = []
def is_busy():
    while not ended: sum(range(1000))
threads = [threading.Thread(target=is_busy) for _ in range({busy})]
for thread in threads: thread.start()
for _ in range(2): print(call(handle, "forks"))
ended.append(1)
"""
    theirs, ours = by_both(program, tmp_path)
    assert ours == theirs == f"{100 << 8}\n" * 2


OPENER: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
static void say(const char *word) { write(1, word, 2); }
int answer(void) { return 6; }
__attribute__((destructor)) static void end(void) {
    void *itself = dlopen("./opener.so", RTLD_NOW | RTLD_NOLOAD);
    say(itself && dlsym(itself, "answer") ? "i+" : "i-");
    say(dlopen("late.so", RTLD_NOW | RTLD_GLOBAL) ? "l+" : "l-");
}
"""


def test_a_destructor_opens_as_any_function_does(tmp_path: Path) -> None:
    """Along its library's RUNPATH; that is there until it has run, and what it opens goes in its turn."""
    (tmp_path / "apart").mkdir()
    made(tmp_path / "apart" / "late.so", ENDS, '-DNAME="L"')
    made(tmp_path / "after.so", ENDS, '-DNAME="A"')
    made(tmp_path / "opener.so", OPENER, "-Wl,-rpath,$ORIGIN/apart")
    program = """
_ctypes.dlclose(_ctypes.dlopen("./opener.so", os.RTLD_NOW))
handle = _ctypes.dlopen("./after.so", os.RTLD_NOW)
os.write(1, b" opened ")
"""
    theirs, ours = by_both(program, tmp_path)
    assert ours == theirs == "i+L+l+A+ opened L-A-"


def test_what_a_destructor_has_opened_keeps_what_it_needs(tmp_path: Path, in_child: InChild) -> None:
    """With ld.so the code that it needs is gone, and calling it ends the process."""
    made(tmp_path / "opener.so", OPENER, "-Wl,-soname,./opener.so", "-Wl,-rpath,$ORIGIN")
    user = "int answer(void); int ask(void) { return answer(); }"
    made(tmp_path / "late.so", user, "./opener.so")

    def story() -> list[Any]:
        os.chdir(tmp_path)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with miniloader.importing(strict=True):
            _ctypes.dlclose(_ctypes.dlopen("./opener.so", NOW))
            answers = [call(_ctypes.dlopen("./late.so", NOW), "ask"), is_mapped("opener.so")]
            other = _ctypes.dlopen("./opener.so", NOW)
            return [*answers, call(other, "answer"), call(_ctypes.dlopen("./late.so", NOW), "ask")]

    assert in_child(story) == [6, True, 6, 6]


def test_what_is_weak_gives_way_where_that_is_asked_for(tmp_path: Path) -> None:
    """LD_DYNAMIC_WEAK: the definition that is not weak, wherever it comes; hidden ones stay."""
    hidden = '__attribute__((weak, visibility("hidden"))) int own(void) { return 5; }'
    hidden += " int call_own(void) { return own(); }"
    weak = "__attribute__((weak)) int given(void) { return 1; }"
    made(tmp_path / "weak.so", weak)
    made(tmp_path / "strong.so", "int given(void) { return 2; } int own(void) { return 6; }")
    needs = ["-Wl,--no-as-needed", "./weak.so", "./strong.so"]
    made(tmp_path / "user.so", f"int given(void); int ask(void) {{ return given(); }} {hidden}", *needs)
    made(tmp_path / "itself.so", f"{weak} int ask(void) {{ return given(); }}", *needs[:1], "./strong.so")
    program = """
for name in ("user", "itself"):
    handle = _ctypes.dlopen(f"./{name}.so", os.RTLD_NOW)
    print(name, call(handle, "ask"), call(handle, "given"))
print(call(_ctypes.dlopen("./user.so", os.RTLD_NOW), "call_own"))
"""
    for variables, number in ({}, 1), ({"LD_DYNAMIC_WEAK": ""}, 2):
        theirs, ours = by_both(program, tmp_path, **variables)
        assert ours == theirs == f"user {number} {number}\nitself {number} {number}\n5\n"
