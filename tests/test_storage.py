"""Vector files: what is read is what was written, and a file that is not ours says so."""

import json
import os
import pickle
import random
import stat
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from caa_lens.storage import FORMAT_VERSION, VectorFileError, load_vectors, save_vectors, write_atomically
from caa_lens.vectors import Provenance, SteeringVectors


def some_vectors(*, layers=(3, 7, 20), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SteeringVectors(
        directions=torch.randn(len(layers), 16, generator=generator, dtype=torch.float64).to(dtype),
        layers=layers,
        provenance=Provenance(
            model="meta-llama/Llama-2-7b-chat-hf",
            behavior="sycophancy",
            method="mean difference",
            prompt_format="llama2-chat",
            token_position="answer letter",
            n_pairs=1000,
            dataset_hash="0123abcd",
            normalisation="across behaviors: refusal, sycophancy",
            expression='2 * (sycophancy - "é\n日")',
            details={"torch": "2.6", "note": 'quotes " and \\ and ü'},
        ),
    )


def saved_bytes(folder, vectors=None):
    return save_vectors(vectors or some_vectors(), folder / "v.safetensors").read_bytes()


def file_with(folder, *, tensors=None, without=(), **metadata):
    """A valid file, but for what is given."""
    from safetensors import safe_open

    good = save_vectors(some_vectors(), folder / "good.safetensors")
    with safe_open(good, framework="pt") as file:
        merged = {**file.metadata(), **metadata}
        tensors = {"directions": file.get_tensor("directions")} if tensors is None else tensors
    path = folder / "made.safetensors"
    save_file(tensors, path, metadata={key: value for key, value in merged.items() if key not in without})
    return path


# ---- round trip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layers", [(3, 7, 20), (13,), tuple(range(5))])
def test_saving_then_loading_is_exact(tmp_path, dtype, layers):
    vectors = some_vectors(dtype=dtype, layers=layers)
    loaded = SteeringVectors.load(vectors.save(tmp_path / "v.safetensors"))
    assert loaded.directions.dtype == dtype
    assert torch.equal(loaded.directions, vectors.directions)
    assert loaded.layers == layers
    for field in fields(Provenance):
        assert getattr(loaded.provenance, field.name) == getattr(vectors.provenance, field.name), field.name


def test_extreme_numbers_survive(tmp_path):
    tiny = torch.finfo(torch.float32).smallest_normal / 4  # subnormal
    directions = torch.tensor([[tiny, -0.0, torch.finfo(torch.float32).max, 0.1]])
    loaded = load_vectors(save_vectors(SteeringVectors(directions=directions, layers=(7,)), tmp_path / "v.safetensors"))
    assert loaded.directions.view(torch.int32).tolist() == directions.view(torch.int32).tolist()


def test_a_view_into_a_larger_tensor_is_saved_as_what_it_shows(tmp_path):
    large = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    vectors = SteeringVectors(directions=large.T[::2], layers=(3, 20))
    assert torch.equal(load_vectors(save_vectors(vectors, tmp_path / "v.safetensors")).directions, large.T[::2])


def test_gradients_do_not_follow_into_the_file(tmp_path):
    directions = torch.ones(1, 4, requires_grad=True)
    loaded = load_vectors(save_vectors(SteeringVectors(directions=directions, layers=(7,)), tmp_path / "v.safetensors"))
    assert not loaded.directions.requires_grad


def test_loaded_vectors_outlive_their_file(tmp_path):
    path = save_vectors(some_vectors(), tmp_path / "v.safetensors")
    loaded = load_vectors(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded.directions, some_vectors().directions)


def test_equal_vectors_make_equal_files(tmp_path):
    assert len({saved_bytes(tmp_path) for _ in range(8)}) == 1
    assert saved_bytes(tmp_path, some_vectors(seed=1)) != saved_bytes(tmp_path)


def test_a_file_explains_itself_to_other_readers(tmp_path):
    from safetensors import safe_open

    path = save_vectors(some_vectors(), tmp_path / "v.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert list(file.keys()) == ["directions"]
        assert torch.equal(file.get_tensor("directions"), some_vectors().directions)
    assert metadata["hook_point"] == "hook_resid_post"
    assert metadata["layer_convention"] == "0-based block; directions live at the block's output"
    assert json.loads(metadata["layers"]) == [3, 7, 20]
    assert (metadata["dtype"], metadata["caa_lens_format"]) == ("float32", str(FORMAT_VERSION))
    assert metadata["model"] == "meta-llama/Llama-2-7b-chat-hf"


def test_folders_are_made_and_a_string_is_a_path_too(tmp_path):
    path = save_vectors(some_vectors(), str(tmp_path / "deep" / "er" / "v.safetensors"))
    assert load_vectors(str(path)).layers == (3, 7, 20)


# ---- files that are not ours ------------------------------------------------------------------------------------


def test_a_missing_file_says_what_was_expected(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no vector file at .*gone\.safetensors: expected a \.safetensors file"
    ):
        load_vectors(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="no vector file at"):
        load_vectors(tmp_path)


@pytest.mark.parametrize("name", ["v.pt", "v", "v.safetensors.gz"])
def test_another_suffix_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=rf"vectors are saved as \.safetensors, got '{name}'"):
        save_vectors(some_vectors(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    data = saved_bytes(tmp_path)
    path = tmp_path / "cut.safetensors"
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(VectorFileError, match=r"cut\.safetensors is not a readable safetensors file .*truncated"):
            load_vectors(path)


def test_a_flipped_bit_in_the_length_or_structure_is_refused(tmp_path):
    data = saved_bytes(tmp_path)
    path = tmp_path / "flipped.safetensors"
    brace, last = 8, data.rindex(b"}}")
    for position in [0, 1, 4, 7, brace, last, last + 1]:
        damaged = bytearray(data)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(VectorFileError, match=r"flipped\.safetensors is not a readable safetensors file"):
            load_vectors(path)


def test_no_flipped_bit_in_the_header_escapes_as_another_error(tmp_path):
    data = saved_bytes(tmp_path)
    path = tmp_path / "flipped.safetensors"
    header = 8 + int.from_bytes(data[:8], "little")
    chosen = random.Random(0)
    refused = []
    for position in range(header):
        damaged = bytearray(data)
        damaged[position] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        try:
            load_vectors(path)  # a changed letter in a text cannot be noticed
        except VectorFileError as error:
            refused.append(str(error))
    assert len(refused) > header // 4
    assert all("flipped.safetensors" in message for message in refused)


def test_random_bytes_are_refused(tmp_path):
    path = tmp_path / "noise.safetensors"
    for seed in range(50):
        path.write_bytes(random.Random(seed).randbytes(400))
        with pytest.raises(VectorFileError, match="is not a readable safetensors file"):
            load_vectors(path)


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "pickled.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(VectorFileError, match="is not a readable safetensors file"):
        load_vectors(path)
    torch.save({"directions": torch.ones(1, 4)}, path)
    with pytest.raises(VectorFileError, match="is not a readable safetensors file"):
        load_vectors(path)
    assert not (tmp_path / "executed").exists()


def test_another_tools_safetensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"directions": torch.ones(3, 16)}, path)
    with pytest.raises(VectorFileError, match="no 'caa_lens_format' metadata: it was not written by this library"):
        load_vectors(path)


@pytest.mark.parametrize("names", [("weight",), ("directions", "weight")])
def test_other_tensors_are_refused_by_name(tmp_path, names):
    path = file_with(tmp_path, tensors={name: torch.ones(3, 16) for name in names})
    with pytest.raises(VectorFileError, match=r"has tensors \[.*'weight'.*\], expected only 'directions'"):
        load_vectors(path)


@pytest.mark.parametrize("key", ["layers", "hook_point", *(field.name for field in fields(Provenance))])
def test_a_missing_metadata_key_is_named(tmp_path, key):
    path = file_with(tmp_path, without=(key,))
    with pytest.raises(VectorFileError, match=f"lacks the metadata '{key}': it was not written by this library"):
        load_vectors(path)


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "99", "one", "", "-1"])
def test_a_newer_or_unreadable_version_asks_for_an_update(tmp_path, version):
    path = file_with(tmp_path, caa_lens_format=version)
    with pytest.raises(
        VectorFileError, match=f"format version '{version}', this library reads up to 1: update caa_lens"
    ):
        load_vectors(path)


def test_vectors_of_another_hook_point_are_refused(tmp_path):
    path = file_with(tmp_path, hook_point="hook_resid_pre")
    with pytest.raises(VectorFileError, match="holds vectors at 'hook_resid_pre', expected 'hook_resid_post'"):
        load_vectors(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"layers": "[3, 7]"},
        {"layers": "[20, 7, 3]"},
        {"layers": "[-1, 7, 20]"},
        {"layers": "not json"},
        {"layers": "null"},
        {"layers": "[3, 7, Infinity]"},
        {"n_pairs": "many"},
        {"details": "{"},
    ],
    ids=str,
)
def test_metadata_that_cannot_be_meant_is_refused(tmp_path, metadata):
    path = file_with(tmp_path, **metadata)
    with pytest.raises(VectorFileError, match="has unusable metadata or tensors"):
        load_vectors(path)


@pytest.mark.parametrize("bad", [torch.full((3, 16), float("nan")), torch.ones(3, 16, 1), torch.ones(3, 16).long()])
def test_tensors_that_cannot_be_vectors_are_refused(tmp_path, bad):
    path = file_with(tmp_path, tensors={"directions": bad})
    with pytest.raises(VectorFileError, match="has unusable metadata or tensors"):
        load_vectors(path)


# ---- writing whole or not at all --------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    before = saved_bytes(tmp_path)

    def fail_half_way(path, *args):
        if broken == "write_bytes":
            with path.open("wb") as file:
                file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, broken, fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        save_vectors(some_vectors(seed=1), tmp_path / "v.safetensors")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]
    assert (tmp_path / "v.safetensors").read_bytes() == before


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new.safetensors", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_never_seen_half_written(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("old")
    seen = []

    def write(temporary):
        temporary.write_text("new")
        seen.append((path.read_text(), temporary.parent == tmp_path, temporary.suffix))

    assert write_atomically(path, write) == path
    assert seen == [("old", True, ".txt")]
    assert path.read_text() == "new"


def test_saving_replaces_and_never_appends(tmp_path):
    save_vectors(some_vectors(layers=tuple(range(30))), tmp_path / "v.safetensors")
    assert saved_bytes(tmp_path) == saved_bytes(tmp_path / "fresh")


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_a_saved_file_is_as_readable_as_any_other_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    path = save_vectors(some_vectors(), tmp_path / "v.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
