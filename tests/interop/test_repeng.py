"""repeng: its own reader and writer of control vectors, and its own steering of a Hugging Face Llama."""

import copy
import warnings

import numpy as np
import pytest
import torch
from other_tools import log_probabilities, needs

from caa_lens.vectors.formats.control_vectors import DroppedLayerWarning
from caa_lens.vectors.interchange import read_vectors, write_vectors

with pytest.MonkeyPatch.context() as patch:
    # repeng 0.4.0 was written for numpy 1 and names a type that numpy 2 has dropped, in an annotation.
    patch.setattr(np, "float_", np.float64, raising=False)
    repeng = needs("repeng")
TOKENS = torch.tensor([[1, 5, 9, 33, 7, 60]])  # one row: repeng's padding mask is of another time's transformers


def theirs(pair, control, layers, coefficient=1.0):
    model = repeng.ControlModel(copy.deepcopy(pair.hf), layers)
    model.set_control(control, coefficient)
    with torch.no_grad():
        return model(TOKENS).logits[:, -1].log_softmax(-1)


@pytest.mark.parametrize("layer", range(1, 5))
def test_repeng_reads_our_file_and_steers_as_we_do_at_that_layer_and_no_other(pair, tmp_path, layer):
    path = write_vectors(pair.vectors.at([layer]), tmp_path / "ours.gguf")
    control = repeng.ControlVector.import_gguf(path)
    assert control.model_type == "llama"
    assert list(control.directions) == [layer]
    steered = theirs(pair, control, [layer], -1.5)
    ours = log_probabilities(pair.ours, TOKENS, pair.vectors[layer], multiplier=-1.5)
    torch.testing.assert_close(steered, ours, atol=1e-3, rtol=0)
    for other in {layer - 1, layer + 1} & set(range(5)):
        moved = pair.vectors[layer].at_layer(other)
        assert (steered - log_probabilities(pair.ours, TOKENS, moved, multiplier=-1.5)).abs().max() > 0.05


def test_repeng_reads_every_number_of_our_file(pair, tmp_path):
    with pytest.warns(DroppedLayerWarning, match="without layer 0"):
        path = write_vectors(pair.vectors, tmp_path / "ours.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        control = repeng.ControlVector.import_gguf(path)
    assert sorted(control.directions) == [1, 2, 3, 4]
    for layer, direction in control.directions.items():
        assert np.array_equal(direction, pair.vectors[layer].direction.numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_we_read_what_repeng_writes_in_any_order_and_with_layer_0(tmp_path, dtype):
    numbers = np.random.default_rng(0)
    directions = {layer: numbers.standard_normal(16).astype(dtype) for layer in (7, 0, 3)}
    path = tmp_path / "happy.gguf"
    repeng.ControlVector(model_type="llama", directions=directions).export_gguf(path)
    vectors = read_vectors(path)
    assert vectors.layers == (0, 3, 7)
    assert vectors.behavior == "happy"
    assert "llama" in vectors.provenance.details["source"]
    for layer, direction in directions.items():
        assert np.array_equal(vectors[layer].direction.numpy(), direction)


def test_a_vector_that_repeng_scaled_keeps_its_sign_and_size(tmp_path):
    control = repeng.ControlVector(model_type="llama", directions={2: np.arange(4, dtype=np.float32)})
    (-2 * control).export_gguf(tmp_path / "v.gguf")
    assert read_vectors(tmp_path / "v.gguf")[2].direction.tolist() == [0, -2, -4, -6]
