"""Steering methods beside CAA: each is fitted on data, and makes interventions of a strength.

    fitted = cl.methods.linear_act.fit(model, pairs, layers=[14])
    cl.generate(model, "How was it?", fitted.interventions(1.0))

One module a method, with its formulas as plain functions of activations. What is fitted is frozen, prints as one line,
and is saved with everything that is needed to apply it again. May never be imported here: interpretation, transfers, or
anything that shows results.
"""

from caa_lens.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
