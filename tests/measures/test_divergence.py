"""Divergence by token against a slow twin: the model's own forward on one text at a time, and the sum written out."""

import pytest
import torch
from helpers.models import random_vectors
from torch.testing import assert_close

from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.measures.divergence import answered, token_kl
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention

QUESTIONS = ["Why?", "How was your long day at work?", "Name a bird."]


@pytest.fixture(scope="module")
def texts(tiny_chat):
    prompts = [Prompt.of(tiny_chat, question) for question in QUESTIONS]
    return answered(tiny_chat, prompts, max_new_tokens=5, progress=False)


def logp_of(model, prompt, vector=None, strength=0.0, first=None):
    tokens = torch.tensor([prompt.tokens])

    def add(resid, hook):
        at = (torch.arange(resid.shape[1]) >= (prompt.steer_start if first is None else first))[:, None]
        return torch.where(at, resid + strength * vector.direction, resid)

    hooks = [] if vector is None else [(f"blocks.{vector.layer}.hook_resid_post", add)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(tokens, attention_mask=torch.ones_like(tokens))[0]
    return logits[prompt.answer_start - 1 : -1].double().log_softmax(-1)


def by_hand(p, q):
    """Torch's own divergence, which takes what is weighed second, token by token in float64."""
    rows = zip(p, q, strict=True)
    return torch.stack([torch.nn.functional.kl_div(b, a, reduction="sum", log_target=True) for a, b in rows])


def test_answers_are_the_tokens_that_are_generated(tiny_chat, texts):
    steps = generate_tokens(tiny_chat, [Prompt.of(tiny_chat, QUESTIONS[1])], max_new_tokens=5)
    row = [int(step) for step in steps]
    assert list(texts[1].tokens[texts[1].answer_start :]) == row[: len(texts[1].tokens) - texts[1].answer_start]
    assert texts[1].tokens[: texts[1].answer_start] == Prompt.of(tiny_chat, QUESTIONS[1]).tokens


@pytest.mark.parametrize("max_tokens", [None, 8])
def test_each_token_has_the_divergence_of_the_models_own_distributions(tiny_chat, texts, max_tokens):
    vectors = random_vectors(tiny_chat, scale=2.0)
    cells = [(1, 1.0), (3, -2.0), (1, 0.0), (3, 0.5)]
    conditions = [(Intervention(vector=vectors[layer], multiplier=m),) for layer, m in cells]
    found = token_kl(tiny_chat, texts, conditions, max_tokens=max_tokens, progress=False)
    reverse = token_kl(tiny_chat, texts, conditions, weighed_by="steered", max_tokens=max_tokens, progress=False)
    for i in (0, 2):
        plain = logp_of(tiny_chat, texts[i])
        for row, (layer, m) in enumerate(cells):
            steered = logp_of(tiny_chat, texts[i], vectors[layer], m)
            assert_close(found[i][row].double(), by_hand(plain, steered), atol=2e-5, rtol=1e-3)
            assert_close(reverse[i][row].double(), by_hand(steered, plain), atol=2e-5, rtol=1e-3)
    assert all(float(one[2].abs().max()) < 1e-6 for one in found)  # a strength of 0
    assert all(float(one[0].min()) > 1e-3 for one in found)


def test_what_changes_the_prompt_runs_in_full_and_is_told(tiny_chat, texts):
    vector = random_vectors(tiny_chat, scale=2.0)[2]
    conditions = [(Intervention(vector=vector, positions="all"),), (Intervention(vector=vector),)]
    with pytest.warns(SharedPrefixWarning, match="1 of 2 conditions change the prompt"):
        found = token_kl(tiny_chat, texts[:1], conditions, progress=False)
    plain = logp_of(tiny_chat, texts[0])
    for row, first in enumerate((0, None)):
        steered = logp_of(tiny_chat, texts[0], vector, 1.0, first)
        assert_close(found[0][row].double(), by_hand(plain, steered), atol=2e-5, rtol=1e-3)


def test_another_prompt_with_the_same_answer_is_compared_token_by_token(tiny_chat, texts):
    told = Prompt.of(tiny_chat, QUESTIONS[1], system="Answer in a gloomy way.")
    answer = texts[1].tokens[texts[1].answer_start :]
    own = Prompt(
        text="",
        tokens=(*told.tokens, *answer),
        steer_start=told.steer_start,
        answer_start=len(told),
        read=(len(told), len(told) + len(answer)),
    )
    (found,) = token_kl(tiny_chat, [own], [()], against=[texts[1]], progress=False)
    assert_close(
        found[0].double(), by_hand(logp_of(tiny_chat, texts[1]), logp_of(tiny_chat, own)), atol=2e-5, rtol=1e-3
    )
    with pytest.raises(ValueError, match="have other answers: give the same tokens to both"):
        token_kl(tiny_chat, [own], [()], against=[texts[0]], progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts given"),
        ({"conditions": []}, "no conditions given"),
        ({"weighed_by": "both"}, "unknown weighed_by='both': expected one of unsteered, steered"),
        ({"prompts": [Prompt.from_tokens([1, 2, 3])]}, "has no answer"),
    ],
)
def test_bad_input_is_told_with_what_to_give(tiny_chat, texts, change, message):
    given = {"prompts": texts, "conditions": [()], "progress": False} | change
    prompts, conditions = given.pop("prompts"), given.pop("conditions")
    with pytest.raises(ValueError, match=message):
        token_kl(tiny_chat, prompts, conditions, **given)
