"""Contrastive Activation Addition on TransformerLens: extract steering vectors, steer, and ask what the vectors are.

What a first day needs, in the order of the data::

    pairs       ContrastPair, ContrastSet
    the model   load_model, PromptFormat
    vectors     extract, SteeringVector, SteeringVectors, read_vectors
    steering    steer, generate, generate_stream, Intervention
    measures    reliability, sweep, calibrate, side_effects, compare
    meaning     logit_lens, word_ranks, residual_lens, token_similarity, cosines, explore
    transfers   transfer_layers, transfer_behaviors, transfer_prompts, transfer_models

as in::

    import caa_lens as cl

    model = cl.load_model("demo")
    train, validation, test = cl.ContrastSet.load("sentiment").split(test=20, validation=20, seed=0)
    vectors = cl.extract(model, train)
    sweep = cl.sweep(model, test, vectors, multipliers=[-2, -1, 0, 1, 2], validation=validation)
    print(cl.generate(model, "How was your day?", vectors=[(vectors[sweep.best_layer], 2.0)]))

All else is in the room that it belongs to, and is found there by completion: `cl.contrast`, `cl.prompts`, `cl.models`,
`cl.engine`, `cl.vectors`, `cl.steering`, `cl.measures`, `cl.methods`, `cl.interpretation`, `cl.transfers`,
`cl.explorer`, `cl.report`, `cl.paper`.

Names are imported on first use, so that `import caa_lens` itself takes no time.
"""

from importlib.metadata import version

from caa_lens.lazy_names import attach

__version__ = version("caa-lens")
__getattr__, __dir__, __all__ = attach(__name__, __file__)
