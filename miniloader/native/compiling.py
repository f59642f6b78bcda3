"""How the compiled code is made of its C: the copies that ship, and one's own where a compiler is at hand.

The build hook calls :func:`compile_here`; a wheel that was made so is for its machine alone.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from miniloader.native import gate

__all__ = ["PAGES", "command", "compile_here"]

_DIRECTORY: Final = Path(__file__).parent
PAGES: Final = {"x86_64": 0x1000, "aarch64": 0x10000}
"""The largest pages of each processor that the code is for."""
_OPTIONS: Final = (
    *("-shared", "-fPIC", "-O2", "-std=gnu17", "-Wall", "-Wextra", "-Wconversion"),
    # Not -D_FORTIFY_SOURCE, whose functions musl does not have.
    *("-fstack-protector-strong", "-fstack-clash-protection"),
    # What a C library links to every library, but these do not need, is not marked for CET and BTI.
    *("-nostartfiles", "-s", "-Wl,-z,relro,-z,now,-z,noseparate-code,-z,noexecstack"),
    *("-Wl,--build-id=sha1", "-Wl,-soname,miniloader-loops.so"),
)
#: Jumps lead only to where they are meant to; thread-local storage is found by descriptors, which musl has,
#: too; atomics take no help from libgcc.
_HARDENED: Final = {
    "x86_64": ("-fcf-protection=full", "-mtls-dialect=gnu2"),
    "aarch64": ("-mbranch-protection=standard", "-mno-outline-atomics"),
}


def command(compiler: Sequence[str], machine: str, *options: str) -> list[str]:
    """What compiles the code for ``machine``, but for ``-o`` and the file; run it where the sources are.

    By names alone: the paths of one machine have no place in what is committed.
    """
    sources = sorted(path.name for path in _DIRECTORY.glob("*.c"))
    layout = f"-Wl,-z,max-page-size={PAGES[machine]:#x}"
    return [*compiler, *_OPTIONS, *_HARDENED[machine], layout, *options, *sources]


def compile_here(directory: Path, environ: Mapping[str, str]) -> tuple[list[Path], str]:
    """Compile the code for this process's processor into ``directory``, with ``CC``, ``CFLAGS``, ``LDFLAGS``.

    What a wheel takes: the library and the list with its checksum (:data:`gate.CHECKSUMS`); or a list alone,
    of the copies that ship, and why these are taken: no compiler that works, ``MINILOADER_NATIVE=shipped``.
    """
    shipped = [_listed(directory, "", sorted(_DIRECTORY.glob("loops-*.so")))]
    if environ.get("MINILOADER_NATIVE") == "shipped":
        return shipped, "MINILOADER_NATIVE=shipped"
    machine = gate.processor()
    programs = (shutil.which(name, path=environ.get("PATH")) for name in ("cc", "gcc", "clang"))
    compiler = shlex.split(environ.get("CC", "")) or [name for name in programs if name][:1]
    if machine not in PAGES or not compiler:
        return shipped, "no compiler" if machine in PAGES else f"nothing to compile for {machine}"
    library = directory / Path(gate.own_code()).name
    flags = shlex.split(f"{environ.get('CFLAGS', '')} {environ.get('LDFLAGS', '')}")
    try:
        made = _run([*command(compiler, machine, *flags), "-o", str(library)], environ)
        version = _run([*compiler, "--version"], environ).partition("\n")[0] if library.exists() else made
    except (OSError, subprocess.CalledProcessError) as error:
        told = (getattr(error, "stderr", None) or "").strip() or str(error)
        return shipped, f"{compiler[0]} failed: {told.splitlines()[-1]}"
    if (damage := gate.damage(str(library))) is not None:
        return shipped, f"{compiler[0]} made something else: {damage}"
    return [library, _listed(directory, f"# compiled when it was installed, by {version}\n", [library])], ""


def _listed(directory: Path, comment: str, libraries: Sequence[Path]) -> Path:
    """The list of ``libraries`` by their names, written to ``directory``."""
    lines = [f"{sha256(library.read_bytes()).hexdigest()}  {library.name}\n" for library in libraries]
    checksums = directory / gate.CHECKSUMS
    checksums.write_text(comment + "".join(lines), encoding="utf-8")
    return checksums


def _run(words: Sequence[str], environ: Mapping[str, str]) -> str:
    done = subprocess.run(
        words, cwd=_DIRECTORY, env=dict(environ), capture_output=True, text=True, check=True
    )
    return done.stdout
