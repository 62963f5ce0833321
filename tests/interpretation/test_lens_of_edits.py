"""The `effect` reading of operators and fitted methods, against plain hooks on whole texts."""

import dataclasses

import pytest
import torch
from helpers.device import there
from helpers.methods import PAIRS
from helpers.models import random_vectors
from helpers.steering import logits_of, streams
from torch.testing import assert_close

from caa_lens.engine.operators import OPERATORS
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.engine.stream_responses import ReadPrompt
from caa_lens.interpretation.lens import logit_lens, word_ranks
from caa_lens.interpretation.lens_edits import method_acting
from caa_lens.interpretation.lens_options import LensOptions
from caa_lens.methods import actadd, instruction, linear_act, sadi
from caa_lens.prompts.prompt_formats import Prompt

TOKENS = ([3, 9, 17, 22, 40, 8, 31], [5, 6, 9, 1, 30, 12], [44, 2, 19, 7, 7])
PROMPTS = [dataclasses.replace(Prompt.from_tokens(some), steer_start=2, answer_start=4) for some in TOKENS]
OPTIONS = {"reading": "effect", "prompts": PROMPTS, "progress": False, "controls": 0}


def scores_of(lens, layer):
    frame = lens.frame[(lens.frame["layer"] == layer) & (lens.frame["side"] == "promoted")]
    return torch.tensor(frame.sort_values("token_id")["score"].to_numpy(), dtype=torch.float32)


def effect_by_hand(model, edit, layer, first):
    """Mean change of log p at the positions that predict the answer's first three tokens, at most."""
    told = []
    for prompt in PROMPTS:
        tokens, begins = [list(prompt.tokens)], first(prompt)

        def hook(h, hook, begins=begins):
            h = h.clone()
            h[:, begins] = edit(h[:, begins])
            return h

        steered, plain = (
            logits_of(model, tokens, hooks)[0].log_softmax(-1)
            for hooks in ([(f"blocks.{layer}.hook_resid_post", hook)], [])
        )
        stop = min(len(prompt.tokens) - 1, prompt.answer_start + 2)
        told.append((steered - plain)[prompt.answer_start - 1 : stop].mean(0))
    return torch.stack(told).mean(0)


def from_the_end(prompt):
    return slice(prompt.steer_start, None)


@pytest.mark.parametrize("operator", ["ablate", "set", "add_keep_norm", "mine"])
def test_any_operator_is_read_as_a_plain_hook_would_have_it(tiny, operator):
    vectors = random_vectors(tiny)
    formula = OPERATORS[operator].formula if operator != "mine" else lambda h, p, s: h * (1 + s * p["direction"])
    named = formula if operator == "mine" else operator
    lens = logit_lens(tiny, vectors, k=tiny.cfg.d_vocab, operator=named, multiplier=0.7, **OPTIONS)
    for layer in (0, 2, tiny.cfg.n_layers - 1):
        parts = there({"direction": vectors[layer].direction})
        slow = effect_by_hand(tiny, lambda h, p=parts: formula(h, p, torch.tensor(0.7)), layer, from_the_end)
        assert_close(scores_of(lens, layer), slow, atol=2e-5, rtol=1e-4)
        assert slow.abs().max() > 1e-3


def test_added_vectors_at_all_positions_run_in_full_and_say_so(tiny):
    v = random_vectors(tiny)[1]
    with pytest.warns(SharedPrefixWarning):
        lens = logit_lens(tiny, v, k=tiny.cfg.d_vocab, positions="all", **OPTIONS)
    slow = effect_by_hand(tiny, lambda h: h + v.direction, 1, lambda prompt: slice(None))
    assert_close(scores_of(lens, 1), slow, atol=2e-5, rtol=1e-4)
    assert lens.settings["positions"] == "all"


def test_a_fitted_map_is_read_as_a_plain_hook_would_have_it(tiny_chat):
    for layer in (1, 3):
        fitted = linear_act.fit(tiny_chat, PAIRS, layers=[layer], progress=False)
        lens = logit_lens(tiny_chat, fitted, k=tiny_chat.cfg.d_vocab, multiplier=0.5, **OPTIONS)
        (one,) = fitted.interventions(0.5)
        formula, parameters = OPERATORS[one.operator].formula, there(one.parameters)
        slow = effect_by_hand(
            tiny_chat, lambda h, p=parameters, f=formula: f(h, p, torch.tensor(0.5)), layer, from_the_end
        )
        assert_close(scores_of(lens, layer), slow, atol=3e-5, rtol=1e-3)


def test_a_fitted_method_has_controls_as_long_as_its_mean_change(tiny_chat):
    fitted = instruction.fit(
        tiny_chat, ["Say it.", "Why?", "Who?"], instruction="Use capitals.", layers=[2], progress=False
    )
    ranks = word_ranks(tiny_chat, fitted, ["a", "b"], **(OPTIONS | {"controls": 19}))
    assert {"control_low", "control_high", "percentile"} <= set(ranks.frame.columns)
    lens = logit_lens(tiny_chat, fitted, k=5, **(OPTIONS | {"controls": 19}))
    assert lens.frame["linearity"].abs().max() <= 1 + 1e-6
    assert "verdict" in lens.frame


def test_the_controls_are_as_long_as_the_mean_change_and_the_push_is_its_mean(tiny_chat):
    fitted = linear_act.fit(tiny_chat, PAIRS, layers=[2], progress=False)
    read = [ReadPrompt(prompt=one, first=one.answer_start - 1, stop=len(one.tokens)) for one in PROMPTS]
    asked = LensOptions.of(
        **dict.fromkeys(("pairs", "prompts", "place", "prompt_format")),
        reading="effect",
        multiplier=0.5,
        background=0,
        controls=3,
        seed=0,
    )
    acting, steps = method_acting(tiny_chat, fitted, [2], read, asked)
    (one,) = fitted.interventions(0.5)
    formula, changes = OPERATORS[one.operator].formula, []
    for prompt in PROMPTS:
        h = streams(tiny_chat, [list(prompt.tokens)])[2][0, prompt.steer_start :]
        changes.append(formula(h, there(one.parameters), torch.tensor(0.5)) - h)
    changes = torch.cat(changes)
    assert_close(steps[0, 0], changes.mean(0), atol=1e-5, rtol=1e-4)
    lengths = steps[0, 1:].norm(dim=-1)
    assert_close(lengths, changes.norm(dim=-1).mean().expand(3), atol=1e-5, rtol=1e-4)
    assert float(changes.mean(0).norm()) < 0.99 * float(lengths[0])  # so that these two are told apart
    assert [len(some) for some in acting] == [4]


@pytest.mark.parametrize("method", ["front", "neurons"])
def test_positions_and_sites_of_their_own_are_read_in_full(tiny_chat, method):
    if method == "front":
        fitted = actadd.fit(tiny_chat, "Love", "Hate", layers=[1])
        options = OPTIONS | {"positions": "original"}
        prompts = [dataclasses.replace(Prompt.from_tokens([*range(3, 20)]), steer_start=10, answer_start=12)]
        options["prompts"] = prompts
    else:
        fitted, options = sadi.fit(tiny_chat, PAIRS, layers=[1], k=3, site="neurons", progress=False), OPTIONS
    with pytest.warns(SharedPrefixWarning):
        lens = logit_lens(tiny_chat, fitted, k=4, multiplier=3.0, **(options | {"controls": 2}))
    assert lens.frame["score"].abs().max() > 0


def test_what_cannot_be_read_is_refused(tiny):
    v = random_vectors(tiny)[1]
    with pytest.raises(ValueError, match="reading='effect'"):
        logit_lens(tiny, v, reading="causal", prompts=PROMPTS, operator="ablate")
    with pytest.raises(ValueError, match="reading='effect'"):
        logit_lens(tiny, v, positions="all")


def test_a_fitted_method_has_no_projection(tiny_chat):
    fitted = linear_act.fit(tiny_chat, PAIRS, layers=[1], progress=False)
    with pytest.raises(ValueError, match="no direction"):
        logit_lens(tiny_chat, fitted)
    with pytest.raises(ValueError, match="leave operator out"):
        logit_lens(tiny_chat, fitted, operator="set", **OPTIONS)
    with pytest.raises(ValueError, match="changes the stream"):
        logit_lens(tiny_chat, fitted, multiplier=1e-30, **OPTIONS)
