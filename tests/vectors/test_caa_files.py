"""The CAA authors' files: read and written as their code does, and nothing but tensors let in."""

import pickle
import zipfile
from functools import partial

import pytest
import torch
from helpers.file_mutations import RunsCode
from helpers.vectors import random_set

from caa_lens.file_kinds import VectorFileError
from caa_lens.vectors.extraction import mean_difference
from caa_lens.vectors.formats.caa_files import read_caa, read_caa_activations, write_caa
from caa_lens.vectors.interchange import read_vectors
from caa_lens.vectors.steering_vectors import SteeringVectors

MODEL = "Llama-2-7b-chat-hf"


def authors_folder(folder, *, layers=(13, 7, 20), model=MODEL, d_model=16, dtype=torch.float32, seed=0):
    """A folder as the authors' script leaves it: `torch.save` of one bare tensor a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    saved = {}
    for layer in layers:
        saved[layer] = torch.randn(d_model, generator=generator).to(dtype)
        torch.save(saved[layer], folder / f"vec_layer_{layer}_{model}.pt")
    return saved


some_vectors = partial(random_set, layers=(0, 7, 20), model="meta-llama/Llama-2-7b-chat-hf", behavior="x")


# ---- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_authors_folder_is_read_with_layers_as_they_are(tmp_path, dtype):
    saved = authors_folder(tmp_path / "sycophancy", dtype=dtype)
    vectors = read_caa(tmp_path / "sycophancy")
    assert vectors.layers == (7, 13, 20)
    assert (vectors.behavior, vectors.provenance.model) == ("sycophancy", MODEL)
    assert vectors.directions.dtype == dtype
    for layer, direction in saved.items():
        assert torch.equal(vectors[layer].direction, direction)


def test_one_file_is_read_as_its_one_layer(tmp_path):
    saved = authors_folder(tmp_path / "sycophancy")
    authors_folder(tmp_path / "sycophancy", model="Llama-2-13b-chat-hf", d_model=20)
    vectors = read_caa(tmp_path / "sycophancy" / f"vec_layer_13_{MODEL}.pt")
    assert (vectors.layers, vectors.behavior, vectors.provenance.model) == ((13,), "sycophancy", MODEL)
    assert torch.equal(vectors[13].direction, saved[13])


def test_files_of_pytorchs_early_versions_are_read(tmp_path):
    direction = torch.arange(4.0)
    torch.save(direction, tmp_path / f"vec_layer_3_{MODEL}.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_caa(tmp_path)[3].direction, direction)


def test_several_models_in_a_folder_are_named_and_one_can_be_chosen(tmp_path):
    authors_folder(tmp_path)
    larger = authors_folder(tmp_path, model="Llama-2-13b-chat-hf", d_model=20, layers=(13, 39))
    with pytest.raises(VectorFileError, match=r"several models, Llama-2-13b-chat-hf, Llama-2-7b-chat-hf: choose"):
        read_caa(tmp_path)
    vectors = read_caa(tmp_path, model="meta-llama/Llama-2-13b-chat-hf")
    assert (vectors.layers, vectors.provenance.model) == ((13, 39), "meta-llama/Llama-2-13b-chat-hf")
    assert torch.equal(vectors[39].direction, larger[39])
    with pytest.raises(VectorFileError, match=r"nothing of 'gpt2': it has Llama-2-13b-chat-hf, Llama-2-7b-chat-hf"):
        read_caa(tmp_path, model="gpt2")


def test_other_files_in_the_folder_are_passed_over(tmp_path):
    authors_folder(tmp_path, layers=(3,))
    (tmp_path / "notes.txt").write_text("x")
    for name in (f"vec_layer_03_{MODEL}.pt", f"vec_layer_-1_{MODEL}.pt", "vec_layer_4x.pt", "other.pt"):
        torch.save(torch.ones(99), tmp_path / name)
    assert read_caa(tmp_path).layers == (3,)


def test_a_folder_of_behaviors_says_to_choose_one(tmp_path):
    authors_folder(tmp_path / "sycophancy")
    authors_folder(tmp_path / "refusal")
    with pytest.raises(VectorFileError, match=r"choose one of the folders in it, refusal, sycophancy"):
        read_caa(tmp_path)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    trace = tmp_path / "it-ran"
    folder = tmp_path / "refusal"
    folder.mkdir()
    path = folder / f"vec_layer_3_{MODEL}.pt"
    bare, archived = pickle.dumps(RunsCode(trace), protocol=2), path.with_suffix(".archive")
    torch.save(RunsCode(trace), archived)
    for content in (bare, archived.read_bytes()):
        path.write_bytes(content)
        for target in (folder, path):
            with pytest.raises(
                VectorFileError,
                match=r"vec_layer_3_.* a pickle of objects, posix.mkdir, whose .*was not read; .*expected one",
            ):
                read_caa(target)
        assert not trace.exists()
    pickle.loads(bare)  # the file is what it says it is
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"vector": torch.ones(4)}, "holds a dict"),
        ([1.0, 2.0], "holds a list"),
        (torch.ones(1, 4), r"holds \[1, 4\] numbers in float32"),
        (torch.tensor(1.0), r"holds \[\] numbers"),
        (torch.ones(4, dtype=torch.int64), r"holds \[4\] numbers in int64"),
        (torch.tensor([1.0, float("nan")]), "holds 1 NaN or infinite numbers"),
    ],
)
def test_anything_but_one_finite_vector_is_refused(tmp_path, content, problem):
    torch.save(content, tmp_path / f"vec_layer_3_{MODEL}.pt")
    with pytest.raises(VectorFileError, match=problem + r".*expected .*one finite vector, \[d_model\]"):
        read_caa(tmp_path)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"d_model": 20}, "layer 3 has d_model=16 in float32, but layer 9 has d_model=20 in float32"),
        ({"dtype": torch.float16}, "layer 3 has d_model=16 in float32, but layer 9 has d_model=16 in float16"),
    ],
)
def test_layers_that_do_not_belong_together_are_refused(tmp_path, options, problem):
    authors_folder(tmp_path, layers=(3,))
    authors_folder(tmp_path, layers=(9,), **options)
    with pytest.raises(VectorFileError, match=problem):
        read_caa(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    authors_folder(tmp_path, layers=(3,))
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(VectorFileError, match=r"damaged" if length > 4 else "empty"):
            read_caa(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "no tensor")
    with pytest.raises(VectorFileError, match=r"a zip archive of 1 file \(hello.txt\): unpack it first"):
        read_caa(path)


def test_a_name_without_layer_and_model_and_a_missing_path_say_what_is_expected(tmp_path):
    torch.save(torch.ones(4), tmp_path / "mine.pt")
    with pytest.raises(
        VectorFileError, match=r"mine.pt is a file of torch.save, but is not called vec_layer_\{layer\}_"
    ):
        read_caa(tmp_path / "mine.pt")
    with pytest.raises(FileNotFoundError, match="expected a folder of vec_layer_"):
        read_caa(tmp_path / "nowhere")


# ---- the authors' earlier names, without a model ------------------------------------------------------------------


def earlier_folder(folder, *, layers=range(10, 20), seed=3):
    """As the authors' first versions saved them: `vec_layer_{L}.pt`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    saved = {layer: torch.randn(16, generator=generator) for layer in layers}
    for layer, direction in saved.items():
        torch.save(direction, folder / f"vec_layer_{layer}.pt")
    return saved


@pytest.mark.parametrize(
    ("given", "known"), [(None, "unknown"), ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf")]
)
def test_a_folder_of_earlier_names_is_read_and_its_model_is_what_the_caller_says(tmp_path, given, known):
    saved = earlier_folder(tmp_path / "refusal")
    vectors = read_vectors(tmp_path / "refusal", model=given)
    assert vectors.layers == tuple(range(10, 20))
    assert (vectors.behavior, vectors.provenance.model) == ("refusal", known)
    assert "which name no model" in vectors.provenance.details["source"]
    for layer, direction in saved.items():
        assert torch.equal(vectors[layer].direction, direction)


def test_one_file_of_an_earlier_name_alone_says_its_layer(tmp_path):
    saved = earlier_folder(tmp_path / "refusal", layers=(0, 13))
    for layer, direction in saved.items():
        vectors = read_vectors(tmp_path / "refusal" / f"vec_layer_{layer}.pt", layers=layer)
        assert (vectors.layers, vectors.provenance.model) == ((layer,), "unknown")
        assert torch.equal(vectors[layer].direction, direction)
    with pytest.raises(VectorFileError, match="says that its layers are 13, not 14: leave layers= out"):
        read_vectors(tmp_path / "refusal" / "vec_layer_13.pt", layers=[14])


def test_a_folder_of_both_names_is_refused_until_the_model_is_chosen(tmp_path):
    named, unnamed = authors_folder(tmp_path), earlier_folder(tmp_path, layers=(13, 14))
    with pytest.raises(
        VectorFileError,
        match=rf"several models, {MODEL}, files that name no model \(vec_layer_13.pt, vec_layer_14.pt\): choose one "
        "with model=..., or 'unknown' for those that name none",
    ):
        read_caa(tmp_path)
    for chosen, saved in ((MODEL, named), (f"meta-llama/{MODEL}", named), ("unknown", unnamed)):
        vectors = read_caa(tmp_path, model=chosen)
        assert vectors.layers == tuple(sorted(saved))
        assert vectors.provenance.model == chosen
        assert torch.equal(vectors[13].direction, saved[13])
    with pytest.raises(
        VectorFileError, match=r"nothing of 'gpt2': it has Llama-2-7b-chat-hf, files that name no model"
    ):
        read_caa(tmp_path, model="gpt2")


def test_one_layer_in_two_files_is_refused(tmp_path):
    earlier_folder(tmp_path, layers=(3, 4))
    torch.save(torch.ones(16), tmp_path / "vec_layer_3.PT")
    with pytest.raises(VectorFileError, match=r"holds one layer twice, as vec_layer_3.PT and vec_layer_3.pt"):
        read_caa(tmp_path)


def test_activations_of_earlier_names_are_read_too(tmp_path):
    for side, value in (("pos", 2.0), ("neg", 1.0)):
        torch.save(torch.full((5, 16), value), tmp_path / f"activations_{side}_3.pt")
    positive, negative = read_caa_activations(tmp_path)[3]
    assert (positive - negative).unique().tolist() == [1.0]
    assert list(read_caa_activations(tmp_path, model="any/model")) == [3]


@pytest.mark.parametrize(
    "model",
    [
        "meta-llama/Llama-2-7b-chat-hf",
        "meta-llama/Llama-2-7b-chat-hf/",
        "/models/Llama-2-7b-chat-hf/",
        "~/hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots/f5db02db7",
        r"C:\models\Llama-2-7b-chat-hf",
    ],
)
def test_files_are_called_after_the_model_whatever_it_goes_by_and_are_found_by_it(tmp_path, model):
    write_caa(some_vectors(model=model), tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [f"vec_layer_{i}_{MODEL}.pt" for i in (0, 20, 7)]
    assert read_caa(tmp_path / "x", model=model).layers == (0, 7, 20)
    assert (read_caa(tmp_path / "x", model=model) - some_vectors(model=model)).norms.tolist() == [0, 0, 0]


# ---- how a path is written ----------------------------------------------------------------------------------------


def test_a_folder_may_be_given_in_any_way(tmp_path, monkeypatch):
    saved = authors_folder(tmp_path / "real" / "refusal", layers=(3,))
    (tmp_path / "link").symlink_to(tmp_path / "real" / "refusal")
    monkeypatch.setenv("HOME", str(tmp_path / "real"))
    monkeypatch.chdir(tmp_path / "real" / "refusal")
    ways = {
        f"{tmp_path}/real/refusal/": "refusal",
        "~/refusal": "refusal",
        ".": "refusal",
        "../refusal/.": "refusal",
        f"{tmp_path}/link": "link",
        f"{tmp_path}/link/": "link",
    }
    for way, behavior in ways.items():
        vectors = read_vectors(way)
        assert torch.equal(vectors[3].direction, saved[3])
        assert vectors.behavior == behavior


def test_the_ending_may_be_in_upper_case_and_a_file_may_be_a_link_to_another_name(tmp_path):
    torch.save(torch.ones(4), tmp_path / "vec_layer_3_m.PT")
    (tmp_path / "blob").write_bytes((tmp_path / "vec_layer_3_m.PT").read_bytes())
    (tmp_path / "vec_layer_5_m.pt").symlink_to(tmp_path / "blob")  # as the hub's cache has them
    assert read_vectors(tmp_path).layers == (3, 5)
    assert read_vectors(tmp_path / "vec_layer_3_m.PT").layers == (3,)
    assert read_vectors(tmp_path / "vec_layer_5_m.pt").layers == (5,)


# ---- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_authors_code_finds_and_loads_what_is_written(tmp_path, dtype):
    vectors = some_vectors(dtype=dtype)
    assert write_caa(vectors, tmp_path / "sycophancy") == tmp_path / "sycophancy"
    for layer in vectors.layers:  # by their name, through a plain torch.load
        loaded = torch.load(tmp_path / "sycophancy" / f"vec_layer_{layer}_{MODEL}.pt")
        assert loaded.dtype == dtype
        assert torch.equal(loaded, vectors[layer].direction)
    assert len(list((tmp_path / "sycophancy").iterdir())) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_written_as_float32(tmp_path, dtype):
    vectors = some_vectors(dtype=dtype)
    loaded = read_caa(write_caa(vectors, tmp_path / "x"))
    assert torch.equal(loaded.directions, vectors.directions.float())


def test_a_file_holds_its_own_layer_only(tmp_path):
    many = SteeringVectors(directions=torch.ones(30, 4096), layers=tuple(range(30)))
    write_caa(many, tmp_path)
    assert all(path.stat().st_size < 4096 * 4 + 2000 for path in tmp_path.iterdir())


def test_writing_over_a_set_is_fine_but_mixing_two_is_refused_before_anything_changes(tmp_path):
    write_caa(some_vectors(), tmp_path)
    write_caa(some_vectors(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"already holds layers \[0, 7\] of Llama-2-7b-chat-hf"):
        write_caa(some_vectors(layers=(13, 20)), tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_caa(some_vectors(layers=(13,), model="other"), tmp_path)
    assert read_caa(tmp_path, model="other").layers == (13,)


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="is a file: CAA files go into a folder"):
        write_caa(some_vectors(), tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


# ---- activations --------------------------------------------------------------------------------------------------


def saved_activations(folder, *, layers=(3, 9), n_negative=5, model=MODEL):
    generator = torch.Generator().manual_seed(0)
    sides = {}
    for side, n in (("pos", 5), ("neg", n_negative)):
        for layer in layers:
            sides[side, layer] = torch.randn(n, 16, generator=generator)
            torch.save(sides[side, layer], folder / f"activations_{side}_{layer}_{model}.pt")
    return sides


def test_the_authors_activations_give_the_authors_vectors(tmp_path):
    saved = saved_activations(tmp_path)
    read = read_caa_activations(tmp_path)
    assert list(read) == [3, 9]
    for layer, sides in read.items():
        theirs = (saved["pos", layer] - saved["neg", layer]).mean(dim=0)
        torch.testing.assert_close(mean_difference(*sides), theirs)


def test_activations_of_unequal_sides_or_several_models_are_refused(tmp_path):
    saved_activations(tmp_path, n_negative=4)
    with pytest.raises(VectorFileError, match=r"positive activations have shapes .*5, 16.* negative .*4, 16"):
        read_caa_activations(tmp_path)
    saved_activations(tmp_path, model="other")
    with pytest.raises(VectorFileError, match="several models"):
        read_caa_activations(tmp_path)
    assert len(read_caa_activations(tmp_path, model="other")[3][0]) == 5
