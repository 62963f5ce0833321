"""vllm-lens: its own class, its own JSON, and its own steering arithmetic, which runs without vLLM."""

import importlib
import json
import sys
from types import ModuleType

import pytest
import torch
from other_tools import log_probabilities, needs

from caa_lens.vectors.formats.vllm_lens_files import from_vllm_lens, to_vllm_lens
from caa_lens.vectors.interchange import read_vectors, write_vectors

vllm_lens = needs("vllm_lens")
TOKENS = torch.tensor([[1, 5, 9, 33, 7, 60]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_their_class_reads_our_file_exactly(pair, tmp_path, dtype):
    vectors = pair.vectors.at([1, 3]).to(dtype)
    text = write_vectors(vectors, tmp_path / "ours.json").read_text()
    theirs = vllm_lens.SteeringVector.model_validate(json.loads(text))
    assert theirs.activations.dtype == dtype
    assert torch.equal(theirs.activations, vectors.directions)
    assert (theirs.layer_indices, theirs.scale, theirs.norm_match) == ([1, 3], 1.0, False)


def test_our_file_has_the_very_fields_that_their_class_sends(pair, tmp_path):
    sent = json.loads(to_vllm_lens(pair.vectors).model_dump_json())
    written = json.loads(write_vectors(pair.vectors, tmp_path / "ours.json").read_text())
    for fields in (sent, written):
        fields["activations"].pop("data")  # compressed at another level
    assert written == sent


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_their_class_sends_with_the_scale_multiplied_in(tmp_path, dtype):
    activations = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = vllm_lens.SteeringVector(activations=activations, layer_indices=[7, 0, 20], scale=-0.5)
    (tmp_path / "wire.json").write_text(theirs.model_dump_json())
    for vectors in (read_vectors(tmp_path / "wire.json"), from_vllm_lens(theirs)):
        assert vectors.layers == (0, 7, 20)
        assert vectors.directions.dtype == dtype
        assert torch.equal(vectors.directions, -0.5 * activations[[1, 0, 2]])


def test_there_and_back_is_exact(pair):
    back = from_vllm_lens(to_vllm_lens(pair.vectors), behavior="warm", model="tiny")
    assert torch.equal(back.directions, pair.vectors.directions)
    assert (back.layers, back.behavior, back.provenance.model) == (pair.vectors.layers, "warm", "tiny")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"activations": torch.ones(2, 5, 4), "position_indices": [0, 1, 2, 3, 9]}, "a vector a position"),
        ({"activations": torch.ones(2, 4), "norm_match": True}, "norm_match"),
    ],
)
def test_what_a_fixed_vector_cannot_do_is_refused(tmp_path, options, problem):
    theirs = vllm_lens.SteeringVector(layer_indices=[1, 2], **options)
    (tmp_path / "wire.json").write_text(theirs.model_dump_json())
    with pytest.raises(ValueError, match=problem):
        read_vectors(tmp_path / "wire.json")
    with pytest.raises(ValueError, match=problem):
        from_vllm_lens(theirs)


@pytest.fixture
def their_arithmetic(monkeypatch):
    """`_apply_steering` of their worker, whose module imports two names of vLLM that it does not call."""
    for name in ("vllm", "vllm.forward_context", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    utils = ModuleType("vllm.model_executor.models.utils")
    utils.PPMissingLayer = object
    sys.modules["vllm.forward_context"].get_forward_context = None
    sys.modules["vllm.forward_context"].is_forward_context_available = None
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.delitem(sys.modules, "vllm_lens._worker_ext", raising=False)
    yield importlib.import_module("vllm_lens._worker_ext")._apply_steering
    sys.modules.pop("vllm_lens._worker_ext", None)


@pytest.mark.parametrize("layer", range(5))
def test_their_arithmetic_on_the_blocks_outputs_steers_as_our_hook(pair, their_arithmetic, layer):
    config = to_vllm_lens(pair.vectors.at([layer])).model_copy(update={"scale": 1.5})
    hooks = []
    for index, block in enumerate(pair.hf.model.layers):

        def hook(_module, _inputs, output, index=index):
            output = output.clone()
            their_arithmetic([config], index, output[0], 0, output.shape[1], 0, output[0])
            return output

        hooks.append(block.register_forward_hook(hook))
    try:
        with torch.no_grad():
            theirs = pair.hf(TOKENS).logits[:, -1].log_softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    ours = log_probabilities(pair.ours, TOKENS, pair.vectors[layer], multiplier=1.5)
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)
