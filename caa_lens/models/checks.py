"""Which models are taken: a `HookedTransformer` or a `TransformerBridge` of TransformerLens, with its weights.

Other models share their attributes' names and not their meaning. So a model is known by its class, not by what it has.
"""

from collections.abc import Sequence
from typing import Any

import torch

from caa_lens.arguments import check_list, describe
from caa_lens.models.adapters.choice import known_adapter
from caa_lens.models.comparison import check_parts

_OTHER = {
    ("transformer_lens", "HookedEncoder"): "a HookedEncoder, which writes no text: take a model that generates",
    ("transformer_lens", "HookedAudioEncoder"): "a HookedAudioEncoder, which writes no text: take one that generates",
    ("transformer_lens", "HookedEncoderDecoder"): (
        "a HookedEncoderDecoder, whose prompt and answer are two streams: take a decoder alone, such as a Llama"
    ),
    ("transformers", "PreTrainedModel"): (
        "a model of transformers: give load_model its hub id, or the folder that save_pretrained(folder) writes"
    ),
    ("torch", "DataParallel"): "a DataParallel wrapper: give the model inside, wrapper.module",
    ("torch", "DistributedDataParallel"): "a DistributedDataParallel wrapper: give the model inside, wrapper.module",
    ("nnsight", "NNsight"): "a model of nnsight: load the same one with caa_lens.load_model(its hub id or folder)",
}


def check_model(model: Any, *, may_be_compiled: bool = False) -> None:
    """Refuses what is no loaded model of TransformerLens in evaluation mode, before anything runs.

    A `TransformerBridge` is prepared at this occasion: its hook points learn how many tokens lie in a KV cache, its
    runs are watched for a cache that stays empty, and transformers' own names for the cache are mended (see
    `models.adapters.watch`). At the first time it is run on a few tokens, without anybody's hooks: what TransformerLens
    computes in its own way has to be what transformers' modules give.

    Raises:
        TypeError: for anything but a `HookedTransformer` or a `TransformerBridge` of a decoder, by its name and with
            what to give instead.
        ValueError: for one whose dtypes disagree, whose weights are not loaded, whose dropout is switched on, or that
            `torch.compile` compiled, whole or in part, which drops hooks without a word; or a bridge with a part that
            computes something else than the module of transformers it stands for.
    """
    given = model
    if type(model).__name__ == "OptimizedModule":  # what torch.compile wraps a model into
        model = model._orig_mod
    adapter = known_adapter(model)
    if adapter is None:
        for kind in type(model).__mro__:
            known = _OTHER.get((kind.__module__.partition(".")[0], kind.__name__))
            if known is not None:
                raise TypeError(f"expected a model from caa_lens.load_model, got {known}")
        raise TypeError(
            f"expected a model from caa_lens.load_model, got {describe(model)}: the model is the first argument, a "
            "HookedTransformer or a TransformerBridge itself, and a model of transformers is loaded from its folder or "
            "hub id"
        )
    if not may_be_compiled:
        _check_uncompiled(given)
    adapter.check(model)
    check_parts(model)
    if model.training and any(_drops(module) for module in model.modules()):
        raise ValueError("the model is in training mode and has dropout, which changes every number: call model.eval()")


def _check_uncompiled(model: Any) -> None:
    drops = "torch.compile drops hooks without a word"
    if type(model).__name__ == "OptimizedModule":
        raise ValueError(f"the model is compiled, and {drops}: give the model itself, compiled._orig_mod")
    for name, module in model.named_modules():
        its = vars(module)
        if its.get("_compiled_call_impl") is not None:
            remedy = "undo it with ._compiled_call_impl = None"
        elif "_orig_mod" in its["_modules"] or hasattr(its.get("forward"), "_torchdynamo_orig_callable"):
            remedy = "put the module or method back that was compiled"
        else:
            continue
        what = f"module {name!r} of the model" if name else "the model"
        raise ValueError(f"{what} is compiled, and {drops}: {remedy}, or load the model anew")


def _drops(module: Any) -> bool:
    return isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def check_layers(model: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Layers as distinct block ids in order; all of the model's by default.

    Raises:
        TypeError: for one number, or a list of anything but whole numbers.
        ValueError: for a layer that the model does not have, negative ones included, or an empty list.
    """
    n_layers = model.cfg.n_layers
    if layers is None:
        return tuple(range(n_layers))
    layers = check_list("layers", layers, int)
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"layer {layer} is out of range: {model.cfg.model_name} has layers 0 to {n_layers - 1}"
                + (f"; the last is {n_layers - 1}, not -1" if layer < 0 else "")
            )
    if not layers:
        raise ValueError("no layers given: expected at least one")
    return tuple(sorted(set(layers)))
