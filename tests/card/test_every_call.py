"""Every public call on a fake card, at Llama 2's widths: no mixed devices, and a stated number of waits and uploads."""

import pytest
import torch
from helpers.card_calls import CALLS, MORE, READS, TRAINING
from helpers.fake_gpu import fake_gpu

pytestmark = [
    pytest.mark.hooked,  # bridges have a module of their own
    pytest.mark.filterwarnings("ignore::caa_lens.vectors.extraction.ZeroVectorWarning"),
    pytest.mark.filterwarnings("ignore::caa_lens.contrast.sets.LetterBalanceWarning"),
    pytest.mark.filterwarnings("ignore::caa_lens.measures.training_pairs.TrainingPairsWarning"),
]

# Of each call, waits and uploads as (whatever its size, for each unit more): a unit is a batch of pairs or questions, a
# prompt, or a token that is generated. A call of size n has n times the number of units that stands last. Held exactly.
COUNTED = {
    # reading: the directions are checked and come down once a call, and nothing a batch; kept activations, once a batch
    "extract": ((3, 0), (0, 4), 1),
    "extract completions": ((3, 0), (0, 4), 1),
    "extract pca": ((0, 1), (0, 4), 1),
    "pair_activations": ((0, 1), (0, 4), 1),
    "pair_activations of completions": ((1, 1), (0, 12), 1),  # norms in another pass, two batches of prompts
    "kept activations": ((0, 1), (0, 4), 1),
    "geometry": ((2, 0), (8, 0), 1),
    "perplexity": ((0, 1), (0, 4), 1),
    # scoring: one wait a batch
    "sweep": ((0, 1), (4, 5), 1),
    "sweep completions": ((0, 1), (4, 7), 1),
    "score_answers": ((1, 0), (9, 0), 1),
    "transfer_layers": ((0, 1), (4, 5), 1),
    "transfer_behaviors": ((1, 1), (17, 5), 1),
    "transfer_prompts": ((6, 2), (16, 10), 1),  # two settings; vectors of each are extracted first
    "transfer_models": ((0, 1), (4, 5), 1),
    # text: one wait a token, and another one where it is sampled, or shown as it comes
    "generate": ((3, 1), (6, 0), 2),
    "generate by multipliers": ((3, 1), (6, 0), 2),
    "generate uncached": ((2, 1), (4, 0), 2),
    "generate_tokens": ((2, 1), (6, 0), 2),
    "generate sampled": ((3, 2), (4, 1), 2),
    "generate_stream": ((2, 2), (6, 0), 2),
    "steer": ((4, 0), (5, 4), 2),
    "explorer": ((6, 4), (14, 0), 2),  # both texts, and one reading of each for its colours
    # lenses: of the vocabulary once a call; of the model's answer, one wait a prompt and set of directions
    "lens, direct": ((2, 0), (1, 0), 1),
    "lens, normed": ((2, 0), (1, 0), 1),
    "lens in context": ((11, 0), (17, 0), 1),
    "lens, causal": ((16, 1), (24, 1), 2),
    "lens, effect": ((25, 2), (46, 2), 2),
    "word_ranks": ((2, 0), (1, 0), 1),
    "residual_lens": ((20, 0), (9, 0), 1),
    "token_similarity": ((1, 0), (2, 0), 1),
    "attribute_logits": ((0, 1), (1, 8), 1),
    # vectors that lie on the card: each is checked, which waits
    "algebra": ((32, 0), (6, 0), 1),
    "stored": ((11, 0), (0, 0), 1),
    "vectors on the card": ((43, 0), (16, 0), 1),
    # what is made of the above
    "divergence": ((5, 1), (20, 0), 2),
    "calibrate": ((20, 0), (43, 0), 1),
    "side_effects": ((7, 1), (37, 0), 2),
    "compare": ((29, 0), (185, 0), 1),
    # fits
    "ActAdd": ((4, 0), (4, 0), 1),
    "Linear-AcT": ((4, 0), (0, 8), 1),
    "SADI": ((0, 2), (0, 4), 1),
    "instruction": ((0, 2), (0, 8), 1),
    "InferAligner": ((1, 0), (4, 0), 1),
    # the plain path: the caller has a hook, and every prompt runs by itself
    "plain extract": ((3, 0), (0, 64), 1),
    "plain sweep": ((0, 2), (0, 30), 1),
    "plain generate": ((3, 1), (6, 2), 2),
}
SLOW = (
    "compare",
    "calibrate",
    "side_effects",
    "plain extract",
    "plain sweep",
)  # made of calls that are here by themselves


def counted(call, model, n, **reads):
    with fake_gpu(**{**READS, **reads}) as gpu:
        call(model, n)
    return (gpu.waits, gpu.uploads), gpu.places


def test_the_table_has_every_call():
    assert set(COUNTED) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_waits_and_uploads_are_as_stated_and_grow_as_stated(card_model, name):
    model, reads = card_model("70B", 4), MORE.get(name, {})
    (waits, a_wait), (uploads, an_upload), units = COUNTED[name]
    for n in (1, 2) if name not in ("compare", "calibrate") else (1,):
        stated = waits + a_wait * units * n, uploads + an_upload * units * n
        found, places = counted(CALLS[name], model, n, **reads)
        if found != stated:  # what is found out once a model comes beside it the first time
            found, places = counted(CALLS[name], model, n, **reads)
        assert found == stated, f"size {n}:\n" + "\n".join(f"{k} {what}s at {at}" for (what, at), k in places.items())


@pytest.mark.parametrize("name", [name for name in CALLS if name not in SLOW])
@pytest.mark.parametrize(("shape", "dtype"), [("7B", torch.float16), ("13B", torch.bfloat16)])
def test_every_call_runs_on_a_card(card_model, name, shape, dtype):
    counted(CALLS[name], card_model(shape, 2, dtype), 1, **MORE.get(name, {}))


@pytest.mark.parametrize("name", ["extract", "sweep", "sweep completions", "generate", "lens, effect"])
def test_calls_run_at_70b_in_float16(card_model, name):
    counted(CALLS[name], card_model("70B", 2, torch.float16), 1, **MORE.get(name, {}))


@pytest.mark.parametrize("name", TRAINING)
def test_what_trains_runs_and_waits_as_often_for_every_epoch(card_model, name):
    model = card_model("70B", 2, device="card")
    _, *found = [counted(TRAINING[name], model, n, **MORE.get(name, {}))[0] for n in (1, 1, 2, 3)]
    assert found[2][0] - found[1][0] == found[1][0] - found[0][0] <= 10


def test_nothing_is_left_on_the_card_but_the_model(card_model):
    import gc

    model = card_model("70B", 4)
    with fake_gpu(**READS) as gpu:
        CALLS["sweep"](model, 1)
        gc.collect()
        before = gpu.now()
        CALLS["extract"](model, 1), CALLS["sweep"](model, 1), CALLS["generate"](model, 1)
        gc.collect()
        assert gpu.now() == before
