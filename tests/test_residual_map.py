"""Maps between residual streams: what is linear is found, what is not there is not, and files are enough."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_vectors, tiny_model

from caa_lens.contrast import ContrastSet
from caa_lens.pair_reading import PairActivations, pair_activations
from caa_lens.transfers.residual_map import fit_residual_map
from caa_lens.vectors import Provenance

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


def test_a_linear_relation_is_found_and_carries_vectors_by_its_matrix():
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


def test_models_of_different_width_and_depth_are_mapped_layer_by_layer(demo_tokenizer):
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


def test_bad_requests_are_refused():
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
