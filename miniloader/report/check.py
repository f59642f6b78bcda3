"""Whether files load, and what is wrong with each: for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import printable
from miniloader.json_schema import BOOL, TEXT, array, keys, nullable, record, words
from miniloader.report.text import Line, Part, Piece, listed, more

if TYPE_CHECKING:
    from miniloader.lab.check.check import Checked
    from miniloader.lab.check.load_rule import LoadProblem

__all__ = ["SCHEMA", "lines", "to_json"]

_SIGNS: Final[dict[str, Piece]] = {
    "error": ("✘", "bold red"),
    "warning": ("!", "bold yellow"),
    "info": ("·", "dim"),
}
_RANK: Final = tuple(_SIGNS)
_MOST_SYMBOLS: Final = 6  # in a line
_MOST_GROUPS: Final = 12  # of one severity


def to_json(files: Iterable[Checked]) -> dict[str, Any]:
    """The object that ``check --json`` prints."""
    return {
        "files": [
            {
                "path": file.path,
                "host": file.host,
                "root": file.root,
                "loads": file.loads,
                "problems": [
                    asdict(problem) | {"providers": [*problem.providers]} for problem in file.problems
                ],
            }
            for file in files
        ]
    }


_KINDS: Final = (
    "missing-library missing-version undefined-symbol wrong-machine wrong-class executable-stack"
    " text-relocation static-tls abi-marker too-recent"
    " duplicate-symbol runpath-leaves-root malformed dlopen-note"
)
SCHEMA: Final = record({
    "files": array(record(
        keys(TEXT, "path root"),
        {"host": nullable(TEXT), "loads": BOOL},
        {"problems": array(record(
            {"kind": words(_KINDS), "severity": words("error warning info")},
            keys(nullable(TEXT), "name version symbol needed_by section function hint"),
            {"providers": array(TEXT)},
        ))},
    )),
})  # fmt: skip
"""What :func:`to_json` gives."""


def lines(file: Checked, *, everything: bool = False) -> Iterator[Part]:
    """The verdict on a file, then its problems, errors first; with ``everything`` those of severity info."""
    inside = f"  inside {printable(file.host)}" if file.host else ""
    verdict: Piece = ("loads", "bold green") if file.loads else ("does not load", "bold red")
    yield ((printable(file.path), "bold"), "  ", verdict, (inside, "dim"))
    hidden = 0
    for severity in _RANK:
        problems = [problem for problem in file.problems if problem.severity == severity]
        if severity == "info" and not everything:
            hidden = len(problems)
            continue
        groups = [list(group) for _, group in groupby(problems, key=_group)]
        for group in groups[:_MOST_GROUPS]:
            yield from _problem(group)
        if len(groups) > _MOST_GROUPS:
            yield ("  ", more(len(groups) - _MOST_GROUPS, "problems; --json lists all"))
    if hidden:
        yield ("  ", (f"{hidden:,} more worth knowing: --all", "dim"))


def _group(problem: LoadProblem) -> tuple[object, ...]:
    """Problems that differ in nothing but the symbol are told of together."""
    alone = problem.symbol if problem.kind == "undefined-symbol" else None
    return problem.kind, problem.name, problem.version, problem.needed_by, problem.hint, alone


def _problem(group: Sequence[LoadProblem]) -> Iterator[Line]:
    problem = group[0]
    subject = {
        "missing-version": problem.version,
        "too-recent": problem.version,
        "undefined-symbol": problem.symbol,
        "abi-marker": problem.version,
    }.get(problem.kind, problem.name)
    words = problem.kind.replace("-", " ")
    yield (
        "  ",
        _SIGNS[problem.severity],
        f" {words}",
        *((" ", (printable(subject), "bold")) if subject else ()),
    )
    names = [printable(member.symbol) for member in group if member.symbol]
    place = " in ".join(filter(None, (problem.function, problem.section)))
    facts = [f"needed by {problem.needed_by}"] if problem.needed_by else []
    facts += [place] if place else []
    facts += [f"of {problem.name}"] if problem.name and problem.name != subject else []
    facts += [f"version {problem.version}"] if problem.version and problem.version != subject else []
    if facts:
        yield (f"    {printable(', '.join(facts))}",)
    if names and names != [printable(subject)]:
        yield (f"    for {listed(names, _MOST_SYMBOLS)}",)
    if problem.hint:
        yield (f"    {printable(problem.hint)}",)
    if problem.providers and problem.kind != "duplicate-symbol":
        yield (f"    there is {listed([printable(path) for path in problem.providers], 3)}",)
