"""The command line, `caa-lens`: one verb a thing, the same engine as the library."""
