"""ActAdd's laws, each of which holds for any model."""

import copy

import pytest
import torch
from helpers.methods import assert_comes_back
from helpers.models import kinds_here, tiny_model
from helpers.steering import LOGITS, Kept, logits_of
from torch.testing import assert_close

from caa_lens.methods.actadd import fit
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.steered_block import steer

PLUS, MINUS = [1, 7, 30, 12, 9], [1, 44, 3, 21, 50]
PROMPT = Prompt.from_tokens([1, 20, 21, 22, 23, 24, 25, 26])


@pytest.fixture(scope="module")
def small():
    return tiny_model(kind=kinds_here()[0])


def steered(model, interventions, prompt):
    with steer(model, *interventions, prompt=prompt):
        return logits_of(model, [prompt.tokens])


def test_the_block_is_the_difference_position_by_position_and_zero_at_bos(small):
    fitted = fit(small, PLUS, MINUS, layers=[0, 2, 4])
    _, plus = small.run_with_cache(torch.tensor([PLUS]))
    _, minus = small.run_with_cache(torch.tensor([MINUS]))
    for row, layer in enumerate((0, 2, 4)):
        assert_close(fitted.block[row], (plus["resid_post", layer] - minus["resid_post", layer])[0], atol=1e-5, rtol=0)
        assert torch.equal(fitted.block[row, 0], torch.zeros(32))
        assert float(fitted.block[row, 1:].norm(dim=-1).min()) > 0.1


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_steering_the_negative_prompt_itself_at_strength_1_gives_the_positive_ones_logits(small, layer):
    made = fit(small, PLUS, MINUS, layers=[layer]).interventions(1.0, positions="original")
    expected, before = logits_of(small, [PLUS]), logits_of(small, [MINUS])
    found = steered(small, made, Prompt.from_tokens(MINUS))
    # Of the last token only what is before it in keys and values of the changed layers' blocks differs: at layer 0
    # and above everything that follows is computed from the positive prompt's stream.
    assert_close(found, expected, atol=5e-4, rtol=1e-4)
    assert float((before - expected).abs().max()) > 0.1


@pytest.mark.parametrize("layer", range(5))
def test_on_both_kinds_of_model_the_negative_prompt_becomes_the_positive_one_whole_and_token_by_token(tiny, layer):
    made = fit(tiny, PLUS, MINUS, layers=[layer]).interventions(1.0, positions="original")
    prompt, expected = Prompt.from_tokens(MINUS), logits_of(tiny, [PLUS])
    assert_close(steered(tiny, made, prompt), expected, atol=5e-4, rtol=1e-4)
    text, tokens = Kept(tiny), torch.tensor([MINUS])
    with steer(tiny, *made, prompt=prompt):
        pieces = [text(tokens[:, i : i + 1]) for i in range(len(MINUS))]
    assert_close(torch.cat(pieces, dim=1), expected, atol=5e-4, rtol=1e-4)
    assert float((logits_of(tiny, [MINUS]) - expected).abs().max()) > 0.1


def test_texts_that_do_not_begin_alike_are_refused_and_a_tokenizer_without_bos_has_its_end_there(
    small, tiny_chat, monkeypatch
):
    with pytest.raises(ValueError, match=r"the texts begin with tokens 7 and 44, expected the same one: .* with BOS"):
        fit(small, PLUS[1:], MINUS[1:], layers=[1])
    tokenizer = copy.deepcopy(tiny_chat.tokenizer)
    tokenizer.bos_token = None
    monkeypatch.setattr(tiny_chat, "tokenizer", tokenizer)
    found = fit(tiny_chat, "Love", "Hate", layers=[1])
    end = tokenizer.eos_token_id
    ids = [[end, *tokenizer(text, add_special_tokens=False).input_ids] for text in ("Love", "Hate")]
    assert torch.equal(found.block, fit(tiny_chat, *ids, layers=[1]).block)
    assert torch.equal(found.block[:, 0], torch.zeros(1, 32))


def test_the_same_text_twice_or_strength_0_is_the_identity_bit_for_bit(small):
    same, other = fit(small, PLUS, PLUS, layers=[2]), fit(small, PLUS, MINUS, layers=[2])
    plain = logits_of(small, [PROMPT.tokens])
    assert torch.equal(steered(small, same.interventions(3.0, positions="original"), PROMPT), plain)
    for positions in ("original", "caa", "all"):
        assert torch.equal(steered(small, other.interventions(0.0, positions=positions), PROMPT), plain)


def test_texts_exchanged_and_the_sign_turned_are_the_same(small):
    one, other = fit(small, PLUS, MINUS, layers=[2]), fit(small, MINUS, PLUS, layers=[2])
    a = steered(small, one.interventions(2.0, positions="original"), PROMPT)
    b = steered(small, other.interventions(-2.0, positions="original"), PROMPT)
    assert_close(a, b, **LOGITS)


def test_behind_a_block_is_the_input_of_the_next(small):
    fitted = fit(small, PLUS, MINUS, layers=[2])

    def at_input(resid, hook):
        return torch.cat([resid[:, :5] + 1.5 * fitted.block[0], resid[:, 5:]], dim=1)

    expected = logits_of(small, [PROMPT.tokens], [("blocks.3.hook_resid_pre", at_input)])
    assert_close(steered(small, fitted.interventions(1.5, positions="original"), PROMPT), expected, **LOGITS)


def test_everywhere_is_the_mean_behind_bos_from_the_instructions_end_on(small):
    fitted = fit(small, PLUS, MINUS, layers=[2])
    (made,) = fitted.interventions(1.5)
    assert made.positions == "caa"
    assert torch.equal(made.parameters["direction"], fitted.block[0, 1:].mean(0))


def test_the_front_is_hit_in_the_prefill_only_and_a_shorter_prompt_is_refused(small):
    made = fit(small, PLUS, MINUS, layers=[2]).interventions(1.5, positions="original")
    for use_cache in (True, False):
        found = list(generate_tokens(small, [PROMPT], vectors=made, max_new_tokens=3, use_cache=use_cache))
        tokens = list(PROMPT.tokens)
        for one in found:
            assert int(steered(small, made, Prompt.from_tokens(tokens))[0, -1].argmax()) == int(one)
            tokens.append(int(one))
    with pytest.raises(ValueError, match="the prompt has 4 tokens, fewer than the 5 positions"):
        steer(small, *made, prompt=Prompt.from_tokens(PLUS[:4]))


def test_texts_are_padded_with_a_space_on_the_right_behind_bos(tiny_chat):
    fitted = fit(tiny_chat, "Love", "I hate all of this", layers=[1])
    tokenizer = tiny_chat.tokenizer
    space = tokenizer(" ", add_special_tokens=False).input_ids
    long = [tokenizer.bos_token_id, *tokenizer("I hate all of this", add_special_tokens=False).input_ids]
    short = [tokenizer.bos_token_id, *tokenizer("Love", add_special_tokens=False).input_ids]
    by_hand = fit(tiny_chat, short + space * (len(long) - len(short)), long, layers=[1])
    assert torch.equal(fitted.block, by_hand.block)
    assert fitted.block.shape[1] == len(long)


def test_what_cannot_be_padded_or_has_no_position_is_refused(small, tiny_chat):
    with pytest.raises(ValueError, match="the texts have 5 and 3 tokens, expected as many in both: give pad=' '"):
        fit(small, PLUS, MINUS[:3], layers=[1], pad=None)
    with pytest.raises(ValueError, match="pad=' and so on' is 3 tokens of this tokenizer"):
        fit(tiny_chat, "Love", "I hate this", layers=[1], pad=" and so on")
    with pytest.raises(ValueError, match="no token behind the first"):
        fit(small, [1], [1], layers=[1])


def test_it_is_saved_and_read_back(tiny_chat, tmp_path):
    assert_comes_back(fit(tiny_chat, "Love", "Hate it", layers=[1, 3]), tmp_path / "a.safetensors")
