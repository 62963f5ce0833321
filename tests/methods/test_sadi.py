"""SADI: what is chosen, by hand, at each of its sites; and that scaling is all that is done."""

from functools import partial

import pytest
import torch
from helpers.methods import PAIRS, assert_comes_back
from helpers.steering import logits_of
from torch.testing import assert_close

from caa_lens.methods.sadi import SITES, fit, top_elements
from caa_lens.prompts.prompt_formats import Prompt, default_format, encode_answer
from caa_lens.steering.interventions import Intervention, as_interventions
from caa_lens.steering.steered_block import steer


def last_tokens(model, name):
    """A site's numbers at the last token of both answers of each pair, from runs by themselves."""
    fmt, sides = default_format(model), []
    for side in ("positive", "negative"):
        rows = []
        for pair in PAIRS:
            prompt = encode_answer(fmt, model.tokenizer, pair.question, getattr(pair, side))
            _, cache = model.run_with_cache(torch.tensor([prompt.tokens]))
            rows.append(torch.stack([cache[f"blocks.{i}.{name}"][0, -1].flatten() for i in range(5)]))
        sides.append(torch.stack(rows))
    return sides


def test_the_largest_are_chosen_over_all_layers_jointly_signed_or_absolute():
    scores = torch.tensor([[1.0, -9.0, 3.0], [8.0, -2.0, 7.0]])
    assert top_elements(scores, 2).tolist() == [[0, 0, 0], [1, 0, 1]]
    assert top_elements(scores, 2, "absolute").tolist() == [[0, 1, 0], [1, 0, 0]]
    assert [int(top_elements(scores, k).sum()) for k in (1, 3, 6)] == [1, 3, 6]
    with pytest.raises(ValueError, match="k=7 elements are asked for, and there are 6"):
        top_elements(scores, 7)
    with pytest.raises(ValueError, match="unknown rank 'size': expected one of signed, absolute"):
        top_elements(scores, 1, "size")


@pytest.mark.parametrize("rank", ["signed", "absolute"])
@pytest.mark.parametrize("site", SITES)
def test_what_is_chosen_is_what_differs_most_at_the_last_token(tiny_chat, site, rank):
    k = 3
    fitted = fit(tiny_chat, PAIRS, k=k, site=site, rank=rank, progress=False, batch_size=3)
    plus, minus = last_tokens(tiny_chat, "mlp.hook_pre" if site == "neurons" else SITES[site])
    if site == "neurons":
        plus, minus = (torch.nn.functional.silu(one) for one in (plus, minus))
    difference = (plus - minus).mean(0)
    if site == "heads":
        difference = difference.unflatten(-1, (4, 8)).mean(-1)
    if site == "stream":
        difference = difference / torch.cat([plus, minus]).std(0)
    scores = difference if rank == "signed" else difference.abs()
    expected = torch.zeros_like(scores)
    if site == "stream":
        for row, some in zip(expected, scores, strict=True):
            row[some.topk(k).indices] = 1
    else:
        expected.view(-1)[scores.flatten().topk(k).indices] = 1
    if site == "heads":
        expected = expected.repeat_interleave(8, dim=-1)
    kept = [i for i in range(5) if expected[i].any()]
    assert fitted.layers == tuple(kept)
    assert torch.equal(fitted.mask, expected[kept])


@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
@pytest.mark.parametrize("site", SITES)
def test_the_chosen_are_scaled_at_the_last_token_and_nothing_else_is(tiny_chat, site):
    fitted = fit(tiny_chat, PAIRS, k=4, site=site, progress=False)
    prompt = Prompt.of(tiny_chat, "And the sea?")

    def scaled(out, hook, row):
        out = out.clone()
        out[:, -1] *= 1 + 2.5 * fitted.mask[row].reshape(out.shape[2:])
        return out

    hooks = [
        (f"blocks.{layer}.{SITES[site]}", lambda out, hook, row=row: scaled(out, hook, row))
        for row, layer in enumerate(fitted.layers)
    ]
    expected = logits_of(tiny_chat, [prompt.tokens], hooks)
    with steer(tiny_chat, *fitted.interventions(2.5, positions="original"), prompt=prompt):
        found = logits_of(tiny_chat, [prompt.tokens])
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    plain = logits_of(tiny_chat, [prompt.tokens])
    assert torch.equal(found[:, :-1], plain[:, :-1])
    with steer(tiny_chat, *fitted.interventions(0.0), prompt=prompt):
        assert torch.equal(logits_of(tiny_chat, [prompt.tokens]), plain)


def released(model, prompt, layer, elements, strength):
    """The authors' two passes: record all heads without steering, scale some, then write all over the last token's."""
    tokens, record = [prompt.tokens], {}

    def keep(z, hook, i):
        record[i] = z[:, -1].clone()

    logits_of(model, tokens, [(f"blocks.{i}.attn.hook_z", partial(keep, i=i)) for i in range(5)])
    record[layer] = record[layer] * (1 + (strength - 1) * elements)

    def overwrite(z, hook, i):
        z = z.clone()
        z[:, -1] = record[i]
        return z

    hooks = [(f"blocks.{i}.attn.hook_z", partial(overwrite, i=i)) for i in range(5)]
    return logits_of(model, tokens, hooks)


@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
def test_the_released_two_passes_with_factor_1_plus_delta_are_scaling_in_place_at_the_last_layer_alone(tiny_chat):
    """Behind it no head is left that could feel what was scaled; at a lower layer the frozen form is another one."""
    prompt, found = Prompt.of(tiny_chat, "And the sea?"), {}
    for layer in (4, 2):
        fitted = fit(tiny_chat, PAIRS, k=2, layers=[layer], progress=False)
        with steer(tiny_chat, *fitted.interventions(4.0, positions="original"), prompt=prompt):
            in_place = logits_of(tiny_chat, [prompt.tokens])
        frozen = released(tiny_chat, prompt, layer, fitted.mask[0].unflatten(-1, (4, 8)), 1 + 4.0)
        found[layer] = float((in_place - frozen).abs().max())
        assert float((in_place - logits_of(tiny_chat, [prompt.tokens])).abs().max()) > 1e-2
    assert found[4] < 1e-4
    assert found[2] > 1e-3


@pytest.mark.hooked
def test_scaling_the_gates_output_is_scaling_the_neuron(tiny_chat):
    """The product with the other half is linear in it, so reading one and scaling the other is the same neuron."""
    prompt, factor = Prompt.of(tiny_chat, "And the sea?"), torch.linspace(-1, 1, 48)
    mlp = tiny_chat.blocks[2].mlp
    act = mlp.act_fn
    mlp.act_fn = lambda pre: act(pre) * (1 + factor)
    try:
        expected = logits_of(tiny_chat, [prompt.tokens])
    finally:
        mlp.act_fn = act
    found = logits_of(tiny_chat, [prompt.tokens], [("blocks.2.mlp.hook_post", lambda out, hook: out * (1 + factor))])
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_mask_of_another_site_is_refused(tiny_chat):
    fitted = fit(tiny_chat, PAIRS, k=4, site="neurons", progress=False)
    wrong = Intervention(
        operator="scale", parameters={"factor": fitted.mask[0]}, layer=fitted.layers[0], site="attn.hook_z"
    )
    with pytest.raises(ValueError, match=r"factor has 48 numbers, but attn.hook_z of .* has 32: fit it at this site"):
        as_interventions(tiny_chat, [wrong])
    with pytest.raises(ValueError, match="unknown site 'mlp': expected one of heads, neurons, hidden, stream"):
        fit(tiny_chat, PAIRS, k=4, site="mlp", progress=False)


def test_it_is_saved_and_read_back(tiny_chat, tmp_path):
    assert_comes_back(fit(tiny_chat, PAIRS, k=2, site="heads", progress=False), tmp_path / "s.safetensors")
