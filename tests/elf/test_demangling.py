"""Names of C++ and Rust against binutils' c++filt, of libraries of the machine; and hostile ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from miniloader.elf import inspect
from miniloader.elf.demangling import base_name, demangled, demangled_all, plain_name

#: What LLVM and binutils write differently, made the same: spaces, the hash of a crate or a function, the
#: type of a constant, the short names of std's streams and strings, and how a lambda is called.
_DIFFERENT = (
    (r"\[[0-9a-f]{1,16}\]", ""),
    (r"(?<=\d): [iu](size|\d+)", ""),
    (r"::h[0-9a-f]{16}$", ""),
    (r"std::basic_(string|[io]+stream)<char, std::char_traits<char>(, std::allocator<char>)? ?>", r"std::\1"),
    (r" ", ""),
)  # fmt: skip
_LAMBDA = re.compile(r"lambda|unnamed|decltype")


def alike(text: str) -> str:
    for pattern, instead in _DIFFERENT:
        text = re.sub(pattern, instead, text)
    return text


def filtered(names: Sequence[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        pytest.skip("this machine lacks c++filt")
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["libstdc++.so.6", "libLLVM-15.so.1"])
def test_names_are_cxxfilts(name: str, system_libraries: list[Path]) -> None:
    paths = [path for path in system_libraries if path.name.startswith(name)]
    if not paths:
        pytest.skip(f"this machine lacks {name}")
    table = inspect(paths[0]).symbols
    names = sorted({name for index in range(1, len(table)) if (name := table.name(index)).startswith("_Z")})
    names = names[:: max(len(names) // 3000, 1)]
    pairs = list(zip(names, demangled_all(names), filtered(names), strict=True))
    plain = [(mangled, ours, theirs) for mangled, ours, theirs in pairs if not _LAMBDA.search(theirs)]
    wrong = [row for row in plain if alike(row[1] or "") != alike(row[2])]
    assert len(plain) > 1000
    assert len(wrong) <= len(plain) / 500, wrong[:3]


@pytest.mark.parametrize(
    "mangled",
    [
        "_ZN4core3fmt9Formatter3pad17h0123456789abcdefE",
        "_ZN71_$LT$Test$u20$$u2b$$u20$$u27$static$u20$as$u20$foo..Bar$LT$Test$GT$$GT$3bar17h930b740aa94f1d3aE",
        "_ZN3foo17h05af221e174051e9E",
        "_RNvCs1234_7mycrate3foo",
        "_RNvMs0_NtCs1234_7mycrate3barNtB5_6Struct6method",
        "_RINvNtC3std3mem8align_ofjE",
        "_Z3foov.part.0.cold",
        "_Z3foov.constprop.12",
        "_ZGTtNKSt11logic_error4whatEv",
        "_ZN4shop4Cart3addEi",
        "_ZTVN10__cxxabiv117__class_type_infoE",
    ],
)
def test_each_sort_of_name(mangled: str) -> None:
    (theirs,) = filtered([mangled])
    assert alike(demangled(mangled) or "") == alike(theirs)
    assert theirs != mangled


def test_a_rust_library(system_libraries: list[Path], tmp_path: Path) -> None:
    """Both manglings of what rustc compiles."""
    if shutil.which("rustc") is None:
        pytest.skip("this machine lacks rustc")
    source = tmp_path / "shop.rs"
    source.write_text(
        "pub trait Sum { fn sum(&self) -> i32; } pub struct Cart<T>(pub Vec<T>);\n"
        "impl Sum for Cart<i32> {\n"
        "  #[inline(never)] fn sum(&self) -> i32 { self.0.iter().map(|x| x + 1).sum() }\n}\n"
        "#[no_mangle] pub fn total(n: i32) -> i32 { Cart(vec![n; 3]).sum() }\n"
    )
    for version in ("v0", "legacy"):
        output = tmp_path / f"lib{version}.so"
        command = ["rustc", "-Cdebuginfo=0", f"-Csymbol-mangling-version={version}", "--crate-type=cdylib"]
        unstable = ["-Zunstable-options"] if version == "legacy" else []
        done = subprocess.run([*command, *unstable, "-o", output, source], capture_output=True, check=False)
        if done.returncode != 0:
            continue
        said = subprocess.run(
            ["nm", "--format=posix", output], capture_output=True, text=True, check=True
        ).stdout
        names = sorted({line.split()[0] for line in said.splitlines() if line.startswith(("_R", "_ZN"))})
        names = [name for name in names if version == "v0" or re.search("17h[0-9a-f]{16}E$", name)]
        assert names
        pairs = list(zip(names, demangled_all(names), filtered(names), strict=True))
        wrong = [row for row in pairs if alike(row[1] or "") != alike(row[2])]
        assert len(wrong) <= len(pairs) / 100, (version, len(wrong), len(pairs), wrong[:3])


def hostile(levels: int) -> str:
    """A name of some hundred bytes that stands for one that doubles with each level."""
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert levels < 30
    return "_Z1fSt4pairIiiE" + "".join(f"S_IS{digits[level]}_S{digits[level]}_E" for level in range(levels))


def test_hostile_names_cost_nothing() -> None:
    assert demangled(hostile(2)) is not None  # it is well formed
    began = time.process_time()
    assert demangled(hostile(29)) is None
    for mangled in (
        "_Z" * 5000,
        "_ZN" + "1a" * 8000 + "E",
        "_RNv" + "B_" * 3000,
        "_Z1f" + "P" * 9000 + "i",
        "_R",
        "_Z",
    ):
        demangled(mangled)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("text", "plain", "base"),
    [
        ("shop::Cart::add(int)", "shop::Cart::add", "shop::Cart::add"),
        ("int shop::Cart::get<int>(int) const", "shop::Cart::get<int>", "shop::Cart::get"),
        ("a::(anonymous namespace)::f(int)", "a::(anonymous namespace)::f", "a::(anonymous namespace)::f"),
        ("bool operator<<int>(A<int> const&, int)", "operator<<int>", "operator<"),
        ("A::operator()(int)", "A::operator()", "A::operator()"),
        ("std::vector<int, std::allocator<int>>::size() const", "std::vector<int, std::allocator<int>>::size",
         "std::vector<int, std::allocator<int>>::size"),
        ("<A<i32> as Sum>::sum", "<A<i32> as Sum>::sum", "<A<i32> as Sum>::sum"),
        ("core::mem::swap::<u8>", "core::mem::swap::<u8>", "core::mem::swap"),
        ("f(int) [clone .cold]", "f", "f"),
    ],
)  # fmt: skip
def test_what_is_left_without_parameters(text: str, plain: str, base: str) -> None:
    assert (plain_name(text), base_name(text)) == (plain, base)
