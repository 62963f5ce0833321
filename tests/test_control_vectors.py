"""GGUF control vectors: what llama.cpp asks of a file, and clear errors for files that are none."""

import gguf
import numpy as np
import pytest
import torch

from caa_lens.formats.control_vectors import DroppedLayerWarning, read_control_vector, write_control_vector
from caa_lens.provenance import Provenance
from caa_lens.storage import VectorFileError
from caa_lens.vectors import SteeringVectors


def some_vectors(*, layers=(1, 7, 20), dtype=torch.float32):
    directions = torch.randn(len(layers), 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    provenance = Provenance(model="HuggingFaceTB/SmolLM2", behavior="höflich", expression="2 * höflich")
    return SteeringVectors(directions=directions, layers=layers, provenance=provenance)


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
