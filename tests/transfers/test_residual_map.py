"""Maps between residual streams: what is linear is found, what is not there is not, and files are enough."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import random_vectors

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.pair_reading import PairActivations, pair_activations
from caa_lens.provenance import Provenance
from caa_lens.transfers.residual_map import fit_residual_map

TEXTS = ContrastSet.from_pairs(
    [(f"How was day {n} of {n * 7}?", f"It was {n} times lovely.", f"It was {n} times awful.") for n in range(12)],
    name="days",
)


def activations(values, *, model, n_layers, behavior="days"):
    n_pairs, _, n, _ = values.shape
    return PairActivations(
        values=values.float(),
        norms=values.float().norm(dim=-1),
        layers=tuple(range(n)),
        letters=(("", ""),) * n_pairs,
        provenance=Provenance(model=model, behavior=behavior, dataset_hash="h", details={"n_layers": str(n_layers)}),
    )


def linear_pair(n_pairs=100, noise=0.0):
    """A source of 4 layers and width 6, a target of 2 layers and width 9 that is linear in source layers 1 and 3."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(n_pairs, 2, 4, 6, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    target = torch.einsum("psld,ldt->pslt", source[:, :, [1, 3]], weights) + 5
    target = target + noise * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    return activations(source, model="small", n_layers=4), activations(target, model="wide", n_layers=2), weights


def test_a_linear_relation_is_found_and_carries_vectors_by_its_matrix(tiny_model):
    source, target, weights = linear_pair()
    found = fit_residual_map(source, target, penalties=[1e-6], progress=False)
    assert found.source_layers == (1, 3)  # at the same relative depth
    assert (found.frame["r2"] > 0.9999).all()
    torch.testing.assert_close(found.weights, weights.float(), atol=1e-4, rtol=1e-4)
    directions = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    vectors = replace(random_vectors(tiny_model(d_model=32), layers=range(4)), directions=directions)
    vectors = replace(vectors, provenance=replace(vectors.provenance, model="small"))
    carried = found.carry(vectors)
    assert carried.layers == (0, 1)
    for row, layer in enumerate((1, 3)):
        torch.testing.assert_close(
            carried.directions[row], directions[layer] @ weights[row].float(), atol=1e-3, rtol=1e-3
        )
    assert carried.provenance.model == "wide"
    assert carried.provenance.expression == "map(random)"
    assert carried.provenance.details["mapped_from"] == "small"


def test_the_fit_is_ridge_regression_on_standardised_sources():
    """The same numbers from the normal equations."""
    source, target, _ = linear_pair(noise=0.5)
    found = fit_residual_map(source, target, penalties=[30.0], held_out=0.25, seed=3, progress=False)
    order = np.random.default_rng(3).permutation(100)
    x, y = (
        side[layer].numpy()[order[25:]].reshape(150, -1).astype(float) for side, layer in ((source, 3), (target, 1))
    )
    spread = x.std(0)
    z = (x - x.mean(0)) / spread
    expected = np.linalg.solve(z.T @ z + 30 * np.eye(6), z.T @ (y - y.mean(0))) / spread[:, None]
    np.testing.assert_allclose(found.weights[1].numpy(), expected, atol=1e-5)


def test_held_out_r2_does_not_praise_what_is_unrelated():
    source, target, _ = linear_pair()
    shuffled = replace(target, values=torch.randn(target.values.shape, generator=torch.Generator().manual_seed(9)))
    assert (fit_residual_map(source, shuffled, progress=False).frame["r2"] < 0.05).all()


def test_several_sets_are_joined(tmp_path):
    source, target, _ = linear_pair(noise=0.3)
    halves = [
        [replace(side, values=side.values[rows], norms=side.norms[rows], letters=side.letters[rows]) for rows in parts]
        for side in (source, target)
        for parts in [(slice(0, 60), slice(60, 100))]
    ]
    together = fit_residual_map(*halves, progress=False)
    torch.testing.assert_close(together.weights, fit_residual_map(source, target, progress=False).weights)
    files = [target.save(tmp_path / "target.safetensors"), source.save(tmp_path / "source.safetensors")]
    from_files = fit_residual_map(PairActivations.load(files[1]), PairActivations.load(files[0]), progress=False)
    torch.testing.assert_close(from_files.weights, together.weights)


def test_models_of_different_width_and_depth_are_mapped_layer_by_layer(demo_tokenizer, tiny_model):
    n_vocab = len(demo_tokenizer)
    wide = tiny_model(d_model=48, n_layers=7, d_vocab=n_vocab, n_ctx=512, tokenizer=demo_tokenizer, seed=1)
    read_wide = pair_activations(wide, TEXTS, progress=False)
    del wide
    narrow = tiny_model(d_vocab=n_vocab, n_ctx=512, tokenizer=demo_tokenizer)
    found = fit_residual_map(read_wide, pair_activations(narrow, TEXTS, progress=False), progress=False)
    assert found.layers == (0, 1, 2, 3, 4)
    assert found.source_layers == (0, 2, 3, 5, 6)  # depths 1/5 .. 5/5 of 7 layers
    assert found.weights.shape == (5, 48, 32)
    assert found.plot().data[0].name == "mean over dimensions"
    assert "d_model 48 -> 32" in repr(found)


def test_bad_requests_are_refused(tiny_model):
    source, target, _ = linear_pair()
    other = replace(target, provenance=replace(target.provenance, dataset_hash="x", behavior="nights"))
    with pytest.raises(ValueError, match="not of the same pairs: days against nights"):
        fit_residual_map(source, other)
    few = [replace(s, values=s.values[:4], norms=s.norms[:4], letters=s.letters[:4]) for s in (source, target)]
    with pytest.raises(ValueError, match="4 pairs are too few"):
        fit_residual_map(*few)
    with pytest.raises(ValueError, match="do not tell the model's number of layers"):
        fit_residual_map(replace(source, provenance=replace(source.provenance, details={})), target, progress=False)
    with pytest.raises(ValueError, match="held_out is a share"):
        fit_residual_map(source, target, held_out=20)
    with pytest.raises(ValueError, match="no activations given"):
        fit_residual_map([], [])
    found = fit_residual_map(source, target, progress=False)
    foreign = random_vectors(tiny_model())
    with pytest.raises(ValueError, match="the map leads from small with d_model=6"):
        found.carry(foreign)
    short = replace(foreign, directions=torch.randn(1, 6), layers=(1,), provenance=Provenance(model="small"))
    with pytest.raises(ValueError, match=r"needs vectors of layers \[3\] too"):
        found.carry(short)


def test_the_penalty_is_chosen_by_cross_validation_and_r2_is_of_the_held_out_pairs():
    source, target, _ = linear_pair(noise=8.0)
    target = replace(target, values=target.values * torch.linspace(1, 5, 9))  # dimensions of different variance
    found = fit_residual_map(source, target, penalties=[1e-6, 20.0, 1e6], held_out=0.3, seed=2, progress=False)
    assert list(found.frame) == ["layer", "source_layer", "r2", "r2_weighted", "penalty", "n_fit", "n_held_out"]
    assert found.frame[["layer", "source_layer"]].to_numpy().tolist() == [[0, 1], [1, 3]]
    assert set(found.frame["n_fit"]) == {70}
    assert set(found.frame["n_held_out"]) == {30}
    order = np.random.default_rng(2).permutation(100)
    test, fit = order[:30], order[30:]
    assert set(found.frame["penalty"]) == {20.0}  # neither the first nor the last
    for row in found.frame.itertuples():
        assert row.penalty == chosen_penalty(source[row.source_layer].numpy(), target[row.layer].numpy(), fit)
        x, y = (side.numpy().astype(float) for side in (source[row.source_layer], target[row.layer]))
        weights = found.weights[row.layer].numpy()
        flat_x, flat_y = x[fit].reshape(-1, 6), y[fit].reshape(-1, 9)
        guess = (x[test].reshape(-1, 6) - flat_x.mean(0)) @ weights + flat_y.mean(0)
        truth = y[test].reshape(-1, 9)
        missed, spread = ((truth - guess) ** 2).sum(0), ((truth - truth.mean(0)) ** 2).sum(0)
        assert row.r2 == pytest.approx((1 - missed / spread).mean(), abs=1e-5)
        assert row.r2_weighted == pytest.approx(1 - missed.sum() / spread.sum(), abs=1e-5)


def chosen_penalty(x, y, fit):
    """By the mean held-out R^2 over three folds of whole pairs, each fold standardised by the rest."""
    folds = np.arange(len(fit)) % 3
    scores = {}
    for penalty in (1e-6, 20.0, 1e6):
        of_fold = []
        for fold in range(3):
            inside, outside = fit[folds != fold], fit[folds == fold]
            a, b = x[inside].reshape(-1, x.shape[-1]), y[inside].reshape(-1, y.shape[-1])
            z = (a - a.mean(0)) / a.std(0)
            w = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ (b - b.mean(0)))
            guess = (x[outside].reshape(-1, x.shape[-1]) - a.mean(0)) / a.std(0) @ w + b.mean(0)
            truth = y[outside].reshape(-1, y.shape[-1])
            of_fold.append((1 - ((truth - guess) ** 2).sum(0) / ((truth - truth.mean(0)) ** 2).sum(0)).mean())
        scores[penalty] = np.mean(of_fold)
    return max(scores, key=scores.get)


def test_a_map_of_joined_sets_names_them_all_and_some_layers_are_those_asked_for(tiny_model):
    source, target, _ = linear_pair()
    nights = [replace(side, provenance=replace(side.provenance, behavior="nights")) for side in (source, target)]
    found = fit_residual_map([source, nights[0]], [target, nights[1]], layers=[1, 1], progress=False)
    assert (found.layers, found.source_layers) == ((1,), (3,))
    for side, model in ((found.provenance["source"], "small"), (found.provenance["target"], "wide")):
        assert (side.model, side.behavior, side.expression, side.n_pairs) == (
            model,
            "days, nights",
            "days, nights",
            200,
        )
    vectors = replace(random_vectors(tiny_model(), layers=range(4)), directions=torch.ones(4, 6))
    for model in ("small", "unknown"):
        carried = found.carry(replace(vectors, provenance=Provenance(model=model, behavior="b")))
        assert carried.provenance.expression == "map(b)"
        assert carried.provenance.details == {"mapped_from": model, "map_fitted_on": "days, nights"}


def test_sets_of_one_side_must_be_of_one_model_and_as_many_pairs():
    source, target, _ = linear_pair()
    stranger = replace(target, provenance=replace(target.provenance, model="another"))
    with pytest.raises(ValueError, match="must be read from one model at the same layers"):
        fit_residual_map([source, source], [target, stranger])
    fewer = replace(target, values=target.values[:50], norms=target.norms[:50], letters=target.letters[:50])
    with pytest.raises(ValueError, match="not of the same pairs"):
        fit_residual_map(source, fewer)
    for share in (0, 1, 0.99):
        with pytest.raises(ValueError, match=r"held_out is a share|too few"):
            fit_residual_map(source, target, held_out=share)
    five = [replace(s, values=s.values[:5], norms=s.norms[:5], letters=s.letters[:5]) for s in (source, target)]
    assert fit_residual_map(*five, progress=False).frame["n_fit"].tolist() == [4, 4]
