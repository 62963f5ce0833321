"""A second device for machines without one: "card", which computes real numbers.

Its memory is the machine's own and its arithmetic the CPU's, but torch takes it for another device: an operation whose
tensors lie on both raises as it would on a GPU. So a whole test suite can be run on it (`pytest --device card`), and
what forgets to move a tensor is found. It says nothing of a GPU's own arithmetic, kernels, waits or speed.

It is compiled once, in a minute, into torch's folder for extensions, and needs g++ and the headers of the installed
torch.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


def _compiled() -> Path:
    from torch.utils.cpp_extension import include_paths, library_paths

    version = f"{torch.__version__} {sys.version} {SOURCE.read_text()}"
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "caa_lens" / "host_card"
    library = folder / f"{hashlib.sha256(version.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as made:
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", str(SOURCE), "-o", made.name]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        command += [f"-isystem{path}" for path in include_paths()]
        command += [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the card for tests does not compile with torch {torch.__version__}:\n{done.stderr}")
        os.replace(made.name, library)
    return library


def install() -> None:
    """Make `torch.device("card")` a device of this process."""
    if hasattr(torch, "card"):
        return
    torch.utils.rename_privateuse1_backend("card")
    module = ModuleType("torch.card")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module("card", module)
    torch.ops.load_library(_compiled())
