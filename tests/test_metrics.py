"""Metrics: golden numbers worked out by hand, and properties against brute force."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from airrep.examples import InputError
from airrep.metrics import (
    bootstrap_ceiling,
    bootstrap_lds,
    interval,
    lds_per_target,
    mean_reciprocal_rank,
    noise_ceiling,
    paired_bootstrap,
    recall_at_k,
    resampled_lds,
)

RNG = np.random.default_rng(0)


class Replay:
    """Gives resamples that were drawn before: first the targets', then the subsets'."""

    def __init__(self, *counts: np.ndarray) -> None:
        self.counts = iter(counts)

    def multinomial(self, total, shares, size):
        counts = next(self.counts)
        assert counts.shape == (size, len(shares))
        assert (counts.sum(axis=1) == total).all()
        return counts


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# Golden numbers


def test_lds_by_hand():
    scores = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 3.0]]
    losses = [[0.9, 0.8, 0.7, 0.6], [0.8, 0.9, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]]
    lds, constant = lds_per_target(scores, losses)
    # Second: one swap, 1 - 6 * 2 / (4 * 15). Third: ranks 1.5 1.5 3 4 against 1 2 3 4.
    np.testing.assert_allclose(lds, [1.0, 0.8, 4.5 / np.sqrt(4.5 * 5)])
    assert constant == 0


def test_constant_rows_count_zero_and_are_counted():
    lds, constant = lds_per_target(
        [[1, 2, 3], [5, 5, 5], [1, 2, 3]], [[3, 2, 1], [3, 2, 1], [2, 2, 2]]
    )
    assert lds.tolist() == [1.0, 0.0, 0.0]
    assert constant == 2


def test_missing_losses_are_left_out_for_their_target_only():
    losses = [
        [3.0, np.nan, 2.0, 1.0],
        [4.0, 3.0, 2.0, 1.0],
        [np.nan] * 4,
        [1.0, np.inf, np.nan, 2.0],
    ]
    lds, constant = lds_per_target([[1.0, 9.0, 2.0, 3.0]] * 2 + [[1.0, 2.0, 3.0, 4.0]] * 2, losses)
    # Second: ranks 1 4 2 3 against 1 2 3 4: 1 - 6 * 6 / 60.
    np.testing.assert_allclose(lds, [1.0, 0.4, 0.0, -1.0])
    assert constant == 1


def test_noise_ceiling_by_hand():
    same, swapped = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]
    found = noise_ceiling([same, same], [same, swapped])
    assert found == {"reliability": pytest.approx(0.9), "lds": pytest.approx(0.9**0.5)}
    opposite = noise_ceiling([same], [same[::-1]])
    assert opposite == {"reliability": pytest.approx(-1), "lds": 0.0}


def test_recall_by_hand():
    scores = [[0.9, 0.1, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]]
    proponents = [[0, 3], [0], []]  # the third target has none and does not count
    assert recall_at_k(scores, proponents, 1) == pytest.approx((1 / 2 + 0) / 2)
    assert recall_at_k(scores, proponents, 3) == pytest.approx((1 + 0) / 2)
    assert recall_at_k(scores, proponents, 50) == 1.0
    # Four equal scores: a proponent is among two of the four places half of the time.
    assert recall_at_k([[1.0] * 4], [[0]], 2) == pytest.approx(0.5)


def test_reciprocal_rank_by_hand():
    assert mean_reciprocal_rank([[0.9, 0.1, 0.8, 0.7]], [[1, 3]]) == pytest.approx(1 / 3)
    assert mean_reciprocal_rank([[1.0, 1.0, 1.0]], [[2]]) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    # Two of three equal places: first at 1 with 2/3, at 2 with 1/3.
    assert mean_reciprocal_rank([[1.0, 1.0, 1.0]], [[0, 2]]) == pytest.approx(2 / 3 + 1 / 6)


def test_interval_is_the_middle_95_percent():
    assert interval(np.arange(1001)) == pytest.approx((25, 975))


# Properties against brute force


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 12), st.booleans())
def test_lds_is_scipys_spearman(seed, targets, subsets, tied):
    scores, losses = noise(seed, targets, subsets), noise(seed + 1, targets, subsets)
    if tied:
        scores, losses = scores.round(), losses.round()
    lds, _ = lds_per_target(scores, losses)
    for row in range(targets):
        if np.ptp(scores[row]) and np.ptp(losses[row]):
            assert lds[row] == pytest.approx(spearmanr(scores[row], -losses[row])[0], abs=1e-9)
        else:
            assert lds[row] == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_resamples_are_those_of_indices(seed, tied, missing):
    rng = np.random.default_rng(seed)
    scores, losses = rng.normal(size=(2, 4, 7)), rng.normal(size=(4, 7))
    if tied:
        scores, losses = scores.round(), losses.round()
    if missing:
        losses[rng.random(losses.shape) < 0.3] = np.nan
    target_counts = rng.multinomial(4, np.full(4, 1 / 4), size=3)
    subset_counts = rng.multinomial(7, np.full(7, 1 / 7), size=3)
    found = resampled_lds(scores, losses, 3, Replay(target_counts, subset_counts))
    for draw in range(3):
        rows = np.repeat(np.arange(4), target_counts[draw])
        columns = np.repeat(np.arange(7), subset_counts[draw])
        for method, given_scores in enumerate(scores):
            for over, picked in {
                "targets": (rows, np.arange(7)),
                "subsets": (np.arange(4), columns),
                "both": (rows, columns),
            }.items():
                lds, _ = lds_per_target(given_scores[np.ix_(*picked)], losses[np.ix_(*picked)])
                assert found[over][method, draw] == pytest.approx(lds.mean(), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_retrieval_is_the_mean_over_all_orders_of_ties(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, size=6).astype(float)
    rows = rng.choice(6, size=2, replace=False)
    recalls, reciprocals = [], []
    for places in permutations(range(6)):
        order = np.lexsort((places, -scores))
        ranks = np.flatnonzero(np.isin(order, rows))
        recalls.append((ranks < k).mean())
        reciprocals.append(1 / (ranks.min() + 1))
    assert recall_at_k([scores], [rows], k) == pytest.approx(np.mean(recalls))
    assert mean_reciprocal_rank([scores], [rows]) == pytest.approx(np.mean(reciprocals))


# Invariances


def test_lds_sees_only_order():
    scores, losses = noise(0, 5, 9), noise(1, 5, 9)
    lds, _ = lds_per_target(scores, losses)
    np.testing.assert_allclose(lds_per_target(np.exp(scores), 3 * losses + 7)[0], lds)
    np.testing.assert_allclose(lds_per_target(-scores, losses)[0], -lds)
    columns = np.random.default_rng(2).permutation(9)
    np.testing.assert_allclose(lds_per_target(scores[:, columns], losses[:, columns])[0], lds)


def test_bootstrap_is_fixed_by_its_generator_and_brackets_the_lds():
    losses = noise(0, 30, 20)
    scores = -losses + noise(1, 30, 20)
    center = lds_per_target(scores, losses)[0].mean()
    for over in ("targets", "subsets", "both"):
        low, high = bootstrap_lds(scores, losses, 300, np.random.default_rng(3), over)
        assert low < center < high
        assert (low, high) == bootstrap_lds(scores, losses, 300, np.random.default_rng(3), over)


def test_an_added_method_changes_no_interval():
    losses, scores = noise(0, 6, 8), noise(1, 3, 6, 8)
    alone = resampled_lds(scores[:1], losses, 50, np.random.default_rng(0))
    all_three = resampled_lds(scores, losses, 50, np.random.default_rng(0))
    for over, drawn in alone.items():
        np.testing.assert_allclose(drawn[0], all_three[over][0], atol=1e-12)


def test_paired_bootstrap_sees_a_difference_that_separate_intervals_hide():
    losses = noise(0, 20, 30) * np.linspace(0, 3, 20)[:, None]
    worse = -losses + noise(1, 20, 30)
    better = -losses + 0.8 * (worse + losses)
    rng = np.random.default_rng
    difference, (low, high) = paired_bootstrap(better, worse, losses, 300, rng(2))
    assert 0 < low < difference < high
    assert (
        bootstrap_lds(worse, losses, 300, rng(2))[1] > bootstrap_lds(better, losses, 300, rng(2))[0]
    )
    assert paired_bootstrap(worse, worse, losses, 50, rng(2)) == (0.0, (0.0, 0.0))


def test_ceiling_interval_skips_losses_missing_in_either_seed():
    first = noise(0, 40, 10)
    second = first + 0.5 * noise(1, 40, 10)
    first[0, 0] = second[1, 1] = np.nan
    low, high = bootstrap_ceiling(first, second, 200, np.random.default_rng(0))
    assert 0 < low < noise_ceiling(first, second)["lds"] < high < 1


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lds_per_target([[1, 2]], [[1, 2, 3]]), r"shape \(1, 2\), the losses \(1, 3"),
        (lambda: lds_per_target([[1]], [[1]]), "needs at least one target and two subsets"),
        (lambda: lds_per_target([[1, np.nan]], [[1, 2]]), "not finite; only losses may miss"),
        (lambda: noise_ceiling([[1, 2]], [[1, 2, 3]]), "losses of the other"),
        (lambda: bootstrap_lds([[1, 2]], [[1, 2]], 0, RNG), "at least one"),
        (lambda: bootstrap_lds([[1, 2]], [[1, 2]], 9, RNG, "rows"), "targets, subsets, both"),
        (lambda: resampled_lds([], [[1, 2]], 9, RNG), "no subset scores to resample"),
        (lambda: recall_at_k([[1, 2]], [[0]], 0), "k = 0"),
        (lambda: recall_at_k([[1, 2]], [[]], 1), "No target has proponents"),
        (lambda: recall_at_k([[1, 2]], [[5]], 1), "proponent row 5, outside the pool of 2"),
        (lambda: mean_reciprocal_rank([[1, 2]], [[-1]]), "proponent row -1"),
        (lambda: mean_reciprocal_rank([[1, 2]], []), "one list a target"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
