"""Load a causal language model: a Llama as a `HookedTransformer`, any other as a `TransformerBridge`.

From a Hugging Face id, a local folder of safetensors, a GGUF file, or the word ``"demo"``; or one that transformers has
loaded. TransformerLens' own ``from_pretrained`` knows official names only, takes several times the memory of the
weights, and folds the norms. Here a Llama's configuration is read from ``config.json``, the model is built without
memory, and `loading.weights` fills it with Hugging Face's values, unfolded; `loading.bridges` does the others.
"""

import copy
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from caa_lens.arguments import describe
from caa_lens.models.cpu_threads import choose_threads
from caa_lens.models.loading import bridges
from caa_lens.models.loading.causal_models import (
    causal_config,
    check_adapter,
    has_hooked_transformer,
    parameter_shapes,
)
from caa_lens.models.loading.causal_models import n_parameters as n_parameters
from caa_lens.models.loading.checkpoints import GgufFile, SafetensorsFolder
from caa_lens.models.loading.device_memory import devices, free_memory, make_room
from caa_lens.models.loading.hub import CONFIG_FILES, HUB_ID, WEIGHT_FILES, cached_id, checkpoint_id, download
from caa_lens.models.loading.llama_config import (
    Config,
    NotByHookedTransformerError,
    count_parameters,
    hooked_config,
    read_config,
)
from caa_lens.models.loading.quantisation import check_quantised, quantisation_config, weight_sizes
from caa_lens.models.loading.spread import named_devices, too_large
from caa_lens.models.loading.tokenizers import TOKENIZER_FILES, attach_tokenizer, folder_tokenizer
from caa_lens.models.loading.weights import build_model, expected_shapes

# TransformerLens takes about 3 s to import and transformers 4 s, so both are imported where they are used.
if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

BACKENDS = ("hooked", "bridge")
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
    backend: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantised: "str | BitsAndBytesConfig | None" = None,
    hf_model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    check: bool = True,
) -> "HookedTransformer | TransformerBridge":
    """Load a causal language model, in evaluation mode, with Hugging Face's own weights (nothing folded or centred).

    Args:
        name_or_path: one of

            * a Hugging Face id such as ``"meta-llama/Llama-2-7b-chat-hf"`` (downloaded once, then cached;
              licensed models need the ``HF_TOKEN`` environment variable),
            * a folder with ``config.json`` and safetensors, in one file or sharded; ``cfg.model_name`` is its
              name, or the hub id if it is a snapshot in a hub's cache, ``models--owner--name/snapshots/<commit>``,
            * a ``.gguf`` file of the Llama architecture, which is dequantised,
            * ``"demo"``: SmolLM2-135M-Instruct from 4 bits (`caa_lens.models.loading.demo_model.demo_model_path`).
        dtype: type of the weights and activations, a ``torch.dtype`` or one of "float32", "bfloat16",
            "float16" ("fp32", "bf16", "fp16"). None: float32 on the CPU, the checkpoint's own type on an
            accelerator.
        device: where the whole model goes, for example "cuda:1". None: cuda, else mps, else cpu. On the
            CPU a `CpuThreadsWarning` says if torch was given fewer threads than it would take.
        revision: branch, tag or commit, for a Hugging Face id only.
        backend: "hooked" for a ``HookedTransformer`` (Llamas only, and TransformerLens before 4 only), "bridge" for a
            ``TransformerBridge`` over transformers' own module. None: "hooked" for what it computes, else "bridge".
        device_map: of transformers, ``"auto"`` or module names and devices, for a model over several devices, in the
            CPU's memory or on the "disk". Needs a bridge.
        quantised: "8bit" (LLM.int8()), "4bit" (nf4, computed in the model's type), or a ``BitsAndBytesConfig``: linear
            layers are packed by bitsandbytes as they are read. The model is then called "name (int8)", "name (nf4)",
            so that its vectors are told from those of the whole model. Needs a bridge, and the extra ``[quantised]``.
        hf_model: a model that transformers has loaded, quantised or over several devices if need be; no weights are
            read then, and ``name_or_path`` is what it is called and where its tokenizer is. It is changed in place:
            TransformerLens puts its own modules into it, its attention becomes "eager", and it goes to evaluation
            mode. Do not use it by itself, or boot it again, afterwards.
        tokenizer: in the place of the checkpoint's; a copy is used.
        check: of a bridge, compare its log-probabilities on 8 tokens with those of transformers' untouched module,
            and say on standard error what was compared. (A HookedTransformer's adapter is this library's own.)

    Returns:
        A model with a tokenizer, whose ``model.to_tokens(text)`` is what the tokenizer itself gives: one BOS
        for Llama 2 and 3, none for SmolLM2. ``model.tokenizer`` is None if the folder has no tokenizer.

    Raises:
        FileNotFoundError: there is no such model, folder, file, or revision, or it holds no safetensors.
        PermissionError: the model is licensed, and access was not granted.
        ConnectionError: the hub cannot be reached, and the model is not in its cache.
        ModelTooLargeError: the weights do not fit into free memory, or not on the devices of the map.
        ImportError: packed weights are asked for, and bitsandbytes is not installed.
        TypeError: a model in the place of its name, or something else in the place of a model or tokenizer.
        ValueError: no causal language model, one that TransformerLens has no adapter for or does not compute as
            transformers does, weights that the files do not hold, damaged files, an unknown dtype, device or backend,
            or arguments that exclude each other.

    Not done: training; a checkpoint that brings its own code (load it with transformers, and give it as ``hf_model``).
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(
            f"got a {type(name_or_path).__name__}, expected a hub id, a folder, a .gguf file or 'demo': a model of "
            "transformers is given as hf_model=, beside its name"
        )
    name = str(name_or_path)
    wanted = _Placement(_dtype(dtype), _device(device), device_map, quantised)
    options = _Options(wanted, backend, tokenizer, check)
    _check_options(options, dtype=dtype, device=device, hf_model=hf_model)
    if wanted.device == "cpu":
        choose_threads()
    # Parameters made in inference mode could never be used with gradients.
    with torch.inference_mode(False):
        if hf_model is not None:
            bridges.check_given(hf_model)
            return _boot_given(hf_model, name, revision, options)
        if name == "demo":
            from caa_lens.models.loading.demo_model import DEMO_NAME, demo_model_path

            return _load_folder(demo_model_path(), DEMO_NAME, options)
        path = Path(name).expanduser()
        if name and path.is_dir():
            return _load_folder(path, _name_of(path), options)
        if path.suffix == ".gguf" and path.is_file():
            return _load_gguf(path, options)
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
        if options.is_hooked(config):
            _check_memory(count_parameters(hooked_config(config)), wanted, config, name)
        else:
            check_adapter(causal_config(config))
            if not config.get("quantization_config"):  # else only the files say how large it is
                _check_bridge_memory(wanted, config, name)
        return _load_folder(download(name, CONFIG_FILES + WEIGHT_FILES, revision), name, options)


# What was asked for.


class _Placement(NamedTuple):
    """Where the caller wants the model."""

    dtype: torch.dtype | None
    device: str
    device_map: str | Mapping[str, Any] | None = None
    quantised: "str | BitsAndBytesConfig | None" = None

    def of(self, config: Config) -> dict[str, Any]:
        """Type and device of a model with this configuration, as keywords for `hooked_config`."""
        stored = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
        return {
            "dtype": self.dtype or (torch.float32 if self.device == "cpu" else stored),
            "device": self.device,
        }


class _Options(NamedTuple):
    wanted: _Placement
    backend: str | None
    tokenizer: "PreTrainedTokenizerBase | None"
    check: bool

    def is_hooked(self, config: Config) -> bool:
        """Whether a checkpoint becomes a HookedTransformer; by itself, only what that computes as transformers does."""
        if self.backend is not None:
            return self.backend == "hooked"
        needs_bridge = self.wanted.device_map is not None or self.wanted.quantised is not None
        if config.get("model_type") != "llama" or needs_bridge or not has_hooked_transformer():
            return False
        try:
            hooked_config(config)
        except NotByHookedTransformerError:
            return False
        return True


def _check_options(options: _Options, *, dtype: Any, device: Any, hf_model: Any) -> None:
    backend, device_map = options.backend, options.wanted.device_map
    if backend not in (None, *BACKENDS):
        raise ValueError(f"got backend={backend!r}, expected 'hooked', 'bridge', or None to choose by the model")
    if device is not None and device_map is not None:
        raise ValueError(
            f"got device={str(device)!r} and device_map={device_map!r}, expected one of them: leave one out"
        )
    for place in () if device_map is None else named_devices(device_map):
        _device(place)
    check_quantised(options.wanted.quantised)
    placed = {"dtype": dtype, "device": device, "device_map": device_map, "quantised": options.wanted.quantised}
    if hf_model is not None and (given := [name for name, value in placed.items() if value is not None]):
        raise ValueError(
            f"got {' and '.join(given)} with hf_model, whose weights lie where they are, in their own type: give "
            f"{given[0]}= to transformers as it loads the model"
        )
    if backend == "hooked":
        if not has_hooked_transformer():
            raise ValueError(
                f"got backend='hooked', but TransformerLens {importlib.metadata.version('transformer-lens')} has no "
                "HookedTransformer, which 4.0 removed, expected 'bridge': leave backend out, or install "
                "'transformer-lens<4'"
            )
        needing = {"device_map": device_map, "quantised": options.wanted.quantised, "hf_model": hf_model}
        for name, value in needing.items():
            if value is not None:
                raise ValueError(f"got backend='hooked' with {name}, which takes a 'bridge': leave backend out")
    if options.tokenizer is not None:
        from transformers import PreTrainedTokenizerBase

        if not isinstance(options.tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"got tokenizer {describe(options.tokenizer)}, expected a tokenizer of transformers: load it with "
                "AutoTokenizer.from_pretrained"
            )


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
    if (wanted.index or 0) >= (n_found := devices()).get(wanted.type, 0):
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


def _check_memory(n: int, wanted: _Placement, config: Config, name: str, *, n_bytes: int | None = None) -> None:
    """Refuses a model that does not fit; `n_bytes` where the weights are not `n` numbers of the type that is wanted."""
    dtype, device = wanted.of(config).values()
    needed = (n_bytes or n * dtype.itemsize) * HEADROOM
    make_room(device, needed)
    free = free_memory(device)
    if needed > free:
        how = "quantised" if n_bytes else str(dtype).removeprefix("torch.")
        smaller = "" if n_bytes or dtype.itemsize == 2 else "dtype='bfloat16' or 'float16' for half of that, "
        raise ModelTooLargeError(
            f"{name!r} has {n / 1e9:.2f} billion parameters and needs about"
            f" {needed / 1e9:.1f} GB as {how} (10 % headroom included), but {device} has"
            f" {free / 1e9:.1f} GB free: choose {smaller}a smaller model, or another device"
        )


def _check_bridge_memory(wanted: _Placement, config: Config, name: str, *, n_bytes: int | None = None) -> None:
    """Refuses a bridge that does not fit; `n_bytes` of files whose weights are packed already."""
    n, dtype = n_parameters(config), wanted.of(config)["dtype"]
    packed = n_bytes is not None or wanted.quantised is not None
    sizes = {"": n_bytes or 0}
    if n_bytes is None:
        sizes = weight_sizes(causal_config(config), dtype, quantisation_config(wanted.quantised, dtype))
    if wanted.device_map is None:
        _check_memory(n, wanted, config, name, n_bytes=sum(sizes.values()) if packed else None)
    elif why := too_large(sizes, wanted.device_map, packed=packed, headroom=HEADROOM):
        raise ModelTooLargeError(
            f"{name!r} has {n / 1e9:.2f} billion parameters and needs about"
            f" {HEADROOM * sum(sizes.values()) / 1e9:.1f} GB (10 % headroom included), but {why}"
        )


# The sources.


def _load_folder(folder: Path, name: str, options: _Options) -> "HookedTransformer | TransformerBridge":
    config, wanted = read_config(folder), options.wanted
    if not options.is_hooked(config):
        return _load_bridge(folder, name, config, options)
    cfg = hooked_config(config, **wanted.of(config))
    cfg.model_name = name
    tensors = SafetensorsFolder(folder)
    tensors.check(expected_shapes(cfg))
    _check_memory(count_parameters(cfg), wanted, config, name)
    model = build_model(cfg, lambda tensor: tensors.read(tensor, device=wanted.device, dtype=cfg.dtype))
    if (tokenizer := _tokenizer(folder, options)) is not None:
        attach_tokenizer(model, tokenizer, checkpoint_id(folder) or name)
    return model


def _load_bridge(folder: Path, name: str, config: Config, options: _Options) -> "TransformerBridge":
    wanted, quantised = options.wanted, bool(config.get("quantization_config"))
    check_adapter(causal_config(config))
    if quantised and wanted.quantised is not None:
        raise ValueError(
            f"got quantised={wanted.quantised!r} for {name!r}, whose weights are packed already, expected plain "
            "weights: leave quantised out"
        )
    tensors = SafetensorsFolder(folder, quantised=quantised)
    _check_bridge_memory(wanted, config, name, n_bytes=tensors.n_bytes if quantised else None)
    tokenizer = _tokenizer(folder, options)
    place = wanted.of(config)
    packing = quantisation_config(wanted.quantised, place["dtype"])
    hf_model = bridges.read_folder(folder, **place, device_map=wanted.device_map, quantisation=packing)
    return bridges.boot(hf_model, name, tokenizer, checkpoint_id(folder) or name, check=options.check)


def _name_of(folder: Path) -> str:
    """What a model is called that lies in a folder: by its hub id in a hub's cache, else as the folder."""
    from caa_lens.models.loading.demo_model import DEMO_NAME, is_demo

    return DEMO_NAME if is_demo(folder) else cached_id(folder) or folder.resolve().name


def _boot_given(hf_model: "PreTrainedModel", name: str, revision: str | None, options: _Options) -> "TransformerBridge":
    """A bridge over a model that the caller loaded; files are looked for only where a tokenizer has to be read."""
    path, folder, called = Path(name).expanduser(), None, name
    if name == "demo":
        from caa_lens.models.loading.demo_model import DEMO_NAME, demo_model_path

        folder, called = demo_model_path(), DEMO_NAME
    elif name and path.is_dir():
        folder, called = path, _name_of(path)
    elif options.tokenizer is None:
        if not HUB_ID.fullmatch(name):
            raise FileNotFoundError(
                f"got {name!r} with hf_model, expected a hub id or folder to read the model's tokenizer from: check "
                "the path, or give tokenizer="
            )
        folder = download(name, CONFIG_FILES, revision)
    tokenizer = _tokenizer(folder, options)
    known_as = (checkpoint_id(folder) if folder else None) or called
    return bridges.boot(hf_model, called, tokenizer, known_as, check=options.check)


def _tokenizer(folder: Path | None, options: _Options) -> "PreTrainedTokenizerBase | None":
    """A copy of the caller's, else the folder's own; None if there is none."""
    if options.tokenizer is not None:
        return copy.deepcopy(options.tokenizer)
    if folder is None or not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    return folder_tokenizer(folder)


def _load_gguf(path: Path, options: _Options) -> "HookedTransformer | TransformerBridge":
    gguf, wanted = GgufFile(path), options.wanted
    if wanted.device_map is not None:
        raise ValueError(f"got device_map with {path.name}, which transformers dequantises on the CPU: give a device")
    if wanted.quantised is not None:
        raise ValueError(
            f"got quantised with {path.name}, whose own packing is undone: load the checkpoint it is made of"
        )
    # Whatever comes after, transformers dequantises to float32 on the CPU.
    n = n_parameters(gguf.config)
    _check_memory(n, wanted, gguf.config, path.name)
    _check_memory(n, _Placement(torch.float32, "cpu"), gguf.config, path.name)
    tokenizer = copy.deepcopy(options.tokenizer)
    if tokenizer is None and gguf.has_tokenizer:
        tokenizer = gguf.tokenizer()
    if not options.is_hooked(gguf.config):
        gguf.check(parameter_shapes(causal_config(gguf.config)))
        hf_model = bridges.read_gguf(gguf, **wanted.of(gguf.config))
        return bridges.boot(hf_model, path.stem, tokenizer, path.stem, check=options.check)
    cfg = hooked_config(gguf.config, **wanted.of(gguf.config))
    cfg.model_name = path.stem
    gguf.check(expected_shapes(cfg))
    tensors = gguf.dequantised(cfg.dtype)
    model = build_model(cfg, tensors.pop)  # pop, so that the CPU's copy goes away as an accelerator's comes
    if tokenizer is not None:
        attach_tokenizer(model, tokenizer, path.stem)
    return model
