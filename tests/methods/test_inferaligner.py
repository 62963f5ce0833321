"""InferAligner's gate and guide, on two harmless kinds of prompts."""

import pytest
import torch
from helpers.methods import assert_comes_back
from helpers.models import tiny_model
from helpers.steering import logits_of
from torch.testing import assert_close

from caa_lens.methods.inferaligner import fit, fit_gate
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate
from caa_lens.steering.steered_block import steer

COOKING = ["How long do eggs boil?", "What goes into a soup?", "How is bread baked?", "Which pan is best for fish?"]
CODE = ["What is a loop?", "How do I sort a list?", "Why is my program slow?", "What does git do?"]
DRAW = torch.Generator().manual_seed(0)


def test_the_midpoint_opens_the_gate_for_one_of_two_separated_clusters_and_exchanging_them_flips_it():
    centre = torch.randn(8, generator=DRAW, dtype=torch.float64)
    one, other = (torch.randn(30, 8, generator=DRAW, dtype=torch.float64) + s * 5 * centre for s in (1, -1))
    unit, bias = fit_gate(one, other)
    assert bool((one @ unit + bias > 0).all())
    assert bool((other @ unit + bias < 0).all())
    flipped, other_bias = fit_gate(other, one)
    assert_close(flipped, -unit, atol=1e-12, rtol=0)
    assert other_bias == pytest.approx(-bias, abs=1e-12)
    with pytest.raises(ValueError, match=r"the two classes have the same mean .* so that no gate tells them apart"):
        fit_gate(one, one)


@pytest.fixture(scope="module")
def fitted(tiny_chat):
    return fit(tiny_chat, (COOKING, CODE), layers=[2, 4], progress=False)


def states(model, questions, layer):
    rows = []
    for question in questions:
        _, cache = model.run_with_cache(torch.tensor([Prompt.of(model, question).tokens]))
        rows.append(cache["resid_post", layer][0, -1])
    return torch.stack(rows)


def test_gate_and_guide_are_their_formulas_at_the_last_token(tiny_chat, fitted):
    for row, layer in enumerate((2, 4)):
        one, other = states(tiny_chat, COOKING, layer), states(tiny_chat, CODE, layer)
        theta = one.mean(0) - other.mean(0)
        assert_close(fitted.guide[row], theta, atol=1e-5, rtol=1e-4)
        assert_close(fitted.gate[row], theta / theta.norm(), atol=1e-4, rtol=1e-4)
        unit = fitted.gate[row]
        middle = float(((one @ unit).mean() + (other @ unit).mean()) / 2)
        assert float(fitted.bias[row]) == pytest.approx(-middle, abs=1e-4)
        opened = fitted.opened(tiny_chat, [*COOKING, *CODE])[:, row]
        assert opened.tolist() == (torch.cat([one, other]) @ unit > middle).tolist()
        right = torch.cat([opened[:4], ~opened[4:]]).float().mean()
        assert float(fitted.accuracy[row]) == pytest.approx(float(right))


def test_a_batch_of_both_kinds_is_each_row_as_alone_and_closed_gates_leave_logits_bit_for_bit(tiny_chat, fitted):
    made = fitted.interventions(3.0, positions="original")
    together = generate(tiny_chat, [*COOKING, *CODE], made, max_new_tokens=4)
    assert together == [generate(tiny_chat, one, made, max_new_tokens=4) for one in (*COOKING, *CODE)]
    opened = fitted.opened(tiny_chat, [*COOKING, *CODE])
    assert bool(opened.any())
    closed = [q for q, some in zip([*COOKING, *CODE], opened, strict=True) if not some.any()]
    assert closed
    prompt = Prompt.of(tiny_chat, closed[0])
    plain = logits_of(tiny_chat, [prompt.tokens])
    with steer(tiny_chat, *made, prompt=prompt):
        assert torch.equal(logits_of(tiny_chat, [prompt.tokens]), plain)
    opening = next(q for q, some in zip([*COOKING, *CODE], opened, strict=True) if some.all())
    prompt = Prompt.of(tiny_chat, opening)
    hooks = [
        (f"blocks.{layer}.hook_resid_post", lambda r, hook, row=row: r + 3.0 * fitted.guide[row])
        for row, layer in enumerate((2, 4))
    ]
    with steer(tiny_chat, *made, prompt=prompt):
        found = logits_of(tiny_chat, [prompt.tokens])
    assert_close(found, logits_of(tiny_chat, [prompt.tokens], hooks), atol=1e-4, rtol=1e-4)
    with steer(tiny_chat, *fitted.interventions(0.0), prompt=prompt):
        assert torch.equal(logits_of(tiny_chat, [prompt.tokens]), logits_of(tiny_chat, [prompt.tokens]))


def test_strength_0_and_a_gate_forced_open(tiny_chat, fitted):
    free = fitted.interventions(1.0, gated=False)
    assert all(one.gate is None for one in free)
    prompt = Prompt.of(tiny_chat, CODE[0])
    plain = logits_of(tiny_chat, [prompt.tokens])
    with steer(tiny_chat, *fitted.interventions(0.0, gated=False), prompt=prompt):
        inside = logits_of(tiny_chat, [prompt.tokens])
    assert torch.equal(inside, plain)


def test_another_model_guides_with_its_own_directions_while_the_gate_stays_the_models(tiny_chat, fitted):
    other = tiny_model(d_vocab=tiny_chat.cfg.d_vocab, n_ctx=512, tokenizer=tiny_chat.tokenizer, seed=5)
    guided = fit(tiny_chat, (COOKING, CODE), layers=[2, 4], guide=other, progress=False)
    assert torch.equal(guided.gate, fitted.gate)
    own = fit(other, (COOKING, CODE), layers=[2, 4], progress=False)
    assert torch.equal(guided.guide, own.guide)
    narrow = tiny_model(d_vocab=tiny_chat.cfg.d_vocab, n_ctx=512, tokenizer=tiny_chat.tokenizer, d_model=16)
    with pytest.raises(ValueError, match="the guide has 5 layers of d_model=16, the model 5 of d_model=32"):
        fit(tiny_chat, (COOKING, CODE), layers=[2], guide=narrow, progress=False)


def test_kinds_that_are_the_same_or_missing_are_refused(tiny_chat):
    with pytest.raises(ValueError, match="the two classes have the same mean"):
        fit(tiny_chat, (CODE, CODE), layers=[2], progress=False)
    with pytest.raises(ValueError, match="got 4 positive and 0 negative prompts: give some of both kinds"):
        fit(tiny_chat, (CODE, []), layers=[2], progress=False)


def test_it_is_saved_and_read_back(fitted, tmp_path):
    assert_comes_back(fitted, tmp_path / "g.safetensors")
