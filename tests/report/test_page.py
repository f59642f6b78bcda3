"""The pages in a real browser: what they show against what was found, by mouse, keys and axe-core."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

import miniloader
from fixtures import build
from miniloader.elf import LoadPlan
from miniloader.elf.plan import PlannedMapping, Span
from miniloader.evidence.sharing import STATES
from miniloader.evidence.snapshot import PAGE_DTYPE, Backing, ProcessPages, Snapshot
from miniloader.kernel.maps import Vma
from miniloader.kernel.probe import best_level
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.library_pages import look, look_again
from miniloader.lab.proof.proof import STEPS, Proof, Worked
from miniloader.report.html import write_audit, write_proof, write_walkthrough
from miniloader.walkthrough.chapters import segments
from miniloader.walkthrough.run_chapter import run_chapter
from tests.memory import still_child
from tests.report.conftest import Open, Opened

NAMES = [step.name for step in STEPS]
HOSTILE = "<img src=x onerror=document.title=1>&\x1b[2J\u202e.so"
HOSTILE_NAME = "<b>\x1b[2J&\"'"  # of a process
PAGES = ("proof", "audit", "walkthrough", "big")

LACKS = "this kernel lacks a pagemap that tells of pages"
has_pages = best_level() in ("frames", "flags")
needs_pages = pytest.mark.skipif(not has_pages, reason=LACKS)


# --------------------------------------------------------------------------------------------- the pages
@pytest.fixture(scope="module")
def proof(demo: Path) -> Proof:
    return miniloader.prove(demo, 3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def proof_page(proof: Proof, directory: Path) -> Path:
    path = directory / "proof.html"
    write_proof(proof, path)
    return path


@pytest.fixture(scope="module")
def big() -> Proof:
    return big_proof()


@pytest.fixture(scope="module")
def big_page(big: Proof, directory: Path) -> Path:
    path = directory / "big.html"
    write_proof(big, path)
    return path


@pytest.fixture(scope="module")
def walkthrough_page(directory: Path) -> Path:
    path = directory / "walkthrough.html"
    write_walkthrough([run_chapter(segments.CHAPTER)], path)
    return path


def load_demo(demo: Path) -> None:
    library = miniloader.load(demo)
    library.function("demo_next", ctypes.c_long)()  # writes demo_counters
    Path("/proc/self/comm").write_text(HOSTILE_NAME)


@pytest.fixture(scope="module")
def audit_page(demo: Path, directory: Path) -> Path:
    if not has_pages:
        pytest.skip(LACKS)
    path = directory / "audit.html"
    drawn = Path(shutil.copy(demo, directory / "libdrawn.so"))  # the children may have the other already
    with still_child(load_demo, drawn) as (one, _), still_child(load_demo, drawn) as (other, _):
        audit = miniloader.audit([one, other], library=drawn.name)
        sights = look_again(look(audit, "start"), audit, "1 s later")
        write_audit(audit, sights, path)
    return path


@pytest.fixture
def page_called(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    return lambda name: request.getfixturevalue(f"{name}_page")


def big_proof(pages: int = 30_000, count: int = 16) -> Proof:
    """A library as large as they come: code in scattered frames, some pages copied in each process."""
    rng = np.random.default_rng(7)
    end = pages * PAGE_SIZE
    data = end - 2000 * PAGE_SIZE
    plan = LoadPlan(
        page_size=PAGE_SIZE,
        alignment=PAGE_SIZE,
        mappings=(
            PlannedMapping(0, data, 0, "r-x", "file"),
            PlannedMapping(data, end, data, "rw-", "file"),
        ),
        zeroed=(),
        relro=Span(0, 0),
    )
    # Neighbours in a file mostly are neighbours in memory, in runs of a few pages (readahead).
    runs = rng.permutation(pages // 4).repeat(4) * 4 + np.tile(np.arange(4), pages // 4) + 1000
    copied = np.arange(pages) >= pages - 2000
    snapshots = []
    own = [rng.integers(1 << 20, 1 << 22, pages) for _ in range(count)]
    for number, name in enumerate(NAMES):
        processes = []
        for row in range(count):
            table = np.zeros(pages, dtype=PAGE_DTYPE)
            table["vaddr"] = np.arange(pages, dtype=np.uint64) * PAGE_SIZE
            private = copied & (number >= 2)
            there = number > 0
            table["present"] = there
            table["frame"] = np.where(private, own[row], runs) * there
            table["file"] = ~private & there
            table["map_count"] = np.where(private, 1, count) if there else -1
            table["flags"] = np.where(private, 0x5868, 0x86C) * there
            base = 0x7F00_0000_0000 + (row << 32)
            vmas = (
                Vma(base, base + data, "r-x", False, 0, (8, 1), 7, "/lib/libbig.so", False),
                Vma(base + data, base + end, "rw-", False, data, (8, 1), 7, "/lib/libbig.so", False),
            )
            backings = tuple(Backing(vma, None) for vma in vmas)
            gone = name == "exited" and row == count - 1
            processes.append(ProcessPages(100 + row, base, backings, table, gone=gone))
        snapshots.append(Snapshot(name, "frames", tuple(processes), 0.0))
    worked = tuple(Worked(one.pid, one.base) for one in snapshots[0].processes)
    return Proof("/lib/libbig.so", plan, "frames", worked, tuple(snapshots), None, ())


# ------------------------------------------------------------------------------------------- the matrix
CELLS = """(film, part) => {
  const to = film.canvas.getContext("2d"), ratio = film.canvas.width / film.width, found = [];
  for (let row = 0; row < film.data.rows.length; row++) {
    const colours = [];
    for (let column = 0; column < film.data.columns.length; column++) {
      const x = (film.x(column) + film.cell * part) * ratio, y = (30 + film.height * (row + 0.8)) * ratio;
      colours.push([...to.getImageData(Math.round(x), Math.round(y), 1, 1).data].join(","));
    }
    found.push(colours);
  }
  return found;
}"""


def frames_of(snapshot: Snapshot, page: int) -> list[int]:
    return [0 if one.gone else int(one.pages["frame"][page]) for one in snapshot.processes]


def test_the_slider_changes_the_matrix_as_the_data_say(
    proof: Proof, proof_page: Path, open_page: Open
) -> None:
    if proof.evidence != "frames":
        pytest.skip("needs root: frame numbers are hidden from others")
    opened = open_page(proof_page)
    columns = opened.film("film => film.data.columns")
    pictures = []
    for step, name in enumerate(NAMES):
        opened.to_step(step)
        assert opened.page.locator(".step-name").inner_text() == f"{step + 1} of {len(NAMES)}: {name}"
        cells = opened.film(CELLS, argument=0.15)
        pictures.append(cells)
        snapshot = proof.snapshot(name)
        for at, page in enumerate(columns):
            frames, seen = frames_of(snapshot, page), [row[at] for row in cells]
            if any(one.pages["zero"][page] for one in snapshot.processes):
                continue  # drawn as empty as a page that is not there: it uses no memory
            for one in range(len(frames)):
                for other in range(one):
                    assert (seen[one] == seen[other]) == (frames[one] == frames[other]), (name, page)
    assert all(one != other for one, other in pairwise(pictures))


@needs_pages
def test_the_table_says_what_the_matrix_shows(proof: Proof, proof_page: Path, open_page: Open) -> None:
    opened = open_page(proof_page)
    opened.page.locator(".as-text summary").click()
    states = {page["vaddr"]: page["state"] for page in proof.to_json()["steps"][3]["pages"]}
    table = opened.page.locator(".as-text table").nth(3)
    assert table.locator("caption").inner_text().startswith("written: ")
    told = 0
    for row in table.locator("tbody tr").all():
        start, pages = int(row.locator("th").inner_text(), 16), int(row.locator("td").first.inner_text())
        cells = [cell.split(",")[0] for cell in row.locator("td").all_inner_texts()[2:]]
        for page in range(pages):
            assert states[start + page * PAGE_SIZE] == cells
            told += 1
    assert told == sum(set(one) != {"absent"} for one in states.values())


@needs_pages
def test_animation_ends_where_the_step_is(proof_page: Path, open_page: Open) -> None:
    still = open_page(proof_page)
    moving = open_page(proof_page, reduced_motion="no-preference", bypass_csp=True)  # to wait for a value
    for opened in (still, moving):
        opened.page.locator(".stage").focus()
        for key in ("Home", ",", ",", ","):
            opened.page.keyboard.press(key)
        opened.page.keyboard.press(".")
    moving.page.wait_for_function("() => document.querySelector('.film').film.progress === 1")
    assert moving.film("film => film.step") == still.film("film => film.step") == 1
    assert moving.film(CELLS, argument=0.15) == still.film(CELLS, argument=0.15)


@needs_pages
def test_playing_goes_through_the_steps(proof_page: Path, open_page: Open) -> None:
    opened = open_page(proof_page, bypass_csp=True)  # to wait for a value
    play, pause = (opened.page.get_by_role("button", name=name) for name in ("Play", "Pause"))
    play.click()
    pause.wait_for()
    opened.page.wait_for_function("() => document.querySelector('.film').film.step === 4")
    play.wait_for()  # it stops by itself at the end, and begins anew
    play.click()
    assert opened.film("film => film.step") == 0
    pause.click()
    play.wait_for()


# ---------------------------------------------------------------------------------- pointing and typing
def check_facts(opened: Opened, proof: Proof, step: str, row: int, page: int) -> None:
    snapshot = proof.snapshot(step)
    pages, facts = snapshot.processes[row].pages[page], opened.facts()
    vaddr, base = int(pages["vaddr"]), snapshot.processes[row].base
    title = f"Page {vaddr:#x} in process {row + 1}"
    assert opened.page.locator(".facts-title").inner_text() == title
    assert facts["address"] == f"{base + vaddr:#x} in pid {snapshot.processes[row].pid}"
    json = proof.to_json()["steps"][NAMES.index(step)]["pages"][page]
    assert facts["state"].split()[1] == json["state"][row] + ":"
    frame = json["frame"][row]
    if frame is not None:
        assert facts["frame"].startswith(f"frame {frame:#x}, ")
        sharers = [f"process {at + 1}" for at, one in enumerate(json["frame"]) if at != row and one == frame]
        assert facts["frame"].endswith(", ".join(sharers) or "in no other of these processes")
    if json["map_count"][row] is not None:
        assert facts["mapped"].startswith(f"{json['map_count'][row]} time")
    said = opened.page.get_by_role("status").inner_text()
    assert said.startswith(f"process {row + 1}, page {vaddr:#x}: {json['state'][row]}")


@needs_pages
def test_hovering_shows_the_page(proof: Proof, proof_page: Path, open_page: Open) -> None:
    opened = open_page(proof_page)
    canvas = opened.page.locator("canvas.matrix")
    for row, column in ((1, 0), (2, 4), (0, 8), (2, 11)):
        where = opened.film("(film, at) => [film.x(at) + film.cell / 2, film.height]", argument=column)
        canvas.hover(position={"x": where[0], "y": 30 + (row + 0.5) * where[1]})
        page = opened.film("(film, at) => film.data.columns[at]", argument=column)
        check_facts(opened, proof, "written", row, page)
        assert not opened.page.locator(".film .bytes").is_visible()
    canvas.click(position={"x": where[0], "y": 30 + 1.5 * where[1]})
    check_facts(opened, proof, "written", 1, page)
    heading = opened.page.locator(".film .bytes h3").inner_text()
    assert heading == f"The bytes of page {page * PAGE_SIZE:#x}"


@needs_pages
def test_the_keyboard_shows_the_page(proof: Proof, proof_page: Path, open_page: Open) -> None:
    opened = open_page(proof_page)
    opened.page.locator("input[type=range]").focus()
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.className") == "stage"
    opened.page.keyboard.press("Home")
    for key, row, column in (
        ("ArrowRight", 0, 1),
        ("ArrowDown", 1, 1),
        ("ArrowDown", 2, 1),
        ("ArrowDown", 2, 1),
        ("ArrowLeft", 2, 0),
        ("ArrowUp", 1, 0),
        ("End", 1, -1),
    ):
        opened.page.keyboard.press(key)
        page = opened.film("(film, at) => film.data.columns.at(at)", argument=column)
        check_facts(opened, proof, "written", row, page)
    opened.page.keyboard.press(",")
    check_facts(opened, proof, "relocated", 1, page)


@needs_pages
def test_why_a_page_was_copied_is_told(demo: Path, proof: Proof, proof_page: Path, open_page: Open) -> None:
    """Section, symbol and number of relocations as the file has them, for the page of demo_current."""
    opened = open_page(proof_page)
    image = miniloader.inspect(demo)
    index = image.symbols.find("demo_current")
    assert index is not None
    vaddr = int(image.symbols.rows["value"][index])
    choose(opened, vaddr // PAGE_SIZE)
    facts = opened.facts()
    assert facts["section"].split("; ")[0] == ".data"
    assert "demo_current" in facts["symbols"]
    targets = image.relocations.targets()
    number = int(((targets >= vaddr) & (targets < vaddr + PAGE_SIZE)).sum())
    assert f"relocation: {number} word" in facts["cause"]


def choose(opened: Opened, page: int) -> None:
    """Go to a page by the keyboard."""
    opened.page.locator(".stage").focus()
    opened.page.keyboard.press("Home")
    for _ in range(opened.film("(film, page) => film.data.columns.indexOf(page)", argument=page)):
        opened.page.keyboard.press("ArrowRight")


@needs_pages
def test_a_page_opens_to_its_bytes(demo: Path, proof: Proof, proof_page: Path, open_page: Open) -> None:
    """The word that each process wrote: marked, named, and in each the value that it really has."""
    assert proof.word is not None
    opened = open_page(proof_page)
    choose(opened, proof.word.vaddr // PAGE_SIZE)
    opened.page.keyboard.press("Enter")
    section = opened.page.locator(".film .bytes")
    start = proof.word.vaddr // 16 * 16
    for row, process in enumerate(proof.processes):
        section.get_by_role("button", name=f"process {row + 1}").click()
        line = section.locator("tbody tr", has=opened.page.get_by_text(f"{start:#x}", exact=True))
        before, after = (line.locator("td.octets").nth(at).locator("mark").inner_text() for at in (0, 1))
        assert bytes.fromhex(after.replace(" ", "")) == process.pid.to_bytes(8, "little")
        with demo.open("rb") as file:
            offset = miniloader.inspect(demo).plan(PAGE_SIZE).at(proof.word.vaddr)
            assert offset is not None
            file.seek(offset.file_offset + proof.word.vaddr - offset.start)
            assert bytes.fromhex(before.replace(" ", "")) == file.read(8)
        assert "each process wrote" in line.locator("td.name").inner_text()
    section.get_by_role("button", name="Show the whole page").click()
    assert section.locator("tbody tr").count() == PAGE_SIZE // 16
    opened.to_step(1)
    assert "nothing has been written" in section.inner_text()
    assert section.locator("mark").count() == 0


@needs_pages
def test_code_stands_beside_its_slots(proof: Proof, proof_page: Path, open_page: Open) -> None:
    opened = open_page(proof_page)
    first = opened.page.locator(".jumps li").first
    assert "rip" in first.locator("mark").inner_text() or os.uname().machine != "x86_64"
    values = first.locator(".slot dd").all_inner_texts()[2:]
    name = first.locator(".slot dd").first.inner_text()
    image = miniloader.inspect(proof.path)
    index = image.symbols.find(name)
    assert index is not None
    vaddr = int(image.symbols.rows["value"][index])
    assert values == [f"{one.base + vaddr:#x}" for one in proof.processes]


@needs_pages
def test_questions_reveal_when_asked(proof_page: Path, open_page: Open) -> None:
    opened = open_page(proof_page)
    choices = opened.page.locator(".question details")
    assert choices.count() == 3
    assert not any(text.is_visible() for text in choices.locator("p").all())
    choices.nth(1).locator("summary").focus()
    opened.page.keyboard.press("Enter")
    assert choices.nth(1).locator("p").inner_text().startswith("✔ Right.")
    choices.nth(0).locator("summary").click()
    assert choices.nth(0).locator("p").inner_text().startswith("✘ No.")


@needs_pages
def test_an_audit_is_drawn_as_it_was_found(audit_page: Path, open_page: Open) -> None:
    opened = open_page(audit_page)
    names = opened.film("film => film.data.scenes.map((one) => one.name)")
    assert names == ["start", "1 s later"]
    shown = HOSTILE_NAME.replace("\x1b", "\\x1b")
    assert [name.rpartition(" ")[0] for name in opened.film("film => film.data.rows")] == [shown] * 2
    assert opened.page.locator("main td b").count() == 0
    copied = next(state.code for state in STATES if state.name == "copied")
    pages = opened.film(
        "(film, copied) => film.data.columns.filter((page) => film.data.state(0, 0, page) === copied)",
        argument=copied,
    )
    image = miniloader.inspect(opened.page.locator(".facts-line").first.inner_text().split(";")[0])
    index = image.symbols.find("demo_counters")
    assert index is not None
    written = int(image.symbols.rows["value"][index]) // PAGE_SIZE
    assert written in pages
    choose(opened, written)
    assert "write" in opened.facts()["cause"]
    assert "demo_counters" in opened.facts()["written"]


# -------------------------------------------------------------------------------------- for every reader
def open_details(opened: Opened) -> None:
    opened.page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


@pytest.mark.parametrize("name", PAGES[:-1])  # "big" is another "proof", and takes it half a minute
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(
    name: str, scheme: str, page_called: Callable[[str], Path], open_page: Open
) -> None:
    opened = open_page(page_called(name), color_scheme=scheme)
    open_details(opened)
    found = Axe().run(opened.page).response["violations"]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_need_not_scroll_sideways(
    name: str, page_called: Callable[[str], Path], open_page: Open
) -> None:
    opened = open_page(page_called(name), width=380, height=800)
    if name != "big":
        open_details(opened)
    if opened.page.locator(".stage").count():
        opened.page.locator(".stage").first.focus()
        opened.page.keyboard.press("Enter")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 380


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@needs_pages
def test_dark_and_light(proof_page: Path, open_page: Open) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = (open_page(proof_page, color_scheme=scheme) for scheme in ("light", "dark"))
    assert brightness(light.page.evaluate(paper)) > 200
    assert brightness(dark.page.evaluate(paper)) < 60
    assert light.film(CELLS, argument=0.15) != dark.film(CELLS, argument=0.15)
    dark.page.get_by_role("button", name="Light").click()
    assert brightness(dark.page.evaluate(paper)) > 200
    assert light.film(CELLS, argument=0.15) == dark.film(CELLS, argument=0.15)


@needs_pages
def test_without_colour_a_copy_still_differs(proof_page: Path, open_page: Open) -> None:
    """Shape and number: as grey as the shared page is, a copied one has a cut corner."""
    opened = open_page(proof_page)
    picture = """(film, wanted) => {
      const { data } = film, page = data.columns.findIndex((one) => data.state(film.step, 1, one) === wanted);
      const x = film.x(page), y = 30 + film.height, ratio = film.canvas.width / film.width;
      const at = (part, down) => [...film.canvas.getContext("2d").getImageData(
        Math.round((x + film.cell * part) * ratio), Math.round((y + film.height * down) * ratio), 1, 1
      ).data].join();
      return [at(0.15, 0.8), at(0.9, 0.07)];
    }"""
    codes = {state.name: state.code for state in STATES}
    shared, copied = (opened.film(picture, argument=codes[name]) for name in ("shared", "copied"))
    assert shared[0] == shared[1]
    assert copied[0] != copied[1]


def test_printed_it_is_whole(proof_page: Path, open_page: Open) -> None:
    opened = open_page(proof_page)
    opened.page.emulate_media(media="print")
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not opened.page.locator(".play").is_visible()
    assert all(one.is_visible() for one in opened.page.locator("details > :not(summary)").all())
    assert len(opened.page.pdf()) > 10_000


def test_without_its_script_it_still_tells(proof: Proof, proof_page: Path, open_page: Open) -> None:
    opened = open_page(proof_page, java_script_enabled=False)
    text = opened.page.locator("main").inner_text()
    assert all(claim.statement in text for claim in proof.claims)
    if opened.page.locator(".film").count():
        assert not opened.page.locator(".film .live").is_visible()
        opened.page.locator(".as-text summary").click()
        assert opened.page.locator(".as-text table").count() == len(NAMES)


# --------------------------------------------------------------------------------------- large, hostile
def test_a_large_library_stays_small_and_opens(big: Proof, big_page: Path, open_page: Open) -> None:
    assert big_page.stat().st_size < 3_000_000
    opened = open_page(big_page)
    assert opened.film("film => [film.data.rows.length, film.data.pages]") == [16, 30_000]
    assert opened.film("film => film.data.left_out") == []
    written = big.snapshot("written")
    opened.page.locator(".stage").focus()
    for key in ("End", "ArrowDown", "Home"):
        opened.page.keyboard.press(key)
        row, page = opened.film("film => [film.row, film.page]")
        frame, facts = frames_of(written, page)[row], opened.facts()
        assert facts["frame"].startswith(f"frame {frame:#x}, ")
        assert facts["address"].startswith(f"{written.processes[row].base + page * PAGE_SIZE:#x} ")
        assert facts["mapped"] == ("1 time" if page else "16 times") + " over all processes"
    opened.page.locator("canvas.overview").click(position={"x": 700, "y": 40})
    assert 0 < opened.film("film => film.page") < 30_000


@pytest.fixture
def hostile_library(demo: Path, tmp_path: Path) -> Iterator[Path]:
    """A library whose file and one of its symbols are named after what a page must not do."""
    library = Path(shutil.copy(demo, tmp_path / HOSTILE))
    octets = library.read_bytes()
    name = b"demo_settings"
    assert octets.count(name) > 0
    with library.open("r+b") as file:
        file.write(octets.replace(name, b"<b>\x1b[2J\"'&</b"))
        file.flush()
        os.fsync(file.fileno())
    return library


def test_names_are_only_ever_text(hostile_library: Path, tmp_path: Path, open_page: Open) -> None:
    proof = miniloader.prove(hostile_library, 2)
    page = tmp_path / "hostile.html"
    write_proof(proof, page)
    text = page.read_text()
    assert not {"\x1b", "\u202e"} & set(text)
    assert "<img" not in text
    opened = open_page(page)
    assert opened.page.title() != "1"
    assert opened.page.locator("img, main b b").count() == 0
    assert "<img src=x onerror" in opened.page.locator("h1").inner_text()
    if proof.evidence in ("frames", "flags"):
        choose(opened, hostile_page(hostile_library))
        assert "<b>\\x1b[2J" in opened.facts()["symbols"]


def hostile_page(library: Path) -> int:
    image = miniloader.inspect(library)
    index = image.symbols.find(b"<b>\x1b[2J\"'&</b")
    if index is None:  # its hash is that of its old name
        index = next(at for at in range(len(image.symbols)) if image.symbols.name(at).startswith("<b>"))
    return int(image.symbols.rows["value"][index]) // PAGE_SIZE


def test_the_policy_lets_nothing_else_run(proof_page: Path, tmp_path: Path, open_page: Open) -> None:
    """Even if some name did become markup, it could neither run nor load anything."""
    page = tmp_path / "injected.html"
    attack = "<img src='http://127.0.0.1:9/x' onerror='document.title=1'><script>document.title=2</script>"
    page.write_text(proof_page.read_text().replace("<main", attack + "<main"))
    opened = open_page(page)
    assert opened.page.title() not in ("1", "2")
    assert len(opened.said) == 3
    assert all("Content Security Policy" in message for message in opened.said)
    opened.said.clear()
    opened.requests[:] = [url for url in opened.requests if url.startswith("file:")]


def test_a_page_that_cannot_be_written_says_so(proof: Proof, tmp_path: Path) -> None:
    target = tmp_path / "missing" / "page.html"
    with pytest.raises(miniloader.MiniloaderError, match=r"page\.html: cannot write the page: No such file"):
        write_proof(proof, target)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ the gallery
@pytest.mark.parametrize("name", ["course.webp", "grid.svg", "page.webp"])
def test_the_pictures_of_the_gallery_are_small_and_load_nothing(name: str) -> None:
    picture = (build.ROOT / ".gallery" / name).read_bytes()
    assert 10_000 < len(picture) < 150_000
    if name.endswith(".svg"):
        assert b"<script" not in picture
        assert b"url(http" not in picture
        assert b"href" not in picture
