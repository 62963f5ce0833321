"""From the stream to logits: the model's own way, in float32 whatever the weights' type."""

import pytest
import torch
from helpers.device import device
from helpers.models import random_vectors
from helpers.shapes import OTHER, PLAIN, model_of
from helpers.steering import streams
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.contrast.sets import ContrastSet
from caa_lens.interpretation.lens import lens_scores
from caa_lens.measures.answers import score_answers
from caa_lens.models.unembedding import final_logits, token_logits, token_logp, token_logps
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import Prompt, encode_letters, resolve_format
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention

SHAPES = PLAIN | OTHER
PAIRS = ContrastSet.from_pairs(
    [
        (f"Is {n} more than {n - 1}?\n (A) Yes\n (B) No", *(("(A)", "(B)") if n % 2 else ("(B)", "(A)")))
        for n in range(40)
    ],
    name="numbers",
)


def half_of(tiny_model, exact, dtype):
    """The same model in half precision, with weights that both types hold: what differs is arithmetic alone."""
    model = tiny_model(d_vocab=exact.cfg.d_vocab, n_ctx=512, dtype=dtype, tokenizer=exact.tokenizer)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in exact.state_dict().items()}
    model.load_state_dict(state)
    exact.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def both(request, demo_tokenizer, tiny_model):
    """A random Llama with logits of 16 to 32, as real ones have, in float32 and in half precision."""
    exact = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=512, tokenizer=demo_tokenizer)
    exact.unembed.W_U.data *= 25 / exact.unembed.W_U.data.norm(dim=0).mean()
    return exact, half_of(tiny_model, exact, request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_behind_the_last_block_every_shape_is_itself(shape):
    model = model_of(shape)
    tokens = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(tokens)
        resid = model(tokens, stop_at_layer=model.cfg.n_layers)
        assert_close(final_logits(model, resid), logits, atol=1e-5, rtol=1e-5)
        some = torch.tensor([[5, 60], [0, 1]])[:, None]
        assert_close(token_logits(model, resid, some), logits.gather(-1, some.expand(2, 7, 2)), atol=1e-5, rtol=1e-5)
        targets = torch.arange(7)
        expected = logits.log_softmax(-1).gather(-1, targets.expand(2, 7)[..., None])[..., 0]
        assert_close(token_logp(model, resid, targets, at_once=5), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [(1, 64), (3, 7), (100, 1), (100, 100)])
@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_log_probabilities_from_tiles_are_those_of_all_logits(tile, cap, monkeypatch):
    monkeypatch.setattr("caa_lens.models.unembedding.TILE", tile)
    model = model_of(next(iter(SHAPES)))
    model.cfg.output_logits_soft_cap = cap
    resid = 3 * torch.randn(2, 5, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 63], [1, 1], [62, 7], [63, 0], [30, 6]])  # the first and last of tiles among them
    with torch.no_grad():
        expected = final_logits(model, resid).log_softmax(-1).gather(-1, targets.expand(2, 5, 2))
        assert_close(token_logps(model, resid, targets), expected, atol=2e-6, rtol=1e-6)
    with_gradient = token_logps(model, resid.requires_grad_(), targets)
    assert with_gradient.requires_grad
    assert_close(with_gradient.detach(), expected, atol=2e-6, rtol=1e-6)


def test_log_probabilities_of_half_precision_come_from_float32_logits(both, monkeypatch):
    monkeypatch.setattr("caa_lens.models.unembedding.TILE", (16, 1000))
    _, half = both
    resid = 3 * torch.randn(50, half.cfg.d_model, generator=torch.Generator().manual_seed(0)).to(half.cfg.dtype)
    targets = torch.arange(100).reshape(50, 2)
    with torch.no_grad():
        expected = final_logits(half, resid).double().log_softmax(-1).gather(-1, targets)
        assert_close(token_logps(half, resid, targets).double(), expected, atol=1e-4, rtol=0)


def test_half_precision_logits_are_those_of_exact_arithmetic_on_the_same_stream(both):
    _, half = both
    resid = 3 * torch.randn(50, half.cfg.d_model, generator=torch.Generator().manual_seed(0)).to(
        device(), half.cfg.dtype
    )
    x = resid.double()
    x = x / (x.pow(2).mean(-1, keepdim=True) + half.cfg.eps).sqrt() * half.ln_final.w.double()
    exact = x @ half.W_U.double() + half.b_U.double()
    assert exact.abs().max() > 16
    assert_close(final_logits(half, resid).double(), exact, atol=2e-4, rtol=0)
    ids = torch.tensor([7, 70, 700])
    assert_close(token_logits(half, resid, ids).double(), exact[:, ids], atol=2e-4, rtol=0)
    rounded = half.unembed(half.ln_final(resid[None]))[0].double()
    assert (rounded - exact).abs().max() > 1e-2  # what it is for


def test_a_large_unembedding_is_converted_in_pieces(both, monkeypatch):
    _, half = both
    resid = torch.randn(5, half.cfg.d_model).to(device(), half.cfg.dtype)
    whole = final_logits(half, resid)
    monkeypatch.setattr("caa_lens.models.unembedding.PIECE", 32 * 1000)
    assert_close(final_logits(half, resid), whole, atol=1e-5, rtol=1e-6)


def plain_probabilities(model, steps=()):
    """p(matching) from the model's own logits, in the model's own type, one prompt at a time."""
    fmt, values = resolve_format(model, None), []
    for pair in PAIRS:
        letters = (pair.positive[1], pair.negative[1])
        prompt, ids = encode_letters(fmt, model.tokenizer, pair.question, letters)
        hooks = [Intervention(vector=v, start=prompt.steer_start).hook() for v in steps]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            logits = model(torch.tensor([prompt.tokens]))[0, -1, list(ids)]
        values.append(logits.float().softmax(-1)[0])
    return torch.stack(values)


def test_probabilities_in_half_precision_are_no_further_from_float32_than_plain_forwards_are(both, model_kind):
    exact, half = both
    vector = random_vectors(exact)[2]
    own, rounded, scored = [], [], []
    for steps in ((), (vector,)):
        conditions = [tuple(Intervention(vector=v) for v in steps)]
        reference = plain_probabilities(exact, steps)
        assert_close(score_answers(exact, PAIRS, conditions, progress=False).values[:, 0], reference, atol=1e-5, rtol=0)
        found = score_answers(half, PAIRS, conditions, progress=False).values[:, 0]
        own.append(found)
        scored.append((found - reference).abs().mean())
        rounded.append((plain_probabilities(half, steps) - reference).abs().mean())
    assert sum(scored) <= 1.5 * sum(rounded)
    if half.cfg.dtype == torch.bfloat16 and model_kind == "hooked":
        assert sum(scored) < sum(rounded)
    # Two logits that are multiples of 0.125 give a handful of probabilities.
    assert len(set(own[0].tolist())) > 35


def test_generation_in_half_precision_chooses_by_float32_logits(both):
    _, half = both
    prompt = Prompt.of(half, "How was your day?")
    tokens = [int(step) for step in generate_tokens(half, [prompt], max_new_tokens=6)]
    text = list(prompt.tokens)
    for token in tokens:
        logits = final_logits(half, streams(half, [text])[-1, 0, -1])
        # Cached and whole texts round differently inside the blocks; what is chosen is among the very best.
        assert logits.max() - logits[token] < 0.05 * logits.max()
        text.append(token)


@pytest.mark.parametrize("shape", ["gpt2", "gpt2 folded", "gemma2", "bloom", "no norm", "capped logits", "neox"])
def test_every_reading_of_the_lens_uses_the_models_own_norm_and_cap(shape, demo_tokenizer):
    model = model_of(shape, demo_tokenizer)
    v = random_vectors(model, scale=2.0)[1]
    behind = getattr(model, "ln_final", None)
    with torch.no_grad():
        x = v.direction
        if "LN" in str(model.cfg.normalization_type):
            x = x - x.mean()
        gain = 1 if behind is None or not hasattr(behind, "w") else behind.w
        direct = (x * gain) @ model.W_U
        scaled = x if behind is None else x / (x.pow(2).mean() + model.cfg.eps).sqrt()
        normed = (scaled * gain) @ model.W_U
        assert_close(lens_scores(model, v.direction, "direct"), direct - direct.mean(), atol=1e-4, rtol=1e-4)
        assert_close(lens_scores(model, v.direction, "normed"), normed - normed.mean(), atol=1e-4, rtol=1e-4)

        def run_on(state):
            """The model's own logits with a state as the last block's output."""
            hook = (f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", lambda resid, hook: state[None, None])
            return model.run_with_hooks(torch.tensor([[1]]), fwd_hooks=[hook])[0, 0]

        shifts, changes = [], []
        pairs = PAIRS.sample(2)
        for sides in encode_pairs(model, pairs, resolve_format(model, None)):
            for prompt in sides:
                _, cache = model.run_with_cache(torch.tensor([prompt.tokens]), names_filter=v.hook_name)
                state = cache[v.hook_name][0, slice(*prompt.read)].mean(0)
                after, before = run_on(state + v.direction), run_on(state)
                shifts.append(after - before)
                changes.append(after.softmax(-1) - before.softmax(-1))
    shift, change = torch.stack(shifts).mean(0), torch.stack(changes).mean(0)
    with pytest.warns(cl.engine.SharedPrefixWarning) if shape in OTHER else _nothing():
        lens = cl.logit_lens(model, v, reading="in_context", pairs=pairs, k=4)
    for row in lens.frame.itertuples():
        assert row.score == pytest.approx(float(shift[row.token_id] - shift.mean()), abs=2e-4)
        assert row.probability == pytest.approx(float(change[row.token_id]), abs=1e-6)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("shape", ["gpt2", "no norm"])
def test_the_background_of_a_layer_norm_is_the_mean_over_random_directions(shape, demo_tokenizer):
    model = model_of(shape, demo_tokenizer)
    v, pairs = random_vectors(model, scale=2.0)[1], PAIRS.sample(2)
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(3, model.cfg.d_model, generator=generator)
    units = random / random.norm(dim=-1, keepdim=True)
    words = ["happy", "sad", "day", "the"]

    def scores(direction, **options):
        vector = cl.SteeringVector.from_direction(direction, layer=1)
        with pytest.warns(cl.engine.SharedPrefixWarning):
            ranks = cl.word_ranks(model, vector, words, reading="in_context", pairs=pairs, **options)
        return torch.tensor(list(ranks.frame["score"]))

    mean = torch.stack([scores(s * v.norm * u) for u in units for s in (1, -1)]).mean(0)
    found = scores(v.direction, background=3, seed=5)
    assert_close(found, scores(v.direction) - mean, atol=2e-4, rtol=1e-3)


def test_a_background_needs_logits_that_are_linear(demo_tokenizer):
    model = model_of("capped logits", demo_tokenizer)
    with pytest.raises(ValueError, match="the logits of 'capped logits' are not linear in the normalised stream"):
        cl.logit_lens(model, random_vectors(model)[1], reading="in_context", pairs=PAIRS.sample(2), background=2)


@pytest.mark.parametrize("where", ["Unembed", "RMSNorm"])
@pytest.mark.hooked  # its classes are patched
def test_a_class_that_was_patched_behind_the_blocks_is_felt(where, tiny_chat, monkeypatch):
    from transformer_lens import components

    resid = torch.randn(3, tiny_chat.cfg.d_model).to(device())
    before = final_logits(tiny_chat, resid)
    own = getattr(components, where).forward
    monkeypatch.setattr(getattr(components, where), "forward", lambda self, x: own(self, x).flip(-1) + 1)
    patched = tiny_chat.unembed(tiny_chat.ln_final(resid[None]))[0]
    assert_close(final_logits(tiny_chat, resid), patched, atol=1e-5, rtol=1e-5)
    assert_close(token_logits(tiny_chat, resid, torch.tensor([5, 7])), patched[:, [5, 7]], atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    assert torch.equal(final_logits(tiny_chat, resid), before)
