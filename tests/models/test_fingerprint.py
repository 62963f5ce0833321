"""A model's fingerprint is of its contents: another name changes nothing, one other number anywhere changes it."""

import os
import shutil

import pytest
import torch
from helpers.models import random_llama, write_gguf
from safetensors.torch import load_file, save_file

from caa_lens.models.loading import fingerprint
from caa_lens.models.loading.fingerprint import model_files, model_fingerprint


@pytest.fixture
def folder(tmp_path):
    random_llama(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").write_bytes(b"pieces")
    return tmp_path / "llama"


def test_the_same_files_under_another_name_are_the_same_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "snapshots" / "0123abc")
    (copy / "README.md").write_text("not read")
    assert model_fingerprint(folder) == model_fingerprint(str(copy))


def test_one_weight_in_a_file_of_the_same_size_and_date_is_another_model(folder):
    before, weights = model_fingerprint(folder), folder / "model.safetensors"
    about = weights.stat()
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    assert model_fingerprint(folder) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json"])
def test_what_is_read_beside_the_weights_counts(folder, name):
    before = model_fingerprint(folder)
    with (folder / name).open("a") as file:
        file.write("\n")
    assert model_fingerprint(folder) != before


def test_files_that_loading_does_not_read_do_not_count(folder):
    before = model_fingerprint(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"left from before the shards were joined")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    assert model_fingerprint(folder) == before


def test_shards_count_each(tmp_path):
    random_llama(tmp_path / "llama", shard="20KB")
    files = [file.name for file in model_files(tmp_path / "llama")]
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in files
    before = model_fingerprint(tmp_path / "llama")
    tensors = load_file(tmp_path / "llama" / shards[-1])
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "llama" / shards[-1])
    assert model_fingerprint(tmp_path / "llama") != before


def test_a_gguf_file_is_known_by_its_contents(folder, tmp_path):
    hf = random_llama(tmp_path / "again", num_hidden_layers=1)
    file = write_gguf(tmp_path / "a.gguf", hf)
    before = model_fingerprint(file)
    assert model_fingerprint(file.rename(tmp_path / "b.gguf")) == before
    hf.model.norm.weight.data += torch.eye(32)[0]
    assert model_fingerprint(write_gguf(tmp_path / "c.gguf", hf)) != before


def test_files_that_were_not_touched_are_read_once(folder, monkeypatch):
    read = []
    whole = fingerprint.file_digest
    monkeypatch.setattr(fingerprint, "file_digest", lambda path: read.append(path.name) or whole(path))
    fingerprint._digest.cache_clear()
    first = model_fingerprint(folder)
    assert sorted(read) == [file.name for file in model_files(folder)]
    assert model_fingerprint(folder) == first
    assert len(read) == len(model_files(folder))


def test_a_hub_model_is_what_the_cache_holds(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(fingerprint, "download", lambda *args: asked.append(args) or folder)
    assert model_fingerprint("owner/name", "v1") == model_fingerprint(folder)
    assert [(repo, revision) for repo, _, revision in asked] == [("owner/name", "v1")]


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "missing.gguf", "owner/missing.gguf"])
def test_what_is_not_here_is_refused(name):
    with pytest.raises(FileNotFoundError, match=r"there is no model .* here: expected 'demo', a hub id"):
        model_fingerprint(name)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        model_fingerprint(tmp_path)
