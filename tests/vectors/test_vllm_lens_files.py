"""The JSON of vllm-lens: read and written field by field, and refused where adding one vector is not what it says."""

import base64
import builtins
import json
from functools import partial

import pytest
import torch
from helpers.vectors import random_set

from caa_lens.file_kinds import VectorFileError
from caa_lens.vectors.formats.vllm_lens_files import read_vllm_lens, write_vllm_lens

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


some_vectors = partial(random_set, layers=(0, 7, 20), behavior="x")


def payload(tmp_path):
    return json.loads(write_vllm_lens(some_vectors(), tmp_path / "good.json").read_text())


def plain_payload(tensor, layers, **fields):
    """The older form, without compression."""
    data = base64.b64encode(tensor.numpy().tobytes()).decode()
    wire = {"data": data, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    return {"activations": wire, "layer_indices": layers, **fields}


def read(tmp_path, content):
    path = tmp_path / "calm.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_vllm_lens(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_then_reading_is_exact_in_every_dtype(tmp_path, dtype):
    vectors = some_vectors(dtype=dtype)
    loaded = read_vllm_lens(write_vllm_lens(vectors, tmp_path / "calm.json"))
    assert loaded.directions.dtype == dtype
    assert torch.equal(loaded.directions, vectors.directions)
    assert (loaded.layers, loaded.behavior, loaded.provenance.model) == ((0, 7, 20), "calm", "unknown")


def test_8_bit_numbers_are_written_as_float32(tmp_path):
    vectors = some_vectors(dtype=torch.float8_e4m3fn)
    loaded = read_vllm_lens(write_vllm_lens(vectors, tmp_path / "v.json"))
    assert loaded.directions.dtype == torch.float32
    assert torch.equal(loaded.directions, vectors.directions.float())


def test_bfloat16_travels_as_int16(tmp_path):
    written = json.loads(write_vllm_lens(some_vectors(dtype=torch.bfloat16), tmp_path / "v.json").read_text())
    wire = written["activations"]
    assert (wire["dtype"], wire["original_dtype"], wire["shape"]) == ("int16", "torch.bfloat16", [3, 16])
    assert wire["compression"] == "zstd"


def test_the_scale_is_multiplied_in_and_rows_follow_their_layers(tmp_path):
    tensor = torch.arange(8.0).reshape(2, 4)
    vectors = read(tmp_path, plain_payload(tensor, [9, 4], scale=-0.5))
    assert vectors.layers == (4, 9)
    assert vectors.directions.tolist() == [[-2.0, -2.5, -3.0, -3.5], [0.0, -0.5, -1.0, -1.5]]


def test_positions_of_a_vector_for_all_positions_mean_nothing(tmp_path):
    vectors = read(tmp_path, plain_payload(torch.ones(1, 4), [4], position_indices=[3], norm_match=False))
    assert vectors.layers == (4,)


def change(**fields):
    return lambda good: {**good, **fields}


def change_tensor(**fields):
    return lambda good: {**good, "activations": {**good["activations"], **fields}}


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda _: [], "the file: Input should be an object"),
        (lambda _: "{", "the file: Invalid JSON"),
        (lambda good: {"layer_indices": good["layer_indices"]}, "activations: Field required"),
        (change(norm_match=True), "norm_match scales the vector at every token"),
        (change(layer_indices=[1, 2]), r"3 activations for layers \[1, 2\]"),
        (change(layer_indices=[1, 2, 2]), r"3 activations for layers \[1, 2, 2\], expected one for each, none twice"),
        (change(layer_indices=[1, 2, -1]), "layer_indices.2: Input should be greater than or equal to 0"),
        (change(scale=float("nan")), "scale: Input should be a finite number"),
        (change_tensor(shape=[3, 4, 4]), r"shape \[3, 4, 4\], expected \[layer, d_model\]: a vector a position"),
        (change_tensor(shape=[3, 15]), r"take 180 bytes, got 181"),
        (change_tensor(shape=[3, 17]), r"take 204 bytes, got 192"),
        (change_tensor(shape=[10**9, 10**9, 10**9]), "these are no steering vectors"),
        (change_tensor(shape=[2**20, 2**20]), r"take 4398046511104 bytes: these are no steering vectors"),
        (change_tensor(dtype="complex64"), "activations.dtype: Input should be 'float16'"),
        (change_tensor(dtype="int16", shape=[3, 32]), "expected int16 for bfloat16 only"),
        (change_tensor(original_dtype="torch.bfloat16"), "expected int16 for bfloat16 only"),
        (change_tensor(compression="lz4"), "activations.compression: Input should be 'zstd'"),
        (change_tensor(compression=None), r"take 192 bytes, got"),
        (change_tensor(data="%%%"), "calm.json: "),
        (change_tensor(data=base64.b64encode(b"no zstd frame").decode()), "activations are damaged"),
    ],
)
def test_what_cannot_be_kept_says_why(tmp_path, spoil, problem):
    with pytest.raises(VectorFileError, match=problem):
        read(tmp_path, spoil(payload(tmp_path)))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(VectorFileError, match="1 NaN or infinite"):
        read(tmp_path, plain_payload(torch.tensor([[1.0, float("inf")]]), [4]))


def test_compressed_data_cut_off_anywhere_is_refused(tmp_path):
    good = payload(tmp_path)
    whole = base64.b64decode(good["activations"]["data"])
    for length in range(len(whole)):
        cut = base64.b64encode(whole[:length]).decode()
        with pytest.raises(VectorFileError, match=r"damaged|take 192 bytes"):
            read(tmp_path, change_tensor(data=cut)(good))


def test_without_zstd_the_error_says_what_to_install_and_nothing_is_written(tmp_path, monkeypatch):
    path = write_vllm_lens(some_vectors(), tmp_path / "v.json")
    real = builtins.__import__

    def without_zstd(name, *args, **kwargs):
        if name in ("zstandard", "compression"):
            raise ModuleNotFoundError(name, name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_zstd)
    with pytest.raises(ImportError, match=r"caa-lens\[interop\]"):
        read_vllm_lens(path)
    with pytest.raises(ImportError, match=r"caa-lens\[interop\]"):
        write_vllm_lens(some_vectors(), tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == [path]
    assert read(tmp_path, plain_payload(torch.ones(1, 4), [4])).layers == (4,)  # the older form needs none


def test_a_byte_order_mark_does_not_matter(tmp_path):
    text = json.dumps(payload(tmp_path))
    (tmp_path / "calm.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert torch.equal(read_vllm_lens(tmp_path / "calm.json").directions, some_vectors().directions)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the JSON of a vllm-lens"):
        read_vllm_lens(tmp_path / "v.json")
