"""``miniloader prove``: several processes load a library; what do they share, and what did each copy?"""

from __future__ import annotations

import argparse

__all__ = ["HELP", "configure", "run"]

HELP = "prove with several processes which pages of a library they share"


def configure(parser: argparse.ArgumentParser) -> None:
    """The library, how many processes, what to show, what may be asked of the loader."""
    from miniloader.kernel.features import LEVELS

    levels = [level.name for level in LEVELS if level.feature]
    parser.add_argument("library", metavar="LIB", help="a path, or a name searched as the system does")
    parser.add_argument(
        "-n", "--processes", metavar="N", type=int, default=4, help="how many processes load it (default: 4)"
    )
    parser.add_argument("--steps", action="store_true", help="show the pages after every step")
    parser.add_argument("--html", metavar="FILE", help="write a page to look at and to play with as well")
    parser.add_argument(
        "--level", choices=levels, help="use this level of evidence, not the best that works here"
    )
    parser.add_argument(
        "--prepared", action="store_true", help="take the relocated pages that `miniloader prepare` has kept"
    )
    parser.add_argument("--allow-text-relocations", action="store_true", help="let it relocate its code")
    parser.add_argument(
        "--allow-executable-stack", action="store_true", help="load it though it asks for one"
    )
    parser.add_argument(
        "--allow-writable-code", action="store_true", help="map segments writable and executable"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prove, and print how it went; the exit status is that of the verdict."""
    from miniloader.lab.proof.prove import prove
    from miniloader.report.progress import progress

    with progress() as say:
        say("starting the processes")
        proof = prove(
            arguments.library,
            arguments.processes,
            level=arguments.level,
            on_step=lambda step, pids: say(f"{len(pids)} processes: {step}"),
            text_relocations=arguments.allow_text_relocations,
            executable_stack=arguments.allow_executable_stack,
            writable_code=arguments.allow_writable_code,
            prepared=arguments.prepared,
        )
    from miniloader.evidence.verdict import EXIT_STATUS

    if arguments.html is not None:  # before a reader may close the pipe
        from miniloader.report.html import write_proof

        write_proof(proof, arguments.html)
    if arguments.json:
        import json

        print(json.dumps(proof.to_json()))
    else:
        from miniloader.report.output import console
        from miniloader.report.prove import show

        show(proof, console(), all_steps=arguments.steps)
    return EXIT_STATUS[proof.verdict]
