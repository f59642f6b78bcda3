"""``python -m miniloader``: the command line."""

from miniloader.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
