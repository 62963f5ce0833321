"""How waits and uploads grow, in a small model: not by layers, conditions or pairs; and a model on two cards."""

from collections import Counter

import pytest
import torch
from helpers.fake_gpu import fake_gpu, llama, over_two_cards

import caa_lens as cl
from caa_lens.engine import shared_prefix
from caa_lens.engine.staircase import Staircase, Staircases
from caa_lens.measures.answers import score_answers
from caa_lens.measures.open_ended.text_measures import answer_logp
from caa_lens.prompts.prompt_formats import default_format

N_LAYERS, D_MODEL = 3, 32
LETTERS = cl.ContrastSet.load("sycophancy").sample(4, seed=0)
COMPLETIONS = cl.ContrastSet.load("sentiment").sample(2, seed=0)
VECTORS = cl.SteeringVectors(directions=torch.ones(N_LAYERS, D_MODEL), layers=tuple(range(N_LAYERS)))
HELLO = ["Hello", "How was your day?"]
# No vector is infinite, no text ends early, no vector is zero, no padding is seen.
READS = {"check_rows": False, "generate_tokens": False, "_warn_of_zero": False, "_sees": False}
pytestmark = [
    pytest.mark.hooked,  # the fake card carries a HookedTransformer
    pytest.mark.filterwarnings("ignore::caa_lens.vectors.extraction.ZeroVectorWarning"),
]


@pytest.fixture(scope="module")
def model(demo_tokenizer):
    with fake_gpu(**READS):
        model = llama(n_layers=N_LAYERS, d_model=D_MODEL, d_mlp=48, n_heads=4, tokenizer=demo_tokenizer)
        cl.engine.pair_activations(model, COMPLETIONS, progress=False)  # which compares the engine with it, once
        cl.logit_lens(model, VECTORS)
        return model


def counted(call, **reads):
    """(waits, uploads) of a call, and the same by line of the library."""
    with fake_gpu(**{**READS, **reads}) as gpu:
        call()
    return (gpu.waits, gpu.uploads), gpu.places


def counts(call):
    return counted(call)[0]


def of_module(places: Counter, module: str) -> int:
    return sum(n for (_, place), n in places.items() if place.startswith(f"{module}.py:"))


# ---- what waits, and how that grows -------------------------------------------------------------------------------


def edits_of(conditions: list) -> list:
    """The conditions as the engine takes them, whose suffixes are steered throughout."""
    return [tuple(step.edit(0) for step in condition) for condition in conditions]


def conditions_of(n: int, operator: str = "add") -> list:
    layers = range(n)
    return [(cl.Intervention(vector=VECTORS[i % N_LAYERS], multiplier=1.0 + i, operator=operator),) for i in layers]


@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_a_staircase_takes_three_copies_and_no_wait_whatever_the_number_of_conditions(operator):
    for n in (1, 8, 64):
        assert counts(lambda n=n: Staircase(edits_of(conditions_of(n, operator)), "cuda")) == (0, 3)


def test_a_staircase_copies_nothing_while_it_runs():
    with fake_gpu():
        stairs = Staircase(edits_of([*conditions_of(8), *conditions_of(8, "ablate")]), "cuda")

    def run():
        resid = torch.ones(2, 1, 3, D_MODEL, device="cuda")
        for layer in range(N_LAYERS):
            resid = stairs(layer, resid)
        resid[:, stairs.condition_groups()]

    assert counts(run) == (0, 0)


def test_multipliers_on_the_card_are_read_in_one_go():
    def build(n):
        multipliers = torch.ones(n, device="cuda").unbind()
        conditions = [(cl.Intervention(vector=VECTORS[0], multiplier=m),) for m in multipliers]
        before = gpu.waits
        list(Staircases(edits_of(conditions), "cuda").at_most(2))
        return gpu.waits - before

    for n in (1, 8, 32):
        with fake_gpu(__post_init__=True) as gpu:
            assert build(n) == 1


def test_scoring_takes_as_many_waits_and_copies_for_twice_the_conditions(model):
    some, twice = (counts(lambda n=n: score_answers(model, LETTERS, conditions_of(n), progress=False)) for n in (6, 12))
    assert some == twice
    assert some[0] == 1  # one batch of questions


def test_staircases_serve_every_batch(model, monkeypatch):
    by_batches = {}
    for n in (1, 2, 4):
        monkeypatch.setattr(shared_prefix, "prefix_budget", lambda model, length, n=n: 4 // n)
        total, places = counted(lambda: score_answers(model, LETTERS, conditions_of(8), progress=False))
        by_batches[n] = (of_module(places, "staircase"), *total)
    staircase, waits, uploads = zip(*by_batches.values(), strict=True)
    assert set(staircase) == {4}  # three copies, and one of the conditions' order
    assert waits == (1, 2, 4)  # the scores of each batch
    assert (uploads[1] - uploads[0]) * 2 == uploads[2] - uploads[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda model, vectors: cl.token_similarity(model, "Hello", vectors),
        lambda model, vectors: cl.logit_lens(model, vectors),
        lambda model, vectors: cl.word_ranks(model, vectors, ["happy", "sad"]),
        lambda model, vectors: cl.residual_lens(model, "Hello", layers=vectors.layers),
        lambda model, vectors: cl.engine.pair_activations(model, LETTERS, layers=vectors.layers, progress=False),
        lambda model, vectors: cl.engine.pair_activations(model, COMPLETIONS, layers=vectors.layers, progress=False),
        lambda model, vectors: cl.extract(model, LETTERS, layers=vectors.layers, progress=False),
        lambda model, vectors: cl.interpretation.attribute_logits(
            model, LETTERS, vectors[vectors.layers[-1]], progress=False
        ),
    ],
    ids=["similarity", "lens", "ranks", "stream", "letters", "completions", "extract", "attribute"],
)
def test_nothing_waits_or_copies_up_once_a_layer(model, call):
    one, every = VECTORS.at([2]), VECTORS.at([0, 1, 2])
    assert counts(lambda: call(model, one)) == counts(lambda: call(model, every))


def test_waits_grow_by_the_batch_not_by_the_pair_or_text(model):
    def read(n):
        return counts(
            lambda: cl.engine.pair_activations(model, COMPLETIONS.sample(n, seed=0), batch_size=12, progress=False)
        )

    read(1)  # a model is compared with the engine once
    assert read(1) == read(2)
    texts = [default_format(model).encode(model.tokenizer, "Hi", " Hello.")]
    one, many = (counts(lambda n=n: answer_logp(model, texts * n, progress=False)) for n in (1, 8))
    assert one == many
    assert one[0] == 1


def test_generation_waits_once_a_token(model):
    def waits(n):
        return counts(lambda: cl.generate(model, HELLO, vectors=[(VECTORS[1], 2.0)], max_new_tokens=n))

    (few, few_up), (many, many_up) = waits(2), waits(6)
    assert many - few == 4  # whether all texts have ended
    assert few_up == many_up


# ---- a model over several devices ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(demo_tokenizer):
    with fake_gpu():
        return over_two_cards(llama(n_layers=4, d_model=D_MODEL, d_mlp=48, n_heads=4, tokenizer=demo_tokenizer))


SPREAD = cl.SteeringVectors(directions=torch.ones(4, D_MODEL), layers=(0, 1, 2, 3))
EACH = SPREAD.at([1, 3])  # one layer of each device
APART = {
    "extract": lambda model: cl.extract(model, LETTERS, progress=False),
    "extract completions": lambda model: cl.extract(model, COMPLETIONS, progress=False),
    "sweep": lambda model: cl.sweep(model, LETTERS[:2], EACH, multipliers=[0, 1], progress=False),
    "sweep completions": lambda model: cl.sweep(model, COMPLETIONS, EACH, multipliers=[0, 1], progress=False),
    "transfer": lambda model: cl.transfer_layers(model, LETTERS[:2], EACH, targets=EACH.layers, progress=False),
    "generate": lambda model: cl.generate(model, ["Hi", "How are you?"], [(SPREAD[3], 1.0)], max_new_tokens=3),
    "generate uncached": lambda model: cl.generate(model, "Hi", [SPREAD[1]], max_new_tokens=3, use_cache=False),
    "lens": lambda model: cl.logit_lens(model, SPREAD),
    "lens in context": lambda model: cl.logit_lens(model, SPREAD, reading="in_context", pairs=LETTERS),
    "stream lens": lambda model: cl.residual_lens(model, "Hi", vectors=[SPREAD[3]]),
    "similarity": lambda model: cl.token_similarity(model, "Hi", SPREAD),
    "attribute": lambda model: cl.interpretation.attribute_logits(model, LETTERS, SPREAD[1], progress=False),
    "pairs": lambda model: cl.engine.pair_activations(model, COMPLETIONS, progress=False),
    "perplexity": lambda model: cl.measures.measure_texts(model, [("Hi", "there")]),
}


@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
@pytest.mark.parametrize("name", APART)
def test_a_model_over_two_devices_runs_and_keeps_its_modules_where_they_were(apart, name):
    def devices():
        return [str(tensor.device) for tensor in (*apart.parameters(), *apart.buffers())]

    before = devices()
    assert {"cuda:0", "cuda:1"} <= set(before)
    counts(lambda: APART[name](apart))  # mixed devices raise here as on cards
    assert devices() == before


def test_a_model_over_two_devices_is_told_of(apart):
    with fake_gpu(**READS):
        assert shared_prefix.unsupported(apart) == "shape-of-llama-2 lies on several devices (cuda:0, cuda:1)"
