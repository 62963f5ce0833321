"""A GPU for machines that have none: shapes, dtypes and devices are real, values are not.

    with fake_gpu(memory=80 * 10**9) as gpu:
        model = llama(n_layers=32, d_model=4096)
        cl.extract(model, pairs)
    gpu.waits, gpu.uploads, gpu.places, gpu.peak()

A tensor on "cuda" is one of torch's FakeTensors and takes no memory, so a 70B Llama fits on any machine. Tensors on the
CPU stay real. There are two cards, "cuda:0" and "cuda:1". An operation whose tensors lie on two devices raises as on a
card, and so do a CPU generator for a tensor on the GPU, and a CPU tensor indexed by one on the GPU.

Counted is what keeps a program from running ahead of its card: a *wait* is a number read (`float()`, `bool()`,
`.item()`) or a tensor copied down, an *upload* is a tensor copied up. What has a size that depends on values
(`nonzero`, a boolean mask as index) waits too, but has no size here: it raises.

Memory is counted from the tensors' storages, as they are made and die: `torch.cuda.mem_get_info` says what is left of
`memory`, and what asks for more gets `torch.OutOfMemoryError`. The allocator's own pieces and a kernel's workspace are
not seen.

Time is not measured: counts, bytes and devices are all that can be learnt here. Torch's engine for backward passes does
not know a card that is not there: what trains lies on "card" instead, a device registered from Python, which is all the
same here, but for the name.
"""

import ctypes
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensor, FakeTensorMode, fake_impls, fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

TORCH = ("2.13",)
"""The versions of torch that this was written for: it stands on parts of torch that are no public interface."""

aten = torch.ops.aten
PACKAGE = str(Path(__file__).resolve().parents[2] / "caa_lens") + "/"
INDEXING = (aten.index, aten.index_put, aten.index_put_)
MASKS = (torch.bool, torch.uint8)
PLAIN = (  # where sizes are numbers
    *(aten.view.default, aten._unsafe_view.default, aten.select.int, aten.slice.Tensor),
    *(aten.index.Tensor, aten.copy_.default, aten.embedding.default),
)
CARDS = ("cuda", "card")
WHOLE = (aten.scaled_dot_product_attention.default,)  # its parts ask for a kernel
GB = 10**9


def why_not() -> str | None:
    """Why there can be no fake GPU here, as a reason to skip; None if there can."""
    if torch.__version__.split("+")[0].rpartition(".")[0] not in TORCH:
        return f"the fake GPU is for torch {' and '.join(TORCH)}, this is {torch.__version__}"
    if torch.version.cuda is not None:
        return f"the fake GPU stands in the place of CUDA, which this torch has: {torch.__version__}"
    return None


def _guard_cuda() -> None:
    """Let a guard that does nothing stand for CUDA's, which torch asks for when it indexes a tensor or reads a number.

    Torch does this itself where it was built for CUDA and its guard finds no card. A CPU build has no guard to find
    none, so another one that knows no card (that of lazy tensors) is put in its place first.
    """
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    guards = (ctypes.c_void_p * 24).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    cuda, lazy = (int(getattr(torch._C._autograd.DeviceType, name).value) for name in ("CUDA", "Lazy"))
    if guards[cuda] is None:
        guards[cuda] = guards[lazy]
        torch._C._ensureCUDADeviceGuardSet()
        assert guards[cuda] != guards[lazy]


if why_not() is None:
    _setup_privateuseone_for_python_backend("card")
    _guard_cuda()


class FakeGpu(TorchDispatchMode):
    """What sees every operation while the GPU is there.

    Attributes:
        waits, uploads: how many.
        places: how many of each at which line of the library: `("wait", "answers.py:120 score")`.
        emptied: how often the allocator was asked to return what it does not use.
    """

    def __init__(self, answers: Mapping[str, bool], memory: float, spread: float) -> None:
        super().__init__()
        self.answers = answers
        self.memory = memory
        self.emptied = 0
        self._spread = spread
        self._draw = torch.Generator().manual_seed(0)
        self.places: Counter[tuple[str, str]] = Counter()
        self._shapes = _Shapes(allow_non_fake_inputs=True)

    @property
    def waits(self) -> int:
        return sum(n for (what, _), n in self.places.items() if what == "wait")

    @property
    def uploads(self) -> int:
        return sum(n for (what, _), n in self.places.items() if what == "upload")

    def now(self, device: Any = 0) -> int:
        """Bytes that lie on a card."""
        return HELD.now[_index(device)]

    def peak(self, device: Any = 0) -> int:
        """The most bytes that lay on a card at once, since the block began or `forget_peak`."""
        return HELD.peak[_index(device)]

    def forget_peak(self) -> None:
        HELD.peak = HELD.now.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        fake, real, wanted = [], [], False
        stack = [*args, *kwargs.values()]
        while stack:
            leaf = stack.pop()
            if isinstance(leaf, FakeTensor):
                fake.append(leaf)
            elif isinstance(leaf, torch.Tensor):
                real.append(leaf)
            elif isinstance(leaf, torch.device):
                wanted = wanted or leaf.type in CARDS
            elif isinstance(leaf, list | tuple):
                stack.extend(leaf)
        if not fake and not wanted:
            return func(*args, **kwargs)
        # Tensors of inference mode bring operations whole that are made of others, copies among them.
        if func not in WHOLE and _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        if func._schema.is_mutable and isinstance(args[0], FakeTensor):
            HELD.written.add(args[0].untyped_storage()._cdata)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type not in CARDS:
            raise RuntimeError("a generator on the CPU draws for a tensor on the GPU")
        if func.overloadpacket in INDEXING and not isinstance(args[0], FakeTensor):
            raise RuntimeError("a tensor on the CPU is indexed by one on the GPU, or gets its values")
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._count("wait")
            return args[0].copy_(self._real(args[0]))
        if func is aten.masked_select.default or func is aten.nonzero.default:
            raise RuntimeError("a size that depends on values: the program waits for the GPU to know it")
        if real or wanted or (result := self._quickly(func, args, kwargs, fake)) is NotImplemented:
            with self._shapes:
                result = func(*args, **kwargs)
        if not real and not wanted and (known := _known(func, args, kwargs, fake)) is not None:
            several = isinstance(result, list | tuple)
            for one, value in zip(result if several else [result], known if several else [known], strict=True):
                one.uploaded = value
        if func is aten._to_copy.default and fake and result.device.type == "cpu":
            self._count("wait")
            known = _value(args[0])
            return self._real(result) if known is None else known.to(result.dtype)
        for one in result if isinstance(result, list | tuple) else (result,):
            if isinstance(one, FakeTensor):
                HELD.hold(one, self.memory)
        # A number that lies on the CPU as a tensor goes along with the operation; all else is copied up before.
        if func.overloadpacket in INDEXING:
            for _ in real:
                self._count("upload")
        elif func in (aten._to_copy.default, aten.copy_.default) and real:
            self._count("upload")
            if func is aten._to_copy.default and not real[0].is_floating_point():
                result.uploaded = real[0].clone()  # positions and lengths read back decide about shapes
        return result

    def _real(self, fake: torch.Tensor) -> torch.Tensor:
        """Numbers from here on, see `fake_gpu`."""
        if fake.is_floating_point():
            return (1 + self._spread * (2 * torch.rand(fake.shape, generator=self._draw) - 1)).to(fake.dtype)
        return torch.ones(fake.shape, dtype=fake.dtype)

    def _quickly(self, func: Any, args: tuple, kwargs: dict, fake: list[FakeTensor]) -> Any:
        """What `FakeTensorMode` does with most operations, in a tenth of its time: run the kernel for shapes alone."""
        device = fake[0].fake_device
        if not _is_quick(func) or any(tensor.fake_device != device for tensor in fake):
            return NotImplemented
        if func.overloadpacket in INDEXING and any(tensor.dtype in MASKS for tensor in fake[1:]):
            return NotImplemented  # its size depends on values
        if func in WHOLE:  # a fused kernel's output, and where it puts what
            query, value = args[0], args[2]
            out = query.transpose(1, 2).new_empty(*query.transpose(1, 2).shape[:-1], value.shape[-1])
            return out.transpose(1, 2)
        try:
            with fake_tensor.in_kernel_invocation_manager(self._shapes):
                result = func(*args, **kwargs)
        except NotImplementedError:
            _quick[func] = False
            return NotImplemented
        except RuntimeError:  # said again by `FakeTensorMode`, in its own words, or it knows better
            return NotImplemented
        if isinstance(result, list | tuple):
            return type(result)(map(self._on(device), result))
        return self._on(device)(result)

    def _on(self, device: torch.device) -> Callable[[Any], Any]:
        def on(result: Any) -> Any:
            if isinstance(result, FakeTensor) or not isinstance(result, torch.Tensor):
                return result
            return FakeTensor(self._shapes, result, device)

        return on

    def _read(self, tensor: torch.Tensor) -> bool | int | float:
        where = self._count("wait")
        if (known := _value(tensor)) is not None:
            return known.item()
        value = self.answers.get(where.rpartition(" ")[2], True)
        if tensor.dtype == torch.bool:
            return value
        return float(value) if tensor.is_floating_point() else int(value)

    def _count(self, what: str) -> str:
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        code = frame and frame.f_code
        place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}" if code else "elsewhere"
        self.places[what, place] += 1
        return place


class _Held:
    """Bytes of the storages that are alive on each card, whichever block they were made in."""

    def __init__(self) -> None:
        self.now: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()
        self.written: set[int] = set()  # those of what went up that were written into
        self._alive: dict[int, weakref.ref] = {}

    def hold(self, tensor: FakeTensor, memory: float) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or (device := tensor.device).type not in CARDS:
            return
        self.written.discard(key)  # of another storage, which lay at this address
        size, card = storage.nbytes(), device.index or 0
        if self.now[card] + size > memory:
            raise torch.OutOfMemoryError(
                f"{size / GB:.2f} GB asked of {device}, which has {memory / GB:.2f}, {self.now[card] / GB:.2f} in use"
            )

        def forget(_: Any) -> None:
            del self._alive[key]
            self.written.discard(key)
            self.now[card] -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now[card] += size
        self.peak[card] = max(self.peak[card], self.now[card])


HELD = _Held()


def _index(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device or 0).index or 0


_quick: dict[Any, bool] = {}
_composites: dict[Any, bool] = {}


def _value(tensor: FakeTensor) -> torch.Tensor | None:
    """What is known of a tensor on a card: what went up, if nothing was written into it since."""
    known = getattr(tensor, "uploaded", None)
    return None if known is None or tensor.untyped_storage()._cdata in HELD.written else known


def _known(func: Any, args: tuple, kwargs: dict, fake: list[FakeTensor]) -> Any:
    """What positions, lengths and tokens become that went up and are known: they decide about shapes."""
    if func._schema.is_mutable or any(_value(tensor) is None for tensor in fake):
        return None
    with torch._C._DisableTorchDispatch():
        values = tree_map(lambda leaf: getattr(leaf, "uploaded", leaf), (args, kwargs))
        return func(*values[0], **values[1])


def _is_quick(func: Any) -> bool:
    """Whether an operation has a kernel for shapes, and nothing that `FakeTensorMode` does otherwise for it."""
    if func not in _quick:
        keys = torch._C.DispatchKey
        tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}
        own = func in fake_impls.op_implementations_dict or any(
            check(func) for check, _ in fake_impls.op_implementations_checks
        )
        _quick[func] = func in (*PLAIN, *WHOLE) or (
            func.namespace == "aten"
            and not own
            and not tags & set(func.tags)
            and any(
                torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
                for key in (keys.Meta, keys.CompositeExplicitAutograd)
            )
        )
    return _quick[func]


def _is_composite(func: Any) -> bool:
    """Whether an operation is nothing but others."""
    if func not in _composites:
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        _composites[func] = func.namespace == "aten" and (
            torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) or key in func.py_kernels
        )
    return _composites[func]


def _type(value: Any) -> type:
    return torch.Tensor if isinstance(value, FakeTensor) else type(value)


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
def fake_gpu(*, memory: float = 1000 * GB, spread: float = 0.5, **answers: bool) -> Iterator[FakeGpu]:
    """Two cards inside the block.

    Args:
        memory: bytes of each card.
        spread: what tensors of numbers come down as: anything between 1 - spread and 1 + spread. Whole numbers come
            down as what they were when they were copied up, or else as ones, which are a token of any model.
        answers: what a number reads as inside a function, by its name; else 1.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    import transformer_lens  # libraries that it imports look for CUDA's own functions where there is a card

    from helpers.models import kinds_here

    torch._C._set_only_lift_cpu_tensors(True)  # numbers become a tensor on the CPU first, and the copy up is seen
    gpu = FakeGpu(answers, memory, spread)
    gpu.forget_peak()
    try:
        with ExitStack() as stack:
            for place, name, value in _torch_cuda(gpu):
                stack.enter_context(patch.object(place, name, value))
            if "hooked" in kinds_here():
                # It asks whether what it is given is a tensor, and not a kind of tensor.
                module = sys.modules[transformer_lens.HookedTransformer.__module__]
                stack.enter_context(patch.object(module, "type", _type, create=True))
            stack.enter_context(_AsTensor())
            stack.enter_context(gpu)
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def _torch_cuda(gpu: FakeGpu) -> list[tuple[Any, str, Any]]:
    """What of torch stands in for what a card would say."""

    def emptied() -> None:
        gpu.emptied += 1

    said = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=0: (int(gpu.memory - gpu.now(device)), int(gpu.memory)),
        "memory_allocated": lambda device=0: gpu.now(device),
        "memory_reserved": lambda device=0: gpu.now(device),
        "max_memory_allocated": lambda device=0: gpu.peak(device),
        "reset_peak_memory_stats": lambda device=0: gpu.forget_peak(),
        "synchronize": lambda device=0: gpu._count("wait") and None,
        "empty_cache": emptied,
    }
    return [
        (FakeTensor, "tolist", _tolist),
        (fake_tensor, "init_gpu_context", lambda device: None),
        *((torch.cuda, name, value) for name, value in said.items()),
    ]


SHAPES = {
    "7B": {"n_layers": 32, "d_model": 4096, "d_mlp": 11008, "n_heads": 32},
    "13B": {"n_layers": 40, "d_model": 5120, "d_mlp": 13824, "n_heads": 40},
    "70B": {"n_layers": 80, "d_model": 8192, "d_mlp": 28672, "n_heads": 64, "n_kv_heads": 8},
}
"""Of Llama 2, as the published `config.json` have them; the vocabulary is of 32000 tokens."""


def llama(
    device: str = "cuda",
    *,
    n_layers: int = 32,
    d_model: int = 4096,
    d_mlp: int = 11008,
    n_heads: int = 32,
    n_kv_heads: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: Any = None,
    d_vocab: int = 32000,
) -> Any:
    """A Llama of any size without values, by default of the shape of Llama 2 7B.

    A tokenizer that has more tokens than the vocabulary makes it larger.
    """
    from caa_lens.models.loading.llama_config import hooked_config
    from caa_lens.models.loading.weights import build_model, expected_shapes

    config = {
        "model_type": "llama",
        "vocab_size": d_vocab if tokenizer is None else max(d_vocab, len(tokenizer)),
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads or n_heads,
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
    """The upper half of a model's blocks, and what is behind them, on the second card, as TransformerLens does it."""
    upper = model.blocks[model.cfg.n_layers // 2 :]
    second = f"{model.W_E.device.type}:1"
    for module in (*upper, model.ln_final, model.unembed):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                moved = torch.empty(parameter.shape, dtype=parameter.dtype, device=second)
                part._parameters[name] = torch.nn.Parameter(moved)
            for name, buffer in part._buffers.items():
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=second)
    model.cfg.n_devices = 2
    return model
