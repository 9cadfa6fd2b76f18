"""Calibration and linear gap: golden numbers, and properties against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airrep.examples import InputError
from airrep.metrics import (
    Resamples,
    calibration,
    calibration_bins,
    interval,
    linear_gap,
    linear_gap_per_target,
)


def draw(shape, draws, seed):
    return Resamples.draw(shape, draws, np.random.default_rng(seed))


def random_case(seed, tied=False, missing=False, shape=(4, 7)):
    rng = np.random.default_rng(seed)
    scores, losses = rng.normal(size=shape), rng.normal(size=shape)
    if tied:
        scores, losses = scores.round(), losses.round()
    if missing:
        losses[rng.random(shape) < 0.3] = np.nan
    return scores, losses


def centred_pairs(scores, losses, columns):
    """Score and negative loss of one target at columns, each minus its mean over known losses."""
    kept = [column for column in columns if np.isfinite(losses[column])]
    x, y = scores[kept], -losses[kept]
    return (x - x.mean(), y - y.mean()) if kept else (np.zeros(1), np.zeros(1))


# Calibration


def test_slope_by_hand():
    scores = [[0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 4.0, 6.0]]
    losses = [[9.0, 7.0, 5.0, 3.0], [6.0, 6.0, 6.0, 6.0]]
    found = calibration(scores, losses, draw((2, 4), 50, 0))
    # Squares 5 and 20, products 10 and 0: one target gains 2 nats a unit, the other none.
    assert found["slope"] == pytest.approx(10 / 25)
    assert found["target_quartiles"] == pytest.approx([0.5, 1.0, 1.5])
    # The slope is 0.4 in both halves.
    assert found["slope_on_held_out"] == pytest.approx(1.0)
    assert found["ci95"] == pytest.approx([0.0, 2.0])  # one target or the other, or both


def test_constant_scores_have_no_slope():
    resamples = draw((1, 4), 20, 0)
    assert calibration([[1.0] * 4], [[1.0, 2.0, 3.0, 4.0]], resamples) is None
    assert calibration_bins([[1.0] * 4], [[1.0, 2.0, 3.0, 4.0]], resamples) == []
    assert calibration([[1.0, 2.0, 3.0]], [[np.nan] * 3], draw((1, 3), 20, 0)) is None


def test_the_held_out_slope_sees_what_the_fitted_one_cannot():
    x = np.linspace(0, 1, 8)[None]
    losses = np.where(np.arange(8) % 2, -2 * x, -x)
    found = calibration(x, losses, draw((1, 8), 20, 0))
    assert found["slope_on_held_out"] == pytest.approx(2.0)
    assert calibration(x, -losses, draw((1, 8), 20, 0))["slope_on_held_out"] is None
    assert calibration(x[:, :3], losses[:, :3], draw((1, 3), 20, 0))["slope_on_held_out"] is None


def test_bins_by_hand():
    scores = [[0.0, 1.0, 2.0, 3.0]]
    found = calibration_bins(scores, [[3.0, 2.0, 1.0, 0.0]], draw((1, 4), 300, 0), bins=2)
    assert [row["predicted"] for row in found] == pytest.approx([-1.0, 1.0])
    assert [row["measured"] for row in found] == pytest.approx([-1.0, 1.0])
    assert [row["count"] for row in found] == [2, 2]
    # Each bin has two values, which a resample of one target can only mix.
    assert [row["low"] for row in found] == pytest.approx([-1.5, 0.5])
    assert [row["high"] for row in found] == pytest.approx([-0.5, 1.5])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_slope_is_that_of_indices(seed, tied, missing):
    scores, losses = random_case(seed, tied, missing)
    resamples = draw(losses.shape, 5, seed)
    found = calibration(scores, losses, resamples)

    def slope(rows, columns):
        pairs = [centred_pairs(scores[row], losses[row], columns) for row in rows]
        square = sum((x * x).sum() for x, _ in pairs)
        return sum((x * y).sum() for x, y in pairs) / square if square > 1e-9 else 0.0

    if found is None:
        assert slope(range(4), range(7)) == 0
        return
    assert found["slope"] == pytest.approx(slope(range(4), range(7)), abs=1e-9)
    drawn = [
        slope(
            np.repeat(np.arange(4), resamples.targets[:, number].astype(int)),
            np.repeat(np.arange(7), resamples.subsets[:, number].astype(int)),
        )
        for number in range(5)
    ]
    assert found["ci95"] == pytest.approx(interval(drawn), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.integers(1, 6))
def test_bins_are_those_of_single_pairs(seed, tied, missing, bins):
    scores, losses = random_case(seed, tied, missing)
    resamples = draw(losses.shape, 6, seed)
    found = calibration_bins(scores, losses, resamples, bins)
    calibrated = calibration(scores, losses, resamples)
    known = np.isfinite(losses)
    if calibrated is None:
        assert found == []
        return
    x, y = np.zeros(losses.shape), np.zeros(losses.shape)
    for row in np.flatnonzero(known.any(axis=1)):
        x[row, known[row]], y[row, known[row]] = centred_pairs(scores[row], losses[row], range(7))
    predicted = calibrated["slope"] * x
    assert sum(one["count"] for one in found) == known.sum()
    means = [one["predicted"] for one in found]
    assert means == sorted(means)
    # Together the bins are everything, and the line through everything has slope 1.
    assert np.dot([one["count"] for one in found], [one["measured"] for one in found]) == (
        pytest.approx(0, abs=1e-9)
    )
    if bins == 1:
        weights = known[..., None] * resamples.targets[:, None] * resamples.subsets
        total = weights.sum(axis=(0, 1))
        drawn = (y[..., None] * weights).sum(axis=(0, 1))[total > 0] / total[total > 0]
        assert found[0]["predicted"] == pytest.approx(predicted[known].mean(), abs=1e-9)
        if len(drawn):
            assert (found[0]["low"], found[0]["high"]) == pytest.approx(interval(drawn), abs=1e-9)


def test_a_nonlinear_score_bends_the_bins():
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(30, 40))
    losses = -effect + 0.1 * rng.normal(size=effect.shape)
    resamples = draw(effect.shape, 200, 0)
    straight = calibration_bins(effect, losses, resamples)
    bent = calibration_bins(effect**3, losses, resamples)
    assert len(straight) == 10
    assert all(one["low"] < one["measured"] < one["high"] for one in straight)
    assert straight[-1]["measured"] == pytest.approx(straight[-1]["predicted"], rel=0.05)
    # Few extreme scores hold the line of the cubes, so the top tenth as a whole lies above it.
    assert bent[-1]["low"] > 1.2 * bent[-1]["predicted"]


# Linear gap


def memberships(subsets, pool_size):
    """Standardised memberships (M, N), written out."""
    members = np.zeros((len(subsets), pool_size))
    for number, subset in enumerate(subsets):
        members[number, subset] = 1
    chance = members.mean()
    variance = chance * (1 - chance)
    if np.ptp(members.sum(axis=1)) == 0:
        variance *= pool_size / (pool_size - 1)
    return (members - chance) / variance**0.5


def plain_gap(residual, x):
    """The formula as it is printed."""
    size = len(residual)
    total = residual @ x
    return (total @ total - (residual**2 * (x * x).sum(axis=1)).sum()) / (size * (size - 1))


def some_subsets(rng, count, pool_size, fixed):
    if fixed:
        return [rng.choice(pool_size, size=2, replace=False) for _ in range(count)]
    return [np.flatnonzero(rng.random(pool_size) < 0.4) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_gap_is_the_printed_formula(seed, fixed, missing):
    scores, losses = random_case(seed, missing=missing)
    subsets = some_subsets(np.random.default_rng(seed + 1), 7, 5, fixed)
    x = memberships(subsets, 5)
    gap, variance = linear_gap_per_target(scores, losses, subsets, 5)
    shares, lists = [], []
    for row in range(4):
        known = np.isfinite(losses[row])
        if known.sum() < 3:
            assert np.isnan(gap[row])
            continue
        residual = -losses[row] - scores[row]
        residual -= residual[known].mean()
        assert gap[row] == pytest.approx(plain_gap(residual[known], x[known]))
        assert variance[row] == pytest.approx(losses[row, known].var(ddof=1))
        shares.append(gap[row] / variance[row])
        lists.append(
            [
                plain_gap(residual[known & kept], x[known & kept]) / variance[row]
                for kept in ~np.eye(7, dtype=bool)
            ]
        )
    found = linear_gap(scores, losses, subsets, 5)
    if not shares:
        assert found is None
        return
    assert found["share"] == pytest.approx(np.mean(shares))
    without = np.mean(lists, axis=0)
    error = np.sqrt(6 / 7 * ((without - without.mean()) ** 2).sum())
    half = (found["ci95"][1] - found["ci95"][0]) / 2
    assert half == pytest.approx(1.959964 * error, rel=1e-5)


@pytest.mark.parametrize("fixed", [True, False])
def test_gap_is_the_share_of_planted_linear_effects(fixed):
    rng = np.random.default_rng(3)
    subsets = [
        rng.choice(20, size=8, replace=False) if fixed else np.flatnonzero(rng.random(20) < 0.4)
        for _ in range(600)
    ]
    x = memberships(subsets, 20)
    linear = rng.normal(size=(30, 20)) @ x.T
    wobble = rng.normal(size=linear.shape) * linear.std()
    losses = -(linear + wobble)
    nothing = linear_gap(np.zeros(losses.shape), losses, subsets, 20)
    assert nothing["ci95"][0] < 0.5 < nothing["ci95"][1]
    assert nothing["share"] == pytest.approx(0.5, abs=0.05)
    everything = linear_gap(linear, losses, subsets, 20)
    assert everything["ci95"][0] < 0 < everything["ci95"][1]
    half = linear_gap(linear / 2, losses, subsets, 20)
    assert half["share"] == pytest.approx(0.125, abs=0.03)


def test_there_is_no_gap_where_nothing_varies():
    subsets = [[0], [1], [2]]
    assert linear_gap([[1.0, 2.0, 3.0]], [[2.0, 2.0, 2.0]], subsets, 3) is None
    assert linear_gap([[1.0, 2.0]], [[1.0, 2.0]], subsets[:2], 3) is None
    assert linear_gap([[1.0, 2.0, 3.0]], [[1.0, 2.0, 4.0]], [[0, 1], [1, 0], [0, 1]], 2) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: calibration([[1, 2]], [[1, 2]], draw((1, 3), 5, 0)),
            "draw them for these losses",
        ),
        (
            lambda: calibration_bins([[1, 2]], [[1, 2]], draw((2, 2), 5, 0)),
            "resamples are of 2 targets",
        ),
        (lambda: calibration_bins([[1, 2]], [[1, 2]], draw((1, 2), 5, 0), 0), "bins is 0"),
        (lambda: calibration([[1, 2]], [[1]], draw((1, 2), 5, 0)), "the losses"),
        (lambda: linear_gap([[1, np.inf, 2]], [[1, 2, 3]], [[0]] * 3, 2), "predictions hold"),
        (lambda: linear_gap([[1, 2, 3]], [[1, 2, 3]], [[0]] * 2, 2), "2 subsets were given for 3"),
        (lambda: linear_gap([[1, 2, 3]], [[1, 2, 3]], [[5]] * 3, 2), "a pool of 2"),
        (
            lambda: linear_gap_per_target([[1, 2, 3]], [[1, 2, 3]], [[0, 1]] * 3, 2),
            "membership must vary",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
