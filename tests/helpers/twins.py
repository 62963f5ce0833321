"""What extraction, scores and texts are by definition: the model's own forward of one unpadded text at a time.

Vectors are added by TransformerLens' hooks; there is no code of the package in a forward, no padding and no cache.
"""

import pytest
import torch
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.prompt_formats import Prompt, encode_answer, encode_letters, resolve_format
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention
from helpers.models import random_vectors

LETTERS = ContrastSet.from_pairs(
    [("Is rain wet?\n (A) Yes\n (B) No", "(A)", "(B)"), ("Is fire cold, then?\n (A) Yes\n (B) No", "(B)", "(A)")],
    name="letters",
)
TEXTS = ContrastSet.from_pairs(
    [("How was it?", "It was fine.", "Awful."), ("And the long walk by the sea?", "No.", "It rained all day.")],
    name="texts",
)


def unsteered(model, tokens):
    """`[pos d_vocab]` logits of the model's own forward on one text by itself."""
    with torch.no_grad():
        tokens = torch.tensor([tokens])
        return model(tokens, attention_mask=torch.ones_like(tokens))[0]


def plain_forward(model, tokens, steps=()):
    """Logits with vectors added by TransformerLens' hooks: no code of the package, no padding and no cache."""
    hooks = []
    for layer, direction, start in steps:

        def add(resid, hook, direction=direction, start=start):
            steered = torch.arange(resid.shape[1])[:, None] >= start
            return torch.where(steered, resid + direction, resid)

        hooks.append((f"blocks.{layer}.hook_resid_post", add))
    with model.hooks(fwd_hooks=hooks):
        return unsteered(model, tokens)


def streams(model, tokens):
    """`resid_post` of each layer, `[layer pos d_model]`; of a block in a module of somebody's, the whole's output."""
    kept = []
    points = [getattr(block, "hook_resid_post", block) for block in model.blocks]
    handles = [point.register_forward_hook(lambda m, i, out: kept.append(out[0])) for point in points]
    try:
        unsteered(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept)


def twin_extract(model, pairs):
    fmt, total = resolve_format(model, None), 0
    for pair in pairs:
        for answer, sign in ((pair.positive, 1), (pair.negative, -1)):
            prompt = encode_answer(fmt, model.tokenizer, pair.question, answer)
            first, last = prompt.read
            total = total + sign * streams(model, prompt.tokens)[:, first:last].mean(1)
    return total / len(pairs)


def twin_score(model, pairs, steps):
    """`steps` are `(layer, direction)`; `p_matching` or `margin` of every pair."""
    fmt, values = resolve_format(model, None), []
    for pair in pairs:
        if pairs.kind == "ab":
            letters = (pair.positive[1], pair.negative[1])
            prompt, ids = encode_letters(fmt, model.tokenizer, pair.question, letters)
            at = [(layer, direction, prompt.steer_start) for layer, direction in steps]
            values.append(plain_forward(model, prompt.tokens, at)[-1, list(ids)].softmax(-1)[0])
            continue
        sides = []
        for answer in (pair.positive, pair.negative):
            prompt = encode_answer(fmt, model.tokenizer, pair.question, answer)
            at = [(layer, direction, prompt.steer_start) for layer, direction in steps]
            logp = plain_forward(model, prompt.tokens, at).log_softmax(-1)
            wanted = range(prompt.answer_start, len(prompt))
            sides.append(torch.stack([logp[pos - 1, prompt.tokens[pos]] for pos in wanted]).mean())
        values.append(sides[0] - sides[1])
    return torch.stack(values)


def twin_generate(model, prompt, steps, n_new):
    tokens = list(prompt.tokens)
    for _ in range(n_new):
        at = [(layer, direction, prompt.steer_start) for layer, direction in steps]
        tokens.append(int(plain_forward(model, tokens, at)[-1].argmax()))
    return tokens[len(prompt) :]


def assert_everything_is_the_models_own(model, *, layers=(0, 2, 3)):
    """extract, score, sweep, transfer, generate and the lens of the stream, each against its twin."""
    vectors = random_vectors(model, scale=2.0)
    expected = twin_extract(model, TEXTS)
    found = cl.extract(model, TEXTS, progress=False)
    assert_close(found.directions, expected, atol=2e-4, rtol=1e-3)

    for pairs in (LETTERS, TEXTS):
        conditions = [(), *[(Intervention(vector=vectors[layer]),) for layer in layers]]
        values = score_answers(model, pairs, conditions, progress=False).values
        steps = [[], *[[(layer, vectors[layer].direction)] for layer in layers]]
        assert_close(values, torch.stack([twin_score(model, pairs, s) for s in steps], dim=1), atol=2e-4, rtol=1e-3)
        swept = cl.sweep(model, pairs, vectors, layers=layers[1:], multipliers=[1], progress=False)
        by_layer = swept.frame.groupby("layer")[swept.metric].mean()
        assert list(by_layer) == pytest.approx(values[:, 2:].mean(0).tolist(), abs=2e-4)

    moved = cl.transfer_layers(model, TEXTS, vectors.at([layers[1]]), targets=[layers[2]], progress=False)
    other = twin_score(model, TEXTS, [(layers[2], vectors[layers[1]].direction)])
    assert list(moved.frame["score"]) == pytest.approx(other.tolist(), abs=2e-4)

    prompts = [Prompt.of(model, "Why?"), Prompt.of(model, "How was your long day at work?")]
    layer = layers[1]
    for use_cache in (True, False):
        steps = generate_tokens(model, prompts, vectors=[vectors[layer]], max_new_tokens=4, use_cache=use_cache)
        rows = torch.stack(list(steps), dim=1).tolist()
        assert rows == [twin_generate(model, one, [(layer, vectors[layer].direction)], 4) for one in prompts]

    lens = cl.residual_lens(model, prompts[1], vectors=[vectors[layer]], layers=[model.cfg.n_layers - 1], positions=[9])
    logits = plain_forward(model, prompts[1].tokens, [(layer, vectors[layer].direction, prompts[1].steer_start)])[9]
    last = lens.frame[lens.frame["steered"]].iloc[0]
    assert last["probability"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    assert last["top_token_id"] == int(logits.argmax())
    assert lens.frame.iloc[0]["probability"] == pytest.approx(
        float(unsteered(model, prompts[1].tokens)[9].softmax(-1).max()), abs=1e-5
    )


# ---- every function that steers, with one vector -----------------------------------------------------------------


def steer_and_run(model, v):
    with cl.steer(model, v, start=0):
        model(torch.tensor([[1, 2, 3]]))


def run_with_one_vector_at_layer_1(entry, model):
    v = random_vectors(model)[1]
    match entry:
        case "score":
            score_answers(model, LETTERS, [(), (Intervention(vector=v),)], progress=False)
        case "sweep":
            cl.sweep(model, TEXTS, random_vectors(model), layers=[1], multipliers=[1], progress=False)
        case "transfer":
            cl.transfer_layers(model, TEXTS, random_vectors(model, layers=[2]), targets=[1], progress=False)
        case "generate":
            cl.generate(model, "Why?", [v], max_new_tokens=2)
        case "stream":
            list(cl.generate_stream(model, "Why?", [v], max_new_tokens=2))
        case "steer":
            steer_and_run(model, v)
        case "residual_lens":
            cl.residual_lens(model, "Why?", vectors=[v])
        case "attribute":
            cl.interpretation.attribute_logits(model, LETTERS, v, progress=False)


ENTRIES = ("score", "sweep", "transfer", "generate", "stream", "steer", "residual_lens", "attribute")
