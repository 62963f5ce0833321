"""Instruction steering: its direction and values against their formulas, and what pulling does to a stream."""

import pytest
import torch
from helpers.methods import PAIRS, assert_comes_back
from helpers.steering import logits_of
from torch.testing import assert_close

from caa_lens.methods.instruction import fit, fit_direction
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.steered_block import steer
from caa_lens.vectors.extraction import extract

QUESTIONS = ["How was your day?", "What is rain?", "Why do birds sing in the morning?"]
DRAW = torch.Generator().manual_seed(0)


def test_a_shift_along_a_direction_is_found_with_its_length():
    without = torch.randn(20, 8, generator=DRAW, dtype=torch.float64)
    unit = torch.nn.functional.normalize(torch.randn(8, generator=DRAW, dtype=torch.float64), dim=0)
    found, above, below = fit_direction(without + 3 * unit, without)
    assert_close(found, unit, atol=1e-12, rtol=0)
    assert above - below == pytest.approx(3.0, abs=1e-12)
    with pytest.raises(ValueError, match="the same stream on average, so there is no direction"):
        fit_direction(without, without)


def test_it_is_read_at_the_prompts_last_token_with_and_without_the_words(tiny_chat):
    fitted = fit(tiny_chat, QUESTIONS, instruction="Be brief.", layers=[1, 3], progress=False)
    sides = []
    for texts in ([f"{q} Be brief." for q in QUESTIONS], QUESTIONS):
        rows = []
        for text in texts:
            _, cache = tiny_chat.run_with_cache(torch.tensor([Prompt.of(tiny_chat, text).tokens]))
            rows.append(cache["resid_post", 3][0, -1])
        sides.append(torch.stack(rows))
    difference = sides[0].mean(0) - sides[1].mean(0)
    unit = difference / difference.norm()
    assert_close(fitted.direction[1], unit, atol=1e-4, rtol=0)
    assert float(fitted.with_it[1]) == pytest.approx(float((sides[0] @ unit).mean()), abs=1e-4)
    assert float(fitted.without_it[1]) == pytest.approx(float((sides[1] @ unit).mean()), abs=1e-4)


def test_of_pairs_the_direction_is_caas_of_unit_length(tiny_chat):
    fitted = fit(tiny_chat, PAIRS, layers=[2], progress=False)
    v = extract(tiny_chat, PAIRS, layers=[2], progress=False)[2].direction
    assert_close(fitted.direction[0], v / v.norm(), atol=1e-5, rtol=0)
    assert float(fitted.with_it - fitted.without_it) == pytest.approx(float(v.norm()), rel=1e-4)


def test_pulled_the_component_is_the_value_and_the_rest_stays(tiny_chat):
    fitted = fit(tiny_chat, QUESTIONS, instruction="Be brief.", layers=[2], progress=False)
    prompt = Prompt.of(tiny_chat, "And the weather?")
    unit, kept = fitted.direction[0], []
    for strength, overshoot, goal in (
        (1.0, 0.0, float(fitted.with_it)),
        (1.0, 1.0, float(2 * fitted.with_it - fitted.without_it)),
    ):
        made = fitted.interventions(strength, overshoot=overshoot, positions="original")
        with steer(tiny_chat, *made, prompt=prompt):
            logits_of(tiny_chat, [prompt.tokens], [("blocks.3.hook_resid_pre", lambda r, hook: kept.append(r))])
        assert_close(kept[-1][0] @ unit, torch.full((len(prompt),), goal), atol=1e-4, rtol=1e-4)
    logits_of(tiny_chat, [prompt.tokens], [("blocks.3.hook_resid_pre", lambda r, hook: kept.append(r))])
    rest = [one - (one @ unit)[..., None] * unit for one in kept]
    assert_close(rest[0], rest[2], atol=1e-4, rtol=1e-4)


def test_added_it_is_the_unit_vector_times_the_weight(tiny_chat):
    fitted = fit(tiny_chat, QUESTIONS, instruction="Be brief.", layers=[2], progress=False)
    (made,) = fitted.interventions(20.0, how="add")
    assert (made.operator, made.multiplier, made.positions) == ("add", 20.0, "caa")
    assert float(made.parameters["direction"].norm()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="unknown how='set': expected one of pull, add"):
        fitted.interventions(how="set")
    with pytest.raises(ValueError, match="give a larger strength"):
        fitted.interventions(how="add", overshoot=1.0)


def test_it_is_saved_and_read_back_and_one_layer_of_several_is_taken(tiny_chat, tmp_path):
    fitted = fit(tiny_chat, QUESTIONS, instruction="Be brief.", layers=[1, 3], progress=False)
    assert_comes_back(fitted, tmp_path / "i.safetensors")
    one = fitted.at([3])
    assert one.layers == (3,)
    assert torch.equal(one.direction[0], fitted.direction[1])
    assert "Be brief., layer 3" in repr(one)


def test_data_that_it_cannot_use_is_refused(tiny_chat):
    with pytest.raises(ValueError, match="no instruction, such as"):
        fit(tiny_chat, QUESTIONS, progress=False)
    with pytest.raises(ValueError, match="no questions given"):
        fit(tiny_chat, [], instruction="Be brief.", progress=False)
    with pytest.raises(ValueError, match="pairs have their answers in place of an instruction"):
        fit(tiny_chat, PAIRS, instruction="Be brief.", progress=False)
