"""What gave wrong numbers in silence once, or would: each a test of its own."""

import inspect
import warnings
from functools import partial

import pytest
import torch
from helpers.families import WINDOWED, bridge_of, demo_tokenizer, hf_of, wrong_here
from helpers.family_checks import (
    AB,
    LONG,
    N_NEW,
    SCORES,
    TEXTS,
    Case,
    assert_near,
    case_of,
    is_ours,
    own_loop,
)
from helpers.family_checks import (
    rows_of as whole_rows,
)
from helpers.family_twins import Step, Twin
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens

pytestmark = [
    pytest.mark.bridge,
    pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning"),
]


KNOWN_WINDOWED = [name for name in WINDOWED if name not in wrong_here()]


def rows_of(model, prompts, vectors=(), *, n_new=N_NEW, use_cache=True):
    steps = generate_tokens(model, prompts, vectors=vectors, max_new_tokens=n_new, use_cache=use_cache)
    return whole_rows(steps, n_new)


# ---- a cache that nobody fills ---------------------------------------------------------------------------------------


@pytest.fixture
def renamed(monkeypatch):
    """Llama's layers hand their cache on under the name of transformers 5.24, which TransformerLens does not read."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters:
        return  # they do

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        given = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=given, cache=past_key_values, **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)


def test_the_renamed_keyword_leaves_transformer_lens_own_loop_without_its_cache(renamed):
    """What the trap is: the same loop says something else than the model, and nothing is told."""
    case = case_of("llama3")
    text = case.twin.text(LONG)
    assert own_loop(case.model, text.tokens) != case.twin.greedy(text.tokens, [], N_NEW)


def test_text_and_scores_are_the_twins_where_the_cache_stays_empty_or_it_is_told(renamed):
    case = case_of("llama3")
    text = case.twin.text(LONG)
    expected = case.twin.greedy(text.tokens, [case.step(1, start=text.start)], N_NEW)
    right_or_told(lambda: rows_of(case.model, [Prompt.of(case.model, LONG)], [case.vectors[1]]), [expected])
    for pairs in (AB, TEXTS):
        conditions = [(cl.Intervention(vector=case.vectors[1]),)]
        found = right_or_told(partial(cl.measures.score_answers, case.model, pairs, conditions, progress=False))
        if found is not None:
            sides = torch.stack([case.twin.sides(pair, [case.step(1)]) for pair in pairs])
            assert_near(torch.cat([found.positive, found.negative], dim=1), sides, least=SCORES)
    vectors = right_or_told(lambda: cl.extract(case.model, TEXTS, progress=False))
    if vectors is not None:
        assert_near(vectors.directions, case.twin.vectors(TEXTS))


def test_a_steered_block_around_a_loop_with_an_empty_cache_is_right_or_tells(renamed):
    case = case_of("llama3")
    text = case.twin.text(LONG)
    expected = case.twin.greedy(text.tokens, [case.step(1, start=text.start)], N_NEW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def steered():
            with cl.steer(case.model, case.vectors[1], prompt=LONG):
                return own_loop(case.model, text.tokens)

        found = right_or_told(steered)
    told = [one for one in caught if one.category.__module__.startswith("caa_lens")]
    assert found is None or found == expected or told


def right_or_told(run, expected=None):
    """What `run` gives, or None where the package says that it cannot."""
    try:
        found = run()
    except (RuntimeError, ValueError) as error:
        check_refusal(error, "cache")
        return None
    assert expected is None or found == expected
    return found


def check_refusal(error, *words):
    assert is_ours(error)
    for word in words:
        assert word in str(error)


# ---- a dtype that the configuration does not know --------------------------------------------------------------------


def test_weights_of_another_type_than_the_configuration_says_are_refused_with_a_remedy_or_read_as_they_are():
    hf = hf_of("llama3", dtype=torch.bfloat16)
    model, twin = bridge_of("llama3", hf=hf), Twin(hf_of("llama3", dtype=torch.bfloat16), demo_tokenizer())
    assert model.W_E.dtype == torch.bfloat16
    try:
        found = cl.extract(model, TEXTS, progress=False)
    except ValueError as error:
        check_refusal(error, "bfloat16", "dtype")
        return
    assert found.provenance.details["model_dtype"] == "bfloat16"
    assert_near(found.directions, twin.vectors(TEXTS), relative=5e-2)


def test_a_bridge_in_half_precision_gives_its_own_numbers_but_for_rounding():
    hf = hf_of("llama3", dtype=torch.bfloat16)
    model = bridge_of("llama3", hf=hf, dtype=torch.bfloat16)
    case = Case(name="llama3", model=model, twin=Twin(hf_of("llama3", dtype=torch.bfloat16), demo_tokenizer()))
    found = cl.extract(model, TEXTS, progress=False)
    assert_near(found.directions, case.twin.vectors(TEXTS), relative=5e-2)
    scores = cl.measures.score_answers(model, AB, [(), (cl.Intervention(vector=case.vectors[1]),)], progress=False)
    for row, pair in zip(scores.values, AB, strict=True):
        expected = [case.twin.sides(pair, acts)[0].exp() for acts in ([], [case.step(1)])]
        assert_close(row, torch.stack(expected).float(), atol=0.03, rtol=0)
    assert len(cl.generate(model, LONG, [case.vectors[1]], max_new_tokens=4)) > 0
    lens = cl.residual_lens(model, LONG).frame
    assert lens["probability"].between(0, 1).all()


# ---- hooks of the caller's own ---------------------------------------------------------------------------------------


class Own:
    """A user's hook in the twin's words: at a layer, to whatever runs."""

    def __init__(self, layer, change):
        self.layer, self.change = layer, change

    def apply(self, stream):
        return self.change(stream)

    def _replace(self, **said):
        return self


def grow(stream):
    return 1.5 * stream


def third_position(stream):
    stream = stream.clone()
    if stream.shape[1] > 3:
        stream[:, 3] = -1.5 * stream[:, 3].flip(-1)
    return stream


def last_position(stream):
    stream = stream.clone()
    stream[:, -1] = -1.5 * stream[:, -1].flip(-1)
    return stream


def by_transformer_lens(model, change):
    model.add_hook("blocks.1.hook_resid_post", lambda stream, hook: change(stream))


def by_hook_out(model, change):
    model.add_hook("blocks.1.hook_out", lambda stream, hook: change(stream))


def by_torch(model, change):
    def hook(module, given, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    model.blocks[1].register_forward_hook(hook)


def by_torch_behind(model, change):
    model.blocks[1].hook_out.register_forward_hook(lambda module, given, out: change(out))


@pytest.mark.parametrize("add", [by_transformer_lens, by_hook_out, by_torch, by_torch_behind])
@pytest.mark.parametrize("change", [grow, third_position, last_position])
@pytest.mark.parametrize("family", ["llama3", "gpt2"])
def test_a_hook_of_the_users_is_felt_by_everything(family, change, add):
    case = case_of(family)
    own = Own(1, change)
    add(case.model, change)
    text, prompt = case.twin.text(LONG), Prompt.of(case.model, LONG)
    with torch.no_grad():
        assert_near(case.model(torch.tensor([text.tokens]))[0], case.twin.run(text.tokens, [own]).logits)
    before = [case.twin.run(text.tokens, acts).logits[-1] for acts in ([], [own])]
    assert (before[0] - before[1]).abs().max() > 0.1

    found = cl.extract(case.model, TEXTS, progress=False).directions
    expected = []
    for pair in TEXTS:
        sides = []
        for answer in (pair.positive, pair.negative):
            read = case.twin.text(pair.question, answer)
            sides.append(case.twin.run(read.tokens, [own]).streams[:, slice(*read.read)].mean(1))
        expected.append(sides[0] - sides[1])
    # What is read is the hook point's output, which a hook of torch's on the block itself comes behind.
    layers = [0, 2, 3] if add is by_torch else [0, 1, 2, 3]
    assert_near(found[layers], torch.stack(expected).mean(0)[layers])

    for pairs in (AB, TEXTS):
        conditions = [(), (cl.Intervention(vector=case.vectors[2]),)]
        found = cl.measures.score_answers(case.model, pairs, conditions, progress=False)
        for row, pair in enumerate(pairs):
            for column, acts in enumerate(([own], [own, case.step(2)])):
                sides = torch.stack([found.positive[row, column], found.negative[row, column]])
                assert_near(sides, case.twin.sides(pair, acts), least=SCORES)

    steps = [own, case.step(2, start=text.start)]
    expected = case.twin.greedy(text.tokens, steps, N_NEW)
    for use_cache in (True, False):
        assert rows_of(case.model, [prompt], [case.vectors[2]], use_cache=use_cache) == [expected]
    lens = cl.residual_lens(case.model, prompt, vectors=[case.vectors[2]], positions=[len(prompt) - 1]).frame
    last = lens[(lens["layer"] == case.twin.n_layers - 1) & lens["steered"]].iloc[0]
    assert last["top_token_id"] == expected[0]


def test_a_hook_inside_a_block_is_felt():
    case = case_of("llama3")
    case.model.add_hook("blocks.1.mlp.hook_out", lambda out, hook: 1.5 * out)
    case.twin.blocks[1].mlp.register_forward_hook(lambda module, given, out: 1.5 * out)
    found = cl.extract(case.model, TEXTS, progress=False).directions
    assert_near(found, case.twin.vectors(TEXTS))
    scores = cl.measures.score_answers(case.model, TEXTS, [(cl.Intervention(vector=case.vectors[0]),)], progress=False)
    expected = torch.stack([case.twin.sides(pair, [case.step(0)]) for pair in TEXTS])
    assert_near(torch.cat([scores.positive, scores.negative], dim=1), expected, least=SCORES)
    text = case.twin.text(LONG)
    expected = case.twin.greedy(text.tokens, [case.step(0, start=text.start)], N_NEW)
    assert rows_of(case.model, [Prompt.of(case.model, LONG)], [case.vectors[0]]) == [expected]


def test_a_users_hook_at_the_blocks_output_and_a_vector_there_both_act_in_the_order_in_which_they_came():
    case = case_of("mistral window")
    case.model.add_hook("blocks.1.hook_resid_post", lambda stream, hook: 1.5 * stream)
    text = case.twin.text(LONG)
    steps = [Own(1, grow), case.step(1, start=text.start)]
    assert rows_of(case.model, [Prompt.of(case.model, LONG)], [case.vectors[1]]) == [
        case.twin.greedy(text.tokens, steps, N_NEW)
    ]


# ---- norms that are stored less one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "nemotron", "qwen3 next"])
def test_a_norm_that_is_stored_less_one_is_read_as_the_model_reads_it(family):
    case = case_of(family)
    found = cl.logit_lens(case.model, case.vectors, reading="normed", k=20).frame
    scores = case.twin.uncapped(case.vectors.directions)
    scores = scores - scores.mean(-1, keepdim=True)
    v = case.vectors.directions
    v = v - v.mean(-1, keepdim=True) if case.twin.centres else v
    stored = next(p for name, p in reversed(list(case.twin.hf.named_parameters())) if "norm" in name and p.ndim == 1)
    if family == "nemotron":
        stored = case.twin.hf.model.norm.weight
    as_stored = (v / v.pow(2).mean(-1, keepdim=True).sqrt() * stored) @ case.twin.hf.get_output_embeddings().weight.T
    as_stored = as_stored - as_stored.mean(-1, keepdim=True)
    for layer in range(case.twin.n_layers):
        rows = found[found["layer"] == layer]
        ids = torch.tensor(list(rows["token_id"]))
        assert_near(rows["score"].to_numpy(), scores[layer, ids], relative=3e-5)
        assert (as_stored[layer, ids] - scores[layer, ids]).abs().max() > 0.5


# ---- positions behind a window, and padding --------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", [*KNOWN_WINDOWED, "llama3"])
def test_spans_that_begin_and_end_among_the_new_tokens_are_kept_on_layers_that_forget(family, use_cache):
    case = case_of(family)
    text = case.twin.text(LONG)
    n = len(text.tokens)
    assert n > 2 * 16
    for layer in range(case.twin.n_layers):
        v = case.vectors[layer]
        one = cl.Intervention(vector=v, multiplier=3.0, positions=(n + 1, n + 3))
        expected = case.twin.greedy(text.tokens, [Step(layer, v.direction, n + 1, 3.0, "add", n + 3)], N_NEW)
        assert expected != case.twin.greedy(text.tokens, [], N_NEW)
        assert rows_of(case.model, [Prompt.of(case.model, LONG)], [one], use_cache=use_cache) == [expected]


@pytest.mark.parametrize("family", [*KNOWN_WINDOWED, "llama3"])
def test_a_span_among_the_new_tokens_is_kept_in_the_models_own_loop(family):
    case = case_of(family)
    text = case.twin.text(LONG)
    n = len(text.tokens)
    v = case.vectors[0]
    expected = case.twin.greedy(text.tokens, [Step(0, v.direction, n + 1, 3.0, "add", n + 3)], N_NEW)
    with cl.steer(case.model, v, multiplier=3.0, positions=(n + 1, n + 3)):
        assert own_loop(case.model, text.tokens) == expected


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "family",
    ["gpt2", "opt", "bloom", "falcon alibi", "mpt", "gpt neo", "mistral window", "gemma3", "gpt oss", "mamba", "lfm2"],
)
def test_padding_that_is_longer_than_a_window_is_seen_by_nobody(family, use_cache):
    case = case_of(family)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(10, 40000, (length,), generator=generator).tolist() for length in (3, 25, 40)]
    prompts = [Prompt.from_tokens(tokens) for tokens in texts]
    starts = [prompt.steer_start for prompt in prompts]
    expected = [
        case.twin.greedy(tokens, [case.step(2, start=start)], 4) for tokens, start in zip(texts, starts, strict=True)
    ]
    assert rows_of(case.model, prompts, [case.vectors[2]], n_new=4, use_cache=use_cache) == expected


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "bloom", "falcon alibi", "mpt", "gpt neo", "gemma3", "mamba", "lfm2"]
)
def test_what_is_read_in_a_padded_batch_is_what_is_read_alone(family):
    case = case_of(family)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(10, 40000, (length,), generator=generator).tolist() for length in (3, 40)]
    found = torch.cat(list(cl.engine.read_residuals(case.model, [Prompt.from_tokens(tokens) for tokens in texts])))
    for row, tokens in zip(found, texts, strict=True):
        assert_near(row, case.twin.run(tokens).streams[:, -1])


@pytest.mark.parametrize("family", ["mamba", "lfm2", "qwen3 next", "falcon h1", "recurrent gemma"])
def test_a_state_beside_keys_and_values_is_never_shared_in_silence(family):
    """Scores of several conditions at once must not leave one condition's state to the next."""
    case = case_of(family)
    conditions = [(cl.Intervention(vector=case.vectors[layer], multiplier=3.0),) for layer in (3, 0)]
    conditions = [(), *conditions, ()]
    try:
        found = cl.measures.score_answers(case.model, TEXTS, conditions, progress=False)
    except (TypeError, ValueError) as error:
        check_refusal(error)
        return
    for row, pair in enumerate(TEXTS):
        for column, acts in enumerate(([], [case.step(3, 3.0)], [case.step(0, 3.0)], [])):
            sides = torch.stack([found.positive[row, column], found.negative[row, column]])
            assert_near(sides, case.twin.sides(pair, acts), least=SCORES)
