"""The twin is right by itself, and the checks are right where the package is known to be: on a `HookedTransformer`."""

import pytest
import torch
from helpers.families import DECODERS, RECURRENT, WINDOWED, demo_tokenizer, hf_of, transformer_lens
from helpers.family_checks import AB, LONG, TEXTS, Case, assert_near, by_name, outcome
from helpers.family_twins import Twin, text_of

import caa_lens as cl
from caa_lens.prompts.prompt_formats import chat_template_format


@pytest.fixture(scope="module", params=[*DECODERS, *RECURRENT])
def twin(request):
    return Twin(hf_of(request.param), demo_tokenizer())


def test_a_twins_streams_and_logits_are_those_of_transformers(twin):
    tokens = twin.text(LONG).tokens
    with torch.no_grad():
        own = twin.hf(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    run = twin.run(tokens)
    assert torch.equal(run.logits, own.logits[0])
    first = 0 if twin.hf.config.model_type == "mamba" else 1  # which does not show its embeddings
    for layer in range(twin.n_layers - 1):  # the last one is shown behind the final norm
        assert torch.equal(run.streams[layer], own.hidden_states[layer + first][0])
        assert (run.streams[layer + 1] - run.streams[layer]).norm() > 0.1 * run.streams[layer].norm()


def test_a_state_put_in_the_place_of_the_last_blocks_output_gives_the_models_logits(twin):
    run = twin.run(twin.text(LONG).tokens)
    assert_near(twin.tail(run.streams[-1]), run.logits)


def test_what_the_twin_makes_of_a_state_is_linear_but_for_the_norms_scale(twin):
    one, other = torch.randn(2, twin.width, generator=torch.Generator().manual_seed(0))
    both = twin.linear(torch.stack([one, other, one - 2 * other]))
    assert_near(both[2], both[0] - 2 * both[1], relative=3e-5)
    state = 3 * one[None]
    assert_near(twin.linear(state) / twin.scales(state)[:, None], twin.uncapped(state), relative=3e-5)


def test_texts_are_longer_than_every_window():
    assert len(WINDOWED) >= 7
    assert len(text_of(demo_tokenizer(), "Why?").tokens) > 20


def test_texts_of_the_twin_have_the_packages_tokens_and_positions():
    tokenizer = demo_tokenizer()
    for question, answer in [(LONG, ""), *[(pair.question, pair.positive) for pair in (*AB, *TEXTS)]]:
        prompt = chat_template_format(tokenizer).encode(tokenizer, question, answer)
        text = text_of(tokenizer, question, answer)
        assert list(prompt.tokens) == text.tokens
        assert prompt.steer_start == text.start


@pytest.fixture(scope="module")
def hooked(tmp_path_factory):
    """The Llama of the matrix as a `HookedTransformer`, which TransformerLens 4 no longer has."""
    if transformer_lens() != "3":
        pytest.skip("this TransformerLens has no HookedTransformer")
    folder, hf = tmp_path_factory.mktemp("llama3"), hf_of("llama3")
    hf.save_pretrained(folder)
    demo_tokenizer().save_pretrained(folder)
    return Case(name="llama3", model=cl.load_model(str(folder), dtype="float32"), twin=Twin(hf, demo_tokenizer()))


@by_name
def test_every_check_passes_on_a_hooked_transformer(hooked, check):
    found = outcome(hooked, check)
    assert not found.refused
    assert not found.slow
