"""Steering vectors: extracted from activations, combined, saved, exchanged with other tools.

Estimators are in `extraction`; `algebra/` computes with vectors that are there, `formats/` reads and writes other
tools' files. May never be imported here: anything that steers, measures or draws.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
