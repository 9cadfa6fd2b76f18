"""Reliability equals refitting by hand, and finds the noise that was planted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airrep.objectives import standardise_labels
from airrep.reliability import LEAST_WEIGHT, RIDGE, reliability_weights, target_reliability


def planted(noise: np.ndarray, subsets: int = 60, seed: int = 0) -> np.ndarray:
    """Labels (T, subsets) of five common causes, and noise of the given variance a target."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((5, subsets))
    mixed = rng.standard_normal((len(noise), 5)) @ causes
    mixed /= mixed.std(axis=1, keepdims=True)
    losses = np.sqrt(1 - noise)[:, None] * mixed
    losses += np.sqrt(noise)[:, None] * rng.standard_normal(mixed.shape)
    return standardise_labels(losses)[0]


def refitted(labels: np.ndarray) -> np.ndarray:
    """The same by a ridge regression a target and subset."""
    targets, subsets = labels.shape
    found = np.zeros(targets)
    for target in range(targets):
        others = np.delete(labels, target, axis=0).T / np.sqrt(targets)  # (M, T - 1)
        predicted = np.zeros(subsets)
        for subset in range(subsets):
            seen = np.delete(np.arange(subsets), subset)
            gram = others[seen].T @ others[seen] + RIDGE * np.eye(targets - 1)
            weights = np.linalg.solve(gram, others[seen].T @ labels[target, seen])
            predicted[subset] = others[subset] @ weights
        if targets > 1:
            found[target] = max(0.0, np.corrcoef(predicted, labels[target])[0, 1]) ** 2
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(3, 9), st.integers(0, 10**6))
def test_it_equals_leaving_every_target_and_subset_out(
    targets: int, subsets: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).standard_normal((targets, subsets))
    np.testing.assert_allclose(target_reliability(labels), refitted(labels), atol=1e-7)


def test_planted_noise_is_found() -> None:
    noise = np.linspace(0.05, 0.95, 40)
    found = target_reliability(planted(noise))
    assert np.corrcoef(found, 1 - noise)[0, 1] > 0.9
    assert found.mean() < np.mean(1 - noise)  # the prediction is not perfect either
    more = target_reliability(planted(noise, subsets=400))
    assert abs(more - (1 - noise)).mean() < 0.1


def test_a_target_of_noise_alone_keeps_a_little_weight() -> None:
    labels = planted(np.array([0.1] * 20 + [1.0] * 20), subsets=200)
    weights = reliability_weights(labels)
    assert weights[:20].min() > 0.7
    assert weights[20:].max() < 0.2
    assert weights.min() == LEAST_WEIGHT


def test_missing_labels_stand_at_the_mean() -> None:
    labels = planted(np.full(30, 0.2))
    gaps = labels.copy()
    gaps[np.random.default_rng(0).random(labels.shape) < 0.05] = np.nan
    filled = np.nan_to_num(gaps)
    np.testing.assert_array_equal(target_reliability(gaps), target_reliability(filled))
    assert abs(target_reliability(gaps) - target_reliability(labels)).mean() < 0.1


@pytest.mark.parametrize("targets", [1, 2])
def test_a_target_without_others_has_no_known_reliability(targets: int) -> None:
    labels = np.full((targets, 6), np.nan)
    labels[0] = [1, -1, 1, -1, 1, -1]
    np.testing.assert_array_equal(target_reliability(labels), np.zeros(targets))
    np.testing.assert_array_equal(reliability_weights(labels), np.full(targets, LEAST_WEIGHT))
