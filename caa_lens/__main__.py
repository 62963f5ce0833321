"""`python -m caa_lens` is the command line."""

from caa_lens.cli.commands import main

if __name__ == "__main__":
    main()
