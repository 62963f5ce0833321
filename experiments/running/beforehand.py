"""What is seen before a model is loaded and anything is written: mistakes of the command line, and a model's size."""

import json
from pathlib import Path
from typing import Any

from experiments.running.behavior_sets import missing_sets
from experiments.running.settings import RunConfig

KNOWN_LAYERS = {"demo": 30, "Llama-2-7b": 32, "Llama-2-13b": 40, "Llama-2-70b": 80}
KNOWN_PARAMETERS = {
    "demo": 134_515_008,
    "Llama-2-7b": 6_738_415_616,
    "Llama-2-13b": 13_015_864_320,
    "Llama-2-70b": 68_976_648_192,
}


def check_out(path: Path) -> None:
    """Raises `ValueError` if a file stands where the run folder, or a folder above it, would have to be."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file, expected a folder to put the run into: give another with --out")


def check_workers(engine: str | None, n: int | None, address: str | None) -> bool:
    """Whether Ray is to do the units: if it is named, if there are several workers, or if a cluster is.

    Raises:
        ValueError: for fewer than one worker, an unknown engine, or what does not go together.
    """
    if n is not None and n < 1:
        raise ValueError(f"workers is {n}, expected at least 1: give another with --workers")
    if engine not in (None, "process", "ray"):
        raise ValueError(f"engine is {engine!r}, expected 'process' or 'ray': give another with --engine")
    if address is not None and address.startswith("ray://"):
        raise ValueError(
            f"address is {address!r}, expected 'auto' or HOST:PORT: run the command on one of the cluster's nodes, as "
            "the run folder is written by the process that is started"
        )
    several = address is not None or (n is not None and n > 1)
    if engine == "process" and several:
        raise ValueError("got --engine process with --workers or --address, expected --engine ray, or none of them")
    return engine == "ray" or several


def check_device(device: str | None) -> None:
    """Raises `ValueError` for a device that is not on this machine."""
    from caa_lens.models.loading.device_memory import devices

    if device in (None, "auto"):
        return
    found = devices()
    kind, _, index = device.partition(":")
    if not (index or "0").isdecimal() or int(index or 0) >= found.get(kind, 0):
        here = ", ".join(f"{n} {name}" for name, n in found.items() if n)
        raise ValueError(f"device is {device!r}, but this machine has {here}: give another with --device, or none")


def check_layer(config: RunConfig, n_layers: int | None) -> None:
    """Raises `ValueError` for a layer that the model does not have; nothing of a model whose depth is not known."""
    if config.layer is not None and n_layers is not None and config.layer >= n_layers:
        raise ValueError(
            f"layer is {config.layer}, but {config.model_name} has layers 0 to {n_layers - 1}: give another with "
            "--layer, or none for the one that the layer sweep finds best"
        )


def check_data(config: RunConfig) -> None:
    """Raises `FileNotFoundError` if a behavior's set of the paper was not fetched; names the one command."""
    missing = [name for name in missing_sets(config) if name in config.behaviors]
    if missing:
        raise FileNotFoundError(
            f"the paper's data are not all here: no {', '.join(missing)}. `caa-lens data fetch` gets every set, and "
            "where there is no network says which files to put where; --data bundled does without"
        )


def n_layers(model: str, *, fetch: bool) -> int | None:
    """The model's depth, from its configuration alone; None where that is not here and may not be fetched.

    Raises:
        FileNotFoundError: there is no such model (as far as can be seen without fetching).
        PermissionError, ConnectionError: as `load_model`.
        ValueError: the configuration cannot be read.
    """
    from caa_lens.models.loading.checkpoints import GgufFile
    from caa_lens.models.loading.hub import CONFIG_FILES, download
    from caa_lens.models.loading.llama_config import read_config

    path = Path(model).expanduser()
    if model == "demo":
        return KNOWN_LAYERS["demo"]
    config: Any
    if path.is_dir():
        config = read_config(path)
    elif path.suffix == ".gguf" and path.is_file():
        config = GgufFile(path).config
    elif path.exists() or path.suffix == ".gguf" or path.is_absolute() or model.count("/") != 1:
        raise FileNotFoundError(
            f"there is no model {model!r} here: expected 'demo', a hub id ('owner/name'), a folder with config.json "
            "and safetensors, or a .gguf file; give another with --model"
        )
    elif fetch:
        config = read_config(download(model, CONFIG_FILES, None))
    elif (place := place_of(model)) is not None:
        config = read_config(place)
    else:
        return next((n for name, n in KNOWN_LAYERS.items() if path.name.startswith(name)), None)
    return config.get("num_hidden_layers")


def place_of(model: str) -> Path | None:
    """Where a whole model lies on this machine: its folder, its GGUF file, or its snapshot in the hub's cache.

    None if it does not: nothing is fetched.
    """
    from caa_lens.models.loading.demo_model import demo_model_here
    from caa_lens.models.loading.hub import CONFIG_FILES, HUB_ID, WEIGHT_FILES

    path = Path(model).expanduser()
    if model == "demo":
        return demo_model_here()
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() and HUB_ID.fullmatch(model):
        from huggingface_hub import errors, snapshot_download

        try:
            wanted = CONFIG_FILES + WEIGHT_FILES
            path = Path(snapshot_download(model, allow_patterns=wanted, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            return None
    return path if _is_whole(path) else None


def _is_whole(folder: Path) -> bool:
    """Whether a folder has a configuration and all files of weights that it speaks of."""
    from caa_lens.models.loading.checkpoints import INDEX_NAME

    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    try:
        shards = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / name).is_file() for name in shards)


def n_parameters(model: str) -> int | None:
    """From the model's own configuration where it lies on this machine, else from its name; None if neither tells."""
    from caa_lens.models.loading.load import n_parameters as count

    basename = model.rstrip("/").rsplit("/", 1)[-1]
    known = next((number for name, number in KNOWN_PARAMETERS.items() if basename.startswith(name)), None)
    place = Path(model) if (Path(model) / "config.json").is_file() else None if known else place_of(model)
    if place is not None and place.is_dir():
        from caa_lens.models.loading.llama_config import read_config

        return count(read_config(place))
    return known


def stored_bytes(model: str) -> float | None:
    """Of a model's weights on the disk: of its files where they are here, else Llama 2's, stored in half precision."""
    from caa_lens.models.loading.checkpoints import INDEX_NAME

    path = Path(model).expanduser()
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        sharded = (path / INDEX_NAME).is_file() and not (path / "model.safetensors").is_file()
        return sum(file.stat().st_size for file in path.glob("model-*.safetensors" if sharded else "model.safetensors"))
    parameters = n_parameters(model)
    return None if parameters is None else parameters * (4 if model == "demo" else 2)
