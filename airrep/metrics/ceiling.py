"""How far the labels' own noise lets any score come, from the same subsets trained twice."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from airrep.metrics.bootstrap import LEVEL, Resamples, interval, resampled_correlation
from airrep.metrics.correlation import centred_ranks, check_shapes, correlation


def noise_ceiling(losses_a: ArrayLike, losses_b: ArrayLike) -> dict[str, float]:
    """Reliability of the labels, and the LDS that the noiseless label reaches.

    Takes losses (T, R) of two seeds. `reliability` is the mean over targets of Spearman's rho
    between the seeds; `lds` its square root, what a score equal to the noiseless label reaches.
    Raises InputError for shapes that differ.
    """
    first, second, _ = _ranks(losses_a, losses_b)
    reliability = float(correlation(first, second)[0].mean())
    return {"reliability": reliability, "lds": max(reliability, 0.0) ** 0.5}


def resampled_ceiling(losses_a: ArrayLike, losses_b: ArrayLike, resamples: Resamples) -> np.ndarray:
    """`noise_ceiling`'s lds in every resample of targets and repeated subsets, (draws,)."""
    first, second, present = _ranks(losses_a, losses_b)
    drawn = resampled_correlation(first[None], second, present, resamples)["both"][0]
    return np.sqrt(np.maximum(drawn, 0.0))


def bootstrap_ceiling(
    losses_a: ArrayLike, losses_b: ArrayLike, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95% percentile interval of `noise_ceiling`'s lds over resampled targets and subsets."""
    resamples = Resamples.draw(_ranks(losses_a, losses_b)[0].shape, draws, rng)
    return interval(resampled_ceiling(losses_a, losses_b, resamples))


def share_of_ceiling(
    lds: float, drawn_lds: np.ndarray, ceiling: float, drawn_ceiling: np.ndarray
) -> dict[str, Any] | None:
    """LDS over ceiling, with the 95% interval of that ratio; both in resamples of one length.

    1 is all that the labels let anyone reach. The ceiling is an estimate, so a share may come
    out above 1. None where the ceiling is 0, or so uncertain that the interval has no end.
    """
    if ceiling <= 0:
        return None
    ratios = np.full(len(drawn_lds), np.inf)
    np.divide(drawn_lds, drawn_ceiling, out=ratios, where=drawn_ceiling > 0)
    finite = np.isfinite(ratios)
    if finite.mean() < (1 + LEVEL) / 2:
        return None
    ratios[~finite] = ratios[finite].max()  # beyond the upper end: which value does not matter
    return {"share": float(lds / ceiling), "ci95": list(interval(ratios))}


def _ranks(losses_a: ArrayLike, losses_b: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks of both seeds where both are known, and where that is."""
    first, second = np.asarray(losses_a, dtype=float), np.asarray(losses_b, dtype=float)
    check_shapes(first, second, "losses of one seed", "losses of the other")
    present = np.isfinite(first) & np.isfinite(second)
    return centred_ranks(first, present), centred_ranks(second, present), present
