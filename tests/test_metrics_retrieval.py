"""Retrieval and mislabel detection: golden numbers, and properties against brute force."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from airrep.examples import InputError
from airrep.metrics import (
    harmfulness,
    mean_reciprocal_rank,
    mislabel_auc,
    ndcg_at_k,
    recall_at_k,
)


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


def test_ndcg_by_hand():
    scores = [[0.9, 0.1, 0.8, 0.7]]
    # Proponents at ranks 1 and 3 of the best 1 and 2.
    best = 1 + 1 / np.log2(3)
    assert ndcg_at_k(scores, [[0, 3]], 4) == pytest.approx((1 + 1 / 2) / best)
    assert ndcg_at_k(scores, [[0, 3]], 2) == pytest.approx(1 / best)
    assert ndcg_at_k(scores, [[1]], 3) == 0
    # Two equal scores: the proponent is first or second.
    assert ndcg_at_k([[1.0, 1.0]], [[1]], 5) == pytest.approx(best / 2)


def test_harm_and_its_auc_by_hand():
    # The second target has scores a hundred times larger and says the same; the third nothing.
    scores = [[-1.0, 0.0, 1.0], [-100.0, 0.0, 100.0], [7.0, 7.0, 7.0]]
    np.testing.assert_allclose(harmfulness(scores), np.array([2, 0, -2]) / 3 * 1.5**0.5)
    # Flipped are 3rd and 1st most harmful of 5: 2 + 3 of the 6 pairs are in order, less one.
    found = mislabel_auc([[1.0, 2.0, 3.0, 4.0, 5.0]], [True, False, True, False, False])
    assert found["auc"] == pytest.approx(5 / 6)
    assert found["flipped"] == 2
    assert found["ci95"][1] == 1.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_retrieval_is_the_mean_over_all_orders_of_ties(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, size=5).astype(float)
    rows = rng.choice(5, size=2, replace=False)
    recalls, reciprocals, gains = [], [], []
    for places in permutations(range(5)):
        order = np.lexsort((places, -scores))
        ranks = np.flatnonzero(np.isin(order, rows))
        recalls.append((ranks < k).mean())
        reciprocals.append(1 / (ranks.min() + 1))
        gains.append((1 / np.log2(ranks[ranks < k] + 2)).sum())
    assert recall_at_k([scores], [rows], k) == pytest.approx(np.mean(recalls))
    assert mean_reciprocal_rank([scores], [rows]) == pytest.approx(np.mean(reciprocals))
    best = (1 / np.log2(np.arange(min(k, 2)) + 2)).sum()
    assert ndcg_at_k([scores], [rows], k) == pytest.approx(np.mean(gains) / best)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_ndcg_and_auc_are_those_of_scikit_learn(seed, k):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, size=(3, 8)).astype(float)
    wanted = np.zeros((3, 8))
    wanted[:, :2] = 1
    proponents = [np.flatnonzero(row) for row in wanted]
    assert ndcg_at_k(scores, proponents, k) == pytest.approx(
        metrics.ndcg_score(wanted, scores, k=k)
    )
    auc = metrics.roc_auc_score(wanted[0], harmfulness(scores))
    assert mislabel_auc(scores, wanted[0])["auc"] == pytest.approx(auc)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_auc_interval_is_that_of_the_matrix_of_pairs(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, size=(1, 12)).astype(float)
    flipped = np.arange(12) < 5
    wrong, sound = -scores[0, flipped][:, None], -scores[0, ~flipped]
    wins = (wrong > sound) + 0.5 * (wrong == sound)
    variance = wins.mean(axis=1).var(ddof=1) / 5 + wins.mean(axis=0).var(ddof=1) / 7
    found = mislabel_auc(scores, flipped)
    low, high = norm.interval(0.95, wins.mean(), max(variance, 1e-18) ** 0.5)
    assert found["auc"] == pytest.approx(wins.mean())
    assert found["ci95"] == pytest.approx([max(low, 0), min(high, 1)], abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall_at_k([[1, 2]], [[0]], 0), "recall_at_k got k = 0"),
        (lambda: ndcg_at_k([[1, 2]], [[0]], 0), "ndcg_at_k got k = 0"),
        (lambda: recall_at_k([[1, 2]], [[]], 1), "No target has proponents"),
        (lambda: recall_at_k([[1, 2]], [[5]], 1), "proponent row 5, outside the pool of 2"),
        (lambda: mean_reciprocal_rank([[1, 2]], [[-1]]), "proponent row -1"),
        (lambda: mean_reciprocal_rank([[1, 2]], []), "one list a target"),
        (lambda: harmfulness([1, 2]), r"shape \(2,\) cannot be averaged"),
        (lambda: harmfulness([[1, np.nan]]), "give finite"),
        (lambda: mislabel_auc([[1, 2, 3]], [1, 0, 0]), "1 of 3 examples are flipped"),
        (lambda: mislabel_auc([[1, 2, 3]], [1, 0]), "in a pool of 3"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
