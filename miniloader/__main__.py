"""``python -m miniloader``: the command line."""

if __name__ == "__main__":
    import gc

    paused = gc.isenabled()
    gc.disable()  # what is imported first is no garbage

    from miniloader.cli import main

    raise SystemExit(main(paused=paused))
