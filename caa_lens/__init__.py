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
    from caa_lens.algebra.combinations import gram_schmidt as gram_schmidt
    from caa_lens.algebra.combinations import mean as mean
    from caa_lens.algebra.combinations import normalize_across_behaviors as normalize_across_behaviors
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
    from caa_lens.interchange import read_vectors as read_vectors
    from caa_lens.interchange import write_vectors as write_vectors
    from caa_lens.lens import LogitLens as LogitLens
    from caa_lens.lens import WordRanks as WordRanks
    from caa_lens.lens import logit_lens as logit_lens
    from caa_lens.lens import word_ranks as word_ranks
    from caa_lens.models import load_model as load_model
    from caa_lens.open_ended.judging import Judgements as Judgements
    from caa_lens.open_ended.judging import judge as judge
    from caa_lens.open_ended.rubrics import Rubric as Rubric
    from caa_lens.open_ended.text_measures import measure_texts as measure_texts
    from caa_lens.pair_geometry import norms as norms
    from caa_lens.pair_geometry import pca as pca
    from caa_lens.pair_geometry import separability as separability
    from caa_lens.pair_reading import PairActivations as PairActivations
    from caa_lens.pair_reading import pair_activations as pair_activations
    from caa_lens.paper.questions import load_paper_questions as load_paper_questions
    from caa_lens.paper.questions import load_paper_set as load_paper_set
    from caa_lens.prompts import Prompt as Prompt
    from caa_lens.prompts import PromptFormat as PromptFormat
    from caa_lens.residual_lens import StreamLens as StreamLens
    from caa_lens.residual_lens import stream_lens as stream_lens
    from caa_lens.similarity import TokenSimilarity as TokenSimilarity
    from caa_lens.similarity import token_similarity as token_similarity
    from caa_lens.steering import steer as steer
    from caa_lens.sweeps import Sweep as Sweep
    from caa_lens.sweeps import sweep as sweep
    from caa_lens.transfers.foreign_vectors import ModelTransfer as ModelTransfer
    from caa_lens.transfers.foreign_vectors import model_transfer as model_transfer
    from caa_lens.transfers.layer_transfer import LayerTransfer as LayerTransfer
    from caa_lens.transfers.layer_transfer import transfer as transfer
    from caa_lens.transfers.residual_map import ResidualMap as ResidualMap
    from caa_lens.transfers.residual_map import fit_residual_map as fit_residual_map
    from caa_lens.transfers.transfer_grid import PromptSetting as PromptSetting
    from caa_lens.transfers.transfer_grid import TransferGrid as TransferGrid
    from caa_lens.transfers.transfer_grid import behavior_transfer as behavior_transfer
    from caa_lens.transfers.transfer_grid import prompt_transfer as prompt_transfer
    from caa_lens.vectors import SteeringVector as SteeringVector
    from caa_lens.vectors import SteeringVectors as SteeringVectors

_MODULE_OF = {
    "Attribution": "attribution",
    "ContrastPair": "contrast",
    "ContrastSet": "contrast",
    "Intervention": "hooks",
    "Judgements": "open_ended.judging",
    "LayerTransfer": "transfers.layer_transfer",
    "LogitLens": "lens",
    "ModelTransfer": "transfers.foreign_vectors",
    "PairActivations": "pair_reading",
    "Prompt": "prompts",
    "PromptFormat": "prompts",
    "PromptSetting": "transfers.transfer_grid",
    "ResidualMap": "transfers.residual_map",
    "Rubric": "open_ended.rubrics",
    "SteeringVector": "vectors",
    "SteeringVectors": "vectors",
    "StreamLens": "residual_lens",
    "Sweep": "sweeps",
    "TokenSimilarity": "similarity",
    "TransferGrid": "transfers.transfer_grid",
    "WordRanks": "lens",
    "attribute": "attribution",
    "behavior_cosines": "geometry",
    "behavior_transfer": "transfers.transfer_grid",
    "cosine_map": "geometry",
    "extract": "extraction",
    "fit_residual_map": "transfers.residual_map",
    "generate": "generation",
    "gram_schmidt": "algebra.combinations",
    "judge": "open_ended.judging",
    "load_model": "models",
    "load_open_ended": "contrast",
    "load_paper_questions": "paper.questions",
    "load_paper_set": "paper.questions",
    "logit_lens": "lens",
    "mean": "algebra.combinations",
    "measure_texts": "open_ended.text_measures",
    "model_cosines": "geometry",
    "model_transfer": "transfers.foreign_vectors",
    "normalize_across_behaviors": "algebra.combinations",
    "norms": "pair_geometry",
    "pair_activations": "pair_reading",
    "pca": "pair_geometry",
    "prompt_transfer": "transfers.transfer_grid",
    "read_residuals": "activations",
    "read_vectors": "interchange",
    "separability": "pair_geometry",
    "steer": "steering",
    "stream": "generation",
    "stream_lens": "residual_lens",
    "sweep": "sweeps",
    "token_similarity": "similarity",
    "transfer": "transfers.layer_transfer",
    "word_ranks": "lens",
    "write_vectors": "interchange",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("caa-lens")
    if name not in _MODULE_OF:
        near = importlib.import_module("difflib").get_close_matches(name, __all__, n=1)
        raise AttributeError(f"module 'caa_lens' has no attribute {name!r}" + (f": try {near[0]!r}" if near else ""))
    return getattr(importlib.import_module(f"caa_lens.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
