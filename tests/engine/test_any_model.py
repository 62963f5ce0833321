"""Whatever the model, and whatever somebody has done to it: every number is what `model.forward` gives."""

import copy
import warnings

import pytest
import torch
from helpers.models import random_vectors
from helpers.shapes import CHANGES, OTHER, PLAIN, Rescaled, model_of
from helpers.twins import (
    ENTRIES,
    TEXTS,
    assert_everything_is_the_models_own,
    plain_forward,
    run_with_one_vector_at_layer_1,
    steer_and_run,
    streams,
    twin_extract,
    unsteered,
)
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.engine import plain_runs as plain_module
from caa_lens.engine import shared_prefix
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.engine.plain_runs import PlainRuns, plain_runs
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.measures.open_ended.text_measures import answer_logp
from caa_lens.models.adapters import llama_blocks
from caa_lens.models.structure import structure_of
from caa_lens.prompts.prompt_formats import Prompt, encode_answer, resolve_format
from caa_lens.steering.steered_runs import NothingSteeredWarning

pytestmark = pytest.mark.hooked  # the shapes, and what is done to them, are of HookedTransformers


@pytest.fixture(scope="module")
def tokenizer(demo_tokenizer):
    return demo_tokenizer


@pytest.mark.parametrize("shape", PLAIN)
def test_the_engine_is_used_for_plain_llamas_and_gives_the_models_own_numbers(shape, tokenizer):
    model = model_of(shape, tokenizer)
    assert shared_prefix.unsupported(model) is None
    assert_everything_is_the_models_own(model)


@pytest.mark.parametrize("shape", OTHER)
def test_other_shapes_take_the_plain_path_and_give_the_models_own_numbers(shape, tokenizer):
    model = model_of(shape, tokenizer)
    assert shared_prefix.unsupported(model) is not None
    with pytest.warns(SharedPrefixWarning, match=f"because {shape} is not a plain Llama-family model"):
        assert_everything_is_the_models_own(model)


# Two of the shapes are plain Llamas whose configuration was changed after they were built; see OTHER for the rest.
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_takes_the_plain_path_and_gives_its_own_numbers(change, tokenizer):
    model = model_of("llama grouped", tokenizer)
    assert shared_prefix.unsupported(model) is None
    before = unsteered(model, range(20, 30))
    CHANGES[change](model)
    if change not in ("per-head results", "split inputs"):  # the same numbers in another order
        assert (unsteered(model, range(20, 30)) - before).abs().max() > 1e-3
    with pytest.warns(SharedPrefixWarning, match="because"):
        assert_everything_is_the_models_own(model)


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("per-head results", "split inputs")])
def test_the_engine_would_have_given_other_numbers_for_a_changed_model(change, tokenizer, monkeypatch):
    """What the check is for: without it these models' numbers are wrong, or their last part is passed over."""
    model = model_of("llama grouped", tokenizer)
    CHANGES[change](model)
    monkeypatch.setattr(shared_prefix, "unsupported", lambda model: None)
    behind = ("norm", "logits", "unembedding", "final norm", "module", "wrapped", "parametrized")
    if any(word in change for word in behind) or change in ("torch hook on the mlp", "calculate_qkv_matrices"):
        pytest.skip("computed by the model's own modules, or fails aloud")
    found = cl.extract(model, TEXTS, progress=False)
    assert (found.directions - twin_extract(model, TEXTS)).abs().max() > 1e-3


def test_a_class_that_was_patched_is_noticed_by_its_numbers(tokenizer, monkeypatch):
    from transformer_lens.components import TransformerBlock

    model = model_of("llama", tokenizer)
    assert shared_prefix.unsupported(model) is None
    own = TransformerBlock.forward
    monkeypatch.setattr(TransformerBlock, "forward", lambda self, *a, **k: 1.1 * own(self, *a, **k))
    assert "differ on a short prompt" in shared_prefix.unsupported(model)
    with pytest.warns(SharedPrefixWarning, match="the engine and llama itself differ on a short prompt, by 0.1 of"):
        assert_everything_is_the_models_own(model)


def test_hooks_on_all_modules_of_torch_are_noticed(tokenizer):
    model = model_of("llama", tokenizer)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, out: None)
    try:
        assert "every module of torch" in shared_prefix.unsupported(model)
    finally:
        handle.remove()
    assert shared_prefix.unsupported(model) is None


def test_a_configuration_that_says_something_unknown_is_refused():
    model = model_of("llama")
    model.cfg.use_something_new = True
    assert "its configuration has use_something_new=True" in shared_prefix.unsupported(model)
    model.cfg.use_something_new = False
    assert shared_prefix.unsupported(model) is None


def test_numbers_are_compared_once_and_again_when_the_model_has_changed(monkeypatch):
    ran = []
    compare = shared_prefix._disagreement
    monkeypatch.setattr(shared_prefix, "_disagreement", lambda model: ran.append(model) or compare(model))
    model = model_of("llama")
    for _ in range(3):
        shared_prefix.unsupported(model)
    assert len(ran) == 1
    model.W_E.data *= 2  # numbers in the weights do not count
    shared_prefix.unsupported(model)
    assert len(ran) == 1
    model.to(torch.float64)
    shared_prefix.unsupported(model)
    assert len(ran) == 2
    shared_prefix.unsupported(copy.deepcopy(model))
    assert len(ran) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_passes_the_comparison_and_a_wrong_block_does_not(dtype, monkeypatch):
    model = model_of("llama grouped", dtype=dtype)
    assert shared_prefix.unsupported(model) is None
    own = llama_blocks.rotate
    monkeypatch.setattr(llama_blocks, "rotate", lambda attn, x, cos, sin: own(attn, x, sin, cos))
    assert "differ on a short prompt" in shared_prefix.unsupported(copy.deepcopy(model))


def test_the_comparison_costs_less_than_one_forward_of_a_question():
    model, seen = model_of("llama"), []
    with pytest.MonkeyPatch.context() as patch:
        run_block = llama_blocks.run_block

        def counting(block, resid, attend):
            seen.append(resid.shape[:-1].numel())
            return run_block(block, resid, attend)

        patch.setattr(llama_blocks, "run_block", counting)
        handle = model.blocks[0].register_forward_hook(lambda m, i, out: seen.append(out.shape[:-1].numel() * 4))
        shared_prefix._disagreement(model)
        handle.remove()
    assert sum(seen) < 60 * model.cfg.n_layers  # token-blocks; a question of the paper has 90 tokens and more


def test_hooks_of_the_callers_are_not_run_by_a_comparison(tokenizer):
    model, runs = model_of("gpt2", tokenizer), []
    model.add_hook("blocks.0.hook_resid_pre", lambda resid, hook: runs.append(resid.shape))
    shared_prefix.unsupported(model)
    assert not plain_runs(model).padded
    assert runs == []
    prompts = [Prompt.of(model, "Why?"), Prompt.of(model, "How was your long day at work?")]
    list(cl.engine.read_residuals(model, prompts))
    assert runs == [(1, len(prompt), 32) for prompt in prompts]  # alone, and unpadded


def test_a_cache_that_does_not_know_the_models_heads_is_not_used(tokenizer):
    model = model_of("ungrouped heads", tokenizer)
    assert plain_runs(model) == PlainRuns(padded=True, cached=False)
    for shape in ("gpt2", "bloom", "gemma2", "olmo2", "moe"):
        assert plain_runs(model_of(shape)) == PlainRuns(padded=True, cached=True), shape
    for shape in ("dynamic rotary", "log n attention"):
        assert not plain_runs(model_of(shape)).padded


def test_one_warning_says_why_text_is_generated_more_slowly(tokenizer):
    model = model_of("ungrouped heads", tokenizer)
    with pytest.warns(SharedPrefixWarning) as caught:
        cl.generate(model, "Why?", max_new_tokens=2)
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "text is generated through the model's own forward, the whole text for every token, because ungrouped heads is "
        "not a plain Llama-family model (its configuration has ungroup_grouped_query_attention=True)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cl.generate(model, "Why?", max_new_tokens=2, use_cache=False)  # asked for


# ---- hook points that hooks do not reach ---------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_vector_whose_hook_point_was_replaced_is_refused_and_never_passed_over(entry, tokenizer):
    """TransformerLens would still add the hook to the point that was taken out, where nobody called `setup()`."""
    model = model_of("llama", tokenizer)
    for place, name in ((model.blocks[1], "hook_resid_post"), (model.blocks[1].attn, "hook_pattern")):
        own = getattr(place, name)
        setattr(place, name, Rescaled())
        with pytest.raises(
            ValueError, match=rf"Rescaled stands in the place of blocks\.1\..*{name}, .*steer at another layer"
        ):
            run_with_one_vector_at_layer_1(entry, model)
        model.setup()
        with pytest.raises(
            ValueError, match=rf"Rescaled stands in the place of blocks\.1\..*{name}, .*steer at another layer"
        ):
            run_with_one_vector_at_layer_1(entry, model)
        setattr(place, name, type(own)())
        with pytest.raises(ValueError, match=rf"does not know its hook point .*{name}, .*call model\.setup\(\)"):
            run_with_one_vector_at_layer_1(entry, model)
        model.setup()
    run_with_one_vector_at_layer_1(entry, model)


def test_a_module_that_takes_the_hook_points_place_before_or_inside_a_steered_block_is_told_of():
    model = model_of("llama")
    v, tokens = random_vectors(model)[1], torch.tensor([[1, 2, 3]])
    block = cl.steer(model, v, start=0)
    own, model.blocks[1].hook_resid_post = model.blocks[1].hook_resid_post, Rescaled()
    with pytest.raises(ValueError, match="Rescaled stands in the place of blocks"), block:
        model(tokens)
    model.blocks[1].hook_resid_post = own
    inside = cl.steer(model, v, start=0)
    inside.__enter__()
    model.blocks[1].hook_resid_post = Rescaled()
    model(tokens)
    with pytest.warns(NothingSteeredWarning, match="a module put in the place of a hook point hides it"):
        inside.__exit__(None, None, None)


def test_a_block_inside_of_another_module_is_not_steered(tokenizer):
    """Extraction reads what the whole writes, and a hook would add a vector inside of it."""
    model = model_of("llama", tokenizer)
    CHANGES["wrapped block"](model)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.hook_pattern is missing"):
        steer_and_run(model, random_vectors(model)[1])
    steer_and_run(model, random_vectors(model)[2])


@pytest.mark.parametrize("setup", [True, False])
def test_what_stands_in_a_hook_points_place_is_what_is_read(setup, tokenizer):
    model = model_of("llama", tokenizer)
    model.blocks[1].hook_resid_post, model.blocks[3].hook_mlp_out = Rescaled(), Rescaled()
    if setup:
        model.setup()
    vectors, prompt = random_vectors(model, scale=2.0), Prompt.of(model, "How was your day?")
    dots = torch.tensor(cl.token_similarity(model, prompt, vectors).summary("dot").to_numpy())  # [pos layer]
    expected = torch.einsum("lpd,ld->pl", streams(model, prompt.tokens), vectors.directions)
    assert_close(dots, expected.to(dots.dtype), atol=1e-4, rtol=1e-4)

    with pytest.warns(SharedPrefixWarning):
        found = pair_activations(model, TEXTS, progress=False).norms  # [pair side layer]
    fmt = resolve_format(model, None)
    for row, pair in zip(found, TEXTS, strict=True):
        for norms, answer in zip(row, (pair.positive, pair.negative), strict=True):
            text = encode_answer(fmt, model.tokenizer, pair.question, answer)
            means = streams(model, text.tokens)[:, slice(*text.read)].norm(dim=-1).mean(-1)
            assert_close(norms, means, atol=1e-4, rtol=1e-4)

    split = cl.interpretation.attribute_logits(model, [(prompt, 5, 9)], vectors[2], progress=False)
    steered = plain_forward(model, prompt.tokens, [(2, vectors[2].direction, prompt.steer_start)])
    change = (steered - unsteered(model, prompt.tokens))[-1]
    assert split.total == pytest.approx(float(change[5] - change[9]), abs=2e-4)
    assert split.explained == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", ["dynamic rotary", "llama"])
def test_attribution_and_perplexity_pad_only_where_the_model_bears_it(shape, tokenizer):
    """Dynamic rotary scales with the length of what runs, padding included."""
    model = model_of(shape, tokenizer)
    v, fmt = random_vectors(model, scale=2.0)[1], resolve_format(model, None)
    questions = [(Prompt.of(model, text), 5, 9) for text in ("Why?", "How was your long day at work, or at home?")]
    split = cl.interpretation.attribute_logits(model, questions, v, progress=False)
    for row, (prompt, good, bad) in zip(split.changes.itertuples(), questions, strict=True):
        steered = plain_forward(model, prompt.tokens, [(1, v.direction, prompt.steer_start)])
        change = (steered - unsteered(model, prompt.tokens))[-1]
        assert row.change == pytest.approx(float(change[good] - change[bad]), abs=2e-4)
    answers = ("It was fine.", "It rained all day. " * 8)  # the tables change at 64 tokens
    prompts = [encode_answer(fmt, tokenizer, "How was it?", answer) for answer in answers]
    assert len(prompts[0]) < 64 < len(prompts[1])
    for prompt, found in zip(prompts, answer_logp(model, prompts, progress=False), strict=True):
        logp = unsteered(model, prompt.tokens).log_softmax(-1)
        expected = [logp[pos - 1, prompt.tokens[pos]] for pos in range(prompt.answer_start, len(prompt))]
        assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_another_object_in_the_place_of_one_that_is_gone_is_another_structure():
    """An `id` may come again: what was compared with one autoencoder attached must not hold for the next."""
    model, signatures = model_of("llama"), []
    for _ in range(20):
        model.blocks[1].mlp.act_fn = lambda x: x.relu()
        signatures.append(structure_of(model).signature)
    assert all(one != other for i, one in enumerate(signatures) for other in signatures[:i])
    assert signatures[-1] == structure_of(model).signature


def test_ways_to_run_a_model_are_tried_once_and_again_when_it_has_changed(monkeypatch):
    ran = []
    compare = plain_module._compare
    monkeypatch.setattr(plain_module, "_compare", lambda model: ran.append(model) or compare(model))
    model = model_of("gpt2")
    for _ in range(3):
        plain_runs(model)
    assert len(ran) == 1
    model.cfg.use_attn_result = True
    plain_runs(model)
    assert len(ran) == 2
