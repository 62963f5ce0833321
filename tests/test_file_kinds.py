"""A file of the wrong kind is told what it is, with what helps; a folder, what it holds."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from caa_lens import file_kinds as kinds
from caa_lens.file_kinds import VectorFileError, what_is
from caa_lens.vectors.interchange import read_vectors
from caa_lens.vectors.steering_vectors import SteeringVectors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Page not found \xc2\xb7 GitHub</title></head><body>404</body></html>"
NAMES = ["vec_layer_13_m.pt", "vec_layer_13.pt", "v.pt", "v.npy", "v.npz", "v.gguf", "v.safetensors", "v.json", "v"]


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("v.pt"))
    return file.getvalue()


def text(value):
    return json.dumps(value).encode()


WRONG = {
    "empty": (b"", "is empty, cut off or damaged when it was written or downloaded: get it again"),
    "zeros": (bytes(5000), "5000 zero bytes, damaged when it was written"),
    "lfs": (POINTER, "a git-lfs pointer, .*in the place of a file that was not downloaded: run `git lfs pull`"),
    "html": (PAGE, "an HTML page called 'Page not found · GitHub', saved in the place of a file: download"),
    "html in capitals": (b"\xef\xbb\xbf\n <HTML><BODY>404", "an HTML page, saved in the place"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an HTML page"),
    "words of the hub": (b"Entry not found", "text that begins with 'Entry not found'"),
    "words of a site": (b"404: Not Found", "text that begins with '404: Not Found'"),
    "csv": (b"layer,x,y\n13,0.5,0.25\n", r"text that begins with 'layer,x,y\\n13,0.5,0.25'"),
    "gzip": (gzip.compress(POINTER), "packed by gzip: unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "packed by zstd: unpack it first"),
    "tar": (tarred(), "a tar archive: unpack it first"),
    "zip": (
        zipped(vec_layer_3__pt=b"x", a__txt=b"y"),
        r"a zip archive of 2 files \(vec_layer_3.pt, a.txt\): unpack it",
    ),
    "empty zip": (zipped(), "a zip archive of 0 files"),
    "cut zip": (zipped(a=b"x" * 100)[:60], "a damaged zip archive .*get it again"),
    "docx": (zipped(**{"[Content_Types]__xml": b"x"}), "an Office document"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "a picture \\(PNG\\)"),
    "pdf": (b"%PDF-1.7", "a PDF"),
    "parquet": (b"PAR1" + bytes(30), "a parquet table"),
    "hdf5": (b"\x89HDF\r\n", "an HDF5 file"),
    "utf-16": ("\ufeff{}".encode("utf-16-le"), "text in UTF-16: save it as UTF-8"),
    "noise": (bytes(range(200, 250)), "of a kind that is not known here: it begins with the bytes c8 c9 ca"),
    "pairs": (text([{"question": "q", "positive": "x", "negative": "y"}]), "contrast pairs, .*with ContrastSet.load"),
    "lines": (b'{"question": "q"}\n{"question": "r"}\n', "contrast pairs, .*with ContrastSet.load"),
    "config": (text({"model_type": "llama", "hidden_size": 8}), "a model's configuration or weights: .*load_model"),
    "index": (text({"weight_map": {"a": "b"}}), "a model's configuration or weights: .*load_model"),
    "other json": (text({"vector": [1.0], "layer": 3}), "JSON with the keys vector, layer, expected activations and"),
    "numbers": (text([[1.0, 2.0]]), "JSON, a list of 1 and no object of vllm-lens"),
    "cut json": (b'{"vector": [1.0, 2', "damaged JSON, cut off"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_wrong_kind_is_told_what_it_is_whatever_its_name(tmp_path, what, name):
    data, words = WRONG[what]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VectorFileError, match=rf"{name} is (a file of )?.*{words.removeprefix('is ')}") as told:
        read_vectors(tmp_path / name)
    assert "rename" not in str(told.value)


@pytest.mark.parametrize("name", ["v.safetensors", "model.bin"])
def test_a_models_weights_are_told_and_what_loads_them(tmp_path, name):
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(6)]
    path = tmp_path / name
    tensors = dict.fromkeys(names, torch.ones(4, 4))
    if name.endswith("bin"):
        torch.save(tensors, path)
    else:
        save_file({key: value.clone() for key, value in tensors.items()}, path)
    with pytest.raises(
        VectorFileError,
        match=rf"{name} .*holds a model's weights, .*{names[0]}.* and 2 more.*load_model|load_model.*{names[0]}",
    ):
        read_vectors(path)


def test_another_tools_safetensors_names_its_tensors(tmp_path):
    save_file({"layer_3": torch.ones(4), "layer_5": torch.ones(4)}, tmp_path / "v.safetensors")
    with pytest.raises(
        VectorFileError, match=r"not written by this library: it holds another tool's tensors, 2 of them, "
    ):
        read_vectors(tmp_path / "v.safetensors")


def test_a_pickle_of_an_object_names_its_class(tmp_path):
    (tmp_path / "v.pt").write_bytes(pickle.dumps(np.float64(3), protocol=2))
    with pytest.raises(VectorFileError, match=r"a pickle of objects, .*numpy.*save their tensors alone"):
        read_vectors(tmp_path / "v.pt")


def test_a_file_larger_than_any_vectors_is_told_without_reading_it(tmp_path):
    for name, start, words in [
        ("a.gguf", b"GGUF", "a GGUF file; a model is loaded with load_model"),
        ("b.bin", b"PK\x03\x04", "maybe of a model's weights in PyTorch's format; a model is loaded"),
        ("c.mp4", b"\0\0\0 ftypisom", "of a kind that is not known here"),
    ]:
        with (tmp_path / name).open("wb") as file:  # sparse: it takes no room
            file.write(start)
            file.truncate(kinds.MAX_BYTES + 1)
        with pytest.raises(VectorFileError, match=words):
            read_vectors(tmp_path / name)


def test_a_folder_of_something_else_says_what_it_holds(tmp_path):
    with pytest.raises(VectorFileError, match="holds nothing; expected files called vec_layer_"):
        read_vectors(tmp_path)
    for name in ("config.json", "layer_10.pt", "layer_11.pt", "README.md", "z.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "refusal").mkdir()
    (tmp_path / "refusal" / "vec_layer_3.pt").write_bytes(b"x")
    with pytest.raises(
        VectorFileError,
        match=r"holds 5 files and 1 folder: README.md, config.json, layer_10.pt, layer_11.pt and 2 more; expected "
        r"files called vec_layer_\{layer\}_\{model\}.pt or vec_layer_\{layer\}.pt; choose one of the folders in it",
    ):
        read_vectors(tmp_path)


def test_names_in_a_message_hold_no_codes_for_the_terminal(tmp_path):
    (tmp_path / "\x1b[2Jgone").write_bytes(b"x")
    with pytest.raises(VectorFileError, match=r"holds 1 file: \\x1b\[2Jgone"):
        read_vectors(tmp_path)


def test_good_files_are_told_apart_from_their_first_bytes_alone(tmp_path):
    vectors = SteeringVectors(directions=torch.ones(2, 4), layers=(1, 3))
    np.save(tmp_path / "v.npy", np.ones(3))
    np.savez(tmp_path / "v.npz", a=np.ones(3))
    torch.save(torch.ones(3), tmp_path / "v.pt")
    vectors.save(tmp_path / "v.safetensors")
    for kind in ("npy", "npz", "safetensors"):
        assert what_is((tmp_path / f"v.{kind}").read_bytes())[0] == kind
    assert what_is((tmp_path / "v.pt").read_bytes())[0] == "torch"


def test_text_that_begins_with_blanks_is_no_safetensors_file():
    assert what_is(b" " * 8 + b'{"activations": 1}')[0] == "json"
