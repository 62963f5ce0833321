"""Vector files: what is read is what was written, and a file that is not ours says so."""

import hashlib
import json
import os
import pickle
import random
import stat
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.vectors import random_set
from safetensors import deserialize
from safetensors.torch import save, save_file

from caa_lens.atomic_files import write_atomically
from caa_lens.file_kinds import VectorFileError
from caa_lens.provenance import Provenance
from caa_lens.vectors import storage
from caa_lens.vectors.steering_vectors import SteeringVectors
from caa_lens.vectors.storage import FORMAT_VERSION

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


some_vectors = partial(
    random_set,
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
)


def saved_bytes(folder, vectors=None):
    return SteeringVectors.save(vectors or some_vectors(), folder / "v.safetensors").read_bytes()


def file_with(folder, *, tensors=None, without=(), **metadata):
    """A valid file, checksum and all, but for what is given."""
    from safetensors import safe_open

    good = SteeringVectors.save(some_vectors(), folder / "good.safetensors")
    with safe_open(good, framework="pt") as file:
        merged = {**file.metadata(), **metadata}
        tensors = {"directions": file.get_tensor("directions")} if tensors is None else tensors
    merged = {key: value for key, value in merged.items() if key not in without}
    if "checksum" in merged and "checksum" not in metadata:
        contents = next(iter(tensors.values())).contiguous().view(torch.uint8).numpy().tobytes()
        merged["checksum"] = checksum({key: value for key, value in merged.items() if key != "checksum"}, contents)
    path = folder / "made.safetensors"
    save_file(tensors, path, metadata=merged)
    return path


def checksum(metadata, contents):
    """As the documentation says."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode("utf-8") + contents).hexdigest()


# ---- round trip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layers", [(3, 7, 20), (13,), tuple(range(5))])
def test_saving_then_loading_is_exact(tmp_path, dtype, layers):
    vectors = some_vectors(dtype=dtype, layers=layers)
    loaded = SteeringVectors.load(vectors.save(tmp_path / "v.safetensors"))
    assert loaded.directions.dtype == dtype
    assert torch.equal(loaded.directions.view(torch.uint8), vectors.directions.view(torch.uint8))
    assert loaded.layers == layers
    for field in fields(Provenance):
        assert getattr(loaded.provenance, field.name) == getattr(vectors.provenance, field.name), field.name


def test_extreme_numbers_survive(tmp_path):
    tiny = torch.finfo(torch.float32).smallest_normal / 4  # subnormal
    directions = torch.tensor([[tiny, -0.0, torch.finfo(torch.float32).max, 0.1]])
    loaded = SteeringVectors.load(
        SteeringVectors.save(SteeringVectors(directions=directions, layers=(7,)), tmp_path / "v.safetensors")
    )
    assert loaded.directions.view(torch.int32).tolist() == directions.view(torch.int32).tolist()


def test_every_number_of_the_narrow_dtypes_survives(tmp_path):
    for dtype in FLOATS:
        if dtype.itemsize <= 2:
            bits = torch.arange(2 ** (8 * dtype.itemsize)).to({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
            every = bits.view(dtype)
            every = every[every.float().isfinite()]
            path = SteeringVectors.save(
                SteeringVectors(directions=every[None], layers=(7,)), tmp_path / "v.safetensors"
            )
            assert torch.equal(SteeringVectors.load(path).directions[0].view(torch.uint8), every.view(torch.uint8)), (
                dtype
            )


def test_a_dtype_that_safetensors_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    scales = some_vectors(layers=(7,))
    object.__setattr__(scales, "directions", torch.ones(1, 4).to(torch.float8_e8m0fnu))
    with pytest.raises(ValueError, match=r"cannot be saved, because .*F8_E8M0, expected one of F64, F32.*convert them"):
        SteeringVectors.save(scales, tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "odd",
    [{"details": {"pairs": 3}}, {"behavior": None}, {"behavior": "\ud800"}, {"details": {"note": "x" * 2**20}}],
    ids=str,
)
def test_provenance_that_would_not_be_read_back_as_it_is_is_refused(tmp_path, odd):
    from dataclasses import replace
    from inspect import unwrap  # the tests' own type checking would refuse some of these first

    provenance = Provenance()
    for name, value in odd.items():
        object.__setattr__(provenance, name, value)
    vectors = replace(some_vectors(), provenance=provenance)
    with pytest.raises(ValueError, match="cannot be saved"):
        unwrap(SteeringVectors.save)(vectors, tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_was_saved_equals_what_is_loaded_and_nothing_else_does(tmp_path):
    vectors = some_vectors(layers=(3, 7, 20))
    loaded = SteeringVectors.load(vectors.save(tmp_path / "v.safetensors"))
    assert loaded == vectors
    assert hash(loaded) == hash(vectors)
    assert loaded[7] == vectors[7]
    assert vectors[7] != vectors[3].at_layer(7)
    assert vectors[7] != 2 * vectors[7]
    assert vectors.to(torch.float64) != vectors
    assert vectors.at([3, 7]) != vectors
    assert vectors[7] != "a vector"


def test_one_vector_is_saved_as_a_set_of_one(tmp_path):
    vectors = SteeringVectors(directions=torch.arange(6.0).reshape(3, 2), layers=(1, 4, 9))
    again = SteeringVectors.load(vectors[4].save(tmp_path / "one.safetensors"))
    assert again.layers == (4,)
    assert again[4].direction.equal(vectors[4].direction)


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    vectors = SteeringVectors(directions=torch.ones(1, 2), layers=(3,))
    assert vectors.save("~/here.safetensors") == tmp_path / "here.safetensors"
    assert SteeringVectors.load("~/here.safetensors").layers == (3,)


def test_a_view_into_a_larger_tensor_is_saved_as_what_it_shows(tmp_path):
    large = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    vectors = SteeringVectors(directions=large.T[::2], layers=(3, 20))
    assert torch.equal(
        SteeringVectors.load(SteeringVectors.save(vectors, tmp_path / "v.safetensors")).directions, large.T[::2]
    )


def test_gradients_do_not_follow_into_the_file(tmp_path):
    directions = torch.ones(1, 4, requires_grad=True)
    loaded = SteeringVectors.load(
        SteeringVectors.save(SteeringVectors(directions=directions, layers=(7,)), tmp_path / "v.safetensors")
    )
    assert not loaded.directions.requires_grad


def test_loaded_vectors_outlive_their_file(tmp_path):
    path = SteeringVectors.save(some_vectors(), tmp_path / "v.safetensors")
    loaded = SteeringVectors.load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded.directions, some_vectors().directions)


def test_equal_vectors_make_equal_files(tmp_path):
    assert len({saved_bytes(tmp_path) for _ in range(8)}) == 1
    assert saved_bytes(tmp_path, some_vectors(seed=2)) != saved_bytes(tmp_path)


def test_a_file_explains_itself_to_other_readers(tmp_path):
    from safetensors import safe_open

    path = SteeringVectors.save(some_vectors(), tmp_path / "v.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert list(file.keys()) == ["directions"]
        assert torch.equal(file.get_tensor("directions"), some_vectors().directions)
    assert metadata["hook_point"] == "hook_resid_post"
    assert metadata["layer_convention"] == "0-based block; directions live at the block's output"
    assert json.loads(metadata["layers"]) == [3, 7, 20]
    assert (metadata["dtype"], metadata["caa_lens_format"]) == ("float32", str(FORMAT_VERSION))
    assert metadata["model"] == "meta-llama/Llama-2-7b-chat-hf"
    assert f"torch {torch.__version__}" in metadata["library_versions"]
    contents = some_vectors().directions.numpy().tobytes()
    assert metadata.pop("checksum") == checksum(metadata, contents)


def test_folders_are_made_and_a_string_is_a_path_too(tmp_path):
    path = SteeringVectors.save(some_vectors(), str(tmp_path / "deep" / "er" / "v.safetensors"))
    assert SteeringVectors.load(str(path)).layers == (3, 7, 20)


# ---- files that are not ours ------------------------------------------------------------------------------------


def test_a_missing_file_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing at .*gone\.safetensors: expected a \.safetensors file"):
        SteeringVectors.load(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="no vector file at"):
        SteeringVectors.load(tmp_path)


@pytest.mark.parametrize("name", ["v.pt", "v", "v.safetensors.gz"])
def test_another_suffix_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=rf"vectors are saved as \.safetensors, got '{name}'"):
        SteeringVectors.save(some_vectors(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    data = saved_bytes(tmp_path)
    path = tmp_path / "cut.safetensors"
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(
            VectorFileError, match=r"cut\.safetensors is not a readable .*(truncated|cut off|not known)"
        ):
            SteeringVectors.load(path)


def test_any_flipped_bit_of_the_file_is_noticed_or_changes_nothing(tmp_path):
    vectors = some_vectors()
    data = saved_bytes(tmp_path)
    unnoticed = []
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            try:
                loaded = storage._decode(bytes(damaged))  # SteeringVectors.load without the file: ten thousand times
            except VectorFileError:
                continue
            assert torch.equal(loaded.directions, vectors.directions)
            assert (loaded.layers, loaded.provenance) == (vectors.layers, vectors.provenance)
            unnoticed.append((position, bit))
    assert not unnoticed


def test_many_flipped_bytes_are_noticed(tmp_path):
    data = saved_bytes(tmp_path)
    path = tmp_path / "damaged.safetensors"
    chosen = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for position in chosen.sample(range(len(data)), chosen.randrange(1, 9)):
            damaged[position] ^= chosen.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(VectorFileError, match=r"damaged\.safetensors"):
            SteeringVectors.load(path)


def test_a_flipped_number_of_a_vector_says_so(tmp_path):
    damaged = bytearray(saved_bytes(tmp_path))
    damaged[-3] ^= 1
    (tmp_path / "v.safetensors").write_bytes(damaged)
    with pytest.raises(VectorFileError, match="is damaged: its checksum is not that of its contents"):
        SteeringVectors.load(tmp_path / "v.safetensors")


def test_bytes_put_in_or_taken_out_anywhere_are_noticed(tmp_path):
    data = saved_bytes(tmp_path)
    for position in range(0, len(data) + 1, 7):
        for changed in (data[:position] + b"0" + data[position:], data[:position] + data[position + 1 :]):
            if changed != data:
                with pytest.raises(VectorFileError):
                    storage._decode(changed)


def test_random_bytes_are_refused(tmp_path):
    path = tmp_path / "noise.safetensors"
    for seed in range(50):
        path.write_bytes(random.Random(seed).randbytes(400))
        with pytest.raises(VectorFileError, match="is not a readable safetensors file"):
            SteeringVectors.load(path)


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "pickled.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(VectorFileError, match="is not a readable safetensors file"):
        SteeringVectors.load(path)
    torch.save({"directions": torch.ones(1, 4)}, path)
    with pytest.raises(VectorFileError, match="is not a readable safetensors file"):
        SteeringVectors.load(path)
    assert not (tmp_path / "executed").exists()


def header_of(text, *, length=None, tensor=b"\0" * 16):
    text = text if isinstance(text, bytes) else text.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + tensor


def described(shape, *, dtype="F32", end=16, metadata="{}"):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return header_of(json.dumps({"directions": entry})[:-1] + f', "__metadata__": {metadata}}}')


HOSTILE = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header of 2^64 - 1 bytes": header_of("{}", length=2**64 - 1),
    "a header of 2^63 bytes": header_of("{}", length=2**63),
    "a header longer than the file": header_of("{}", length=1000),
    "a header of 90 MB": header_of(b" " * 90_000_000 + b"{}"),
    "not UTF-8": header_of(b'{"__metadata__": {"a": "\xff\xfe"}}'),
    "half a character": header_of('{"__metadata__": {"a": "\\ud800"}}'),
    "no object": header_of("[1, 2]"),
    "a number": header_of("1" * 5000),
    "brackets without end": header_of("[" * 100_000),
    "braces without end": header_of('{"a":' * 100_000),
    "nested metadata": header_of('{"__metadata__": {"a": {"b": "c"}}}'),
    "metadata that is a list": header_of('{"__metadata__": ["a"]}'),
    "twice the same key": header_of('{"__metadata__": {"caa_lens_format": "2"}, "__metadata__": {"a": "b"}}'),
    "a shape beyond all memory": described([2**62, 2**62]),
    "a shape that wraps around": described([2**32, 2**32], end=0),
    "a negative shape": described([-1, 4]),
    "a shape that is no number": described(["a"]),
    "a shape of a thousand dimensions": described([1] * 1000 + [4]),
    "offsets beyond the file": described([1, 4], end=1 << 40),
    "offsets that do not fit the shape": described([1, 3]),
    "an unknown dtype": described([1, 4], dtype="F99"),
    "a GGUF file": b"GGUF" + b"\3" + b"\0" * 100,
    "an archive": b"PK\3\4" + b"\0" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_a_clear_error(tmp_path, name):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(VectorFileError, match=r"hostile\.safetensors (is not a readable|has )") as refused:
        SteeringVectors.load(path)
    assert len(str(refused.value)) < 1000


BOMBS = [
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 5000,
    "[1e999]",
    "[" + "9" * 5000 + "]",
    "[true]",
    "[3.0]",
    '"3"',
    "{}",
    "",
]


@pytest.mark.parametrize("key", ["layers", "n_pairs", "details"])
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:8])
def test_json_inside_the_metadata_is_not_trusted_either(tmp_path, key, bomb):
    if (key, bomb) == ("details", "{}"):
        return  # what it should be
    with pytest.raises(VectorFileError, match="has unusable metadata or tensors") as refused:
        SteeringVectors.load(file_with(tmp_path, **{key: bomb}))
    assert len(str(refused.value)) < 1000


def test_a_file_too_large_to_be_vectors_is_not_even_read(tmp_path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(2**40)  # of holes, which take no space
    with pytest.raises(VectorFileError, match=r"large\.safetensors is larger than 1073741824 bytes"):
        SteeringVectors.load(path)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "to_folder.safetensors").symlink_to(tmp_path / "folder.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, problem in [
        ("folder", "no vector file at .*which is a folder: caa_lens.read_vectors reads"),
        ("to_folder", "no vector file at .*which is a folder"),
        ("dangling", "nothing at .*dangling.* is a link to .*nowhere, which is not there"),
        ("loop", "loop.* cannot be read"),
        ("pipe", "pipe.* is a pipe, a socket or a device"),
    ]:
        with pytest.raises((FileNotFoundError, VectorFileError), match=problem):
            SteeringVectors.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(VectorFileError, match="/dev/zero is a pipe, a socket or a device"):
        SteeringVectors.load("/dev/zero")


def test_a_link_to_a_vector_file_is_read_and_saving_over_it_leaves_the_file_behind_it(tmp_path):
    real = SteeringVectors.save(some_vectors(), tmp_path / "real.safetensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to(real)
    assert torch.equal(SteeringVectors.load(link).directions, some_vectors().directions)
    SteeringVectors.save(some_vectors(seed=1), link)
    assert torch.equal(SteeringVectors.load(real).directions, some_vectors().directions)
    assert torch.equal(SteeringVectors.load(link).directions, some_vectors(seed=1).directions)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = SteeringVectors.save(some_vectors(), tmp_path / "v.safetensors")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(VectorFileError, match=r"v\.safetensors cannot be read \(Permission denied\)"):
        SteeringVectors.load(path)


# ---- versions ---------------------------------------------------------------------------------------------------


def version_1(folder, **changes):
    """What the first version wrote: neither checksum nor library versions."""
    vectors = some_vectors()
    texts = {f.name: getattr(vectors.provenance, f.name) for f in fields(Provenance)}
    metadata = {
        "caa_lens_format": "1",
        "hook_point": "hook_resid_post",
        "layer_convention": "0-based block; directions live at the block's output",
        "layers": "[3, 7, 20]",
        "dtype": "float32",
        **{key: value if isinstance(value, str) else json.dumps(value) for key, value in texts.items()},
    }
    path = folder / "old.safetensors"
    path.write_bytes(save({"directions": vectors.directions}, {**metadata, **changes}))
    return path


def test_files_of_version_1_which_had_no_checksum_are_still_read(tmp_path):
    loaded = SteeringVectors.load(version_1(tmp_path))
    assert torch.equal(loaded.directions, some_vectors().directions)
    assert (loaded.layers, loaded.provenance) == ((3, 7, 20), some_vectors().provenance)


def saved_as_version_2(vectors, path):
    """What the second version wrote: the third's keys, with models by their names of then."""
    from caa_lens.vectors import storage

    path = vectors.save(path)
    data = path.read_bytes()
    tensor = dict(deserialize(data))["directions"]
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    metadata = {**metadata, "caa_lens_format": "2"}
    del metadata["checksum"]
    metadata["checksum"] = storage._checksum(metadata, tensor["data"])
    path.write_bytes(save({"directions": vectors.directions}, metadata))
    return path


def test_a_file_from_before_the_demo_model_had_its_name_says_the_new_one(tmp_path):
    now = some_vectors(model="SmolLM2-135M-Instruct-4bit")
    for name, read in [
        ("SmolLM2-135M-Instruct", now.provenance.model),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ]:
        old = some_vectors(model=name)
        before = SteeringVectors.load(saved_as_version_2(old, tmp_path / "old.safetensors"))
        assert before.provenance.model == read
        assert SteeringVectors.load(version_1(tmp_path, model=name)).provenance.model == read
        # Saved today, a model of that name is one that somebody has in a folder called so.
        assert SteeringVectors.load(old.save(tmp_path / "new.safetensors")).provenance.model == name
    assert (before.directions == now.directions).all()


def test_a_file_of_version_2_cannot_pass_for_one_of_version_1(tmp_path):
    with pytest.raises(VectorFileError, match="has the unknown metadata 'checksum'"):
        SteeringVectors.load(file_with(tmp_path, caa_lens_format="1"))
    with pytest.raises(VectorFileError, match="lacks the metadata 'checksum'"):
        SteeringVectors.load(version_1(tmp_path, caa_lens_format="2"))
    with pytest.raises(VectorFileError, match="has the unknown metadata 'note'"):
        SteeringVectors.load(file_with(tmp_path, note="added by hand"))


def test_another_tools_safetensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"directions": torch.ones(3, 16)}, path)
    with pytest.raises(
        VectorFileError, match=r"no 'caa_lens_format' metadata, so it was not written by this .*another"
    ):
        SteeringVectors.load(path)


@pytest.mark.parametrize("names", [("weight",), ("directions", "weight")])
def test_other_tensors_are_refused_by_name(tmp_path, names):
    path = file_with(tmp_path, tensors={name: torch.ones(3, 16) for name in names})
    with pytest.raises(VectorFileError, match=r"has tensors \[.*'weight'.*\], expected only 'directions'"):
        SteeringVectors.load(path)


@pytest.mark.parametrize(
    "key", ["layers", "hook_point", "checksum", "library_versions", *(field.name for field in fields(Provenance))]
)
def test_a_missing_metadata_key_is_named(tmp_path, key):
    path = file_with(tmp_path, without=(key,))
    with pytest.raises(VectorFileError, match=f"lacks the metadata '{key}': it was not written by this library"):
        SteeringVectors.load(path)


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "99", "one", "", "-1"])
def test_a_newer_or_unreadable_version_asks_for_an_update(tmp_path, version):
    path = file_with(tmp_path, caa_lens_format=version)
    with pytest.raises(
        VectorFileError, match=f"format version '{version}', this library reads 1, 2 and 3: update caa_lens"
    ):
        SteeringVectors.load(path)


def test_vectors_of_another_hook_point_are_refused(tmp_path):
    path = file_with(tmp_path, hook_point="hook_resid_pre")
    with pytest.raises(VectorFileError, match="hook_point is 'hook_resid_pre', expected 'hook_resid_post'"):
        SteeringVectors.load(path)
    path = file_with(tmp_path, layer_convention="1-based")
    with pytest.raises(VectorFileError, match=r"layer_convention is '1-based', expected .0-based block"):
        SteeringVectors.load(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"layers": "[3, 7]"},
        {"layers": "[20, 7, 3]"},
        {"layers": "[-1, 7, 20]"},
        {"layers": "not json"},
        {"layers": "null"},
        {"layers": "[true, 7, 20]"},
        {"layers": "[3.0, 7, 20]"},
        {"layers": "[3, 7, Infinity]"},
        {"n_pairs": "many"},
        {"n_pairs": "-3"},
        {"n_pairs": "1_0"},
        {"details": "{"},
        {"details": '{"a": 1}'},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_metadata_that_cannot_be_meant_is_refused(tmp_path, metadata):
    path = file_with(tmp_path, **metadata)
    with pytest.raises(VectorFileError, match="has unusable metadata or tensors"):
        SteeringVectors.load(path)


@pytest.mark.parametrize("bad", [torch.full((3, 16), float("nan")), torch.ones(3, 16, 1), torch.ones(3, 16).long()])
def test_tensors_that_cannot_be_vectors_are_refused(tmp_path, bad):
    path = file_with(tmp_path, tensors={"directions": bad})
    with pytest.raises(VectorFileError, match="has unusable metadata or tensors"):
        SteeringVectors.load(path)


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
        SteeringVectors.save(some_vectors(seed=1), tmp_path / "v.safetensors")
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


@pytest.mark.skipif(os.name != "posix", reason="only POSIX opens folders")
def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    path, events = tmp_path / "v.txt", []
    sync, rename = os.fsync, Path.replace

    def told_sync(handle):
        about = os.fstat(handle)
        events.append(("fsync of the folder",) if stat.S_ISDIR(about.st_mode) else ("fsync", about.st_size))
        sync(handle)

    def told_rename(self, target):
        events.append(("rename", self.read_text(), Path(target).name))
        return rename(self, target)

    def write(temporary):
        temporary.write_text("new")
        events.append(("write", path.exists()))

    monkeypatch.setattr(os, "fsync", told_sync)
    monkeypatch.setattr(Path, "replace", told_rename)
    write_atomically(path, write)
    assert events == [("write", False), ("fsync", 3), ("rename", "new", "v.txt"), ("fsync of the folder",)]


def test_a_disk_that_turns_out_full_at_the_end_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["v.txt"]


def test_a_folder_that_cannot_be_synced_is_no_mistake(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError("not supported")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert write_atomically(tmp_path / "v.txt", lambda temporary: temporary.write_text("new")).read_text() == "new"


def test_saving_replaces_and_never_appends(tmp_path):
    SteeringVectors.save(some_vectors(layers=tuple(range(30))), tmp_path / "v.safetensors")
    assert saved_bytes(tmp_path) == saved_bytes(tmp_path / "fresh")


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_a_saved_file_is_as_readable_as_any_other_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    path = SteeringVectors.save(some_vectors(), tmp_path / "v.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
