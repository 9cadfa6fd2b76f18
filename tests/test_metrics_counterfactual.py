"""Leaving out, removing, selecting, and cost: golden numbers, and brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from airrep.examples import InputError
from airrep.metrics import (
    Resamples,
    against_random,
    break_even,
    data_selection,
    interval,
    leave_one_out_correlation,
    tail_removal,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_leave_one_out_by_hand():
    scores = [[5.0, 1.0, 9.0, 2.0, 4.0], [0.0, 1.0, 0.0, 1.0, 1.0]]
    changes = [[0.1, 0.2, 0.7], [1.0, 2.0, 3.0]]
    found = leave_one_out_correlation(scores, changes, [1, 3, 4], 100, rng())
    # Scores 1 2 4 against 0.1 0.2 0.7; the second target's are all 1.
    expected = 29 / 30 / np.sqrt(14 / 3 * 0.62 / 3)
    assert found["pearson"]["per_target"] == pytest.approx([expected, 0.0])
    assert found["spearman"]["per_target"] == pytest.approx([1.0, 0.0])
    assert found["spearman"]["mean"] == pytest.approx(0.5)
    low, high = found["spearman"]["ci95"]
    assert 0 <= low < 0.5 < high <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_leave_one_out_is_scipys(seed, tied, missing):
    scores, changes = rng(seed).normal(size=(3, 9)), rng(seed + 1).normal(size=(3, 6))
    if tied:
        scores, changes = scores.round(), changes.round()
    if missing:
        changes[rng(seed + 2).random(changes.shape) < 0.3] = np.nan
    rows = rng(seed).choice(9, size=6, replace=False)
    found = leave_one_out_correlation(scores, changes, rows, 2, rng())
    for name, expected in (("pearson", pearsonr), ("spearman", spearmanr)):
        for target in range(3):
            known = np.isfinite(changes[target])
            a, b = scores[target, rows][known], changes[target, known]
            rho = found[name]["per_target"][target]
            if len(a) > 1 and np.ptp(a) and np.ptp(b):
                assert rho == pytest.approx(expected(a, b)[0], abs=1e-9)
            else:
                assert rho == 0


def test_against_random_by_hand():
    found = against_random([1.0, 3.0, 9.0], [[0.0, 1.0], [1.0, 2.0], [0.0, np.nan]], 50, rng())
    assert found["targets"] == 2
    assert (found["mean"], found["random"], found["difference"]) == (2.0, 1.0, 1.0)
    same = against_random([1.0, 2.0], [[1.0], [2.0]], 50, rng())
    assert same["ci95"] == pytest.approx([0.0, 0.0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_against_random_resamples_targets_and_runs(seed, targets, runs):
    values, random = rng(seed).normal(size=targets), rng(seed + 1).normal(size=(targets, runs))
    resamples = Resamples.draw(random.shape, 7, rng(seed))
    drawn = []
    for number in range(7):
        rows = np.repeat(np.arange(targets), resamples.targets[:, number].astype(int))
        columns = np.repeat(np.arange(runs), resamples.subsets[:, number].astype(int))
        drawn.append(values[rows].mean() - random[np.ix_(rows, columns)].mean())
    found = against_random(values, random, 7, rng(seed))
    assert found["ci95"] == pytest.approx(interval(drawn))
    assert found["difference"] == pytest.approx(values.mean() - random.mean())


def test_removal_tells_a_targets_own_examples_from_a_broken_model():
    random = rng(0).normal(size=(20, 5)) * 0.1
    own = 1 + rng(1).normal(size=20) * 0.1
    found = tail_removal(own, random, 200, rng(), control=random)
    assert found["random"]["ci95"][0] > 0.8
    assert found["control"]["ci95"][0] > 0.8
    broken = tail_removal(own, random, 200, rng(), control=own[:, None] + random)
    assert broken["random"]["ci95"][0] > 0.8
    assert abs(broken["control"]["difference"]) < 0.1
    assert tail_removal(own, random, 20, rng())["control"] is None


def test_selection_holds_both_measures_or_says_null():
    found = data_selection(
        [1.0, 2.0], [[2.0], [3.0]], 20, rng(), matches=[1, 1], random_matches=[[0], [1]]
    )
    assert found["loss"]["difference"] == -1.0
    assert found["exact_match"]["difference"] == 0.5
    assert data_selection([1.0], [[2.0]], 20, rng())["exact_match"] is None


def test_break_even_by_hand():
    # 100 s pay for themselves at 1/2 - 1/4 = 0.25 s an example.
    assert break_even(100, 4, 2) == 400
    assert break_even(0, 4, 2) == 0
    assert break_even(1, 3, 1) == 2  # 1.5 examples: the second one pays
    assert break_even(1, 2, 2) is None
    assert break_even(1, 1, 2) is None


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e6), st.floats(0.1, 1e5), st.floats(0.1, 1e5))
def test_break_even_is_where_the_times_cross(seconds, rate, other):
    size = break_even(seconds, rate, other)
    if size is None:
        assert rate <= other * (1 + 1e-12)
    else:
        assert seconds + size / rate <= size / other * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: leave_one_out_correlation([[1, 2]], [[1, 2]], [0, 5], 5, rng()),
            "do not hold the 2 rows left out",
        ),
        (
            lambda: leave_one_out_correlation([[1, 2]], [[1, 2, 3]], [0, 1], 5, rng()),
            "scores of the rows left out have shape",
        ),
        (lambda: against_random([1, 2], [1, 2], 5, rng()), "give (targets,) and (targets, runs)"),
        (lambda: against_random([np.nan], [[1]], 5, rng()), "Every target lacks the value"),
        (lambda: against_random([1], [[1]], 0, rng()), "draws is 0"),
        (lambda: break_even(-1, 1, 1), "seconds of at least 0 and rates above 0"),
        (lambda: break_even(1, 0, 1), "rates 0 and 1"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
