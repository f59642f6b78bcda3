"""How a process ends whose libraries are ours: each story is ld.so's as well."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.loader.running.test_like_ld_so import by_both, made

SAYS: Final = """
#include <stdlib.h>
#include <unistd.h>
static void say(const char *word) { write(1, word, 2); }
static void handler(void) { say(NAME "h"); }
__attribute__((constructor)) static void begin(void) { say(NAME "+"); }
__attribute__((destructor)) static void end(void) { say(NAME "-"); }
int registers(void) { return atexit(handler); }
"""


def test_who_was_preloaded_is_finalised_before_what_was_opened(tmp_path: Path) -> None:
    """But after those that need it."""
    made(tmp_path / "first.so", SAYS, '-DNAME="F"')
    made(tmp_path / "second.so", SAYS, '-DNAME="S"')
    made(tmp_path / "opened.so", SAYS, '-DNAME="O"')
    made(tmp_path / "user.so", SAYS, '-DNAME="U"', "-Wl,--no-as-needed", "./first.so", "-Wl,-rpath,$ORIGIN")
    program = """
os.environ.pop("LD_PRELOAD")
for name in ("opened", "user"): _ctypes.dlopen(f"./{name}.so", os.RTLD_NOW)
os.write(1, b".")
"""
    theirs, ours = by_both(program, tmp_path, LD_PRELOAD="./first.so ./second.so")
    assert ours == theirs == "S+F+O+U+.S-O-U-F-"


def test_what_was_registered_before_is_called_before_destructors(tmp_path: Path) -> None:
    """exit(3) calls all that it was told of; then comes what was opened, whenever that was."""
    made(tmp_path / "early.so", SAYS.replace("atexit(handler)", "on_exit((void *)handler, 0)"), '-DNAME="E"')
    made(tmp_path / "late.so", SAYS, '-DNAME="L"')
    program = """
if len(sys.argv) > 1:
    imports.__exit__(None, None, None)
early = ctypes.CDLL("./early.so")
early.registers()
if len(sys.argv) > 1:
    imports = miniloader.importing(strict=True)
    imports.__enter__()
_ctypes.dlopen("./late.so", os.RTLD_NOW)
"""
    theirs, ours = by_both(program, tmp_path)
    assert ours == theirs == "E+L+EhE-L-"


OPENS: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
int answer(void) { return 6; }
static void tell(const char *name, int flags, const char *symbol) {
    void *handle = dlopen(name, flags);
    const char *error = dlerror();
    int (*function)(void) = handle ? (int (*)(void))dlsym(handle, symbol) : 0;
    dprintf(1, "%s: %d %s\\n", name, function ? function() : -1, error ? error : "");
}
__attribute__((destructor)) static void end(void) {
    tell("./opens.so", RTLD_NOW | RTLD_NOLOAD, "answer");
    tell("./apart/../opens.so", RTLD_NOW, "answer");
    tell("named.so", RTLD_NOW | RTLD_NOLOAD, "answer");
    tell("late.so", RTLD_NOW | RTLD_NOLOAD, "answer");
    tell("late.so", RTLD_NOW, "late");
    tell("none.so", RTLD_NOW, "late");
    dprintf(1, "%d %d\\n", dlsym(RTLD_DEFAULT, "answer") == (void *)answer, !dlsym(RTLD_DEFAULT, "none"));
    Dl_info info = {0};
    dladdr(answer, &info);
    dprintf(1, "%s\\n", info.dli_fname ? strrchr(info.dli_fname, '/') : "");
}
"""


def test_a_destructor_opens_when_python_has_ended(tmp_path: Path) -> None:
    """Along its library's RUNPATH; what is there already is not loaded again, whatever it is called."""
    (tmp_path / "apart").mkdir()
    made(tmp_path / "apart" / "late.so", "int late(void) { return 4; }")
    made(tmp_path / "opens.so", OPENS, "-Wl,-soname,named.so", "-Wl,-rpath,$ORIGIN/apart")
    theirs, ours = by_both('_ctypes.dlopen("./opens.so", os.RTLD_NOW)', tmp_path)
    assert ours.splitlines() == theirs.splitlines()
    answered = ["./opens.so: 6 ", "./apart/../opens.so: 6 ", "named.so: 6 ", "late.so: -1 ", "late.so: 4 "]
    assert theirs.splitlines()[:5] == answered


NO_ROOM: Final = """
_ctypes.dlopen("./opened.so", os.RTLD_NOW)
if len(sys.argv) > 1:
    imports.__exit__(None, None, None)
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
"""


def test_without_room_for_a_descriptor_they_are_finalised_as_well(tmp_path: Path) -> None:
    made(tmp_path / "opened.so", SAYS, '-DNAME="O"')
    theirs, ours = by_both(NO_ROOM, tmp_path)
    assert ours == theirs == "O+O-"
