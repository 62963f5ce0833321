"""Files of fitted methods: told apart, proven, and written whole or not at all."""

import pytest
import torch

from caa_lens.methods.fitted import load_fitted
from caa_lens.methods.inferaligner import InferAligner
from caa_lens.methods.linear_act import LinearAct
from caa_lens.provenance import Provenance
from caa_lens.vectors.interchange import read_vectors


def a_map(**other):
    rows = torch.arange(12.0).reshape(2, 6)
    about = Provenance(model="a/b", behavior="sentiment", method="Linear-AcT, linear", details={"torch": "2"})
    fields = {"scale": rows + 1, "shift": -rows, "low": rows - 9, "high": rows + 9, "layers": (3, 7)}
    return LinearAct(**{**fields, "provenance": about, "settings": {"kind": "linear"}, **other})


def test_a_file_is_read_as_what_it_is_without_being_told(tmp_path):
    path = a_map().save(tmp_path / "map.safetensors")
    found = load_fitted(path)
    assert isinstance(found, LinearAct)
    assert torch.equal(found.shift, a_map().shift)
    with pytest.raises(ValueError, match=r"holds a LinearAct, expected a InferAligner: LinearAct.load reads it"):
        InferAligner.load(path)


def test_the_same_again_is_the_same_file(tmp_path):
    one, other = (a_map().save(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert one == other


def test_a_changed_byte_anywhere_is_told(tmp_path):
    path = a_map().save(tmp_path / "map.safetensors")
    data = bytearray(path.read_bytes())
    for place in (len(data) - 3, data.index(b"sentiment")):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged, or was edited"):
            LinearAct.load(path)
    path.write_bytes(data[:-20])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        LinearAct.load(path)


def test_other_files_are_told_from_fitted_methods(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_fitted(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"saved as .safetensors, got 'map.pt'"):
        a_map().save(tmp_path / "map.pt")
    from helpers.vectors import random_set

    vectors = random_set().save(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="holds no fitted method: read_vectors reads vectors"):
        load_fitted(vectors)
    with pytest.raises(ValueError, match="not written by this library"):
        read_vectors(a_map().save(tmp_path / "map.safetensors"))


def test_a_save_that_breaks_off_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = a_map().save(tmp_path / "map.safetensors")
    before = path.read_bytes()
    from caa_lens import atomic_files

    def interrupted(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files, "_to_disk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        a_map(kind="mean").save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["map.safetensors"]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    broken = a_map()
    object.__setattr__(broken, "settings", {"kind": 3})
    with pytest.raises(ValueError, match="settings cannot be saved"):
        broken.save(tmp_path / "map.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_rows_and_layers_must_go_together():
    with pytest.raises(ValueError, match=r"scale has 2 rows for 1 layers, 3"):
        a_map(layers=(3,))
    with pytest.raises(ValueError, match="layers must be some, distinct and ascending"):
        a_map(layers=(7, 3))
