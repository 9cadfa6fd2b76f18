"""LDS, its resamples and the ceiling: golden numbers, and properties against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, rankdata, spearmanr

from airrep.examples import InputError
from airrep.metrics import (
    Resamples,
    bootstrap_ceiling,
    bootstrap_lds,
    interval,
    lds_per_target,
    noise_ceiling,
    paired_bootstrap,
    resampled_ceiling,
    resampled_lds,
    share_of_ceiling,
    sign_test,
)

RNG = np.random.default_rng(0)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def draw(shape, draws, seed):
    return Resamples.draw(shape, draws, np.random.default_rng(seed))


def picked(resamples, number):
    """Rows and columns of one resample, as indices with repeats."""
    return tuple(
        np.repeat(np.arange(len(counts)), counts[:, number].astype(int))
        for counts in (resamples.targets, resamples.subsets)
    )


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


def test_sign_test_by_hand():
    found = sign_test([0.5, 0.5, 0.5, 0.1, 0.2], [0.1, 0.1, 0.1, 0.2, 0.2])
    # Four decided: 3 of 4 or further from even has probability 2 * (4 + 1) / 16.
    assert found == {"wins": 3, "losses": 1, "ties": 1, "p": pytest.approx(0.625)}
    assert sign_test([0.5], [0.5]) == {"wins": 0, "losses": 0, "ties": 1, "p": 1.0}


def test_share_of_ceiling_by_hand():
    drawn = np.linspace(0.3, 0.5, 101)
    found = share_of_ceiling(0.4, drawn, 0.8, np.full(101, 0.8))
    assert found == {"share": pytest.approx(0.5), "ci95": pytest.approx([0.38125, 0.61875])}
    # One lost ceiling in a hundred lies beyond the upper end; ten leave the interval open.
    one, ten = np.full((2, 101), 0.8)
    one[:1], ten[:10] = 0, 0
    assert share_of_ceiling(0.4, drawn, 0.8, one)["ci95"][1] <= 0.5 / 0.8
    assert share_of_ceiling(0.4, drawn, 0.8, ten) is None
    assert share_of_ceiling(0.4, drawn, 0.0, one) is None


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


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_a_resample_is_the_correlation_of_the_full_ranks(seed, tied, missing):
    rng = np.random.default_rng(seed)
    scores, losses = rng.normal(size=(2, 4, 7)), rng.normal(size=(4, 7))
    if tied:
        scores, losses = scores.round(), losses.round()
    if missing:
        losses[rng.random(losses.shape) < 0.3] = np.nan
    resamples = draw(losses.shape, 3, seed)
    found = resampled_lds(scores, losses, resamples)
    for number in range(3):
        rows, columns = picked(resamples, number)
        for method in range(2):
            for over, (some_rows, some_columns) in {
                "targets": (rows, np.arange(7)),
                "subsets": (np.arange(4), columns),
                "both": (rows, columns),
            }.items():
                rhos = [
                    rank_correlation(scores[method, row], losses[row], some_columns)
                    for row in some_rows
                ]
                assert found[over][method, number] == pytest.approx(np.mean(rhos), abs=1e-9)


def rank_correlation(scores, losses, columns):
    """Pearson's r over columns of the ranks that all known columns have."""
    known = np.isfinite(losses)
    ranks = np.zeros((2, len(losses)))
    ranks[0, known], ranks[1, known] = rankdata(scores[known]), rankdata(-losses[known])
    kept = [column for column in columns if known[column]]
    if not kept or not np.ptp(ranks[:, kept], axis=1).all():
        return 0.0
    return np.corrcoef(ranks[:, kept])[0, 1]


def test_intervals_are_those_of_ranking_again_up_to_one_part_in_the_subsets():
    losses = noise(0, 25, 60)
    scores = -losses + noise(1, 25, 60)
    resamples = draw(losses.shape, 300, 2)
    fixed = resampled_lds([scores], losses, resamples)["both"][0]
    again = []
    for number in range(300):
        cells = np.ix_(*picked(resamples, number))
        again.append(lds_per_target(scores[cells], losses[cells])[0].mean())
    assert interval(fixed) == pytest.approx(interval(again), abs=1 / 60)
    assert np.abs(fixed - again).max() < 2 / 60


def test_bootstrap_covers_the_truth():
    """Targets and subsets are fresh in every trial; the LDS of infinitely many is known."""
    truth = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's rho of normal variables that correlate 0.5
    trials = 60
    covered = 0
    for trial in range(trials):
        losses = noise(trial, 20, 40)
        scores = -0.5 * losses + 0.75**0.5 * noise(1000 + trial, 20, 40)
        low, high = bootstrap_lds(scores, losses, 200, np.random.default_rng(trial))
        covered += low < truth < high
    # Fewer than one trial in a thousand misses this often at 95%; too wide is no fault here.
    assert covered >= binom.ppf(0.001, trials, 0.95)


def test_blocks_change_nothing(monkeypatch):
    losses, scores = noise(0, 9, 8), noise(1, 2, 9, 8)
    losses[3, 2:5] = np.nan
    resamples = draw(losses.shape, 20, 0)
    whole = resampled_lds(scores, losses, resamples)
    monkeypatch.setattr("airrep.metrics.bootstrap.BLOCK", 1)
    for over, drawn in resampled_lds(scores, losses, resamples).items():
        np.testing.assert_allclose(drawn, whole[over], atol=1e-12)


def test_lds_is_that_of_dattri():
    metric = pytest.importorskip("dattri.metric", reason="dattri is another package's LDS")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    scores, losses = rng.normal(size=(5, 20)), rng.normal(size=(5, 12))
    subsets = [np.sort(rng.choice(20, size=6, replace=False)) for _ in range(12)]
    sums = np.stack([scores[:, subset].sum(axis=1) for subset in subsets], axis=1)
    truth = torch.tensor(-losses.T), torch.tensor(np.stack(subsets))
    found, _ = metric.lds(torch.tensor(scores.T), truth)
    np.testing.assert_allclose(lds_per_target(sums, losses)[0], found.numpy(), atol=1e-6)


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
    resamples = draw(losses.shape, 50, 0)
    alone, all_three = (resampled_lds(some, losses, resamples) for some in (scores[:1], scores))
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


def test_the_ceilings_resamples_share_their_targets():
    first = noise(0, 12, 10)
    second = first + noise(1, 12, 10)
    resamples = draw((12, 30), 40, 5)
    shared = resamples.with_subsets(10, np.random.default_rng(1))
    np.testing.assert_array_equal(shared.targets, resamples.targets)
    rows, columns = picked(shared, 7)
    drawn = resampled_ceiling(first, second, shared)
    rho = [rank_correlation(-first[row], second[row], columns) for row in rows]
    assert drawn.shape == (40,)
    assert drawn[7] == pytest.approx(max(np.mean(rho), 0) ** 0.5)


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
        (lambda: resampled_lds([], [[1, 2]], draw((1, 2), 9, 0)), "no subset scores to resample"),
        (
            lambda: resampled_lds([[[1, 2]]], [[1, 2]], draw((1, 3), 9, 0)),
            "resamples are of 1 targets and 3 subsets",
        ),
        (lambda: sign_test([1, 2], [1]), "one finite value a target"),
        (lambda: sign_test([np.nan], [1]), "one finite value a target"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
