"""Checking what others say of labels and scores by training again: pure functions of arrays.

The idea is that of arXiv 2508.10866: a label is a claim that anyone can check, because its
subset can be trained on again. A random sample that the maker could not foresee bounds the share
of wrong labels, and subsets that nobody has seen give the error of a score.

Matrices are (targets, labels) or (targets, subsets); losses are in nats.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import hypergeom, t

from airrep.examples import InputError
from airrep.metrics import lds_per_target, linear_gap_per_target
from airrep.metrics.correlation import centred, centred_ranks, correlation, paired

ClaimKind = Literal["lds", "slope", "gap", "residual"]
TAIL = 5  # degrees of freedom of Student's t that seeds' shifts follow: most are small, some large
ROUNDING = 1e-9  # of chances that are equal by hand
LEAST = 8  # labels, targets or subsets below which nothing is judged
CLEARLY = 0.1  # share of the tolerance within which most labels lie where only rounding differs


def reruns_needed(labels: int, share: float, confidence: float) -> int:
    """Labels to re-run so that a store with `share` of them forged is found with `confidence`.

    The smallest k for which k labels drawn without replacement hold none of share * labels forged
    ones with chance at most 1 - confidence: hypergeometric; for large stores that is
    log(1 - confidence) / log(1 - share). Assumes that re-running a forged label shows it.
    """
    forged = max(1, math.ceil(share * labels - ROUNDING))
    drawn = np.arange(labels)
    missed = np.cumprod(np.maximum(labels - forged - drawn, 0) / (labels - drawn))
    return int(np.argmax(missed <= 1 - confidence + ROUNDING)) + 1


def forged_bound(labels: int, rerun: int, inconsistent: int, confidence: float) -> float:
    """Upper bound of the share of labels that a re-run would call inconsistent.

    Exact (Clopper-Pearson's way, hypergeometric): the largest number of such labels with which
    no more than `inconsistent` turn up among `rerun` with chance above 1 - confidence.
    """
    wrong = range(inconsistent, labels - rerun + inconsistent + 1)

    def is_too_many(count: int) -> bool:
        seen = hypergeom.cdf(inconsistent, labels, count, rerun)
        return bool(seen <= 1 - confidence + ROUNDING)

    return wrong[bisect_left(wrong, True, key=is_too_many) - 1] / labels


@dataclass(frozen=True)
class Comparison:
    """Labels held against their re-runs: by statistic, its values (labels,) and its limits.

    "exact" has `difference`, the root mean square over targets. "seeds" has `order`, Spearman's
    rho over targets of the losses minus their mean over the other labels; `shift`, the mean
    difference over targets; and `spread`, the root mean square difference around that.
    """

    kind: Literal["exact", "seeds"]
    values: Mapping[str, np.ndarray]
    limits: Mapping[str, tuple[float, float]]

    @property
    def consistent(self) -> np.ndarray:
        """Which labels (labels,) are within all limits."""
        inside = [
            (low <= self.values[name]) & (self.values[name] <= high)
            for name, (low, high) in self.limits.items()
        ]
        return np.logical_and.reduce(inside)


def compare_exact(stored: np.ndarray, rerun: np.ndarray, tolerance: float) -> Comparison:
    """Labels (T, k) against re-runs by the same arithmetic: equal within `tolerance` nats."""
    difference = _root_mean_square(rerun - stored)
    return Comparison("exact", {"difference": difference}, {"difference": (0.0, tolerance)})


def is_reproduced(stored: np.ndarray, rerun: np.ndarray, tolerance: float) -> bool:
    """Whether the median label differs by rounding only, so that `compare_exact` is fair.

    Another machine or precision moves all labels, forgery in less than half of them does not
    move the median.
    """
    differences = _root_mean_square(rerun - stored)
    return bool(np.median(differences) <= CLEARLY * tolerance)


def compare_seeds(
    stored: np.ndarray, rerun: np.ndarray, again: np.ndarray, false_alarm: float
) -> Comparison:
    """Labels (T, k) against re-runs (T, k) that differ as two seeds of one subset do.

    `again` (T, k) are runs of the same subsets with one more seed. They and the re-runs are k
    pairs that the verifier made alone, and show what two seeds differ by. A label is consistent
    when its order, shift and spread lie where those of one more pair are expected: limits of
    Student's t for one new value, of Fisher's z of `order` from below, and of the logarithm of
    `spread` from above; and of `shift` around 0 from both sides. `false_alarm` is the chance that
    any of k honest labels falls outside: a half of it goes to `order`, which tells best, a
    quarter to each of the others. It holds as far as z and the logarithm are normal over subsets,
    and shifts no farther out than those of Student's t with `TAIL` degrees of freedom.

    What passes for another seed of the subset is as good as another seed of it: forgeries closer
    than that are not seen here. Nothing but `stored` comes from the maker, so no forgery can
    widen the limits. Raises InputError for too few targets or labels.
    """
    targets, count = stored.shape
    if min(targets, count) < LEAST:
        raise InputError(
            f"{targets} targets and {count} labels are too few to tell a forgery from another "
            f"seed; give at least {LEAST} of each, or ask for exact agreement."
        )
    # Not the mean of the stored labels: that is the maker's.
    centre = (rerun.sum(axis=1, keepdims=True) - rerun) / (count - 1)
    values, noise = _agreement(stored, rerun, centre), _agreement(again, rerun, centre)
    chance = false_alarm / (4 * count)
    perfect = 1 - 6 / (targets**3 - targets)  # half of a swap of two neighbours
    order = np.arctanh(np.clip(noise["order"], -perfect, perfect))
    spread = np.log(np.maximum(noise["spread"], np.finfo(float).tiny))
    scale = float(_root_mean_square(noise["shift"])) / math.sqrt(TAIL / (TAIL - 2))
    shift = scale * float(t.ppf(1 - chance / 2, TAIL))
    limits = {
        "order": (float(np.tanh(order.mean() - _reach(order, 2 * chance))), 1.0),
        "shift": (-shift, shift),
        "spread": (0.0, float(np.exp(spread.mean() + _reach(spread, chance)))),
    }
    return Comparison("seeds", values, limits)


def _agreement(one: np.ndarray, other: np.ndarray, centre: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics (labels,) of two labels (T, labels) of each subset."""
    present = np.ones(one.T.shape, dtype=bool)
    ranks = [centred_ranks((losses - centre).T, present) for losses in (one, other)]
    shift = (one - other).mean(axis=0)
    spread = _root_mean_square(one - other - shift)
    return {"order": correlation(*ranks)[0], "shift": shift, "spread": spread}


def _root_mean_square(values: np.ndarray) -> np.ndarray:
    return np.sqrt((values**2).mean(axis=0))


def _reach(sample: np.ndarray, chance: float) -> float:
    """How far from the sample's mean one more value lies on one side with this chance."""
    size = len(sample)
    return float(t.ppf(1 - chance, size - 1) * sample.std(ddof=1) * math.sqrt(1 + 1 / size))


def claim_value(
    kind: ClaimKind,
    scores: ArrayLike,
    losses: ArrayLike,
    subsets: Sequence[ArrayLike],
    pool_size: int,
    slope: float = 1.0,
) -> float:
    """What labels say of subset scores (T, M), whose columns are subsets of pool rows.

    lds: the linear datamodeling score. slope: nats that the loss falls by for a unit of score.
    residual: mean square error of slope * score, in nats, as a predictor of the loss change
    within targets, as a share of the labels' variance, mean over targets.
    gap: that minus the residual of the best linear score, which is not fitted for it
    (`airrep.metrics.linear_gap_per_target`): 0 for the best one. Its error for one target is
    about sqrt(2 pool_size) / M, and less for the mean over many.
    Raises InputError for shapes that differ.
    """
    scores, losses = paired(scores, losses)
    if kind == "lds":
        return float(lds_per_target(scores, losses)[0].mean())
    if kind == "slope":
        return _slope(scores, losses)
    if kind == "residual":
        return _residual(slope * scores, losses)
    gaps, variances = linear_gap_per_target(slope * scores, losses, subsets, pool_size)
    known = variances > 0
    return float((gaps[known] / variances[known]).mean()) if known.any() else 0.0


def claim_error(
    kind: ClaimKind,
    scores: np.ndarray,
    losses: np.ndarray,
    subsets: Sequence[ArrayLike],
    pool_size: int,
    slope: float = 1.0,
) -> float:
    """Standard error of `claim_value` over subsets, by leaving out one at a time.

    Assumes that subsets are drawn at random and unseen when the scores were made; the targets are
    taken as they are.
    """
    columns = np.arange(losses.shape[1])
    without = []
    for left_out in columns:
        kept = np.delete(columns, left_out)
        some = [subsets[column] for column in kept.tolist()]
        given = scores[:, kept], losses[:, kept], some, pool_size, slope
        without.append(claim_value(kind, *given))
    return math.sqrt((len(columns) - 1) * np.var(without))


def claim_margin(kind: ClaimKind, error: float, subsets: int, confidence: float) -> float:
    """How far what labels say may be from the truth, on the side that matters, by Student's t."""
    sides = 2 if kind == "slope" else 1
    return float(t.ppf(1 - (1 - confidence) / sides, subsets - 1)) * error


def is_accepted(
    kind: ClaimKind, claimed: float, measured: float, epsilon: float, margin: float = 0.0
) -> bool:
    """Whether a claim is at most epsilon better than what labels say, up to their margin.

    lds: higher is better. gap and residual: lower is better. slope: no side is, and epsilon is a
    share of what is claimed. With the margin of a confidence, a claim that is true within epsilon
    is refused with chance 1 - confidence at most, and one that is off by epsilon and two margins
    is accepted with that chance.
    """
    excess = measured - claimed
    if kind == "slope":
        return abs(excess) <= epsilon * abs(claimed) + margin
    return (-excess if kind == "lds" else excess) <= epsilon + margin


def _slope(scores: np.ndarray, losses: np.ndarray) -> float:
    """Regression of -loss on score within targets; 0 where no score varies."""
    present = np.isfinite(losses)
    x, y = centred(scores, present), centred(-losses, present)
    square = (x * x).sum()
    return float((x * y).sum() / square) if square > 0 else 0.0


def _residual(predicted: np.ndarray, losses: np.ndarray) -> float:
    present = np.isfinite(losses)
    error = (centred(-losses - predicted, present) ** 2).sum(axis=1)
    whole = (centred(losses, present) ** 2).sum(axis=1)
    return float((error[whole > 0] / whole[whole > 0]).mean()) if whole.any() else 0.0
