"""GGUF control vectors: what llama.cpp asks of a file, and clear errors for files that are none."""

from functools import partial

import gguf
import numpy as np
import pytest
import torch
from helpers.vectors import random_set

from caa_lens.file_kinds import VectorFileError
from caa_lens.vectors.formats.control_vectors import (
    DroppedLayerWarning,
    PassedOverWarning,
    read_control_vector,
    write_control_vector,
)
from caa_lens.vectors.formats.gguf_tensors import parse_gguf
from caa_lens.vectors.steering_vectors import SteeringVectors

ABOUT = {"model": "HuggingFaceTB/SmolLM2", "behavior": "höflich", "expression": "2 * höflich"}
some_vectors = partial(random_set, layers=(1, 7, 20), **ABOUT)


def made(path, tensors, *, architecture="controlvector", endianess=gguf.GGUFEndian.LITTLE, raw_dtype=None):
    """A file of any tensors, by GGUF's own writer."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    for name, numbers in tensors.items():
        writer.add_tensor(name, np.asarray(numbers), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_writing_then_reading_is_exact_and_keeps_model_and_behavior(tmp_path):
    vectors = some_vectors()
    read = read_control_vector(write_control_vector(vectors, tmp_path / "v.gguf"))
    assert torch.equal(read.directions, vectors.directions)
    assert read.layers == vectors.layers
    assert (read.behavior, read.provenance.model) == ("höflich", "HuggingFaceTB/SmolLM2")


def test_the_file_is_what_llama_cpp_and_repeng_look_for(tmp_path):
    vectors = some_vectors()
    reader = gguf.GGUFReader(write_control_vector(vectors, tmp_path / "v.gguf", model_hint="qwen2"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "qwen2"
    assert fields["controlvector.layer_count"] == 3
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.7", "direction.20"]
    for tensor, layer in zip(reader.tensors, vectors.layers, strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [16]
        assert np.array_equal(tensor.data, vectors[layer].direction.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_dtype_is_written_as_float32(tmp_path, dtype):
    vectors = some_vectors(dtype=dtype)
    read = read_control_vector(write_control_vector(vectors, tmp_path / "v.gguf"))
    assert torch.equal(read.directions, vectors.directions.float())


def test_equal_vectors_make_equal_files(tmp_path):
    one = write_control_vector(some_vectors(), tmp_path / "one.gguf").read_bytes()
    assert one == write_control_vector(some_vectors(), tmp_path / "two.gguf").read_bytes()


def test_layer_0_is_dropped_with_a_warning_and_alone_refused(tmp_path):
    with pytest.warns(DroppedLayerWarning, match=r"v.gguf is written without layer 0: llama.cpp"):
        path = write_control_vector(some_vectors(layers=(0, 7, 20)), tmp_path / "v.gguf")
    assert read_control_vector(path).layers == (7, 20)
    with pytest.raises(ValueError, match=r"start at layer 1, got layers \(0,\)"):
        write_control_vector(some_vectors(layers=(0,)), tmp_path / "zero.gguf")
    assert not (tmp_path / "zero.gguf").exists()


def test_a_number_beyond_float32_is_refused_and_leaves_the_old_file(tmp_path):
    path = write_control_vector(some_vectors(), tmp_path / "v.gguf")
    before = path.read_bytes()
    vast = SteeringVectors(directions=torch.full((1, 4), 1e200, dtype=torch.float64), layers=(3,))
    with pytest.raises(ValueError, match=r"float32|infinite components"):
        write_control_vector(vast, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_without_metadata_is_named_after_itself(tmp_path):
    path = made(tmp_path / "calm.gguf", {"direction.3": np.ones(4, np.float32)})
    vectors = read_control_vector(path)
    assert (vectors.behavior, vectors.provenance.model, vectors.layers) == ("calm", "unknown", (3,))


def test_other_tensors_beside_the_directions_are_named_and_left_out(tmp_path):
    tensors = {
        "mean": np.ones((3, 4), np.float32),
        "direction.3": np.arange(4, dtype=np.float32),
        "token_embd.weight": np.ones(4, np.int32),
        "direction.11": np.ones(4, np.float32),
    }
    path = made(tmp_path / "calm.gguf", tensors)
    with pytest.warns(PassedOverWarning, match=r"calm.gguf holds other tensors .*passed over: mean, token_embd.weight"):
        vectors = read_control_vector(path)
    assert vectors.layers == (3, 11)
    assert vectors[3].direction.tolist() == [0, 1, 2, 3]
    assert "passed over: mean, token_embd.weight" in vectors.provenance.details["source"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_directions_of_every_unquantised_type_are_read_as_they_are(tmp_path, dtype):
    numbers = torch.randn(16, generator=torch.Generator().manual_seed(3)).to(dtype)
    options = {}
    array = numbers.view(torch.uint8).numpy() if dtype == torch.bfloat16 else numbers.numpy()
    if dtype == torch.bfloat16:
        options = {"raw_dtype": gguf.GGMLQuantizationType.BF16}
    read = read_control_vector(made(tmp_path / "v.gguf", {"direction.1": array}, **options))
    assert read.directions.dtype == dtype
    assert torch.equal(read[1].direction, numbers)


def test_our_reader_finds_what_the_packages_own_finds(tmp_path):
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_custom_alignment(64)
    writer.add_bool("a.bool", True)
    writer.add_float64("a.float", 2.5)
    writer.add_array("some.texts", ["é", "日本"])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_string("controlvector.model_hint", "qwen2")
    for name, shape in (("direction.1", (5,)), ("mean", (3, 7)), ("direction.2", (5,))):
        writer.add_tensor(name, np.random.default_rng(0).normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = parse_gguf(path.read_bytes()), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].start == tensor.data_offset
        assert np.array_equal(ours.numbers(tensor.name).numpy(), tensor.data)
    texts = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.texts == {key: value for key, value in texts.items() if isinstance(value, str)}


@pytest.mark.parametrize("count", [2**20, 2**40, 2**60, 2**64 - 1])
@pytest.mark.parametrize("kind", [0, 8, 9, 12], ids=["bytes", "texts", "arrays", "doubles"])
def test_an_array_that_claims_more_than_the_file_has_is_refused_at_once(tmp_path, count, kind):
    key = (1).to_bytes(8, "little") + b"a"
    array = (9).to_bytes(4, "little") + kind.to_bytes(4, "little") + count.to_bytes(8, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "v.gguf").write_bytes(head + key + array + bytes(100))
    with pytest.raises(VectorFileError, match=r"v.gguf is damaged or no GGUF file"):
        read_control_vector(tmp_path / "v.gguf")


@pytest.mark.parametrize("counts", [(2**60, 0), (0, 2**60), (2**64 - 1, 2**64 - 1)])
def test_a_header_that_claims_more_tensors_or_keys_than_the_file_has_is_refused_at_once(tmp_path, counts):
    head = b"GGUF" + (3).to_bytes(4, "little") + b"".join(count.to_bytes(8, "little") for count in counts)
    (tmp_path / "v.gguf").write_bytes(head + bytes(50))
    with pytest.raises(VectorFileError, match="is damaged"):
        read_control_vector(tmp_path / "v.gguf")


def test_big_endian_files_are_refused(tmp_path):
    path = made(tmp_path / "v.gguf", {"direction.1": np.ones(4, np.float32)}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(VectorFileError, match="big endian, expected little endian"):
        read_control_vector(path)


@pytest.mark.parametrize(
    ("tensors", "options", "problem"),
    [
        (
            {"direction.1": np.ones(4, np.float32)},
            {"architecture": "llama"},
            "holds a 'llama' with 1 tensors, expected 'controlv",
        ),
        ({}, {}, "holds no directions, but no tensors"),
        ({"direction.x": np.ones(4, np.float32)}, {}, r"a tensor 'direction.x', expected direction.1"),
        ({"direction.-1": np.ones(4, np.float32)}, {}, r"a tensor 'direction.-1'"),
        ({"blk.0.weight": np.ones(4, np.float32)}, {}, "holds no directions, but blk.0.weight: expected direction.1"),
        ({"direction.1": np.ones((2, 4), np.float32)}, {}, r"direction.1 of shape \[2, 4\], expected one dimension"),
        ({"direction.1": np.ones(4, np.int32)}, {}, "type I32, expected F32, F16, BF16 or F64"),
        (
            {"direction.1": np.ones(34, np.uint8)},
            {"raw_dtype": gguf.GGMLQuantizationType.Q8_0},
            "direction.1 has type Q8_0, expected F32, F16, BF16 or F64: write it again unquantised",
        ),
        ({"direction.1": np.array([1, np.inf], np.float32)}, {}, "direction.1: .* 1 NaN or infinite components"),
        (
            {"direction.1": np.ones(4, np.float32), "direction.2": np.ones(5, np.float32)},
            {},
            "d_model=4 and d_model=5",
        ),
    ],
)
def test_files_that_are_no_control_vectors_say_why(tmp_path, tensors, options, problem):
    with pytest.raises(VectorFileError, match=problem):
        read_control_vector(made(tmp_path / "v.gguf", tensors, **options))


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = write_control_vector(some_vectors(), tmp_path / "v.gguf")
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 5), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(VectorFileError, match=r"damaged|holds"):
            read_control_vector(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a GGUF control vector"):
        read_control_vector(tmp_path / "v.gguf")
