"""The paper (arXiv 2312.06681): its numbers, its questions and where they are published.

May never be imported here: a model, a vector, or anything that runs.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
