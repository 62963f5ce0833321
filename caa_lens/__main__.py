"""`python -m caa_lens` and `caa-lens` are the command line."""

import sys

from caa_lens.extras import needed_for


def main() -> None:
    """The command line, or one line on what it needs."""
    try:
        with needed_for("the command line"):
            from caa_lens.cli import commands
    except ImportError as error:
        sys.exit(f"caa-lens: {error}")
    commands.main()


if __name__ == "__main__":
    main()
