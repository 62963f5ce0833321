"""Load a Llama-family checkpoint as a `transformer_lens.HookedTransformer`.

From a Hugging Face id, a local folder of safetensors, a GGUF file, or the word ``"demo"``. TransformerLens'
own ``from_pretrained`` knows official names only, takes several times the memory of the weights, and folds
the norms; here the configuration is read from ``config.json``, the model is built without memory, and
`loading.weights` fills it with Hugging Face's values, unfolded.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from caa_lens.models.loading.checkpoints import GgufFile, SafetensorsFolder
from caa_lens.models.loading.device_memory import devices, free_memory, make_room
from caa_lens.models.loading.hub import CONFIG_FILES, HUB_ID, WEIGHT_FILES, cached_id, checkpoint_id, download
from caa_lens.models.loading.llama_config import Config, count_parameters, hooked_config, read_config
from caa_lens.models.loading.llama_config import n_parameters as n_parameters
from caa_lens.models.loading.tokenizers import TOKENIZER_FILES, attach_tokenizer, folder_tokenizer
from caa_lens.models.loading.weights import build_model, expected_shapes

# TransformerLens takes about 3 s to import and transformers 4 s, so both are imported where they are used.
if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
HEADROOM = 1.1  # activations, rotary tables and the pages of the tensor being read, on top of the weights


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
            * a folder with ``config.json`` and safetensors, in one file or sharded; ``cfg.model_name`` is its
              name, or the hub id if it is a snapshot in a hub's cache, ``models--owner--name/snapshots/<commit>``,
            * a ``.gguf`` file of the Llama architecture, which is dequantised,
            * ``"demo"``: SmolLM2-135M-Instruct (see `caa_lens.models.loading.demo_model.demo_model_path`).
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
        TypeError: a model in the place of its name.
        ValueError: not a Llama, a variant that TransformerLens does not compute as Hugging Face does, damaged
            files, or an unknown dtype or device.

    Not done: a model over several devices, quantised inference, training.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(
            f"got a {type(name_or_path).__name__}, expected a hub id, a folder, a .gguf file or 'demo': a model of "
            "transformers is loaded from its folder, where save_pretrained(folder) writes it"
        )
    name = str(name_or_path)
    wanted = _Placement(_dtype(dtype), _device(device))
    # Parameters made in inference mode could never be used with gradients.
    with torch.inference_mode(False):
        if name == "demo":
            from caa_lens.models.loading.demo_model import DEMO_NAME, demo_model_path

            return _load_folder(demo_model_path(), DEMO_NAME, wanted)
        path = Path(name).expanduser()
        if name and path.is_dir():
            return _load_folder(path, cached_id(path) or path.resolve().name, wanted)
        if path.suffix == ".gguf" and path.is_file():
            return _load_gguf(path, wanted)
        if path.is_file():
            raise ValueError(f"got the file {name}, expected a model: a folder with safetensors, or a .gguf file")
        if name.lower() == "demo":
            raise ValueError(f"got {name!r}: the demo model is called 'demo'")
        if path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
            raise FileNotFoundError(
                f"got {name!r}, expected a Hugging Face id ('owner/name'), a folder with config.json and"
                " safetensors, a .gguf file, or 'demo'; there is no such folder or GGUF file here: check the"
                " path"
            )
        config = read_config(download(name, CONFIG_FILES, revision))
        _check_memory(hooked_config(config, **wanted.of(config)), name)
        return _load_folder(download(name, CONFIG_FILES + WEIGHT_FILES, revision), name, wanted)


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
    n_found = devices()
    if (wanted.index or 0) >= n_found.get(wanted.type, 0):
        found = ", ".join(f"{count} {kind}" for kind, count in n_found.items() if count)
        raise ValueError(
            f"got device={str(wanted)!r}, but this machine has {found}: choose one of these, or leave it out"
        )
    return str(wanted)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in DTYPES.values():
        raise ValueError(f"got dtype={dtype!r}, expected a torch.dtype or name among {', '.join(DTYPES)}")
    return chosen


class _Placement(NamedTuple):
    """Where the caller wants the model."""

    dtype: torch.dtype | None
    device: str

    def of(self, config: Config) -> dict[str, Any]:
        """Type and device of a model with this configuration, as keywords for `hooked_config`."""
        stored = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
        return {
            "dtype": self.dtype or (torch.float32 if self.device == "cpu" else stored),
            "device": self.device,
        }


def _check_memory(cfg: "HookedTransformerConfig", name: str) -> None:
    needed = count_parameters(cfg) * cfg.dtype.itemsize * HEADROOM
    make_room(str(cfg.device), needed)
    free = free_memory(str(cfg.device))
    if needed > free:
        dtype = str(cfg.dtype).removeprefix("torch.")
        smaller = "" if cfg.dtype.itemsize == 2 else "dtype='bfloat16' or 'float16' for half of that, "
        raise ModelTooLargeError(
            f"{name!r} has {count_parameters(cfg) / 1e9:.2f} billion parameters and needs about"
            f" {needed / 1e9:.1f} GB as {dtype} (10 % headroom included), but {cfg.device} has"
            f" {free / 1e9:.1f} GB free: choose {smaller}a smaller model, or another device"
        )


# The three sources.


def _load_folder(folder: Path, name: str, wanted: _Placement) -> "HookedTransformer":
    config = read_config(folder)
    cfg = hooked_config(config, **wanted.of(config))
    cfg.model_name = name
    tensors = SafetensorsFolder(folder)
    tensors.check(expected_shapes(cfg))
    _check_memory(cfg, name)
    model = build_model(cfg, lambda tensor: tensors.read(tensor, device=wanted.device, dtype=cfg.dtype))
    if any((folder / file).is_file() for file in TOKENIZER_FILES):
        attach_tokenizer(model, folder_tokenizer(folder), checkpoint_id(folder) or name)
    return model


def _load_gguf(path: Path, wanted: _Placement) -> "HookedTransformer":
    gguf = GgufFile(path)
    cfg = hooked_config(gguf.config, **wanted.of(gguf.config))
    cfg.model_name = path.stem
    gguf.check(expected_shapes(cfg))
    _check_memory(cfg, path.name)
    # Whatever comes after, transformers dequantises to float32 on the CPU.
    _check_memory(hooked_config(gguf.config), path.name)
    tensors = gguf.dequantised(cfg.dtype)
    model = build_model(cfg, tensors.pop)  # pop, so that the CPU's copy goes away as an accelerator's comes
    if gguf.has_tokenizer:
        attach_tokenizer(model, gguf.tokenizer(), path.stem)
    return model
