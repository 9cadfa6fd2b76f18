"""The linear datamodeling score, its intervals, and the comparison of two methods by it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from airrep.examples import InputError
from airrep.metrics.bootstrap import Resamples, interval, resampled_correlation
from airrep.metrics.correlation import centred_ranks, correlation, paired

EQUAL = 1e-9  # two LDS of one target that differ by less tie


def lds_per_target(scores: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, int]:
    """Linear datamodeling score of every target (Park et al., arXiv 2303.14186, definition 2.3).

    Takes subset scores (T, M) and losses (T, M); returns Spearman's rho between score and
    -loss, (T,) with ties averaged, and the number of constant targets: those whose scores or
    losses do not vary, which count 0. Raises InputError for shapes that differ and scores that
    are not finite.
    """
    scores, losses = paired(scores, losses)
    present = np.isfinite(losses)
    rho, flat = correlation(centred_ranks(scores, present), centred_ranks(-losses, present))
    return rho, int(flat.sum())


def resampled_lds(
    scores: Sequence[ArrayLike], losses: ArrayLike, resamples: Resamples
) -> dict[str, np.ndarray]:
    """Mean LDS of several methods in bootstrap resamples that they share.

    Takes one (T, M) array of subset scores a method, and losses (T, M). Returns (methods, draws)
    under "targets", "subsets" and "both", by what is drawn with replacement. The difference of
    two rows is a paired bootstrap.

    Ranks are those of all subsets, taken once; a resample is the weighted correlation of these
    ranks. Ranking again inside every resample gives the same interval up to about 1 part in M,
    but there a subset drawn twice ties with itself, which pulls rho towards 0. Raises InputError
    for shapes that differ.
    """
    pairs = [paired(one, losses) for one in scores]
    if not pairs:
        raise InputError("There are no subset scores to resample; give those of one method.")
    wanted = -pairs[0][1]
    present = np.isfinite(wanted)
    ranks = np.stack([centred_ranks(one, present) for one, _ in pairs])
    return resampled_correlation(ranks, centred_ranks(wanted, present), present, resamples)


def bootstrap_lds(
    scores: ArrayLike,
    losses: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    over: str = "both",
) -> tuple[float, float]:
    """95% percentile interval of the mean LDS over resampled targets, subsets or both."""
    return interval(_drawn([scores], losses, draws, rng, over)[0])


def paired_bootstrap(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    losses: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    over: str = "both",
) -> tuple[float, tuple[float, float]]:
    """LDS of a minus LDS of b, and its 95% interval over resamples that both methods share."""
    drawn = _drawn([scores_a, scores_b], losses, draws, rng, over)
    lds_a, _ = lds_per_target(scores_a, losses)
    lds_b, _ = lds_per_target(scores_b, losses)
    return float(lds_a.mean() - lds_b.mean()), interval(drawn[0] - drawn[1])


def sign_test(values_a: ArrayLike, values_b: ArrayLike) -> dict[str, Any]:
    """On how many targets a is above b: wins, losses, ties and the two-sided p of wins = losses.

    Takes one value a target and method, higher = better, (T,) each; ties count for neither. The
    targets share their subsets, so they are not independent and p is too small: it says how even
    a difference is over the targets, the paired bootstrap whether there is one. Raises
    InputError for shapes that differ.
    """
    difference = np.subtract(*_vectors(values_a, values_b))
    wins, losses = int((difference > EQUAL).sum()), int((difference < -EQUAL).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return {"wins": wins, "losses": losses, "ties": len(difference) - wins - losses, "p": p}


def _vectors(values_a: ArrayLike, values_b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(values_a, dtype=float), np.asarray(values_b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or not (np.isfinite(a) & np.isfinite(b)).all():
        raise InputError(
            f"A sign test got values of shapes {a.shape} and {b.shape}; give one finite value a "
            "target for each method."
        )
    return a, b


def _drawn(
    scores: Sequence[ArrayLike],
    losses: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    over: str,
) -> np.ndarray:
    resamples = Resamples.draw(paired(scores[0], losses)[1].shape, draws, rng)
    drawn = resampled_lds(scores, losses, resamples)
    if over not in drawn:
        raise InputError(f"over is {over!r}; choose one of {', '.join(drawn)}.")
    return drawn[over]
