"""Prompts: from words to token ids, with the exact positions of what matters.

May never be imported here: the engine, vectors, or anything that runs a model; a model is asked for its tokenizer only.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
