"""The main job where only the core is installed: `python tests/helpers/core_alone.py MODEL_FOLDER`.

Whatever caa_lens itself imports of the extras is as if it was missing. The core's own dependencies bring some of these
packages with them for themselves, so other importers find them.
"""

import builtins
import importlib
import json
import sys
import tempfile
from pathlib import Path

from caa_lens.extras import EXTRA_OF

_import = builtins.__import__


def _without_extras(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.partition(".")[0]
    if level == 0 and top in EXTRA_OF and ((globals or {}).get("__name__") or "").startswith("caa_lens"):
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    return _import(name, globals, locals, fromlist, level)


builtins.__import__ = _without_extras


def main_job(folder, keep):
    """Load, extract, sweep, steer, generate, look: what a first day needs."""
    import caa_lens as cl

    model = cl.load_model(folder)
    pairs = cl.ContrastSet.load("sentiment")
    train, validation, test = pairs.split(test=2, validation=2, seed=0)
    vectors = cl.extract(model, train.sample(4), layers=[10, 14], progress=False)
    small = {"layers": [10, 14], "multipliers": [-1, 0, 1], "progress": False}
    sweep = cl.sweep(model, test, vectors, validation=validation, **small)
    sweep.plot()
    text = cl.generate(model, "How was it?", vectors=[(vectors[14], 1.0)], max_new_tokens=3)
    with cl.steer(model, vectors[14], start=0):
        model(model.to_tokens("The walk"))
    lens = cl.logit_lens(model, vectors, layers=[14], k=3)
    keep.append(sweep)
    with tempfile.TemporaryDirectory() as scratch:
        path = vectors.save(Path(scratch) / "v.safetensors")
        again = cl.SteeringVectors.load(path)
    return {"layer": sweep.best_layer, "text": text, "rows": len(lens.frame), "layers": list(again.layers)}


def refused(sweep):
    """What each extra's work says without its package."""
    import torch

    import caa_lens as cl
    from caa_lens.contrast.tables import parquet_source
    from caa_lens.measures.open_ended.text_measures import sentiment
    from caa_lens.models.loading.tokenizers import sentencepiece_tokenizer
    from caa_lens.vectors.extraction import logistic_probe

    tries = {
        "demo": lambda: cl.load_model("demo"),
        "files, results": lambda: sweep.save("sweep.parquet"),
        "files, parquet": lambda: parquet_source("x", b""),
        "files, sentencepiece": lambda: sentencepiece_tokenizer(Path("tokenizer.model")),
        "text": lambda: sentiment("A fine day."),
        "analysis": lambda: logistic_probe(torch.eye(2), -torch.eye(2)),
        "experiments": lambda: importlib.import_module("caa_lens.paper.fetch"),
    }
    found = {}
    for extra, attempt in tries.items():
        try:
            attempt()
        except ImportError as error:
            found[extra] = str(error)
    return found


if __name__ == "__main__":
    kept: list = []
    job = main_job(sys.argv[1], kept)
    print(json.dumps({"job": job, "refused": refused(*kept)}))
