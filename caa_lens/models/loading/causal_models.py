"""Which models of transformers can be taken, and how large one is, from its configuration alone.

transformers' `AutoModelForCausalLM` is generous: it makes a language model of BERT, which reads in both directions, and
of BART's decoder. TransformerLens has adapters for encoders, pictures and sound too. What is taken here is what both
call a causal language model.
"""

import importlib.metadata
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

# transformers takes about 4 s to import and TransformerLens 3 s, so both are imported where they are used.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TAKE = "take a decoder alone, such as a Llama, Qwen, Gemma, Mistral or GPT-2"


def causal_config(config: Mapping[str, Any]) -> "PreTrainedConfig":
    """The configuration of transformers that a `config.json` holds, if it is that of a causal language model.

    Args:
        config: the parsed `config.json`.

    Raises:
        ValueError: no `model_type`, one that transformers does not know, entries that do not belong to it, or a model
            that is no causal language model: an encoder, an encoder-decoder, one of pictures or sound.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        needs_code = " and which brings code of its own" if config.get("auto_map") else ""
        remedy = (
            "load it with transformers (trust_remote_code=True, if you trust that code), and give it as hf_model="
            if needs_code
            else "a newer transformers may know it"
        )
        raise ValueError(
            f"config.json has model_type={kind!r}, which transformers {_version('transformers')} does not know"
            f"{needs_code}, expected a causal language model: {remedy}"
        )
    try:
        found = CONFIG_MAPPING[kind].from_dict(_with_floats(dict(config)))
    except Exception as error:  # each family checks its entries in its own way
        said = str(error) or type(error).__name__
        raise ValueError(f"config.json is not the configuration of a complete {kind!r} ({said})") from None
    check_causal(found)
    return found


def _with_floats(found: Any) -> Any:
    """transformers writes infinity, which JSON has no word for, as {"__float__": "Infinity"}."""
    if isinstance(found, list):
        return [_with_floats(one) for one in found]
    if not isinstance(found, dict):
        return found
    if found.keys() == {"__float__"}:
        return float(found["__float__"])
    return {name: _with_floats(one) for name, one in found.items()}


def check_causal(config: "PreTrainedConfig", class_name: str | None = None) -> None:
    """Refuses what is no causal language model, by its configuration.

    Args:
        config: of transformers.
        class_name: of the model, where that is known, such as "Qwen2ForCausalLM"; else what transformers would make.

    Raises:
        ValueError: an encoder, an encoder-decoder, a model of pictures or sound, or with another head.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind)
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder, whose prompt and answer are two streams"
    elif masked and not (causal and getattr(config, "is_decoder", False)):
        what = "an encoder, which reads in both directions and writes no text"
    elif (class_name or str(causal)).endswith("ForConditionalGeneration"):
        raise ValueError(
            f"got a {kind!r} ({class_name or causal}), which takes pictures or sound besides text, expected a causal "
            "language model: boot it yourself with TransformerBridge.boot_transformers(...), which has its "
            "processor, too, and give that bridge to the functions of caa_lens, which run its text part"
        )
    elif class_name is None and causal is None:
        what = "nothing that transformers' AutoModelForCausalLM loads"
    elif class_name is not None and causal is not None and class_name != causal:
        raise ValueError(
            f"got hf_model a {class_name}, expected a {causal}, which has the head that gives the next token's logits: "
            "load it with transformers.AutoModelForCausalLM"
        )
    else:
        return
    raise ValueError(f"got a {kind!r}, which is {what}, expected a causal language model: {_TAKE}")


def check_adapter(config: "PreTrainedConfig", class_name: str | None = None) -> None:
    """Refuses what TransformerLens has no adapter for, before any weights are read.

    Args:
        config: of transformers, which `check_causal` let through.
        class_name: as in `check_causal`.

    Raises:
        ValueError: no adapter, or one that is not for a causal language model.
    """
    import copy

    from transformer_lens.model_bridge.sources.transformers import (
        determine_architecture_from_hf_config,
        get_hf_model_class_for_architecture,
    )
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = class_name or str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))
    asked = copy.deepcopy(config)
    asked.architectures = [name]
    try:
        adapter = determine_architecture_from_hf_config(asked)
    except ValueError:  # its text lists hundreds of names
        adapter = None
    if adapter is None or get_hf_model_class_for_architecture(adapter) is not AutoModelForCausalLM:
        raise ValueError(
            f"TransformerLens {_version('transformer-lens')} has no adapter for a {name} (model_type="
            f"{config.model_type!r}), expected one of the architectures that TransformerBridge.list_supported_models() "
            "names: a newer transformer-lens may have it"
        )


def n_parameters(config: Mapping[str, Any]) -> int:
    """Number of parameters of the causal language model that a `config.json` describes; tied embeddings count once.

    The model is built without memory, on torch's `meta` device. Quantisation is passed over: it packs several numbers
    into one.

    Args:
        config: the parsed `config.json`.

    Raises:
        ValueError: no causal language model that transformers knows (as `causal_config`).
    """
    return sum(math.prod(shape) for shape in parameter_shapes(causal_config(config)).values())


def parameter_shapes(config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that a model of this configuration has; tied embeddings appear once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def has_hooked_transformer() -> bool:
    """Whether the TransformerLens that is installed still has a HookedTransformer, which 4.0 removed."""
    import importlib.util

    return importlib.util.find_spec("transformer_lens.HookedTransformer") is not None


def _version(package: str) -> str:
    return importlib.metadata.version(package)
