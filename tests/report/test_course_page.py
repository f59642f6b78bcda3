"""The course's page as a learner uses it: a chapter at a time, questions before answers, on any screen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

from miniloader.kernel.probe import best_level
from miniloader.report.html import write_walkthrough
from miniloader.walkthrough.chapters import chapter
from miniloader.walkthrough.run_chapter import run_chapter
from tests.report.conftest import Opened

Open = Callable[..., Opened]
CHAPTERS = ("fork", "relocation")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("course") / "course.html"
    write_walkthrough([run_chapter(chapter(name)) for name in CHAPTERS], path)
    return path


def wait_for(opened: Opened, *names: str) -> None:
    """Wait until these chapters are visible, and no other: an address takes a moment to be followed."""
    visible = "[...document.querySelectorAll('.chapter')].filter((one) => one.checkVisibility())"
    same = f"(names) => {visible}.map((one) => one.id).join() == names.join()"
    opened.page.wait_for_function(same, arg=list(names))


def at(opened: Opened, place: str) -> None:
    opened.page.evaluate("(place) => { location.hash = place }", place)
    opened.page.wait_for_function("(place) => document.getElementById(place).checkVisibility()", arg=place)


def test_a_chapter_at_a_time_by_keys_links_and_address(course: Path, open_page: Open) -> None:
    opened = open_page(course)
    wait_for(opened, "fork")
    opened.page.keyboard.press("n")
    wait_for(opened, "relocation")
    current = opened.page.locator(".contents [aria-current]").inner_text()
    assert current.endswith("Relocation, the GOT and the PLT")
    opened.page.keyboard.press("p")
    wait_for(opened, "fork")
    opened.page.locator("#fork .turn [rel=next]").click()
    wait_for(opened, "relocation")
    at(opened, "fork-3")
    wait_for(opened, "fork")
    assert opened.page.evaluate("document.getElementById('fork-3').getBoundingClientRect().top") < 900
    opened.page.keyboard.press("?")
    wait_for(opened, "words")
    assert opened.page.locator("h1").count() == 1


def test_the_answer_comes_after_the_question(course: Path, open_page: Open) -> None:
    opened = open_page(course)
    at(opened, "fork-2")
    step = opened.page.locator("#fork-2")
    film = "(figure) => [figure.film.step, figure.film.data.scenes.length]"
    assert not step.locator(".outcome").is_visible()
    assert step.locator(".film").evaluate(film) == [0, 2]
    step.locator(".choice summary").first.click()  # a wrong one: it is told, and what happened is shown
    step.locator(".outcome").wait_for()  # that a part of the page is opened is told a moment later
    assert step.locator(".film").evaluate(film) == [1, 2]
    assert not opened.page.locator("#fork-3 .outcome").is_visible()
    opened.page.get_by_role("button", name="Show all answers").click()
    opened.page.locator("#fork-3 .outcome").wait_for()


def test_loads_are_told_from_calls(course: Path, open_page: Open) -> None:
    opened = open_page(course)
    opened.page.get_by_role("button", name="Show all answers").click()
    lines = opened.page.locator("#fork-1 .calls li, #fork-2 .calls li").all_inner_texts()
    assert any(line.startswith("fork() = ") for line in lines)
    assert any(line.endswith('shared[0:5] → "hello"') for line in lines)
    assert "Listing: the same in C" in opened.page.locator("#fork").inner_text()


def test_words_and_pages_are_named_as_in_the_text(course: Path, open_page: Open) -> None:
    """No break before a word's comma; a page has its number; the legend has signs of its matrix."""
    opened = open_page(course)
    assert opened.page.locator("a.word").first.evaluate("(a) => getComputedStyle(a).display") == "inline"
    opened.page.get_by_role("button", name="Show all answers").click()
    assert re.match(r"parent, page \d: ", opened.page.locator("#fork-1 .film .said").inner_text())
    changed = opened.page.locator("#fork-2 .film .said").inner_text()
    assert changed.startswith(("parent, page 2: ", "parent, page 5: ")) or best_level() == "totals"
    sample, owners = opened.page.locator("#fork-1 .film").evaluate("""({ film: { data }, film }) => {
      const cells = data.rows.flatMap((_, row) => data.columns.map((page) => [row, page]));
      const copies = cells.filter(([row, page]) => data.state(0, row, page) === 4);
      return [film.ownerOf(4), copies.map(([row, page]) => data.owner(0, row, page))];
    }""")
    assert sample in owners or (sample, owners) == (-1, [])


WIDE = """() => {
  const outside = (one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
  const all = [...document.querySelectorAll(".chapter:not([hidden]) *")];
  return all.filter((one) => !one.closest(".scroll, pre, svg") && outside(one)).map((one) => one.outerHTML);
}"""


@pytest.mark.parametrize(("width", "scheme"), [(380, "light"), (768, "dark"), (1280, "light")])
def test_each_chapter_fits_and_is_accessible(width: int, scheme: str, course: Path, open_page: Open) -> None:
    opened = open_page(course, width=width, height=900, color_scheme=scheme)
    for name in (*CHAPTERS, "words"):
        at(opened, name)
        opened.page.evaluate("document.querySelector('.reveal-all').click()")
        assert opened.page.evaluate(WIDE) == []
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        if width < 1280:
            found = Axe().run(opened.page).response["violations"]
            assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found] == []


def test_reduced_motion_is_respected(course: Path, open_page: Open) -> None:
    opened = open_page(course, reduced_motion="reduce")
    at(opened, "fork-2")
    opened.page.locator("#fork-2 .reveal button").click()
    assert opened.page.locator("#fork-2 .film").evaluate("(figure) => figure.film.progress") == 1


def test_it_is_whole_without_its_script_and_on_paper(course: Path, open_page: Open) -> None:
    opened = open_page(course, java_script_enabled=False)
    wait_for(opened, *CHAPTERS, "words")
    assert all(one.is_visible() for one in opened.page.locator(".outcome").all())
    printed = open_page(course)
    drawn = printed.page.evaluate("""() => {
      dispatchEvent(new Event('beforeprint'));  // what is printed is what is drawn when this is over
      return [...document.querySelectorAll(".matrix")].map((canvas) => {
        const { width, height } = canvas, context = canvas.getContext("2d");
        return width * height > 0 && context.getImageData(0, 0, width, height).data.some(Boolean);
      });
    }""")
    wait_for(printed, *CHAPTERS, "words")
    assert all(one.is_visible() for one in printed.page.locator(".outcome").all())
    assert len(drawn) > 2
    assert all(drawn)


def test_a_chapter_is_small(course: Path) -> None:
    """Sixteen of them, in one file, are under 3 MB."""
    assert course.stat().st_size / len(CHAPTERS) < 3_000_000 / 16
