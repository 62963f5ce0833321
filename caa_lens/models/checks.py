"""Which models are taken: a `HookedTransformer` of TransformerLens, with its weights, as it answers.

Other models share its attributes' names and not their meaning: a `TransformerBridge` has other hook points, ignores
`past_kv_cache` and runs `stop_at_layer` to the logits. So a model is known by its class, not by what it has.
"""

from collections.abc import Sequence
from typing import Any

import torch

from caa_lens.arguments import check_list, describe

_OTHER = {
    ("transformer_lens", "TransformerBridge"): (
        "a TransformerBridge, which is not supported yet: load the same model with caa_lens.load_model(...), or, if it "
        "is no Llama, with transformer_lens.HookedTransformer.from_pretrained_no_processing(...)"
    ),
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
    """Refuses what is no loaded `HookedTransformer` in evaluation mode, before anything runs.

    Raises:
        TypeError: for anything but a `HookedTransformer`, by its name and with what to give instead.
        ValueError: for one whose dtypes disagree, whose weights are not loaded, whose dropout is switched on, or that
            `torch.compile` compiled, whole or in part, which drops hooks without a word.
    """
    given = model
    if type(model).__name__ == "OptimizedModule":  # what torch.compile wraps a model into
        model = model._orig_mod
    kinds = [(cls.__module__.partition(".")[0], cls.__name__) for cls in type(model).__mro__]
    if ("transformer_lens", "HookedTransformer") not in kinds:
        for kind in kinds:
            if kind in _OTHER:
                raise TypeError(f"expected a model from caa_lens.load_model, got {_OTHER[kind]}")
        raise TypeError(
            f"expected a model from caa_lens.load_model, got {describe(model)}: the model is the first argument, a "
            "HookedTransformer itself, and a model of transformers is loaded from its folder or hub id"
        )
    if not may_be_compiled:
        _check_uncompiled(given)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model's weights are not loaded (they are on the device 'meta'): load it with caa_lens.load_model(...)"
        )
    if model.W_E.dtype != model.cfg.dtype:
        has, says = (str(dtype).removeprefix("torch.") for dtype in (model.W_E.dtype, model.cfg.dtype))
        raise ValueError(
            f"the model's weights are {has}, but its cfg.dtype says {says}: load it with dtype={has!r}, or convert it "
            f"with model.to(torch.{has}), which changes both"
        )
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


def check_hook_points(model: Any, layer: int, site: str = "hook_resid_post") -> None:
    """Raises `ValueError` where TransformerLens' hooks do not reach the two hook points that an edit of a layer needs.

    Another module may stand in a hook point's place, as sparse autoencoders are attached; and where nobody called
    `model.setup()` afterwards, hooks would still be added to the point that was taken out, and change nothing.
    """
    for place in ("attn.hook_pattern", site):
        name, found = f"blocks.{layer}.{place}", model.blocks[layer]
        for part in place.split("."):
            found = getattr(found, part, None)
        if found is not None and found is model.hook_dict.get(name):
            continue
        if any(base.__name__ == "HookPoint" for base in type(found).__mro__):
            raise ValueError(
                f"the model does not know its hook point {name}, so that hooks would change nothing at layer {layer}: "
                "call model.setup() after putting a module in a hook point's place or taking it away"
            )
        what = f"{name} is missing" if found is None else f"{type(found).__name__} stands in the place of {name}"
        raise ValueError(
            f"{what}, so that nothing can be steered at layer {layer}: steer at another layer, or take the module away "
            "that was put there (of SAELens: model.reset_saes())"
        )


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
