"""`start_offset=1`: steering starts one token later everywhere, as a plain loop with plain hooks has it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.models import random_vectors
from helpers.steering import adding, logits_of
from torch.testing import assert_close

from caa_lens import extract, generate, residual_lens, steer
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.interpretation import attribute_logits
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.prompt_formats import default_format, encode_answer, encode_letters
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.steered_runs import NothingSteeredWarning

OPTIONS = "\n\nChoices:\n (A) Yes\n (B) No"
AB = ContrastSet.from_pairs([("Good?" + OPTIONS, "(A)", "(B)"), ("Is it really so?" + OPTIONS, "(B)", "(A)")])
TEXT = ContrastSet.from_pairs(
    [
        ("How are you?", "Fine, thanks, and you?", "Bad."),
        ("Why?", "no", "It is so.\nAnd so on."),
        ("Well?", "\n\nNo", "Yes"),
    ]
)
QUESTION = "How was your day?"


@pytest.fixture
def later(tiny_chat):
    return replace(default_format(tiny_chat), start_offset=1)


def plain_logits(model, tokens, start, vector, multiplier):
    """One forward of everything, with a plain hook from a position on."""
    return logits_of(model, [list(tokens)], [adding(vector, start, multiplier)])[0]


def plain_score(model, fmt, pair, vector, multiplier):
    """The paper's p(matching), or the margin; steering from behind the instruction's last token."""
    usual, means = replace(fmt, start_offset=0), []
    if pair.is_ab:
        prompt, ids = encode_letters(usual, model.tokenizer, pair.question, (pair.positive[1], pair.negative[1]))
        p = plain_logits(model, prompt.tokens, prompt.steer_start + 1, vector, multiplier)[-1].softmax(-1)
        return p[ids[0]] / (p[ids[0]] + p[ids[1]])
    for answer in (pair.positive, pair.negative):
        prompt = encode_answer(usual, model.tokenizer, pair.question, answer)
        logp = plain_logits(model, prompt.tokens, prompt.steer_start + 1, vector, multiplier).log_softmax(-1)
        tokens = prompt.tokens[prompt.answer_start :]
        means.append(torch.stack([logp[prompt.answer_start + i - 1, t] for i, t in enumerate(tokens)]).mean())
    return means[0] - means[1]


@pytest.mark.parametrize("pairs", [AB, TEXT[:2], TEXT], ids=["letters", "completions", "one that merges"])
@pytest.mark.parametrize("hooked", [False, True], ids=["engine", "own forward"])
def test_scores_are_those_of_plain_hooks_one_token_later(pairs, hooked, tiny_chat, later):
    vectors = random_vectors(tiny_chat)
    cells = [(layer, m) for layer in (0, 3) for m in (-2.0, 0.0, 1.5)]
    conditions = [(Intervention(vector=vectors[layer], multiplier=m),) for layer, m in cells]
    if hooked:
        with (
            tiny_chat.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x)]),
            pytest.warns(SharedPrefixWarning),
        ):
            found = score_answers(tiny_chat, pairs, conditions, prompt_format=later, progress=False)
    else:
        # The engine's suffixes are steered throughout: an answer whose first token is predicted before them runs whole.
        told = pytest.warns(SharedPrefixWarning, match="begin before the first steered token")
        with nullcontext() if pairs is AB else told:
            found = score_answers(tiny_chat, pairs, conditions, prompt_format=later, progress=False)
    expected = [[plain_score(tiny_chat, later, pair, vectors[layer], m) for layer, m in cells] for pair in pairs]
    assert_close(found.values, torch.tensor(expected), atol=1e-4, rtol=0)
    assert found.settings["prompt_format"] == "chat-template [start_offset=1]"
    merges = pairs is TEXT
    with pytest.warns(SharedPrefixWarning) if merges else nullcontext():
        usual = score_answers(tiny_chat, pairs, conditions, progress=False)
    assert (usual.values - found.values).abs().max() > 1e-3  # so that the agreement is not vacuous


@pytest.mark.parametrize("use_cache", [True, False])
def test_texts_are_those_of_plain_hooks_one_token_later(use_cache, tiny_chat, later):
    vector = random_vectors(tiny_chat)[2]
    prompt = later.encode(tiny_chat.tokenizer, QUESTION)
    tokens = list(prompt.tokens)
    for _ in range(8):
        tokens.append(int(plain_logits(tiny_chat, tokens, len(prompt), vector, 4.0)[-1].argmax()))
    options = {"max_new_tokens": 8, "use_cache": use_cache}
    text = generate(tiny_chat, QUESTION, [(vector, 4.0)], prompt_format=later, **options)
    assert text == tiny_chat.tokenizer.decode(tokens[len(prompt) :])
    assert text == generate(tiny_chat, prompt, [(vector, 4.0)], **options)
    several = generate(tiny_chat, [prompt, later.encode(tiny_chat.tokenizer, "Why?")], [(vector, 4.0)], **options)
    assert several[0] == text
    assert text != generate(tiny_chat, QUESTION, [(vector, 4.0)], **options)


def test_a_block_steers_one_token_later_and_tells_of_a_prompt_without_an_answer(tiny_chat, later):
    vector = random_vectors(tiny_chat)[2]
    prompt = later.encode(tiny_chat.tokenizer, QUESTION, "Well, it")
    with torch.no_grad(), steer(tiny_chat, vector, prompt=prompt):
        steered = tiny_chat(torch.tensor([prompt.tokens]))[0]
    assert_close(steered, plain_logits(tiny_chat, prompt.tokens, prompt.answer_start, vector, 1.0), atol=1e-5, rtol=0)
    bare = later.encode(tiny_chat.tokenizer, QUESTION)
    with torch.no_grad(), pytest.warns(NothingSteeredWarning), steer(tiny_chat, vector, prompt=bare):
        tiny_chat(torch.tensor([bare.tokens]))


def test_extraction_does_not_steer_so_that_its_vectors_are_the_same(tiny_chat, later):
    usual, other = (extract(tiny_chat, AB, prompt_format=fmt, progress=False) for fmt in (None, later))
    assert torch.equal(usual.directions, other.directions)


def test_what_reads_a_prompt_of_which_nothing_is_steered_says_so(tiny_chat, later):
    vector = random_vectors(tiny_chat)[2]
    with pytest.raises(
        ValueError, match="behind the prompt, so that nothing of it is steered: give the beginning of an"
    ):
        residual_lens(tiny_chat, QUESTION, vectors=[vector], prompt_format=later)
    with pytest.raises(ValueError, match="nothing of it is steered"):
        attribute_logits(tiny_chat, [(QUESTION, " good", " bad")], vector, prompt_format=later, progress=False)
    attribute_logits(tiny_chat, AB, vector, prompt_format=later, progress=False)
