"""``miniloader``, the command, and ``python -m miniloader``."""

import gc


def command() -> int:
    """Run the command line and return its exit status; its first imports are not searched for garbage."""
    paused = gc.isenabled()
    gc.disable()  # what is imported first is no garbage

    from miniloader.cli import main

    return main(paused=paused)


if __name__ == "__main__":
    raise SystemExit(command())
