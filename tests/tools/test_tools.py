"""The tools' own behaviour: where the private environment lies, for whom, and what they say when it fails."""

from __future__ import annotations

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from miniloader.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("environment", "demo", "native", "test")
SYSTEM_PYTHON = "/usr/bin/python3"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(command), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A new directory that every user can reach (pytest's own are for one user only)."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def checkout(open_directory: Path) -> Path:
    """A copy of what installing needs, with a space in its path and nothing to download but the builder."""
    copy = open_directory / "a checkout"
    copy.mkdir()
    for directory in ("miniloader", "tools"):
        shutil.copytree(ROOT / directory, copy / directory, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    text = (copy / "pyproject.toml").read_text()
    start = text.index("dependencies = [")
    (copy / "pyproject.toml").write_text(
        text[:start] + "dependencies = []" + text[text.index("]", start) + 1 :]
    )
    return copy


def tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


# -------------------------------------------------------------------------------------------- scripts
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_plain_shell(script: str) -> None:
    path = ROOT / "tools" / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\n")
    assert run(["sh", "-n", path]).returncode == 0


@pytest.mark.parametrize("script", ["demo", "native", "test"])
def test_help_makes_no_environment(script: str, tmp_path: Path) -> None:
    done = run([ROOT / "tools" / script, "--help"], env={"PATH": os.defpath}, cwd=tmp_path)
    assert done.returncode == 0
    assert f"tools/{script} [" in done.stdout
    assert "#" not in done.stdout


def test_ci_calls_the_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "exec tools/test"


def test_a_commit_is_linted_as_tests_are() -> None:
    """By ``tools/test --lint``, which leaves out pytest and nothing else."""
    assert re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text()) == ["tools/test --lint"]
    script = (ROOT / "tools" / "test").read_text()
    first, last = script.split('if [ "${1-}" != --lint ]; then\n')
    linters, tests = (re.findall(r'^ *step "(.*?)"', part, re.MULTILINE) for part in (first, last))
    assert linters == ["ruff check", "ruff format", "mypy", "imports"]
    assert tests == ["pytest"]


# ---------------------------------------------------------------------------------------- environment
def environment(checkout: Path, runner: Run, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run tools/environment with the system's Python and from another directory."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    kept |= {"PATH": os.defpath, "PYTHON": SYSTEM_PYTHON, "HOME": "/nonexistent"}
    return runner([checkout / "tools" / "environment"], env=kept | variables, cwd="/")


@pytest.fixture(scope="module", autouse=True)
def _system_python() -> None:
    if (
        run(
            [SYSTEM_PYTHON, "-c", "import sys, venv, ensurepip; assert sys.version_info >= (3, 11)"]
        ).returncode
        != 0
    ):
        pytest.skip(f"this machine lacks {SYSTEM_PYTHON} 3.11 with venv")


def test_the_owner_gets_one_environment_in_the_checkout(checkout: Path) -> None:
    first = environment(checkout, run)
    assert first.returncode == 0, first.stderr
    python = first.stdout.strip()
    assert python == str(checkout / ".venv" / "bin" / "python")
    assert first.stderr.count("\n") == 1
    assert "private environment" in first.stderr
    version = run([checkout / ".venv" / "bin" / "miniloader", "--version"])
    assert version.stdout.startswith("miniloader ")
    assert run([python, "-m", "miniloader", "--version"], cwd="/").stdout == version.stdout

    second = environment(checkout, run)
    assert (second.stdout, second.stderr, second.returncode) == (first.stdout, "", 0)

    # Whatever changes what has to be installed makes it anew; and without a package index that fails clearly.
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    third = environment(checkout, run, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert third.returncode == 1
    assert third.stdout == ""
    assert third.stderr.splitlines()[-1].startswith("miniloader: pip could not install ")


@pytest.mark.needs_root("becomes another user")
def test_another_user_gets_an_environment_elsewhere(
    checkout: Path, open_directory: Path, run_as_nobody: Run
) -> None:
    cache = open_directory / "cache"
    cache.mkdir()
    os.chown(cache, 65534, 65534)
    before = tree(checkout)
    first = environment(checkout, run_as_nobody, XDG_CACHE_HOME=str(cache))
    assert first.returncode == 0, first.stderr
    assert Path(first.stdout.strip()).is_relative_to(cache / "miniloader")
    assert environment(checkout, run_as_nobody, XDG_CACHE_HOME=str(cache)).stderr == ""
    assert tree(checkout) == before


@pytest.mark.needs_root("becomes another user")
def test_an_environment_of_somebody_else_is_never_used(
    checkout: Path, open_directory: Path, run_as_nobody: Run
) -> None:
    """Its programs would run as us."""
    planted = open_directory / "planted"
    (planted / "miniloader").mkdir(parents=True)
    for path in (planted, planted / "miniloader"):
        path.chmod(0o777)
    done = environment(checkout, run_as_nobody, XDG_CACHE_HOME=str(planted), TMPDIR="/proc")
    assert done.returncode == 1
    assert done.stderr == "miniloader: no directory to make an environment in: set XDG_CACHE_HOME\n"


def test_a_python_without_venv_is_one_line_naming_the_package(checkout: Path, open_directory: Path) -> None:
    programs = open_directory / "bin"
    programs.mkdir()
    for tool in ("sh", "dirname", "readlink", "cat", "cksum", "cut", "id", "mkdir"):
        (programs / tool).symlink_to(str(shutil.which(tool, path=os.defpath)))

    def advice() -> str:
        done = environment(checkout, run, PATH=str(programs), PYTHON="")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        return done.stderr

    assert "needs Python 3.11 or newer: apt install python3 python3-venv" in advice()
    fake = programs / "python3"  # new enough, but it cannot import what it is asked to
    fake.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
    fake.chmod(0o755)
    assert advice().endswith(": apt install python3-venv\n")


# --------------------------------------------------------------------------------------------- package
def test_the_wheel_has_all_it_needs(checkout: Path, open_directory: Path) -> None:
    done = run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", open_directory, checkout])
    assert done.returncode == 0, done.stderr
    (wheel,) = open_directory.glob("*.whl")
    entries = zipfile.ZipFile(wheel).namelist()
    names = set(entries)
    assert len(names) == len(entries)
    assert_compiled_here(wheel)
    wanted = {f"miniloader/lab/demo/libdemo-{machine}.so" for machine in ("x86_64", "aarch64")}
    wanted |= {f"miniloader/native/loops-{machine}.so" for machine in ("x86_64", "aarch64")}
    assert names >= wanted | {"miniloader/py.typed", "miniloader/__main__.py"}
    assert {name for name in names if name.endswith(".py")} == {
        str(path.relative_to(checkout)) for path in (checkout / "miniloader").rglob("*.py")
    }
    assert any(name.endswith("LICENSE") for name in names)
    manual = {name.rpartition("/")[2] for name in names if "/share/man/man1/" in name}
    assert manual == {"miniloader.1", *(f"miniloader-{command}.1" for command in COMMANDS)}
    assert not any(name.startswith(("docs", "fixtures", "tests", "tools")) for name in names)
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    described = email.message_from_bytes(zipfile.ZipFile(wheel).read(metadata))
    assert described["Description-Content-Type"] == "text/markdown"
    text = described.get_payload()
    assert isinstance(text, str)
    assert "a matrix of processes and pages" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)  # where it is shown, no file is beside it
    assert [target for target in targets if not target.startswith(("http", "#"))] == []


def assert_compiled_here(wheel: Path) -> None:
    """The C part of ``wheel`` was compiled, with the checksum that it says, and for this machine alone."""
    platform = sysconfig.get_platform().replace("-", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as held:
        code = held.read(f"miniloader/native/loops-{os.uname().machine}.so")
        comment, line = held.read("miniloader/native/loops.sha256").decode().splitlines()
    assert comment.startswith("# compiled when it was installed, by ")
    assert line.split() == [hashlib.sha256(code).hexdigest(), f"loops-{os.uname().machine}.so"]


def test_the_source_distribution_has_what_the_repository_has(checkout: Path, open_directory: Path) -> None:
    for directory in ("docs", "fixtures", "tests"):
        shutil.copytree(ROOT / directory, checkout / directory, ignore=shutil.ignore_patterns("__pycache__"))
    builder = open_directory / "builder"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--target", builder]
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert run([*pip, *requires]).returncode == 0
    build = "import sys; from hatchling.build import *; build_sdist(sys.argv[1]); build_wheel(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(builder), "MINILOADER_NATIVE": "shipped"}
    done = run([sys.executable, "-c", build, str(open_directory)], cwd=checkout, env=environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = open_directory.glob("*.whl")  # with the copies that ship, it is for any machine
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as held:
        lines = held.read("miniloader/native/loops.sha256").decode().splitlines()
        assert [line.split()[1] for line in lines] == ["loops-aarch64.so", "loops-x86_64.so"]
        for checksum, name in map(str.split, lines):
            path = f"miniloader/native/{name}"
            assert hashlib.sha256(held.read(path)).hexdigest() == checksum
            assert held.read(path) == (ROOT / path).read_bytes()
    (archive,) = open_directory.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    files = {path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file()}
    there = {str(path) for path in files if "__pycache__" not in path.parts}  # the hook is imported meanwhile
    assert names - {"PKG-INFO", ".gitignore"} == there
    assert names >= {
        "docs/design.md",
        "docs/examples/load_and_call.py",
        "tests/oracle/compare.py",
        "tools/test",
    }
