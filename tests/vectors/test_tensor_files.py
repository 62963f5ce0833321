"""Bare tensors of anybody's: every form is read at the layers that it names or is told, and nothing is guessed."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers.file_mutations import RunsCode

from caa_lens.file_kinds import VectorFileError
from caa_lens.vectors.formats import tensor_files
from caa_lens.vectors.formats.tensor_files import read_tensors
from caa_lens.vectors.interchange import read_vectors

STACK = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
ENDINGS = ("pt", "early.pt", "npy", "npz")


def saved(path, value):
    """A tensor or a dict of tensors, as the ending says; `.early.pt` is how PyTorch wrote before 1.6."""
    if path.name.endswith(".early.pt"):
        torch.save(value, path, _use_new_zipfile_serialization=False)
    elif path.suffix == ".npy":
        np.save(path, value.numpy())
    elif path.suffix == ".npz":
        named = value if isinstance(value, dict) else {"stack": value}
        np.savez(path, **{str(key): tensor.numpy() for key, tensor in named.items()})
    else:
        torch.save(value, path)
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_rows_of_a_stack_are_blocks_from_0_on(tmp_path, ending):
    vectors = read_vectors(saved(tmp_path / f"refusal.{ending}", STACK))
    assert vectors.layers == (0, 1, 2, 3)
    assert torch.equal(vectors.directions, STACK)
    assert (vectors.behavior, vectors.provenance.model) == (f"refusal.{ending}".rpartition(".")[0], "unknown")
    assert "rows taken for blocks 0 to 3" in vectors.provenance.details["source"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_are_the_layers_that_the_caller_says_in_that_order(tmp_path, ending):
    vectors = read_vectors(saved(tmp_path / f"v.{ending}", STACK), layers=[10, 30, 9, 12], model="o/m")
    assert vectors.layers == (9, 10, 12, 30)
    for row, layer in enumerate([10, 30, 9, 12]):
        assert torch.equal(vectors[layer].direction, STACK[row])
    assert vectors.provenance.model == "o/m"
    assert "as told" in vectors.provenance.details["source"]


@pytest.mark.parametrize("ending", ["pt", "early.pt", "npz"])
@pytest.mark.parametrize(
    "name",
    [str, "layer_{}", "layer{}", "layers.{}", "model.layers.{}", "blocks.{}.hook_resid_post", "transformer.h.{}"],
)
def test_keys_are_blocks_and_not_places(tmp_path, ending, name):
    by_key = {(name(layer) if name is str else name.format(layer)): STACK[row] for row, layer in enumerate((20, 3, 10))}
    vectors = read_vectors(saved(tmp_path / f"v.{ending}", by_key))
    assert vectors.layers == (3, 10, 20)
    for row, layer in enumerate((20, 3, 10)):
        assert torch.equal(vectors[layer].direction, STACK[row])
    assert "keys taken for blocks" in vectors.provenance.details["source"]


def test_whole_numbers_are_keys_too_and_an_ordered_dict_is_a_dict(tmp_path):
    from collections import OrderedDict

    by_key = OrderedDict([(20, STACK[0].clone()), (3, torch.nn.Parameter(STACK[1].clone()))])
    vectors = read_vectors(saved(tmp_path / "v.pt", by_key))
    assert vectors.layers == (3, 20)
    assert torch.equal(vectors[3].direction, STACK[1])
    assert not vectors.directions.requires_grad


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_single_vector_takes_its_layer_from_the_caller_only(tmp_path, ending):
    for one in (STACK[2], STACK[2:3]):
        path = saved(tmp_path / f"layer_13.{ending}", one.clone())
        with pytest.raises(
            VectorFileError, match=r"one vector of 16 numbers and does not say its layer.*layers=\[13\]"
        ):
            read_vectors(path)
        for layers in ([13], 13, np.int64(13)):
            vectors = read_vectors(path, layers=layers)
            assert vectors.layers == (13,)
            assert torch.equal(vectors[13].direction, STACK[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_dtype_stays_what_it_is(tmp_path, dtype):
    vectors = read_vectors(saved(tmp_path / "v.pt", STACK.to(dtype)))
    assert vectors.directions.dtype == dtype
    assert torch.equal(vectors.directions.view(torch.uint8), STACK.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpys_byte_and_row_orders_do_not_matter(tmp_path, dtype, order):
    array = np.array(STACK.numpy(), dtype=dtype, order=order)
    np.save(tmp_path / "v.npy", array)
    assert np.array_equal(read_vectors(tmp_path / "v.npy").directions.numpy(), array)


def test_rows_that_are_views_or_expanded_are_read_as_they_look(tmp_path):
    for name, tensor in {"t": STACK.T.contiguous().T, "cut": STACK[:, ::2], "one": STACK[:1].expand(3, -1)}.items():
        assert torch.equal(read_vectors(saved(tmp_path / f"{name}.pt", tensor)).directions, tensor)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.ones(4, 16, dtype=torch.int64), r"holds \[4, 16\] numbers in int64.*save it as tensor.float\(\)"),
        (torch.ones(4, 16, dtype=torch.complex64), r"\[4, 16\] numbers in complex64"),
        (torch.ones(4, 16, dtype=torch.bool), r"\[4, 16\] numbers in bool"),
        (torch.tensor(1.0), r"holds \[\] numbers in float32: expected"),
        (torch.ones(0, 16), r"holds \[0, 16\] numbers"),
        (torch.ones(4, 1, 16), r"\[4, 1, 16\] numbers.*choose one position or head of each first"),
        (torch.tensor([[1.0, float("nan")], [1, float("inf")]]), "holds 2 NaN or infinite numbers"),
        (torch.ones(16, 4), r"16 rows of 4 numbers, more layers than d_model: .*save tensor.T, or give layers="),
        ({3: torch.ones(4), 5: torch.ones(5)}, "layer 3 has d_model=4 in float32, but layer 5 has d_model=5"),
        ({3: torch.ones(4), 5: torch.ones(4).half()}, "layer 5 has d_model=4 in float16"),
        ({3: torch.ones(4), "3": torch.ones(4)}, "holds layer 3 twice, the second time as '3'"),
        ({3: torch.ones(2, 4)}, r"holds \[2, 4\] numbers in float32 at 3: expected one finite vector"),
        ({-1: torch.ones(4), 3: torch.ones(4)}, "holds -1, expected keys that are block numbers"),
        ({True: torch.ones(4), 3: torch.ones(4)}, "holds True, expected keys"),
        ({"layer_3": torch.ones(4), "mean": torch.ones(4)}, "holds mean, expected keys"),
        ({"blocks.3.hook_resid_pre": torch.ones(4), 3: torch.ones(4)}, "holds blocks.3.hook_resid_pre, expected keys"),
        ({"layer_3_head_2": torch.ones(4), 3: torch.ones(4)}, "holds layer_3_head_2, expected keys"),
        ({"a": torch.ones(4), "b": torch.ones(4)}, "holds a, b, expected keys that are block numbers"),
        ({"layers": {3: torch.ones(4)}}, "holds layers, expected keys"),
        ({3: [1.0, 2.0]}, "holds a list at 3: expected a tensor"),
        ({}, "holds nothing, expected keys"),
        ([torch.ones(4), torch.ones(4)], "holds a list: expected a tensor"),
        ({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, "holds a model's weights, model.layers.0.mlp.up_p"),
        ({"weight": torch.ones(4, 4)}, "holds a model's weights, weight: models are loaded with load_model"),
        (torch.eye(4).to_sparse(), "pickle of objects, .*_rebuild_sparse_tensor"),
        (torch.empty(4, 4, device="meta"), "pickle of objects, .*_rebuild_meta_tensor"),
        (torch.ones(1).expand(2**40, 2**20), r"claims \[1099511627776, 1048576\] numbers"),
        (np.ones((4, 16)), r"pickle of objects, .*numpy.*save their tensors alone"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's about quantised and sparse tensors
def test_what_is_no_set_of_vectors_says_why(tmp_path, value, problem):
    torch.save(value, tmp_path / "v.pt")
    with pytest.raises(VectorFileError, match=r"v\.pt.*" + problem):
        read_vectors(tmp_path / "v.pt")


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.ones((4, 16), np.int32), r"holds \[4, 16\] numbers in int32; save it as array.astype\('float32'\)"),
        (np.ones((4, 16), np.complex128), "numbers in complex128"),
        (np.ones((4, 16), np.longdouble), "numbers in float128"),
        (np.array([{"a": 1}], dtype=object), "holds pickled objects, whose reading could run code"),
        (np.array(["a"]), "numbers in <U1"),
        (np.ones(3, dtype=[("x", "<f4")]), r"numbers in \[\('x'"),
        (np.float32(1), r"holds \[\] numbers in float32"),
        (np.array([[1, np.nan]], np.float32), "1 NaN or infinite"),
    ],
    ids=lambda value: str(getattr(value, "dtype", ""))[:12],
)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_numpys_files_of_other_things_say_why(tmp_path, array, problem, ending):
    path = tmp_path / f"v.{ending}"
    np.save(path, array) if ending == "npy" else np.savez(path, stack=array)
    with pytest.raises(VectorFileError, match=problem):
        read_vectors(path)


def test_arrays_that_numpy_named_itself_are_no_layers(tmp_path):
    np.savez(tmp_path / "v.npz", STACK[0].numpy(), STACK[1].numpy())
    with pytest.raises(VectorFileError, match="holds arr_0, arr_1, expected keys that are block numbers"):
        read_vectors(tmp_path / "v.npz")


@pytest.mark.parametrize(
    ("layers", "error", "problem"),
    [
        ([1, 2, 3], VectorFileError, "holds 4 rows, got 3 layers for them"),
        ([1, 1, 2, 3], ValueError, "must be different 0-based block numbers"),
        ([-1, 0, 1, 2], ValueError, "must be different 0-based block numbers"),
        ([], ValueError, "must be different 0-based block numbers"),
    ],
)
def test_layers_that_do_not_fit_are_refused(tmp_path, layers, error, problem):
    path = saved(tmp_path / "v.pt", STACK)
    with pytest.raises(error, match=problem):
        read_tensors(path, layers=layers)


def test_texts_and_fractions_are_no_layers():
    from inspect import unwrap  # the tests' own type checking would refuse these first

    for wrong in ("1234", [1.0, 2]):
        with pytest.raises(TypeError, match="must be whole numbers"):
            unwrap(tensor_files.as_layers)(wrong)


def test_a_file_that_says_its_layers_keeps_them(tmp_path):
    path = saved(tmp_path / "v.npz", {"layer_3": STACK[0], "layer_5": STACK[1]})
    assert read_vectors(path, layers=[5, 3]).layers == (3, 5)
    with pytest.raises(VectorFileError, match=r"says by its keys that its layers are 3, 5, not 3-4: leave layers= out"):
        read_vectors(path, layers=[3, 4])


def test_a_file_that_would_run_code_names_what_it_would_run_and_runs_nothing(tmp_path):
    trap = RunsCode(tmp_path / "it-ran")
    torch.save({3: torch.ones(4), 4: trap}, tmp_path / "a.pt")
    torch.save({3: torch.ones(4), 4: trap}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for protocol in (2, 4, 5):
        (tmp_path / f"c{protocol}.pt").write_bytes(pickle.dumps(trap, protocol=protocol))
    np.save(tmp_path / "d.npy", np.array([trap], dtype=object))
    np.savez(tmp_path / "e.npz", layer_3=np.array([trap], dtype=object))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(VectorFileError, match="reading could run code, so it was not read"):
            read_vectors(path)
    assert not (tmp_path / "it-ran").exists()


def test_headers_that_claim_more_than_the_file_has_are_refused_at_once(tmp_path):
    np.save(tmp_path / "v.npy", STACK.numpy())
    whole = (tmp_path / "v.npy").read_bytes()
    (tmp_path / "v.npy").write_bytes(whole.replace(b"(4, 16), }         ", b"(9000000000000, 9)}"))
    with pytest.raises(VectorFileError, match=r"\[9000000000000, 9\] numbers in float32 take 324000000000000 bytes"):
        read_vectors(tmp_path / "v.npy")


def test_an_archive_that_unpacks_to_more_than_vectors_take_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_BYTES", 2**20)  # of 2**30
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer_3.npy", bytes(2**21))
    (tmp_path / "v.npz").write_bytes(bomb.getvalue())
    with pytest.raises(VectorFileError, match="unpacks to 2097152 bytes: these are no steering vectors"):
        read_vectors(tmp_path / "v.npz")
