# ruff: noqa: E501 - tables of edits read better in one line each
"""Solutions of exercises: wrong ones never pass, right ones do, however they are written; and a class graded."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fixtures import build
from miniloader.errors import UsageError
from miniloader.report.teaching import sheet
from miniloader.walkthrough import exercise_runner, reference_loader
from miniloader.walkthrough.chapters import CHAPTERS, chapter, chapters
from miniloader.walkthrough.exercise_runner import check_file
from miniloader.walkthrough.grading import grade, junit, submissions
from miniloader.walkthrough.loader_check import STEPS

Edit = tuple[str, str]


def edited(text: str, *edits: Edit) -> str:
    for old, new in edits:
        assert text.count(old) == 1, (old, text.count(old))
        text = text.replace(old, new)
    return text


def judged(name: str, text: str, directory: Path) -> tuple[bool, str]:
    path = directory / "try.py"
    path.write_text(text)
    answer, _ = check_file(chapter(name), str(path))
    return answer.passed, answer.message


#: For each chapter edits of its solution that make it wrong: beside the snippet itself, which is tried elsewhere.
WRONG: dict[str, list[Edit]] = {
    "memory": [("memory[5 * PAGE] = 1", "memory[4 * PAGE] = 1"), ("memory[5 * PAGE] = 1", "pass")],
    "mapping": [("letter = memory[40 * PAGE]", "letter = 0"), ("letter = memory[40", "memory[:]; letter = memory[40")],
    "lazy": [("memory[20 * PAGE] = 1", "memory[21 * PAGE] = 1"), ("memory[20 * PAGE] = 1", "memory[20 * PAGE]"),
             # as where the kernel was busy with the pages around it
             ("memory[20 * PAGE] = 1", "memory[20 * PAGE]; memory.madvise(mmap.MADV_DONTNEED, 0, 20 * PAGE); "
              "memory.madvise(mmap.MADV_DONTNEED, 21 * PAGE, 43 * PAGE)")],
    "cow": [("or page == 3", ""), ("page == 3", "page in (3, 4)")],
    "fork": [("memory[0] = 2", "memory[0] = memory[PAGE] = 2"), ("memory[0] = 2", "pass")],
    "shared": [("flags=mmap.MAP_SHARED", "flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS"), ("b\"hello\"", "b\"hallo\"")],
    "copies": [("mmap.mmap(file.fileno(), 0)", "mmap.mmap(-1, 16 * PAGE); data[:] = b'x' * 16 * PAGE")],
    "unmappable": [("memory[:] = os.read(reading, 19)", "pass"), ("mmap.mmap(-1, 19)", "bytearray(19)")],
    "segments": [("segment[100:]", "segment[101:]"), ("bytes(PAGE - 100)\n", "bytes(PAGE - 100)\nsegment[0] = 0\n")],
    "relocation": [("slot.value = ctypes.cast(tolower", "slot.value = ctypes.cast(toupper")],
    "processes": [("memory[0] = user", "memory[0] = 0"), ("memory[0] = user", "memory[0] = memory[PAGE] = user")],
    "textrel": [("CODE * PAGE + 8 * number", "number * PAGE"), ("CODE * PAGE + 8 * number", "CODE * PAGE")],
    "relro": [("protect(0, mmap.PROT_READ)", "protect(1, mmap.PROT_READ)")],
    "tls": [("class Visits(threading.local)", "class Visits"), ("    count = 1000 ", "    count = 1001 ")],
    "erosion": [("gc.freeze()", "gc.collect()"), ("20_000", "2_000"), ("[[None] for _ in range(20_000)]", "[None] * 20_000"),
                ("child = os.fork()", "child = os.fork(); items = [[1] for _ in range(20_000)] if child else items")],
    "prepared": [("(page + BIAS)", "(page)"), ("flags=mmap.MAP_PRIVATE)", "flags=mmap.MAP_PRIVATE); memory[0] = 0")],
}  # fmt: skip

#: Edits of the reference loader that make it wrong, by the step that is to notice.
WRONG_LOADERS: list[tuple[str, Edit]] = [
    ("program_headers", ('"<IIQQQQQQ"', '">IIQQQQQQ"')),
    ("program_headers", ("range(start, start + size * number, size)", "range(start, start + size * (number - 1), size)")),
    ("program_headers", ("(kind, flags, offset, vaddr, filesz, memsz)", "(kind, offset, flags, vaddr, filesz, memsz)")),
    ("program_headers", ("kind, flags, offset, vaddr, _, filesz", "kind, flags, offset, _, vaddr, filesz")),
    ("plan", ("(flags & 4) // 4 * PROT_READ", "(flags & 4) // 4 * PROT_EXEC")),
    ("plan", ("protection, down(offset)", "protection, offset")),
    ("plan", ("down(vaddr), up(vaddr + filesz), up(vaddr + memsz)", "down(vaddr), up(vaddr + memsz), up(vaddr + memsz)")),
    ("plan", ("if end > file_end:", "if False:")),
    ("plan", ("if kind != PT_LOAD:", "if kind == 0:")),
    ("map_library", ("    return base\n\n\ndef zero", "    return base + 4096\n\n\ndef zero")),
    ("map_library", ("flags = MAP_PRIVATE | MAP_FIXED", "flags = 1 | MAP_FIXED")),
    ("map_library", ("flags, fd, offset)", "flags, fd, 0)")),
    ("map_library", ("mmap(base + start, length, protection, flags | MAP_ANONYMOUS)", "pass")),
    ("map_library", ("length, protection, flags, fd", "length, 7, flags, fd")),
    ("zero", ("bytes(up(end) - end)", "bytes(up(end) - end - 1)")),
    ("zero", ("poke(base + end, ", "poke(base + end - 1, ")),
    ("zero", ("poke(base + end, bytes(up(end) - end))", "pass")),
    ("relocate", ('struct.pack("<Q", base + addend))\n\n\ndef relocations', 'struct.pack("<Q", addend))\n\n\ndef relocations')),
    ("relocate", ("== R_RELATIVE", "!= R_RELATIVE")),
    ("relocate", ('base + addend))\n\n\ndef relocations', 'base + addend + 8))\n\n\ndef relocations')),
    ("bind", ("wanted = 5381", "wanted = 0")),
    ("bind", ("& 0xFFFFFFFF\n    symbol", "& 0xFFFF\n    symbol")),
    ("bind", ("        symbol = 0 if chain & 1 else symbol + 1\n", "        break\n")),
    ("bind", (" and text(strings + offset) == name", "")),
    ("bind", ("or dlsym(name)", "or 0")),
    ("bind", ("(R_64, R_GLOB_DAT, R_JUMP_SLOT)", "(R_64, R_JUMP_SLOT)")),
    ("bind", ("address + addend if address", "address + 1 if address")),
    ("start", ("down(vaddr + memsz) - down(vaddr)", "down(vaddr + memsz) - down(vaddr) + 4096")),
    ("start", ("mprotect(base + down(vaddr), down", "mprotect(base, down")),
    ("start", ("        call(word(base + tags[DT_INIT_ARRAY] + at))", "        pass")),
    ("start", ("for at in range(0, tags", "for at in range(8, tags")),
]  # fmt: skip

#: Other ways to write the same.
RIGHT: dict[str, list[Edit]] = {
    "memory": [("memory[5 * PAGE] = 1", "memory[5 * PAGE : 5 * PAGE + 4] = b'here'")],
    "mapping": [("letter = memory[40 * PAGE]", "memory.seek(40 * PAGE); letter = memory.read_byte()")],
    "cow": [("if memory[page * PAGE] != 0 or page == 3:\n        memory[page * PAGE] = 0", "seen = memory[page * PAGE]\nmemory[0] = 7")],
    "fork": [("memory[0] = 2", "memory[31 * PAGE] = 2")],
    "copies": [("mmap.mmap(file.fileno(), 0)", "mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)")],
    "unmappable": [("mmap.mmap(-1, 19)", "mmap.mmap(-1, 19, flags=mmap.MAP_PRIVATE)")],
    "segments": [("segment[100:] = bytes(PAGE - 100)", "for at in range(100, PAGE): segment[at] = 0")],
    "relro": [("protect(0, mmap.PROT_READ)", "for page in (0,): protect(page, mmap.PROT_READ)")],
}  # fmt: skip
RIGHT_LOADERS: list[tuple[Edit, ...]] = [
    (("(flags & 4) // 4 * PROT_READ | (flags & 2) // 2 * PROT_WRITE | (flags & 1) * PROT_EXEC",
      "(flags >> 2 & 1) + (flags & 2) + 4 * (flags & 1)"),),
    (("headers.append((kind, flags, offset, vaddr, filesz, memsz))", "headers.append([kind, flags, offset, vaddr, filesz, memsz])"),),
    (("mappings.append((file_end, end - file_end, protection, None))",
      "mappings += [(at, 4096, protection, None) for at in range(file_end, end, 4096)]"),),
    (("    return mappings\n", "    return mappings[::-1]\n"),),
    (("return base + int(value)", "return int(value) + base"),),
    (('    symbol = struct.unpack("<I", peek(buckets', '    if name == b"":\n        return 0\n    symbol = struct.unpack("<I", peek(buckets'),),
]  # fmt: skip


def test_there_are_enough_of_each() -> None:
    assert {*WRONG} == {*CHAPTERS} - {"build"}
    assert sum(map(len, WRONG.values())) + len(WRONG_LOADERS) >= 40
    assert sum(map(len, RIGHT.values())) + len(RIGHT_LOADERS) >= 10
    assert {function for function, _ in WRONG_LOADERS} == {step.function for step in STEPS}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_solution_does_not_pass(name: str, tmp_path: Path) -> None:
    for edit in WRONG[name]:
        passed, message = judged(name, edited(chapter(name).exercise.solution, edit), tmp_path)
        assert not passed, (edit, message)


@pytest.mark.parametrize("name", RIGHT)
def test_another_right_solution_passes(name: str, tmp_path: Path) -> None:
    for edit in RIGHT[name]:
        passed, message = judged(name, edited(chapter(name).exercise.solution, edit), tmp_path)
        assert passed, (edit, message)


# --------------------------------------------------------------------------------------------- loaders
REFERENCE = inspect.getsource(reference_loader)


def test_a_wrong_loader_is_told_its_first_step_that_is_wrong(tmp_path: Path) -> None:
    for function, edit in WRONG_LOADERS:
        passed, message = judged("build", edited(REFERENCE, edit), tmp_path)
        assert not passed, edit
        number = [step.function for step in STEPS].index(function) + 1
        assert f"step {number} of 7, {function}" in message, (edit, message)
        assert re.search(r"0x|raised|gives|header|crc32|killed|run", message), message


def test_another_right_loader_passes(tmp_path: Path) -> None:
    for edits in RIGHT_LOADERS:
        passed, message = judged("build", edited(REFERENCE, *edits), tmp_path)
        assert passed, (edits, message)


def test_the_reference_is_short_and_imports_nothing_else_of_ours() -> None:
    assert len(REFERENCE.splitlines()) < 200
    imported = {node.module for node in ast.walk(ast.parse(REFERENCE)) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name and "miniloader" in name} == {"miniloader.walkthrough.given"}


def test_steps_are_written_one_after_the_other(tmp_path: Path) -> None:
    """The skeleton with the first steps of the reference: the next one is asked for."""
    skeleton = chapter("build").exercise.snippet
    bodies = {node.name: ast.get_source_segment(REFERENCE, node) or "" for node in ast.parse(REFERENCE).body
              if isinstance(node, ast.FunctionDef)}  # fmt: skip
    stubs = {node.name: ast.get_source_segment(skeleton, node) or "" for node in ast.parse(skeleton).body
             if isinstance(node, ast.FunctionDef)}  # fmt: skip
    written = skeleton
    for number, step in enumerate(STEPS, 1):
        passed, message = judged("build", written, tmp_path)
        assert (passed, "not written yet" in message) == (False, True), message
        assert f"step {number} of 7, {step.function}" in message
        names = ("find_symbol", "bind") if step.function == "bind" else (step.function,)
        for name in names:
            written = edited(written, (stubs[name], bodies[name]))
    assert judged("build", written, tmp_path) == (
        True, "all seven steps are right, and crc32 runs in a libz that your loader has loaded"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    while True:\n        pass\n", "still running after 1 seconds, and was ended, in step 4 of 7, zero"),
        ("    poke(8, b'x')\n", "was killed by SIGSEGV (Segmentation fault) before it could be judged, in step 4"),
        ("    import os\n    os._exit(0)\n", "before it could be judged, in step 4 of 7, zero"),
        ("    return 1 / 0\n", "step 4 of 7, zero of libdemo-x86_64.so: raised ZeroDivisionError: division by zero (line "),
    ],
)  # fmt: skip
def test_what_a_step_does_to_its_process_is_one_line(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exercise_runner, "_SECONDS", 1)
    text = edited(REFERENCE, ("    for kind, _, _, vaddr, filesz, memsz in headers:\n", body + "    for kind, _, _, vaddr, filesz, memsz in headers:\n"))  # fmt: skip
    passed, said = judged("build", text, tmp_path)
    assert (passed, message in said, "\n" in said) == (False, True, False), said


# --------------------------------------------------------------------------------------------- a class
def class_of_three(directory: Path) -> None:
    """Ada has solved two exercises, Bob none, and Cleo has two files that are not one."""
    for student, name, text in (
        ("ada", "cow.py", chapter("cow").exercise.solution),
        ("ada", "03-late.py", chapter("cow").exercise.solution),
        (
            "bob",
            "work.py",
            "# When done: miniloader walkthrough fork --check THIS_FILE\nprint('\x1b[1m')\n1 / 0\n",
        ),
        ("cleo", "notes.py", "print('hello')\n"),
    ):
        (directory / student).mkdir(exist_ok=True)
        (directory / student / name).write_text(text)


#: Attributes that the schema of Jenkins's xUnit plugin (junit-10.xsd) allows, of those that are written.
JUNIT = {
    *(("testsuite", name) for name in ("name", "tests", "failures", "errors", "skipped")),
    *((element, name) for element in ("testsuites", "testcase", "property") for name in ("name",)),
    *((element, "message") for element in ("failure", "skipped")),
    ("testcase", "classname"),
    ("property", "value"),
}


def test_a_class_is_graded_the_same_each_time(tmp_path: Path) -> None:
    class_of_three(tmp_path)
    graded = grade(str(tmp_path))
    assert [(one.student, one.id, one.passed) for one in graded] == [
        ("ada", "cow", True), ("ada", "cow", True), ("bob", "fork", False)
    ]  # fmt: skip
    text = junit(graded)
    assert text == junit(grade(str(tmp_path)))
    root = ElementTree.fromstring(text)
    assert [(suite.get("name"), suite.get("tests"), suite.get("failures")) for suite in root] == [
        ("ada", "2", "0"), ("bob", "1", "1")
    ]  # fmt: skip
    (failure,) = root.iter("failure")
    assert "ZeroDivisionError" in (failure.get("message") or "")
    assert {(element.tag, name) for element in root.iter() for name in element.attrib} <= JUNIT
    files = {part.get("name"): part.get("value") for part in root[0].iter("property")}
    assert files == {str(tmp_path / "ada" / name): "cow" for name in ("03-late.py", "cow.py")}
    assert b"\x1b" not in text


def test_a_class_at_the_command_line(tmp_path: Path) -> None:
    class_of_three(tmp_path)
    command = [sys.executable, "-m", "miniloader", "walkthrough", "--check", str(tmp_path), "--grade"]
    done = subprocess.run(
        [*command, str(tmp_path / "marks.xml")], capture_output=True, text=True, check=False, cwd=build.ROOT
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"✘ +bob +fork +it raised ZeroDivisionError", done.stdout)
    assert "2 of 3 pass" in done.stdout
    assert len([*ElementTree.parse(tmp_path / "marks.xml").iter("testcase")]) == 3
    done = subprocess.run(
        [*command, str(tmp_path / "marks.xml"), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=build.ROOT,
    )
    assert [one["passed"] for one in json.loads(done.stdout)["graded"]] == [True, True, False]
    for place, words in (("nowhere", ["marks.xml"]), (".", ["nowhere/marks.xml"])):
        told = subprocess.run(
            [*command[:-2], str(tmp_path / place), "--grade", str(tmp_path / words[0])],
            capture_output=True, text=True, check=False, cwd=build.ROOT,
        )  # fmt: skip
        assert (told.returncode, len(told.stderr.splitlines())) == (1, 1), told.stderr
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no solution in it"):
        grade(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("0.py", "memory"),
        ("03-cow.py", "cow"),
        ("ann_fork.py", "fork"),
        ("10.py", "processes"),
        ("x.py", None),
    ],
)
def test_a_file_names_its_chapter(name: str, id: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    (tmp_path / "cow.py").write_text("")
    assert {found for _, found, path in submissions(str(tmp_path)) if path.endswith("/" + name)} == (
        {id} - {None}
    )


def test_the_sheet_has_every_question_its_answer_and_every_solution() -> None:
    text = sheet(chapters())
    for one in chapters():
        assert f"## {one.number}. {one.title}" in text
        assert one.exercise.solution.rstrip() in text
        for quiz in one.questions:
            assert quiz.choices[quiz.answer].why in text
