"""What is looked at before a run writes anything, so that a mistake on the command line leaves nothing behind."""

from pathlib import Path
from typing import Any

from experiments.behavior_sets import missing_sets
from experiments.plan import KNOWN_LAYERS
from experiments.settings import RunConfig


def check_out(path: Path) -> None:
    """Raises `ValueError` if a file stands where the run folder, or a folder above it, would have to be."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file, expected a folder to put the run into: give another with --out")


def check_workers(n: int) -> None:
    """Raises `ValueError` for fewer than one process."""
    if n < 1:
        raise ValueError(f"workers is {n}, expected at least 1: give another with --workers")


def check_device(device: str | None) -> None:
    """Raises `ValueError` for a device that is not on this machine."""
    from caa_lens.models.loading.device_memory import devices

    if device is None:
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
    elif not fetch:
        return next((n for name, n in KNOWN_LAYERS.items() if path.name.startswith(name)), None)
    else:
        config = read_config(download(model, CONFIG_FILES, None))
    return config.get("num_hidden_layers")
