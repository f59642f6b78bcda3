"""The verdicts of ``miniloader.check`` beside glibc's, on libraries as they are and on ones made wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import miniloader
from miniloader.elf.dynamic import DT_SYMTAB
from miniloader.elf.symbols import sysv_hash
from miniloader.errors import ElfError, EvidenceError, LoadError, MiniloaderError, ProcessGone, UsageError
from miniloader.kernel import procfs
from miniloader.lab.check.bindings import bindings
from miniloader.lab.check.check import Checker
from miniloader.lab.check.releases import limit_of
from miniloader.lab.check.rules import LOAD_RULES
from miniloader.lab.check.shared_object import Shelf
from tests.lab.audit.told_processes import wait_until_at_rest
from tests.lab.check.conftest import OpenEach, ldd_complains, open_each_in_python

Make = Callable[[Path], Path]
GLIBC = tuple(map(int, (os.confstr("CS_GNU_LIBC_VERSION") or "glibc 0").split()[1].split(".")))
COPYING = "#include <string.h>\nvoid *f(void *a, void *b) { return memcpy(a, b, 9999); }"


def compile_library(path: Path, source: str, *options: str) -> Path:
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", path, "-xc", "-", *options]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def with_dependency(directory: Path, source: str = "int dep(void); int f(void) { return dep(); }") -> Path:
    compile_library(directory / "libdep.so", "int dep(void) { return 1; }", "-Wl,-soname,libdep.so")
    place = f"-L{directory}", "-ldep", f"-Wl,-rpath,{directory}"
    return compile_library(directory / "libuser.so", source, "-Wl,--no-as-needed", *place)


# --------------------------------------------------------------------------------------- what is wrong
def missing_library(directory: Path) -> Path:
    user = with_dependency(directory)
    (directory / "libdep.so").unlink()
    return user


def missing_version(directory: Path) -> Path:
    script = directory / "map"
    script.write_text("V1 { global: old; }; V2 { global: dep; } V1;")
    source = "int dep(void) { return 1; } int old(void) { return 2; }"
    compile_library(
        directory / "libdep.so", source, "-Wl,-soname,libdep.so", f"-Wl,--version-script={script}"
    )
    place = f"-L{directory}", "-ldep", f"-Wl,-rpath,{directory}"
    user = compile_library(directory / "libuser.so", "int dep(void); int f(void) { return dep(); }", *place)
    script.write_text("V1 { global: old; dep; };")
    compile_library(
        directory / "libdep.so", source, "-Wl,-soname,libdep.so", f"-Wl,--version-script={script}"
    )
    return user


def undefined_symbol(directory: Path) -> Path:
    source = "int strlenn(const char *); int caller(const char *s) { return strlenn(s); }"
    return compile_library(directory / "libundefined.so", source)


def patched(path: Path, offset: int, octets: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(octets)] = octets
    path.write_bytes(data)
    return path


def wrong_machine(directory: Path) -> Path:
    return patched(compile_library(directory / "libother.so", "int f;"), 18, b"\xb7\0")


def wrong_class(directory: Path) -> Path:
    user = with_dependency(directory)
    patched(directory / "libdep.so", 4, b"\1")
    return user


def executable_stack(directory: Path) -> Path:
    return compile_library(directory / "libstack.so", "int f;", "-Wl,-z,execstack")


def text_relocation(directory: Path) -> Path:
    source = "int g; int *f(void) { return &g; }"
    options = "-fno-pic", "-mcmodel=large", "-Wl,-z,notext"
    return compile_library(directory / "libtext.so", source, *options)


def static_tls(directory: Path) -> Path:
    source = "__thread char large[4096]; char *f(void) { return large; }"
    return compile_library(directory / "libtls.so", source, "-ftls-model=initial-exec")


def abi_marker(directory: Path) -> Path:
    source = '#include <stdio.h>\nint a; int *p = &a; void f(void) { puts(""); }'
    library = compile_library(directory / "librelr.so", source, "-Wl,-z,pack-relative-relocs")
    data, marker = library.read_bytes(), b"GLIBC_ABI_DT_RELR"
    assert marker in data, "this linker packs no relocations"
    old, new = struct.pack("<I", sysv_hash(marker)), struct.pack("<I", sysv_hash(b"GLIBC_2.2.5"))
    assert data.count(old) == 1
    library.write_bytes(data.replace(old, new).replace(marker, b"GLIBC_2.2.5\0\0\0\0\0\0"))
    return library


def malformed(directory: Path) -> Path:
    library = compile_library(directory / "libcut.so", "int f;")
    library.write_bytes(library.read_bytes()[:700])
    return library


def runpath_leaves_root(directory: Path) -> Path:
    return compile_library(directory / "librunpath.so", "int f;", "-Wl,-rpath,$ORIGIN/" + "../" * 30 + "lib")


def duplicate_symbol(directory: Path) -> Path:
    source = "int twice(void) { return %d; } int %s(void) { return twice(); }"
    for number, name in enumerate(("one", "two")):
        compile_library(directory / f"lib{name}.so", source % (number, name), f"-Wl,-soname,lib{name}.so")
    place = f"-L{directory}", "-lone", "-ltwo", f"-Wl,-rpath,{directory}"
    return compile_library(directory / "libboth.so", "int f;", "-Wl,--no-as-needed", *place)


def dlopen_note(directory: Path) -> Path:
    note = [{"soname": ["libextra.so.1"], "priority": "suggested"}]
    text = json.dumps(json.dumps(note))  # as a string of the assembler's
    assembly = directory / "note.s"
    assembly.write_text(f"""
    .section .note.dlopen, "a", %note
    .balign 4
    .long 4, 2f - 1f, 0x407c0c0a
    .asciz "FDO"
    1: .asciz {text}
    2: .balign 4
    .section .note.GNU-stack, "", %progbits
    """)
    return compile_library(directory / "libnote.so", "int f;", "-xassembler", str(assembly))


WRONG: dict[str, tuple[Make, str]] = {
    "missing-library": (missing_library, "error"),
    "missing-version": (missing_version, "error"),
    "undefined-symbol": (undefined_symbol, "error"),
    "wrong-machine": (wrong_machine, "error"),
    "wrong-class": (wrong_class, "error"),
    "executable-stack": (executable_stack, "error" if GLIBC >= (2, 41) else "warning"),
    "text-relocation": (text_relocation, "warning"),
    "static-tls": (static_tls, "error"),
    "abi-marker": (abi_marker, "error"),
    "malformed": (malformed, "error"),
    "runpath-leaves-root": (runpath_leaves_root, "warning"),
    "duplicate-symbol": (duplicate_symbol, "info"),
    "dlopen-note": (dlopen_note, "info"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_fault_is_told_and_the_verdict_is_dlopens(
    kind: str, tmp_path: Path, open_each: OpenEach
) -> None:
    make, severity = WRONG[kind]
    library = make(tmp_path)
    checked = miniloader.check(library)
    told = {(problem.kind, problem.severity) for problem in checked.problems}
    assert (kind, severity) in told
    consequences = {"undefined-symbol"} if kind in ("missing-library", "wrong-class") else set()
    assert {other for other, worst in told if worst == "error"} <= {kind, *consequences}
    said = open_each([library])[str(library)]
    assert checked.loads == (said == "loads"), said


@pytest.mark.parametrize(("size", "align"), [(0, 1), (3, 1), (200, 64), (100, 128)])
def test_static_blocks_fit_where_they_do_for_dlopen(tmp_path: Path, size: int, align: int) -> None:
    """In a program that has such a block itself, to the byte of what is over."""
    block = (
        f"__thread __attribute__((aligned({align}))) char block[{size}]; char *f(void) {{ return block; }}"
    )
    program = tmp_path / "program"
    oracle = Path(__file__).with_name("dlopen_each.c")
    command = ["gcc", "-O1", "-w", "-o", program, oracle, *["-xc", "-"] * bool(size)]
    subprocess.run(command, input=block, text=True, check=True)
    source = "__thread int first = 1; int *g(void) { return &first; }"
    whole = compile_library(tmp_path / "whole.so", source, "-ftls-model=initial-exec").read_bytes()
    (header,) = (at for at in range(64, 64 + 56 * 16, 56) if whole[at : at + 4] == b"\7\0\0\0")  # PT_TLS
    paths = []
    for length in range(1560, 1780, 6):
        for unit in (4, 32, 64, 128):
            data = bytearray(whole)
            struct.pack_into("<QQ", data, header + 40, length, unit)
            paths.append(tmp_path / f"{length}-{unit}.so")
            paths[-1].write_bytes(data)
    text = "".join(f"{path}\n" for path in paths)
    told = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
    loads = {path for path in paths if f"{path}\tloads\n" in told}
    assert 0 < len(loads) < len(paths)
    checker = Checker(within=str(program))
    assert {path for path in paths if checker.check(path).loads} == loads


def test_each_rule_has_a_case() -> None:
    assert {rule.kind for rule in LOAD_RULES} == {*WRONG, "too-recent"}


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    library = with_dependency(tmp_path, "int dep(void), no(void); int f(void) { return dep() + no(); }")
    (tmp_path / "libdep.so").unlink()
    kinds = [problem.kind for problem in miniloader.check(library).problems]
    assert kinds.count("undefined-symbol") == 2
    assert "missing-library" in kinds


# --------------------------------------------------------------------------------------- what is said
def test_an_undefined_symbol_says_where_and_what_was_meant(tmp_path: Path) -> None:
    (problem,) = miniloader.check(undefined_symbol(tmp_path)).problems
    assert (problem.symbol, problem.section, problem.function) == ("strlenn", ".text", "caller")
    assert problem.hint == "did you mean strlen?"


def test_a_missing_version_says_who_needs_it_and_of_which_release(tmp_path: Path) -> None:
    library = compile_library(tmp_path / "libnew.so", COPYING, "-fno-builtin")
    data = library.read_bytes()
    new = b"GLIBC_2.99"
    old = next(word for word in (b"GLIBC_2.14",) if word in data)
    hashes = [struct.pack("<I", sysv_hash(word)) for word in (old, new)]
    library.write_bytes(data.replace(old, new).replace(*hashes))
    (problem,) = [
        problem for problem in miniloader.check(library).problems if problem.kind == "missing-version"
    ]
    assert (problem.version, problem.symbol, problem.name) == ("GLIBC_2.99", "memcpy", "libc.so.6")
    assert problem.hint is not None
    assert "glibc 2.99" in problem.hint


def test_a_symbol_whose_name_is_outside_of_the_strings_has_none(tmp_path: Path) -> None:
    library = compile_library(tmp_path / "libx.so", "int nope(void); int f(void) { return nope(); }")
    image = miniloader.inspect(library)
    (index,) = [n for n in range(len(image.symbols)) if image.symbols.name(n) == "nope"]
    place = image.file_offset(image.dynamic.tags[DT_SYMTAB])
    assert place is not None
    patched(library, place + 24 * index, b"\xff\xff\xff\x7f")
    checked = Checker().check(library)
    assert not checked.loads
    assert "malformed" in {problem.kind for problem in checked.problems}
    assert {row.symbol for row in bindings(Checker().situation(str(library))) if row.provider is None} >= {""}


def test_weak_references_are_no_fault(tmp_path: Path, open_each: OpenEach) -> None:
    source = "int no(void) __attribute__((weak)); int f(void) { return no ? no() : 0; }"
    library = compile_library(tmp_path / "libweak.so", source)
    assert miniloader.check(library).loads
    assert open_each([library])[str(library)] == "loads"


def test_a_variable_of_the_general_model_needs_no_surplus(tmp_path: Path, open_each: OpenEach) -> None:
    """Not even one with a symbol, whose relocations are DTPMOD and DTPOFF (DTPREL)."""
    library = compile_library(
        tmp_path / "libtls.so", "__thread char large[4096]; char *f(void) { return large; }"
    )
    assert miniloader.check(library).loads
    assert open_each([library])[str(library)] == "loads"


@pytest.mark.parametrize("option", ["-f", "-F"])
@pytest.mark.parametrize("filtee", ["libimpl.so", "libnone.so"])
def test_a_filtee_comes_before_its_filter(
    option: str, filtee: str, tmp_path: Path, open_each: OpenEach
) -> None:
    compile_library(tmp_path / "libimpl.so", "int value(void) { return 2; }", "-Wl,-soname,libimpl.so")
    own = "int value(void) { return 1; } int call(void) { return value(); }"
    front = compile_library(tmp_path / "front.so", own, f"-Wl,{option},{filtee}", "-Wl,-rpath,$ORIGIN")
    verdict = open_each([front])[str(front)] == "loads"
    checked = Checker().check(str(front))
    assert checked.loads is verdict
    assert [problem.kind for problem in checked.problems if problem.severity == "error"] == (
        [] if verdict else ["missing-library"]
    )
    if filtee == "libimpl.so":
        (value,) = bindings(Checker().situation(str(front)), "value")
        assert (value.provider, value.also) == (str(tmp_path / "libimpl.so"), (str(front),))
        served = f"import ctypes; print(ctypes.CDLL({str(front)!r}).call())"
        assert subprocess.check_output([sys.executable, "-c", served]) == b"2\n"


_OPENER = """
#include <dlfcn.h>
#include <stdio.h>
int main(int count, char **words) { puts(dlopen(words[1], RTLD_NOW) ? "loads" : dlerror()); return 0; }
"""
_IFUNC = "static int one(void) { return 1; } static int (*pick(void))(void) { return one; }"
OF_MUSL: dict[str, str] = {  # what musl's dynamic linker is given to open
    "plain": "int f(void) { return 1; }",
    "undefined": "int nope(void); int f(void) { return nope(); }",
    "ifunc": _IFUNC + 'int f(void) __attribute__((ifunc("pick"))); int g(void) { return f(); }',
    "resolver": _IFUNC + 'static int f(void) __attribute__((ifunc("pick"))); int g(void) { return f(); }',
    "tls": '__attribute__((tls_model("initial-exec"))) static __thread int t = 3; int g() { return t++; }',
    "variable": "__thread int t = 3; int g() { return t++; }",
    "version": "",
}


@pytest.mark.parametrize("kind", OF_MUSL)
def test_the_verdict_inside_a_program_of_musl_is_musls(kind: str, tmp_path: Path) -> None:
    if shutil.which("musl-gcc") is None:
        pytest.skip("this machine lacks musl-gcc")
    program = tmp_path / "opener"
    subprocess.run(["musl-gcc", "-xc", "-", "-o", program], input=_OPENER, text=True, check=True)
    if kind == "version":
        library = missing_version(tmp_path)
    else:
        library = compile_library(tmp_path / "libof.so", OF_MUSL[kind], "-nostdlib")
    said = subprocess.run([program, library], capture_output=True, text=True, check=True).stdout.strip()
    assert Checker(within=str(program)).check(library).loads == (said == "loads"), said
    assert (said == "loads") == (kind in ("plain", "variable", "version"))


def test_interposition_says_who_wins(tmp_path: Path) -> None:
    (problem,) = miniloader.check(duplicate_symbol(tmp_path)).problems
    winner, loser = (os.fspath(tmp_path / name) for name in ("libone.so", "libtwo.so"))
    assert (problem.symbol, problem.name, problem.needed_by) == ("twice", winner, loser)


def test_too_recent_by_release_and_by_policy(tmp_path: Path) -> None:
    library = compile_library(tmp_path / "libc14.so", COPYING, "-fno-builtin")
    assert miniloader.check(library, libc="2.14").loads
    assert miniloader.check(library, policy="manylinux2014").loads
    for limits in ({"libc": "2.12"}, {"policy": "manylinux2010"}, {"policy": "manylinux_2_5_x86_64"}):
        (problem,) = miniloader.check(library, **limits).problems
        assert (problem.kind, problem.version, problem.symbol) == ("too-recent", "GLIBC_2.14", "memcpy")


@pytest.mark.parametrize("limits", [{"libc": "new"}, {"policy": "manylinux_9"}])
def test_an_unknown_limit_is_wrong_usage(limits: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        limit_of(**limits)


# ----------------------------------------------------------------------------------------- inside whom
def test_a_python_extension_is_judged_in_the_interpreter_that_runs() -> None:
    import numpy._core._multiarray_umath as extension

    checked = miniloader.check(extension.__file__)
    assert checked.host == os.path.realpath("/proc/self/exe")
    assert checked.loads


def test_a_plugin_is_judged_inside_its_program(tmp_path: Path) -> None:
    program, plugin = tmp_path / "program", tmp_path / "plugin.so"
    source = "int offered(void) { return 1; } int main(void) { return 0; }"
    subprocess.run(["gcc", "-rdynamic", "-o", program, "-xc", "-"], input=source, text=True, check=True)
    compile_library(plugin, "int offered(void); int f(void) { return offered(); }")
    assert not miniloader.check(plugin).loads
    assert miniloader.check(plugin, within=str(program)).loads
    assert not miniloader.check(plugin, within=os.getpid()).loads
    assert miniloader.check("libz.so.1", within=os.getpid()).host == os.readlink("/proc/self/exe")


def test_nothing_is_judged_inside_a_library(demo: Path) -> None:
    """Also where a process's program is one: ld.so, which was told what to run."""
    with pytest.raises(UsageError, match="a library; --in names a program or a process"):
        miniloader.check("libz.so.1", within=str(demo))
    interpreter = miniloader.inspect(sys.executable).interpreter
    assert interpreter is not None
    with subprocess.Popen([interpreter, "/bin/cat"], stdin=subprocess.PIPE) as process:
        wait_until_at_rest(process.pid)  # execve(2) closes descriptors before it has changed the memory
        with pytest.raises(UsageError, match="a library; --in names a program or a process"):
            miniloader.check("libz.so.1", within=process.pid)
        process.kill()


def test_a_process_that_is_hidden_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with hidepid=invisible, or without a /proc at all."""
    pid, exists = os.getppid(), os.path.exists

    def hidden(path: str) -> str:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr(os, "readlink", hidden)
    monkeypatch.setattr(os.path, "exists", lambda path: f"/{pid}" not in str(path) and exists(path))
    with pytest.raises(EvidenceError, match=f"^/proc/{pid}/exe: /proc hides process {pid}"):
        miniloader.check("libz.so.1", within=pid)
    monkeypatch.setattr(procfs, "require_proc", _refuse)
    with pytest.raises(EvidenceError, match=r"^/proc: not mounted here$"):
        miniloader.check("libz.so.1", within=pid)


def _refuse() -> None:
    raise EvidenceError("/proc: not mounted here")


def test_who_runs_no_program_is_said_to_run_none() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(LoadError, match=f"^process {process.pid}: runs no program"):
            miniloader.check("libz.so.1", within=process.pid)
    with pytest.raises(ProcessGone, match=f"^process {process.pid}: there is none"):
        miniloader.check("libz.so.1", within=str(process.pid))


@pytest.mark.parametrize("name", ["²", "9" * 5000])
def test_what_python_takes_for_no_number_is_a_name(name: str) -> None:
    with pytest.raises(MiniloaderError, match=r"no library of that name|File name too long"):
        miniloader.check("libz.so.1", within=name)
    with pytest.raises(UsageError, match=r"is no release of glibc, such as 2\.28$"):
        limit_of(libc=f"2.{name}")


def test_another_root_is_searched_inside_of_it(tmp_path: Path) -> None:
    library = with_dependency(tmp_path)
    root = tmp_path / "root"
    (root / "usr/lib").mkdir(parents=True)
    shutil.copy(library, root / "usr/lib/libuser.so")
    problems = miniloader.check("/usr/lib/libuser.so", root=root).problems
    missing = {problem.name for problem in problems if problem.kind == "missing-library"}
    assert "libdep.so" in missing  # though its run-path leads to one in this machine's root


def test_what_all_refer_to_and_none_defines_is_looked_for_in_few_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gcc has every library refer to it weakly; for one that does not each of the machine was taken whole."""
    source = "void _ITM_registerTMCloneTable(void); void f(void) { _ITM_registerTMCloneTable(); }"
    library = compile_library(tmp_path / "libuser.so", source, "-Wl,--no-as-needed", "-lc")
    taken, take = set[str](), Shelf.take

    def counted(self: Shelf, path: str) -> object:
        taken.add(path)
        return take(self, path)

    monkeypatch.setattr(Shelf, "take", counted)
    (problem,) = (each for each in miniloader.check(library).problems if each.kind == "undefined-symbol")
    assert problem.symbol == "_ITM_registerTMCloneTable"
    assert all("libitm" in path for path in problem.providers)
    assert len(taken) < 10


# ------------------------------------------------------------------------------------------- as glibc
def test_libraries_of_this_machine_are_judged_as_dlopen_does(
    system_libraries: list[Path], open_each: OpenEach
) -> None:
    sample = random.Random(1).sample(system_libraries, min(100, len(system_libraries)))
    sample += sorted(Path(sysconfig.get_config_var("DESTSHARED")).glob("*.so"))[:5]
    checker = Checker()
    judged = {str(path): checker.check(path) for path in sample}
    extensions = [path for path, checked in judged.items() if checked.host is not None]
    said = open_each(path for path in judged if path not in extensions) | open_each_in_python(extensions)
    # Who dies was loaded: a sanitizer that does not come first, for one, ends the process.
    expected = {path: word in ("loads", "died") for path, word in said.items()}
    assert {path: checked.loads for path, checked in judged.items()} == expected
    assert len(extensions) > 3
    assert len(judged) > 60


def test_programs_of_this_machine_are_judged_as_ldd_does() -> None:
    programs = sorted({os.path.realpath(entry.path) for entry in os.scandir("/usr/bin") if entry.is_file()})
    sample = random.Random(2).sample(programs, min(120, len(programs)))
    complains = {program: ldd_complains(program) for program in sample}
    checker = Checker()
    judged = {
        program: checker.check(program).loads for program, word in complains.items() if word is not None
    }
    assert judged == {program: not word for program, word in complains.items() if word is not None}
    assert len(judged) > 30


def test_this_interpreter_loads() -> None:
    assert miniloader.check(sys.executable).loads


def test_names_that_cannot_be_looked_up_are_the_fault_of_whose_tables_they_are(
    tmp_path: Path, fixture_library: Callable[[str], Path]
) -> None:
    """Each chain of its hash table leads back to itself: whoever looks a name up in it would never end."""
    circular, user = tmp_path / "libcircular.so", tmp_path / "libuser.so"
    source = "int no_such_name(void); int use(void) { return no_such_name(); }"
    linked = ["gcc", "-shared", "-fPIC", "-xc", "-"]
    subprocess.run([*linked, "-o", circular, f"-Wl,-soname,{circular.name}"], input="", text=True, check=True)
    needs = ["-o", user, "-Wl,--no-as-needed", f"-Wl,-rpath,{tmp_path}", f"-L{tmp_path}", "-lcircular"]
    subprocess.run([*linked, *needs], input=source, text=True, check=True)
    data = bytearray(fixture_library("demo_sysv_hash").read_bytes())
    sections = miniloader.elf.inspect(fixture_library("demo_sysv_hash")).sections
    place = next(section.file_offset for section in sections if section.name == ".hash")
    buckets, symbols = struct.unpack_from("<II", data, place)
    struct.pack_into(f"<{symbols}I", data, place + 8 + 4 * buckets, *range(symbols))
    circular.unlink()
    circular.write_bytes(data)
    for path in (circular, user):
        with pytest.raises(ElfError, match=f"^{re.escape(str(circular))}: .*too many with one hash value"):
            list(bindings(Checker().situation(str(path))))
        (problem, *_) = miniloader.check(path).problems
        assert (problem.kind, problem.name or problem.needed_by) == ("malformed", str(circular))
