"""What an order of steering means: where it acts if it does not say so, and that what it says itself comes first."""

from inspect import unwrap

import pytest
import torch
from helpers.device import device
from helpers.models import random_vectors
from helpers.steering import LOGITS, adding, logits_of, some_tokens

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.positions import Reach
from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import Prompt, encode_letters, resolve_format
from caa_lens.steering.generation import generate
from caa_lens.steering.interventions import Intervention, as_interventions
from caa_lens.steering.steered_block import steer
from caa_lens.steering.steered_runs import NothingSteeredWarning
from caa_lens.vectors.steering_vectors import SteeringVector

QUESTIONS = ["How was your day?", "Is it right to lie to a friend who asks for the truth?"]
LETTERS = ContrastSet.from_pairs(
    [("Is rain wet?\n (A) Yes\n (B) No", "(A)", "(B)"), ("Is fire cold, then?\n (A) Yes\n (B) No", "(B)", "(A)")]
)


@pytest.fixture(scope="module")
def prompts(tiny_chat):
    return [Prompt.of(tiny_chat, question) for question in QUESTIONS]


def loud(model, **said):
    """Two multiples of a vector, so that what is steered cannot be overlooked."""
    return Intervention(vector=random_vectors(model, scale=2.0)[2], multiplier=2.0, **said)


def greedy(model, prompt, hook, n_new=5):
    """The slow, obvious loop: every token from a forward over the whole text."""
    tokens = list(prompt.tokens)
    for _ in range(n_new):
        tokens.append(int(logits_of(model, [tokens], [hook])[0, -1].argmax()))
    return model.tokenizer.decode(tokens[len(prompt) :])


# ---- where it says nothing: from the end of the instruction, wherever the prompt is known ---------------------------


def test_without_a_start_a_block_of_a_prompt_steers_from_the_instructions_end(tiny_chat, prompts):
    order, (prompt, _) = loud(tiny_chat), prompts
    expected = logits_of(tiny_chat, [prompt.tokens], [adding(order.vector, prompt.steer_start, 2.0)])
    with steer(tiny_chat, order, prompt=prompt):
        torch.testing.assert_close(logits_of(tiny_chat, [prompt.tokens]), expected, **LOGITS)
    batch = left_pad(prompts, n_ctx=tiny_chat.cfg.n_ctx, device=device())
    with steer(tiny_chat, order, prompt=prompts):
        together = logits_of(tiny_chat, batch.tokens, attention_mask=batch.attention_mask)
    torch.testing.assert_close(together[0, batch.padding[0] :], expected[0], **LOGITS)
    assert batch.padding[0] > 0


def test_without_a_start_texts_are_steered_from_the_instructions_end_each_from_its_own(tiny_chat, prompts):
    order = loud(tiny_chat)
    expected = [greedy(tiny_chat, one, adding(order.vector, one.steer_start, 2.0)) for one in prompts]
    assert generate(tiny_chat, prompts, [order], max_new_tokens=5) == expected
    assert generate(tiny_chat, prompts[1], [order], max_new_tokens=5) == expected[1]
    everywhere = generate(tiny_chat, prompts[1], [loud(tiny_chat, start=0)], max_new_tokens=5)
    assert everywhere == greedy(tiny_chat, prompts[1], adding(order.vector, 0, 2.0))
    assert len({expected[1], everywhere, generate(tiny_chat, prompts[1], max_new_tokens=5)}) == 3


def test_without_a_start_the_lens_of_the_stream_steers_from_the_instructions_end(tiny_chat, prompts):
    order, prompt = loud(tiny_chat), prompts[1]
    silent = residual_lens(tiny_chat, prompt, vectors=[order])
    said = residual_lens(tiny_chat, prompt, vectors=[loud(tiny_chat, start=prompt.steer_start)])
    everywhere = residual_lens(tiny_chat, prompt, vectors=[loud(tiny_chat, start=0)])
    assert (silent.steer_start, everywhere.steer_start) == (prompt.steer_start, 0)
    assert silent.frame.equals(said.frame)
    assert not silent.frame.equals(everywhere.frame)


def test_without_a_start_answers_are_scored_from_the_instructions_end(tiny_chat):
    order, fmt = loud(tiny_chat), resolve_format(tiny_chat, None)
    found = score_answers(tiny_chat, LETTERS, [(order,)], progress=False)
    for row, pair in enumerate(LETTERS):
        prompt, ids = encode_letters(
            fmt, tiny_chat.tokenizer, pair.question, (pair.positive[1], pair.negative[1]), warn=False
        )
        logits = logits_of(tiny_chat, [prompt.tokens], [adding(order.vector, prompt.steer_start, 2.0)])[0, -1]
        assert float(found.values[row, 0]) == pytest.approx(float(logits[list(ids)].softmax(-1)[0]), abs=1e-5)


# ---- where no prompt is known: refused, with what to write ----------------------------------------------------------


def test_without_a_start_a_hook_is_refused_with_the_remedy(tiny):
    order = loud(tiny)
    remedy = (
        r"not said where steering starts, and a hook knows no prompt: give start=0 for every position, "
        r"start=Prompt.of\(model, question\).steer_start for the end of the instruction, or positions="
    )
    for asked in (order.hook, order.edit, order.vector.hook):
        with pytest.raises(ValueError, match=remedy):
            asked()
    for said in ({"start": 3}, {"positions": (3, 5)}):
        assert loud(tiny, **said).edit().positions == loud(tiny, **said).where


def test_without_a_start_a_block_of_no_prompt_is_refused_with_the_remedy(tiny):
    with pytest.raises(
        ValueError, match=r"either prompt=..., or start=... \(start=0 steers every position\), or posit"
    ):
        steer(tiny, loud(tiny))


@pytest.mark.parametrize("said", [{"start": 0}, {"start": 3}, {"positions": (3, 5)}])
def test_a_block_takes_orders_that_all_say_where_and_no_mixture(tiny, said, capsys):
    tokens, order = some_tokens(), loud(tiny, **said)
    with steer(tiny, order, explain_positions=True):
        steered = logits_of(tiny, tokens)
    assert torch.equal(steered, logits_of(tiny, tokens, [order.hook()]))
    assert capsys.readouterr().out == f"steered {Reach.of(order.where)}\n"
    with pytest.raises(ValueError, match="or in every vector, as an Intervention"):
        steer(tiny, order, loud(tiny))
    with pytest.raises(ValueError, match="say where steering starts"):
        steer(tiny)


def test_an_order_behind_the_end_is_told_of(tiny_chat, prompts):
    prompt, late = prompts[0], loud(tiny_chat, start=5000)
    plain = generate(tiny_chat, prompt, max_new_tokens=2)
    with pytest.warns(
        NothingSteeredWarning, match=r"layer 2 was not added: it acts from position 5000 on, and the run"
    ) as told:
        assert generate(tiny_chat, prompt, vectors=[late], max_new_tokens=2) == plain
    assert [one.category for one in told if one.category is not FutureWarning] == [NothingSteeredWarning]
    last = len(prompt)  # the position of the first generated token, the last one that is run again
    generate(tiny_chat, prompt, vectors=[loud(tiny_chat, start=last)], max_new_tokens=2)
    with pytest.warns(NothingSteeredWarning, match=f"has positions 0 to {last - 1}"):
        generate(tiny_chat, prompt, vectors=[loud(tiny_chat, start=last)], max_new_tokens=1)
    with pytest.warns(NothingSteeredWarning, match=f"has positions 0 to {last - 1}"):
        residual_lens(tiny_chat, prompt, vectors=[late])


@pytest.mark.parametrize("said", [{"start": 0}, {"start": 3}, {"positions": (3, 5)}, {"positions": (0, None)}])
def test_scores_refuse_an_order_with_a_place_of_its_own(tiny_chat, said):
    with pytest.raises(
        ValueError, match="takes no start and no positions: score the model's logits inside `with steer"
    ):
        score_answers(tiny_chat, LETTERS, [(), (loud(tiny_chat, **said),)], progress=False)


# ---- start=0 is every position --------------------------------------------------------------------------------------


def test_start_0_is_every_position_bit_for_bit(tiny):
    tokens, order = some_tokens(), loud(tiny, start=0)
    everywhere = logits_of(tiny, tokens, [(order.vector.hook_name, lambda h, hook: h + 2.0 * order.vector.direction)])
    assert torch.equal(logits_of(tiny, tokens, [order.hook()]), everywhere)
    assert torch.equal(logits_of(tiny, tokens, [order.vector.hook(multiplier=2.0, start=0)]), everywhere)
    for given, place in ((order, {"start": 5}), (loud(tiny), {"start": 0}), (loud(tiny), {"positions": (0, None)})):
        with steer(tiny, given, **place):
            assert torch.equal(logits_of(tiny, tokens), everywhere)


# ---- where both say it: the order's own comes first -----------------------------------------------------------------


def test_an_order_keeps_what_it_says_and_takes_the_rest_from_the_block(tiny):
    v, w, tokens = random_vectors(tiny)[2], random_vectors(tiny, seed=1)[2], some_tokens()
    own_start = Intervention(vector=w, multiplier=-1.0, start=7)
    no_start = Intervention(vector=v, multiplier=0.5)
    with steer(tiny, own_start, no_start, (v, 1.25), w, start=3, multiplier=2.0):
        steered = logits_of(tiny, tokens)
    hooks = [adding(w, 7, -1.0), adding(v, 3, 0.5), adding(v, 3, 1.25), adding(w, 3, 2.0)]
    torch.testing.assert_close(steered, logits_of(tiny, tokens, hooks), **LOGITS)
    assert (own_start.start, no_start.start) == (7, None)  # what the caller gave is not changed


@pytest.mark.parametrize("own", [{"start": 6}, {"positions": (6, 7)}, {"positions": torch.eye(11)[[6]].bool()}])
@pytest.mark.parametrize(
    "of_the_block", [{"start": 2}, {"positions": (2, 3)}, {"prompt": Prompt.from_tokens(range(11))}]
)
def test_an_orders_own_place_comes_before_the_blocks_prompt_start_or_positions(tiny, own, of_the_block):
    v, w, tokens = random_vectors(tiny)[2], random_vectors(tiny, seed=1)[3], torch.arange(11)[None]
    with steer(tiny, Intervention(vector=w, **own), v, **of_the_block):
        steered = logits_of(tiny, tokens)
    by_block = {"start": 10} if "prompt" in of_the_block else of_the_block
    torch.testing.assert_close(steered, logits_of(tiny, tokens, [v.hook(**by_block), w.hook(**own)]), **LOGITS)


def test_an_orders_own_start_comes_before_the_prompts_in_texts(tiny_chat, prompts):
    own, prompt = loud(tiny_chat, start=3), prompts[1]
    expected = greedy(tiny_chat, prompt, adding(own.vector, 3, 2.0))
    assert generate(tiny_chat, prompt, [own], max_new_tokens=5) == expected
    assert generate(tiny_chat, prompt, [loud(tiny_chat)], max_new_tokens=5) != expected


def test_an_edit_takes_the_place_of_the_order_or_else_the_one_it_is_given(tiny):
    order = loud(tiny, operator="set")
    edit = order.edit(5)
    assert (edit.layer, edit.multiplier, edit.operator, edit.positions) == (2, 2.0, "set", (5, None))
    assert edit.direction is order.vector.direction
    assert loud(tiny, start=7).edit(5).positions == (7, None)
    assert loud(tiny, positions=(2, 4)).edit(5).positions == (2, 4)
    starts = torch.tensor([1, 2])
    assert order.edit(starts).positions[0] is starts


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_orders_that_make_no_sense_are_refused():
    v = SteeringVector(direction=torch.ones(4), layer=2)
    with pytest.raises(ValueError, match="unknown operator 'multiply': expected one of add, ablate, set"):
        Intervention(vector=v, operator="multiply")
    with pytest.raises(ValueError, match=r"must be a number or \[batch\], got shape \(2, 1\)"):
        Intervention(vector=v, multiplier=torch.ones(2, 1))
    for bad in (float("nan"), float("inf"), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="multiplier must be finite, got"):
            Intervention(vector=v, multiplier=bad)
    with pytest.raises(ValueError, match="start must be a position counted from 0, got -1"):
        Intervention(vector=v, start=-1)
    with pytest.raises(ValueError, match=r"give either start or positions: positions=\(first, None\) is start=first"):
        Intervention(vector=v, start=3, positions=(3, 5))


def test_a_whole_number_too_large_for_torch_is_taken_as_the_float_that_it_is():
    v = SteeringVector(direction=torch.ones(4), layer=2)
    assert Intervention(vector=v, multiplier=2**70).multiplier == 2.0**70
    assert isinstance(Intervention(vector=v, multiplier=2**70).multiplier, float)


def test_the_forms_of_steering_mean_the_same(tiny):
    v = random_vectors(tiny)[2]
    (made,) = as_interventions(tiny, [v], multiplier=3.0, start=4)
    assert (made.vector, made.multiplier, made.start) == (v, 3.0, 4)
    for form in ([(v, 3.0)], [Intervention(vector=v, multiplier=3.0)]):
        (made,) = as_interventions(tiny, form, multiplier=-1.0, positions=(4, 5))
        assert (made.vector, made.multiplier, made.positions) == (v, 3.0, (4, 5))


def test_what_is_no_pair_of_a_vector_and_a_number_is_refused_with_what_to_write(tiny):
    v, unchecked = random_vectors(tiny)[2], unwrap(as_interventions)  # as users see it, without the tests' type checks
    for wrong in ((v,), (v, 1.0, 2.0), (1.0, v), (v, v), ()):
        with pytest.raises(
            TypeError, match=r"expected a SteeringVector, a \(SteeringVector, multiplier\) pair or an I"
        ):
            unchecked(tiny, [wrong])


def test_every_step_is_checked_against_the_numbers_that_the_model_holds(tiny):
    v = 100 * random_vectors(tiny)[2].normalized()
    for given in ([v, (v, 1e38)], [(v, 1e38), v]):
        with pytest.raises(ValueError, match=r"at layer 2 makes a step .*, more than float32 holds"):
            as_interventions(tiny, given, start=0)
