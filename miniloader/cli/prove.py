"""``miniloader prove``: several processes load a library; what do they share, and what did each copy?"""

from __future__ import annotations

import argparse

from miniloader.cli import options

__all__ = ["HELP", "configure", "run"]

HELP = "prove with several processes which pages of a library they share"


def configure(parser: argparse.ArgumentParser) -> None:
    """The library, how many processes, what to show, what may be asked of the loader."""
    options.library(parser)
    parser.add_argument(
        "-n", "--processes", metavar="N", type=int, default=4, help="how many processes load it (default: 4)"
    )
    parser.add_argument("--steps", action="store_true", help="show the pages after every step")
    options.html(parser, "write a page to look at and to play with as well")
    options.level(parser)
    options.prepared(parser)
    options.permissions(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prove, and print how it went; the exit status is that of the verdict."""
    alone = options.page_alone(arguments)
    from miniloader.lab.proof.prove import prove
    from miniloader.report.progress import progress

    with progress() as say:
        say("starting the processes")
        proof = prove(
            arguments.library,
            arguments.processes,
            level=arguments.level,
            on_step=lambda step, pids: say(f"{len(pids)} processes: {step}"),
            prepared=arguments.prepared,
            **options.permitted(arguments),
        )
    from miniloader.evidence.verdict import EXIT_STATUS

    if arguments.html is not None:  # before a reader may close the pipe
        from miniloader.report.html import write_proof

        write_proof(proof, arguments.html)
    if alone:
        return EXIT_STATUS[proof.verdict]
    if arguments.json:
        from miniloader.report.json import dump

        dump(proof.to_json())
    else:
        from miniloader.report.output import Output
        from miniloader.report.prove import lines

        out = Output()
        out.show(lines(proof, out.drawing, all_steps=arguments.steps))
        out.show(options.page_written(arguments), wrap=False)
    return EXIT_STATUS[proof.verdict]
