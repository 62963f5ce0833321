"""Contrastive Activation Addition on TransformerLens: extract steering vectors, steer, and ask what the vectors are.

The words most people need::

    import caa_lens as cl

    model = cl.load_model("demo")
    train, test = cl.ContrastSet.load("sentiment").split(test=40, seed=0)
    vectors = cl.extract(model, train)
    sweep = cl.sweep(model, test, vectors, multipliers=[-2, -1, 0, 1, 2])
    print(cl.generate(model, "How was your day?", vectors=[(vectors[sweep.best_layer], 2.0)]))

Names are imported on first use, so that `import caa_lens` itself takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caa_lens.activations import read_residuals as read_residuals
    from caa_lens.attribution import Attribution as Attribution
    from caa_lens.attribution import attribute as attribute
    from caa_lens.contrast import ContrastPair as ContrastPair
    from caa_lens.contrast import ContrastSet as ContrastSet
    from caa_lens.contrast import load_open_ended as load_open_ended
    from caa_lens.extraction import extract as extract
    from caa_lens.generation import generate as generate
    from caa_lens.generation import stream as stream
    from caa_lens.geometry import behavior_cosines as behavior_cosines
    from caa_lens.geometry import cosine_map as cosine_map
    from caa_lens.geometry import model_cosines as model_cosines
    from caa_lens.hooks import Intervention as Intervention
    from caa_lens.layer_transfer import LayerTransfer as LayerTransfer
    from caa_lens.layer_transfer import transfer as transfer
    from caa_lens.lens import LogitLens as LogitLens
    from caa_lens.lens import WordRanks as WordRanks
    from caa_lens.lens import logit_lens as logit_lens
    from caa_lens.lens import word_ranks as word_ranks
    from caa_lens.models import load_model as load_model
    from caa_lens.pair_geometry import norms as norms
    from caa_lens.pair_geometry import pca as pca
    from caa_lens.pair_geometry import separability as separability
    from caa_lens.pair_reading import pair_activations as pair_activations
    from caa_lens.prompts import Prompt as Prompt
    from caa_lens.prompts import PromptFormat as PromptFormat
    from caa_lens.residual_lens import StreamLens as StreamLens
    from caa_lens.residual_lens import stream_lens as stream_lens
    from caa_lens.similarity import TokenSimilarity as TokenSimilarity
    from caa_lens.similarity import token_similarity as token_similarity
    from caa_lens.steering import steer as steer
    from caa_lens.sweeps import Sweep as Sweep
    from caa_lens.sweeps import sweep as sweep
    from caa_lens.vectors import SteeringVector as SteeringVector
    from caa_lens.vectors import SteeringVectors as SteeringVectors
    from caa_lens.vectors import normalize_across_behaviors as normalize_across_behaviors

_MODULE_OF = {
    "Attribution": "attribution",
    "ContrastPair": "contrast",
    "ContrastSet": "contrast",
    "Intervention": "hooks",
    "LayerTransfer": "layer_transfer",
    "LogitLens": "lens",
    "Prompt": "prompts",
    "PromptFormat": "prompts",
    "SteeringVector": "vectors",
    "SteeringVectors": "vectors",
    "StreamLens": "residual_lens",
    "Sweep": "sweeps",
    "TokenSimilarity": "similarity",
    "WordRanks": "lens",
    "attribute": "attribution",
    "behavior_cosines": "geometry",
    "cosine_map": "geometry",
    "extract": "extraction",
    "generate": "generation",
    "load_model": "models",
    "load_open_ended": "contrast",
    "logit_lens": "lens",
    "model_cosines": "geometry",
    "normalize_across_behaviors": "vectors",
    "norms": "pair_geometry",
    "pair_activations": "pair_reading",
    "pca": "pair_geometry",
    "read_residuals": "activations",
    "separability": "pair_geometry",
    "steer": "steering",
    "stream": "generation",
    "stream_lens": "residual_lens",
    "sweep": "sweeps",
    "token_similarity": "similarity",
    "transfer": "layer_transfer",
    "word_ranks": "lens",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'caa_lens' has no attribute {name!r}")
    return getattr(importlib.import_module(f"caa_lens.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
