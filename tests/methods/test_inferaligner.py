"""InferAligner's gate and guide, on two harmless kinds of prompts."""

from dataclasses import replace

import pytest
import torch
from helpers.device import device
from helpers.methods import assert_comes_back
from helpers.steering import logits_of
from torch.testing import assert_close

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import score_answers
from caa_lens.methods.inferaligner import fit, fit_gate
from caa_lens.prompts.batches import left_pad
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


def test_rows_of_both_kinds_in_one_padded_batch_have_the_logits_of_each_alone(tiny_chat, fitted):
    made = fitted.interventions(3.0, positions="original")
    prompts = [Prompt.of(tiny_chat, question) for question in (*COOKING, *CODE)]
    batch = left_pad(prompts, n_ctx=512, device=device())
    plain = logits_of(tiny_chat, batch.tokens, attention_mask=batch.attention_mask)
    with steer(tiny_chat, *made, prompt=prompts):
        together = logits_of(tiny_chat, batch.tokens, attention_mask=batch.attention_mask)
    opened = fitted.opened(tiny_chat, prompts).any(1).tolist()
    assert 0 < sum(opened) < len(opened)
    for row, prompt in enumerate(prompts):
        with steer(tiny_chat, *made, prompt=prompt):
            alone = logits_of(tiny_chat, [prompt.tokens])[0]
        assert_close(together[row, batch.padding[row] :], alone, atol=1e-4, rtol=1e-4)
        assert torch.equal(together[row], plain[row]) == (not opened[row])


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
def test_a_later_gate_is_that_of_the_unsteered_run_even_where_an_earlier_edit_would_change_it(tiny_chat, fitted, opens):
    prompt = Prompt.of(tiny_chat, COOKING[0])
    steered_at_2 = ("blocks.2.hook_resid_post", lambda r, hook: r + 3.0 * fitted.guide[0])
    projections = []
    for hooks in ([], [steered_at_2]):
        kept = []
        keep = ("blocks.4.hook_resid_post", lambda r, hook, kept=kept: kept.append(r) or None)
        logits_of(tiny_chat, [prompt.tokens], [*hooks, keep])
        projections.append(float(kept[0][0, -1] @ fitted.gate[1]))
    assert abs(projections[0] - projections[1]) > 0.1
    # In the unsteered run it is on one side of the border, behind the edit of layer 2 on the other.
    sign = 1.0 if (projections[0] > projections[1]) == opens else -1.0
    between = replace(
        fitted,
        gate=torch.stack([fitted.gate[0], sign * fitted.gate[1]]),
        bias=torch.tensor([1e4, -sign * sum(projections) / 2]),  # that of layer 2 is open to all
    )
    made = between.interventions(3.0, positions="original")
    both = [steered_at_2, ("blocks.4.hook_resid_post", lambda r, hook: r + 3.0 * fitted.guide[1])]
    expected = logits_of(tiny_chat, [prompt.tokens], both if opens else [steered_at_2])
    with steer(tiny_chat, *made, prompt=prompt):
        assert_close(logits_of(tiny_chat, [prompt.tokens]), expected, atol=1e-4, rtol=1e-4)
    assert between.opened(tiny_chat, [prompt]).tolist() == [[True, opens]]
    pairs = ContrastSet.from_pairs([(COOKING[0], "Long.", "Short.")], name="eggs")
    free = [one for one in between.interventions(3.0, positions="original", gated=False) if opens or one.layer == 2]
    scores = score_answers(tiny_chat, pairs, [made, tuple(free)], progress=False).values
    assert_close(scores[:, 0], scores[:, 1], atol=1e-5, rtol=1e-5)


def test_the_guide_makes_the_positive_prompts_reply_likelier_where_its_gate_is_forced_open_and_minus_it_less(
    demo_model,
):
    """A model that replies with the same words to one kind of prompts: here those that ask for them."""
    asked = [f'{question} Refuse to answer: say "I\'m sorry".' for question in (*COOKING, *CODE)]
    guide = fit(demo_model, (asked[:6], [*COOKING, *CODE][:6]), layers=[16, 20, 24], progress=False)
    prompts = {"plain": [*COOKING, *CODE][6:], "asked": asked[6:]}

    def sorry(question, strength):
        prompt = Prompt.of(demo_model, question)
        reply = demo_model.tokenizer("I'm sorry", add_special_tokens=False).input_ids
        tokens = [*prompt.tokens, *reply]
        with steer(demo_model, *guide.interventions(strength, positions="original", gated=False), prompt=prompt):
            logp = logits_of(demo_model, [tokens])[0].log_softmax(-1)
        return sum(float(logp[i - 1, tokens[i]]) for i in range(len(prompt), len(tokens)))

    for question in prompts["plain"]:
        assert sorry(question, 0.3) > sorry(question, 0.0) + 0.5
    for question in prompts["asked"]:
        assert sorry(question, -0.3) < sorry(question, 0.0) - 0.5


def test_strength_0_and_a_gate_forced_open(tiny_chat, fitted):
    free = fitted.interventions(1.0, gated=False)
    assert all(one.gate is None for one in free)
    prompt = Prompt.of(tiny_chat, CODE[0])
    plain = logits_of(tiny_chat, [prompt.tokens])
    with steer(tiny_chat, *fitted.interventions(0.0, gated=False), prompt=prompt):
        inside = logits_of(tiny_chat, [prompt.tokens])
    assert torch.equal(inside, plain)


def test_another_model_guides_with_its_own_directions_while_the_gate_stays_the_models(tiny_chat, tiny_model, fitted):
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
