"""Linear-AcT: the fit's laws on numbers, the causal fit's laws on a model, and a slow twin of the whole fit."""

from dataclasses import replace
from functools import partial
from inspect import unwrap

import pytest
import torch
from helpers.methods import PAIRS
from helpers.steering import logits_of
from torch.testing import assert_close

from caa_lens.engine.operators import OPERATORS
from caa_lens.methods import linear_act
from caa_lens.methods.linear_act import LinearAct, fit, fit_map
from caa_lens.prompts.prompt_formats import Prompt, default_format, encode_answer
from caa_lens.steering.interventions import as_interventions
from caa_lens.steering.steered_block import steer
from caa_lens.vectors.extraction import extract

DRAW = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


# ---- laws of the fit -------------------------------------------------------------------------------------------------


def test_a_line_is_found_whatever_the_order_of_the_texts():
    a, s, t = drawn(50, 6), drawn(6).exp(), drawn(6)
    b = (s * a + t)[torch.randperm(50, generator=DRAW)]
    scale, shift = fit_map(a, b)
    assert_close(scale, s, atol=1e-12, rtol=1e-12)
    assert_close(shift, t, atol=1e-12, rtol=1e-12)
    again = fit_map(a[torch.randperm(50, generator=DRAW)], b)
    assert all(map(torch.equal, again, (scale, shift))) or all(
        torch.allclose(x, y, atol=1e-13) for x, y in zip(again, (scale, shift), strict=True)
    )


def test_gaussians_give_the_ratio_of_their_deviations_and_not_the_printed_formula():
    a, b = 1 + 2 * drawn(20_000, 1), -3 + 0.5 * drawn(20_000, 1)
    for kind in ("linear", "gaussian"):
        scale, shift = fit_map(a, b, kind)
        assert float(scale) == pytest.approx(0.25, abs=0.01)
        assert float(shift) == pytest.approx(-3.25, abs=0.05)


def test_the_mean_is_carried_over_exactly_and_the_scale_is_bounded_and_what_is_left_is_the_formula():
    a, b = drawn(40, 8) * drawn(8).exp(), 3 * drawn(40, 8) ** 3 + drawn(8)
    scale, shift = fit_map(a, b)
    mapped = scale * a + shift
    assert_close(mapped.mean(0), b.mean(0), atol=1e-12, rtol=1e-12)
    assert bool((scale >= 0).all())
    assert bool((scale * a.std(0) <= b.std(0) + 1e-12).all())
    left = (mapped.sort(0).values - b.sort(0).values).pow(2).mean(0)
    expected = b.var(0, correction=0) - scale**2 * a.var(0, correction=0)
    assert_close(left, expected, atol=1e-10, rtol=1e-10)


def test_the_same_set_twice_gives_the_identity_and_a_constant_coordinate_is_shifted_only():
    a = drawn(10, 4)
    a[:, 2] = 5.0
    scale, shift = fit_map(a, a)
    assert_close(scale, torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(shift, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    scale, shift = fit_map(a, a + 1)
    assert (float(scale[2]), float(shift[2])) == (1.0, 1.0)


def test_the_strength_folds_into_the_map():
    h, p = drawn(3, 6), {"scale": drawn(6).exp(), "shift": drawn(6)}
    for strength in (-1.0, 0.3, 1.0, 2.0):
        found = OPERATORS["affine"](h, p, torch.tensor(strength))
        assert_close(found, (strength * (p["scale"] - 1) + 1) * h + strength * p["shift"], atol=1e-6, rtol=1e-6)


def test_behind_what_changes_nothing_the_two_sided_fit_is_the_same_map_again_and_the_one_sided_the_identity():
    """So L layers of the residual stream would apply a two-sided map, or one that is fitted at once, L times."""
    a, b = drawn(30, 5) * drawn(5).exp(), 2 * drawn(30, 5) + drawn(5)
    scale, shift = fit_map(a, b)
    again = fit_map(scale * a + shift, scale * b + shift)
    assert_close(torch.stack(again), torch.stack([scale, shift]), atol=1e-12, rtol=1e-12)
    one_sided = fit_map(scale * a + shift, b)
    assert_close(one_sided[0], torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(one_sided[1], torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_unequal_sets_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"the source has 3 texts and the target 4: .* so give as many of both"):
        fit_map(drawn(3, 2), drawn(4, 2))
    with pytest.raises(ValueError, match="unknown kind 'affine': expected one of linear, mean, gaussian"):
        fit_map(drawn(3, 2), drawn(3, 2), "affine")


# ---- on a model ------------------------------------------------------------------------------------------------------


def test_mean_act_at_one_layer_is_caas_vector(tiny_chat):
    fitted = fit(tiny_chat, PAIRS, layers=[2], kind="mean", progress=False)
    vector = extract(tiny_chat, PAIRS, layers=[2], progress=False)[2]
    assert torch.equal(fitted.scale, torch.ones(1, 32))
    assert_close(fitted.shift[0], vector.direction, atol=1e-5, rtol=1e-5)


def slow_fit(model, layers):
    """Every layer from a new run of every text, with plain hooks for the maps below."""
    fmt, maps = default_format(model), {}
    for layer in layers:
        means = []
        for side in ("negative", "positive"):
            rows = []
            for pair in PAIRS:
                prompt = encode_answer(fmt, model.tokenizer, pair.question, getattr(pair, side))
                hooks, kept = [], []
                for low, (scale, shift) in maps.items() if side == "negative" else ():

                    def move(resid, hook, scale=scale, shift=shift, s=prompt.steer_start):
                        return torch.cat([resid[:, :s], resid[:, s:] * scale + shift], dim=1)

                    hooks.append((f"blocks.{low}.hook_resid_post", move))
                hooks.append((f"blocks.{layer}.hook_resid_post", lambda r, hook, kept=kept: kept.append(r)))
                logits_of(model, [prompt.tokens], hooks)
                rows.append(kept[0][0, prompt.answer_start :].mean(0))
            means.append(torch.stack(rows))
        maps[layer] = tuple(one.float() for one in fit_map(*means))
    return maps


def test_several_layers_are_fitted_as_by_the_slow_twin_each_behind_those_below(tiny_chat):
    layers = [1, 2, 4]
    fitted = fit(tiny_chat, PAIRS, layers=layers, progress=False, batch_size=3)
    for row, (scale, shift) in enumerate(slow_fit(tiny_chat, layers).values()):
        assert_close(fitted.scale[row], scale, atol=2e-3, rtol=2e-3)
        assert_close(fitted.shift[row], shift, atol=2e-3, rtol=2e-3)


def slow_fit_inside(model, layers, site):
    """The paper's own sites: every layer from a new run of every text, both sides through the maps below."""
    fmt, maps = default_format(model), {}
    for layer in layers:
        means = []
        for side in ("negative", "positive"):
            rows = []
            for pair in PAIRS:
                prompt = encode_answer(fmt, model.tokenizer, pair.question, getattr(pair, side))
                hooks, kept = [], []
                for low, (scale, shift) in maps.items():

                    def move(out, hook, scale=scale, shift=shift, s=prompt.steer_start):
                        return torch.cat([out[:, :s], out[:, s:] * scale + shift], dim=1)

                    hooks.append((f"blocks.{low}.{site}", move))

                def keep(out, hook, kept=kept):
                    kept.append(out)

                hooks.append((f"blocks.{layer}.{site}", keep))
                logits_of(model, [prompt.tokens], hooks)
                rows.append(kept[0][0, prompt.answer_start :].mean(0))
            means.append(torch.stack(rows))
        maps[layer] = tuple(one.float() for one in fit_map(*means))
    return maps


@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
@pytest.mark.parametrize("site", ["hook_attn_out", "hook_mlp_out"])
def test_at_the_papers_own_sites_both_sets_run_through_the_maps_below_and_the_maps_act_there(tiny_chat, site):
    fitted = fit(tiny_chat, PAIRS, layers=[0, 1, 3], site=site, progress=False, batch_size=3)
    maps = slow_fit_inside(tiny_chat, [0, 1, 3], site)
    for row, (scale, shift) in enumerate(maps.values()):
        assert_close(fitted.scale[row], scale, atol=2e-3, rtol=2e-3)
        assert_close(fitted.shift[row], shift, atol=2e-3, rtol=2e-3)
    assert fitted.settings["causal"] == "two-sided"
    prompt = Prompt.of(tiny_chat, "And the sea?")

    def move(out, hook, row):
        moved = 0.3 * out + 0.7 * (out * fitted.scale[row] + fitted.shift[row])
        return torch.cat([out[:, :1], moved[:, 1:]], dim=1)

    hooks = [(f"blocks.{layer}.{site}", partial(move, row=row)) for row, layer in enumerate((0, 1, 3))]
    expected = logits_of(tiny_chat, [prompt.tokens], hooks)
    with steer(tiny_chat, *fitted.interventions(0.7, positions="original"), prompt=prompt):
        assert_close(logits_of(tiny_chat, [prompt.tokens]), expected, atol=2e-4, rtol=1e-4)
    assert float((expected - logits_of(tiny_chat, [prompt.tokens])).abs().max()) > 0.05
    with pytest.raises(
        ValueError, match="unknown site 'mlp': expected one of hook_resid_post, hook_attn_out, hook_mlp"
    ):
        fit(tiny_chat, PAIRS, layers=[1], site="mlp", progress=False)


def test_behind_an_identity_block_the_one_sided_fit_is_exactly_the_identity(tiny_chat, monkeypatch):
    def identity_block(model, tokens, resid, layer, *, until, edits=()):
        for edit in edits:
            resid = edit.apply(resid, 0)
        return resid

    monkeypatch.setattr(linear_act, "run_on", identity_block)
    fitted = fit(tiny_chat, PAIRS, layers=[1, 2], progress=False)
    assert_close(fitted.scale[1], torch.ones(32), atol=1e-4, rtol=0)
    assert_close(fitted.shift[1], torch.zeros(32), atol=1e-4, rtol=0)
    assert float((fitted.scale[0] - 1).abs().max()) > 0.1


def test_texts_are_read_over_all_tokens_but_the_first(tiny_chat):
    source, target = ["It rained today.", "A cold and grey day"], ["Sun!", "A warm, bright morning it was"]
    fitted = fit(tiny_chat, (source, target), layers=[2], kind="mean", progress=False)
    means = []
    for texts in (source, target):
        rows = []
        for text in texts:
            ids = [tiny_chat.tokenizer.bos_token_id, *tiny_chat.tokenizer(text, add_special_tokens=False).input_ids]
            _, cache = tiny_chat.run_with_cache(torch.tensor([ids]))
            rows.append(cache["resid_post", 2][0, 1:].mean(0))
        means.append(torch.stack(rows).mean(0))
    assert_close(fitted.shift[0], means[1] - means[0], atol=1e-5, rtol=1e-5)


def test_interventions_say_where_and_a_map_is_taken_with_those_below_only(tiny_chat):
    fitted = fit(tiny_chat, PAIRS, layers=[1, 3], support=True, progress=False)
    made = fitted.interventions(0.5)
    assert [(one.layer, one.positions, one.multiplier) for one in made] == [(1, "caa", 0.5), (3, "caa", 0.5)]
    assert set(made[0].parameters) == {"scale", "shift", "low", "high"}
    assert set(fitted.interventions(support=False)[0].parameters) == {"scale", "shift"}
    assert fitted.interventions(positions="original")[0].positions == "after_first"
    assert fitted.at([1]).layers == (1,)
    with pytest.raises(ValueError, match=r"the map of layer 3 was fitted behind those of layers \[1\]"):
        fitted.at([3])
    with pytest.raises(IndexError, match="was not fitted at layer 2: it has layers 1, 3"):
        fitted.at([2])
    with pytest.raises(ValueError, match="cannot act at positions='all': the first token's stream"):
        fitted.interventions(positions="all")
    as_interventions(tiny_chat, list(made))
    elsewhere = replace(fitted, provenance=replace(fitted.provenance, model="someone/else"))
    with pytest.raises(ValueError, match="the parameters of affine were fitted on 'someone/else', and this model is"):
        as_interventions(tiny_chat, list(elsewhere.interventions()))


def test_what_is_saved_is_read_back_to_the_bit_and_prints_as_one_line(tiny_chat, tmp_path):
    fitted = fit(tiny_chat, PAIRS, layers=[1, 3], support=True, progress=False)
    again = LinearAct.load(fitted.save(tmp_path / "map.safetensors"))
    for name in ("scale", "shift", "low", "high"):
        assert torch.equal(getattr(again, name), getattr(fitted, name))
    assert (again.layers, again.kind, again.support) == (fitted.layers, "linear", True)
    assert (again.provenance, dict(again.settings)) == (fitted.provenance, dict(fitted.settings))
    assert repr(again) == "LinearAct(trip, layers 1, 3, linear, with support, model='tiny-random-llama')"


def test_sets_that_cannot_be_fitted_are_refused(tiny_chat):
    with pytest.raises(ValueError, match="the source has 1 texts and the target 2"):
        fit(tiny_chat, (["a b"], ["c d", "e f"]), layers=[1], progress=False)
    with pytest.raises(ValueError, match="a map needs two texts of each kind at least, got 1"):
        fit(tiny_chat, PAIRS[:1], layers=[1], progress=False)
    with pytest.raises(TypeError, match="expected a ContrastSet, or two lists of texts"):
        unwrap(fit)(tiny_chat, ["a", "b"], layers=[1], progress=False)
