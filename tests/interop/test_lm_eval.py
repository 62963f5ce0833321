"""lm-evaluation-harness' model `steered`: its own class loads our file, and its numbers are held against ours."""

import copy

import pytest
import torch
from other_tools import log_probabilities, needs

from caa_lens.steering.steered_block import steer
from caa_lens.vectors.formats.lm_eval_files import AllPositionsWarning, write_lm_eval
from caa_lens.vectors.interchange import read_vectors

hf_steered = needs("lm_eval.models.hf_steered")
TOKENS = torch.tensor([[1, 5, 9, 33, 7, 60], [1, 40, 3, 3, 21, 8]])


@pytest.fixture(scope="module")
def demo(demo_model):
    """The demo model as a module of transformers and as ours, with a vector of a size that matters."""
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.models.loading.demo_model import demo_model_path
    from caa_lens.vectors.extraction import extract

    path = demo_model_path()
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    vectors = extract(demo_model, ContrastSet.load("sentiment").sample(8), layers=[13, 14, 15], progress=False)
    return SimpleNamespace(hf=hf, ours=demo_model, vectors=vectors, tokenizer=AutoTokenizer.from_pretrained(path))


def theirs(hf, tokenizer, path):
    """lm-eval's own model over a module that is loaded already."""
    return hf_steered.SteeredModel(
        pretrained=hf, tokenizer=tokenizer, steer_path=str(path), device="cpu", batch_size=1, dtype="float32"
    )


def written(vectors, path, multiplier):
    with pytest.warns(AllPositionsWarning):
        return write_lm_eval(vectors, path, multiplier=multiplier)


@pytest.mark.parametrize("multiplier", [-2.0, -1.0, 0.0, 1.0, 2.0])
def test_their_logits_and_ours_at_all_positions_are_the_same(demo, tmp_path, multiplier):
    model = theirs(demo.hf, demo.tokenizer, written(demo.vectors[14], tmp_path / "v.pt", multiplier))
    tokens = torch.tensor([demo.tokenizer("The food here was really quite good, I would say.")["input_ids"]])
    with torch.no_grad():
        found = model._model_call(tokens)
        plain = demo.hf(tokens).logits
    with torch.no_grad(), steer(demo.ours, demo.vectors[14], start=0, multiplier=multiplier):
        ours = demo.ours(tokens)
    torch.testing.assert_close(found.log_softmax(-1), ours.log_softmax(-1), atol=1e-3, rtol=0)
    assert (multiplier == 0) == torch.allclose(plain, found, atol=1e-3)
    if multiplier:
        for wrong in (demo.vectors[13].at_layer(15), demo.vectors[14].at_layer(13), demo.vectors[14].at_layer(15)):
            with torch.no_grad(), steer(demo.ours, wrong, start=0, multiplier=multiplier):
                assert (found.log_softmax(-1) - demo.ours(tokens).log_softmax(-1)).abs().max() > 0.05
        with torch.no_grad(), steer(demo.ours, demo.vectors[14], start=3, multiplier=multiplier):
            assert (found.log_softmax(-1) - demo.ours(tokens).log_softmax(-1))[:, -1].abs().max() > 0.01


@pytest.mark.parametrize("multiplier", [-2.0, 2.0])
def test_their_log_likelihood_of_an_answer_is_ours(demo, tmp_path, multiplier):
    from lm_eval.api.instance import Instance

    model = theirs(demo.hf, demo.tokenizer, written(demo.vectors[14], tmp_path / "v.pt", multiplier))
    context, answer = "Q: How was the dinner?\nA:", " It was the worst of my life."
    request = Instance(request_type="loglikelihood", doc={}, arguments=(context, answer), idx=0)
    ((found, _),) = model.loglikelihood([request], disable_tqdm=True)
    n = len(demo.tokenizer(context)["input_ids"])
    tokens = torch.tensor([demo.tokenizer(context + answer)["input_ids"]])
    with torch.no_grad(), steer(demo.ours, demo.vectors[14], start=0, multiplier=multiplier):
        logs = demo.ours(tokens).log_softmax(-1)[0, n - 1 : -1]
    assert found == pytest.approx(float(logs.gather(1, tokens[0, n:, None]).sum()), abs=1e-3)


def test_their_greedy_text_is_ours(demo, tmp_path):
    model = theirs(demo.hf, demo.tokenizer, written(demo.vectors[14], tmp_path / "v.pt", -2.0))
    context = demo.tokenizer("The movie that I saw last night was", return_tensors="pt")["input_ids"]
    found = model._model_generate(context, max_length=context.shape[1] + 12, stop=["\n\n\n"])[0]
    text = context
    with torch.no_grad(), steer(demo.ours, demo.vectors[14], start=0, multiplier=-2.0):
        for _ in range(12):
            text = torch.cat([text, demo.ours(text)[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == text[0].tolist()


@pytest.mark.parametrize("layer", range(5))
def test_a_file_steers_a_random_llama_at_its_layer_and_at_no_other(pair, tmp_path, layer):
    path = written(pair.vectors.at([layer]), tmp_path / "v.pt", -2.0)
    steered = their_steering(pair.hf, path)
    ours = log_probabilities(pair.ours, TOKENS, pair.vectors[layer], multiplier=-2.0)
    torch.testing.assert_close(steered, ours, atol=1e-3, rtol=0)
    for other in {layer - 1, layer + 1} & set(range(5)):
        moved = pair.vectors[layer].at_layer(other)
        assert (steered - log_probabilities(pair.ours, TOKENS, moved, multiplier=-2.0)).abs().max() > 0.05


def test_all_layers_of_a_file_act_at_once(pair, tmp_path):
    steered = their_steering(pair.hf, written(pair.vectors.at([1, 3]), tmp_path / "v.pt", 0.5))
    ours = log_probabilities(pair.ours, TOKENS, *pair.vectors.at([1, 3]), multiplier=0.5)
    torch.testing.assert_close(steered, ours, atol=1e-3, rtol=0)


def test_what_we_read_of_their_file_is_what_they_add(pair, tmp_path):
    """A file of their own users, with coefficients that differ."""
    entries = {
        f"layers.{vector.layer}": {
            "action": "add",
            "steering_vector": vector.direction.clone(),
            "steering_coefficient": vector.layer - 2.5,
        }
        for vector in pair.vectors
    }
    torch.save(entries, tmp_path / "v.pt")
    ours = log_probabilities(pair.ours, TOKENS, *read_vectors(tmp_path / "v.pt"))
    torch.testing.assert_close(their_steering(pair.hf, tmp_path / "v.pt"), ours, atol=1e-3, rtol=0)


def test_a_name_of_another_family_is_an_error_of_theirs_and_not_an_unsteered_run(pair, tmp_path):
    with pytest.warns(AllPositionsWarning):
        path = write_lm_eval(pair.vectors, tmp_path / "v.pt", model_type="gpt2")
    with pytest.raises(ValueError, match="Not all hookpoints could be resolved"):
        their_steering(pair.hf, path)


def their_steering(hf, path):
    """The steps of their class without its tokenizer: their parsing of the file, their hooks."""
    model = copy.copy(object.__new__(hf_steered.SteeredModel))
    model._model, model._device = hf, torch.device("cpu")
    setup = hf_steered.HFLM.__init__
    try:
        hf_steered.HFLM.__init__ = lambda self, **_: None
        model.__init__(pretrained="", steer_path=str(path))
    finally:
        hf_steered.HFLM.__init__ = setup
    with torch.no_grad():
        return model.forward(TOKENS).logits[:, -1].log_softmax(-1)
