"""The readings of a lens that run the model, against torch's derivative and plain forwards of whole texts."""

import copy

import pytest
import torch
from helpers.models import random_vectors, tiny_model
from helpers.steering import adding, logits_of
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.stream_responses import NoDerivativeError
from caa_lens.interpretation.lens import logit_lens, word_ranks
from caa_lens.interpretation.lens_prompts import ANSWER_TOKENS, prompts_to_read
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens
from caa_lens.vectors.steering_vectors import SteeringVector

PROMPTS = [Prompt.from_tokens(range(3, 15)), Prompt.from_tokens([7, 50, 3, 9]), Prompt.from_tokens([5, 6, 9, 1, 30])]
PLAIN = {"controls": 0, "progress": False, "place": "instruction"}


def all_scores(result, layer):
    """Score of every token at a layer, by token id, from a lens that kept all of them."""
    frame = result.frame[(result.frame["layer"] == layer) & (result.frame["side"] == "promoted")]
    return torch.tensor(frame.sort_values("token_id")["score"].to_numpy(), dtype=torch.float32)


def all_probabilities(result, layer):
    frame = result.frame[(result.frame["layer"] == layer) & (result.frame["side"] == "promoted")]
    return torch.tensor(frame.sort_values("token_id")["probability"].to_numpy(), dtype=torch.float32)


def answered(tokens, start):
    import dataclasses

    return dataclasses.replace(Prompt.from_tokens(tokens), steer_start=start, answer_start=start + 1)


def steered_logits(model, prompt, vector, multiplier):
    return logits_of(model, [list(prompt.tokens)], [adding(vector, prompt.steer_start, multiplier)])[0]


def slope(model, prompt, vector, step=1e-5):
    """Central difference of the logits of plain forwards, in float64."""
    model.to(torch.float64)
    resid = {sign: _forward(model, prompt, vector, sign * step) for sign in (1, -1)}
    return (resid[1] - resid[-1]) / (2 * step)


@torch.no_grad()
def _forward(model, prompt, vector, multiplier):
    steered = (torch.arange(len(prompt)) >= prompt.steer_start)[None, :, None]

    def add(resid, hook):
        return resid + steered * multiplier * vector.direction.double()

    hooks = [(f"blocks.{vector.layer}.hook_resid_post", add)]
    return model.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=hooks)[0]


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("norm", ["RMS", "folded", "LN"])
def test_causal_is_the_derivative_of_the_models_own_logits(layer, norm):
    def made():
        model = tiny_model()
        if norm == "folded":
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_and_process_state_dict(
                state, fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
            )
        if norm == "LN":
            from transformer_lens.components import LayerNorm

            model.ln_final = LayerNorm(model.cfg)
            model.ln_final.w.data = 1 + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
            model.ln_final.b.data = torch.randn(32, generator=torch.Generator().manual_seed(2))
        return model

    model = made()
    vector = random_vectors(model)[layer]
    result = logit_lens(model, vector, k=10**6, reading="causal", prompts=PROMPTS, multiplier=-1.5, **PLAIN)
    twin = made()
    told = -1.5 * torch.stack([slope(twin, one, vector)[-1] for one in PROMPTS]).mean(0)
    told = told - told.mean()
    assert_close(all_scores(result, layer).double(), told, atol=2e-4 * float(told.norm()), rtol=0)


def test_at_the_last_layer_causal_is_the_derivative_of_norm_and_unembedding():
    model = tiny_model()
    vector = random_vectors(model)[4]
    result = logit_lens(model, vector, k=10**6, reading="causal", prompts=PROMPTS, **PLAIN)
    w, W_U = model.ln_final.w.detach(), model.W_U.detach()

    def unembed(h):
        return (h / (h.pow(2).mean() + model.cfg.eps).sqrt() * w) @ W_U

    slopes = []
    for one in PROMPTS:
        _, cache = model.run_with_cache(torch.tensor([one.tokens]))
        last = cache["resid_post", 4][0, -1].detach()
        slopes.append(torch.func.jvp(unembed, (last,), (vector.direction,))[1])
    told = torch.stack(slopes).mean(0)
    assert_close(all_scores(result, 4), told - told.mean(), atol=1e-4, rtol=1e-4)


def test_effect_is_the_mean_change_of_log_probabilities_of_plain_forwards():
    model = tiny_model()
    vector = random_vectors(model)[1]
    result = logit_lens(model, vector, k=10**6, reading="effect", prompts=PROMPTS, multiplier=0.7, **PLAIN)
    changes, moved = [], []
    for one in PROMPTS:
        steered, plain = (steered_logits(model, one, vector, m)[-1] for m in (0.7, 0.0))
        changes.append(steered.log_softmax(-1) - plain.log_softmax(-1))
        moved.append(steered.softmax(-1) - plain.softmax(-1))
    assert_close(all_scores(result, 1), torch.stack(changes).mean(0), atol=1e-4, rtol=1e-4)
    assert_close(all_probabilities(result, 1), torch.stack(moved).mean(0), atol=1e-5, rtol=1e-4)


def test_causal_probabilities_are_those_of_a_small_effect():
    model = tiny_model()
    vector = random_vectors(model)[2]
    linear = logit_lens(model, vector, k=10**6, reading="causal", prompts=PROMPTS, multiplier=1e-2, **PLAIN)
    finite = logit_lens(model, vector, k=10**6, reading="effect", prompts=PROMPTS, multiplier=1e-2, **PLAIN)
    told = all_probabilities(finite, 2)
    assert_close(all_probabilities(linear, 2), told, atol=0.05 * float(told.abs().max()), rtol=0)


def test_a_small_multiplier_is_answered_linearly_and_a_huge_one_is_not():
    model = tiny_model()
    vector = random_vectors(model)[1]
    small, huge = (
        logit_lens(model, vector, reading="effect", prompts=PROMPTS, multiplier=m, **PLAIN).by_layer().iloc[0]
        for m in (1e-2, 30.0)
    )
    assert small["linearity"] > 0.999
    assert small["size_ratio"] == pytest.approx(1, abs=0.02)
    assert huge["linearity"] < 0.95
    assert huge["size_ratio"] < 0.5


def test_with_answers_every_position_that_predicts_one_counts_alike_within_its_prompt():
    model = tiny_model()
    vector = random_vectors(model)[1]
    prompts = [answered(range(3, 15), 8), answered([9, 40, 2, 5, 6], 2)]
    result = logit_lens(model, vector, k=10**6, reading="causal", prompts=prompts, **(PLAIN | {"place": "answer"}))
    twin = tiny_model()
    told = torch.stack([slope(twin, one, vector)[one.steer_start : len(one) - 1].mean(0) for one in prompts]).mean(0)
    told = told - told.mean()
    assert_close(all_scores(result, 1).double(), told, atol=2e-4 * float(told.norm()), rtol=0)


def test_a_prompt_without_an_answer_is_read_at_the_models_own_greedy_one():
    model = tiny_model()
    (own,) = torch.stack(list(generate_tokens(model, PROMPTS[:1], max_new_tokens=ANSWER_TOKENS)), dim=1).tolist()
    options = {"pairs": None, "behavior": "", "prompt_format": None}
    (read,) = prompts_to_read(model, PROMPTS[:1], place="answer", **options)
    assert read.prompt.tokens == (*PROMPTS[0].tokens, *own)
    assert (read.first, read.stop) == (len(PROMPTS[0]) - 1, len(PROMPTS[0]) + ANSWER_TOKENS - 1)


def test_a_soft_cap_is_part_of_the_derivative():
    model = tiny_model()
    model.cfg.output_logits_soft_cap = 2.0
    vector = random_vectors(model)[2]
    result = logit_lens(model, vector, k=10**6, reading="causal", prompts=PROMPTS, **(PLAIN | {"controls": 3}))
    twin = tiny_model()
    twin.cfg.output_logits_soft_cap = 2.0
    told = torch.stack([slope(twin, one, vector)[-1] for one in PROMPTS]).mean(0)
    told = told - told.mean()
    assert_close(all_scores(result, 2).double(), told, atol=2e-4 * float(told.norm()), rtol=0)


def test_causal_is_odd_and_linear_in_the_vector():
    model = tiny_model()
    v = random_vectors(model)[1]
    one, other = (
        all_scores(logit_lens(model, each, k=10**6, reading="causal", prompts=PROMPTS, **PLAIN), 1)
        for each in (v, -3 * v)
    )
    assert_close(other, -3 * one, atol=1e-4, rtol=1e-4)


def test_all_layers_at_once_are_each_by_itself_and_prompts_may_come_in_any_order():
    model = tiny_model()
    vectors = random_vectors(model)
    whole = logit_lens(model, vectors, k=10**6, reading="causal", prompts=PROMPTS, **PLAIN)
    for layer in (0, 3):
        alone = logit_lens(model, vectors[layer], k=10**6, reading="causal", prompts=PROMPTS[::-1], **PLAIN)
        assert_close(all_scores(alone, layer), all_scores(whole, layer), atol=1e-4, rtol=1e-4)


def test_both_kinds_of_model_say_the_same(tmp_path):
    from helpers.models import random_llama

    from caa_lens.models.loading.load import load_model

    random_llama(tmp_path)
    hooked, bridge = (load_model(tmp_path, backend=backend) for backend in ("hooked", "bridge"))
    vectors = random_vectors(hooked)
    for reading in ("causal", "effect"):
        one, other = (
            logit_lens(model, vectors, k=10**6, reading=reading, prompts=PROMPTS, **PLAIN) for model in (hooked, bridge)
        )
        for layer in (0, 1, 2):
            assert_close(all_scores(one, layer), all_scores(other, layer), atol=2e-4, rtol=1e-3)


def test_top_tokens_in_bfloat16_are_those_of_float32():
    model, wide = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16).to(torch.float32)
    vectors = random_vectors(model)
    half, full = (logit_lens(each, vectors, k=5, reading="causal", prompts=PROMPTS, **PLAIN) for each in (model, wide))
    for layer in (0, 2, 4):
        for side in ("promoted", "suppressed"):
            one, other = (
                set(each.frame.query(f"layer == {layer} and side == '{side}'")["token_id"]) for each in (half, full)
            )
            assert len(one & other) >= 4


@pytest.mark.parametrize("layer", [14, 29])
def test_top_tokens_of_the_demo_model_in_bfloat16_are_those_of_float32(demo_model, layer):
    train = ContrastSet.load("sentiment").sample(16, seed=0)
    vector = cl.extract(demo_model, train, layers=[layer], progress=False)[layer]
    half = copy.deepcopy(demo_model).to(torch.bfloat16)
    options = {"reading": "causal", "prompts": ["How was the party?", "Tell me about your town."], "k": 10, **PLAIN}
    narrow, wide = (logit_lens(model, vector, **options).frame for model in (half, demo_model))
    for side in ("promoted", "suppressed"):
        one, other = (frame.query(f"side == '{side}'") for frame in (narrow, wide))
        assert len(set(one["token_id"]) & set(other["token_id"])) >= 8


def test_questions_of_pairs_are_the_prompts_and_else_the_bundled_ones(tiny_chat):
    v = random_vectors(tiny_chat)[1]
    pairs = ContrastSet.from_pairs([("How was it?", "Good.", "Bad."), ("And you?", "Fine.", "Tired.")])
    of_pairs = logit_lens(tiny_chat, v, reading="causal", pairs=pairs, **PLAIN)
    said = logit_lens(tiny_chat, v, reading="causal", prompts=["How was it?", "And you?"], **PLAIN)
    assert_close(
        torch.tensor(of_pairs.frame["score"].to_numpy()),
        torch.tensor(said.frame["score"].to_numpy()),
        atol=1e-5,
        rtol=0,
    )
    assert of_pairs.settings["pairs_hash"] == pairs.content_hash
    bundled = logit_lens(tiny_chat, v, reading="causal", **PLAIN)
    told = logit_lens(tiny_chat, v, reading="causal", prompts=cl.contrast.load_open_ended("sentiment")[:8], **PLAIN)
    assert bundled.frame.equals(told.frame)


# ---- beside another implementation ----------------------------------------------------------------------------------


def test_the_fitted_jacobian_lens_carries_a_vector_where_ours_does(tmp_path):
    jacobian = pytest.importorskip("transformer_lens.tools.analysis.jacobian_lens")
    from helpers.models import random_llama
    from transformer_lens.model_bridge import TransformerBridge

    from caa_lens.engine.stream_responses import ReadPrompt
    from caa_lens.interpretation.lens_downstream import carried_down
    from caa_lens.models.loading.demo_model import demo_model_path

    skip, texts = 4, {"a": list(range(3, 15)), "b": [7, 50, 3, 9, 22, 41, 5, 2, 60]}
    hf = random_llama(tmp_path)
    folder = str(demo_model_path())  # for its tokenizer, which is not used
    bridge = TransformerBridge.boot_transformers(folder, hf_model=hf, device="cpu")
    bridge.to_tokens = lambda text, **options: torch.tensor([texts[text]])
    lens = jacobian.JacobianLens.fit(
        bridge, list(texts), corpus="test", skip_first_positions=skip, show_progress=False, dim_batch=4
    )
    # A prompt's sources are its positions from `skip` on, and its targets the same: all but the last one.
    prompts = [
        ReadPrompt(prompt=Prompt.from_tokens(tokens, start=skip), first=skip, stop=len(tokens) - 1)
        for tokens in texts.values()
    ]
    vectors = random_vectors(bridge)
    layers = (0, 1)
    states = torch.stack([vectors[layer].direction for layer in layers])[:, None]
    ours = carried_down(bridge, states, layers, prompts, progress=False)
    for i, layer in enumerate(layers):
        theirs = lens.jacobians[layer] @ states[i, 0]
        assert float(torch.cosine_similarity(ours[i, 0], theirs, dim=0)) > 0.99
        assert_close(ours[i, 0], theirs, atol=1e-3 * float(theirs.norm()), rtol=0)


# ---- the lens of a run ----------------------------------------------------------------------------------------------


def test_the_causal_lens_of_a_run_is_the_model_itself_at_the_last_layer():
    model = tiny_model()
    plain, causal = (
        cl.residual_lens(model, PROMPTS[0], vectors=[random_vectors(model)[1]], reading=reading, **options)
        for reading, options in (
            ("logit", {}),
            ("causal", {"reference": PROMPTS[1:], "place": "instruction", "progress": False}),
        )
    )
    last = plain.frame["layer"] == 4
    assert_close(
        torch.tensor(causal.frame.loc[last, "probability"].to_numpy()),
        torch.tensor(plain.frame.loc[last, "probability"].to_numpy()),
        atol=1e-5,
        rtol=1e-4,
    )
    assert not causal.frame.loc[~last, "probability"].equals(plain.frame.loc[~last, "probability"])
    assert causal.settings["reading"] == "causal"


def test_the_causal_lens_of_a_run_unembeds_the_mean_derivative_along_each_state():
    model = tiny_model()
    found = cl.residual_lens(
        model,
        PROMPTS[0],
        layers=[1],
        positions=[5],
        reading="causal",
        reference=PROMPTS[1:],
        place="instruction",
        progress=False,
    ).frame.iloc[0]
    _, cache = model.run_with_cache(torch.tensor([PROMPTS[0].tokens]))
    state = cache["resid_post", 1][0, 5].detach()
    carried = []
    for one in PROMPTS[1:]:
        runs = []
        for sign in (1, -1):
            with model.hooks([adding(SteeringVector.from_direction(state, layer=1), one.steer_start, sign * 5e-3)]):
                _, other = model.run_with_cache(torch.tensor([one.tokens]))
            runs.append(other["resid_post", 4][0, -1].detach())
        carried.append((runs[0] - runs[1]) / 1e-2)
    logits = model.unembed(model.ln_final(torch.stack(carried).mean(0)[None, None]))[0, 0].detach()
    assert found["top_token_id"] == int(logits.argmax())
    assert found["probability"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-2)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"reading": "causal", "prompts": []}, "no prompts given"),
        ({"reading": "causal", "prompts": [Prompt.from_tokens([3] * 200)]}, "model's context is 128"),
        ({"reading": "causal", "prompts": [Prompt.from_tokens([3] * 127)], "place": "answer"}, "and 3 to generate"),
        ({"reading": "causal", "prompts": PROMPTS, "place": "middle"}, "unknown place 'middle'"),
        ({"reading": "causal", "prompts": PROMPTS, "background": 3}, "leave background out"),
        ({"reading": "causal", "prompts": PROMPTS, "multiplier": 0}, "multiplier must be a finite number other than 0"),
        ({"reading": "normed", "prompts": PROMPTS}, "use reading='causal'"),
        ({"reading": "normed", "controls": 3}, "leave controls out"),
        ({"reading": "casual"}, "unknown reading 'casual'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(options, why):
    model = tiny_model()
    with pytest.raises(ValueError, match=why):
        logit_lens(model, random_vectors(model), **options)


def test_a_zero_vector_is_refused():
    model = tiny_model()
    zero = 0 * random_vectors(model)
    with pytest.raises(ValueError, match="zero vectors promote no token"):
        logit_lens(model, zero, reading="causal", prompts=PROMPTS)


def test_where_there_is_no_derivative_effect_is_named_and_works():
    class Rounds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x / 0.2).round() * 0.2

    model = tiny_model()
    model.blocks[1].hook_resid_post.add_hook(lambda resid, hook: Rounds.apply(resid))
    with pytest.raises(NoDerivativeError, match="reading='effect'"):
        logit_lens(model, random_vectors(model), reading="causal", prompts=PROMPTS, **PLAIN)
    with pytest.warns(UserWarning, match="because the model has hooks of your own"):
        found = logit_lens(model, random_vectors(model), reading="effect", prompts=PROMPTS, **PLAIN)
    assert found.by_layer()["linearity"].isna().all()


def test_word_ranks_count_the_tokens_above_in_the_same_scores(tiny_chat):
    v = random_vectors(tiny_chat)[2]
    options = {"reading": "causal", "prompts": ["How was it?", "And you?"], "progress": False}
    ranks = word_ranks(tiny_chat, v, ["good", "bad", "the"], controls=2, **options)
    lens = logit_lens(tiny_chat, v, k=10**6, controls=0, **options)
    scores = all_scores(lens, 2)
    for row in ranks.frame.itertuples():
        assert row.rank == 1 + int((scores > scores[row.token_id]).sum())
