"""Steered text: every fast path says what the slow, obvious loop says, and what Hugging Face's own generation says."""

import copy
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from helpers.models import demo_hugging_face, random_vectors
from helpers.steering import plain_hook

from caa_lens.engine import shared_prefix
from caa_lens.prompts.prompt_formats import Prompt, chat_template_format
from caa_lens.steering import generation
from caa_lens.steering.generation import generate, generate_stream, generate_tokens
from caa_lens.steering.interventions import Intervention
from caa_lens.vectors.steering_vectors import SteeringVector

# Generation through the model's own forward says that it is the slower path; one test holds what it says.
pytestmark = pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")

QUESTIONS = ["How was your day?", "Is it right to lie to a friend who asks for the truth?", "Why?"]
N_NEW = 5


@pytest.fixture(scope="module")
def small(tiny_model):
    """One random Llama for all laws about token ids; tests leave it as it was."""
    return tiny_model()


@pytest.fixture(scope="module")
def prompts(demo_tokenizer):
    chat = chat_template_format(demo_tokenizer)
    return [chat.encode(demo_tokenizer, question) for question in QUESTIONS]


@pytest.fixture(autouse=True)
def no_hooks_left(small):
    yield
    assert not any(point.fwd_hooks for point in small.hook_points())


def prompt_of(n_tokens, start, *, seed=0):
    tokens = torch.randint(0, 64, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Prompt(
        text="", tokens=tuple(tokens), steer_start=start, answer_start=n_tokens, read=(n_tokens - 1, n_tokens)
    )


def three_prompts():
    return [prompt_of(9, 6), prompt_of(4, 3, seed=1), prompt_of(14, 2, seed=2)]


class Made(NamedTuple):
    """What generation made: token ids, and the logits each was chosen from, `[row step d_vocab]`."""

    tokens: list[list[int]]
    logits: torch.Tensor


def assert_same(actual, expected):
    assert actual.tokens == expected.tokens
    torch.testing.assert_close(actual.logits, expected.logits, atol=5e-5, rtol=1e-5)


def tokens_of(model, prompts, **settings):
    """Generated token ids, a list for each prompt."""
    return torch.stack(list(generate_tokens(model, prompts, **settings)), dim=1).tolist()


def made_by(path, model, prompts, *, max_new_tokens=N_NEW, **settings):
    """Generation on one of its three paths."""
    hooks = [("blocks.1.attn.hook_z", nothing)] if path == "foreign hook" else []
    seen = []

    def spy(logits, *rest):
        seen.append(logits)
        return choose(logits, *rest)

    choose = generation._choose
    with model.hooks(fwd_hooks=hooks), pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_choose", spy)
        assert (shared_prefix.unsupported(model) is None) == (path != "foreign hook")
        settings |= {"max_new_tokens": max_new_tokens, "use_cache": path != "uncached"}
        return Made(tokens_of(model, prompts, **settings), torch.stack(seen, dim=1))


def slow_loop(model, prompt, hooks=(), n_new=N_NEW):
    """Greedy generation by hand: every token from a forward over the whole text, no cache and no batch."""
    tokens, steps = list(prompt.tokens), []
    for _ in range(n_new):
        with torch.no_grad():
            steps.append(model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=list(hooks))[:, -1])
        tokens.append(int(steps[-1].argmax()))
    return Made([tokens[len(prompt) :]], torch.stack(steps, dim=1))


def together(made):
    """Single rows as one batch."""
    return Made([row for one in made for row in one.tokens], torch.cat([one.logits for one in made]))


def nothing(activation, hook):
    """A caller's hook that changes nothing, but sends generation through the model's own forward."""


PATHS = ["in place", "foreign hook", "uncached"]


# ---- the same tokens and logits as the slow loop ----------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
@pytest.mark.parametrize("layer", [0, 4])
def test_every_path_equals_the_slow_loop(small, path, operator, layer):
    prompt, v = prompt_of(9, 6), random_vectors(small)[layer]
    chosen = Intervention(vector=v, multiplier=1.5, operator=operator)
    expected = slow_loop(small, prompt, [plain_hook(layer, v.direction, 6, 1.5, operator)])
    assert_same(made_by(path, small, [prompt], vectors=[chosen]), expected)
    assert (expected.logits[:, 0] - slow_loop(small, prompt, n_new=1).logits[:, 0]).abs().max() > 0.01


@pytest.mark.parametrize("path", PATHS)
def test_several_vectors_act_together(small, path):
    prompt, vectors = prompt_of(9, 6), random_vectors(small)
    w = random_vectors(small, seed=1)[4]
    given = [(vectors[4], -1.0), vectors[0], Intervention(vector=vectors[2], operator="ablate"), (w, 2.0)]
    by_hand = [
        plain_hook(0, vectors[0].direction, 6, 1.0),
        plain_hook(2, vectors[2].direction, 6, 1.0, "ablate"),
        plain_hook(4, 2 * w.direction - vectors[4].direction, 6, 1.0),
    ]
    assert_same(made_by(path, small, [prompt], vectors=given), slow_loop(small, prompt, by_hand))


@pytest.mark.parametrize("path", PATHS)
def test_operators_at_one_layer_act_in_the_given_order(small, path):
    prompt, v = prompt_of(9, 6), random_vectors(small)[2]
    add, remove = Intervention(vector=v), Intervention(vector=v, operator="ablate")
    for given, component in (([add, remove], 0.0), ([remove, add], 1.0)):
        expected = slow_loop(small, prompt, [plain_hook(2, v.direction, 6, component, "set")])
        assert_same(made_by(path, small, [prompt], vectors=given), expected)


@pytest.mark.parametrize("path", PATHS)
def test_a_padded_batch_gives_every_prompt_its_own(small, path):
    prompts, v = three_prompts(), random_vectors(small)[1]
    expected = [slow_loop(small, p, [plain_hook(1, v.direction, p.steer_start, 1.0)]) for p in prompts]
    assert_same(made_by(path, small, prompts, vectors=[v]), together(expected))
    assert_same(made_by(path, small, prompts), together([slow_loop(small, p) for p in prompts]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_one_multiplier_a_row_equals_single_runs(small, path, operator):
    prompts, multipliers, v = three_prompts(), [-2.0, 0.5, 3.0], random_vectors(small)[2]
    chosen = Intervention(vector=v, multiplier=torch.tensor(multipliers), operator=operator)
    expected = [
        slow_loop(small, p, [plain_hook(2, v.direction, p.steer_start, m, operator)])
        for p, m in zip(prompts, multipliers, strict=True)
    ]
    assert_same(made_by(path, small, prompts, vectors=[chosen]), together(expected))


@pytest.mark.parametrize("path", PATHS)
def test_the_first_generated_token_is_steered_and_so_is_every_later_one(small, path):
    # At the last layer a vector along one token's unembedding decides the next token and changes nothing else, so
    # one forward that is not steered would show at once.
    v = towards(small, 17)
    for prompt in (prompt_of(9, 8), prompt_of(9, 0), prompt_of(1, 0)):
        assert 17 not in slow_loop(small, prompt, n_new=6).tokens[0]
        assert made_by(path, small, [prompt], vectors=[v], max_new_tokens=6).tokens == [[17] * 6]


def towards(model, token):
    """A vector at the last layer that makes the model say one token."""
    return SteeringVector.from_direction(100 * model.W_U[:, token] / model.ln_final.w, 4)


@pytest.mark.parametrize("path", PATHS)
def test_an_interventions_own_start_is_kept(small, path):
    prompt, v = prompt_of(9, 6), random_vectors(small)[1]
    late = Intervention(vector=v, start=11)  # two tokens after the prompt
    expected = slow_loop(small, prompt, [plain_hook(1, v.direction, 11, 1.0)])
    assert_same(made_by(path, small, [prompt], vectors=[late]), expected)


@pytest.mark.parametrize("n_key_value_heads", [None, 1])
def test_other_head_counts_equal_the_slow_loop_too(n_key_value_heads, tiny_model):
    model = tiny_model(n_key_value_heads=n_key_value_heads, seed=1)
    prompts, v = three_prompts(), random_vectors(model)[3]
    expected = [slow_loop(model, p, [plain_hook(3, v.direction, p.steer_start, 1.0)]) for p in prompts]
    assert_same(made_by("in place", model, prompts, vectors=[v]), together(expected))


@pytest.mark.parametrize("path", PATHS)
def test_multiplier_zero_gives_the_unsteered_logits_bit_for_bit(small, path):
    plain = made_by(path, small, three_prompts())
    zero = made_by(path, small, three_prompts(), vectors=[(v, 0.0) for v in random_vectors(small)])
    assert torch.equal(zero.logits, plain.logits)
    assert zero.tokens == plain.tokens


def test_a_foreign_hook_is_felt_at_every_token(small):
    prompt, v = prompt_of(9, 6), random_vectors(small)[3]
    theirs = ("blocks.1.hook_mlp_out", lambda mlp_out, hook: -mlp_out)
    with small.hooks(fwd_hooks=[theirs]):
        felt = made_by("foreign hook", small, [prompt], vectors=[v])
    assert_same(felt, slow_loop(small, prompt, [theirs, plain_hook(3, v.direction, 6, 1.0)]))


def test_interleaved_generations_do_not_disturb_each_other(small):
    v, prompts = random_vectors(small)[1], three_prompts()[:2]
    runs = [generate_tokens(small, [p], vectors=[v], max_new_tokens=N_NEW) for p in prompts]
    steps = [(int(first), int(second)) for first, second in zip(*runs, strict=True)]
    for row, prompt in zip(zip(*steps, strict=True), prompts, strict=True):
        assert [list(row)] == slow_loop(small, prompt, [plain_hook(1, v.direction, prompt.steer_start, 1.0)]).tokens


# ---- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 4])
@pytest.mark.parametrize("use_cache", [True, False])
def test_text_is_the_slow_loops_tokens_in_words(tiny_chat, prompts, layer, use_cache):
    v = random_vectors(tiny_chat, scale=2.0)[layer]
    texts = generate(tiny_chat, QUESTIONS, vectors=[(v, -1.5)], max_new_tokens=5, use_cache=use_cache)
    for text, prompt in zip(texts, prompts, strict=True):
        expected = slow_loop(tiny_chat, prompt, [plain_hook(layer, v.direction, len(prompt) - 1, -1.5)], n_new=5)
        assert text == tiny_chat.tokenizer.decode(expected.tokens[0])
    assert generate(tiny_chat, prompts, vectors=[(v, -1.5)], max_new_tokens=5) == texts


def test_one_prompt_with_several_multipliers_gives_a_text_for_each(tiny_chat):
    v = random_vectors(tiny_chat, scale=2.0)[2]
    multipliers = [-1.0, 0.0, 1.0]
    texts = generate(tiny_chat, QUESTIONS[0], vectors=[(v, torch.tensor(multipliers))], max_new_tokens=5)
    one_by_one = [generate(tiny_chat, QUESTIONS[0], vectors=[(v, m)], max_new_tokens=5) for m in multipliers]
    assert texts == one_by_one
    assert texts[1] == generate(tiny_chat, QUESTIONS[0], max_new_tokens=5)
    assert len(set(texts)) == 3


def test_a_list_of_one_gives_a_list_of_one(tiny_chat):
    v = random_vectors(tiny_chat, scale=2.0)[2]
    text = generate(tiny_chat, QUESTIONS[0], vectors=[v], max_new_tokens=5)
    assert generate(tiny_chat, QUESTIONS[:1], vectors=[v], max_new_tokens=5) == [text]
    assert generate(tiny_chat, QUESTIONS[0], vectors=[(v, torch.ones(1))], max_new_tokens=5) == [text]


def test_the_system_prompt_and_format_reach_the_model(tiny_chat, demo_tokenizer):
    chat = chat_template_format(demo_tokenizer)
    prompt = chat.encode(demo_tokenizer, QUESTIONS[0], system="Answer in one word.")
    expected = generate(tiny_chat, prompt, max_new_tokens=5)
    assert generate(tiny_chat, QUESTIONS[0], system="Answer in one word.", max_new_tokens=5) == expected
    by_name = {"system": "Answer in one word.", "prompt_format": "chat-template"}
    assert "".join(generate_stream(tiny_chat, QUESTIONS[0], max_new_tokens=5, **by_name)) == expected
    assert generate(tiny_chat, QUESTIONS[0], max_new_tokens=5) != expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_join_to_the_whole_text(tiny_chat, temperature):
    v = random_vectors(tiny_chat, scale=2.0)[2]
    settings = {"vectors": [v], "max_new_tokens": 16, "temperature": temperature}
    pieces = list(generate_stream(tiny_chat, QUESTIONS[0], **settings))
    assert "".join(pieces) == generate(tiny_chat, QUESTIONS[0], **settings)
    assert len(pieces) > 5


class ByteTokenizer:
    """Tokens are the bytes of UTF-8, so that characters take several tokens."""

    eos_token_id = None
    padding_side = "right"

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_streaming_waits_for_whole_characters_and_loses_none(monkeypatch, tiny_model):
    model = tiny_model(tokenizer=ByteTokenizer())
    bytes_of_text = "aé日b😀".encode()[:-1]  # the last character never becomes whole
    monkeypatch.setattr(generation, "generate_tokens", lambda *_, **__: (torch.tensor([b]) for b in bytes_of_text))
    pieces = list(generate_stream(model, prompt_of(3, 2)))
    assert pieces == ["a", "é", "日", "b", "\N{REPLACEMENT CHARACTER}"]
    assert "".join(pieces) == ByteTokenizer().decode(bytes_of_text)


# ---- sampling ---------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_text_and_leaves_the_global_generator_alone(tiny_chat):
    state = torch.get_rng_state()
    texts = [generate(tiny_chat, QUESTIONS[0], max_new_tokens=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert generate(tiny_chat, QUESTIONS[0], max_new_tokens=8, temperature=1.0, seed=0) == texts[0]


def test_samples_are_the_same_on_every_path(small):
    v = random_vectors(small)[2]
    made = [made_by(path, small, three_prompts(), vectors=[v], temperature=1.0, seed=3) for path in PATHS]
    assert_same(made[1], made[0])
    assert_same(made[2], made[0])
    assert made[0].tokens != made_by("in place", small, three_prompts(), vectors=[v]).tokens


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_are_drawn_from_the_steered_softmax(small, temperature):
    prompt, v, n = prompt_of(6, 3), random_vectors(small)[3], 4000
    with torch.no_grad():
        hooks = [plain_hook(3, v.direction, 3, 1.0)]
        logits = small.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=hooks)[0, -1]
    expected = (logits / temperature).softmax(-1)
    settings = {"vectors": [v], "max_new_tokens": 1, "temperature": temperature}
    drawn = torch.tensor(tokens_of(small, [prompt] * n, **settings)).flatten()
    frequency = torch.bincount(drawn, minlength=64) / n
    # Five standard errors of each frequency, and one draw for the rarest tokens.
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1 / n).all()
    assert (frequency - logits.softmax(-1)).abs().max() > 0.02 or temperature == 1.0


def test_a_very_low_temperature_is_greedy(small):
    cold = tokens_of(small, three_prompts(), max_new_tokens=N_NEW, temperature=1e-4)
    assert cold == tokens_of(small, three_prompts(), max_new_tokens=N_NEW)


def test_a_soft_cap_of_the_logits_is_felt_when_sampling(small, monkeypatch):
    prompt, n = prompt_of(6, 3), 4000
    monkeypatch.setattr(small.cfg, "output_logits_soft_cap", 0.5)
    with torch.no_grad():
        expected = small(torch.tensor([prompt.tokens]))[0, -1].softmax(-1)
    drawn = torch.tensor(tokens_of(small, [prompt] * n, max_new_tokens=1, temperature=1.0)).flatten()
    frequency = torch.bincount(drawn, minlength=64) / n
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1 / n).all()


# ---- the end of a text ------------------------------------------------------------------------------------------


LONG = 12


def with_eos(tiny_model, eos):
    return tiny_model(tokenizer=SimpleNamespace(eos_token_id=eos, padding_side="right"))


def cut_after(tokens, eos):
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("path", PATHS)
def test_finished_rows_stay_finished_and_the_others_go_on(small, path, tiny_model):
    prompts = three_prompts()
    endless = tokens_of(small, prompts, max_new_tokens=LONG)
    # An end that the rows reach at different times, and one of them perhaps never.
    ends = [[row.index(eos) if eos in row else LONG for row in endless] for eos in range(64)]
    eos = next(eos for eos, when in enumerate(ends) if len(set(when)) > 1 and 0 < min(when) < 8 and max(when) == LONG)
    model = with_eos(tiny_model, eos)
    rows = made_by(path, model, prompts, max_new_tokens=LONG).tokens
    for row, free in zip(rows, endless, strict=True):
        kept = cut_after(free, eos)
        assert row == kept + [eos] * (LONG - len(kept))


@pytest.mark.parametrize("path", PATHS)
def test_generation_ends_as_soon_as_every_row_has(small, path, tiny_model):
    prompts = three_prompts()
    endless = tokens_of(small, prompts, max_new_tokens=LONG)
    for prompt, free in zip(prompts, endless, strict=True):
        eos = free[5]
        (row,) = made_by(path, with_eos(tiny_model, eos), [prompt], max_new_tokens=LONG).tokens
        assert row == cut_after(free, eos)
    assert made_by(path, with_eos(tiny_model, 17), prompts, vectors=[towards(small, 17)]).tokens == [[17]] * 3


def test_text_ends_before_the_end_token(tiny_chat, demo_tokenizer, tiny_model):
    prompt = chat_template_format(demo_tokenizer).encode(demo_tokenizer, QUESTIONS[0])
    (endless,) = slow_loop(tiny_chat, prompt, n_new=LONG).tokens
    eos = endless[5]
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.eos_token = demo_tokenizer.convert_ids_to_tokens(eos)
    assert tokenizer.eos_token_id == eos
    model = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=512, tokenizer=tokenizer)
    expected = demo_tokenizer.decode(endless[: endless.index(eos)])
    assert generate(model, prompt, max_new_tokens=LONG) == expected
    assert "".join(generate_stream(model, prompt, max_new_tokens=LONG)) == expected


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_a_text_that_does_not_fit_the_context_is_refused_before_the_model_runs(tiny_model):
    model = tiny_model(n_ctx=16)
    model.add_hook("hook_embed", lambda embed, hook: pytest.fail("the model ran"))
    message = "the prompt has 9 tokens and 8 to generate, but the model's context is 16: shorten it"
    with pytest.raises(ValueError, match=message):
        next(generate_tokens(model, [prompt_of(4, 3), prompt_of(9, 6)], max_new_tokens=8))
    model.reset_hooks()
    # Exactly full is not too long, and the last position is as right as any other.
    for path in PATHS:
        full = made_by(path, model, [prompt_of(9, 6)], max_new_tokens=7)
        assert_same(full, slow_loop(model, prompt_of(9, 6), n_new=7))


def test_settings_that_make_no_sense_are_refused(small):
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"max_new_tokens must be at least 1, got {n}"):
            tokens_of(small, three_prompts(), max_new_tokens=n)
    with pytest.raises(ValueError, match=r"temperature must be 0 \(greedy\) or more, got -0.5"):
        tokens_of(small, three_prompts(), temperature=-0.5)
    with pytest.raises(ValueError, match="no prompts given"):
        tokens_of(small, [])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_multiplier_for_another_number_of_prompts_is_refused(small, tiny_chat, n):
    message = f"multiplier has {n} entries for 3 prompts: give one number, or one a prompt"
    with pytest.raises(ValueError, match=message):
        tokens_of(small, three_prompts(), vectors=[(random_vectors(small)[2], torch.ones(n))])
    with pytest.raises(ValueError, match=message):
        generate(tiny_chat, QUESTIONS, vectors=[(random_vectors(tiny_chat)[2], torch.ones(n))])


def test_two_multipliers_of_different_length_are_refused(tiny_chat):
    vectors = random_vectors(tiny_chat)
    with pytest.raises(ValueError, match="multiplier has 2 entries for 3 prompts"):
        generate(tiny_chat, QUESTIONS[0], vectors=[(vectors[0], torch.ones(2)), (vectors[1], torch.ones(3))])


def test_vectors_that_do_not_fit_the_model_are_refused(small):
    v = random_vectors(small)[2]
    with pytest.raises(ValueError, match="layer 9 is out of range: tiny-random-llama has layers 0 to 4"):
        tokens_of(small, three_prompts(), vectors=[v.at_layer(9)])
    with pytest.raises(
        ValueError, match="vector has d_model=8, but 'tiny-random-llama' has d_model=32: extract it from"
    ):
        tokens_of(small, three_prompts(), vectors=[SteeringVector(direction=torch.ones(8), layer=2)])


def test_the_callers_vectors_prompts_and_weights_are_as_before(small):
    v, multiplier = random_vectors(small)[2], torch.tensor([1.0, 2.0, 3.0])
    kept = v.direction.clone(), multiplier.clone(), copy.deepcopy(small.state_dict())
    for path in PATHS:
        made_by(path, small, three_prompts(), vectors=[(v, multiplier)], max_new_tokens=3)
    assert torch.equal(v.direction, kept[0])
    assert torch.equal(multiplier, kept[1])
    assert all(torch.equal(weight, kept[2][name]) for name, weight in small.state_dict().items())


# ---- the real model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_model():
    """SmolLM2 as Hugging Face runs it: another implementation as an oracle."""
    return demo_hugging_face()


def hf_generate(hf_model, prompt, n_new, *, layer=None, change=None):
    """Hugging Face's own greedy tokens; `change` is added to a layer's output from the instruction's end on."""

    def steer_hook(module, inputs, output):
        resid = output[0] if isinstance(output, tuple) else output
        steered = resid.clone()
        first = prompt.steer_start if resid.shape[1] > 1 else 0  # later forwards bring one generated token each
        steered[:, first:] += change
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    tokens = torch.tensor([prompt.tokens])
    handle = hf_model.model.layers[layer].register_forward_hook(steer_hook) if layer is not None else None
    try:
        made = hf_model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
        )
    finally:
        if handle is not None:
            handle.remove()
    return made[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_hugging_faces_own_generation(demo_model, hf_model, prompts):
    prompt, n_new = prompts[0], 10
    plain = tokens_of(demo_model, [prompt], max_new_tokens=n_new)
    assert plain == [hf_generate(hf_model, prompt, n_new)]
    v = random_vectors(demo_model, layers=(3, 12, 20))[12].normalized(to=45.0)
    steered = tokens_of(demo_model, [prompt], vectors=[(v, -1.0)], max_new_tokens=n_new)
    assert steered == [hf_generate(hf_model, prompt, n_new, layer=12, change=-v.direction)]
    assert steered != plain


def test_the_demo_model_says_the_same_cached_uncached_and_with_a_foreign_hook(demo_model, prompts):
    prompt, n_new = prompts[2], 4
    v = random_vectors(demo_model, layers=(3, 12, 20))[12].normalized(to=60.0)
    expected = slow_loop(demo_model, prompt, [plain_hook(12, v.direction, prompt.steer_start, 1.0)], n_new)
    for path in PATHS:
        made = made_by(path, demo_model, [prompt], vectors=[v], max_new_tokens=n_new)
        assert made.tokens == expected.tokens
        torch.testing.assert_close(made.logits, expected.logits, atol=2e-3, rtol=1e-4)  # thirty layers of float32
