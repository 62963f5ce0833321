"""The command line, `caa-lens`: one verb a thing. Nothing in the package imports it."""
