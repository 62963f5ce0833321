"""Calls every public function with odd values in the place of each argument, and prints what was said, as JSON.

A process of its own, because the tests check types at every call, where a user's odd value would be stopped earlier.
For each call: the error's type and words, the file that raised it, and how many modules of the model ran before.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

import caa_lens as cl
from caa_lens.measures.answers import score_answers
from caa_lens.measures.open_ended.text_measures import answer_logp
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.models.loading.tokenizers import folder_tokenizer
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention
from caa_lens.vectors.extraction import mean_difference
from helpers.models import random_vectors, tiny_model

ODD = {
    "None": None,
    "True": True,
    "'3'": "3",
    "''": "",
    "half a surrogate pair": "\ud83d",
    "bytes": b"x",
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "2**70": 2**70,
    "10**400": 10**400,
    "1e300": 1e300,
    "nan": float("nan"),
    "inf": float("inf"),
    "1j": 1j,
    "Decimal": Decimal("0.5"),
    "numpy nan": np.float32("nan"),
    "numpy int": np.int64(1),
    "numpy float": np.float32(0.5),
    "numpy bool": np.bool_(True),
    "array": np.array([1.0, 2.0]),
    "tensor": torch.tensor([1.0, 2.0]),
    "tensor of one": torch.tensor(1),
    "[]": [],
    "[None]": [None],
    "[True]": [True],
    "['3']": ["3"],
    "[nan]": [float("nan")],
    "[1e300]": [1e300],
    "{}": {},
    "object": object(),
    "function": lambda *given: None,
    "type": int,
    "model": None,  # set below
    "vector": None,
}

SWITCHES = {"progress", "use_cache", "raw_text", "skip_first"}


def make_calls(model, folder):
    """By name: a function and arguments with which it works."""
    vectors = random_vectors(model, layers=[1, 2])
    ab = cl.ContrastSet.from_pairs(
        [(f"Is {n} good?\n (A) Yes\n (B) No", *(("(A)", "(B)") if n % 2 else ("(B)", "(A)"))) for n in range(6)]
    )
    texts = cl.ContrastSet.from_pairs([(f"Is {n} good?", "Yes, it is.", "No.") for n in range(6)])
    prompt = cl.prompts.Prompt.of(model, "How are you?")
    read = cl.engine.pair_activations(model, texts, progress=False)
    scored = cl.sweep(model, texts, vectors, progress=False)
    moved = cl.transfer_layers(model, texts, vectors, progress=False)
    foreign = cl.transfer_models(model, texts, vectors, vectors, progress=False)
    grid = cl.transfer_behaviors(model, {"a": texts}, {"a": vectors}, layer=1, progress=False)
    split = cl.interpretation.attribute_logits(model, ab, vectors[1], progress=False)
    like = cl.token_similarity(model, "How are you?", vectors)
    stream = cl.residual_lens(model, prompt)
    ranks = cl.word_ranks(model, vectors, ["good", "bad"])
    fitted = cl.transfers.fit_residual_map(read, read, layers=[1], progress=False)
    sets = {"a": vectors, "b": vectors}
    answers = [("How are you?", "I am well.")]
    made = {"prompt_format": None, "system": None}
    read_options = {"layers": None, **made, "batch_size": 8, "progress": False}
    lens_options = {"layers": None, "reading": "normed", "pairs": None, "multiplier": 1.0, "background": 0, "seed": 0}
    scoring = {"prompt_format": None, "system": None, "max_tokens": None, "progress": False}
    writing = {"vectors": [vectors[1]], "max_new_tokens": 2, "temperature": 0.7, "seed": 0}
    shown = {"n_resamples": 9, "seed": 0}
    return {
        "extract": (cl.extract, {"model": model, "pairs": texts, "estimator": mean_difference, **read_options}),
        "pair_activations": (cl.engine.pair_activations, {"model": model, "pairs": texts, **read_options}),
        "read_residuals": (
            lambda **given: list(cl.engine.read_residuals(**given)),
            {"model": model, "prompts": [prompt], "layers": None, "batch_size": 8},
        ),
        "score": (score_answers, {"model": model, "pairs": texts, "conditions": [()], **scoring}),
        "sweep": (
            cl.sweep,
            {"model": model, "test": texts, "vectors": vectors, "multipliers": [1.0], "layers": None, **scoring},
        ),
        "side_effects": (
            cl.side_effects,
            {
                "model": model,
                "vector": vectors[1],
                "multiplier": 1.0,
                "neutral": ["How are you?"],
                "capability": {"texts": texts},
                "requests": ["Help me."],
                "others": {"other": vectors[1]},
                "other_tests": {"texts": texts},
                "positions": "caa",
                "n_tokens": 1,
                "n_random": 1,
                "n_resamples": 9,
                "seed": 0,
                "batch_size": 8,
                **scoring,
            },
        ),
        "transfer": (
            cl.transfer_layers,
            {
                "model": model,
                "test": texts,
                "vectors": vectors,
                "multiplier": 1.0,
                "targets": None,
                "size": "keep",
                "per": "multiplier",
                "measure": None,
                **scoring,
            },
        ),
        "transfer_models": (
            cl.transfer_models,
            {
                "model": model,
                "test": texts,
                "own": vectors,
                "foreign": vectors,
                "multipliers": [1.0],
                "layers": None,
                "size": "keep",
                "measure": None,
                **scoring,
            },
        ),
        "transfer_behaviors": (
            cl.transfer_behaviors,
            {
                "model": model,
                "tests": {"a": texts},
                "vectors": {"a": vectors},
                "layer": 1,
                "multiplier": 1.0,
                "setting": None,
                "max_tokens": None,
                "progress": False,
            },
        ),
        "transfer_prompts": (
            cl.transfer_prompts,
            {
                "model": model,
                "train": texts,
                "test": texts,
                "settings": {"plain": cl.transfers.PromptSetting()},
                "layer": 1,
                "multiplier": 1.0,
                "max_tokens": None,
                "progress": False,
            },
        ),
        "generate": (cl.generate, {"model": model, "prompt": prompt, **writing, **made, "use_cache": True}),
        "stream": (
            lambda **given: list(cl.generate_stream(**given)),
            {"model": model, "prompt": "How are you?", **writing, **made},
        ),
        "generate_tokens": (
            lambda **given: list(generate_tokens(**given)),
            {"model": model, "prompts": [prompt], **writing, "use_cache": True},
        ),
        "steer": (
            lambda vector, **given: cl.steer(given.pop("model"), vector, **given).__enter__(),
            {"model": model, "vector": vectors[1], "prompt": prompt, "multiplier": 1.0},
        ),
        "steer from a start": (
            lambda vector, **given: cl.steer(given.pop("model"), vector, **given).__enter__(),
            {"model": model, "vector": vectors[1], "start": 1},
        ),
        "Intervention": (Intervention, {"vector": vectors[1], "multiplier": 1.0, "start": 1, "operator": "add"}),
        "logit_lens": (cl.logit_lens, {"model": model, "vectors": vectors, "k": 3, **lens_options}),
        "word_ranks": (cl.word_ranks, {"model": model, "vectors": vectors, "words": ["good"], **lens_options}),
        "residual_lens": (
            cl.residual_lens,
            {"model": model, "prompt": prompt, "vectors": [vectors[1]], "layers": None, "positions": None, **made},
        ),
        "token_similarity": (
            cl.token_similarity,
            {
                "model": model,
                "text": "How are you?",
                "vectors": vectors,
                "answer": "",
                "layers": None,
                "measure": "cosine",
                "raw_text": False,
                **made,
            },
        ),
        "explore": (
            cl.explore,
            {
                "model": model,
                "vectors": vectors,
                "prompt": "How are you?",
                "layer": 1,
                "multiplier": 1.0,
                "multipliers": (-4.0, 4.0),
                "max_new_tokens": 20,
                "max_chars": 2000,
                **made,
            },
        ),
        "attribute": (
            cl.interpretation.attribute_logits,
            {
                "model": model,
                "pairs": ab,
                "vector": vectors[1],
                "multiplier": 1.0,
                "batch_size": 8,
                "progress": False,
                **made,
            },
        ),
        "attribute of tokens": (
            lambda model, prompt, positive, negative, vector: cl.interpretation.attribute_logits(
                model, [(prompt, positive, negative)], vector, progress=False
            ),
            {"model": model, "prompt": prompt, "positive": 3, "negative": " good", "vector": vectors[1]},
        ),
        "measure_texts": (
            cl.measures.measure_texts,
            {"model": model, "texts": answers, "batch_size": 8, "progress": False, **made},
        ),
        "answer_logp": (answer_logp, {"model": model, "prompts": [prompt], "batch_size": 8, "progress": False}),
        "Prompt.of": (cl.prompts.Prompt.of, {"model": model, "question": "How are you?", "answer": "", **made}),
        "Prompt.from_tokens": (cl.prompts.Prompt.from_tokens, {"tokens": [1, 2, 3], "start": 1}),
        "norms": (cl.interpretation.vector_norms, {"vectors": vectors, "activations": read}),
        "multiplier_for": (cl.interpretation.vector_norms(vectors, read).multiplier_for, {"layer": 1, "share": 0.1}),
        "pca": (cl.interpretation.pair_pca, {"activations": read, "layers": None}),
        "separability": (
            cl.interpretation.pair_separability,
            {"activations": read, "layers": None, "folds": 3, "seed": 0, "progress": False},
        ),
        "fit_residual_map": (
            cl.transfers.fit_residual_map,
            {
                "source": read,
                "target": read,
                "layers": [1],
                "held_out": 0.2,
                "penalties": [1.0],
                "seed": 0,
                "progress": False,
            },
        ),
        "carry": (fitted.carry, {"vectors": vectors}),
        "cosines": (cl.cosines, {"vectors": vectors, "other": None}),
        "cosines of behaviors": (cl.cosines, {"vectors": sets, "layer": 1}),
        "cosines at the same layer": (cl.cosines, {"vectors": vectors, "other": vectors, "same_layer": True}),
        "mean": (cl.vectors.mean_vector, {}),
        "Sweep.summary": (scored.summary, shown),
        "Sweep.effect": (scored.effect, shown),
        "Sweep.plot_layer": (scored.plot_layer, {"layer": 1}),
        "LayerTransfer.summary": (moved.summary, shown),
        "LayerTransfer.decay": (moved.decay, shown),
        "ModelTransfer.summary": (foreign.summary, {"value": "effect", **shown}),
        "TransferGrid.summary": (grid.summary, shown),
        "Attribution.summary": (split.summary, shown),
        "Attribution.total_interval": (split.total_interval, shown),
        "TokenSimilarity.show": (
            like.show,
            {"layer": 1, "measure": "cosine", "skip_first": True, "bound": 1.0},
        ),
        "ResidualLens.settles_at": (stream.settles_at, {"position": None, "steered": None}),
        "WordRanks.margin": (ranks.margin, {"positive": ["good"], "negative": ["bad"]}),
        "ContrastSet.split": (texts.split, {"test": 2, "seed": 0}),
        "ContrastSet.sample": (texts.sample, {"n": 2, "seed": 0}),
        "ContrastSet.balance_letters": (ab.balance_letters, {"seed": 0}),
        "ContrastSet.from_pairs": (
            cl.ContrastSet.from_pairs,
            {"pairs": [("q", "a", "b")], "name": "n", "columns": None, "on_bad": "raise"},
        ),
        "ContrastSet.load": (
            cl.ContrastSet.load,
            {"name_or_path": "sentiment", "name": None, "columns": None, "on_bad": "raise"},
        ),
        "ContrastSet.check": (texts.check, {"other": None, "model": None}),
        "load_open_ended": (cl.contrast.load_open_ended, {"name_or_path": "sentiment"}),
        "load_model": (cl.load_model, {"name_or_path": "nowhere", "dtype": None, "device": None}),
        "SteeringVector": (cl.SteeringVector, {"direction": torch.ones(32), "layer": 1}),
        "from_direction": (cl.SteeringVector.from_direction, {"direction": torch.ones(32), "layer": 1}),
        "at_layer": (vectors[1].at_layer, {"layer": 2}),
        "scaled_to": (vectors[1].normalized, {"to": 2.0}),
        "vectors[layer]": (lambda layer: vectors[layer], {"layer": 1}),
        "vectors.at": (vectors.at, {"layers": [1]}),
        "Rubric": (cl.measures.Rubric, {"behavior": "b", "text": "t"}),
        "judge": (
            cl.measures.judge_texts,
            {
                "items": answers,
                "rubric": "sentiment",
                "base_url": "nowhere",
                "model": "judge",
                "path": folder / "judged.jsonl",
                "settings": None,
                "max_attempts": 1,
                "concurrency": 1,
                "requests_per_minute": None,
                "timeout": 1,
            },
        ),
    }


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    tokenizer = folder_tokenizer(demo_model_path())
    model = tiny_model(n_layers=3, d_vocab=len(tokenizer), n_ctx=256, tokenizer=tokenizer)
    ran = []
    torch.nn.modules.module.register_module_forward_pre_hook(lambda *given: ran.append(1))
    said: list[tuple] = []
    every = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls = make_calls(model, folder)
        ODD["model"], ODD["vector"] = model, random_vectors(model)[1]
        os.chdir(folder)
        before = sorted(folder.iterdir())
        for what, (function, given) in calls.items():
            for argument in sorted(given.keys() - SWITCHES):
                for n, (odd, value) in enumerate(ODD.items(), start=len(said)):
                    if n % every:
                        continue
                    ran.clear()
                    where = kind = text = ""
                    try:
                        function(**{**given, argument: value})
                    except Exception as error:
                        kind, text = type(error).__name__, str(error)
                        frame = error.__traceback__
                        while frame.tb_next:
                            frame = frame.tb_next
                        where = frame.tb_frame.f_code.co_filename
                    model.reset_hooks()
                    files = [str(path) for path in sorted(folder.iterdir()) if path not in before]
                    for path in files:
                        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
                    said.append((what, argument, odd, kind, text, where, len(ran), files))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
