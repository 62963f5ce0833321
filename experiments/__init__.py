"""The paper's experiments, one module a figure or table, composed of the package: `python -m experiments --help`."""
