"""The engine: run a prompt once, then only what differs; read the stream, and edit it between blocks.

It knows tensors, layers and positions. The formulas of what is done to the stream (operators) are here, in `edits`, and
so is the hook that knows how many tokens of a KV cache lie behind it. May never be imported here: steering vectors,
measures, or anything above; an edit needs a direction, not the class that holds it.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
