"""A program in C that has Python in it: what it opens itself comes through us, along its own paths."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

import pytest

import miniloader
from tests.loader.running.test_like_ld_so import made

PROGRAM: Final = """
#include <dlfcn.h>
#include <stdio.h>
void Py_Initialize(void);
int PyRun_SimpleString(const char *);
int main(int argc, char **argv) {
    Py_Initialize();
    if (PyRun_SimpleString(argv[1]))
        return 9;
    const char *names[] = {"opened.so", "$ORIGIN/apart/opened.so", "needs.so", "$LIB/none.so"};
    for (int i = 0; i < 4; i++) {
        void *handle = dlopen(names[i], RTLD_NOW);
        const char *error = dlerror();
        int (*number)(void) = handle ? (int (*)(void))dlsym(handle, "number") : 0;
        printf("%s: %d, %s\\n", names[i], number ? number() : 0, error ? error : "");
    }
    return 0;
}
"""
OURS: Final = "import miniloader; imports = miniloader.importing(strict=True); imports.__enter__()"


@pytest.mark.parametrize("tags", ["--enable-new-dtags", "--disable-new-dtags"])
def test_its_own_path_counts_for_what_it_opens(tmp_path: Path, tags: str) -> None:
    """DT_RUNPATH for that alone, DT_RPATH for what that needs as well."""
    directory, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDVERSION")
    if not os.path.exists(f"{directory}/libpython{name}.so"):
        pytest.skip("this machine lacks a libpython to be embedded")
    (tmp_path / "apart").mkdir()
    made(tmp_path / "apart" / "opened.so", "int number(void) { return 5; }", "-Wl,-soname,opened.so")
    needs = "int number(void); int more(void) { return number(); }"
    made(tmp_path / "apart" / "needs.so", needs, "./opened.so")
    paths = f"-Wl,{tags},-rpath,$ORIGIN/apart:{directory}"
    command = ["gcc", "-w", "-xc", "-", "-o", "program", f"-L{directory}", f"-lpython{name}", "-ldl", paths]
    subprocess.run(command, input=PROGRAM, text=True, check=True, cwd=tmp_path)
    roots = [str(Path(miniloader.__file__).parents[1]), *(p for p in sys.path if p.endswith("-packages"))]
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix, "PYTHONPATH": os.pathsep.join(roots)}
    theirs, ours = (
        subprocess.run(
            ["./program", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
        ).stdout.splitlines()
        for code in ("import ctypes", OURS)
    )
    assert ours == theirs
    assert theirs[:2] == ["opened.so: 5, ", "$ORIGIN/apart/opened.so: 5, "]
