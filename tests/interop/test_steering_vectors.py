"""The package steering-vectors: its own patching of a Hugging Face Llama against our hooks."""

import pytest
import torch
from other_tools import log_probabilities, needs

from caa_lens.vectors.interchange import from_steering_vectors, to_steering_vectors

steering_vectors = needs("steering_vectors")
TOKENS = torch.tensor([[1, 5, 9, 33, 7, 60], [1, 40, 3, 3, 21, 8]])


def theirs(pair, vector, multiplier=1.0):
    with torch.no_grad(), vector.apply(pair.hf, multiplier=multiplier):
        return pair.hf(TOKENS).logits[:, -1].log_softmax(-1)


def test_without_a_vector_both_models_agree(pair):
    torch.testing.assert_close(
        pair.hf(TOKENS).logits[:, -1].log_softmax(-1).detach(),
        log_probabilities(pair.ours, TOKENS),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("multiplier", [-2.0, 1.0])
def test_a_vector_steers_both_libraries_alike_at_its_layer_and_at_no_other(pair, layer, multiplier):
    object_ = to_steering_vectors(pair.vectors.at([layer]))
    steered = theirs(pair, object_, multiplier)
    ours = log_probabilities(pair.ours, TOKENS, pair.vectors[layer], multiplier=multiplier)
    torch.testing.assert_close(steered, ours, atol=1e-3, rtol=0)
    for other in {layer - 1, layer + 1} & set(range(5)):
        moved = pair.vectors[layer].at_layer(other)
        assert (steered - log_probabilities(pair.ours, TOKENS, moved, multiplier=multiplier)).abs().max() > 0.05


def test_all_layers_at_once_steer_alike(pair):
    chosen = pair.vectors.at([1, 3])
    ours = log_probabilities(pair.ours, TOKENS, *chosen)
    torch.testing.assert_close(theirs(pair, to_steering_vectors(chosen)), ours, atol=1e-3, rtol=0)


def test_their_own_training_gives_a_vector_that_steers_alike_in_ours(pair):
    class Tokenizer:
        """The least that their training asks of a tokenizer: words are token ids."""

        pad_token_id = 0
        padding_side = "left"

        def __call__(self, texts, **_):
            rows = torch.tensor([[int(word) for word in text.split()] for text in texts])
            return Batch({"input_ids": rows, "attention_mask": torch.ones_like(rows)})

    class Batch(dict):
        def to(self, _device):
            return self

    samples = [("1 5 9", "1 5 40"), ("1 8 12", "1 8 44"), ("1 30 2", "1 30 7")]
    trained = steering_vectors.train_steering_vector(
        pair.hf, Tokenizer(), samples, layers=[1, 3], read_token_index=-1, show_progress=False
    )
    vectors = from_steering_vectors(trained, behavior="trained", model="tiny")
    assert (vectors.layers, vectors.behavior, vectors.provenance.model) == ((1, 3), "trained", "tiny")
    ours = log_probabilities(pair.ours, TOKENS, *vectors)
    torch.testing.assert_close(theirs(pair, trained), ours, atol=1e-3, rtol=0)


def test_there_and_back_is_exact(pair):
    back = from_steering_vectors(to_steering_vectors(pair.vectors.at([1, 4])))
    assert back.layers == (1, 4)
    assert torch.equal(back.directions, pair.vectors.at([1, 4]).directions)


def test_the_object_shares_no_memory_with_our_vectors(pair):
    object_ = to_steering_vectors(pair.vectors)
    before = pair.vectors.directions.clone()
    object_.layer_activations[2].zero_()
    assert torch.equal(pair.vectors.directions, before)


def test_a_vector_for_another_place_in_the_block_is_refused():
    vector = steering_vectors.SteeringVector({1: torch.ones(4)}, layer_type="mlp")
    with pytest.raises(ValueError, match="steers 'mlp', expected 'decoder_block'"):
        from_steering_vectors(vector)
    with pytest.raises(ValueError, match="0-based block number, got -1"):
        from_steering_vectors(steering_vectors.SteeringVector({-1: torch.ones(4)}))
