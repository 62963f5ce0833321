"""Steering: vectors in a model, in your own code (`steer`) or as text (`generate`).

What a user says of steering is an `Intervention`; the formula that it names is an operator of `engine.edits`. May never
be imported here: measures, or anything that asks what a vector did.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
