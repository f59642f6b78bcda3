"""``miniloader walkthrough`` as it is used: told, asked, checked, interrupted, and where little is seen."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures import build
from miniloader import cli
from miniloader.errors import EvidenceError
from miniloader.kernel.probe import best_level
from miniloader.walkthrough import exercise_runner
from miniloader.walkthrough.chapter import Finding
from miniloader.walkthrough.chapters import CHAPTERS, chapters, cow
from miniloader.walkthrough.workbench import Workbench
from tests.conftest import AsNobody
from tests.lab.audit.told_processes import wait_until_at_rest
from tests.lab.conftest import children_of, wait_until_gone

COMMAND = [sys.executable, "-m", "miniloader", "walkthrough"]
PARTS = ["What do you expect?", "Step 1: touched", "What was claimed, and what was seen", "Why", "Try it"]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=build.ROOT,
        env=environment,
        **options,
    )


def in_process(*arguments: object) -> tuple[int, str, str]:
    """Exit status, output and errors of a command line run here."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = cli.main(["walkthrough", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def at_terminal(
    *arguments: object, answers: Iterable[str] = (), env: dict[str, str] | None = None
) -> tuple[int, str, int]:
    """Exit status, output, and how often it asked; Enter is pressed where there is no answer left."""
    child, terminal = pty.fork()
    if child == 0:
        try:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
            os.chdir(build.ROOT)
            os.environ.update({"TERM": "xterm"} | (env or {}))
            os.execv(sys.executable, [*COMMAND, *map(str, arguments)])
        finally:
            os._exit(127)
    waiting, output, asked, end = iter(answers), "", 0, 0
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # EIO: the other side is closed
            break
        output += data.decode()
        while prompt := re.compile(r"\[Enter: [^]]*\] |show it\): ").search(output, end):
            end, asked = prompt.end(), asked + 1
            answer = next(waiting, "\n")
            if answer == "\x03":  # Python misses a signal that comes just before it reads
                wait_until_at_rest(child)
            os.write(terminal, answer.encode())
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.replace("\r\n", "\n"), asked


# ----------------------------------------------------------------------------------------- what is printed
def test_without_a_chapter_all_are_listed_with_their_claims() -> None:
    done = run(env={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"^evidence +{best_level()}: ", done.stdout, re.M)
    said = " ".join(done.stdout.split())
    for chapter in chapters():
        assert f"{chapter.number} {chapter.id} {chapter.title}" in said
        assert all(claim.text in said for claim in chapter.claims)
    assert [chapter.number for chapter in chapters()] == sorted(chapter.number for chapter in chapters())


def test_the_list_says_what_cannot_be_shown_here() -> None:
    _, said, _ = in_process("--level", "flags")
    fork = said[said.index(" fork ") :]
    assert re.search(
        r"\? +Who writes|\? +The first writer gets the new frame +\(needs evidence by frames\)", fork
    )
    _, said, _ = in_process("--level", "totals")
    assert re.search(r"cow .*  5 of 9 claims can be judged here", said)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_chapter_fits_the_terminal(width: int) -> None:
    done = run("cow", "segments", "relocation", env={"COLUMNS": str(width)})
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= width
    assert "\x1b" not in done.stdout
    for part in PARTS:
        assert f"── {part}\n" in done.stdout
    assert done.stdout.count("✔ ") == 9 + 5 + 5 + 3  # the claims, and the summary


def test_a_chapter_shows_calls_evidence_bytes_and_pages() -> None:
    done = run("cow", env={"COLUMNS": "80"})
    assert (
        re.search(r'^ +open\("letters", O_RDONLY\) = \d+ *$', done.stdout, re.M)
        or "this process open(" in done.stdout
    )
    assert re.search(r"^  ≠  page 3 +page cache.* private page", done.stdout, re.M)
    assert len(re.findall(r"^  ≠  page 3", done.stdout, re.M)) == 2  # on a disk, and on tmpfs
    assert re.search(r"^ +this process +███A████ *$", done.stdout, re.M)
    hello = b"hello".hex(" ")
    marked = re.search(
        rf"^   0x3000  before  44 44.*\n +after +{hello} 44.*\n( +)\^{{14}}$", done.stdout, re.M
    )
    assert marked is not None
    assert len(marked[1]) == len("   0x3000  before  ")


def test_pipes_and_no_color_get_no_escape_codes() -> None:
    assert "\x1b" not in run("cow").stdout
    status, shown, _ = at_terminal("cow", "--no-pause", env={"NO_COLOR": "1"})
    assert status == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)
    status, shown, asked = at_terminal("cow", "--no-pause")
    assert (status, asked) == (0, 0)
    assert re.search(r"\x1b\[[0-9;]*32m", shown)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(map(len, plain.splitlines())) <= 80


def test_a_reader_that_has_seen_enough() -> None:
    done = subprocess.run(
        f"{sys.executable} -m miniloader walkthrough cow | head -3",
        shell=True,
        capture_output=True,
        text=True,
        cwd=build.ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 3)


# -------------------------------------------------------------------------------------- step by step
def test_a_terminal_goes_on_with_enter() -> None:
    status, shown, asked = at_terminal("cow")
    steps = len(re.findall(r"── Step \d", shown))
    assert (status, steps, asked) == (0, 7, 3 + 7)  # the answers, and after each step
    assert shown.index("[Enter: the answer;") < shown.index("The answer is") < shown.index("Step 1")


def test_a_step_waits_for_enter() -> None:
    status, shown, asked = at_terminal("cow", answers=["\n", "\x03"])
    assert (status, asked) == (130, 2)
    assert "Step 1" in shown
    assert "Step 2" not in shown
    assert shown.rstrip().endswith("miniloader: interrupted")


def test_the_quiz_at_a_terminal() -> None:
    status, shown, asked = at_terminal("cow", "--quiz", "--no-pause", answers=["four\n", "1\n", "2\n", "3\n"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert (status, asked) == (0, 4)
    assert re.search(r"✘ not so\n1: One byte\. The page table knows pages", plain)
    assert "The answer is 2: One page." in plain
    assert "Your score: 2 of 3" in plain


@pytest.mark.parametrize(
    ("answers", "score", "verdict"),
    [("2\n", 1, "✔ right"), ("9\n\n", 0, None), ("", 0, None), ("3", 0, "✘ not so")],
    ids=["right", "shown", "nobody there", "the last line"],
)
def test_the_quiz_from_a_pipe(answers: str, score: int, verdict: str | None) -> None:
    done = run("cow", "--quiz", input=answers)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Your score: {score} of 3" in done.stdout
    assert [word for word in ("✔ right", "✘ not so") if word in done.stdout] == ([verdict] if verdict else [])


# --------------------------------------------------------------------------------------- JSON and page
def test_json() -> None:
    done = run("cow", "fork", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [one["id"] for one in found["chapters"]] == ["cow", "fork"]
    for one, chapter in zip(
        found["chapters"], (cow.CHAPTER, chapters()[CHAPTERS.index("fork")]), strict=True
    ):
        assert one.keys() >= {"id", "title", "verdict", "evidence", "claims"}
        assert (one["title"], one["evidence"]) == (chapter.title, best_level())
        assert [claim["id"] for claim in one["claims"]] == [claim.id for claim in chapter.claims]
        for claim in one["claims"]:
            assert {"id", "statement", "verdict", "observed", "expected"} <= claim.keys()
            assert claim["verdict"] in ("proven", "unknown")


def test_a_page(tmp_path: Path) -> None:
    done = run("cow", "--html", tmp_path / "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "✔  3  MAP_PRIVATE: copy on write  9 proven" in done.stdout
    assert cow.CHAPTER.surprise in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "page.html", tmp_path):
        status, out, err = in_process("cow", "--html", path)
        assert (status, out) == (1, "")
        assert re.fullmatch(rf"miniloader: {re.escape(str(path))}: cannot write the page: .*\n", err)


# ---------------------------------------------------------------------------------------- wrong usage
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no chapter 'nonsense'"),
        (["99"], "no chapter '99'"),
        (["cow", "--all"], "--all is every chapter"),
        (["--exercise"], "--exercise needs one chapter"),
        (["cow", "fork", "--check", "x"], "--check needs one chapter"),
        (["--quiz"], "--quiz needs a chapter"),
        (["cow", "--quiz", "--html", "x"], "--quiz asks while a chapter is told"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    status, out, err = in_process(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"miniloader: {message}")
    assert err.count("\n") == 1


def test_a_chapter_may_be_named_by_its_number() -> None:
    _, by_id, _ = in_process("cow", "--exercise")
    _, by_number, _ = in_process("3", "--exercise")
    assert by_id == by_number


# ------------------------------------------------------------------------------------------- exercises
def check(tmp_path: Path, text: str) -> tuple[int, str]:
    path = tmp_path / "try.py"
    path.write_text(text)
    status, out, err = in_process("cow", "--check", path)
    assert err == ""
    return status, out


def test_an_exercise_as_printed_runs_and_is_not_done_yet(tmp_path: Path) -> None:
    status, snippet, _ = in_process("cow", "--exercise")
    assert status == 0
    status, said = check(tmp_path, snippet)
    assert status == 1
    assert said.startswith("✘ not yet  16 pages were copied")


def test_an_exercise_that_is_done(tmp_path: Path) -> None:
    status, said = check(tmp_path, "print('look')\n" + cow.CHAPTER.exercise.solution)
    assert status == 0
    assert said == "It printed:\n  look\n\n✔ done  exactly one page was copied: page 3\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nx / 0\n", "it raised ZeroDivisionError: division by zero (line 2)"),
        ("def f(:\n", "it raised SyntaxError: "),
        ("raise SystemExit(0)\n", "it left with exit()"),
        ("import os; os._exit(4)\n", "it ended with exit status 4 before it could be judged"),
        (
            "import os; os.kill(os.getpid(), 11)\n",
            "it was killed by SIGSEGV (Segmentation fault) before it could be judged",
        ),
        ("input()\n", "it raised EOFError"),
        ("x = 1\n", "it no longer has a memory, which is looked at"),
        ("memory = 1\n", "what it leaves behind cannot be looked at: "),
        ("import mmap; memory = mmap.mmap(-1, 1); memory.close()\n", "what it leaves behind cannot be"),
        ("while True: pass\n", "it was still running after 1 seconds, and was ended"),
    ],
)
def test_an_exercise_that_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setattr(exercise_runner, "_SECONDS", 1)
    status, said = check(tmp_path, text)
    assert status == 1
    assert f"✘ not yet {message}" in " ".join(said.split())


def test_what_an_exercise_starts_ends_with_it(tmp_path: Path) -> None:
    child = "import os, time\nif not (pid := os.fork()):\n    time.sleep(1000)\nprint(pid)\n"
    _, said = check(tmp_path, child)
    wait_until_gone([int(said.split("\n")[1])])


def test_a_check_as_json(tmp_path: Path) -> None:
    (tmp_path / "try.py").write_text(cow.CHAPTER.exercise.solution)
    status, out, _ = in_process("cow", "--check", tmp_path / "try.py", "--json")
    assert status == 0
    assert json.loads(out) == {
        "id": "cow",
        "passed": True,
        "message": "exactly one page was copied: page 3",
        "printed": "",
    }


# --------------------------------------------------------------------------------------------- verdicts
def fails(bench: Workbench) -> Any:
    raise EvidenceError("there is nothing to see here")
    yield


def test_nothing_to_judge_is_status_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cow, "CHAPTER", replace(cow.CHAPTER, run=fails))
    status, said, _ = in_process("cow")
    assert status == 3
    assert said.count("there is nothing to see here") == 1  # for nine claims
    assert said.count("\n? ") == 9
    status, out, _ = in_process("cow", "--json")
    assert status == 3
    assert json.loads(out)["chapters"][0]["verdict"] == "unknown"


def test_one_claim_refuted_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(cow.CHAPTER.claims[2], finding=lambda seen: Finding(False, "day", "night"))
    monkeypatch.setattr(
        cow, "CHAPTER", replace(cow.CHAPTER, claims=(*cow.CHAPTER.claims[:2], wrong, *cow.CHAPTER.claims[3:]))
    )
    status, said, _ = in_process("cow")
    assert status == 1
    assert f"✘ {wrong.text}\n" in said
    assert re.search(r"refuted: expected +day *\n +seen +night", said)


def test_an_ordinary_user(as_nobody: AsNobody) -> None:
    in_process("cow")  # imports what such a user may not be able to read
    status, said, err = as_nobody(in_process, "cow")
    assert (status, err) == (0, "")
    assert "without CAP_SYS_ADMIN" in " ".join(said.split())
    assert said.count("✔ ") == 9
    assert "frame 0x" not in said


@pytest.mark.needs_root("a mount namespace of its own, to hide /proc in")
def test_without_proc(own_mounts: list[str]) -> None:
    script = f"mount -t tmpfs none /proc && exec {sys.executable} -m miniloader walkthrough cow"
    done = subprocess.run([*own_mounts, script], capture_output=True, text=True, cwd=build.ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # some of it can be judged
    assert "capabilities not known" in " ".join(done.stdout.split()), done.stdout[:900]
    assert "unknown  evidence here is none, and this needs flags" in done.stdout
    assert "✔ Another process does not see the write" in done.stdout


# ----------------------------------------------------------------------------------------- interruption
@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGINT, 6), (signal.SIGTERM, 2), (signal.SIGHUP, 2)],
)
def test_interrupted_it_leaves_nobody_and_nothing(number: signal.Signals, step: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "cow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=build.ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith(f"── Step {step}"):
                break
        children = children_of(process.pid)
        for _ in range(3):  # in a hurry
            process.send_signal(number)
        process.stdout.read()
        err = process.stderr.read()
    assert (process.returncode, err) == (130, "miniloader: interrupted\n")
    wait_until_gone(children)
    assert os.listdir(tmp_path) == []


def test_a_check_is_interrupted(tmp_path: Path) -> None:
    text = (
        "import os, time; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'here'); time.sleep(99)"
    )
    (tmp_path / "try.py").write_text(text)
    with subprocess.Popen(
        [*COMMAND, "cow", "--check", "try.py"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(build.ROOT)},
    ) as process:
        while not (tmp_path / "here").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "miniloader: interrupted\n")
    wait_until_gone([int((tmp_path / "here").read_text())])


# ------------------------------------------------------------------------------- words, hints, solutions
def test_a_word_at_a_pause_is_explained() -> None:
    status, shown, asked = at_terminal("memory", answers=["frames\n", "nosuch\n", "\n"])
    assert (status, asked) == (0, 2 + 3 + 5)
    assert "  A page of physical memory." in shown
    assert "no word 'nosuch' here" in shown


def test_words() -> None:
    listed = run("--words").stdout
    assert len(re.findall(r"^\S", listed, re.M)) >= 35
    assert "Global offset table" in run("--word", "GOT").stdout
    assert json.loads(run("--word", "got", "--json").stdout)["words"]["got"].startswith("Global offset")
    refused = run("--word", "gott")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "did you mean" in refused.stderr


def test_hints_lead_on_and_the_solution_comes_after_an_attempt(tmp_path: Path) -> None:
    hints = json.loads(run("cow", "--hints", "--json").stdout)["hints"]
    assert len(hints) >= 2
    assert hints[0] in run("cow", "--hints").stdout.replace("\n     ", " ")
    assert run("--solution", "cow").returncode == 2
    tried = tmp_path / "try.py"
    tried.write_text(run("cow", "--exercise").stdout)
    unchanged = run("cow", "--check", tried, "--solution")
    assert "a hint: " in unchanged.stdout
    assert "if memory[page * PAGE] != 0" not in unchanged.stdout
    tried.write_text(tried.read_text().replace("= 0        #", "= 1        #"))
    attempted = run("cow", "--check", tried, "--solution")
    assert attempted.returncode == 1
    assert re.search(r"^ +\+ +if memory\[page \* PAGE\] != 0", attempted.stdout, re.M)


def test_everything_ends_with_what_was_seen_and_what_is_next() -> None:
    shown = run("tls", "prepared").stdout
    assert "miniloader walkthrough prepared" in shown
    assert "What you have seen" not in shown
