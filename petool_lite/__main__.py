"""`python -m petool_lite`, and the command `petool-lite`."""

import sys


def run() -> None:
    """The command line; Ctrl-C while it is still being imported is no traceback either."""
    try:
        from petool_lite.cli import main

        main(prog_name="petool-lite")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
