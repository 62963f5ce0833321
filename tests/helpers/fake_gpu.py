"""A GPU for machines that have none: shapes, dtypes and devices are real, values are not.

    with fake_gpu() as gpu:
        model = llama("card", n_layers=32, d_model=4096)
        cl.extract(model, pairs)
    gpu.waits, gpu.uploads, gpu.places

A tensor on "card" is one of torch's FakeTensors and takes no memory, so a 13B Llama fits on any machine. Tensors on the
CPU stay real. An operation whose tensors lie on two devices raises as on a card, and so do a CPU generator for a tensor
on the GPU, and a CPU tensor indexed by one on the GPU.

Counted is what keeps a program from running ahead of its card: a *wait* is a number read (`float()`, `bool()`,
`.item()`) or a tensor copied down, an *upload* is a tensor copied up. What has a size that depends on values
(`nonzero`, a boolean mask as index) waits too, but has no size here: it raises.

Time is not measured: counts and devices are all that can be learnt here.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
PACKAGE = Path(__file__).resolve().parents[2] / "caa_lens"
INDEXING = (aten.index, aten.index_put, aten.index_put_)

_setup_privateuseone_for_python_backend("card")


class FakeGpu(TorchDispatchMode):
    """What sees every operation while the GPU is there.

    Attributes:
        waits, uploads: how many.
        places: how many of each at which line of the library: `("wait", "answers.py:120 score")`.
    """

    def __init__(self, answers: Mapping[str, bool]) -> None:
        super().__init__()
        self.answers = answers
        self.places: Counter[tuple[str, str]] = Counter()
        self._shapes = _Shapes(allow_non_fake_inputs=True)

    @property
    def waits(self) -> int:
        return sum(n for (what, _), n in self.places.items() if what == "wait")

    @property
    def uploads(self) -> int:
        return sum(n for (what, _), n in self.places.items() if what == "upload")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type == "card"]
        if not fake and not wanted:
            return func(*args, **kwargs)
        # Tensors of inference mode bring operations whole that are made of others, copies among them. Attention stays
        # whole: its parts ask for a kernel.
        if func.namespace == "aten" and func is not aten.scaled_dot_product_attention.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "card":
            raise RuntimeError("a generator on the CPU draws for a tensor on the GPU")
        if func.overloadpacket in INDEXING and not isinstance(args[0], FakeTensor):
            raise RuntimeError("a tensor on the CPU is indexed by one on the GPU, or gets its values")
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._count("wait")
            return args[0]
        with self._shapes:
            result = func(*args, **kwargs)
        if func is aten._to_copy.default and fake and result.device.type == "cpu":
            self._count("wait")
            known = getattr(args[0], "uploaded", None)
            # Real from here on: what was copied up, or else ones, which are finite and a token of any model.
            return torch.ones(result.shape, dtype=result.dtype) if known is None else known.to(result.dtype)
        # A number that lies on the CPU as a tensor goes along with the operation; all else is copied up before.
        real = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        if func.overloadpacket in INDEXING:
            for _ in real:
                self._count("upload")
        elif func in (aten._to_copy.default, aten.copy_.default) and real:
            self._count("upload")
            if func is aten._to_copy.default and not real[0].is_floating_point():
                result.uploaded = real[0].clone()  # positions and lengths read back decide about shapes
        return result

    def _read(self, tensor: torch.Tensor) -> bool | int | float:
        where = self._count("wait")
        value = self.answers.get(where.rpartition(" ")[2], True)
        if tensor.dtype == torch.bool:
            return value
        return float(value) if tensor.is_floating_point() else int(value)

    def _count(self, what: str) -> str:
        frame = sys._getframe(1)
        while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        code = frame and frame.f_code
        place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}" if code else "elsewhere"
        self.places[what, place] += 1
        return place


def _tolist(tensor: torch.Tensor) -> list:
    """One copy, as on a card; a FakeTensor would read number by number."""
    return tensor.cpu().tolist()


class _Shapes(FakeTensorMode):
    avoid_device_init = True  # else constants would be copied to the device for real


class _AsTensor(TorchFunctionMode):
    """`as_tensor` makes a tensor of numbers on the CPU and copies it up, below every other mode."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.as_tensor and "device" in kwargs and not isinstance(args[0], torch.Tensor):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def fake_gpu(**answers: bool) -> Iterator[FakeGpu]:
    """A device "card" inside the block; `answers` is what a number reads as inside a function, by its name; else 1."""
    torch._C._set_only_lift_cpu_tensors(True)  # numbers become a tensor on the CPU first, and the copy up is seen
    try:
        with patch.object(FakeTensor, "tolist", _tolist), _AsTensor(), FakeGpu(answers) as gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def llama(
    device: str = "card",
    *,
    n_layers: int = 32,
    d_model: int = 4096,
    d_mlp: int = 11008,
    n_heads: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: Any = None,
) -> Any:
    """A Llama of any size without values, by default of the shape of Llama 2 7B."""
    from caa_lens.models.loading.llama_config import hooked_config
    from caa_lens.models.loading.weights import build_model, expected_shapes

    config = {
        "model_type": "llama",
        "vocab_size": 32000 if tokenizer is None else len(tokenizer),
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "max_position_embeddings": 4096,
    }
    cfg = hooked_config(config, dtype=dtype, device="cpu")
    cfg.device = device
    cfg.model_name = "shape-of-llama-2"
    shapes = expected_shapes(cfg)
    model = build_model(cfg, lambda name: torch.empty(shapes[name], dtype=dtype, device=device))
    model.tokenizer = tokenizer
    return model


def over_two_cards(model: Any) -> Any:
    """The upper half of a model's blocks, and what is behind them, on "card:1", as TransformerLens spreads them."""
    upper = model.blocks[model.cfg.n_layers // 2 :]
    for module in (*upper, model.ln_final, model.unembed):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                moved = torch.empty(parameter.shape, dtype=parameter.dtype, device="card:1")
                part._parameters[name] = torch.nn.Parameter(moved)
            for name, buffer in part._buffers.items():
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="card:1")
    model.cfg.n_devices = 2
    return model
