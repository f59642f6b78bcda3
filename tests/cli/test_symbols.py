"""Symbols as people ask for them: by part or pattern, sorted, demangled; sizes; unusual names."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from miniloader import cli

SHOP = """
namespace shop {
  struct Cart { int n; int add(int); int add(long); template <class T> T get(T); static int one(); };
  int Cart::add(int x) { return n += x; }
  int Cart::add(long x) { return n += (int)x + 1; }
  template <class T> T Cart::get(T t) { return t + n; }
  template int Cart::get<int>(int);
  int Cart::one() { return 1; }
  namespace { __attribute__((noinline)) int hidden(int x) { return x * 3; } }
  int use(int y) { return hidden(y); }
}
extern "C" {
  int odd__name(void) { return 6; }
  char much[5000] = {1};
  extern int elsewhere(void);
  int call(void) { return elsewhere(); }
}
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shop")
    (directory / "shop.cc").write_text(SHOP)
    output = directory / "libshop.so"
    command = ["g++", "-shared", "-fPIC", "-O1", "-Wl,--hash-style=sysv", "-o", output, directory / "shop.cc"]
    subprocess.run(command, check=True)
    data = output.read_bytes().replace(b"odd__name", b"odd@@name")
    output.write_bytes(data)
    return output


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([*map(str, words)]) == 0
    return capsys.readouterr().out


def names(text: str) -> list[str]:
    return [line.split(maxsplit=5)[-1] for line in text.partition("\nSymbols")[2].splitlines()[2:]]


def test_symbols_by_part_and_pattern(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(names(said(capsys, "inspect", shop, "--symbols", "Cart::add"))) == {
        "shop::Cart::add(int)", "shop::Cart::add(long)",
    }  # fmt: skip
    assert names(said(capsys, "inspect", shop, "--raw", "--symbols", "*3oneEv")) == ["_ZN4shop4Cart3oneEv"]
    assert names(said(capsys, "inspect", "--symbols", "::one(", shop)) == ["shop::Cart::one()"]
    everything = names(said(capsys, "inspect", "--symbols", shop))  # it is no pattern
    assert "odd@@name" in everything
    undefined = names(said(capsys, "inspect", shop, "--symbols", "--undefined"))
    assert "elsewhere" in [name.split()[-1] for name in undefined]
    assert not any("Cart" in name for name in undefined)
    assert len(names(said(capsys, "inspect", shop, "--symbols", "--defined"))) == len(everything) - len(
        undefined
    )


@pytest.mark.parametrize(("order", "key"), [("name", None), ("address", "value"), ("size", "size")])
def test_symbols_sorted(shop: Path, capsys: pytest.CaptureFixture[str], order: str, key: str | None) -> None:
    rows = json.loads(said(capsys, "inspect", shop, "--symbols", "--defined", "--sort", order, "--json"))
    table = rows["symbols"]["table"]
    values = [row[key] if key else row["demangled"] or row["name"] for row in table]
    assert values == sorted(values, reverse=order == "size")
    assert len(values) > 5


def test_sizes_are_nms(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = json.loads(said(capsys, "inspect", shop, "--sizes", "--json"))["sizes"]
    listed = subprocess.run(["nm", "-S", shop], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    theirs = sorted((int(row[1], 16) for row in rows if len(row) == 4), reverse=True)
    assert [row["size"] for row in sizes["symbols"]] == theirs
    assert sizes["symbols"][0]["name"] == "much"
    assert sizes["symbols"][0]["section"] == ".data"
    listed = subprocess.run(["size", "-A", shop], capture_output=True, text=True, check=True)
    by_size = {
        line.split()[0]: int(line.split()[1])
        for line in listed.stdout.splitlines()[2:]
        if line.startswith(".")
    }
    ours = {row["name"]: max(row["file"], row["memory"]) for row in sizes["sections"]}
    assert {name: ours[name] for name in by_size} == by_size
    assert "much" in said(capsys, "inspect", shop, "--sizes")


def test_functions_by_the_name_that_people_write(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, symbol in (
        ("shop::Cart::one", "_ZN4shop4Cart3oneEv"),
        ("shop::Cart::add(int)", "_ZN4shop4Cart3addEi"),
        ("shop::Cart::get", "_ZN4shop4Cart3getIiEET_S2_"),
        ("shop::(anonymous namespace)::hidden", "_ZN4shop12_GLOBAL__N_16hiddenEi"),
        ("odd@@name", "odd@@name"),
    ):
        shown = json.loads(said(capsys, "disasm", shop, name, "--json"))["symbol"]
        assert shown.replace("_1L6hidden", "_16hidden") == symbol  # gcc 16 says that it is local, too
    assert said(capsys, "disasm", shop, "shop::use").startswith("shop::use(int)  ")
    assert "shop::(anonymous namespace)::hidden(int)" in said(capsys, "disasm", shop, "shop::use")
    assert re.search("_ZN4shop12_GLOBAL__N_1L?6hiddenEi", said(capsys, "disasm", shop, "shop::use", "--raw"))
    assert cli.main(["disasm", str(shop), "shop::Cart::add"]) == 1
    error = capsys.readouterr().err
    assert "is the name of 2 functions" in error
    assert "shop::Cart::add(int) (_ZN4shop4Cart3addEi); shop::Cart::add(long)" in error


def test_a_long_name_is_shown_whole_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 4000
    source = f"int {name}(int a) {{ for (int i = 0; i < a; i++) a ^= i * a; return a; }}"
    output = tmp_path / "long.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", output]
    subprocess.run(command, input=source, text=True, check=True)
    text = said(capsys, "disasm", output, name).replace("\n", "")  # it is wider than any line
    assert text.count(name) == 1
    assert text.count("x…x") >= 1


def test_two_versions_of_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = '__asm__(".symver f1,f@V1"); __asm__(".symver f2,f@@V2");'
    source += "int f1(void) { return 1; } int f2(void) { return 2; }"
    (tmp_path / "v.c").write_text(source)
    (tmp_path / "v.map").write_text("V1 {global: f; local: *;}; V2 {} V1;")
    script = f"-Wl,--version-script={tmp_path}/v.map"
    subprocess.run(["gcc", "-shared", "-fPIC", script, "-o", tmp_path / "v.so", tmp_path / "v.c"], check=True)
    for name, value in (("f", 2), ("f@V1", 1), ("f@V2", 2), ("f@@V2", 2)):
        assert f"eax, {value}" in said(capsys, "disasm", tmp_path / "v.so", name)


@pytest.mark.parametrize("options", [(), ("-z", "now")], ids=["lazy", "now"])
def test_llds_retpoline_plt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    if shutil.which("ld.lld") is None:
        pytest.skip("this machine lacks ld.lld")
    source = 'int puts(const char *); int free(void *); int f(void) { free(0); return puts("x") + 1; }'
    subprocess.run(
        ["gcc", "-c", "-O1", "-fPIC", "-x", "c", "-", "-o", tmp_path / "r.o"],
        input=source,
        text=True,
        check=True,
    )
    subprocess.run(
        ["ld.lld", "-shared", "-z", "retpolineplt", *options, "-o", tmp_path / "r.so", tmp_path / "r.o"],
        check=True,
    )
    text = said(capsys, "disasm", tmp_path / "r.so", "f")
    assert "; puts@plt" in text
    assert "; free@plt" in text
    stub = json.loads(said(capsys, "disasm", tmp_path / "r.so", "free@plt", "--json"))
    slot = stub["instructions"][0]["target"]["slot"]
    assert (slot["symbol"], slot["relocation"]) == ("free", "R_X86_64_JUMP_SLOT")


def test_a_hundred_thousand_symbols_as_json(tmp_path: Path) -> None:
    names = [f"_ZN4shop4Cart{len(str(number)) + 8}function{number}Ei" for number in range(100_000)]
    source = "".join(
        f".globl {name}\n.type {name},@function\n{name}: ret\n.size {name},1\n" for name in names
    )
    output = tmp_path / "many.so"
    command = ["gcc", "-shared", "-Wl,-z,noexecstack", "-x", "assembler", "-", "-o", output]
    subprocess.run(command, input=f".text\n{source}", text=True, check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "miniloader", "inspect", "--symbols", "--json", str(output)]
    with (tmp_path / "json").open("w") as file:
        subprocess.Popen(command, stdout=file).wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    table = json.loads((tmp_path / "json").read_text())["symbols"]["table"]
    assert [row["demangled"] for row in table if row["name"] == names[77]] == ["shop::Cart::function77(int)"]
    assert len(table) >= 100_000
    # A second of a processor that is not shared: here it may be.
    assert after.ru_utime - before.ru_utime < 2.5
