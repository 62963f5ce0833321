"""Steering vectors: extracted, combined, saved, exchanged with other tools.

`algebra/` is what vectors can be made of, `formats/` other tools' files. May never be imported here: anything that
steers, measures or draws.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
