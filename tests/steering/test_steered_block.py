"""`with steer(...)`: what runs inside is steered from the right token on, and the model is left as it was found."""

import copy
import re
from inspect import unwrap

import pytest
import torch
from helpers.device import device
from helpers.models import random_vectors
from helpers.steering import LOGITS, Kept, adding, hook_counts, logits_of

from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import chat_template_format
from caa_lens.steering import steered_block as steering
from caa_lens.steering.generation import generate
from caa_lens.steering.interventions import as_interventions
from caa_lens.steering.steered_block import steer
from caa_lens.steering.steered_runs import NothingSteeredWarning, OtherPromptWarning
from caa_lens.vectors.steering_vectors import SteeringVector

QUESTIONS = ["How was your day?", "Is it right to lie to a friend who asks for the truth?", "Why?"]


@pytest.fixture(scope="module")
def prompts(demo_tokenizer):
    chat = chat_template_format(demo_tokenizer)
    return [chat.encode(demo_tokenizer, question) for question in QUESTIONS]


@pytest.fixture(autouse=True)
def nothing_left_behind(tiny_chat):
    yield
    assert hook_counts(tiny_chat) == {}


# ---- where steering starts --------------------------------------------------------------------------------------


def test_a_question_steers_from_the_instructions_last_token(tiny_chat, prompts):
    v = random_vectors(tiny_chat)[2]
    tokens = [prompts[0].tokens]
    expected = logits_of(tiny_chat, tokens, [adding(v, len(prompts[0]) - 1)])  # the template ends the instruction
    for prompt in (QUESTIONS[0], prompts[0], [prompts[0]], [QUESTIONS[0]]):
        with steer(tiny_chat, v, prompt=prompt) as model:
            assert model is tiny_chat
            torch.testing.assert_close(logits_of(model, tokens), expected, **LOGITS)
    assert (expected - logits_of(tiny_chat, tokens))[0, -1].abs().max() > 0.01


def test_a_prompt_with_an_answer_steers_the_answer_too(tiny_chat, demo_tokenizer):
    v = random_vectors(tiny_chat)[2]
    prompt = chat_template_format(demo_tokenizer).encode(demo_tokenizer, QUESTIONS[0], "Quite well, thanks.")
    n_answer = len(demo_tokenizer("Quite well, thanks.", add_special_tokens=False)["input_ids"])
    expected = logits_of(tiny_chat, [prompt.tokens], [adding(v, len(prompt) - n_answer - 1)])
    with steer(tiny_chat, v, prompt=prompt):
        torch.testing.assert_close(logits_of(tiny_chat, [prompt.tokens]), expected, **LOGITS)


@pytest.mark.parametrize("answers", [("", "", ""), ("", "No, never.", "Yes.")], ids=["questions", "answered"])
def test_several_prompts_steer_every_row_of_their_padded_batch_from_its_own_token(tiny_chat, answers):
    v, multipliers = random_vectors(tiny_chat)[2], (1.0, -2.0, 3.0)
    chat = chat_template_format(tiny_chat.tokenizer)
    prompts = [chat.encode(tiny_chat.tokenizer, *both) for both in zip(QUESTIONS, answers, strict=True)]
    batch = left_pad(prompts, n_ctx=tiny_chat.cfg.n_ctx, device=device())
    given = prompts if any(answers) else [prompts[0], *QUESTIONS[1:]]  # in words too, and mixed
    with steer(tiny_chat, v, prompt=given, multiplier=torch.tensor(multipliers)):
        together = logits_of(tiny_chat, batch.tokens, attention_mask=batch.attention_mask.long())
    for row, (prompt, multiplier) in enumerate(zip(prompts, multipliers, strict=True)):
        alone = logits_of(tiny_chat, [prompt.tokens], [adding(v, prompt.steer_start, multiplier)])[0]
        torch.testing.assert_close(together[row, batch.padding[row] :], alone, **LOGITS)


def test_start_is_the_first_steered_position(tiny_chat, prompts):
    v, tokens = random_vectors(tiny_chat)[0], [prompts[1].tokens]
    for start in (0, 5):
        with steer(tiny_chat, v, start=start):
            steered = logits_of(tiny_chat, tokens)
        torch.testing.assert_close(steered, logits_of(tiny_chat, tokens, [adding(v, start)]), **LOGITS)
    with steer(tiny_chat, v, start=torch.tensor([5])):
        assert torch.equal(logits_of(tiny_chat, tokens), steered)


def test_it_has_to_be_said_where_steering_starts(tiny_chat, prompts):
    v = random_vectors(tiny_chat)[2]
    for place in ({}, {"start": 0, "prompt": prompts[0]}):
        with pytest.raises(
            ValueError, match=r"say where steering starts: either prompt=.*(start=0 steers every position|not both)"
        ):
            steer(tiny_chat, v, **place)


def test_a_run_that_ends_before_steering_starts_is_told_of(tiny_chat, prompts):
    v = random_vectors(tiny_chat)[2]
    tokens = torch.tensor([prompts[1].tokens])
    start = prompts[1].steer_start
    with (
        pytest.warns(NothingSteeredWarning, match=f"has {start} tokens, and steering starts at position {start}"),
        steer(tiny_chat, v, prompt=prompts[1]),
    ):
        tiny_chat(tokens[:, :start])
    with steer(tiny_chat, v, prompt=prompts[1]):
        tiny_chat(tokens[:, : start + 1])  # warnings are errors here
    with steer(tiny_chat, v, prompt=prompts[1]):
        pass  # nothing ran
    with (
        pytest.warns(NothingSteeredWarning, match=r"nothing was steered in 2 of 3 runs: .* has 4 tokens"),
        steer(tiny_chat, v, prompt=prompts[1]),
    ):
        [tiny_chat(tokens[:, :n]) for n in (start + 1, 4, start)]
    with steer(tiny_chat, v, prompt=prompts[1]):  # chunk by chunk with a cache, each shorter than the start
        kept = Kept(tiny_chat)
        for chunk in tokens.split(5, dim=1):
            kept(chunk)


def test_a_zero_multiplier_is_no_steering_bit_for_bit(tiny_chat, prompts):
    tokens = [prompts[0].tokens]
    plain = logits_of(tiny_chat, tokens)
    with steer(tiny_chat, *random_vectors(tiny_chat), prompt=prompts[0], multiplier=0.0):
        assert torch.equal(logits_of(tiny_chat, tokens), plain)
    with steer(tiny_chat, prompt=prompts[0]):  # no vectors at all
        assert torch.equal(logits_of(tiny_chat, tokens), plain)


# ---- manners ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 4])
def test_callers_hooks_compose_in_both_nesting_orders(tiny_chat, prompts, layer):
    v, tokens = random_vectors(tiny_chat)[layer], [prompts[0].tokens]
    seen = []

    def halve(resid, hook):
        seen.append(resid)
        return resid / 2

    name = f"blocks.{layer}.hook_resid_post"
    # At one hook point TransformerLens runs hooks in the order in which they were registered.
    with steer(tiny_chat, v, start=3), tiny_chat.hooks(fwd_hooks=[(name, halve)]):
        inside = logits_of(tiny_chat, tokens)
    with tiny_chat.hooks(fwd_hooks=[(name, halve)]), steer(tiny_chat, v, start=3):
        outside = logits_of(tiny_chat, tokens)
    steered_then_halved = logits_of(tiny_chat, tokens, [adding(v, 3), (name, halve)])
    halved_then_steered = logits_of(tiny_chat, tokens, [(name, halve), adding(v, 3)])
    torch.testing.assert_close(inside, steered_then_halved, **LOGITS)
    torch.testing.assert_close(outside, halved_then_steered, **LOGITS)
    assert (inside - outside).abs().max() > 0.01
    torch.testing.assert_close(seen[0] - seen[1], adding(v, 3)[1](torch.zeros_like(seen[0]), None), **LOGITS)


def test_nested_blocks_add_up_and_the_inner_one_ends_alone(tiny_chat, prompts):
    v, w = random_vectors(tiny_chat)[2], random_vectors(tiny_chat, seed=1)[2]
    tokens = [prompts[0].tokens]
    with steer(tiny_chat, v, start=3):
        with steer(tiny_chat, w, start=3):
            both = logits_of(tiny_chat, tokens)
        outer = logits_of(tiny_chat, tokens)
    torch.testing.assert_close(both, logits_of(tiny_chat, tokens, [adding(v + w, 3)]), **LOGITS)
    torch.testing.assert_close(outer, logits_of(tiny_chat, tokens, [adding(v, 3)]), **LOGITS)


def test_an_exception_takes_our_hooks_away_and_leaves_the_callers(tiny, prompts):
    vectors = random_vectors(tiny)
    tiny.add_hook("blocks.2.hook_resid_post", lambda resid, hook: None)
    theirs = hook_counts(tiny)
    with pytest.raises(ZeroDivisionError), steer(tiny, vectors[1], vectors[4], start=0):
        1 / (hook_counts(tiny) == theirs)  # fails inside the block only if our hooks are there
    assert hook_counts(tiny) == theirs

    def fail(resid, hook):
        raise RuntimeError("inside the forward")

    with (
        pytest.raises(RuntimeError, match="inside the forward"),
        steer(tiny, vectors[1], start=0),
        tiny.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]),
    ):
        tiny(torch.ones(1, 4, dtype=torch.long))
    assert hook_counts(tiny) == theirs == {"blocks.2.hook_resid_post": 1}
    assert tiny.context_level == 0


def test_steering_one_model_does_not_touch_another_or_any_weight(tiny_chat, prompts):
    other = copy.deepcopy(tiny_chat)
    v, tokens = random_vectors(tiny_chat)[2], [prompts[0].tokens]
    weights = {name: weight.clone() for name, weight in tiny_chat.state_dict().items()}
    plain = logits_of(tiny_chat, tokens)
    with steer(tiny_chat, v, prompt=prompts[0]):
        steered = logits_of(tiny_chat, tokens)
        assert torch.equal(logits_of(other, tokens), plain)
    assert not torch.equal(steered, plain)
    assert torch.equal(logits_of(tiny_chat, tokens), plain)
    for name, weight in tiny_chat.state_dict().items():
        assert torch.equal(weight, weights[name]), name


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_vectors_that_do_not_fit_the_model_are_refused_on_entry(tiny_chat):
    vectors = random_vectors(tiny_chat)
    with pytest.raises(ValueError, match="layer 5 is out of range: tiny-random-llama has layers 0 to 4"):
        steer(tiny_chat, vectors[2], vectors[4].at_layer(5), start=0)
    wide = SteeringVector(direction=torch.ones(64), layer=2)
    remedy = "vector has d_model=64, but 'tiny-random-llama' has d_model=32: extract it from this model"
    with pytest.raises(ValueError, match=remedy):
        steer(tiny_chat, vectors[2], wide, start=0)


def test_a_set_in_place_of_a_vector_is_refused_rather_than_steering_all_its_layers(tiny_chat, monkeypatch):
    vectors = random_vectors(tiny_chat)
    with pytest.raises(TypeError):
        steer(tiny_chat, vectors, start=0)
    # As users see it, without the tests' own type checking.
    unchecked = unwrap(as_interventions)
    monkeypatch.setattr(steering, "as_interventions", unchecked)
    expected = (
        r"expected a SteeringVector, a \(SteeringVector, multiplier\) pair or an Intervention, got SteeringVectors"
    )
    with pytest.raises(TypeError, match=expected + r".*; of SteeringVectors choose a layer, as in vectors\[13\]"):
        unwrap(steer)(tiny_chat, vectors, start=0)
    with pytest.raises(TypeError, match=r"got a tuple of SteeringVectors, .*choose a layer, as in vectors\[13\]"):
        unchecked(tiny_chat, [(vectors, 2.0)])
    with pytest.raises(TypeError, match=r"a list of vectors, got SteeringVectors: .*as in \[vectors\[13\]\]"):
        unchecked(tiny_chat, vectors)
    with pytest.raises(TypeError, match="a list of vectors, got one SteeringVector: put it into a list"):
        unchecked(tiny_chat, vectors[2])


def test_steering_without_a_block_is_told_of_and_says_of_itself_what_it_is(tiny_chat):
    v = random_vectors(tiny_chat)[2]
    with pytest.warns(NothingSteeredWarning, match=r"works in a block, `with cl.steer\(...\):`"):
        steer(tiny_chat, v, start=0)
    steered = steer(tiny_chat, v, start=7, multiplier=2)
    assert re.fullmatch(r"steers 2 \* SteeringVector\(.*\) from position 7 on, inside `with cl.steer.*`", repr(steered))
    with steered:
        pass  # warnings are errors here


def test_another_text_than_the_prompt_is_told_of_and_the_prompt_with_more_behind_it_is_not(tiny_chat, prompts):
    v, (short, long) = random_vectors(tiny_chat)[2], sorted(prompts[:2], key=len)
    for told, ran in ((short, long), (long, short)):
        with (
            pytest.warns(OtherPromptWarning, match="give every prompt a block of its own"),
            steer(tiny_chat, v, prompt=told),
        ):
            generate(tiny_chat, ran, max_new_tokens=40)
    batch = left_pad([short, long], n_ctx=tiny_chat.cfg.n_ctx, device=device())
    with steer(tiny_chat, v, prompt=[short, long]):  # warnings are errors here
        tiny_chat(batch.tokens, attention_mask=batch.attention_mask)
        generate(tiny_chat, [short, long], max_new_tokens=4)
    with steer(tiny_chat, v, prompt=short):
        tiny_chat(torch.tensor([[*short.tokens, 5, 6, 7]] * 2))
        generate(tiny_chat, short, max_new_tokens=4)


def test_a_block_may_be_entered_again_and_within_itself(tiny_chat, prompts):
    v, tokens = random_vectors(tiny_chat)[2], [prompts[0].tokens]
    once, twice = (logits_of(tiny_chat, tokens, [adding(v, 4, multiplier)]) for multiplier in (1.0, 2.0))
    steered = steer(tiny_chat, v, start=4)
    for _ in range(2):
        with steered:
            torch.testing.assert_close(logits_of(tiny_chat, tokens), once, **LOGITS)
            with steered:
                torch.testing.assert_close(logits_of(tiny_chat, tokens), twice, **LOGITS)
            torch.testing.assert_close(logits_of(tiny_chat, tokens), once, **LOGITS)
        assert hook_counts(tiny_chat) == {}


def test_a_model_without_a_tokenizer_cannot_be_asked_in_words(tiny):
    with pytest.raises(TypeError, match="this model has no tokenizer"):
        steer(tiny, random_vectors(tiny)[2], prompt="How are you?")


def test_a_prompt_longer_than_the_context_is_refused(demo_tokenizer, tiny_model):
    model = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=32, tokenizer=demo_tokenizer)
    with pytest.raises(ValueError, match="but the model's context is 32: shorten it"):
        steer(model, random_vectors(model)[2], prompt="Why? " * 20)


# ---- what is steered, said aloud --------------------------------------------------------------------------------


def table_rows(printed):
    """`(pos, id, token, is steered)` of every line of a printed table."""
    rows = re.findall(r"^ *(\d+) +(\d+)  ('.*?'|\".*?\") *(?:read)? *(steered)?$", printed, re.MULTILINE)
    return [(int(pos), int(token), piece[1:-1], bool(steered)) for pos, token, piece, steered in rows]


@pytest.mark.parametrize("answer", ["", "Quite well."])
def test_explaining_marks_exactly_the_tokens_that_are_steered(tiny_chat, demo_tokenizer, capsys, answer):
    v = random_vectors(tiny_chat)[4]
    prompt = chat_template_format(demo_tokenizer).encode(demo_tokenizer, QUESTIONS[0], answer)
    resid = {}
    for key, multiplier in (("plain", 0.0), ("steered", 1.0)):
        with steer(tiny_chat, v, prompt=prompt, multiplier=multiplier, explain_positions=True):
            save = [(v.hook_name, lambda resid_post, hook, key=key: resid.update({key: resid_post}))]
            logits_of(tiny_chat, [prompt.tokens], save)
        printed = capsys.readouterr().out
    rows = table_rows(printed)
    changed = (resid["plain"] != resid["steered"]).any(-1)[0].tolist()
    assert [steered for *_, steered in rows] == changed
    assert [pos for pos, *_ in rows] == list(range(len(prompt)))
    assert [token for _, token, *_ in rows] == list(prompt.tokens)
    assert [piece for _, _, piece, steered in rows if steered] == demo_tokenizer.tokenize("\n" + answer)
    assert "and every generated token is steered" in printed


def test_explaining_several_prompts_prints_a_table_for_each(tiny_chat, prompts, capsys):
    with steer(tiny_chat, random_vectors(tiny_chat)[2], prompt=prompts, explain_positions=True):
        pass
    rows = table_rows(capsys.readouterr().out)
    assert [row[1] for row in rows] == [token for prompt in prompts for token in prompt.tokens]
    assert sum(row[3] for row in rows) == 3


def test_explaining_a_start_says_it_and_without_asking_nothing_is_printed(tiny_chat, prompts, capsys):
    v = random_vectors(tiny_chat)[2]
    with steer(tiny_chat, v, start=7, explain_positions=True):
        assert capsys.readouterr().out == "every position from 7 on is steered\n"
    with steer(tiny_chat, v, prompt=prompts[0]):
        assert capsys.readouterr().out == ""


# ---- the model's own generation ---------------------------------------------------------------------------------


def their_generation(model, prompt, n_tokens, **settings):
    """Greedy text of TransformerLens' own `generate`."""
    tokens = torch.tensor([prompt.tokens])
    settings |= {"do_sample": False, "stop_at_eos": False, "verbose": False}
    return model.tokenizer.decode(model.generate(tokens, max_new_tokens=n_tokens, **settings)[0, len(prompt) :])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("layer", [0, 4])
def test_transformer_lens_own_generation_inside_the_block_equals_ours(tiny_chat, prompts, layer, use_cache):
    v, prompt = random_vectors(tiny_chat, scale=2.0)[layer], prompts[1]
    plain = their_generation(tiny_chat, prompt, 7, use_past_kv_cache=use_cache)
    with steer(tiny_chat, v, prompt=prompt):
        steered = their_generation(tiny_chat, prompt, 7, use_past_kv_cache=use_cache)
    assert steered == generate(tiny_chat, prompt, vectors=[v], max_new_tokens=7)
    assert plain == generate(tiny_chat, prompt, max_new_tokens=7) != steered


def test_the_demo_models_own_generation_inside_the_block_equals_ours(demo_model, prompts):
    v = random_vectors(demo_model, layers=(3, 12, 20))[12].normalized(to=20.0)
    with steer(demo_model, v, prompt=prompts[0]):
        steered = their_generation(demo_model, prompts[0], 8)
    assert steered == generate(demo_model, prompts[0], vectors=[v], max_new_tokens=8)
    assert steered != generate(demo_model, prompts[0], max_new_tokens=8)
