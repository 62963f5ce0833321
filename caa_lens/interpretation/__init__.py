"""Interpretation: what a vector says, and where it lies.

Lenses, similarity with tokens, attribution downstream, geometry. May never be imported here: transfers, a report, the
command line.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
