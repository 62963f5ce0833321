"""The methods on a `TransformerBridge`: each number against torch's hooks on the Hugging Face module by itself."""

import warnings

import pytest
import torch
from helpers.bridge_twins import PLACES, bridge_and_module, logits_of, read_of
from helpers.methods import PAIRS
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.engine.edits import SITES, Edit
from caa_lens.engine.kept_streams import read_streams, run_on
from caa_lens.engine.streams import last_residual, reading_sites
from caa_lens.measures.answers import score_answers
from caa_lens.methods import actadd, activation_scaling, bipo, inferaligner, instruction, linear_act, sadi
from caa_lens.models.checks import check_model
from caa_lens.models.unembedding import final_logits
from caa_lens.prompts.prompt_formats import Prompt, encode_answer, resolve_format

pytestmark = [pytest.mark.bridge, pytest.mark.filterwarnings("ignore::caa_lens.engine.SharedPrefixWarning")]
TOKENS = [5, 9, 100, 41, 7, 12, 300]
WIDTH = {"attn.hook_z": 32, "mlp.hook_post": 48}


@pytest.fixture(scope="module")
def both():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge, alone = bridge_and_module()
    check_model(bridge)
    return bridge, alone


def factor_of(site):
    return torch.linspace(-1, 1, WIDTH.get(site, 32))


def scaled(site, first, factor=None):
    factor = factor_of(site) if factor is None else factor

    def change(out):
        at = (torch.arange(out.shape[1]) >= first)[:, None]
        return torch.where(at, out * (1 + factor), out)

    return change


@pytest.mark.parametrize("site", SITES)
def test_an_edit_acts_at_its_site_in_our_runs_and_by_transformer_lens_hooks(both, site):
    bridge, alone = both
    edit = Edit(layer=2, positions=(3, None), operator="scale", parameters={"factor": factor_of(site)}, site=site)
    expected = logits_of(alone, TOKENS, [(2, site, scaled(site, 3))])
    assert not torch.allclose(expected, logits_of(alone, TOKENS), atol=1e-2)
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        assert_close(
            final_logits(bridge, last_residual(bridge, tokens, edits=[edit]))[0], expected, atol=2e-4, rtol=1e-4
        )
        with bridge.hooks(fwd_hooks=[edit.hook()]):
            assert_close(bridge(tokens)[0], expected, atol=2e-4, rtol=1e-4)
        assert_close(bridge(tokens)[0], logits_of(alone, TOKENS), atol=2e-4, rtol=1e-4)  # and nothing stays


def test_a_hook_at_a_site_that_a_block_does_not_have_says_so_when_the_block_runs(both):
    bridge, _ = both
    edit = Edit(
        layer=1, positions=(0, None), operator="scale", parameters={"factor": torch.ones(32)}, site="attn.hook_y"
    )
    nothing = r"did not come to blocks\.1\.attn\.hook_y in it, so that nothing was steered"
    with pytest.raises(RuntimeError, match=nothing), bridge.hooks(fwd_hooks=[edit.hook()]):
        bridge(torch.tensor([TOKENS]))
    with pytest.raises(ValueError, match=r"has no hook point blocks\.1\.attn\.hook_y"):
        last_residual(bridge, torch.tensor([TOKENS]), edits=[edit])


@pytest.mark.parametrize("site", [site for site in PLACES if site != "hook_resid_post"])
def test_what_is_read_at_a_site_is_what_the_module_has_there(both, site):
    bridge, alone = both
    found = {}
    with torch.no_grad(), reading_sites(bridge, [1, 3], site, found.__setitem__):
        last_residual(bridge, torch.tensor([TOKENS]))
    for layer in (1, 3):
        assert_close(found[layer][0].flatten(1), read_of(alone, TOKENS, layer, site), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [-1, 0, 2, 3])
def test_kept_streams_run_on_to_the_same_end_with_the_gradient_of_what_is_added(both, layer):
    bridge, alone = both
    prompts = [Prompt.from_tokens(TOKENS), Prompt.from_tokens(TOKENS[::-1][:4])]
    (streams,) = read_streams(bridge, prompts, layer)
    v = torch.randn(32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    edits = [Edit(layer=max(layer, 0), positions=(1, None), direction=v)]
    resid = run_on(bridge, streams.tokens, streams.resid, layer, edits=edits)
    for row, prompt in enumerate(prompts):
        pushed = (max(layer, 0), "hook_resid_post", scaled_by_adding(v.detach(), 1))
        expected = logits_of(alone, prompt.tokens, [pushed])
        assert_close(final_logits(bridge, resid[row, : len(prompt)]).detach(), expected, atol=2e-4, rtol=1e-4)
    (slope,) = torch.autograd.grad(resid[0].pow(2).sum(), v)
    step = torch.zeros(32)
    step[5] = 1e-3

    def value(at):
        with torch.no_grad():
            edits = [Edit(layer=max(layer, 0), positions=(1, None), direction=at)]
            return run_on(bridge, streams.tokens, streams.resid, layer, edits=edits)[0].double().pow(2).sum()

    v = v.detach()
    assert float((value(v + step) - value(v - step)) / 2e-3) == pytest.approx(float(slope[5]), rel=0.02, abs=1.0)


def scaled_by_adding(v, first):
    def change(out):
        return torch.where((torch.arange(out.shape[1]) >= first)[:, None], out + v, out)

    return change


def test_sadi_reads_and_scales_each_of_its_sites_as_the_module_by_itself(both):
    bridge, alone = both
    chosen = resolve_format(bridge, None)
    for site, place in {"heads": "attn.hook_z", "neurons": "mlp.hook_pre", "hidden": "hook_mlp_out"}.items():
        fitted = sadi.fit(bridge, PAIRS, k=3, site=site, progress=False)
        difference = torch.zeros(4, 48 if site == "neurons" else 32, dtype=torch.float64)
        for pair in PAIRS:
            for answer, sign in ((pair.positive, 1), (pair.negative, -1)):
                tokens = encode_answer(chosen, bridge.tokenizer, pair.question, answer).tokens
                read = torch.stack([read_of(alone, tokens, layer, place)[-1] for layer in range(4)])
                read = torch.nn.functional.silu(read) if site == "neurons" else read
                difference += sign * read.double() / len(PAIRS)
        if site == "heads":
            difference = difference.unflatten(-1, (4, 8)).mean(-1)
        top = set(difference.flatten().topk(3).indices.tolist())
        width = difference.shape[1]
        found = set()
        for row, layer in enumerate(fitted.layers):
            mask = fitted.mask[row] if site != "heads" else fitted.mask[row].unflatten(-1, (4, 8))[:, 0]
            found |= {layer * width + int(i) for i in mask.nonzero()[:, 0]}
        assert found == top


def test_every_method_scores_on_a_bridge_as_on_the_module_by_itself(both):
    bridge, alone = both
    quiet = {"progress": False}
    fits = {
        "actadd": actadd.fit(bridge, "I love this", "I hate this", layers=[1], **quiet),
        "act": linear_act.fit(bridge, PAIRS, layers=[1, 2], **quiet),
        "sadi": sadi.fit(bridge, PAIRS, k=2, **quiet),
        "instruction": instruction.fit(bridge, PAIRS, layers=[2], **quiet),
        "bipo": bipo.fit(bridge, PAIRS, layer=2, epochs=1, learning_rate=0.05, **quiet),
        "gate": inferaligner.fit(bridge, (["How do I bake bread?"], ["Sort a list in C."]), layers=[2], **quiet),
    }
    conditions = [(), *(one.interventions(1.0, positions="original") for one in fits.values())]
    values = score_answers(bridge, PAIRS, conditions, progress=False).values
    plain = score_answers(bridge, PAIRS, [one.interventions(1.0) for one in fits.values()], progress=False).values
    fmt = resolve_format(bridge, None)
    for row, pair in enumerate(PAIRS):
        sides = []
        for answer in (pair.positive, pair.negative):
            prompt = encode_answer(fmt, bridge.tokenizer, pair.question, answer)
            end = prompt.steer_start
            act = [
                (layer, "hook_resid_post", affine(fits["act"].scale[i], fits["act"].shift[i], 1))
                for i, layer in enumerate((1, 2))
            ]
            from_end = [
                (layer, "hook_resid_post", affine(fits["act"].scale[i], fits["act"].shift[i], end))
                for i, layer in enumerate((1, 2))
            ]
            everywhere = [(2, "hook_resid_post", scaled_by_adding(fits["bipo"].direction[0], 0))]
            edits = [[], act, from_end, everywhere]
            sides.append([mean_logp(logits_of(alone, prompt.tokens, one), prompt) for one in edits])
        margin = [above - below for above, below in zip(*sides, strict=True)]
        found = [values[row, 0], values[row, 2], plain[row, 1], values[row, 5]]
        assert [float(one) for one in found] == pytest.approx(margin, abs=3e-4)


def affine(scale, shift, first):
    def change(out):
        at = (torch.arange(out.shape[1]) >= first)[:, None]
        return torch.where(at, scale * out + shift, out)

    return change


def mean_logp(logits, prompt):
    logp = logits.log_softmax(-1)
    first = prompt.answer_start
    return float(torch.stack([logp[pos - 1, prompt.tokens[pos]] for pos in range(first, len(prompt))]).mean())


def test_activation_scaling_learns_on_a_bridge_and_flips_the_answer(both):
    bridge, alone = both
    questions = [("one two three", " a", " b"), ("six two nine", " a", " b"), ("two two one", " a", " b")]
    fitted = activation_scaling.fit(
        bridge, questions, layers=[1, 2], epochs=12, minimal=0.0, faithful=0.0, progress=False
    )
    assert fitted.losses[-1] < fitted.losses[0]
    tokenizer = bridge.tokenizer
    ids = tokenizer("one two three", add_special_tokens=False).input_ids
    tokens = ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
    a, b = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" a", " b"))
    found = []
    for strength in (1.0, -1.0):
        made = fitted.interventions(strength)
        edits = [(one.layer, one.site, scaled(one.site, 0, strength * one.parameters["factor"])) for one in made]
        expected = logits_of(alone, tokens, edits)[-1]
        with torch.no_grad():
            placed = [one._at((0, None)) for one in made]
            resid = last_residual(bridge, torch.tensor([tokens]), edits=placed)
            logits = final_logits(bridge, resid)[0, -1]
        assert_close(logits, expected, atol=3e-4, rtol=1e-4)
        found.append(float(logits[a] - logits[b]))
    assert found[0] > found[1] + 0.5


def test_generate_and_steer_take_methods_at_sites_of_a_bridge_with_and_without_a_cache(both):
    bridge, alone = both
    fitted = sadi.fit(bridge, PAIRS, k=3, site="hidden", progress=False)
    made = list(fitted.interventions(4.0, positions="all"))
    prompts = [Prompt.of(bridge, "Why?"), Prompt.of(bridge, "How was your long day at work?")]
    edits = [(one.layer, one.site, scaled(one.site, 0, 4.0 * one.parameters["factor"])) for one in made]
    expected = []
    for prompt in prompts:
        tokens = list(prompt.tokens)
        for _ in range(4):
            tokens.append(int(logits_of(alone, tokens, edits)[-1].argmax()))
        expected.append(tokens[len(prompt) :])
    for use_cache in (True, False):
        steps = cl.steering.generate_tokens(bridge, prompts, vectors=made, max_new_tokens=4, use_cache=use_cache)
        rows = torch.stack(list(steps), dim=1).tolist()
        assert [row[: len(one)] for row, one in zip(rows, expected, strict=True)] == expected
    with cl.steer(bridge, *made, prompt=prompts[1]), torch.no_grad():
        logits = bridge(torch.tensor([prompts[1].tokens]))[0]
    assert_close(logits, logits_of(alone, prompts[1].tokens, edits), atol=3e-4, rtol=1e-4)
