"""The explorer: a model and its vectors to play with, in a notebook or on a page of this machine.

One session writes texts, colours them and reads the lens; two surfaces show what it tells. May never be imported here:
the command line.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
