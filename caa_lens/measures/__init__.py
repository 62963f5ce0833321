"""Measures: what steering does to answers, with intervals.

`open_ended/` measures text that has no right answer. May never be imported here: interpretation, transfers, a report.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
