"""Statistics of verification: sample sizes, agreement of labels, and claims about scores."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from airrep.examples import InputError
from airrep.verification import (
    claim_error,
    claim_margin,
    claim_value,
    compare_exact,
    compare_seeds,
    forged_bound,
    is_accepted,
    is_reproduced,
    reruns_needed,
)


def test_reruns_by_hand() -> None:
    # One forged of 20 is missed by k draws with chance 1 - k / 20.
    assert reruns_needed(20, 0.05, 0.95) == 19
    # Two of 10: seven draws miss with chance 3 / 45, eight with 1 / 45.
    assert reruns_needed(10, 0.2, 0.95) == 8
    # A store without end: log(0.05) / log(0.95) = 58.4.
    assert reruns_needed(100_000, 0.05, 0.95) == 59
    assert reruns_needed(1, 0.05, 0.95) == 1


def test_bounds_by_hand() -> None:
    # One wrong label of 10 is missed by eight draws with chance 0.2, two with 1 / 45.
    assert forged_bound(10, 8, 0, 0.95) == 0.1
    assert forged_bound(10, 10, 0, 0.95) == 0.0
    assert forged_bound(10, 10, 3, 0.95) == 0.3
    assert forged_bound(100_000, 59, 0, 0.95) == pytest.approx(1 - 0.05 ** (1 / 59), abs=1e-4)


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.floats(0.5, 0.999))
def test_reruns_are_as_few_as_can_be(labels: int, share: float, confidence: float) -> None:
    forged = max(1, math.ceil(share * labels - 1e-9))

    def missed(k: int) -> float:
        return math.comb(labels - forged, k) / math.comb(labels, k)

    needed = reruns_needed(labels, share, confidence)
    assert missed(needed) <= 1 - confidence + 1e-9
    assert missed(needed - 1) > 1 - confidence - 1e-9
    assert forged_bound(labels, needed, 0, confidence) <= (forged - 1) / labels + 1e-9


def test_exact_agreement_is_a_root_mean_square() -> None:
    stored = np.zeros((4, 3))
    rerun = np.array([[0.0, 0.02, 0.0], [0.0, 0.0, 0.02], [0.0, 0.0, 0.02], [0.0, 0.0, 0.0]])
    compared = compare_exact(stored, rerun, 0.01)
    np.testing.assert_allclose(compared.values["difference"], [0, 0.01, 0.02 / 2**0.5])
    assert compared.consistent.tolist() == [True, True, False]
    assert is_reproduced(stored, rerun * 0.1, 0.01)
    assert not is_reproduced(stored, rerun, 0.01)


def world(
    targets: int = 200, labels: int = 30, noise: float = 0.3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three seeds of the same labels (T, k)."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(1.5, 0.6, size=(targets, 1)) + rng.normal(0, 0.4, size=(targets, labels))
    one, two, three = (truth + rng.normal(0, noise, size=truth.shape) for _ in range(3))
    return one, two, three


def test_seeds_by_their_order_shift_and_spread() -> None:
    stored, rerun, again = world(labels=9)
    compared = compare_seeds(stored, rerun, again, 0.05)
    for column in (0, 4):
        others = np.delete(rerun, column, axis=1).mean(axis=1)
        difference = stored[:, column] - rerun[:, column]
        order = spearmanr(stored[:, column] - others, rerun[:, column] - others).statistic
        assert compared.values["order"][column] == pytest.approx(order)
        assert compared.values["shift"][column] == pytest.approx(difference.mean())
        assert compared.values["spread"][column] == pytest.approx(difference.std())
    assert compared.consistent.all()


def test_every_forgery_is_seen_and_moves_no_limit() -> None:
    stored, rerun, again = world()
    rng = np.random.default_rng(1)
    honest = compare_seeds(stored, rerun, again, 0.05)
    assert honest.consistent.all()
    means = stored.mean(axis=1)
    forgeries = (
        stored[:, 5],
        stored[:, 5] + rng.normal(0, 0.1, len(stored)),
        stored[:, 0] + 1.0,
        means + rng.normal(0, 0.5, len(stored)),
        means,
        means + 4 * (stored[:, 0] - means),
    )
    for forged in forgeries:
        labels = stored.copy()
        labels[:, 0] = forged
        compared = compare_seeds(labels, rerun, again, 0.05)
        assert compared.consistent.tolist() == [False] + [True] * 29
        assert compared.limits == honest.limits


def test_honest_labels_are_seldom_refused() -> None:
    refused = sum(
        not compare_seeds(*world(100, 20, seed=seed), 0.2).consistent.all() for seed in range(100)
    )
    # Binomial with chance 0.2: above 32 with chance 0.001.
    assert refused <= 32


def test_the_very_same_labels_are_consistent() -> None:
    stored, _, again = world()
    assert compare_seeds(stored, stored, again, 0.05).consistent.all()
    assert compare_seeds(stored, stored, stored, 0.05).consistent.all()


@pytest.mark.parametrize("shape", [(7, 20), (20, 7)])
def test_too_little_to_tell(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="targets and .* labels are too few to tell a forgery"):
        compare_seeds(*world(*shape), 0.05)


def linear(
    targets: int = 30, pool: int = 20, subsets: int = 60, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Scores (T, N), losses (T, M) that are linear in them but for noise, and the subsets."""
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(targets, pool))
    drawn = [rng.choice(pool, 8, replace=False) for _ in range(subsets)]
    losses = 3 - 0.5 * pooled(scores, drawn)
    return scores, losses + noise * rng.normal(size=losses.shape), drawn


def pooled(scores: np.ndarray, subsets: list[np.ndarray]) -> np.ndarray:
    return np.stack([scores[:, rows].sum(axis=1) for rows in subsets], axis=1)


def test_perfect_scores_have_perfect_values() -> None:
    scores, losses, subsets = linear()
    given = pooled(scores, subsets), losses, subsets, 20
    assert claim_value("lds", *given) == pytest.approx(1)
    assert claim_value("slope", *given) == pytest.approx(0.5)
    assert claim_value("residual", *given, 0.5) == pytest.approx(0)
    assert claim_value("gap", *given, 0.5) == pytest.approx(0)
    # Nothing predicted: all of the variance is left, and all of it is linear.
    assert claim_value("residual", *given, 0.0) == pytest.approx(1)
    assert claim_value("gap", *given, 0.0) == pytest.approx(1, abs=0.2)
    # Ten times too much is wrong by nine times the labels.
    assert claim_value("residual", *given, 5.0) == pytest.approx(81)


def test_values_by_hand() -> None:
    losses = np.array([[3.0, 2.0, 1.0], [5.0, 5.0, 2.0]])
    scores = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])
    subsets = [np.array([0]), np.array([1]), np.array([2])]
    assert claim_value("slope", scores, losses, subsets, 4) == pytest.approx(1)
    assert claim_value("residual", scores, losses, subsets, 4, 0.5) == pytest.approx(0.25)
    # Centred scores (-1, 0, 1) and (-1, -1, 2), gains (-1, 0, 1) and (-1, -1, 2), times 2.
    assert claim_value("slope", scores, 2 * losses, subsets, 4) == pytest.approx(2)
    flat = np.zeros_like(scores)
    assert claim_value("slope", flat, losses, subsets, 4) == 0
    assert claim_value("residual", scores, np.ones_like(scores), subsets, 4) == 0
    assert claim_value("gap", scores, np.ones_like(scores), subsets, 4) == 0


def test_the_error_is_that_of_drawing_subsets_again() -> None:
    rng = np.random.default_rng(3)
    scores, losses, subsets = linear(targets=8, subsets=1600, noise=1.0)
    values, errors = [], []
    for part in np.array_split(rng.permutation(1600), 40):
        some = [subsets[column] for column in part]
        given = pooled(scores, some), losses[:, part], some, 20
        values.append(claim_value("slope", *given))
        errors.append(claim_error("slope", *given))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_margins_are_of_the_side_that_matters() -> None:
    # Student's t with 15 degrees of freedom: 1.753 and, with both sides, 2.131.
    assert claim_margin("lds", 0.1, 16, 0.95) == pytest.approx(0.1753, abs=1e-4)
    assert claim_margin("slope", 0.1, 16, 0.95) == pytest.approx(0.2131, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "claimed", "measured", "accepted"),
    [
        ("lds", 0.5, 0.41, True),
        ("lds", 0.5, 0.39, False),
        ("lds", 0.5, 0.9, True),
        ("gap", 0.2, 0.29, True),
        ("gap", 0.2, 0.31, False),
        ("gap", 0.2, 0.0, True),
        ("slope", 2.0, 1.86, True),
        ("slope", 2.0, 1.84, False),
        ("slope", -2.0, -2.14, True),
        ("slope", -2.0, -2.16, False),
    ],
)
def test_a_claim_may_be_too_modest_but_not_too_good(
    kind: str, claimed: float, measured: float, accepted: bool
) -> None:
    assert is_accepted(kind, claimed, measured, 0.05, 0.05) is accepted
