"""Operations by torch's own counter: exactly what the arithmetic says, and no more than what is promised of them."""

import sys

import pytest
import torch
from helpers.models import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.passes import Work, extraction, formula, plain, sweep

pytestmark = pytest.mark.hooked
REFUSAL = (67, 79, 94)  # least, mean and most tokens of the 120 bundled A/B questions on refusal, as Llama 2's


@pytest.mark.parametrize("shape", ["7B", "13B", "70B"])
@pytest.mark.parametrize(("n_prompt", "n_suffix", "n_multipliers"), [(67, 2, 5), (40, 15, 3)])
@torch.inference_mode()
def test_operations_are_those_of_the_arithmetic(card_model, shape, n_prompt, n_suffix, n_multipliers):
    """Few blocks are enough: every block costs the same, and rows split at each."""
    model = card_model(shape, 4)
    work = Work(model.cfg)
    assert plain(model, n_prompt) == work.plain(n_prompt)
    assert sweep(model, n_prompt, n_suffix, n_multipliers) == work.sweep(n_prompt, n_suffix, n_multipliers)
    assert extraction(model, n_prompt) == work.extraction(n_prompt)
    assert work.floor(n_prompt, n_suffix, n_multipliers) < work.sweep(n_prompt, n_suffix, n_multipliers)


@torch.inference_mode()
def test_a_sweep_of_llama_2_7b_takes_2_6_plain_passes_for_questions_of_67_to_92_tokens(card_model):
    """Over the lengths together. A question of 67 tokens alone takes 2.83, and no way of sharing makes that 2.6."""
    model = card_model("7B")
    work = Work(model.cfg)
    assert sweep(model, 80, 2, 5) == work.sweep(80, 2, 5)  # 32 layers by 5 multipliers, counted in full
    lengths = range(67, 93)
    together = sum(work.sweep(n, 2, 5) for n in lengths) / sum(map(work.plain, lengths))
    assert together == pytest.approx(2.54, abs=0.005)
    assert together <= 2.6
    passes = {n: work.sweep(n, 2, 5) / work.plain(n) for n in (67, 76, 77, 80, 92)}
    assert passes == pytest.approx({67: 2.828, 76: 2.608, 77: 2.587, 80: 2.527, 92: 2.325}, abs=0.003)
    assert work.floor(67, 2, 5) / work.plain(67) == pytest.approx(2.748, abs=0.002)


@pytest.mark.parametrize(("shape", "n_layers", "expected"), [("7B", 32, 2.55), ("13B", 40, 2.95), ("70B", 80, 4.95)])
def test_the_formula_is_near_the_arithmetic(card_model, shape, n_layers, expected):
    """Less the last block of the prompt, of which only keys and values are computed."""
    cfg = type("cfg", (), {**vars(card_model(shape, 4).cfg), "n_layers": n_layers})
    work = Work(cfg)
    assert formula(n_layers, 80, 2, 5) == pytest.approx(expected, abs=0.005)
    assert work.sweep(80, 2, 5) / work.plain(80) == pytest.approx(expected - 1 / n_layers, abs=0.01)


@pytest.mark.parametrize("shape", ["7B", "13B", "70B"])
def test_an_extraction_takes_half_of_two_forwards(card_model, shape):
    cfg = type("cfg", (), {**vars(card_model(shape, 4).cfg), "n_layers": {"7B": 32, "13B": 40, "70B": 80}[shape]})
    work = Work(cfg)
    for n in (40, *REFUSAL, 150):
        assert work.extraction(n) / (2 * work.plain(n)) <= (0.52 if n < 60 else 0.51)
