"""The family of operators: each formula by hand in float64, its laws, and every one of them as rows of a staircase."""

import pytest
import torch
from helpers.family import by_hand, parameters_of
from helpers.models import tiny_model
from helpers.steering import some_tokens
from torch.testing import assert_close

from caa_lens.engine.edits import Edit
from caa_lens.engine.operators import OPERATORS, check_operator, check_parameters
from caa_lens.engine.staircase import Staircase
from caa_lens.models.adapters.choice import adapter_of

D, MASK = 12, torch.ones(1, 1, dtype=torch.long)
DRAW = torch.Generator().manual_seed(3)
STREAM = 3 * torch.randn(4, 5, D, generator=DRAW)
PARAMETERS = parameters_of(D)


def drawn(*shape):
    return torch.randn(*shape, generator=DRAW)


def test_every_operator_of_the_family_is_tried_here():
    assert list(PARAMETERS) == list(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("strength", [-1.5, 0.0, 0.4, 1.0, 3.0])
def test_every_operator_follows_its_formula(operator, strength):
    found = OPERATORS[operator](STREAM, PARAMETERS[operator], torch.tensor(strength))
    for row in range(4):
        for pos in range(5):
            expected = by_hand(operator, STREAM[row, pos], PARAMETERS[operator], strength)
            assert_close(found[row, pos].double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strength_0_is_the_identity_bit_for_bit_and_nothing_given_is_changed(operator, dtype):
    stream, parameters = STREAM.to(dtype), {name: one.clone() for name, one in PARAMETERS[operator].items()}
    kept = stream.clone(), {name: one.clone() for name, one in parameters.items()}
    direction = parameters.pop("direction", None)
    edit = Edit(layer=0, positions=(0, None), direction=direction, operator=operator, parameters=parameters)
    at_0 = Edit(
        layer=0, positions=(0, None), direction=direction, operator=operator, parameters=parameters, multiplier=0.0
    )
    steered = edit.apply(stream, 0)
    assert steered.dtype == dtype
    assert not torch.equal(steered, stream)
    assert torch.equal(at_0.apply(stream, 0), stream) == (operator != "set")  # where it sets to is its strength
    assert torch.equal(stream, kept[0])
    assert all(torch.equal(one, kept[1][name]) for name, one in edit.all_parameters.items())


def test_pulling_makes_the_component_the_target_leaves_the_rest_and_is_idempotent():
    p = PARAMETERS["pull"]
    unit = p["direction"] / p["direction"].norm()
    pulled = OPERATORS["pull"](STREAM, p, torch.tensor(1.0))
    assert_close(pulled @ unit, torch.full((4, 5), 2.5), atol=1e-5, rtol=0)
    rest = STREAM - (STREAM @ unit)[..., None] * unit
    assert_close(pulled - (pulled @ unit)[..., None] * unit, rest, atol=1e-5, rtol=0)
    assert_close(OPERATORS["pull"](pulled, p, torch.tensor(1.0)), pulled, atol=1e-5, rtol=0)
    by_set = OPERATORS["set"](STREAM, {"direction": 2.5 * unit}, torch.tensor(1.0))
    assert_close(pulled, by_set, atol=1e-5, rtol=0)


def test_keeping_the_norm_keeps_it_and_turns_towards_the_vector():
    p = PARAMETERS["add_keep_norm"]
    moved = OPERATORS["add_keep_norm"](STREAM, p, torch.tensor(2.0))
    assert_close(moved.norm(dim=-1), STREAM.norm(dim=-1), atol=1e-5, rtol=1e-5)
    assert bool(((moved @ p["direction"]) > (STREAM @ p["direction"])).all())


def test_rotating_keeps_norms_and_a_full_turn_is_nothing_and_turns_add_up():
    p = {name: PARAMETERS["rotate"][name] for name in ("direction", "toward")}
    rotate = OPERATORS["rotate"]
    turned = rotate(STREAM, p, torch.tensor(1.1))
    assert_close(turned.norm(dim=-1), STREAM.norm(dim=-1), atol=1e-5, rtol=1e-5)
    assert_close(rotate(STREAM, p, torch.tensor(2 * torch.pi)), STREAM, atol=1e-5, rtol=0)
    assert_close(rotate(turned, p, torch.tensor(-1.1)), STREAM, atol=1e-5, rtol=0)
    assert_close(rotate(turned, p, torch.tensor(0.4)), rotate(STREAM, p, torch.tensor(1.5)), atol=1e-5, rtol=0)
    quarter = rotate(p["direction"][None], {**p, "angle": torch.tensor(torch.pi / 2)}, torch.tensor(1.0))[0]
    assert abs(float(quarter @ p["direction"])) < 1e-4
    assert float(quarter @ p["toward"]) > 0


def test_the_support_excludes_its_own_ends_and_what_is_outside():
    h = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 2.0]])
    p = {"scale": torch.ones(5), "shift": torch.ones(5), "low": torch.full((5,), -1.0), "high": torch.full((5,), 1.0)}
    assert OPERATORS["affine"](h, p, torch.tensor(1.0)).tolist() == [[-1.0, 1.0, 1.5, 1.0, 2.0]]
    everywhere = {"scale": torch.ones(5), "shift": torch.ones(5)}
    assert OPERATORS["affine"](h, everywhere, torch.tensor(1.0)).tolist() == [[0.0, 1.0, 1.5, 2.0, 3.0]]


def test_scaling_zeroes_at_minus_1_reflects_at_minus_2_keeps_signs_above_and_is_linear():
    factor = PARAMETERS["scale"]["factor"]
    scale = OPERATORS["scale"]
    assert_close(scale(STREAM, {"factor": factor}, torch.tensor(-1.0)), STREAM * (1 - factor), atol=0, rtol=0)
    assert_close(scale(STREAM, {"factor": factor}, torch.tensor(-2.0)), STREAM * (1 - 2 * factor), atol=0, rtol=0)
    assert torch.equal(scale(STREAM, {"factor": factor}, torch.tensor(-0.9)).sign(), STREAM.sign())
    twice = scale(2 * STREAM, {"factor": factor}, torch.tensor(0.7))
    assert_close(twice, 2 * scale(STREAM, {"factor": factor}, torch.tensor(0.7)), atol=0, rtol=0)
    assert bool(((scale(STREAM, {"factor": factor}, torch.tensor(1.0)) != STREAM).sum(-1) == factor.sum()).all())


# ---- in a staircase ------------------------------------------------------------------------------------------------


def edit_of(operator, strength=0.8, layer=1, parameters=None, **where):
    parameters = dict(PARAMETERS[operator] if parameters is None else parameters)
    direction = parameters.pop("direction", None)
    where = {"positions": (0, None), **where}
    return Edit(
        layer=layer, direction=direction, operator=operator, parameters=parameters, multiplier=strength, **where
    )


def alone(condition, resid):
    """Three blocks over `[question branch pos d]` with one condition's edits behind them."""
    for layer in range(3):
        resid = resid + torch.tanh(resid.roll(1, -1))
        for one in condition:
            if one.layer == layer:
                resid = one.apply(resid.flatten(0, 1), 0).unflatten(0, resid.shape[:2])
    return resid


OTHER = {**PARAMETERS["affine"], "shift": PARAMETERS["affine"]["shift"] + 1}


@pytest.mark.parametrize(
    "conditions",
    [
        [(edit_of(operator),) for operator in OPERATORS],
        [(edit_of("affine"),), (edit_of("affine", parameters=OTHER),), (edit_of("affine", 0.2),), ()],
        [(edit_of("add"),), (edit_of("add", positions=(0, 1)),), (edit_of("add", positions=(1, None)),)],
        [(edit_of("add", positions=torch.tensor([[True, False, True, False, False]])),), (edit_of("scale"),)],
        [
            (edit_of("scale", parameters={"factor": drawn(3, 1)}, by_position=frozenset({"factor"})),),
            (edit_of("scale", parameters={"factor": drawn(3, 1)}, by_position=frozenset({"factor"})),),
            (
                edit_of("scale", parameters={"factor": drawn(2, 1)}, by_position=frozenset({"factor"}), layer=0),
                edit_of("add", parameters={"direction": drawn(2, D)}, by_position=frozenset({"direction"})),
            ),
        ],
        [(edit_of("add", layer=0), edit_of("pull", layer=0)), (edit_of("pull", layer=0), edit_of("add", layer=0))],
        [
            (edit_of(lambda h, p, s: h + s * torch.sin(h), parameters={}),),
            (edit_of(lambda h, p, s: h + torch.cos(h), 0.0, parameters={}),),
        ],
    ],
)
@pytest.mark.parametrize("n_branches", [1, 2])
def test_conditions_with_other_parameters_are_never_merged(conditions, n_branches):
    start = torch.randn(3, n_branches, 5, D, generator=torch.Generator().manual_seed(1))
    stairs, resid = Staircase(conditions), start
    for layer in range(3):
        resid = stairs(layer, resid + torch.tanh(resid.roll(1, -1)))
    groups = resid.unflatten(1, (-1, n_branches))
    for condition, group in zip(conditions, stairs.condition_groups(), strict=True):
        assert_close(groups[:, int(group)], alone(condition, start), atol=1e-5, rtol=1e-5)


def test_conditions_with_the_same_parameters_share_their_rows():
    same = [(edit_of("affine"),), (edit_of("affine"),), (edit_of("affine", layer=2),)]
    assert [sorted(group) for group in Staircase(same).groups] == [[0, 1], [2]]


# ---- parameters by position ------------------------------------------------------------------------------------------


def test_a_block_by_position_meets_its_own_positions_in_every_row_whole_and_token_by_token():
    block, stream = drawn(3, D), drawn(2, 6, D)
    edit = Edit(layer=0, positions=(torch.tensor([1, 2]), None), direction=block, by_position=frozenset({"direction"}))
    expected = stream.clone()
    for row, first in enumerate((1, 2)):
        for i in range(3):
            expected[row, first + i] += block[i]
    assert torch.equal(edit.apply(stream, 0), expected)
    one_by_one = torch.cat([edit.apply(stream[:, i : i + 1], i) for i in range(6)], dim=1)
    assert torch.equal(one_by_one, expected)
    assert torch.equal(edit.apply(stream[:, :1], 40), stream[:, :1])  # a decoding step adds nothing


def test_several_heads_are_one_width():
    z = drawn(2, 3, 4, 5)
    factor = torch.zeros(20)
    factor[5:10] = 1.0  # the second head
    edit = Edit(layer=0, positions=(0, None), operator="scale", parameters={"factor": factor}, site="attn.hook_z")
    expected = z.clone()
    expected[:, :, 1] *= 2
    assert torch.equal(edit.apply(z, 0), expected)


def test_edits_inside_a_block_run_at_their_hook_point_also_one_token_at_a_time():
    model, tokens = tiny_model(), some_tokens(1)
    for site, width in {"attn.hook_z": 32, "hook_attn_out": 32, "mlp.hook_post": 48, "hook_mlp_out": 32}.items():
        factor = torch.linspace(-1, 1, width)
        edit = Edit(layer=2, positions=(4, None), operator="scale", parameters={"factor": factor}, site=site)

        def by_hand(out, hook, factor=factor):
            out = out.clone()
            out[:, 4:] *= 1 + factor.reshape(out.shape[2:])
            return out

        with torch.no_grad():
            expected = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.2.{site}", by_hand)])
            found = model.run_with_hooks(tokens, fwd_hooks=[edit.hook()])
            assert not torch.allclose(found, model(tokens), atol=1e-3)
            cache = adapter_of(model).new_cache(model, 1)
            with model.hooks(fwd_hooks=[edit.hook()]):
                pieces = [
                    model(tokens[:, i : i + 1], past_kv_cache=cache, attention_mask=MASK)
                    for i in range(tokens.shape[1])
                ]
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-4)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "parameters", "message"),
    [
        ("affine", {"scale": torch.ones(4)}, "affine needs scale and shift, got no shift"),
        ("pull", {"target": torch.ones(())}, "got no direction: give a vector"),
        ("scale", {"factor": torch.ones(4), "factors": torch.ones(4)}, "no parameter 'factors': it takes factor"),
        ("affine", {"scale": torch.ones(4), "shift": torch.ones(4), "low": torch.ones(4)}, "both low and high"),
        ("affine", {"scale": torch.ones(4), "shift": torch.ones(5)}, r"unequal widths \(scale 4, shift 5\)"),
        ("scale", {"factor": torch.tensor([1.0, torch.nan])}, "must be finite"),
        ("scale", {"factor": torch.ones(2, 4)}, r"shape \(2, 4\), expected \[width\]"),
    ],
)
def test_parameters_that_an_operator_cannot_use_are_told_with_what_to_give(operator, parameters, message):
    with pytest.raises(ValueError, match=message):
        check_parameters(operator, parameters, frozenset())


def test_operators_are_names_or_functions():
    check_operator(lambda stream, parameters, strength: stream)
    with pytest.raises(ValueError, match=r"expected one of add, ablate, set, .*, or a function"):
        check_operator("steer")
    with pytest.raises(TypeError, match="or a function, got int"):
        check_operator(3)


def test_a_mask_of_another_site_is_refused_with_the_remedy():
    edit = Edit(
        layer=0, positions=(0, None), operator="scale", parameters={"factor": torch.ones(7)}, site="mlp.hook_post"
    )
    with pytest.raises(ValueError, match=r"factor has 7 numbers, but mlp.hook_post of the model has 12: fit it at"):
        edit.apply(STREAM, 0)


def test_a_function_that_changes_the_shape_is_told():
    edit = Edit(layer=0, positions=(0, None), operator=lambda h, p, s: h[:, :1], parameters={})
    with pytest.raises(ValueError, match="gives a stream of the same shape"):
        edit.apply(STREAM, 0)
