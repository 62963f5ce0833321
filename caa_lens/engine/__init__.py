"""The engine: run a prompt once, then only what differs; read the stream, and edit it between blocks.

It knows tensors, layers and positions. May never be imported here: steering vectors, measures, or anything above; an
edit needs a direction, not the class that holds it.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
