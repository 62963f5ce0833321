"""Weights of 8 or 4 bits by bitsandbytes: what is asked of transformers, and how many bytes a model's weights take.

    int8    a byte a weight, and 4 bytes a row                                  (LLM.int8())
    4 bits  half a byte a weight, and 4 bytes every 64 weights, or a byte with double quantisation      (nf4, fp4)

Matrices of linear layers are packed so; embeddings, norms, biases and the unembedding stay in the model's type. Which
layers those are, transformers decides, and is asked here, too.
"""

import copy
import importlib.util
import math
from typing import TYPE_CHECKING, Any

import torch

from caa_lens.arguments import describe
from caa_lens.models.loading.causal_models import causal_config
from caa_lens.models.loading.llama_config import Config

# transformers takes about 4 s to import, so it is imported where it is used.
if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig

PRESETS = ("8bit", "4bit")
_BLOCK = 64  # weights that share a scale in 4 bits
_NESTED = 256  # scales that share a scale, with double quantisation


def check_quantised(quantised: Any) -> None:
    """Refuses what cannot be given as `quantised`.

    Raises:
        TypeError, ValueError: for anything but None, "8bit", "4bit" or a configuration of bitsandbytes that packs.
        ImportError: bitsandbytes or accelerate is not installed.
    """
    if quantised is None:
        return
    expected = "expected '8bit', '4bit' or a BitsAndBytesConfig of transformers"
    if isinstance(quantised, str):
        if quantised not in PRESETS:
            raise ValueError(f"got quantised={quantised!r}, {expected}")
    elif type(quantised).__name__ != "BitsAndBytesConfig":
        raise TypeError(
            f"got quantised {describe(quantised)}, {expected}: a model that is packed in another way is "
            "loaded with transformers, and given as hf_model="
        )
    elif not (quantised.load_in_8bit or quantised.load_in_4bit):
        raise ValueError(f"got a BitsAndBytesConfig that packs nothing, {expected}: give it load_in_4bit=True")
    missing = [package for package in ("accelerate", "bitsandbytes") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"quantised weights need {' and '.join(missing)}: pip install 'caa-lens[quantised]'")


def quantisation_config(
    quantised: "str | BitsAndBytesConfig | None", dtype: torch.dtype
) -> "BitsAndBytesConfig | None":
    """What transformers is asked for: of "4bit", nf4 that is computed in the model's own type."""
    from transformers import BitsAndBytesConfig

    if not isinstance(quantised, str):
        return copy.deepcopy(quantised)
    if quantised == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def weight_bytes(
    config: Config, *, dtype: torch.dtype = torch.bfloat16, quantised: "str | BitsAndBytesConfig | None" = None
) -> int:
    """Bytes that the weights of a causal language model take; tied embeddings count once.

    Args:
        config: the parsed `config.json`.
        dtype: of the weights that are not packed.
        quantised: as `load_model` takes it: "8bit", "4bit", or a configuration of bitsandbytes.

    Raises:
        ValueError: no causal language model that transformers knows, or an unknown `quantised`.
        ImportError: it is asked for packed weights, and bitsandbytes is not installed.
    """
    check_quantised(quantised)
    return sum(weight_sizes(causal_config(config), dtype, quantisation_config(quantised, dtype)).values())


def weight_sizes(
    config: "PreTrainedConfig", dtype: torch.dtype, quantisation: "BitsAndBytesConfig | None" = None
) -> dict[str, int]:
    """Bytes of every parameter by its name; the model is built without memory, on torch's `meta` device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if quantisation is not None:
        from transformers.quantizers import AutoHfQuantizer

        AutoHfQuantizer.from_config(quantisation, pre_quantized=False).preprocess_model(model, device_map=None)
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        n, is_weight = parameter.numel(), name.endswith(".weight")
        if kind == "Linear8bitLt" and is_weight:
            sizes[name] = n + 4 * parameter.shape[0]
        elif kind == "Linear4bit" and is_weight:
            assert quantisation is not None
            sizes[name] = _in_4_bits(n, nested=quantisation.bnb_4bit_use_double_quant)
        else:
            sizes[name] = n * dtype.itemsize
    return sizes


def _in_4_bits(n: int, *, nested: bool) -> int:
    """Of a matrix with its scales and tables, as bitsandbytes keeps them."""
    scales, table = math.ceil(n / _BLOCK), 16 * 4
    if not nested:
        return math.ceil(n / 2) + 4 * scales + table
    return math.ceil(n / 2) + scales + 4 * math.ceil(scales / _NESTED) + table + 256 * 4 + 4
