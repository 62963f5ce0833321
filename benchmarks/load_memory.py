"""Peak resident memory of loading a Llama, in units of the loaded weights: ours, as either kind, and TransformerLens'.

    python benchmarks/load_memory.py

Writes a random Llama of 0.4 billion parameters into a temporary folder (about 2.3 GB in all, with its copies in other
types), loads it in a fresh process for each row, and subtracts what that process held once its imports were done. The
time is that of the load alone, with the files in the page cache. Linux only: the peak is read from ``/proc``.

TransformerLens' ``from_pretrained`` knows only the configurations of official names, so for its rows our
configuration is put in its place; everything else is what it does to ``hf_model``, with its default processing.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Every knob of the random model.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
# (type in the files, number of files, type in memory)
CASES = [("float16", 1, "float16"), ("float16", 1, "float32"), ("bfloat16", 4, "bfloat16")]
BACKENDS = {"load_model, hooked": "hooked", "load_model, bridge": "bridge"}
LOADERS = [*BACKENDS, "HookedTransformer.from_pretrained"]


def write_llama(folder: Path, dtype: str, n_files: int) -> None:
    """A folder as transformers writes it, with random weights."""
    import torch
    from safetensors.torch import save_file

    from caa_lens.models.loading.load import hooked_config
    from caa_lens.models.loading.weights import expected_shapes

    torch.manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"dtype": dtype}))
    shapes = list(expected_shapes(hooked_config(CONFIG)).items())
    weight_map = {}
    for part in range(n_files):
        file = f"model-{part + 1:05}-of-{n_files:05}.safetensors" if n_files > 1 else "model.safetensors"
        mine = shapes[part::n_files]
        tensors = {name: 0.02 * torch.randn(shape).to(getattr(torch, dtype)) for name, shape in mine}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if n_files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def resident(key: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def from_pretrained(folder: Path, dtype: str, config: dict | None = None) -> object:
    """TransformerLens' own way, given the model as transformers loads it; its config.json is `CONFIG`, or given."""
    from unittest import mock

    import torch
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoModelForCausalLM

    from caa_lens.models.loading.load import hooked_config

    torch_dtype = getattr(torch, dtype)
    cfg = hooked_config(config or CONFIG, dtype=torch_dtype)
    cfg.normalization_type = "RMSPre"  # as from_pretrained sets it, since it folds the norms
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
    with mock.patch.object(loading_from_pretrained, "get_pretrained_model_config", return_value=cfg):
        return HookedTransformer.from_pretrained(
            "meta-llama/Llama-2-7b-hf", hf_model=hf, device="cpu", dtype=torch_dtype
        )


def measure(loader: str, folder: Path, dtype: str) -> dict[str, float]:
    """Load in this process, which must be fresh."""
    import torch
    import transformer_lens  # noqa: F401 (the baseline is a process with its imports done)
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from caa_lens.models.loading.load import load_model, n_parameters

    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    before, start = resident("VmRSS"), time.perf_counter()
    if loader in BACKENDS:
        model = load_model(folder, dtype=dtype, device="cpu", backend=BACKENDS[loader])
    else:
        model = from_pretrained(folder, dtype)
    seconds = time.perf_counter() - start
    weights = n_parameters(CONFIG) * getattr(torch, dtype).itemsize
    peak, kept = resident("VmHWM") - before, resident("VmRSS") - before
    assert model is not None
    return {"peak": peak / weights, "kept": kept / weights, "seconds": seconds}


def main() -> None:
    if len(sys.argv) > 1:  # the fresh process
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
        return
    import psutil

    described = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in described if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    print(f"{cpu}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB; memory / final weights\n")
    print(f"{'stored -> loaded':32} {'loader':34} {'peak':>6} {'after':>6} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        for stored, n_files, dtype in CASES:
            folder = Path(scratch) / f"{stored}-{n_files}"
            if not folder.exists():
                write_llama(folder, stored, n_files)
            for loader in LOADERS:
                command = [sys.executable, "-W", "ignore", __file__, loader, str(folder), dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                row = json.loads(done.stdout.splitlines()[-1])
                case = f"{stored} -> {dtype}, {n_files} file{'s' if n_files > 1 else ''}"
                print(f"{case:32} {loader:34} {row['peak']:6.2f} {row['kept']:6.2f} {row['seconds']:8.1f}")


if __name__ == "__main__":
    main()
