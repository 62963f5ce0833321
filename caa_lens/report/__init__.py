"""One self-contained HTML page, of a demo or of whole runs.

May never be imported here: a model, or anything that runs one.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
