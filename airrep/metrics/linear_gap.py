"""Is there a linear effect of single examples in the labels that a score has missed?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.stats import norm

from airrep.examples import InputError
from airrep.metrics.bootstrap import LEVEL
from airrep.metrics.correlation import centred, paired


def linear_gap_per_target(
    predicted: ArrayLike, losses: ArrayLike, subsets: Sequence[ArrayLike], pool_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the labels that single examples explain and the prediction lacks, in nats².

    Takes the predicted loss change (T, M) in nats, + = the loss falls, losses (T, M) and the
    pool rows of the M subsets. With g the centred residual of a target and x_j the standardised
    membership of subset j (N,), the gap is

        (|sum_j g_j x_j|² - sum_j g_j² |x_j|²) / (m (m - 1)),

    an estimate of |E g x|² (arXiv 2508.10866): around 0, and below it by chance, where no linear
    effect is left. Returns the gaps (T,) and the variances of the losses (T,), NaN for targets
    with fewer than three known losses.

    Subsets are taken as drawn from the whole pool, every row with the same chance: each row by
    its own draw, or, where all sizes are equal, that many rows; a row counts once. Raises
    InputError for shapes that differ and for subsets that all hold the whole pool.
    """
    residual, variance, counts = _residual(predicted, losses)
    pairs = residual * (residual @ _kernel(subsets, pool_size, residual.shape[1]))
    return pairs.sum(axis=1) / (counts * (counts - 1)), variance


def linear_gap(
    predicted: ArrayLike, losses: ArrayLike, subsets: Sequence[ArrayLike], pool_size: int
) -> dict[str, Any] | None:
    """`linear_gap_per_target` as a share of the variance of the losses, mean over targets.

    0: all that is linear in the examples is in the score. With predictions of 0 it is the share
    of the labels that is linear at all; what is left of 1 is seed noise and interaction. `ci95`
    is a normal interval from the jackknife over subsets: read it first, because the estimate for
    one target is off by about sqrt(2 N) / M, and targets share their subsets. With few subsets
    it may come out below 0 or above 1. None where nothing varies: no target has three known
    losses that differ, or all subsets hold the whole pool.
    """
    residual, variance, counts = _residual(predicted, losses)
    known = variance > 0
    if not known.any() or all(len(np.unique(subset)) == pool_size for subset in subsets):
        return None
    present = np.isfinite(np.asarray(losses, dtype=float))[known]
    residual, variance = residual[known], variance[known][:, None]
    kernel = _kernel(subsets, pool_size, residual.shape[1])
    pairs = residual * (residual @ kernel)
    total, count = pairs.sum(axis=1, keepdims=True), counts[known][:, None]
    share = float((total / (count * (count - 1)) / variance).mean())
    # Without subset j, its pairs are gone twice; targets that never had it stay as they are.
    left = count - present
    without = ((total - 2 * pairs) / (left * (left - 1)) / variance).mean(axis=0)
    size = len(without)
    error = np.sqrt((size - 1) / size * ((without - without.mean()) ** 2).sum())
    margin = float(norm.ppf((1 + LEVEL) / 2) * error)
    return {"share": share, "ci95": [share - margin, share + margin]}


def _residual(predicted: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centred residuals (T, M), variances and numbers of known losses (T,)."""
    predicted, losses = paired(predicted, losses, "predictions")
    present = np.isfinite(losses)
    counts = present.sum(axis=1).astype(float)
    counts[counts < 3] = np.nan
    variance = (centred(losses, present) ** 2).sum(axis=1) / (counts - 1)
    return centred(np.where(present, -losses - predicted, 0.0), present), variance, counts


def _kernel(subsets: Sequence[ArrayLike], pool_size: int, count: int) -> np.ndarray:
    """Products of the standardised memberships of every two subsets, 0 on the diagonal."""
    rows = [np.unique(np.asarray(subset, dtype=np.int64)) for subset in subsets]
    if len(rows) != count or any(
        len(one) and not 0 <= one[0] <= one[-1] < pool_size for one in rows
    ):
        raise InputError(
            f"{len(rows)} subsets were given for {count} columns of losses and a pool of "
            f"{pool_size}; give one list of pool rows a column."
        )
    sizes = np.array([len(one) for one in rows], dtype=float)
    chance = sizes.mean() / pool_size
    variance = chance * (1 - chance)
    if variance == 0:
        raise InputError("All subsets are empty or the whole pool; membership must vary.")
    if np.ptp(sizes) == 0:
        variance *= pool_size / (pool_size - 1)  # drawn without replacement
    numbers = np.repeat(np.arange(count), sizes.astype(int))
    members = sparse.csr_array(
        (np.ones(len(numbers)), (numbers, np.concatenate(rows))), shape=(count, pool_size)
    )
    shared = (members @ members.T).toarray()
    expected = chance * (sizes[:, None] + sizes) - pool_size * chance**2
    kernel = (shared - expected) / variance
    np.fill_diagonal(kernel, 0.0)
    return kernel
