"""Transfers: a vector used elsewhere, at another layer, for another behavior or prompt, in another model.

May never be imported here: a report, the command line.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
