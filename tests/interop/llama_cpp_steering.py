"""llama.cpp through ctypes: its own reader of control vector files, and log-probabilities with one applied.

`--control-vector-scaled FILE:SCALE` is `common_control_vector_load` followed by `llama_set_adapter_cvec`. The first is
a C++ function that Python's bindings leave out, though its library comes with them; it is called here with structures
laid out as GNU's C++ library has them, on Linux and x86-64.
"""

import ctypes
import platform
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from other_tools import needs

llama_cpp = needs("llama_cpp")
LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
FLOAT32 = 0  # of keys and values, which are float16 otherwise

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("llama.cpp's reader is called by the C++ conventions of x86-64 Linux", allow_module_level=True)


class _Vector(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("room", ctypes.c_void_p)]


class _Request(ctypes.Structure):  # common_control_vector_load_info: a float, and a string with its local buffer
    _fields_ = [
        ("strength", ctypes.c_float),
        ("name", ctypes.c_char_p),
        ("length", ctypes.c_size_t),
        ("local", ctypes.c_char * 16),
    ]


class _Loaded(ctypes.Structure):  # common_control_vector_data
    _fields_ = [("d_model", ctypes.c_int32), ("numbers", _Vector)]


def load_control_vector(path, strength=1.0):
    """Rows for layers 1, 2, ... as llama.cpp reads them from a file; None if it refuses the file."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parents[1] / "lib" / "libllama-common.so"))
    load = library[LOAD]
    load.argtypes, load.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    name = str(path).encode()
    request = _Request(strength, name, len(name), b"")
    start = ctypes.addressof(request)
    requests = _Vector(start, start + ctypes.sizeof(request), start + ctypes.sizeof(request))
    loaded = _Loaded()
    load(ctypes.addressof(loaded), ctypes.addressof(requests))  # a result of this kind returns through its address
    if loaded.d_model == -1:
        return None
    n_bytes = loaded.numbers.end - loaded.numbers.begin
    numbers = torch.frombuffer(bytearray(ctypes.string_at(loaded.numbers.begin, n_bytes)), dtype=torch.float32)
    return numbers.reshape(-1, loaded.d_model)


@contextmanager
def opened(path):
    """A `llama_cpp.Llama` on one thread with keys and values in float32."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=FLOAT32,
        type_v=FLOAT32,
        verbose=False,
    )
    try:
        yield model
    finally:
        model.close()


def log_probabilities_of(model, rows_of_tokens, control=None, layers=None):
    """Of the next token after each row, `[row d_vocab]`, with a control vector in all layers or in a range of them."""
    n_layers = llama_cpp.llama_model_n_layer(model.model)
    if control is None:
        done = llama_cpp.llama_set_adapter_cvec(model.ctx, None, 0, 0, 0, 0)
    else:
        # Up to the last layer, because layers beyond the data keep what an earlier call put there.
        rows = torch.zeros(n_layers - 1, control.shape[1])
        rows[: len(control)] = control
        data = (ctypes.c_float * rows.numel())(*rows.flatten().tolist())
        first, last = layers or (1, n_layers)  # what llama.cpp takes without --control-vector-layer-range
        done = llama_cpp.llama_set_adapter_cvec(model.ctx, data, len(data), control.shape[1], first, last)
    assert done == 0
    found = []
    for tokens in rows_of_tokens:
        model.reset()
        model.eval(list(map(int, tokens)))
        found.append(torch.from_numpy(model.scores[len(tokens) - 1].copy()).log_softmax(-1))
    return torch.stack(found)
