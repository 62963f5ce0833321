"""SAELens: a sparse autoencoder in a hook point's place, and everything beside it as `model.forward` gives it.

The autoencoders have random weights, so that what they write is far from what they read.
"""

import copy
import functools
import warnings

import pytest
import test_docs
import torch
from helpers.models import random_vectors
from helpers.pages import PAGES, blocks, name_of
from helpers.shapes import model_of
from helpers.twins import (
    ENTRIES,
    LETTERS,
    TEXTS,
    assert_everything_is_the_models_own,
    plain_forward,
    run_with_one_vector_at_layer_1,
    streams,
    twin_extract,
    twin_generate,
    twin_score,
    unsteered,
)
from other_tools import needs
from test_docs import stand_ins  # noqa: F401 (a fixture)
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine import shared_prefix
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.engine.plain_runs import plain_runs
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.prompt_formats import Prompt, encode_answer, resolve_format
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports names that TransformerLens 3.9 has elsewhere
    sae_lens = needs("sae_lens")
STREAM = "blocks.1.hook_resid_post"
KINDS = {
    "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
    "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
    "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
    "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 5}),
    "matching pursuit": (sae_lens.MatchingPursuitSAE, sae_lens.MatchingPursuitSAEConfig, {"max_iterations": 6}),
    "layer norm": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {"normalize_activations": "layer_norm"}),
    "temporal": (
        sae_lens.TemporalSAE,
        sae_lens.TemporalSAEConfig,
        {"n_heads": 2, "bottleneck_factor": 2, "kval_topk": 12},
    ),
    "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig, {"d_out": 32, "apply_b_dec_to_input": False}),
}


def sae_at(name, kind="standard", *, d_in=32, d_sae=64, seed=0, name_out=None):
    """An autoencoder of random weights for a hook point."""
    make, configure, options = KINDS[kind]
    torch.manual_seed(seed)
    if name.endswith("hook_z"):
        options = {**options, "reshape_activations": "hook_z"}
    cfg = configure(d_in=d_in, d_sae=d_sae, **options)
    cfg.metadata.hook_name, cfg.metadata.hook_name_out = name, name_out
    sae = make(cfg)
    for parameter in sae.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    return sae.eval().requires_grad_(False)


def hooked_sae_transformer(model):
    """The same model as SAELens' class."""
    cfg = copy.deepcopy(model.cfg)
    cfg.tokenizer_name = None  # it would load the tokenizer anew
    made = sae_lens.HookedSAETransformer(cfg)
    made.load_state_dict(model.state_dict())
    made.tokenizer = model.tokenizer
    return made.eval()


@pytest.fixture(scope="module")
def plain(demo_tokenizer):
    return model_of("llama grouped", demo_tokenizer)


@pytest.fixture
def model(plain):
    return hooked_sae_transformer(plain)


def spliced(model, name, kind="standard", *, setup=True):
    """Put an autoencoder in a hook point's place by hand, and return what takes it away again."""
    place, _, last = name.rpartition(".")
    module = model.get_submodule(place)
    own = getattr(module, last)
    setattr(module, last, sae_at(name, kind))
    if setup:
        model.setup()

    def take_away():
        setattr(module, last, own)
        model.setup()

    return take_away


def added(model, name, kind="standard", *, name_out=None, **options):
    model.add_sae(sae_at(name, kind, name_out=name_out), **options)
    return model.reset_saes


# Where and how an autoencoder is attached, and the layers of vectors beside it.
WAYS = {
    "add_sae": (functools.partial(added, name=STREAM), (0, 2, 3)),
    "add_sae with the error term": (functools.partial(added, name=STREAM, use_error_term=True), (0, 2, 3)),
    "add_sae without special tokens": (functools.partial(added, name=STREAM, exclude_special_tokens=True), (0, 2, 3)),
    "by hand": (functools.partial(spliced, name=STREAM), (0, 2, 3)),
    "by hand, without setup()": (functools.partial(spliced, name=STREAM, setup=False), (0, 2, 3)),
    "hook_mlp_out": (functools.partial(added, name="blocks.1.hook_mlp_out"), (0, 1, 3)),
    "hook_mlp_out by hand, without setup()": (
        functools.partial(spliced, name="blocks.1.hook_mlp_out", setup=False),
        (0, 1, 3),
    ),
    "hook_attn_out": (functools.partial(added, name="blocks.1.hook_attn_out"), (0, 1, 3)),
    "hook_z": (functools.partial(added, name="blocks.1.attn.hook_z"), (0, 1, 3)),
    "hook_resid_pre": (functools.partial(added, name="blocks.1.hook_resid_pre"), (0, 1, 3)),
    "the embedding": (functools.partial(added, name="hook_embed"), (0, 1, 3)),
    "the last layer": (functools.partial(added, name="blocks.3.hook_resid_post"), (0, 1, 2)),
    "transcoder": (
        functools.partial(
            added, name="blocks.1.ln2.hook_normalized", kind="transcoder", name_out="blocks.1.hook_mlp_out"
        ),
        (0, 1, 3),
    ),
    **{
        kind: (functools.partial(added, name=STREAM, kind=kind), (0, 2, 3))
        for kind in ("gated", "jumprelu", "topk", "matching pursuit", "layer norm", "temporal")
    },
}


def test_without_an_autoencoder_the_engine_is_used_and_gives_the_models_own_numbers(plain, model):
    assert type(model) is sae_lens.HookedSAETransformer
    assert shared_prefix.unsupported(model) is None
    assert_everything_is_the_models_own(model)  # a warning that it is not used would be an error
    assert_close(cl.extract(model, TEXTS, progress=False).directions, cl.extract(plain, TEXTS).directions)


@pytest.mark.parametrize("way", WAYS)
def test_everything_beside_an_autoencoder_is_the_models_own_and_the_engine_comes_back(model, way):
    attach, layers = WAYS[way]
    tokens = Prompt.of(model, "How was your long day at work?").tokens
    before = unsteered(model, tokens)
    take_away = attach(model)
    if way != "add_sae with the error term":  # which gives back what is lost
        assert (unsteered(model, tokens) - before).abs().max() > 1e-2
    with pytest.warns(SharedPrefixWarning, match="because"):
        assert_everything_is_the_models_own(model, layers=layers)
    with pytest.warns(SharedPrefixWarning, match="because"):
        assert_readings_are_the_models_own(model, layers[1], splits=way != "the last layer")
    take_away()
    assert_close(unsteered(model, tokens), before)
    assert shared_prefix.unsupported(model) is None
    assert_close(cl.extract(model, TEXTS, progress=False).directions, twin_extract(model, TEXTS), atol=2e-4, rtol=1e-3)


def assert_readings_are_the_models_own(model, layer, *, splits):
    """`steer`, attribution, similarity and pairs' activations beside what stands in a hook point's place.

    `splits`: above the layer nothing but what blocks write gets into the stream.
    """
    vectors = random_vectors(model, scale=2.0)
    v, prompt = vectors[layer], Prompt.of(model, "How was your long day at work?")
    steps = [(layer, v.direction, prompt.steer_start)]
    steered = plain_forward(model, prompt.tokens, steps)
    tokens = torch.tensor([prompt.tokens])
    with torch.no_grad(), cl.steer(model, v, prompt=prompt):
        assert_close(model(tokens, attention_mask=torch.ones_like(tokens))[0], steered)
        text = model.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False, use_past_kv_cache=False)
    if "hook_embed" in model.hook_dict:  # TransformerLens' own loop runs the embedding without its hook point
        assert text[0, len(prompt) :].tolist() == twin_generate(model, prompt, [(layer, v.direction)], 3)

    similar = cl.token_similarity(model, prompt, vectors)
    dots = torch.tensor(similar.summary("dot").to_numpy())  # [pos layer]
    expected = torch.einsum("lpd,ld->pl", streams(model, prompt.tokens), vectors.directions)
    assert_close(dots, expected.to(dots.dtype), atol=1e-4, rtol=1e-4)
    fmt, norms = resolve_format(model, None), []
    for pair in TEXTS:
        for answer in (pair.positive, pair.negative):
            text = encode_answer(fmt, model.tokenizer, pair.question, answer)
            norms.append(streams(model, text.tokens)[layer, slice(*text.read)].norm(dim=-1).mean())
    found = pair_activations(model, TEXTS, layers=[layer], progress=False).norms  # [pair side layer]
    assert_close(found.flatten(), torch.stack(norms), atol=1e-4, rtol=1e-4)

    questions = [(prompt, 5, 9), (Prompt.of(model, "Why?"), 70, 5)]
    if not splits:
        with pytest.raises(ValueError, match="the components miss the change of the logits"):
            cl.interpretation.attribute_logits(model, questions, v, progress=False)
        return
    split = cl.interpretation.attribute_logits(model, questions, v, progress=False)
    for row, (text, good, bad) in zip(split.changes.itertuples(), questions, strict=True):
        steered = plain_forward(model, text.tokens, [(layer, v.direction, text.steer_start)])
        change = steered - unsteered(model, text.tokens)
        assert row.change == pytest.approx(float(change[-1, good] - change[-1, bad]), abs=2e-4)
    assert split.explained == pytest.approx(1, abs=1e-3)


def test_an_autoencoder_that_looks_at_other_positions_runs_unpadded_and_without_a_cache(model):
    assert plain_runs(model).padded
    assert plain_runs(model).cached
    with model.saes([sae_at(STREAM)]):
        assert plain_runs(model).padded
        assert plain_runs(model).cached
    with model.saes([sae_at(STREAM, "temporal")]):
        assert not plain_runs(model).padded
        assert not plain_runs(model).cached


def test_inside_the_context_manager_and_after_it(model):
    """Two autoencoders, one of them in the place of another that stays."""
    model.add_sae(sae_at("blocks.2.hook_mlp_out"))
    outer = twin_score(model, LETTERS, [])
    with model.saes([sae_at("blocks.2.hook_mlp_out", "topk"), sae_at(STREAM, "jumprelu")]):
        inner = twin_score(model, LETTERS, [])
        with pytest.warns(SharedPrefixWarning):
            assert_close(score_answers(model, LETTERS, [()], progress=False).values[:, 0], inner, atol=1e-5, rtol=1e-4)
    assert (inner - outer).abs().max() > 1e-3
    with pytest.warns(SharedPrefixWarning):
        assert_close(score_answers(model, LETTERS, [()], progress=False).values[:, 0], outer, atol=1e-5, rtol=1e-4)


# ---- a vector at the very layer whose stream an autoencoder replaces ---------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_vector_at_the_layer_whose_stream_is_replaced_is_refused(model, entry):
    with (
        model.saes([sae_at(STREAM)]),
        pytest.raises(ValueError, match=r"_SAEWrapper stands in the place of blocks\.1\.hook_resid_post.*reset_saes"),
    ):
        run_with_one_vector_at_layer_1(entry, model)
    take_away = spliced(model, STREAM, setup=False)
    with pytest.raises(
        ValueError, match=r"StandardSAE stands in the place of blocks\.1\.hook_resid_post, .*another layer"
    ):
        run_with_one_vector_at_layer_1(entry, model)
    take_away()
    run_with_one_vector_at_layer_1(entry, model)


def test_a_copy_of_the_model_takes_the_plain_path(model):
    """SAELens' MLPs are behind a function of the original's, so a copy runs the original's weights."""
    other = copy.deepcopy(model)
    other.blocks[0].mlp.W_in.data *= 3
    assert "mlp.forward was replaced" in shared_prefix.unsupported(other)
    model.blocks[2].mlp.forward = lambda x: x
    assert "blocks.2.mlp.forward was replaced" in shared_prefix.unsupported(model)


def test_a_hook_on_what_saelens_adds_to_an_mlp_is_noticed(model):
    model.add_hook("blocks.2.mlp.hook_in", lambda x, hook: 2 * x)
    assert "blocks.2.mlp.hook_in" in shared_prefix.unsupported(model)


@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
def test_the_demo_model_with_an_autoencoder(demo_model):
    model = hooked_sae_transformer(demo_model)
    assert shared_prefix.unsupported(model) is None
    pairs = ContrastSet.load("sentiment").sample(2)
    v = cl.extract(demo_model, pairs, layers=[5], progress=False)[5]
    model.add_sae(sae_at("blocks.10.hook_resid_post", d_in=576, d_sae=256), use_error_term=False)
    assert "blocks.10.hook_resid_post is a _SAEWrapper" in shared_prefix.unsupported(model)
    found = cl.extract(model, pairs, layers=[5, 20], progress=False)
    values = score_answers(model, pairs, [(), (Intervention(vector=v, multiplier=2),)], progress=False).values
    prompt = Prompt.of(model, "How was your day?")
    steps = generate_tokens(model, [prompt], vectors=[2 * v], max_new_tokens=3)
    text = torch.stack(list(steps), dim=1)[0].tolist()
    expected = twin_extract(model, pairs)[[5, 20]]
    assert_close(found.directions, expected, atol=1e-3, rtol=1e-3)
    twins = [twin_score(model, pairs, steps) for steps in ([], [(5, 2 * v.direction)])]
    assert_close(values, torch.stack(twins, dim=1), atol=1e-4, rtol=1e-3)
    assert text == twin_generate(model, prompt, [(5, 2 * v.direction)], 3)
    model.reset_saes()
    assert shared_prefix.unsupported(model) is None
    assert_close(cl.extract(model, pairs, layers=[5], progress=False)[5].direction, v.direction, atol=1e-4, rtol=1e-3)


SAE_PAGES = [page for page in PAGES if any(block.interop and "sae-lens" in block.reason for block in blocks(page))]


@pytest.mark.parametrize("page", SAE_PAGES, ids=name_of)
def test_a_page_of_the_docs_runs_with_the_blocks_that_need_saelens(page, stand_ins, tmp_path, monkeypatch, capsys):  # noqa: F811
    own, made = sae_lens.StandardSAE, []
    monkeypatch.setattr(sae_lens, "StandardSAE", lambda cfg: made.append(cfg) or own(cfg))
    monkeypatch.setattr(test_docs, "INTEROP", True)
    test_docs.test_the_code_of_a_page_runs_in_order(page, stand_ins, tmp_path, monkeypatch, capsys)
    assert made  # the block was run
