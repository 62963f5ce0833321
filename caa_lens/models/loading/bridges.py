"""Load a model of transformers whole, and put a `TransformerBridge` of TransformerLens over it.

Booting changes the module of transformers in place: TransformerLens sets its own modules into it, and its attention
becomes transformers' "eager" one, the only one that gives attention patterns. A tokenizer it changes too, to put a BOS
in front of every text, or loads it anew by its name. So it is given another one, which is thrown away afterwards, and
the model gets the checkpoint's own.

Whether the adapter computes what the untouched module does is asked before and after: see `load_model`, `check`.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.arguments import describe
from caa_lens.models.adapters.bridge_parts import device_of
from caa_lens.models.adapters.kept_weights import forget_unkept_bias, give_bias, is_offloaded, packed_as
from caa_lens.models.loading.causal_models import check_adapter, check_causal
from caa_lens.models.loading.checkpoints import GgufFile, some
from caa_lens.models.loading.tokenizers import attach_tokenizer, take_tokenizer_away

# TransformerLens takes about 3 s to import and transformers 4 s, so both are imported where they are used.
if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

CHECK_TOKENS = 8


# A model of transformers, with all of its weights.


def read_folder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str,
    device_map: str | Mapping[str, Any] | None = None,
    quantisation: "BitsAndBytesConfig | None" = None,
) -> "PreTrainedModel":
    """The model of transformers that a folder holds, in evaluation mode.

    Raises:
        ValueError: weights are missing, or have other shapes than config.json asks for; or the folder needs code of
            its own.
    """
    from transformers import AutoModelForCausalLM

    if device_map is None and (device != "cpu" or quantisation is not None):
        device_map = {"": device}  # straight there, not by way of the CPU
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, found = from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantisation,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{folder} holds tensors whose shapes are not those that its config.json asks for (see the report above): "
            "check that weights and config belong together"
        ) from None
    _check_complete(str(folder), found)
    return model.eval()


def read_gguf(gguf: GgufFile, *, dtype: torch.dtype, device: str) -> "PreTrainedModel":
    """The Llama of transformers that a GGUF file holds, dequantised on the CPU, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # Not what AutoModelForCausalLM makes of the file: that has lost Llama 3's rotary scaling.
    config = LlamaConfig.from_dict(dict(gguf.config))
    from_pretrained: Any = LlamaForCausalLM.from_pretrained
    model, found = from_pretrained(
        None,
        config=config,
        state_dict=gguf.dequantised(dtype),
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
    )
    _check_complete(str(gguf.path), found)
    return model.to(device).eval()


def _check_complete(source: str, found: Mapping[str, Any]) -> None:
    """transformers fills what it does not find with noise, and only writes a report of it."""
    missing, misshapen = found["missing_keys"], [str(key) for key in found["mismatched_keys"]]
    if missing or misshapen or found["error_msgs"]:
        raise ValueError(
            f"{source} does not hold the tensors of the model that its configuration describes: missing {some(missing)}"
            f"; of another shape {some(misshapen)}: check that weights and configuration belong together"
        )


# A bridge over it.


def check_given(hf_model: Any) -> None:
    """Refuses what cannot be given as `hf_model`.

    Raises:
        TypeError: for anything but a model of transformers.
        ValueError: one that was booted already, that is no causal language model, or that no adapter knows.
    """
    from transformers import PreTrainedModel

    if not isinstance(hf_model, PreTrainedModel):
        kind = type(hf_model).__name__
        remedy = "give what its merge_and_unload() returns" if kind.startswith("Peft") else "load it with transformers"
        raise TypeError(f"got hf_model {describe(hf_model)}, expected a model of transformers: {remedy}")
    if any(type(module).__module__.startswith("transformer_lens.") for module in hf_model.modules()):
        raise ValueError(
            "got an hf_model that TransformerLens booted already, which changed it in place, expected one as "
            "transformers loads it: use the model that came of that, or load it anew"
        )
    check_causal(hf_model.config, type(hf_model).__name__)
    check_adapter(hf_model.config, type(hf_model).__name__)


def boot(
    hf_model: "PreTrainedModel",
    name: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    tokenizer_name: str,
    *,
    check: bool,
) -> "TransformerBridge":
    """Put a bridge over a model of transformers, which is changed in place.

    Where transformers keeps weights in the CPU's memory or on the disk until they run, TransformerLens may refuse the
    model (3.9 all such models, 4.3 those that lie on a card besides), since its parts could read a weight where there
    is none. Such a read raises: no number comes of it. So the map is put aside while the model is booted.

    Args:
        hf_model: loaded, of a kind that `check_given` lets through.
        name: what the model is to be called, `cfg.model_name`; how its weights are packed is added to it.
        tokenizer: the checkpoint's own; its ids are those that the bridge's will give. None for none.
        tokenizer_name: `cfg.tokenizer_name`, which the prompt format is chosen by.
        check: compare the bridge with the untouched module.

    Raises:
        ValueError: the bridge's numbers are not those of the untouched module; a family whose weights cannot be packed.
    """
    from transformer_lens.model_bridge import TransformerBridge

    kind = type(hf_model).__name__
    hf_model.eval()
    hf_model.set_attn_implementation("eager")
    # TransformerLens chooses its adapter by this; a file may say the class of the model that this one was made of.
    hf_model.config.architectures = [kind]
    _check_map(hf_model)
    embedding = _embedding(hf_model)
    # Weights that lie on a disk are on the meta device until they are needed; their inputs are moved by accelerate.
    device = device_of(hf_model, hf_model.get_input_embeddings())
    untouched = _log_probabilities(hf_model, device) if check else None
    packed = packed_as(hf_model)
    give_bias(hf_model.get_output_embeddings(), embedding.dtype)
    with _map_put_aside(hf_model):
        try:
            bridge = TransformerBridge.boot_transformers(
                kind,  # a name, which is looked at for old spellings of hub ids, and not looked up
                hf_model=hf_model,
                tokenizer=_stand_in_tokenizer(),
                dtype=embedding.dtype,
                device=str(device),
            )
        except (NotImplementedError, RuntimeError) as error:
            if packed is None:
                raise
            raise ValueError(
                f"TransformerLens takes apart what {packed} packs in a {kind}, a matrix of queries, keys and values in "
                f"one ({str(error).partition('. ')[0]}), expected plain weights: load it without quantised, or over "
                "several devices with device_map"
            ) from None
    forget_unkept_bias(bridge.unembed)
    bridge.eval()
    bridge.cfg.device = str(device)  # TransformerLens would say "meta" of an embedding on the disk
    bridge.cfg.n_devices = len(set((getattr(hf_model, "hf_device_map", None) or {"": device}).values()))
    bridge.cfg.model_name = name if packed is None else f"{name} ({packed})"
    _give_tokenizer(bridge, tokenizer, tokenizer_name)
    if untouched is not None:
        from caa_lens.models.comparison import check_against

        sys.stderr.write(check_against(bridge, *untouched) + "\n")
    return bridge


def _check_map(hf_model: Any) -> None:
    """Raises `ValueError` where weights lie on another device than `hf_device_map` says, as tied ones may."""
    from transformer_lens.utilities.multi_gpu import find_misplaced_modules

    if misplaced := find_misplaced_modules(hf_model):
        module, wanted, found = misplaced[0]
        raise ValueError(
            f"the device_map puts {module} on {wanted}, and its weights are on {found}, as those of an embedding are "
            "that is tied to the unembedding: put modules that share weights on one device"
        )


@contextmanager
def _map_put_aside(hf_model: Any) -> Iterator[None]:
    """`hf_device_map` is None inside, if accelerate keeps some of the weights elsewhere until they run."""
    device_map = getattr(hf_model, "hf_device_map", None)
    if not device_map or not is_offloaded(hf_model):
        yield  # TransformerLens looks at it itself
        return
    hf_model.hf_device_map = None
    try:
        yield
    finally:
        hf_model.hf_device_map = device_map


def _embedding(hf_model: Any) -> Tensor:
    return hf_model.get_input_embeddings().weight


def _log_probabilities(
    hf_model: "PreTrainedModel", device: torch.device
) -> tuple[Int[Tensor, "1 pos"], Float[Tensor, "pos d_vocab"]]:
    """Some token ids, and the untouched model's log-probabilities of what follows each, on the CPU in float32."""
    config = hf_model.config.get_text_config()
    special = {config.pad_token_id, config.bos_token_id}
    n_vocab = len(_embedding(hf_model))
    spread = [n_vocab * (2 * place + 1) // (2 * CHECK_TOKENS) for place in range(CHECK_TOKENS)]
    tokens = torch.tensor([[token + (token in special) for token in spread]], device=device)
    with torch.no_grad():
        logits = hf_model(input_ids=tokens, use_cache=False).logits[0]
    return tokens, logits.float().log_softmax(-1).cpu()


def _give_tokenizer(bridge: Any, tokenizer: "PreTrainedTokenizerBase | None", name: str) -> None:
    """The checkpoint's own tokenizer in the place of the stand-in."""
    if tokenizer is None:
        take_tokenizer_away(bridge)
        bridge.cfg.tokenizer_name = None
        return
    attach_tokenizer(bridge, tokenizer, name)
    ids, eos = tokenizer("a")["input_ids"], tokenizer.eos_token_id
    bridge.cfg.tokenizer_appends_eos = len(ids) > 1 and eos is not None and ids[-1] == eos


def _stand_in_tokenizer() -> "PreTrainedTokenizerBase":
    """One of a single token: without any, TransformerLens would look for one of its own."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    # Without a BOS, which TransformerLens would load a tokenizer by its name for.
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>")
