"""BiPO: laws of its loss and gradient, training through kept streams against the whole model, and what diverges."""

import math

import pytest
import torch
from helpers.methods import PAIRS, assert_comes_back
from torch.testing import assert_close

from caa_lens.methods import bipo
from caa_lens.methods.bipo import fit, preference_loss
from caa_lens.prompts.prompt_formats import default_format, encode_answer
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.interchange import VectorFileError, read_vectors

SWAPPED = type(PAIRS).from_pairs([(p.question, p.negative, p.positive) for p in PAIRS], name="swapped")


def kept(model, pairs=PAIRS, layer=2, positions="all", with_eos=True):
    found = bipo._Kept.of(model, pairs, layer, positions, with_eos, None, None)
    found.read_reference(model, 4)
    return found


def slow_margin(model, pair, v, layer, with_eos=True, caa=False):
    """From four runs of the whole model, softmax over the whole vocabulary."""
    fmt, sums = default_format(model), []
    for strength in (1.0, 0.0):
        for answer in (pair.positive, pair.negative):
            prompt = encode_answer(fmt, model.tokenizer, pair.question, answer)
            tokens = [*prompt.tokens, *([model.tokenizer.eos_token_id] if with_eos else [])]
            first = prompt.steer_start if caa else 0

            def steered(resid, hook, first=first, strength=strength):
                return torch.cat([resid[:, :first], resid[:, first:] + strength * v], dim=1)

            with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", steered)]):
                logp = model(torch.tensor([tokens]))[0].log_softmax(-1)
            sums.append(sum(logp[i - 1, tokens[i]] for i in range(prompt.answer_start, len(tokens))))
    return (sums[0] - sums[2]) - (sums[1] - sums[3])


@pytest.mark.parametrize("with_eos", [True, False])
@pytest.mark.parametrize("positions", ["all", "caa"])
def test_through_kept_streams_margins_and_gradients_are_those_of_the_whole_model(tiny_chat, positions, with_eos):
    v = (0.3 * torch.randn(32, generator=torch.Generator().manual_seed(1))).requires_grad_()
    some = kept(tiny_chat, positions=positions, with_eos=with_eos)
    for i, pair in enumerate(PAIRS):
        fast, slow = some.margin(tiny_chat, i, v), slow_margin(tiny_chat, pair, v, 2, with_eos, positions == "caa")
        assert_close(fast, slow, atol=2e-4, rtol=1e-4)
        gradients = [torch.autograd.grad(one, v)[0] for one in (fast, slow)]
        assert_close(gradients[0], gradients[1], atol=2e-4, rtol=1e-3)


def test_at_zero_the_loss_is_log_2_and_its_gradient_does_not_depend_on_the_sign(tiny_chat):
    some, gradients = kept(tiny_chat), []
    for sign in (1.0, -1.0):
        v = torch.zeros(32, requires_grad=True)
        margin = some.margin(tiny_chat, 0, sign * v)[None]
        loss = preference_loss(margin, sign, 0.1)
        assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
        gradients.append(torch.autograd.grad(loss, v)[0])
    assert_close(gradients[0], gradients[1], atol=0, rtol=0)
    v = torch.zeros(32, requires_grad=True)
    slope = torch.autograd.grad(slow_margin(tiny_chat, PAIRS[0], v, 2), v)[0]
    assert_close(gradients[0], -0.05 * slope, atol=1e-4, rtol=1e-3)


def test_at_the_last_layer_without_a_norm_the_loss_of_one_token_is_in_closed_form_for_both_signs(
    tiny_chat, monkeypatch
):
    def without_norm(model, resid, targets):
        return (resid @ model.W_U).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    monkeypatch.setattr(bipo, "token_logp", without_norm)
    pairs = type(PAIRS).from_pairs([("Is it?", "Yes", "No"), ("Was it?", "No", "Yes")], name="words")
    some = kept(tiny_chat, pairs, layer=4, with_eos=False)
    v = torch.randn(32, generator=torch.Generator().manual_seed(2))
    for i, pair in enumerate(pairs):
        ids = [tiny_chat.tokenizer(one, add_special_tokens=False).input_ids for one in (pair.positive, pair.negative)]
        assert [len(one) for one in ids] == [1, 1]
        ahead = (tiny_chat.W_U[:, ids[0][0]] - tiny_chat.W_U[:, ids[1][0]]) @ v
        for sign in (1.0, -1.0):
            loss = preference_loss(some.margin(tiny_chat, i, sign * v)[None], sign, 0.1)
            assert_close(loss.detach(), torch.nn.functional.softplus(-0.1 * ahead).detach(), atol=1e-5, rtol=1e-5)


def test_swapping_the_answers_and_every_sign_gives_the_opposite_vector(tiny_chat, monkeypatch):
    one = fit(tiny_chat, PAIRS, layer=2, epochs=2, batch_size=2, progress=False)
    randint = torch.randint

    def other_sign(high, size, **said):
        return 1 - randint(high, size, **said)

    monkeypatch.setattr(torch, "randint", other_sign)
    other = fit(tiny_chat, SWAPPED, layer=2, epochs=2, batch_size=2, progress=False)
    monkeypatch.undo()
    assert_close(other.direction, -one.direction, atol=1e-6, rtol=0)
    same_signs = fit(tiny_chat, SWAPPED, layer=2, epochs=2, batch_size=2, progress=False)
    assert float((same_signs.direction + one.direction).abs().max()) > 1e-4
    assert float(one.direction.norm()) > 0


def test_it_learns_and_a_seed_gives_the_same_vector_and_weights_stay_as_they_were(tiny_chat):
    before = {name: one.clone() for name, one in tiny_chat.state_dict().items()}
    asked = [one.requires_grad for one in tiny_chat.parameters()]
    settings = {"layer": 2, "epochs": 12, "batch_size": 2, "learning_rate": 0.05, "progress": False}
    fitted, again = (fit(tiny_chat, PAIRS, **settings) for _ in range(2))
    assert fitted.losses[-1] < math.log(2) - 0.05
    assert torch.equal(fitted.direction, again.direction)
    assert not torch.equal(fit(tiny_chat, PAIRS, seed=1, **settings).direction, fitted.direction)
    assert all(torch.equal(one, before[name]) for name, one in tiny_chat.state_dict().items())
    assert [one.requires_grad for one in tiny_chat.parameters()] == asked
    margins = torch.stack([kept(tiny_chat).margin(tiny_chat, i, fitted.direction[0]) for i in range(4)])
    assert float(margins.detach().mean()) > 0.5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_the_same_where_the_caller_has_gradients_off(tiny_chat, mode):
    settings = {"layer": 2, "epochs": 1, "batch_size": 2, "progress": False}
    with mode():
        found = fit(tiny_chat, PAIRS, **settings)
    assert torch.equal(found.direction, fit(tiny_chat, PAIRS, **settings).direction)


def test_the_best_epoch_on_validation_pairs_is_kept_and_training_stops_there(tiny_chat):
    fitted = fit(
        tiny_chat, PAIRS, layer=2, validation=SWAPPED, epochs=9, patience=2, learning_rate=0.02, progress=False
    )
    assert fitted.epoch == 0  # what is learned is the opposite of what validation wants
    assert len(fitted.losses) == 3
    assert fitted.losses[0] == min(fitted.losses)


def test_what_diverges_is_refused_with_the_remedy(tiny_chat):
    with pytest.raises(ValueError, match=r"diverged: the vector's norm is .* more than 10 times that of the mean diff"):
        fit(tiny_chat, PAIRS, layer=2, epochs=3, learning_rate=1e3, progress=False)
    with pytest.raises(ValueError, match=r"diverged: the loss is nan at step 0. Use a smaller learning_rate"):
        bipo.check_training(torch.tensor(torch.nan), step=0)
    v = extract(tiny_chat, PAIRS, layers=[2], progress=False)[2]
    assert kept(tiny_chat).mean_difference_norm == pytest.approx(float(v.direction.norm()), rel=1e-4)


def test_an_interrupted_fit_leaves_no_file(tiny_chat, tmp_path, monkeypatch):
    def interrupted(*given, **said):
        raise KeyboardInterrupt

    monkeypatch.setattr(bipo, "preference_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_chat, PAIRS, layer=2, progress=False).save(tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert all(one.requires_grad for one in tiny_chat.parameters())


def test_it_is_a_steering_vector_too_and_is_saved_and_read_back(tiny_chat, tmp_path):
    fitted = fit(tiny_chat, PAIRS, layer=2, epochs=1, progress=False)
    assert fitted.vector.layer == 2
    assert fitted.interventions(-1.0, positions="original")[0].positions == "all"
    assert_comes_back(fitted, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="BiPO cannot be trained at positions='last'"):
        fit(tiny_chat, PAIRS, layer=2, positions="last", progress=False)


def test_the_authors_released_vectors_are_read(tmp_path):
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "power-seeking_llama-2"
    folder.mkdir()
    for name in ("vec_ep20_layer15.pt", "vec_ep5_layer15_gpu3.pt"):
        torch.save(tensor, folder / name)
        vectors = read_vectors(folder / name)
        assert vectors.layers == (15,)
        assert torch.equal(vectors[15].direction, tensor)
        assert (vectors.behavior, vectors.provenance.method) == ("power-seeking", "BiPO")
    assert read_vectors(folder / name, layers=[3], model="a/b").layers == (3,)  # what the caller says comes first
    torch.save(torch.ones(3, 4), folder / "vec_ep1_layer2.pt")
    with pytest.raises(VectorFileError):
        read_vectors(folder / "vec_ep1_layer2.pt")
