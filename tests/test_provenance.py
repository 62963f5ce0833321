"""One model under several names is one model, and two owners' models of one name are two."""

from dataclasses import replace

import pytest
import torch

from caa_lens.provenance import Provenance, last_part, one_model
from caa_lens.vectors.algebra.combinations import mean_vector, normalize_across_behaviors
from caa_lens.vectors.interchange import read_vectors, write_vectors
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

HUB = "meta-llama/Llama-2-7b-chat-hf"
SAME = [
    "Llama-2-7b-chat-hf",
    "/models/Llama-2-7b-chat-hf",
    "/models/Llama-2-7b-chat-hf/",
    "~/Llama-2-7b-chat-hf",
    "./Llama-2-7b-chat-hf",
    "../Llama-2-7b-chat-hf",
    "a/b/Llama-2-7b-chat-hf",
    r"C:\models\Llama-2-7b-chat-hf",
    "models--meta-llama--Llama-2-7b-chat-hf",
    "/hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots/f5db02db724555f92da89c216ac04704f23d4590",
    "/hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots/f5db02db724555f92da89c216ac04704f23d4590/",
    "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf",
    "meta-llama/Llama-2-7b-chat-hf/",
    HUB,
    "unknown",
]
OTHER = [
    "NousResearch/Llama-2-7b-chat-hf",
    "/hub/models--NousResearch--Llama-2-7b-chat-hf/snapshots/1",
    "https://huggingface.co/NousResearch/Llama-2-7b-chat-hf",
    "Llama-2-7b-hf",
    "Llama-2-13b-chat-hf",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama",
    "llama-2-7b-chat-hf",
    "gpt2",
]


def vectors_of(model, *, behavior="b", layers=(3, 7)):
    generator = torch.Generator().manual_seed(ord(behavior))
    directions = torch.randn(len(layers), 8, generator=generator)
    return SteeringVectors(directions=directions, layers=layers, provenance=Provenance(model=model, behavior=behavior))


@pytest.mark.parametrize("name", SAME)
def test_every_name_of_one_model_gives_way_to_its_hub_id(name):
    assert one_model((HUB, name)) == one_model((name, HUB)) == HUB.rstrip("/")


@pytest.mark.parametrize("name", OTHER)
def test_another_owner_or_name_is_another_model(name):
    assert one_model((HUB, name)) is None
    assert one_model((name, HUB)) is None


def test_what_is_known_of_one_model_is_not_enough_for_two_others():
    assert one_model(("a/x", "x", "unknown")) == "a/x"
    assert one_model(("x", "a/x", "b/x")) is None
    assert one_model(("unknown", "")) == "unknown"
    assert one_model(()) == "unknown"
    assert one_model(("/one/place/x", "/another/x")) == "x"
    assert one_model(("/one/place/x",)) == "/one/place/x"  # nothing to choose from: as it was


@pytest.mark.parametrize("name", SAME[:-1])
def test_files_are_called_after_the_last_part(name):
    assert last_part(name) == "Llama-2-7b-chat-hf"


@pytest.mark.parametrize(("first", "second"), [(HUB, SAME[0]), (SAME[0], HUB), (SAME[9], SAME[1]), ("unknown", HUB)])
def test_vectors_of_one_model_under_two_names_combine_and_keep_the_fuller_one(first, second):
    a, b = vectors_of(first), vectors_of(second, behavior="c")
    made = [a + b, a - b, a.without(b), mean_vector(a, b), a[3] + b[3]]
    made.append(SteeringVectors.from_vectors([a[3], b[7]]))
    made += normalize_across_behaviors({"b": a, "c": b}).values()
    for each in made[:6]:
        assert each.provenance.model == HUB
    assert torch.equal((a + b).directions, a.directions + b.directions)
    assert a.cosine(b) is not None


def test_vectors_of_two_owners_models_do_not_combine_not_even_by_way_of_a_bare_name():
    a, bare, b = vectors_of("a/x"), vectors_of("x"), vectors_of("b/x")
    for combine in (
        lambda: a + b,
        lambda: (a + bare) + b,
        lambda: mean_vector(bare, a, b),
        lambda: SteeringVectors.from_vectors([a[3], b[7]]),
        lambda: SteeringVectors.from_vectors([bare[3], a[7], b[7].at_layer(9)]),
    ):
        with pytest.raises(ValueError, match="cannot combine vectors of different models, a/x and b/x"):
            combine()
    with pytest.raises(ValueError, match="has layers 3, 7 of b/x, expected 3, 7 of a/x"):
        normalize_across_behaviors({"bare": bare, "a": a, "b": b})


@pytest.mark.parametrize("place", ["refusal", "v.gguf", "v.safetensors", "v.json"])
def test_vectors_that_went_through_files_still_combine_with_those_they_were(tmp_path, place):
    ours = vectors_of(HUB)
    theirs = read_vectors(write_vectors(ours, tmp_path / place))
    assert (ours - theirs).norms.tolist() == [0, 0]
    assert (theirs - ours).provenance.model == HUB
    other = replace(ours, provenance=replace(ours.provenance, model="gpt2"))
    if place != "v.json":  # says no model
        with pytest.raises(ValueError, match="different models"):
            theirs - other


def test_a_vector_by_hand_of_an_unknown_model_takes_the_others_name():
    by_hand = SteeringVector.from_direction(torch.ones(8), 3)
    assert (by_hand + vectors_of("x")[3]).provenance.model == "x"


def test_what_is_printed_names_what_is_known_and_counts_long_lists():
    hashes = " ".join(f"{i:064x}" for i in range(120))
    p = Provenance(model="m", behavior="b", details={"pair_hashes": hashes, "torch": "2.13", "note": "x" * 200})
    shown = str(p)
    assert "model='m'" in shown
    assert "n_pairs" not in shown  # 0 is unknown
    assert "details['pair_hashes']=<120 entries, 000000000000 ...>" in shown
    assert "details['torch']='2.13'" in shown
    assert max(map(len, shown.splitlines())) < 110
    assert p.details["pair_hashes"] == hashes


def test_the_demo_models_former_name_goes_with_its_new_one_and_the_original_by_its_owner_does_not():
    former, now, original = "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-4bit", "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert one_model((former, now)) == one_model((now, former)) == now
    assert one_model((former, original)) == original
    assert one_model((now, original)) is None
    assert one_model((former, now, original)) is None
    assert one_model((former,)) == former
