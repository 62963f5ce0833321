"""The paper's experiments and our own questions, composed of the package: `python -m experiments --help`.

`running/` is the machinery, `paper/` a module for each figure or table, `own/` what only we ask. `catalogue` lists all
experiments and stands above the three, and `__main__` and `export` above it. A module imports from `caa_lens`, from its
own folder and from those below: running, then paper, then own, then the catalogue. `caa_lens` never imports from here.
"""
