"""Evaluation: a steered model as the harnesses of evaluations meet it, asked in chat messages.

A harness' package is imported in the modules called after it only, and comes with an extra. May never be imported here:
a report, the command line.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
