"""Activation scaling: its loss by hand, laws of scaling, and that what is learned flips answers both ways."""

import pytest
import torch
from helpers.methods import assert_comes_back
from helpers.models import tiny_model
from helpers.shapes import model_of
from helpers.steering import logits_of
from torch.testing import assert_close

from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.methods import activation_scaling
from caa_lens.methods.activation_scaling import effectiveness, faithfulness, fit
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.steered_block import steer

DRAW = torch.Generator().manual_seed(0)
LOGITS = torch.randn(3, 9, generator=DRAW)
WANTED, OTHER = torch.tensor([1, 2, 3]), torch.tensor([0, 5, 8])


@pytest.fixture(scope="module")
def small():
    return tiny_model()


def questions(n=6, length=5):
    rows = torch.randint(0, 64, (n, length), generator=torch.Generator().manual_seed(3)).tolist()
    return [(Prompt.from_tokens(row, start=2), 10, 20) for row in rows]


@pytest.fixture(scope="module")
def learned(small):
    return fit(small, questions(), layers=[1, 2, 3], epochs=30, minimal=0.0, faithful=0.1, progress=False)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_effectiveness_is_the_hinge_by_hand():
    for beta in (1.0, -1.0):
        by_hand = [max(0.0, 2 - beta * float(LOGITS[i, WANTED[i]] - LOGITS[i, OTHER[i]])) for i in range(3)]
        assert float(effectiveness(LOGITS, WANTED, OTHER, beta, 2.0)) == pytest.approx(sum(by_hand) / 3, abs=1e-6)


def test_faithfulness_is_zero_without_change_and_where_only_the_two_tokens_move_and_else_the_divergence():
    assert float(faithfulness(LOGITS, LOGITS, WANTED, OTHER)) == 0
    moved = LOGITS.clone()
    for i in range(3):
        moved[i, WANTED[i]] += 5
        moved[i, OTHER[i]] -= 3
    assert float(faithfulness(moved, LOGITS, WANTED, OTHER)) == pytest.approx(0, abs=1e-7)
    other = LOGITS + torch.randn(3, 9, generator=DRAW)
    by_hand = []
    for i in range(3):
        rest = [k for k in range(9) if k not in (int(WANTED[i]), int(OTHER[i]))]
        p, q = (one[i, rest].double().softmax(-1) for one in (LOGITS, other))
        by_hand.append(float((p * (p / q).log()).sum()))
    assert float(faithfulness(other, LOGITS, WANTED, OTHER)) == pytest.approx(sum(by_hand) / 3, abs=1e-6)
    steered = other.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(faithfulness(steered, LOGITS, WANTED, OTHER), steered)
    assert bool(torch.isfinite(gradient).all())


def test_before_anything_is_learned_the_loss_of_a_model_is_the_hinge_of_its_own_logits(small):
    """At alpha = 0 both strengths see the unsteered logits, so that nothing is unfaithful."""
    ahead = []
    for prompt, wanted, other in questions():
        logits = logits_of(small, [prompt.tokens])[0, -1]
        ahead.append(float(logits[wanted] - logits[other]))
    kept = activation_scaling._Questions(small, questions(), 0, "prompt")
    edits = activation_scaling._edits(torch.zeros(1, 2, 5), [1], ["hook_attn_out", "hook_mlp_out"], kept.span, 1.0)
    for beta in (1.0, -1.0):
        for margin in (0.0, 2.0):
            with torch.no_grad():
                effect, faith = kept.terms(small, range(6), edits, beta, margin)
            by_hand = sum(max(0.0, margin - beta * one) for one in ahead) / len(ahead)
            assert float(effect) == pytest.approx(by_hand, abs=1e-5)
            assert float(faith) == pytest.approx(0.0, abs=1e-6)
    assert min(ahead) < 0 < max(ahead)


# ---- scaling ---------------------------------------------------------------------------------------------------------


def test_the_last_stream_scaled_changes_nothing_and_is_not_offered(small):
    tokens = [questions()[0][0].tokens]
    plain = logits_of(small, tokens)
    assert_close(
        logits_of(small, tokens, [("blocks.4.hook_resid_post", lambda r, hook: 3 * r)]), plain, atol=2e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="the stream behind the last layer, 4, is normalised right away"):
        fit(small, questions(), layers=[3, 4], sites=["hook_resid_post"], progress=False)


@pytest.mark.hooked
def test_without_a_norm_behind_the_last_layer_its_stream_is_offered_and_learns():
    model = model_of("no norm")
    fitted = fit(model, questions(), layers=[3], sites=["hook_resid_post"], epochs=8, minimal=0.0, progress=False)
    assert fitted.layers == (3,)
    assert bool((fitted.factor[:, :, -1] != 0).all())  # the last position's is all that the next token sees
    assert torch.equal(fitted.factor[:, :, :-1], torch.zeros(1, 1, 4))


def test_a_stream_scaled_is_all_later_writes_divided(small):
    for norm in [small.ln_final, *(n for b in small.blocks for n in (b.ln1, b.ln2))]:
        assert norm.eps < 1e-4
    tokens, s = [questions()[0][0].tokens], 1.7
    found = logits_of(small, tokens, [("blocks.2.hook_resid_post", lambda r, hook: s * r)])
    writes = [
        (f"blocks.{i}.{site}", lambda w, hook: w / s) for i in (3, 4) for site in ("hook_attn_out", "hook_mlp_out")
    ]
    assert_close(found, logits_of(small, tokens, writes), atol=1e-3, rtol=1e-3)
    assert float((found - logits_of(small, tokens)).abs().max()) > 0.05


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_strength_plus_1_wants_one_token_and_minus_1_the_other(small, learned):
    ahead = {}
    for strength in (-1.0, 0.0, 1.0):
        values = []
        for prompt, wanted, other in questions():
            with steer(small, *learned.interventions(strength), prompt=prompt):
                logits = logits_of(small, [prompt.tokens])[0, -1]
            values.append(float(logits[wanted] - logits[other]))
        ahead[strength] = sum(values) / len(values)
    assert ahead[-1.0] + 1 < ahead[0.0] < ahead[1.0] - 1
    assert learned.losses[-1] < learned.losses[0]


def test_what_is_applied_is_what_was_trained_by_hand_and_strength_0_is_the_identity(small, learned):
    prompt = questions()[0][0]
    hooks = [
        (f"blocks.{layer}.{site}", lambda x, hook, a=learned.factor[row, column]: x * (1 + 0.5 * a[None, :, None]))
        for row, layer in enumerate(learned.layers)
        for column, site in enumerate(learned.sites)
    ]
    expected = logits_of(small, [prompt.tokens], hooks)
    with steer(small, *learned.interventions(0.5), prompt=prompt):
        assert_close(logits_of(small, [prompt.tokens]), expected, atol=1e-4, rtol=1e-4)
    with steer(small, *learned.interventions(0.0), prompt=prompt):
        inside = logits_of(small, [prompt.tokens])
    assert torch.equal(inside, logits_of(small, [prompt.tokens]))


def test_another_length_is_refused_and_generated_tokens_are_left_alone(small, learned):
    made, prompt = learned.interventions(1.0), questions()[0][0]
    with pytest.raises(
        ValueError, match="the prompt has 6 positions before the answer, but the parameters were made for 5"
    ):
        steer(small, *made, prompt=Prompt.from_tokens([1, 2, 3, 4, 5, 6]))
    with pytest.warns(SharedPrefixWarning, match="hook_attn_out and hook_mlp_out are inside of a block"):
        cached = list(map(int, generate_tokens(small, [prompt], vectors=made, max_new_tokens=4)))
    whole = list(map(int, generate_tokens(small, [prompt], vectors=made, max_new_tokens=4, use_cache=False)))
    assert cached == whole
    with pytest.raises(ValueError, match="cannot act at positions='caa': its numbers are tied to the positions"):
        learned.interventions(positions="caa")
    with pytest.raises(ValueError, match="cannot act at a span or mask"):
        learned.interventions(positions=(0, 3))


def test_from_the_instructions_end_it_shares_the_prompt_on_the_stream(small):
    fitted = fit(
        small, questions(), layers=[1, 2], sites=["hook_resid_post"], positions="caa", epochs=3, progress=False
    )
    assert fitted.factor.shape == (2, 1, 3)
    assert [one.positions for one in fitted.interventions()] == ["caa", "caa"]
    validated = fit(small, questions(), layers=[1], validation=questions(4), epochs=4, patience=1, progress=False)
    assert 1 <= len(validated.losses) <= 4


@pytest.mark.hooked
def test_questions_that_cannot_be_learned_from_are_refused(small, tiny_chat):
    longer = (Prompt.from_tokens([1, 2, 3], start=2), 10, 20)
    with pytest.raises(ValueError, match="the prompts have 3 and 5 tokens, expected the same in all"):
        fit(small, [*questions(), longer], layers=[1], progress=False)
    same = (questions()[0][0], 10, 10)
    with pytest.raises(ValueError, match="question 0 wants the same token as it does not want, 10"):
        fit(small, [same], layers=[1], progress=False)
    with pytest.raises(ValueError, match=r"is . tokens of this tokenizer, expected one"):
        fit(tiny_chat, [("The capital of France is", " Paris and so on", " Rome")], layers=[1], progress=False)
    with pytest.raises(ValueError, match="unknown site 'ln1'"):
        fit(small, questions(), layers=[1], sites=["ln1"], progress=False)


def test_it_is_saved_and_read_back(learned, tmp_path):
    assert_comes_back(learned, tmp_path / "a.safetensors")
