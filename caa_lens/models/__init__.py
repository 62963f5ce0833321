"""Models: loading one, and what it must offer to the library.

`loading/` turns files into a `HookedTransformer`. `checks` says which models are taken, `structure` what one is made of
and what somebody has changed about it, `unembedding` goes from its stream to logits. May never be imported here:
prompts, vectors, or anything that steers.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
