"""Where musl's dynamic linker looks: its path file, both kinds of path, against itself where it is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import miniloader
from fixtures.build import LOOPS
from miniloader.elf import Source, read_image
from miniloader.loader import musl
from miniloader.loader.root import Root
from miniloader.loader.search import Asker, Machine, Surroundings, places

INTERPRETER = "/lib/ld-musl-x86_64.so.1"
X86_64 = Machine(64, "<", 62)


@pytest.mark.parametrize(
    ("content", "interpreter", "expected"),
    [
        (None, INTERPRETER, ("/lib/", "/usr/local/lib/", "/usr/lib/")),
        ("/lib/musl\n/opt/a:/opt/b\n", INTERPRETER, ("/lib/musl/", "/opt/a/", "/opt/b/")),
        ("", INTERPRETER, ()),
        ("/lib", "/opt/cross/lib/ld-musl-x86_64.so.1", ("/lib/",)),
    ],
)
def test_the_default_directories(
    content: str | None, interpreter: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    """The file is below the directory above the one that the linker is in: its own prefix."""
    above = tmp_path / interpreter.lstrip("/").rpartition("lib/")[0]
    (above / "etc").mkdir(parents=True)
    if content is not None:
        (above / "etc/ld-musl-x86_64.path").write_text(content)
    assert musl.default_directories(Root(tmp_path), interpreter) == expected


def test_the_order_is_musls() -> None:
    """LD_LIBRARY_PATH first; then the paths of all that led here, DT_RUNPATH instead of DT_RPATH."""
    program = Asker("/opt/bin/app", rpath=("/of/app",))
    middle = Asker("/opt/lib/a.so", rpath=("/never",), runpath=("$ORIGIN/a",), loader=program)
    around = Surroundings(Root("/"), X86_64, program, ("/env",), None, ("/lib/",), musl=INTERPRETER)
    found = [(place.rule, place.directories) for place in places("libz.so.1", middle, around)]
    assert found == [
        ("LD_LIBRARY_PATH", ("/env/",)),
        ("DT_RUNPATH", ("/opt/lib/a/",)),
        ("DT_RPATH", ("/of/app/",)),
        ("default directory", ("/lib/",)),
    ]
    assert [place.path for place in places("libpthread.so.0", middle, around)] == [INTERPRETER]


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    if shutil.which("musl-gcc") is None:
        pytest.skip("this machine lacks musl-gcc")

    def compile_with_musl(name: str, *options: str) -> Path:
        source, output = tmp_path / f"{name}.c", tmp_path / f"{name}.so"
        source.write_text(f"int {name}(void) {{ return 1; }}\n")
        subprocess.run(
            ["musl-gcc", "-shared", "-fPIC", "-o", output, f"-Wl,-soname,{name}.so", source, *options],
            check=True,
        )
        return output

    return compile_with_musl


@pytest.mark.parametrize(
    "options", [("-Wl,-rpath,$ORIGIN",), ("-Wl,-rpath,$ORIGIN,--disable-new-dtags",), ()]
)
def test_a_tree_is_what_musls_own_linker_lists(
    options: tuple[str, ...], compiled: Callable[..., Path]
) -> None:
    """A path goes for what is needed further on, too, which with glibc a DT_RUNPATH does not."""
    last = compiled("last")
    middle = compiled("middle", "-Wl,--no-as-needed", str(last))
    first = compiled("first", "-Wl,--no-as-needed", f"-Wl,-rpath-link,{last.parent}", str(middle), *options)
    listed = subprocess.run([INTERPRETER, "--list", first], capture_output=True, text=True, check=False)
    expected = {
        name: (path or None)
        for name, path in re.findall(r"^\t(\w+\.so) => (\S+) \(", listed.stdout, re.MULTILINE)
        if name != "libc.so"
    }
    assert listed.returncode == (0 if options else 127)
    tree = miniloader.tree(first)
    ours = {library.name: library.path for library in tree.libraries if library.path != INTERPRETER}
    assert {name: path for name, path in ours.items() if path is not None} == expected
    assert [library.name for library in tree.missing] == ([] if options else ["middle.so"])
    assert tree.surroundings.musl == INTERPRETER
    image = read_image(Source.open(first))
    assert "libc.so" in image.needed
    image.source.close()


_OPENS = """
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
int main(int count, char **words) {
    void *library = dlopen(words[count - 1], RTLD_NOW);
    if (!library) { puts(dlerror()); return 1; }
    int64_t (*copy)(void *, const void *, uint64_t, uint64_t *) = dlsym(library, "copy");
    char to[4] = "";
    uint64_t where = 0;
    int64_t good = copy(to, "abc", 4, &where), gone = copy(to, (void *)8, 4, &where);
    printf("%d %s %d %d\\n", (int)good, to, (int)gone, (int)where);
    return 0;
}
"""


def test_the_compiled_loops_work_beside_musl(tmp_path: Path) -> None:
    """As check does there: what they have of glibc, musl has as well, the signals' handlers among it."""
    if shutil.which("musl-gcc") is None:
        pytest.skip("this machine lacks musl-gcc")
    (tmp_path / "opens.c").write_text(_OPENS)
    subprocess.run(["musl-gcc", "-o", tmp_path / "opens", tmp_path / "opens.c"], check=True)
    done = subprocess.run([tmp_path / "opens", LOOPS["x86_64"]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "abc", "1", "8"])
