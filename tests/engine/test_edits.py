"""Operators against formulas by hand, and hooks in a real model against a slow, obvious twin without a cache."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers.models import random_vectors
from helpers.steering import LOGITS, Kept, hook_counts, logits_of, some_tokens

from caa_lens.engine.edits import Edit
from caa_lens.engine.operators import OPERATORS, ablate, add, set_projection
from caa_lens.steering.steered_block import steer
from caa_lens.vectors.steering_vectors import SteeringVector

N_POS = 11


def by_hand(operator, resid, direction, multiplier):
    """One operator at one position, in numpy's float64."""
    h, v = resid.double().numpy(), direction.double().numpy()
    u = v / np.sqrt(np.sum(v * v))
    along = np.sum(h * u)
    formula = {
        "add": h + multiplier * v,
        "ablate": h - multiplier * along * u,
        "set": h + (multiplier * np.sqrt(np.sum(v * v)) - along) * u,
    }
    return torch.from_numpy(formula[operator])


def twin(layer, direction, multiplier=1.0, start=0, operator="add"):
    """What steering means, position by position, in a forward over the whole text."""

    def edit(resid, hook):
        edited = resid.clone()
        for row in range(resid.shape[0]):
            m = float(multiplier[row]) if isinstance(multiplier, torch.Tensor) else multiplier
            first = int(start[row]) if isinstance(start, torch.Tensor) else start
            for pos in range(first, resid.shape[1]):
                edited[row, pos] = by_hand(operator, resid[row, pos], direction, m).to(resid.dtype)
        return edited

    return f"blocks.{layer}.hook_resid_post", edit


# ---- operators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
@pytest.mark.parametrize("multiplier", [-1.5, 0.0, 0.3, 1.0, 7.0])
def test_operators_follow_their_formulas(operator, multiplier):
    generator = torch.Generator().manual_seed(0)
    resid, direction = torch.randn(4, 3, 16, generator=generator), 3 * torch.randn(16, generator=generator)
    actual = OPERATORS[operator](resid, {"direction": direction}, torch.tensor(multiplier))
    for row in range(4):
        for pos in range(3):
            expected = by_hand(operator, resid[row, pos], direction, multiplier).float()
            torch.testing.assert_close(actual[row, pos], expected, atol=1e-5, rtol=1e-5)


def test_ablating_leaves_nothing_along_the_direction_and_the_rest_as_it_was():
    generator = torch.Generator().manual_seed(1)
    resid, direction = torch.randn(50, 16, generator=generator), torch.randn(16, generator=generator)
    ablated = ablate(resid, {"direction": direction}, torch.tensor(1.0))
    unit = direction / direction.norm()
    torch.testing.assert_close(ablated @ unit, torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        ablated, set_projection(resid, {"direction": direction}, torch.tensor(0.0)), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(ablate(ablated, {"direction": direction}, torch.tensor(1.0)), ablated, atol=1e-5, rtol=0)


def test_setting_makes_the_component_exactly_what_was_asked_whatever_it_was():
    generator = torch.Generator().manual_seed(2)
    resid, direction = 5 * torch.randn(50, 16, generator=generator), torch.randn(16, generator=generator)
    unit = direction / direction.norm()
    for multiplier in (-2.0, 0.0, 1.0):
        steered = set_projection(resid, {"direction": direction}, torch.tensor(multiplier))
        torch.testing.assert_close(steered @ unit, torch.full((50,), multiplier) * direction.norm(), atol=2e-5, rtol=0)
        again = set_projection(steered, {"direction": direction}, torch.tensor(multiplier))
        torch.testing.assert_close(again, steered, atol=2e-5, rtol=0)


def test_ablating_or_setting_along_the_zero_vector_changes_nothing():
    resid, zero = some_tokens(1).float()[..., None].expand(1, N_POS, 8).contiguous(), torch.zeros(8)
    for operator in (add, ablate, set_projection):
        assert torch.equal(operator(resid, {"direction": zero}, torch.tensor(2.0)), resid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_operators_keep_a_half_precision_stream_and_round_once(operator, dtype):
    generator = torch.Generator().manual_seed(3)
    resid, direction = torch.randn(20, 16, generator=generator).to(dtype), torch.randn(16, generator=generator)
    actual = OPERATORS[operator](resid, {"direction": direction}, torch.tensor(1.7))
    assert actual.dtype == dtype
    expected = torch.stack([by_hand(operator, row, direction, 1.7) for row in resid])
    # add rounds the product and the sum, the others once.
    tolerance = (2 if operator == "add" else 1) * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=4 * torch.finfo(dtype).eps)


# ---- in a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
@pytest.mark.parametrize("layer", [0, 4])
@pytest.mark.parametrize("start", [0, 4, N_POS - 1])
def test_a_hook_equals_its_slow_twin(tiny, operator, layer, start):
    v = random_vectors(tiny)[layer]
    tokens = some_tokens()
    steered = logits_of(tiny, tokens, [v.hook(multiplier=1.5, start=start, operator=operator)])
    expected = logits_of(tiny, tokens, [twin(layer, v.direction, 1.5, start, operator)])
    torch.testing.assert_close(steered, expected, **LOGITS)
    assert (steered - logits_of(tiny, tokens)).abs().max() > 0.01


def feed(model, tokens, mask, hooks, sizes):
    """Logits of the whole text, fed through the model's own KV cache in chunks."""
    kept = Kept(model, len(tokens))
    pieces = zip(tokens.split(sizes, dim=1), mask.split(sizes, dim=1), strict=True)
    return torch.cat([kept(piece, hooks, real) for piece, real in pieces], dim=1)


CHUNKS = {
    "token by token": [1] * N_POS,
    "uneven": [2, 5, 1, 3],
    "prompt, then tokens": [7, 1, 1, 1, 1],
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 2, 5)], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_a_kv_cache_changes_nothing(tiny, chunks, padding, operator):
    padding = torch.tensor(padding)
    tokens = some_tokens()
    mask = (torch.arange(N_POS) >= padding[:, None]).long()
    multiplier, start = torch.tensor([1.0, -2.0, 0.5]), padding + torch.tensor([4, 6, 1])
    vectors = random_vectors(tiny)
    hooks = [vectors[layer].hook(multiplier=multiplier, start=start, operator=operator) for layer in (0, 3)]
    twins = [twin(layer, vectors[layer].direction, multiplier, start, operator) for layer in (0, 3)]
    steered = feed(tiny, tokens, mask, hooks, CHUNKS[chunks])
    expected = logits_of(tiny, tokens, twins, attention_mask=mask)
    seen = mask.bool()
    torch.testing.assert_close(steered[seen], expected[seen], **LOGITS)
    unsteered = logits_of(tiny, tokens, attention_mask=mask)
    assert (steered - unsteered)[:, -1].abs().amax(-1).min() > 0.01  # every row, its last token included


def test_padding_on_the_left_changes_nothing(tiny):
    v = random_vectors(tiny)[2]
    short = some_tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)
    mask = (torch.arange(N_POS) >= 5).long()[None]
    alone = logits_of(tiny, short, [v.hook(start=3)])
    steered = logits_of(tiny, padded, [v.hook(start=8)], attention_mask=mask)
    torch.testing.assert_close(steered[:, 5:], alone, **LOGITS)


def test_positions_before_start_are_untouched_bit_for_bit(tiny):
    tokens = some_tokens()
    start = torch.tensor([3, 0, 9])
    plain = logits_of(tiny, tokens)
    for operator in ("add", "ablate", "set"):
        steered = logits_of(tiny, tokens, [random_vectors(tiny)[1].hook(start=start, operator=operator)])
        before = torch.arange(N_POS) < start[:, None]
        assert torch.equal(steered[before], plain[before])
        assert (steered - plain)[~before].abs().amax(-1).min() > 1e-3


def test_start_0_is_every_position_bit_for_bit_and_a_start_beyond_the_end_is_none(tiny):
    tokens, v = some_tokens(), random_vectors(tiny)[2]
    everywhere = logits_of(tiny, tokens, [(v.hook_name, lambda resid, hook: resid + v.direction)])
    for hook in (v.hook(start=0), v.hook(positions=(0, None)), v.hook(positions=torch.ones(1, N_POS).bool())):
        assert torch.equal(logits_of(tiny, tokens, [hook]), everywhere)
    assert torch.equal(logits_of(tiny, tokens, [v.hook(start=N_POS)]), logits_of(tiny, tokens))


@pytest.mark.parametrize("operator", ["add", "ablate"])
@pytest.mark.parametrize("multiplier", [0.0, -0.0, torch.zeros(3)], ids=["0", "-0", "rows"])
def test_multiplier_zero_is_the_identity_bit_for_bit(tiny, operator, multiplier):
    tokens = some_tokens()
    hooks = [v.hook(multiplier=multiplier, operator=operator, start=0) for v in random_vectors(tiny)]
    assert torch.equal(logits_of(tiny, tokens, hooks), logits_of(tiny, tokens))


def test_multiplier_zero_keeps_even_negative_zeros():
    resid = torch.tensor([[[-0.0, 0.0, 1.0]]])
    edit = Edit(direction=torch.tensor([1.0, 2.0, 3.0]), layer=0, positions=(0, None), multiplier=0.0)
    steered = edit.apply(resid, 0)
    assert steered.view(torch.int32).tolist() == resid.view(torch.int32).tolist()


def test_an_edit_that_says_no_more_than_it_must_adds_its_direction_once():
    resid, direction = torch.ones(1, 2, 3), torch.tensor([1.0, -2.0, 3.0])
    steered = Edit(direction=direction, layer=0, positions=(1, None)).apply(resid, 0)
    assert steered.tolist() == [[[1.0, 1.0, 1.0], [2.0, -1.0, 4.0]]]


@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_one_multiplier_and_start_a_row_equals_runs_of_single_rows(tiny, operator):
    tokens, v = some_tokens(4), random_vectors(tiny)[1]
    multipliers, starts = torch.tensor([-1.0, 0.0, 0.5, 2.0]), torch.tensor([0, 3, 10, 6])
    together = logits_of(tiny, tokens, [v.hook(multiplier=multipliers, start=starts, operator=operator)])
    for row in range(4):
        hook = v.hook(multiplier=multipliers[row].item(), start=int(starts[row]), operator=operator)
        torch.testing.assert_close(together[row], logits_of(tiny, tokens[row : row + 1], [hook])[0], **LOGITS)


def test_a_vector_and_its_negative_cancel(tiny):
    tokens, v = some_tokens(), random_vectors(tiny, scale=0.5)[2]
    cancelled = logits_of(tiny, tokens, [v.hook(start=4), (-v).hook(start=4)])
    torch.testing.assert_close(cancelled, logits_of(tiny, tokens), **LOGITS)


def test_two_vectors_at_one_layer_add_up(tiny):
    tokens = some_tokens()
    v, w = random_vectors(tiny)[3], random_vectors(tiny, seed=1)[3]
    both = logits_of(tiny, tokens, [v.hook(multiplier=2.0, start=4), w.hook(start=4)])
    torch.testing.assert_close(both, logits_of(tiny, tokens, [(2.0 * v + w).hook(start=4)]), **LOGITS)


def test_vectors_at_several_layers_act_one_after_another(tiny):
    tokens, vectors = some_tokens(), random_vectors(tiny)
    both = logits_of(tiny, tokens, [vectors[4].hook(start=2), vectors[0].hook(start=5)])
    twins = [twin(0, vectors[0].direction, 1.0, 5), twin(4, vectors[4].direction, 1.0, 2)]
    torch.testing.assert_close(both, logits_of(tiny, tokens, twins), **LOGITS)


# ---- manners ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_tensors_that_other_hooks_saved_are_not_edited(tiny, operator):
    tokens, v = some_tokens(), random_vectors(tiny)[2]
    saved = {}

    def save(key):
        def hook_fn(resid, hook):
            saved[key] = (resid, resid.clone())

        return v.hook_name, hook_fn

    logits_of(tiny, tokens, [save("before"), v.hook(start=4, operator=operator), save("after")])
    for tensor, as_it_was in saved.values():
        assert torch.equal(tensor, as_it_was)
    assert torch.equal(saved["before"][0][:, :4], saved["after"][0][:, :4])
    assert not torch.equal(saved["before"][0][:, 4:], saved["after"][0][:, 4:])


def test_vector_multiplier_and_start_are_not_edited(tiny):
    v = random_vectors(tiny)[2]
    multiplier, start = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, 3])
    kept = v.direction.clone(), multiplier.clone(), start.clone()
    for operator in ("add", "ablate", "set"):
        logits_of(tiny, some_tokens(), [v.hook(multiplier=multiplier, start=start, operator=operator)])
    for tensor, as_it_was in zip((v.direction, multiplier, start), kept, strict=True):
        assert torch.equal(tensor, as_it_was)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_vector_leaves_a_half_precision_model_in_half_precision(dtype, tiny_model):
    model = tiny_model(dtype=dtype)
    tokens, v = some_tokens(), random_vectors(model, scale=0.5)[2]
    seen = []
    saves = (v.hook_name, lambda resid, hook: seen.append(resid))
    for operator in ("add", "ablate", "set"):
        seen.clear()
        logits = logits_of(model, tokens, [saves, v.hook(start=4, operator=operator), saves])
        before, after = seen
        assert (after.dtype, logits.dtype) == (dtype, dtype)
        expected = torch.stack([by_hand(operator, h, v.direction, 1.0) for h in before[:, 4:].reshape(-1, 32)])
        steps = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(after[:, 4:].reshape(-1, 32).double(), expected, **steps)


def test_the_same_pair_serves_forwards_of_different_batches_and_models(tiny):
    other = copy.deepcopy(tiny)
    v = random_vectors(tiny)[2]
    hook = v.hook(multiplier=1.5, start=3)
    for model, n_rows, n_pos in [(tiny, 3, 11), (tiny, 1, 5), (other, 7, 8), (tiny, 2, 30)]:
        tokens = some_tokens(n_rows, n_pos, seed=n_rows)
        expected = logits_of(tiny, tokens, [twin(2, v.direction, 1.5, 3)])
        torch.testing.assert_close(logits_of(model, tokens, [hook]), expected, **LOGITS)
    chunks = feed(tiny, some_tokens(), torch.ones(3, N_POS, dtype=torch.long), [hook], [4, 1, 6])
    torch.testing.assert_close(chunks, logits_of(tiny, some_tokens(), [twin(2, v.direction, 1.5, 3)]), **LOGITS)


def test_the_same_pair_registered_twice_steers_twice(tiny):
    tokens, v = some_tokens(), random_vectors(tiny)[2]
    hook = v.hook(start=3)
    expected = logits_of(tiny, tokens, [twin(2, v.direction, 2.0, 3)])
    torch.testing.assert_close(logits_of(tiny, tokens, [hook, hook]), expected, **LOGITS)
    with tiny.hooks(fwd_hooks=[hook]):
        torch.testing.assert_close(logits_of(tiny, tokens, [hook]), expected, **LOGITS)
    assert hook_counts(tiny) == {}


@pytest.mark.hooked  # a bridge of TransformerLens 3 cannot start at a layer
def test_stopping_and_starting_at_a_layer_works_like_without_hooks(tiny):
    tokens, v = some_tokens(), random_vectors(tiny)[1]
    whole = logits_of(tiny, tokens, [v.hook(start=4)])
    half = logits_of(tiny, tokens, [v.hook(start=4)], stop_at_layer=2)
    torch.testing.assert_close(logits_of(tiny, half, [v.hook(start=4)], start_at_layer=2), whole, **LOGITS)


def test_callers_hooks_stay_when_ours_leave_also_after_an_exception(tiny):
    v, tokens = random_vectors(tiny)[2], some_tokens()
    calls = []
    tiny.add_hook("blocks.2.hook_resid_post", lambda resid, hook: calls.append("theirs"))
    hook = v.hook(start=4)

    def fail(resid, hook):
        raise RuntimeError("theirs failed")

    with tiny.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda resid, hook: None)]):
        theirs = hook_counts(tiny)
        expected = logits_of(tiny, tokens, [hook])
        assert hook_counts(tiny) == theirs
        for broken in ("blocks.2.hook_resid_mid", "blocks.4.hook_resid_post"):  # between our two points, and after
            with pytest.raises(RuntimeError, match="theirs failed"):
                logits_of(tiny, tokens, [hook, (broken, fail)])
            assert hook_counts(tiny) == theirs == {"blocks.1.hook_resid_post": 1, "blocks.2.hook_resid_post": 1}
            assert torch.equal(logits_of(tiny, tokens, [hook]), expected)  # and nothing is left of the failed run
    assert "theirs" in calls


# ---- training ---------------------------------------------------------------------------------------------------


TARGET = torch.tensor([5, 6, 7])


def train(model, logits, parameters, steps=6):
    """The loss before each of a few Adam steps toward other tokens."""
    model.requires_grad_(False)
    optimizer, losses = torch.optim.Adam(parameters, lr=0.3), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits()[:, -1], TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def inside_a_block(model, vector, multiplier):
    with steer(model, vector, start=3, multiplier=multiplier):
        return model(some_tokens())


WAYS = {
    "steer": lambda model, v, m: lambda: inside_a_block(model, v, m),
    "hook": lambda model, v, m: partial(model.run_with_hooks, some_tokens(), fwd_hooks=[v.hook(multiplier=m, start=3)]),
    "a span": lambda model, v, m: partial(
        model.run_with_hooks, some_tokens(), fwd_hooks=[v.hook(multiplier=m, positions=(3, None))]
    ),
}


def by_autograd(model, direction, multiplier):
    """The same loss without any of our code: the vector is added by a plain hook."""

    def edit(resid, hook):
        return torch.cat([resid[:, :3], resid[:, 3:] + multiplier * direction], dim=1)

    return lambda: model.run_with_hooks(some_tokens(), fwd_hooks=[("blocks.2.hook_resid_post", edit)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in place", "on another device"])
def test_a_vector_is_trained_step_by_step_as_plain_autograd_trains_it(tiny, monkeypatch, way, elsewhere):
    if elsewhere:  # what `to` gives on another device: a copy that no optimiser reaches
        to = Edit.to
        monkeypatch.setattr(Edit, "to", lambda self, device: copy.deepcopy(to(self, device)))
    first = random_vectors(tiny, scale=0.1)[2].direction
    trained, expected = (torch.nn.Parameter(first.clone()) for _ in range(2))
    losses = train(tiny, WAYS[way](tiny, SteeringVector.from_direction(trained, 2), 1.5), [trained])
    assert losses == pytest.approx(train(tiny, by_autograd(tiny, expected, 1.5), [expected]), abs=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(trained, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_multiplier_is_trained_also_from_zero(tiny, way):
    v = random_vectors(tiny)[2]
    for start in (torch.zeros(3), torch.tensor(0.5)):
        trained, expected = (torch.nn.Parameter(start.clone()) for _ in range(2))
        losses = train(tiny, WAYS[way](tiny, v, trained), [trained])

        def plain(by_row=expected):
            return by_autograd(tiny, v.direction, by_row[:, None, None] if by_row.ndim else by_row)()

        assert losses == pytest.approx(train(tiny, plain, [expected]), abs=1e-4)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_the_gradient_of_every_operator_is_that_of_its_formula(operator):
    generator = torch.Generator().manual_seed(4)
    resid = torch.randn(2, 3, 8, generator=generator, dtype=torch.float32, requires_grad=True)
    direction = torch.randn(8, generator=generator, requires_grad=True)
    multiplier = torch.tensor([0.7, 0.0], requires_grad=True)
    edit = Edit(direction=direction, layer=0, positions=(1, None), multiplier=multiplier, operator=operator)
    weights = torch.randn(2, 3, 8, generator=generator)
    found = torch.autograd.grad((edit.apply(resid, 0) * weights).sum(), (resid, direction, multiplier))
    h, m, u = resid[:, 1:], multiplier[:, None, None], direction / direction.norm()
    along = (h * u).sum(-1, keepdim=True)
    formula = {"add": h + m * direction, "ablate": h - m * along * u, "set": h + (m * direction.norm() - along) * u}
    plain = torch.cat([resid[:, :1], formula[operator]], dim=1)
    expected = torch.autograd.grad((plain * weights).sum(), (resid, direction, multiplier))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_direction_is_copied_unless_it_is_trained(tiny):
    plain, trained = torch.ones(32), torch.ones(32, requires_grad=True)
    copied, kept = (SteeringVector.from_direction(one, 2) for one in (plain, trained))
    plain.zero_()
    assert copied.direction.sum() == 32
    assert kept.direction is trained
    (2.0 * kept + copied).direction.sum().backward()  # arithmetic keeps gradients
    assert torch.equal(trained.grad, torch.full((32,), 2.0))
    assert kept.norm == pytest.approx(32**0.5)
    assert (kept.cosine(copied), "norm=5.66" in repr(kept)) == (pytest.approx(1.0), True)


@pytest.mark.parametrize("change", ["direction", "multiplier", "start"])
def test_numbers_changed_in_place_are_felt_by_a_hook_also_on_another_device(tiny, monkeypatch, change):
    to = Edit.to
    monkeypatch.setattr(Edit, "to", lambda self, device: copy.deepcopy(to(self, device)))
    v = random_vectors(tiny)[2]
    v = SteeringVector(direction=v.direction.clone(), layer=2)
    multiplier, start = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, 3])
    hook = v.hook(multiplier=multiplier, start=start)
    before = logits_of(tiny, some_tokens(), [hook])
    {"direction": v.direction, "multiplier": multiplier, "start": start}[change].mul_(2)
    after = logits_of(tiny, some_tokens(), [hook])
    assert not torch.equal(before, after)
    assert torch.equal(after, logits_of(tiny, some_tokens(), [v.hook(multiplier=multiplier, start=start)]))


@pytest.mark.second_device
def test_a_vector_on_the_cpu_is_trained_in_a_model_on_the_gpu(tiny_model):
    model = tiny_model()
    trained = torch.nn.Parameter(random_vectors(model, scale=0.1)[2].direction)
    run = partial(
        model.run_with_hooks, some_tokens(), fwd_hooks=[SteeringVector.from_direction(trained, 2).hook(start=3)]
    )
    losses = train(model, lambda: run().cpu(), [trained])
    assert losses[-1] < 0.8 * losses[0]


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [5, 13])
def test_a_layer_the_model_does_not_have_is_refused_before_it_runs(tiny, layer, tiny_model):
    vectors = random_vectors(tiny)
    tiny.add_hook("hook_embed", lambda embed, hook: pytest.fail("the model ran"))
    theirs = hook_counts(tiny)
    far = vectors[4].at_layer(layer).hook(start=0)
    for _ in range(2):  # the refusal leaves nothing behind that would let a second try pass
        with pytest.raises(
            ValueError, match=rf"is for layer {layer}, but the model has layers 0 to 4: extract it from"
        ):
            logits_of(tiny, some_tokens(), [vectors[1].hook(start=0), far])
        assert hook_counts(tiny) == theirs
    with pytest.raises(ValueError, match=f"is for layer {layer}"):
        tiny.add_hook(*far)
    # The same pair fits a model that is deep enough.
    deep = tiny_model(n_layers=layer + 1)
    expected = logits_of(deep, some_tokens(), [twin(layer, vectors[4].direction)])
    torch.testing.assert_close(logits_of(deep, some_tokens(), [far]), expected, **LOGITS)
    with pytest.raises(ValueError, match=f"is for layer {layer}"):
        logits_of(tiny, some_tokens(), [far])


def test_a_vector_of_another_width_is_refused_with_a_remedy(tiny):
    wide = SteeringVector(direction=torch.ones(64), layer=2)
    with pytest.raises(ValueError, match="vector has d_model=64, but the model has d_model=32: extract it from this"):
        logits_of(tiny, some_tokens(), [wide.hook(start=0)])
    assert hook_counts(tiny) == {}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_wrong_number_of_rows_is_refused(tiny, n):
    v = random_vectors(tiny)[2]
    with pytest.raises(ValueError, match=f"multiplier has {n} entries for a batch of 3: give one number, or one a row"):
        logits_of(tiny, some_tokens(), [v.hook(multiplier=torch.ones(n), start=0)])
    with pytest.raises(ValueError, match=f"start has {n} entries for a batch of 3"):
        logits_of(tiny, some_tokens(), [v.hook(start=torch.ones(n, dtype=torch.long))])
    assert hook_counts(tiny) == {}


def test_a_hook_that_does_not_say_where_it_acts_is_refused_with_the_remedy():
    v = SteeringVector(direction=torch.ones(4), layer=2)
    remedy = (
        r"not said where steering starts, and a hook knows no prompt: give start=0 for every position, "
        r"start=Prompt.of\(model, question\).steer_start for the end of the instruction, or positions="
    )
    for given in ({}, {"multiplier": 2.0}, {"start": None, "positions": None}):
        with pytest.raises(ValueError, match=remedy):
            v.hook(**given)
    with pytest.raises(ValueError, match=r"give either start or positions: positions=\(first, None\) is start=first"):
        v.hook(start=0, positions=(0, None))


def test_hooks_that_make_no_sense_are_refused():
    v = SteeringVector(direction=torch.ones(4), layer=2)
    with pytest.raises(ValueError, match="unknown operator 'multiply': expected one of add, ablate, set"):
        v.hook(operator="multiply", start=0)
    with pytest.raises(ValueError, match=r"must be a number or \[batch\], got shape \(2, 1\)"):
        v.hook(multiplier=torch.ones(2, 1), start=0)
    for bad in (float("nan"), float("inf"), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="multiplier must be finite, got"):
            v.hook(multiplier=bad, start=0)
    with pytest.raises(ValueError, match="start must be a position counted from 0, got -1"):
        v.hook(start=-1)
