"""Is the size of a score right, not only its order?"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from airrep.examples import InputError
from airrep.metrics.bootstrap import (
    Resamples,
    check_resamples,
    interval,
    resampled_products,
)
from airrep.metrics.correlation import centred, paired


def calibration(
    scores: ArrayLike, losses: ArrayLike, resamples: Resamples
) -> dict[str, Any] | None:
    """Regression of the measured loss change on the subset score, pooled within targets.

    Takes subset scores (T, M) and losses (T, M). Score and negative loss are centred for each
    target over its known losses. Returns

    - `slope`: nats that the loss falls by for one unit of score, and its `ci95` over resampled
      targets and subsets. Scores that are nats already should have slope 1; others have a unit
      of their own, and the slope is only their price in nats.
    - `slope_on_held_out`: scores times a slope fitted on every second subset, and the slope of
      that on the others. 1 is perfect. Fitted and read on the same subsets it would be 1 by
      construction; here it shows how well the labels fix the unit of the scores. It says nothing
      where `ci95` holds 0. None where the fitted half has no positive slope, and for fewer than
      four subsets.
    - `target_quartiles`: lower quartile, median and upper quartile of the slopes of single
      targets, in nats per unit. Far apart, a unit of score means another size for each target.

    None where no target's scores vary. Raises InputError for shapes that differ.
    """
    x, y, present = _centred(scores, losses)
    slope = _slope(x, y)
    if slope is None:
        return None
    check_resamples(resamples, y)
    square, product = np.zeros(resamples.subsets.shape[1]), np.zeros(resamples.subsets.shape[1])
    for rows, squares, _, products in resampled_products(x[None], y, present, resamples.subsets):
        square += (squares[0] * resamples.targets[rows]).sum(axis=0)
        product += (products[0] * resamples.targets[rows]).sum(axis=0)
    drawn = np.divide(product, square, out=np.zeros_like(square), where=square > 0)
    squares = (x * x).sum(axis=1)
    quartiles = np.quantile(
        (x * y).sum(axis=1)[squares > 0] / squares[squares > 0], [0.25, 0.5, 0.75]
    )
    return {
        "slope": slope,
        "ci95": list(interval(drawn)),
        "slope_on_held_out": _held_out_slope(scores, losses),
        "target_quartiles": quartiles.tolist(),
    }


def calibration_bins(
    scores: ArrayLike, losses: ArrayLike, resamples: Resamples, bins: int = 10
) -> list[dict[str, Any]]:
    """Predicted against measured loss change, in bins of about equal count, lowest first.

    The prediction is the centred score times `calibration`'s slope, in nats, + = loss falls.
    Each bin has the mean `predicted`, the mean `measured`, the `count` of target and subset
    pairs, and the 95% interval `low` to `high` of measured over resampled targets and subsets;
    slope and bins stay those of all data. The line through the bins has slope 1 by construction:
    look for bends in it, and for bins far from it. Equal predictions share a bin. Empty where
    no target's scores vary.
    """
    if bins < 1:
        raise InputError(f"bins is {bins}; give at least one.")
    x, y, present = _centred(scores, losses)
    check_resamples(resamples, y)
    slope = _slope(x, y)
    if slope is None:
        return []
    predicted = slope * x
    edges = np.quantile(predicted[present], np.arange(1, bins) / bins)
    place = np.where(present, np.searchsorted(edges, predicted, side="right"), -1)
    rows = []
    for number in np.unique(place[present]):
        inside = place == number
        count = _resampled_sum(inside.astype(float), resamples)
        measured = _resampled_sum(inside * y, resamples)[count > 0] / count[count > 0]
        # A small bin may be missing from every resample.
        low, high = interval(measured) if len(measured) else (y[inside].min(), y[inside].max())
        rows.append(
            {
                "predicted": float(predicted[inside].mean()),
                "measured": float(y[inside].mean()),
                "low": float(low),
                "high": float(high),
                "count": int(inside.sum()),
            }
        )
    return rows


def _centred(scores: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, losses = paired(scores, losses)
    present = np.isfinite(losses)
    return centred(scores, present), centred(-losses, present), present


def _slope(x: np.ndarray, y: np.ndarray) -> float | None:
    square = (x * x).sum()
    return float((x * y).sum() / square) if square > 0 else None


def _held_out_slope(scores: ArrayLike, losses: ArrayLike) -> float | None:
    """Subsets are in random order, so every second one is a random half."""
    scores, losses = np.asarray(scores), np.asarray(losses)
    if scores.shape[1] < 4:
        return None
    fitted, held = (
        _slope(*_centred(scores[:, first::2], losses[:, first::2])[:2]) for first in (0, 1)
    )
    return held / fitted if held is not None and fitted is not None and fitted > 0 else None


def _resampled_sum(values: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Sum of values (T, M) over the targets and subsets of every resample: (draws,)."""
    return ((resamples.targets.T @ values) * resamples.subsets.T).sum(axis=1)
