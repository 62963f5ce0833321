"""Load a Llama-family checkpoint as a :class:`transformer_lens.HookedTransformer`.

From a Hugging Face id, a local folder of safetensors, a GGUF file, or the word ``"demo"``. TransformerLens'
own ``from_pretrained`` knows official names only, takes several times the memory of the weights, and folds
the norms; here the configuration is read from ``config.json``, the model is built without memory, and
``weights.py`` fills it with Hugging Face's values, unfolded. What TransformerLens cannot compute as Hugging
Face does is refused, not approximated.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from caa_lens.weights import GgufFile, Read, SafetensorsFolder, expected_shapes, fill_weights

# TransformerLens takes about 3 s to import and transformers 4 s, so both are imported where they are used.
if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig
    from transformers import PreTrainedTokenizerBase

Config = Mapping[str, Any]
"""The contents of a Hugging Face ``config.json``."""

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
HEADROOM = 1.1  # activations, rotary tables and the pages of the tensor being read, on top of the weights
CONFIG_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
]
WEIGHT_FILES = ["model*.safetensors", "model.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"]


class ModelTooLargeError(ValueError):
    """The weights do not fit into the free memory of the device; raised before anything large is read."""


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> "HookedTransformer":
    """Load a Llama, in evaluation mode, with Hugging Face's own weights (nothing folded or centred).

    Args:
        name_or_path: one of

            * a Hugging Face id such as ``"meta-llama/Llama-2-7b-chat-hf"`` (downloaded once, then cached;
              licensed models need the ``HF_TOKEN`` environment variable),
            * a folder with ``config.json`` and safetensors, in one file or sharded,
            * a ``.gguf`` file of the Llama architecture, which is dequantised,
            * ``"demo"``: SmolLM2-135M-Instruct (see :func:`caa_lens.demo_model.demo_model_path`).
        dtype: type of the weights and activations, a ``torch.dtype`` or one of "float32", "bfloat16",
            "float16" ("fp32", "bf16", "fp16"). None: float32 on the CPU, the checkpoint's own type on an
            accelerator.
        device: where the whole model goes, for example "cuda:1". None: cuda, else mps, else cpu.
        revision: branch, tag or commit, for a Hugging Face id only.

    Returns:
        A model with a tokenizer, whose ``model.to_tokens(text)`` is what the tokenizer itself gives: one BOS
        for Llama 2 and 3, none for SmolLM2. ``model.tokenizer`` is None if the folder has no tokenizer.

    Raises:
        FileNotFoundError: there is no such model, folder, file, or revision, or it holds no safetensors.
        PermissionError: the model is licensed, and access was not granted.
        ConnectionError: the hub cannot be reached, and the model is not in its cache.
        ModelTooLargeError: the weights do not fit into free memory.
        ValueError: not a Llama, a variant that TransformerLens does not compute as Hugging Face does, damaged
            files, or an unknown dtype or device.

    Not done: a model over several devices, quantised inference, training.
    """
    name = str(name_or_path)
    torch_device = _device(device)
    # Parameters made in inference mode could never be used with gradients.
    with torch.inference_mode(False):
        if name == "demo":
            from caa_lens.demo_model import DEMO_NAME, demo_model_path

            return _load_folder(demo_model_path(), DEMO_NAME, dtype, torch_device)
        path = Path(name).expanduser()
        if path.is_dir():
            return _load_folder(path, path.resolve().name, dtype, torch_device)
        if path.suffix == ".gguf" and path.is_file():
            return _load_gguf(path, dtype, torch_device)
        if path.exists() or path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            raise FileNotFoundError(
                f"got {name!r}, expected a Hugging Face id ('owner/name'), a folder with config.json and"
                " safetensors, a .gguf file, or 'demo'; there is no such folder or GGUF file here: check the"
                " path"
            )
        config = _read_config(_download(name, CONFIG_FILES, revision))
        _check_memory(hooked_config(config, **_placement(config, dtype, torch_device)), name)
        return _load_folder(_download(name, CONFIG_FILES + WEIGHT_FILES, revision), name, dtype, torch_device)


def n_parameters(config: Config) -> int:
    """Number of parameters of the Llama that a ``config.json`` describes; tied embeddings count once.

    Args:
        config: the parsed ``config.json``.

    Raises:
        ValueError: not a Llama, or not one that can be loaded here (as :func:`hooked_config`).
    """
    return _n_parameters(hooked_config(config))


def _n_parameters(cfg: "HookedTransformerConfig") -> int:
    return sum(math.prod(shape) for shape in expected_shapes(cfg).values())


# The configuration.


def hooked_config(
    config: Config, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> "HookedTransformerConfig":
    """The TransformerLens configuration that computes what Hugging Face computes from this ``config.json``.

    Args:
        config: the parsed ``config.json`` of a Llama.
        dtype: type of the weights and activations.
        device: where they go.

    Raises:
        ValueError: another architecture, or an option that TransformerLens does not compute the same way.
    """
    from transformer_lens.config import HookedTransformerConfig

    def require(key: str, default: Any, reason: str) -> None:
        got = config.get(key) or default
        if got != default:
            raise ValueError(f"config.json has {key}={got!r}, expected {default!r}: {reason}")

    if config.get("model_type") != "llama":
        raise ValueError(
            f"config.json has model_type={config.get('model_type')!r}, expected 'llama': only models of the"
            " Llama architecture can be loaded (Llama 1 to 3, TinyLlama, SmolLM2, Vicuna ...)"
        )
    if config.get("quantization_config"):
        raise ValueError(
            "config.json has a quantization_config, expected plain weights: use the checkpoint that it was"
            " quantised from, or a GGUF file"
        )
    require("attention_bias", False, "biases in the attention are not supported")
    require("mlp_bias", False, "biases in the MLP are not supported")
    require("hidden_act", "silu", "other activation functions are not supported")
    try:
        d_model, n_heads = config["hidden_size"], config["num_attention_heads"]
        n_key_value_heads = config.get("num_key_value_heads") or n_heads
        d_head = config.get("head_dim") or d_model // n_heads
        return HookedTransformerConfig(
            n_layers=config["num_hidden_layers"],
            d_model=d_model,
            n_heads=n_heads,
            d_head=d_head,
            # Set only where heads do share keys: TransformerLens has a slower class of attention for that.
            n_key_value_heads=n_key_value_heads if n_key_value_heads != n_heads else None,
            d_mlp=config["intermediate_size"],
            d_vocab=config["vocab_size"],
            n_ctx=config.get("max_position_embeddings", 2048),
            eps=config.get("rms_norm_eps", 1e-6),
            act_fn="silu",
            gated_mlp=True,
            normalization_type="RMS",
            final_rms=True,
            positional_embedding_type="rotary",
            rotary_adjacent_pairs=False,
            rotary_dim=d_head,
            **_rotary_options(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            original_architecture="LlamaForCausalLM",
            init_weights=False,
            dtype=dtype,
            device=device,
        )
    except KeyError as error:
        raise ValueError(
            f"config.json has no {error}: it is not the configuration of a complete Llama"
        ) from None


def _rotary_options(config: Config) -> dict[str, Any]:
    """Rotary base and scaling. transformers 5 writes ``rope_parameters``; before, it was in two other
    places."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    base = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ValueError("config.json has a partial_rotary_factor, expected none: it is not supported")
    if kind == "default":
        return {"rotary_base": base}
    trained_length = rope.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings", config.get("max_position_embeddings", 2048)
    )
    if kind == "linear":
        return {"rotary_base": base, "rotary_scaling_factor": rope["factor"]}
    if kind == "llama3":
        return {
            "rotary_base": base,
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": trained_length,
        }
    if kind == "yarn" and not (rope.get("mscale") or rope.get("mscale_all_dim")):
        attention_factor = rope.get("attention_factor") or 1.0 + 0.1 * math.log(max(rope["factor"], 1.0))
        return {
            "rotary_base": base,
            "use_yarn_rope": True,
            "yarn_factor": rope["factor"],
            "yarn_attention_factor": attention_factor,
            "yarn_beta_fast": rope.get("beta_fast") or 32.0,
            "yarn_beta_slow": rope.get("beta_slow") or 1.0,
            "yarn_truncate": rope.get("truncate", True),
            "yarn_original_max_position_embeddings": trained_length,
        }
    raise ValueError(
        f"config.json has the rope type {kind!r} ({rope}), expected 'default', 'linear', 'llama3', or 'yarn'"
        " without mscale: TransformerLens does not compute other types as Hugging Face does"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no config.json: expected a folder with config.json and safetensors, as"
            " transformers' save_pretrained writes it"
        ) from None
    except ValueError:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} holds a {type(config).__name__}, expected an object")
    return config


# Where it goes, and whether it fits.


def _device(device: torch.device | str | None) -> str:
    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"got device={device!r}, expected 'cpu', 'mps', 'cuda' or 'cuda:1'") from None
    n_found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (wanted.index or 0) >= n_found.get(wanted.type, 0):
        found = ", ".join(f"{count} {kind}" for kind, count in n_found.items() if count)
        raise ValueError(
            f"got device={str(wanted)!r}, but this machine has {found}: choose one of these, or None"
        )
    return str(wanted)


def _placement(config: Config, dtype: torch.dtype | str | None, device: str) -> dict[str, Any]:
    """Device and dtype as keywords for :func:`hooked_config`."""
    if dtype is None:
        stored = config.get("dtype") or config.get("torch_dtype")
        dtype = "float32" if device == "cpu" or stored not in DTYPES else str(stored)
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ValueError(f"got dtype={dtype!r}, expected a torch.dtype or name among {', '.join(DTYPES)}")
    return {"dtype": chosen, "device": device}


def _free_memory(device: str) -> int:
    """Bytes that can still be allocated on the device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    import psutil

    return psutil.virtual_memory().available


def _check_memory(cfg: "HookedTransformerConfig", name: str) -> None:
    needed = _n_parameters(cfg) * cfg.dtype.itemsize * HEADROOM
    free = _free_memory(str(cfg.device))
    if needed > free:
        dtype = str(cfg.dtype).removeprefix("torch.")
        smaller = "" if cfg.dtype.itemsize == 2 else "dtype='bfloat16' or 'float16' for half of that, "
        raise ModelTooLargeError(
            f"{name!r} has {_n_parameters(cfg) / 1e9:.2f} billion parameters and needs about"
            f" {needed / 1e9:.1f} GB as {dtype} (10 % headroom included), but {cfg.device} has"
            f" {free / 1e9:.1f} GB free: choose {smaller}a smaller model, or another device"
        )


# The three sources.


def _load_folder(
    folder: Path, name: str, dtype: torch.dtype | str | None, device: str
) -> "HookedTransformer":
    config = _read_config(folder)
    cfg = hooked_config(config, **_placement(config, dtype, device))
    cfg.model_name = name
    tensors = SafetensorsFolder(folder)
    tensors.check(cfg)
    _check_memory(cfg, name)
    model = _build(cfg, lambda tensor: tensors.read(tensor, device=device, dtype=cfg.dtype))
    if any((folder / file).is_file() for file in TOKENIZER_FILES):
        _attach_tokenizer(model, _folder_tokenizer(folder), name)
    return model


def _build(cfg: "HookedTransformerConfig", read: Read) -> "HookedTransformer":
    from transformer_lens import HookedTransformer

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, move_to_device=False)
    fill_weights(model, read)
    return model.eval()


def _folder_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _sentencepiece_tokenizer(folder / "tokenizer.model")


def _sentencepiece_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Meta's bare ``tokenizer.model``, with the token ids of sentencepiece itself and one BOS in front.

    transformers 5 reads such a file with other ids: ``AutoTokenizer`` leaves out the space in front of the
    first word, and both it and ``LlamaTokenizer`` merge runs of spaces too early and add no BOS.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import normalizers
    from transformers import LlamaTokenizer

    pieces = SentencePieceProcessor(model_file=str(path))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    by_score = sorted(vocab, key=lambda piece: -pieces.get_score(vocab[piece]))
    splits = ((piece[:cut], piece[cut:]) for piece in by_score for cut in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _attach_tokenizer(model: "HookedTransformer", tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """What ``set_tokenizer`` does, but with this very tokenizer: that one loads it anew, and makes it add a
    BOS."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # On the left TransformerLens would guess from pad tokens which tokens are masked, and pad may be a real
    # EOS.
    tokenizer.padding_side = "right"
    model.tokenizer = tokenizer
    model.cfg.tokenizer_name = name
    prepends_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = prepends_bos


def _load_gguf(path: Path, dtype: torch.dtype | str | None, device: str) -> "HookedTransformer":
    gguf = GgufFile(path)
    cfg = hooked_config(gguf.config, **_placement(gguf.config, dtype, device))
    cfg.model_name = path.stem
    gguf.check(cfg)
    _check_memory(cfg, path.name)
    _check_memory(
        hooked_config(gguf.config), path.name
    )  # dequantising takes float32 on the CPU, whatever comes after
    tensors = gguf.dequantised(cfg.dtype)
    model = _build(cfg, tensors.pop)  # pop, so that the CPU's copy goes away as an accelerator's comes
    if gguf.has_tokenizer:
        _attach_tokenizer(model, gguf.tokenizer(), path.stem)
    return model


def _download(repo: str, patterns: list[str], revision: str | None) -> Path:
    """The cached folder of a hub repository with the files that match.

    The causes of errors are cut off (``from None``): their text can hold request headers, and so the token.
    """
    import httpx  # what huggingface_hub lets through when a download breaks off
    from huggingface_hub import errors, snapshot_download

    elsewhere = "or load a local folder, a .gguf file or 'demo'"
    page = f"https://huggingface.co/{repo}"
    refused = PermissionError(
        f"access to {repo!r} was refused, expected an account with access: ask for it on its licence page"
        f" {page}, and set the environment variable HF_TOKEN to a token of that account, {elsewhere}"
    )
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise refused from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{page} has no revision {revision!r}: expected a branch, tag or commit"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileNotFoundError(
            f"got {repo!r}, which is neither here nor a public model on {page}: check the name (a private"
            f" model needs HF_TOKEN), {elsewhere}"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.TransportError):
        raise ConnectionError(
            f"{repo!r} is not in the local cache, and the Hugging Face hub cannot be reached: connect (and"
            f" unset HF_HUB_OFFLINE), {elsewhere}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise refused from None
        raise ConnectionError(
            f"the Hugging Face hub answered {status} for {repo!r}: try again later, {elsewhere}"
        ) from None
