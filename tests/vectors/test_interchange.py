"""The front: any file is recognised by what is in it, and one set of vectors survives every format."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.vectors import random_set

from caa_lens.file_kinds import VectorFileError
from caa_lens.provenance import Provenance
from caa_lens.vectors.formats.lm_eval_files import AllPositionsWarning
from caa_lens.vectors.interchange import FORMATS, read_vectors, write_vectors
from caa_lens.vectors.steering_vectors import SteeringVectors

PLACES = {
    "safetensors": "v.safetensors",
    "caa": "sycophancy",
    "gguf": "v.gguf",
    "vllm-lens": "v.json",
    "lm-eval": "v.pt",
}


ABOUT = {"model": "Llama-2-7b-chat-hf", "behavior": "sycophancy", "method": "mean_difference", "n_pairs": 50}
some_vectors = partial(random_set, layers=(1, 7, 20), **ABOUT)


def written(vectors, folder, format):
    """A file or folder of that format; the ending says which, but for a `.pt`, which many tools write."""
    if format != "lm-eval":
        return write_vectors(vectors, folder / PLACES[format])
    with pytest.warns(AllPositionsWarning):
        return write_vectors(vectors, folder / PLACES[format], format)


def test_the_formats_are_those_of_this_file():
    assert set(FORMATS) == set(PLACES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("second", PLACES)
def test_vectors_that_went_through_any_two_formats_are_the_same_numbers_at_the_same_layers(
    tmp_path, first, second, dtype
):
    vectors = some_vectors(dtype=dtype)
    once = read_vectors(written(vectors, tmp_path / "1", first))
    twice = read_vectors(written(once, tmp_path / "2", second))
    assert twice.layers == vectors.layers
    assert torch.equal(twice.directions.float(), vectors.directions.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", PLACES)
def test_writing_then_reading_is_the_identity_in_what_the_format_can_hold(tmp_path, format, dtype):
    vectors = some_vectors(dtype=dtype)
    read = read_vectors(written(vectors, tmp_path, format))
    kept = {"safetensors": dtype, "vllm-lens": dtype, "lm-eval": dtype, "gguf": torch.float32}.get(format)
    if format == "caa":
        kept = dtype if dtype in (torch.float32, torch.float16) else torch.float32
    assert read.directions.dtype == kept
    assert torch.equal(read.directions, vectors.directions.to(kept))
    assert read.layers == vectors.layers


@pytest.mark.parametrize("format", ["safetensors", "caa", "gguf"])
def test_model_and_behavior_survive_where_the_format_has_room_for_them(tmp_path, format):
    read = read_vectors(written(some_vectors(), tmp_path, format))
    assert (read.provenance.model, read.behavior) == ("Llama-2-7b-chat-hf", "sycophancy")
    assert read[7].provenance.expression == "sycophancy[7]"


def test_a_foreign_vector_can_be_combined_with_one_of_ours(tmp_path):
    ours = some_vectors()
    theirs = read_vectors(write_vectors(ours, tmp_path / "v.gguf"))
    assert (ours[7] - theirs[7]).norm == 0
    saved = read_vectors(theirs.save(tmp_path / "again.safetensors"))
    assert "GGUF" in saved.provenance.details["source"]


@pytest.mark.parametrize("format", ["safetensors", "gguf", "vllm-lens", "lm-eval"])
@pytest.mark.parametrize("name", ["v", "v.pt", "v.bin", "vec_layer_3_m.pt", "vec_ep20_layer15.pt"])
def test_a_file_is_recognised_whatever_its_name(tmp_path, format, name):
    path = written(some_vectors(), tmp_path, format)
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
    with pytest.raises(
        ValueError, match="unknown format 'npz': expected one of safetensors, caa, gguf, vllm-lens, lm-eval"
    ):
        write_vectors(some_vectors(), tmp_path / "v.npz", "npz")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"hello", b"<html>", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("name", ["v", "v.bin", "v.safetensors", "v.gguf", "v.json", "vec_layer_1_x.pt"])
def test_a_file_that_is_nothing_known_is_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VectorFileError):
        read_vectors(tmp_path / name)


@pytest.mark.parametrize("format", PLACES)
def test_a_model_that_is_given_completes_the_files_own_and_never_contradicts_it(tmp_path, format):
    path = written(some_vectors(), tmp_path, format)
    full = read_vectors(path, model="meta-llama/Llama-2-7b-chat-hf")
    assert full.provenance.model == "meta-llama/Llama-2-7b-chat-hf"
    if format in ("vllm-lens", "lm-eval"):  # says no model
        assert read_vectors(path, model="gpt2").provenance.model == "gpt2"
    else:
        with pytest.raises(VectorFileError, match=r"of Llama-2-7b-chat-hf, not of gpt2|nothing of 'gpt2'"):
            read_vectors(path, model="gpt2")


@pytest.mark.parametrize("format", PLACES)
def test_layers_that_are_given_must_be_the_files_own(tmp_path, format):
    path = written(some_vectors(), tmp_path, format)
    assert read_vectors(path, layers=[20, 7, 1]).layers == (1, 7, 20)
    with pytest.raises(VectorFileError, match=r"says that its layers are 1, 7, 20, not 0-2: leave layers= out"):
        read_vectors(path, layers=range(3))


def test_a_pipe_or_a_device_is_told_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", "/dev/zero", "/dev/null"):
        with pytest.raises(VectorFileError, match="is a pipe, a socket or a device"):
            read_vectors(path)
    os.mkfifo(tmp_path / "vec_layer_3.pt")
    with pytest.raises(VectorFileError, match=r"vec_layer_3.pt is a pipe"):
        read_vectors(tmp_path)


def test_a_link_that_leads_nowhere_says_where_it_leads(tmp_path):
    (tmp_path / "v.pt").symlink_to("../blobs/12ab")
    with pytest.raises(FileNotFoundError, match=r"v.pt: it is a link to ../blobs/12ab, which is not there"):
        read_vectors(tmp_path / "v.pt")


def test_a_file_that_may_not_be_read_is_told_by_name(tmp_path, monkeypatch):
    path = write_vectors(some_vectors(), tmp_path / "v.gguf")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(VectorFileError, match=r"v.gguf cannot be read \(Permission denied\)"):
        read_vectors(path)


def test_a_name_with_a_tilde_that_is_nobodys_home_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_vectors(some_vectors(), tmp_path / "~nobody.gguf")
    assert read_vectors("~nobody.gguf").layers == (1, 7, 20)
    with pytest.raises(FileNotFoundError, match=r"nothing at ~somebody/v.gguf"):
        read_vectors("~somebody/v.gguf")


def test_endings_in_upper_case_are_endings(tmp_path):
    for name in ("V.SAFETENSORS", "V.GGUF", "V.JSON"):
        assert torch.equal(
            read_vectors(write_vectors(some_vectors(), tmp_path / name)).directions, some_vectors().directions
        )


def test_a_missing_path_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file or folder of steering vectors"):
        read_vectors(tmp_path / "nothing")
