"""On what, when, and with what a demo was made: for its page and the end of what the screen shows."""

import importlib.metadata
import platform
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from caa_lens.models.placement import device_of_tokens, dtype_name

LIBRARIES = ("caa-lens", "torch", "transformer-lens", "transformers")


def versions() -> dict[str, str]:
    """Of the libraries that numbers depend on."""
    return {library: importlib.metadata.version(library) for library in LIBRARIES}


def made_with(model: Any, config: BaseModel, folder: Path) -> dict[str, str]:
    """Device, type, date, versions and the command, in words; the date is that of the page."""
    return {
        "device": _device(device_of_tokens(model)),
        "dtype": dtype_name(model),
        "date": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "versions": ", ".join([*(f"{name} {each}" for name, each in versions().items()), _python()]),
        "command": command_of(config, folder),
    }


def command_of(config: BaseModel, folder: Path) -> str:
    """What gives this run again: a command, or a line of Python where no command has all of its settings."""
    fields = type(config).model_fields
    changed = {name: value for name in fields if (value := getattr(config, name)) != fields[name].get_default()}
    options = {name: _layers(value) if name == "layers" else str(value) for name, value in changed.items()}
    if changed.keys() <= {"model", "dtype", "device", "backend", "behavior", "layers"}:
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return shlex.join(["caa-lens", "demo", *words, "--out", str(folder)])
    given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    return f"run_demo(DemoConfig({given}), {str(folder)!r})"


def _layers(layers: Any) -> str:
    return layers if isinstance(layers, str) else ",".join(map(str, layers))


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        n = torch.get_num_threads()
        return f"cpu ({platform.machine()}, {n} thread{'' if n == 1 else 's'})"
    return str(device)


def _python() -> str:
    return f"Python {platform.python_version()}"
