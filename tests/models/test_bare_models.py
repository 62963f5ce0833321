"""Models without a tokenizer or a final norm: what can run gives the model's own numbers, the rest says why first."""

import pytest
import torch
from helpers.models import random_vectors

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.measures.answers import score_answers
from caa_lens.measures.open_ended.text_measures import measure_texts
from caa_lens.models.checks import check_model
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate, generate_stream, generate_tokens
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.steered_block import steer
from caa_lens.vectors.extraction import extract

PAIRS = ContrastSet.from_pairs([("How are you?", "Well.", "Ill."), ("Is it late?", "Yes, it is.", "No.")])
PROMPT = Prompt.from_tokens([5, 9, 33, 2], start=2)


def slowly(model, steering=(), n=5):
    """Token ids, one whole forward each."""
    tokens = list(PROMPT.tokens)
    with torch.no_grad(), model.hooks(fwd_hooks=[one.hook() for one in steering]):
        for _ in range(n):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(PROMPT.tokens) :]


def test_token_ids_generate_without_a_tokenizer(tiny):
    step = Intervention(vector=random_vectors(tiny)[2], multiplier=20.0, start=2)
    for given, expected in (((), slowly(tiny)), ((step,), slowly(tiny, [step]))):
        steps = generate_tokens(tiny, [PROMPT], vectors=given, max_new_tokens=5)
        assert torch.stack(list(steps), dim=1)[0].tolist() == expected
    assert slowly(tiny) != slowly(tiny, [step])


def test_a_prompt_of_ids_has_the_positions_it_was_told():
    assert (PROMPT.tokens, PROMPT.steer_start, PROMPT.answer_start, PROMPT.read) == ((5, 9, 33, 2), 2, 4, (3, 4))
    assert (
        Prompt.from_tokens(torch.tensor([[5, 9]])) == Prompt.from_tokens([5, 9]) == Prompt.from_tokens([5, 9], start=1)
    )
    for tokens, message in [([], "from 0 on, got none"), ([-1], r"got \[-1\]"), ([1, 2], "start=2 is outside")]:
        with pytest.raises(ValueError, match=message):
            Prompt.from_tokens(tokens, start=2)


def test_what_needs_a_tokenizer_says_so_before_the_model_runs(tiny, monkeypatch):
    check_model(tiny)  # a bridge is compared once with the module inside
    monkeypatch.setattr(tiny, "forward", lambda *given, **options: pytest.fail("ran"))
    for call in (
        lambda: generate(tiny, PROMPT),
        lambda: list(generate_stream(tiny, PROMPT)),
        lambda: extract(tiny, PAIRS, progress=False),
        lambda: score_answers(tiny, PAIRS, [()], progress=False),
        lambda: measure_texts(tiny, [("How are you?", "Well.")]),
        lambda: Prompt.of(tiny, "How are you?"),
    ):
        with pytest.raises(TypeError, match="this model has no tokenizer"):
            call()


def test_what_shows_tokens_shows_their_ids(tiny, capsys):
    vectors = random_vectors(tiny)
    assert set(token_similarity(tiny, PROMPT, vectors).frame["token"]) == {"[5]", "[9]", "[33]", "[2]"}
    assert list(residual_lens(tiny, PROMPT, layers=[0]).frame["token_in"]) == ["[5]", "[9]", "[33]", "[2]"]
    with steer(tiny, vectors[1], prompt=PROMPT, explain_positions=True):
        tiny(torch.tensor([PROMPT.tokens]))
    assert capsys.readouterr().out.count("  steered") == 2


def test_ids_that_the_model_does_not_have_are_refused(tiny):
    with pytest.raises(ValueError, match="token id 64, but tiny-random-llama has ids 0 to 63"):
        list(generate_tokens(tiny, [Prompt.from_tokens([64])]))


@pytest.fixture
def normless(demo_tokenizer, tiny_model):
    from transformer_lens import HookedTransformer

    cfg = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=256).cfg
    cfg.normalization_type = None
    model = HookedTransformer(cfg).eval()
    model.tokenizer = demo_tokenizer
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.hooked  # a bridge is made of a whole module
def test_a_model_without_a_final_norm_has_its_own_numbers(normless):
    with pytest.warns(SharedPrefixWarning):
        vectors = extract(normless, PAIRS, layers=[1], progress=False)
    (pair, other) = PAIRS
    sides = []
    for text in (pair.positive, pair.negative, other.positive, other.negative):
        question = pair.question if text in (pair.positive, pair.negative) else other.question
        prompt = Prompt.of(normless, question, text)
        with torch.no_grad():
            _, cache = normless.run_with_cache(torch.tensor([prompt.tokens]))
        sides.append(cache["resid_post", 1][0, slice(*prompt.read)].mean(0))
    expected = (sides[0] - sides[1] + sides[2] - sides[3]) / 2
    torch.testing.assert_close(vectors[1].direction, expected, atol=1e-5, rtol=1e-4)
    with pytest.warns(SharedPrefixWarning, match="normalization_type=None"):
        tokens = torch.stack(list(generate_tokens(normless, [PROMPT], max_new_tokens=3)), dim=1)[0].tolist()
    text = list(PROMPT.tokens)
    for token in tokens:
        with torch.no_grad():
            assert token == int(normless(torch.tensor([text]))[0, -1].argmax())
        text.append(token)
    with torch.no_grad():
        last = normless(torch.tensor([PROMPT.tokens]))[0].softmax(-1).max(-1).values
    lens = residual_lens(normless, PROMPT, layers=[normless.cfg.n_layers - 1])
    assert list(lens.frame["probability"]) == pytest.approx(last.tolist(), abs=1e-5)


@pytest.mark.parametrize("ids", [[], [3, -1], [-1, 3]])
def test_token_ids_that_no_model_has_are_refused(ids):
    with pytest.raises(ValueError):
        Prompt.from_tokens(ids)
