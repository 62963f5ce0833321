"""Contrast pairs: one pair, a validated set, the files they come from, the sets that are bundled.

May never be imported here: a model, a prompt, a vector, torch. A set is text.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
