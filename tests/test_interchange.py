"""The front: any file is recognised by what is in it, and one set of vectors survives every format."""

import pytest
import torch

from caa_lens.interchange import FORMATS, read_vectors, write_vectors
from caa_lens.provenance import Provenance
from caa_lens.storage import VectorFileError
from caa_lens.vectors import SteeringVectors

PLACES = {"safetensors": "v.safetensors", "caa": "sycophancy", "gguf": "v.gguf", "vllm-lens": "v.json"}


def some_vectors(*, layers=(1, 7, 20), dtype=torch.float32):
    directions = torch.randn(len(layers), 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    provenance = Provenance(model="Llama-2-7b-chat-hf", behavior="sycophancy", method="mean_difference", n_pairs=50)
    return SteeringVectors(directions=directions, layers=layers, provenance=provenance)


def test_the_formats_are_those_of_this_file():
    assert set(FORMATS) == set(PLACES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("second", PLACES)
def test_vectors_that_went_through_any_two_formats_are_the_same_numbers_at_the_same_layers(
    tmp_path, first, second, dtype
):
    vectors = some_vectors(dtype=dtype)
    once = read_vectors(write_vectors(vectors, tmp_path / "1" / PLACES[first]))
    twice = read_vectors(write_vectors(once, tmp_path / "2" / PLACES[second]))
    assert twice.layers == vectors.layers
    assert torch.equal(twice.directions.float(), vectors.directions.float())


@pytest.mark.parametrize("format", ["safetensors", "caa", "gguf"])
def test_model_and_behavior_survive_where_the_format_has_room_for_them(tmp_path, format):
    read = read_vectors(write_vectors(some_vectors(), tmp_path / PLACES[format]))
    assert (read.provenance.model, read.behavior) == ("Llama-2-7b-chat-hf", "sycophancy")
    assert read[7].provenance.expression == "sycophancy[7]"


def test_a_foreign_vector_can_be_combined_with_one_of_ours(tmp_path):
    ours = some_vectors()
    theirs = read_vectors(write_vectors(ours, tmp_path / "v.gguf"))
    assert (ours[7] - theirs[7]).norm == 0
    saved = read_vectors(theirs.save(tmp_path / "again.safetensors"))
    assert "GGUF" in saved.provenance.details["source"]


@pytest.mark.parametrize("format", ["safetensors", "gguf", "vllm-lens"])
@pytest.mark.parametrize("name", ["v", "v.pt", "v.bin"])
def test_a_file_is_recognised_whatever_its_name(tmp_path, format, name):
    path = write_vectors(some_vectors(), tmp_path / PLACES[format])
    path = path.rename(tmp_path / name)
    assert torch.equal(read_vectors(path).directions, some_vectors().directions)


def test_a_file_of_ours_is_recognised_whatever_the_length_of_its_header(tmp_path):
    lengths = set()
    for n in range(0, 256, 8):  # a file begins with that length, and old pickles with 0x80
        provenance = Provenance(model="m" * (1 + n))
        vectors = SteeringVectors(directions=torch.ones(1, 4), layers=(3,), provenance=provenance)
        file = vectors.save(tmp_path / f"{n}.safetensors")
        lengths.add(file.read_bytes()[0])
        assert read_vectors(file).provenance == provenance
    assert 0x80 in lengths


def test_one_file_of_a_caa_folder_and_one_model_of_several_can_be_read(tmp_path):
    write_vectors(some_vectors(), tmp_path / "sycophancy")
    for saved in list((tmp_path / "sycophancy").iterdir()):
        torch.save(torch.ones(20), saved.with_name(saved.name.replace("7b", "13b")))
    path = tmp_path / "sycophancy" / "vec_layer_7_Llama-2-7b-chat-hf.pt"
    assert torch.equal(read_vectors(path)[7].direction, some_vectors()[7].direction)
    with pytest.raises(VectorFileError, match=r"Llama-2-13b-chat-hf, Llama-2-7b-chat-hf: choose one with model="):
        read_vectors(tmp_path / "sycophancy")
    assert read_vectors(tmp_path / "sycophancy", model="Llama-2-7b-chat-hf").d_model == 16


def test_a_format_that_is_named_wins_over_the_ending(tmp_path):
    path = write_vectors(some_vectors(), tmp_path / "request.txt", "vllm-lens")
    assert path.read_text().startswith("{")
    folder = write_vectors(some_vectors(), tmp_path / "v1.2", "caa")
    assert folder.is_dir()
    assert read_vectors(folder).layers == (1, 7, 20)


def test_a_folder_that_exists_takes_caa_files_whatever_its_name(tmp_path):
    (tmp_path / "v1.2").mkdir()
    assert len(list(write_vectors(some_vectors(), tmp_path / "v1.2").iterdir())) == 3


@pytest.mark.parametrize("name", ["v.pt", "v.npz", "v.1"])
def test_a_format_that_cannot_be_guessed_is_asked_for(tmp_path, name):
    with pytest.raises(ValueError, match=f"the format of '{name}' cannot be guessed: end it in .safetensors"):
        write_vectors(some_vectors(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown format 'npz': expected one of safetensors, caa, gguf, vllm-lens"):
        write_vectors(some_vectors(), tmp_path / "v.npz", "npz")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"hello", b"<html>", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("name", ["v", "v.bin", "v.safetensors", "v.gguf", "v.json", "vec_layer_1_x.pt"])
def test_a_file_that_is_nothing_known_is_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VectorFileError):
        read_vectors(tmp_path / name)


def test_a_missing_path_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file or folder of steering vectors"):
        read_vectors(tmp_path / "nothing")
