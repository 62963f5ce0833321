"""A module for each figure or table of the paper, named by its number, as an `Experiment`: what is asked and how told.

Some modules share one figure (5: the text, and a judge's view of it) or several (9 and 10, Tables 4, 10 and 13). May be
imported: `caa_lens`, `experiments.running`, and each other, where one figure stands on another (the layer that Figure
3 chooses, the answers of Figure 5). Never: `experiments.own`, the catalogue, the command line.
"""
