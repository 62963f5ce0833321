"""Every operator at every named position, in blocks and in generated text, against hooks by hand over whole texts."""

import pytest
import torch
from helpers.family import intervention_of, parameters_of, plain_hook_of, range_of
from helpers.models import random_vectors, tiny_model
from helpers.steering import LOGITS, logits_of

from caa_lens.engine.operators import OPERATORS
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import Provenance
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Gate, Intervention, as_interventions
from caa_lens.steering.placing import open_gates, span_of
from caa_lens.steering.steered_block import steer
from caa_lens.vectors.steering_vectors import SteeringVector

pytestmark = pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
NAMES = ["caa", "all", "after_first", "prompt", "answer", "last"]


@pytest.fixture(scope="module")
def small():
    return tiny_model()


def prompt_of(n_tokens, start, seed=0, answer=None):
    tokens = torch.randint(0, 64, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    n = n_tokens if answer is None else answer
    return Prompt(text="", tokens=tuple(tokens), steer_start=start, answer_start=n, read=(n_tokens - 1, n_tokens))


PROMPTS = [prompt_of(9, 6), prompt_of(5, 3, seed=1), prompt_of(12, 2, seed=2)]


def slow_loop(model, prompt, hooks, n_new=4):
    tokens = list(prompt.tokens)
    for _ in range(n_new):
        tokens.append(int(logits_of(model, [tokens], hooks)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_generates_what_hooks_by_hand_give_each_prompt_alone(small, operator, name):
    parameters = parameters_of(32, scale=2.0)[operator]
    order = intervention_of(operator, parameters, 2, positions=name)
    expected = []
    for prompt in PROMPTS:
        places = range_of(name, prompt, 99)
        expected.append(slow_loop(small, prompt, [plain_hook_of(operator, parameters, 2, 0.8, places)]))
    for use_cache in (True, False):
        steps = generate_tokens(small, PROMPTS, vectors=[order], max_new_tokens=4, use_cache=use_cache)
        assert torch.stack(list(steps), dim=1).tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_block_of_several_prompts_acts_in_each_at_its_own_positions(small, name):
    prompts = [prompt_of(9, 6, answer=8), prompt_of(5, 2, seed=1, answer=4)]
    parameters = parameters_of(32, scale=2.0)["affine"]
    batch = left_pad(prompts, n_ctx=64)
    with steer(small, intervention_of("affine", parameters, 2, positions=name), prompt=prompts):
        found = logits_of(small, batch.tokens, attention_mask=batch.attention_mask)
    with steer(small, intervention_of("affine", parameters, 2), prompt=prompts, positions=name):
        torch.testing.assert_close(
            logits_of(small, batch.tokens, attention_mask=batch.attention_mask), found, atol=0, rtol=0
        )
    for row, prompt in enumerate(prompts):
        hooks = [plain_hook_of("affine", parameters, 2, 0.8, range_of(name, prompt, len(prompt)))]
        expected = logits_of(small, [prompt.tokens], hooks)[0]
        torch.testing.assert_close(found[row, batch.padding[row] :], expected, **LOGITS)


def test_a_function_of_the_users_gets_the_vector_and_its_strength(small):
    v, prompt = random_vectors(small)[2], PROMPTS[0]

    def squash(stream, parameters, strength):
        return stream + strength * torch.tanh(stream * parameters["direction"])

    def by_hand(resid, hook):
        return torch.cat([resid[:, :6], resid[:, 6:] + 0.7 * torch.tanh(resid[:, 6:] * v.direction)], dim=1)

    order = Intervention(vector=v, operator=squash, multiplier=0.7)
    expected = slow_loop(small, prompt, [(v.hook_name, by_hand)])
    assert list(map(int, generate_tokens(small, [prompt], vectors=[order], max_new_tokens=4))) == expected


def test_an_edit_inside_of_a_block_generates_what_a_hook_by_hand_gives(small):
    factor = torch.linspace(-2, 2, 48)

    def by_hand(post, hook):
        return torch.cat([post[:, :6], post[:, 6:] * (1 + 0.8 * factor)], dim=1)

    order = Intervention(operator="scale", parameters={"factor": factor}, layer=2, multiplier=0.8, site="mlp.hook_post")
    expected = slow_loop(small, PROMPTS[0], [("blocks.2.mlp.hook_post", by_hand)])
    assert list(map(int, generate_tokens(small, [PROMPTS[0]], vectors=[order], max_new_tokens=4))) == expected


# ---- parameters by position ------------------------------------------------------------------------------------------


def test_a_block_at_the_front_meets_every_prompts_own_first_tokens(small):
    block = 2 * torch.randn(4, 32, generator=torch.Generator().manual_seed(5))

    def by_hand(resid, hook):
        return torch.cat([resid[:, :4] + 1.5 * block, resid[:, 4:]], dim=1)

    order = Intervention(
        parameters={"direction": block}, by_position={"direction"}, layer=1, multiplier=1.5, positions="front"
    )
    expected = [slow_loop(small, prompt, [("blocks.1.hook_resid_post", by_hand)]) for prompt in PROMPTS]
    for use_cache in (True, False):
        steps = generate_tokens(small, PROMPTS, vectors=[order], max_new_tokens=4, use_cache=use_cache)
        assert torch.stack(list(steps), dim=1).tolist() == expected
    with pytest.raises(
        ValueError, match="3 tokens, fewer than the 4 positions of the block that is added at its front"
    ):
        list(generate_tokens(small, [prompt_of(3, 2)], vectors=[order], max_new_tokens=1))


def test_parameters_by_position_refuse_prompts_of_another_length(small):
    order = Intervention(
        operator="scale", parameters={"factor": torch.ones(9, 1)}, by_position={"factor"}, layer=1, positions="prompt"
    )
    assert len(list(generate_tokens(small, [PROMPTS[0]], vectors=[order], max_new_tokens=2))) == 2
    with pytest.raises(
        ValueError, match="the prompt has 5 positions before the answer, but the parameters were made for 9"
    ):
        list(generate_tokens(small, [PROMPTS[1]], vectors=[order], max_new_tokens=2))
    assert span_of("caa", PROMPTS[0], 3) == (6, 9)
    with pytest.raises(ValueError, match="3 positions from the instruction's end"):
        span_of("caa", PROMPTS[0], 4)


# ---- gates -----------------------------------------------------------------------------------------------------------


def gate_for(model, which):
    """A gate that just one of the prompts opens."""
    states = []
    for prompt in PROMPTS:
        _, cache = model.run_with_cache(torch.tensor([prompt.tokens]))
        states.append(cache["resid_post", 1][0, -1])
    others = torch.stack([state for i, state in enumerate(states) if i != which])
    direction = states[which] - others.mean(0)
    highest, own = float((others @ direction).max()), float(states[which] @ direction)
    assert own > highest
    return Gate(direction=direction, bias=-(own + highest) / 2, layer=1)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gate_lets_a_vector_act_on_its_own_prompts_only_and_others_are_as_without_steering(small, which):
    v = random_vectors(small, scale=2.0)[2]
    gate = gate_for(small, which)
    assert open_gates(small, [gate], PROMPTS)[id(gate)].tolist() == [float(i == which) for i in range(3)]
    order = Intervention(vector=v, multiplier=2.0, gate=gate, positions="all")
    for use_cache in (True, False):
        found = torch.stack(
            list(generate_tokens(small, PROMPTS, vectors=[order], use_cache=use_cache, max_new_tokens=4)), 1
        )
        plain = torch.stack(list(generate_tokens(small, PROMPTS, max_new_tokens=4)), dim=1)
        hook = (v.hook_name, lambda resid, hook: resid + 2.0 * v.direction)
        assert found[which].tolist() == slow_loop(small, PROMPTS[which], [hook])
        for i in {0, 1, 2} - {which}:
            assert torch.equal(found[i], plain[i])
    closed = PROMPTS[(which + 1) % 3]
    with steer(small, order, prompt=closed):
        assert torch.equal(logits_of(small, [closed.tokens]), logits_of(small, [closed.tokens]))
    with steer(small, order, prompt=closed):
        inside = logits_of(small, [closed.tokens])
    assert torch.equal(inside, logits_of(small, [closed.tokens]))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_only_a_prompt_decides_is_refused_without_one(small):
    v = random_vectors(small)[2]
    for order in (
        Intervention(vector=v, positions="last"),
        Intervention(vector=v, start=0, gate=Gate(direction=v.direction, bias=0.0, layer=1)),
    ):
        with pytest.raises(ValueError, match="known only with the prompt: use generate"):
            order.hook()
        with pytest.raises(ValueError, match="known only with the prompt"):
            steer(small, order)


def test_orders_that_cannot_be_are_refused_with_what_to_do(small):
    v = SteeringVector(direction=torch.ones(32), layer=2)
    for bad, message in (
        ({}, "neither|not said at which layer: give a vector, or layer"),
        ({"vector": v, "layer": 3}, r"take vector.at_layer\(3\)"),
        ({"vector": v, "site": "hook_mlp_out"}, "a steering vector lives at hook_resid_post, not at hook_mlp_out"),
        ({"vector": v, "positions": "end"}, "unknown positions 'end': expected one of caa, all, after_first"),
        ({"vector": v, "positions": "last", "start": 3}, "give either start or positions"),
        ({"vector": v, "parameters": {"direction": torch.ones(32)}}, "the direction is given twice"),
        ({"layer": 2, "site": "ln1.hook_normalized"}, "unknown site 'ln1.hook_normalized': expected one of"),
        ({"layer": 2}, "add needs direction, got no direction: give a vector"),
        ({"vector": v, "by_position": {"factor"}}, "'factor' is said to differ by position, but is no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            Intervention(**bad)


def test_parameters_of_another_model_width_or_layer_are_refused(small):
    factor = {"factor": torch.ones(32)}
    for said, message in (
        (
            {"parameters": {"factor": torch.ones(48)}},
            "factor has 48 numbers, but hook_resid_post of 'tiny-random-llama' has 32",
        ),
        (
            {"parameters": factor, "site": "mlp.hook_post"},
            "factor has 32 numbers, but mlp.hook_post of .* has 48: fit it",
        ),
        ({"parameters": factor, "layer": 7}, "layer 7 is out of range"),
        (
            {"parameters": factor, "provenance": Provenance(model="other/model")},
            "were fitted on 'other/model', and this",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            as_interventions(small, [Intervention(operator="scale", **{"layer": 2, **said})])
