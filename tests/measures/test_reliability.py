"""What pairs agree on: verdicts on planted data, and every number beside the slow and obvious way to it."""

from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from helpers.planted_pairs import ORDERS, activations_of, planted
from sklearn.metrics.pairwise import cosine_similarity

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.measures.agreement.held_out import d_prime, held_out, held_out_cosines, influences
from caa_lens.measures.agreement.letter_groups import group_by_letters, without_letter
from caa_lens.measures.agreement.letter_orders import join_letter_orders
from caa_lens.measures.agreement.reliabilities import Reliability, reliability
from caa_lens.measures.agreement.shared_part import (
    by_chance,
    cone,
    cosine_of,
    relabelled,
    resamples,
    shared_part,
    squared_lengths,
)
from caa_lens.measures.intervals import bootstrap_interval

NOTHING = "nothing to steer with"
QUICK = {"n_resamples": 300, "progress": False}


def differences_of(activations, layer=0):
    sides = activations[layer].double().numpy()
    return sides[:, 0] - sides[:, 1]


def verdicts(activations, **options):
    return list(reliability(activations, **{**QUICK, **options}).frame["verdict"])


def letter_free(activations, layer=0):
    """Groups, letter-free differences and their inner products."""
    groups = group_by_letters(activations.letters)
    freed, _ = without_letter(differences_of(activations, layer), groups)
    return groups, freed, freed @ freed.T


def direction_of(differences, groups, members=None):
    """The mean of the groups' means, of two letters or none."""
    members = np.arange(len(differences)) if members is None else np.asarray(members)
    return np.mean([differences[np.intersect1d(group, members)].mean(0) for group in groups.groups], axis=0)


# ---- verdicts on planted data ---------------------------------------------------------------------------------


def test_a_set_whose_only_signal_is_the_letter_has_nothing_to_steer_with():
    """Of 40 such sets a few may read "weak" at a layer, as noise does one time in twenty."""
    n_nothing = 0
    for seed in range(40):
        found = reliability(planted(24, letter=8.0, seed=seed), seed=seed, **QUICK)
        assert (found.frame["letter"] > 0.9).all()
        assert "consistent" not in set(found.frame["verdict"])
        nothing = found.frame["verdict"] == NOTHING
        assert (found.frame["pairs_for_95"].isna() == nothing).all()
        n_nothing += nothing.all()
    assert n_nothing >= 35


def test_a_letter_that_is_stronger_in_some_pairs_than_in_others_is_no_signal_either():
    every = [
        verdict
        for seed in range(8)
        for verdict in verdicts(planted(24, letter=8.0, letter_spread=0.3, seed=seed), seed=seed)
    ]
    assert every.count(NOTHING) >= 15  # of 16: a false alarm is had one time in twenty


def test_a_planted_direction_under_a_strong_letter_is_found():
    activations = planted(24, size=0.6, letter=8.0)
    found = reliability(activations, **QUICK)
    assert set(found.frame["verdict"]) == {"consistent"}
    assert (found.frame["letter"] > 0.9).all()
    assert (found.frame["against"] == 0).all()


def test_a_planted_direction_is_found_with_letters_that_are_uneven():
    found = reliability(planted(30, size=0.6, letter=8.0, n_first=22), **QUICK)
    assert set(found.frame["verdict"]) == {"consistent"}


@pytest.mark.parametrize("n_first", [12, 17])
def test_the_same_letter_effect_in_all_pairs_changes_no_number(n_first):
    with_letter = reliability(planted(24, size=0.3, letter=50.0, n_first=n_first), **QUICK)
    without = reliability(planted(24, size=0.3, letter=0.0, n_first=n_first), **QUICK)
    numbers = ["split_half", "low", "high", "p", "agreement", "against", "d_prime", "shared", "cone"]
    # The activations are float32, of which a letter 50 times as long as the noise takes two digits.
    np.testing.assert_allclose(with_letter.frame[numbers], without.frame[numbers], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(with_letter.cosines, without.cosines, atol=1e-4)
    np.testing.assert_allclose(with_letter.influences, without.influences, atol=1e-2)


def test_completions_that_agree_are_consistent_and_those_that_do_not_are_nothing():
    assert verdicts(planted(20, size=0.7)) == ["consistent"] * 2
    assert verdicts(planted(20, size=0.0, seed=1)) == [NOTHING] * 2


def test_pairs_that_agree_on_a_direction_against_some_others_are_weak():
    found = reliability(planted(150, size=1.5, against=45), **QUICK)
    assert (found.frame["low"] > 0.5).all()
    assert set(found.frame["verdict"]) == {"weak"}
    np.testing.assert_allclose(found.frame["against"], 45 / 150, atol=0.02)
    assert set(found.pairs(0)["pair"][:45]) == set(range(45))
    assert found.frame["because"][0].endswith("45 of 150 pairs against: more than 20% are against")


def test_pairs_half_of_which_say_the_opposite_are_nothing_to_steer_with():
    assert verdicts(planted(40, size=1.0, against=20)) == [NOTHING] * 2


def test_of_pure_noise_one_set_in_twenty_at_most_reads_otherwise_than_nothing_at_any_of_its_layers():
    n_sets = 120
    every = [
        verdicts(
            planted(16, letter=3.0 if seed % 2 else None, n_layers=4, d_model=24, falling=0.5, seed=seed),
            n_resamples=199,
            seed=seed,
        )
        for seed in range(n_sets)
    ]
    alarms = sum(set(one) != {NOTHING} for one in every)
    assert alarms <= scipy.stats.binom.ppf(0.999, n_sets, 0.05)
    assert not any("consistent" in one for one in every)


def test_held_out_pairs_of_noise_are_against_as_often_as_not_whatever_their_letter():
    """Where the errors of letter and direction correlate, one letter's pairs agree and the other's do not."""
    cosines = {ORDERS[0]: [], ORDERS[1]: []}
    for seed in range(60):
        activations = planted(30, letter=2.0, n_first=20, n_layers=1, d_model=600, seed=seed)
        groups, _, gram = letter_free(activations)
        for letters, cosine in zip(activations.letters, held_out_cosines(gram, held_out(groups)), strict=True):
            cosines[letters].append(cosine < 0)
    for letters, against in cosines.items():
        assert np.mean(against) == pytest.approx(0.5, abs=0.06), letters


# ---- both letter orders of a question ---------------------------------------------------------------------------


def both_orders(n_joined, n_single=0, *, size=0.0, letter=8.0, noise_of_order=0.3, seed=0, n_layers=2, shuffled=True):
    """Questions of which the first `n_joined` stand in both letter orders, as activations with hashes.

    A question has noise of its own that both orders share, and each order some more.
    """
    rng = np.random.default_rng(seed)
    n, d = n_joined + n_single, 40
    direction, letter_direction = (one / np.linalg.norm(one) for one in rng.standard_normal((2, d)))
    questions = size * direction + rng.standard_normal((n, n_layers, d)) / np.sqrt(d)
    rows = [(q, order) for q in range(n) for order in ((0, 1) if q < n_joined else (q % 2,))]
    if shuffled:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    values, letters = [], []
    for question, order in rows:
        difference = questions[question] + noise_of_order * rng.standard_normal((n_layers, d)) / np.sqrt(d)
        difference = difference + (1 - 2 * order) * letter * letter_direction
        middle = rng.standard_normal((n_layers, d))
        values.append([middle + difference / 2, middle - difference / 2])
        letters.append(ORDERS[order])
    hashes = " ".join(f"{question:08x}" for question, _ in rows)
    return activations_of(np.array(values), tuple(letters), pair_hashes=hashes), [question for question, _ in rows]


def joined_by_hand(activations, questions):
    """The mean of each question's pairs, as completions."""
    order = list(dict.fromkeys(questions))
    rows = [[i for i, question in enumerate(questions) if question == one] for one in order]
    return activations_of(np.stack([activations.values[one].mean(0).numpy() for one in rows])), rows


def test_a_set_of_both_letter_orders_reads_as_the_means_of_its_questions():
    given, questions = both_orders(12, size=0.6)
    by_hand, rows = joined_by_hand(given, questions)
    found, expected = reliability(given, **QUICK), reliability(by_hand, **QUICK)
    pd.testing.assert_frame_equal(found.frame, expected.frame)
    assert found.n_pairs == 12
    assert set(found.frame["verdict"]) == {"consistent"}
    assert found.settings["joined"] == "12 questions in both letter orders, as one pair each"
    assert (found.settings["pairs"], found.settings["taken_out"]) == ("12", "answer letter")
    assert found.members == tuple(map(tuple, rows))
    table = found.pairs(1)
    assert table["other_order"].tolist() == [dict(rows)[pair] for pair in table["pair"]]
    np.testing.assert_allclose(table["cosine"], np.sort(expected.cosines[1]), atol=1e-6)
    assert "other_order" not in expected.pairs(1)
    assert expected.settings["joined"] == "nothing"


def test_a_letter_in_both_orders_is_no_signal_and_two_orders_of_noise_do_not_agree_with_each_other():
    """Taken as two pairs, both orders of a question would share its noise, and noise would be found consistent."""
    every = [
        verdict
        for seed in range(30)
        for verdict in verdicts(both_orders(12, n_single=seed % 3 * 8, seed=seed)[0], seed=seed)
    ]
    assert "consistent" not in every
    assert every.count(NOTHING) >= 53  # of 60: a set in twenty may read weak, at both of its layers


def test_joined_questions_stand_beside_pairs_with_letters_as_a_group_of_their_own():
    given, questions = both_orders(6, 10, size=0.7)
    found = reliability(given, **QUICK)
    assert set(found.frame["verdict"]) == {"consistent"}
    assert found.n_pairs == 16
    stronger, _ = both_orders(6, 10, size=0.7, letter=30.0)
    numbers = ["split_half", "low", "high", "p", "agreement", "against", "d_prime", "shared", "cone"]
    np.testing.assert_allclose(
        reliability(stronger, **QUICK).frame[numbers], found.frame[numbers], rtol=1e-3, atol=1e-4
    )
    joined, members = join_letter_orders(given)
    groups = group_by_letters(joined.letters)
    assert sorted(groups.sizes) == [5, 5, 6]
    assert sum(groups.shares) == pytest.approx(1)
    free = next(k for k, other in enumerate(groups.opposite) if other == k)
    assert {questions[members[i][0]] for i in groups.groups[free]} == set(range(6))
    assert groups.shares[free] == 6 / 16


def test_joined_questions_beside_lettered_pairs_are_compared_with_others_only():
    joined, _ = join_letter_orders(both_orders(5, 8, size=0.5)[0])
    groups, _, gram = letter_free(joined)
    raw = differences_of(joined)
    weights = held_out(groups)
    found = held_out_cosines(gram, weights)
    free = next(k for k, other in enumerate(groups.opposite) if other == k)
    lettered = [k for k in range(3) if k != free]
    for pair in range(13):
        means = {k: raw[groups.groups[k]].mean(0) for k in range(3)}
        effect, number = 0.0, groups.group_of()[pair]
        rest = np.setdiff1d(groups.groups[number], pair)
        means[number] = raw[rest].mean(0)
        if number != free:
            (other,) = (k for k in lettered if k != number)
            rank = list(groups.groups[number]).index(pair)
            means[other] = raw[np.delete(groups.groups[other], rank)].mean(0)
            effect = (means[number] - means[other]) / 2
        others = sum(groups.shares[k] * means[k] for k in range(3))
        assert found[pair] == pytest.approx(cosine_similarity([raw[pair] - effect], [others])[0, 0], abs=1e-6)
        np.testing.assert_allclose(weights.middle[pair, rest].sum(), 1 if number == free else 0.5)


def test_held_out_noise_is_against_as_often_as_not_in_every_group_of_a_mixed_set():
    against = {True: [], False: []}
    for seed in range(60):
        joined, _ = join_letter_orders(both_orders(8, 14, n_layers=1, seed=seed)[0])
        groups, _, gram = letter_free(joined)
        for letters, cosine in zip(joined.letters, held_out_cosines(gram, held_out(groups)), strict=True):
            against[letters == ("", "")].append(cosine < 0)
    for free, signs in against.items():
        assert np.mean(signs) == pytest.approx(0.5, abs=0.06), free


def test_exchanging_the_sides_of_a_mixed_set_is_all_its_exchanges():
    joined, _ = join_letter_orders(both_orders(4, 8, size=0.15, noise_of_order=0, seed=3)[0])
    groups, freed, gram = letter_free(joined)
    ours = by_chance(squared_lengths(gram, relabelled(groups, 20001, np.random.default_rng(0)))[:, None])[0]
    free = next(k for k, other in enumerate(groups.opposite) if other == k)
    one, two = (group for k, group in enumerate(groups.groups) if k != free)
    between = freed * groups.signs[:, None]
    both, squares = np.concatenate([one, two]), []
    for signs in product([-1, 1], repeat=4):
        alone = groups.shares[free] * np.mean(np.array(signs)[:, None] * freed[groups.groups[free]], axis=0)
        for chosen in combinations(both, len(one)):
            rest = np.setdiff1d(both, chosen)
            pairs = groups.shares[1 if free == 0 else 0]
            squares.append(np.sum((alone + pairs * (between[list(chosen)].mean(0) - between[rest].mean(0))) ** 2))
    own = np.sum(direction_with_shares(freed, groups) ** 2)
    expected = np.mean(np.array(squares) >= own - 1e-9)
    assert 0.005 < expected < 0.6
    assert ours == pytest.approx(expected, abs=0.012)


def direction_with_shares(differences, groups):
    parts = zip(groups.groups, groups.shares, strict=True)
    return sum(share * differences[group].mean(0) for group, share in parts)


def test_too_few_joined_questions_beside_others_are_told_of():
    given, _ = both_orders(3, 10)
    with pytest.raises(ValueError, match="got 3 questions in both letter orders beside 10 in one, expected none or at"):
        reliability(given, **QUICK)
    few, _ = both_orders(7)
    with pytest.raises(
        ValueError, match=r"got 7 pairs \(7 of them a question in both letter orders, which counts once\)"
    ):
        reliability(few, **QUICK)


def test_a_question_whose_answers_are_exchanged_is_not_its_other_letter_order():
    given, _ = both_orders(10, shuffled=False)
    values = given.values.clone()
    values[5] = values[4].flip(0)  # "(A) Yes" positive in one, "(B) No" in the other
    contradicting = activations_of(values, given.letters, pair_hashes=given.provenance.details["pair_hashes"])
    with pytest.raises(ValueError, match="pair 5 is pair 4 with its answers exchanged"):
        reliability(contradicting, **QUICK)


def test_both_letter_orders_of_a_model_are_joined_and_saved(tiny_chat, tmp_path):
    orders = [("(A)", "(B)"), ("(B)", "(A)")]
    one = ContrastSet.from_pairs(
        [(f"Is {n} more?\n\nChoices:\n (A) Yes, {n}\n (B) No", *orders[n % 2]) for n in range(9)], name="numbers"
    )
    both = ContrastSet.from_pairs([*one, *(pair.swapped() for pair in one)], name="numbers")
    found = reliability(pair_activations(tiny_chat, both, layers=[1, 4], progress=False), **QUICK)
    assert found.members == tuple((n, n + 9) for n in range(9))
    loaded = Reliability.load(found.save(tmp_path / "r.parquet"))
    assert loaded.members == found.members
    pd.testing.assert_frame_equal(loaded.pairs(4), found.pairs(4))
    assert "9 pairs" in repr(found)


# ---- numbers beside the slow way ------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", [None, 4.0])
def test_the_split_half_cosine_is_that_of_all_splits_into_halves(letter):
    activations = planted(8, size=0.6, letter=letter)
    groups, freed, gram = letter_free(activations)
    halves = [[set(half) for half in combinations(group, len(group) // 2)] for group in groups.groups]
    products, squares = [], []
    for chosen in product(*halves):
        half = set.union(*chosen)
        one, other = (direction_of(freed, groups, list(part)) for part in (half, set(range(8)) - half))
        products.append(one @ other)
        squares.append((one @ one + other @ other) / 2)
    shared = shared_part(gram, groups)
    assert cosine_of(shared, 4)[0] == pytest.approx(np.mean(products) / np.mean(squares), rel=1e-9)


def test_the_split_half_cosine_is_near_the_mean_cosine_of_random_halves():
    activations = planted(30, size=0.3, letter=3.0)
    groups, freed, gram = letter_free(activations)
    rng, cosines = np.random.default_rng(0), []
    for _ in range(300):
        half = np.concatenate([rng.permutation(group)[: len(group) // 2] for group in groups.groups])
        one, other = direction_of(freed, groups, half), direction_of(freed, groups, np.setdiff1d(np.arange(30), half))
        cosines.append(cosine_similarity([one], [other])[0, 0])
    assert cosine_of(shared_part(gram, groups), 15)[0] == pytest.approx(np.mean(cosines), abs=0.02)


def test_pairs_drawn_twice_are_not_compared_with_themselves():
    activations = planted(8, size=0.0)
    groups, freed, gram = letter_free(activations)
    counts = np.array([[2.0, 0, 1, 1, 3, 0, 1, 0]])
    drawn = np.repeat(np.arange(8), counts[0].astype(int))
    apart = [(i, j) for i in drawn for j in drawn if i != j]
    common = np.mean([freed[i] @ freed[j] for i, j in apart])
    square = np.mean([freed[i] @ freed[i] for i in drawn])
    assert shared_part(gram, groups, counts)[0] == pytest.approx(common / square, rel=1e-9)


@pytest.mark.parametrize("letter", [None, 4.0])
def test_the_bootstrap_is_scipys(letter):
    groups, _, gram = letter_free(planted(24, size=0.5, letter=letter))
    ours = shared_part(gram, groups, resamples(groups, 4000, np.random.default_rng(0)))

    def statistic(*drawn):
        counts = np.bincount(np.concatenate(drawn), minlength=24)[None].astype(float)
        return shared_part(gram, groups, counts)[0]

    theirs = scipy.stats.bootstrap(
        groups.groups, statistic, method="percentile", vectorized=False, n_resamples=4000, rng=np.random.default_rng(1)
    )
    ends = theirs.confidence_interval
    np.testing.assert_allclose(np.quantile(ours, [0.025, 0.975]), [ends.low, ends.high], atol=0.006)
    assert np.std(ours) == pytest.approx(theirs.standard_error, rel=0.06)


def test_the_bootstrap_over_questions_is_scipys():
    values = np.random.default_rng(0).exponential(size=(40, 2))
    low, high = bootstrap_interval(values, n_resamples=8000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, axis=0, method="percentile", n_resamples=8000, rng=np.random.default_rng(1)
    )
    np.testing.assert_allclose(low, theirs.confidence_interval.low, atol=0.02)
    np.testing.assert_allclose(high, theirs.confidence_interval.high, atol=0.02)


def test_a_resample_has_two_different_pairs_of_each_group_at_least():
    groups = group_by_letters([ORDERS[i % 2] for i in range(8)])
    counts = resamples(groups, 3000, np.random.default_rng(0))
    for group in groups.groups:
        assert (counts[:, group].sum(1) == 4).all()
        assert counts[:, group].max() == 3


def test_exchanging_sides_at_random_is_scipys_permutation_test():
    rng = np.random.default_rng(3)
    completions = planted(8, size=0.35, d_model=12, seed=5)
    groups, freed, gram = letter_free(completions)
    ours = by_chance(squared_lengths(gram, relabelled(groups, 20001, rng))[:, None])[0]
    theirs = scipy.stats.permutation_test(
        (np.arange(8), np.arange(8) + 8),
        lambda one, _: np.sum(np.mean(np.where(one < 8, 1, -1)[:, None] * freed[one.astype(int) % 8], axis=0) ** 2),
        permutation_type="samples",
        vectorized=False,
        alternative="greater",
    ).pvalue
    assert 0.01 < theirs < 0.5
    assert ours == pytest.approx(theirs, abs=0.012)


def test_relabelling_letters_is_scipys_test_of_two_groups():
    rng = np.random.default_rng(3)
    groups, freed, gram = letter_free(planted(9, size=0.35, letter=3.0, n_first=5, d_model=12, seed=2))
    between = freed * groups.signs[:, None]  # act(A) - act(B)
    ours = by_chance(squared_lengths(gram, relabelled(groups, 20001, rng))[:, None])[0]
    theirs = scipy.stats.permutation_test(
        groups.groups,
        lambda one, other: np.sum((between[one].mean(0) - between[other].mean(0)) ** 2),
        permutation_type="independent",
        vectorized=False,
        alternative="greater",
    ).pvalue
    assert 0.01 < theirs < 0.6
    assert ours == pytest.approx(theirs, abs=0.012)


def test_p_is_over_all_layers_that_are_asked_for():
    squares = np.random.default_rng(0).exponential(size=(500, 3))
    squares[0] = [4.0, 0.5, 2.5]
    heights = (squares - squares.mean(0)) / squares.std(0)
    expected = [np.mean([row.max() >= own for row in heights]) for own in heights[0]]
    np.testing.assert_allclose(by_chance(squares), expected)
    assert by_chance(squares)[0] > by_chance(squares[:, :1])[0]


def test_agreement_is_the_mean_cosine_of_two_pairs():
    activations = planted(20, size=0.5, letter=4.0)
    _, freed, _ = letter_free(activations, 1)
    cosines = cosine_similarity(freed)[np.triu_indices(20, 1)]
    assert reliability(activations, **QUICK).frame["agreement"][1] == pytest.approx(cosines.mean(), rel=1e-6)


@pytest.mark.parametrize("letter", [None, 4.0])
def test_each_pair_is_compared_with_the_direction_of_others_only(letter):
    activations = planted(12, size=0.4, letter=letter)
    groups, _, gram = letter_free(activations)
    raw = differences_of(activations)
    found = held_out_cosines(gram, held_out(groups))
    for number, group in enumerate(groups.groups):
        for rank, pair in enumerate(group):
            out = [pair]
            own = raw[pair]
            if letter is not None:
                partner = groups.groups[1 - number][rank]
                out.append(partner)
                here, there = (np.setdiff1d(groups.groups[k], out) for k in (number, 1 - number))
                own = own - (raw[here].mean(0) - raw[there].mean(0)) / 2
            others = direction_of(raw, groups, np.setdiff1d(np.arange(12), out))
            assert found[pair] == pytest.approx(cosine_similarity([own], [others])[0, 0], abs=1e-6)


@pytest.mark.parametrize("letter", [None, 4.0])
def test_d_prime_is_of_held_out_pairs_along_the_others_direction(letter):
    activations = planted(12, size=0.6, letter=letter)
    groups, freed, gram = letter_free(activations)
    sides = activations[0].double().numpy()
    middles = sides.mean(1)
    raw = differences_of(activations)
    positive, negative = [], []
    for pair in range(12):
        number = next(n for n, group in enumerate(groups.groups) if pair in group)
        out, effect = [pair], 0.0
        if letter is not None:
            out.append(groups.groups[1 - number][list(groups.groups[number]).index(pair)])
            here, there = (np.setdiff1d(groups.groups[k], out) for k in (number, 1 - number))
            effect = (raw[here].mean(0) - raw[there].mean(0)) / 2
        others = np.setdiff1d(np.arange(12), out)
        direction = direction_of(raw, groups, others)
        direction /= np.linalg.norm(direction)
        centre = middles[others].mean(0)
        positive.append((sides[pair, 0] - effect / 2 - centre) @ direction)
        negative.append((sides[pair, 1] + effect / 2 - centre) @ direction)
    spread = np.sqrt((np.var(positive, ddof=1) + np.var(negative, ddof=1)) / 2)
    expected = (np.mean(positive) - np.mean(negative)) / spread
    assert d_prime(gram, freed @ middles.T, held_out(groups)) == pytest.approx(expected, rel=1e-6)
    assert reliability(activations, **QUICK).frame["d_prime"][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_first", [10, 13])
def test_influence_is_the_angle_by_which_the_direction_turns(n_first):
    activations = planted(20, size=0.5, letter=4.0, n_first=n_first)
    groups, freed, gram = letter_free(activations)
    whole, found = direction_of(freed, groups), influences(gram, groups)
    for pair in range(20):
        without = direction_of(freed, groups, np.setdiff1d(np.arange(20), pair))
        cosine = cosine_similarity([whole], [without])[0, 0]
        assert found[pair] == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-5)


def test_one_pair_of_another_kind_has_the_largest_influence():
    values = planted(20, size=0.5).values.clone()
    values[7, 0] *= 6
    found = reliability(activations_of(values.numpy()), **QUICK)
    assert int(found.influences[0].argmax()) == 7


def test_the_cone_holds_the_planted_direction_as_often_as_it_says():
    held, n_sets = 0, 150
    for seed in range(n_sets):
        rng = np.random.default_rng(seed)
        differences = rng.standard_normal((20, 60)) + 0.5
        groups = group_by_letters([ORDERS[i % 2] for i in range(20)])
        freed, _ = without_letter(differences, groups)
        gram = freed @ freed.T
        half = cone(gram, groups, resamples(groups, 300, rng), 0.95)
        angle = np.degrees(np.arccos(cosine_similarity([direction_of(freed, groups)], np.ones((1, 60)))[0, 0]))
        held += angle <= half
        assert half < 60
    assert held / n_sets >= 0.92


@pytest.mark.parametrize("letter", [None, 4.0])
def test_the_cone_is_the_quantile_of_the_angles_that_resampled_errors_make(letter):
    groups, freed, gram = letter_free(planted(20, size=0.8, letter=letter, d_model=6))
    counts = resamples(groups, 200, np.random.default_rng(0))
    whole, angles = direction_of(freed, groups), []
    for drawn in counts.astype(int):
        error = np.zeros(6)
        for group in groups.groups:
            repeated = np.repeat(freed[group], drawn[group], axis=0).mean(0)
            size = len(group)
            error += (repeated - freed[group].mean(0)) * np.sqrt(size / (size - 1)) / len(groups.groups)
        across = error - (error @ whole) / (whole @ whole) * whole
        angles.append(np.degrees(np.arcsin(min(1, np.linalg.norm(across) / np.linalg.norm(whole)))))
    assert cone(gram, groups, counts, 0.95) == pytest.approx(np.quantile(angles, 0.95), rel=1e-9)


def test_the_cone_of_noise_is_any_direction():
    groups, _, gram = letter_free(planted(20, d_model=200))
    assert cone(gram, groups, resamples(groups, 300, np.random.default_rng(0)), 0.95) == 90


def test_the_interval_of_the_split_half_cosine_holds_what_other_pairs_would_give():
    n_sets, held, expected = 100, 0, 20 * 0.25 / 2 / (1 + 20 * 0.25 / 2)
    for seed in range(n_sets):
        row = reliability(planted(20, size=0.5, n_layers=1, letter=3.0, seed=seed), **QUICK).frame.iloc[0]
        held += row["low"] <= expected <= row["high"]
    assert held / n_sets >= 0.9


def test_as_many_pairs_as_are_said_bring_the_split_half_cosine_to_095():
    first = reliability(planted(60, size=0.7, n_layers=1), **QUICK)
    needed = int(first.frame["pairs_for_95"][0])
    assert needed > 60
    curve = first.learning_curve(0, [needed // 2])
    assert curve["cosine"][0] == pytest.approx(0.95, abs=0.002)
    assert not curve["measured"][0]
    more = [reliability(planted(needed, size=0.7, n_layers=1, seed=s), **QUICK).frame["split_half"][0] for s in (1, 2)]
    assert np.mean(more) == pytest.approx(0.95, abs=0.01)


def test_the_learning_curve_passes_through_the_split_half_cosine():
    found = reliability(planted(20, size=0.5), **QUICK)
    row = found.frame.iloc[1]
    curve = found.learning_curve(1).set_index("n_pairs")
    np.testing.assert_allclose(
        curve.loc[10, ["cosine", "low", "high"]].astype(float), row[["split_half", "low", "high"]].astype(float)
    )
    assert curve["cosine"].is_monotonic_increasing
    assert list(curve.index[curve["measured"]]) == [1, 2, 5, 10]


def test_more_than_two_letters_are_taken_out_two_by_two():
    rng = np.random.default_rng(0)
    orders = [("A", "B"), ("B", "A"), ("A", "C"), ("C", "A")] * 6
    places = {letter: 9 * rng.standard_normal(30) for letter in "ABC"}
    direction = rng.standard_normal(30)
    sides = np.stack([[places[one] + direction, places[two]] for one, two in orders]) + rng.standard_normal((24, 2, 30))
    found = reliability(activations_of(sides[:, :, None], tuple(orders)), **QUICK)
    assert list(found.frame["verdict"]) == ["consistent"]
    sides[:, 0] -= direction
    assert verdicts(activations_of(sides[:, :, None], tuple(orders))) == [NOTHING]


# ---- what is given back, and what is refused --------------------------------------------------------------------


def test_the_result_says_its_verdicts_draws_them_and_is_saved(tmp_path):
    given = planted(20, size=0.6, letter=4.0, layers=(3, 7))
    before = given.values.clone()
    found = reliability(given, **QUICK)
    assert torch.equal(given.values, before)
    assert "b of m, 20 pairs: consistent at layers 3, 7" in repr(found)
    assert found.layers() == (3, 7)
    assert found.layers("weak") == ()
    loaded = Reliability.load(found.save(tmp_path / "r.parquet"))
    pd.testing.assert_frame_equal(loaded.frame, found.frame)
    assert torch.equal(loaded.cosines, found.cosines)
    figure = loaded.plot()
    assert "what 20 pairs agree on" in figure.layout.title.text
    assert any(trace.name == "consistent" for trace in figure.data)
    assert "0 of 20 pairs are against" in found.plot_pairs(7).layout.meta["title"]
    assert "at layer 7" in found.plot_learning(7).layout.title.text
    assert list(found.summary().index) == [3, 7]
    assert reliability(given, layers=[7], **QUICK).frame["layer"].tolist() == [7]


def test_the_same_seed_gives_the_same_numbers():
    given = planted(20, size=0.3)
    pd.testing.assert_frame_equal(reliability(given, **QUICK).frame, reliability(given, **QUICK).frame)


def test_too_few_pairs_are_told_how_many_are_needed():
    with pytest.raises(ValueError, match="got 7 pairs, of which nothing can be said: give at least 8"):
        reliability(planted(7), **QUICK)


def test_one_sided_letters_are_told_of():
    with pytest.raises(ValueError, match=r"A is the positive answer of all 12 pairs of A and B: .*balance_letters"):
        reliability(planted(12, letter=1.0, n_first=12), **QUICK)
    with pytest.raises(
        ValueError, match=r"B is the positive answer of 3 of the 12 pairs of A and B, expected at least 4"
    ):
        reliability(planted(12, letter=1.0, n_first=9), **QUICK)


def test_pairs_that_stand_twice_are_told_of():
    values = planted(12).values.clone()
    values[9] = values[2]
    with pytest.raises(ValueError, match="1 pair stands twice, such as 9, which is 2: a pair agrees with itself"):
        reliability(activations_of(values), **QUICK)


def test_pairs_whose_hash_is_the_same_are_told_of_where_they_are_not_two_letter_orders():
    given = planted(10, letter=1.0)
    with_hash = [*"abcdefghij"]
    with_hash[4] = "c"  # with the same letters
    with pytest.raises(ValueError, match="1 pair stands twice, such as 4, which is 2: a pair agrees"):
        reliability(activations_of(given.values, given.letters, pair_hashes=" ".join(with_hash)), **QUICK)
    with_hash[7] = "c"  # three times
    with pytest.raises(ValueError, match="2 pairs stand twice, such as 4, which is 2"):
        reliability(activations_of(given.values, given.letters, pair_hashes=" ".join(with_hash)), **QUICK)
    completions = activations_of(given.values, pair_hashes=" ".join("abcdefghia"))
    with pytest.raises(ValueError, match="1 pair stands twice, such as 9, which is 0"):
        reliability(completions, **QUICK)


def test_pairs_whose_sides_are_alike_are_told_of():
    values = planted(12).values.clone()
    values[4, 0, 1] = values[4, 1, 1]
    with pytest.raises(ValueError, match="both sides of pair 4 are the same at layer 1"):
        reliability(activations_of(values), **QUICK)
    assert reliability(activations_of(values), layers=[0], **QUICK).frame["layer"].tolist() == [0]


def test_numbers_that_are_not_finite_are_told_of():
    values = planted(12).values.clone()
    values[4, 0, 1, 3] = float("nan")
    with pytest.raises(ValueError, match="activations of layer 1 are not finite"):
        reliability(activations_of(values), **QUICK)


def test_other_mistakes_are_told_of():
    given = planted(12)
    with pytest.raises(IndexError, match="no activations of layer 9"):
        reliability(given, layers=[9], **QUICK)
    with pytest.raises(ValueError, match="n_resamples must be at least 100, got 5"):
        reliability(given, n_resamples=5)
    found = reliability(given, **QUICK)
    with pytest.raises(ValueError, match="no verdict 'good'"):
        found.layers("good")
    with pytest.raises(ValueError, match="layer 5 was not asked for: expected one of 0-1"):
        found.pairs(5)


def test_activations_of_a_model_are_taken(tiny_chat):
    orders = [("(A)", "(B)"), ("(B)", "(A)")]
    ab = ContrastSet.from_pairs(
        [(f"Is {n} more?\n\nChoices:\n (A) Yes, {n}\n (B) No", *orders[n % 2]) for n in range(8)], name="numbers"
    )
    activations = pair_activations(tiny_chat, ab, layers=[1, 4], progress=False)
    found = reliability(activations, **QUICK)
    assert found.frame["layer"].tolist() == [1, 4]
    assert (found.frame["letter"] > 0.5).all()
    assert np.isfinite(found.summary()[["split_half", "low", "high", "p", "d_prime", "cone"]]).all(axis=None)
