"""Does a score find the pool examples whose response is wrong?"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata

from airrep.examples import InputError
from airrep.metrics.bootstrap import LEVEL
from airrep.metrics.correlation import centred

DIGITS = 9  # of a number near 1: sums that differ by rounding alone are ties


def harmfulness(scores: ArrayLike) -> np.ndarray:
    """How much each pool example hurts targets in general, (N,): higher = more harmful.

    Takes scores (T, N). Minus the mean over targets of the score, standardised over the pool for
    each target so that no target's scale decides; a target whose scores are all equal counts 0.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or scores.size == 0 or not np.isfinite(scores).all():
        raise InputError(
            f"Scores of shape {scores.shape} cannot be averaged; give finite (targets, pool)."
        )
    values = centred(scores, np.ones(scores.shape, dtype=bool))
    spread = values.std(axis=1, keepdims=True)
    units = np.divide(values, spread, out=np.zeros_like(values), where=spread > 0)
    return -units.mean(axis=0).round(DIGITS)


def mislabel_auc(scores: ArrayLike, flipped: ArrayLike) -> dict[str, Any]:
    """Chance that a mislabelled example is more harmful than a sound one, with 95% interval.

    Takes scores (T, N) and flipped (N,) of truth values; `auc` is the area under the ROC curve
    of `harmfulness`, ties count half, 0.5 is chance. The interval is DeLong's (Biometrics 44,
    1988) over pool examples, cut at 0 and 1. Raises InputError unless there are at least two
    flipped examples and two others.
    """
    harm = harmfulness(scores)
    wrong = np.asarray(flipped, dtype=bool)
    if wrong.shape != harm.shape or min(wrong.sum(), (~wrong).sum()) < 2:
        raise InputError(
            f"{int(wrong.sum())} of {wrong.size} examples are flipped in a pool of {len(harm)}; "
            "give one truth value an example, at least two of each kind."
        )
    ranks = rankdata(harm)
    # Which share of the other kind each example stands above: its rank among all less its own.
    above_sound = (ranks[wrong] - rankdata(harm[wrong])) / (~wrong).sum()
    above_wrong = (ranks[~wrong] - rankdata(harm[~wrong])) / wrong.sum()
    auc = float(above_sound.mean())
    variance = above_sound.var(ddof=1) / wrong.sum() + above_wrong.var(ddof=1) / (~wrong).sum()
    margin = float(norm.ppf((1 + LEVEL) / 2) * np.sqrt(variance))
    return {
        "auc": auc,
        "ci95": [max(0.0, auc - margin), min(1.0, auc + margin)],
        "flipped": int(wrong.sum()),
    }
