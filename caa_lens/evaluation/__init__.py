"""Evaluation: a steered model as the harnesses of evaluations meet it, asked in chat messages.

The package of a harness is imported in one module only, and by nobody who does not use it. May never be imported here: a
report, the command line.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
