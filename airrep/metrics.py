"""Quality of scores: pure functions of arrays.

Matrices are (targets, subsets) or (targets, pool). Scores are higher = more helpful, losses are
higher = worse, so a good score ranks subsets as the negative loss does. A loss that is not finite
is missing: it is left out for its target, never replaced.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from airrep.examples import InputError

RESAMPLED = ("targets", "subsets", "both")
LEVEL = 0.95
# Ranks are halves of whole numbers, so a spread below this is rounding: the row is constant.
FLAT = 1e-9


def lds_per_target(scores: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, int]:
    """Linear datamodeling score of every target (Park et al., arXiv 2303.14186, definition 2.3).

    Takes subset scores (T, M) and losses (T, M); returns Spearman's rho between score and
    -loss, (T,) with ties averaged, and the number of constant targets: those whose scores or
    losses do not vary, which count 0. Raises InputError for shapes that differ and scores that
    are not finite.
    """
    scores, losses = _paired(scores, losses)
    return _spearman(scores, -losses)


def bootstrap_lds(
    scores: ArrayLike,
    losses: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    over: str = "both",
) -> tuple[float, float]:
    """95% percentile interval of the mean LDS over resampled targets, subsets or both.

    Ranks are recomputed in every resample; a subset drawn twice ties with itself.
    """
    scores, losses = _paired(scores, losses)
    target_counts, subset_counts = _resamples(losses.shape, draws, rng, over)
    return _interval(_resampled_lds(scores, losses, target_counts, subset_counts))


def paired_bootstrap(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    losses: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    over: str = "both",
) -> tuple[float, tuple[float, float]]:
    """LDS of a minus LDS of b, and its 95% interval over resamples that both methods share."""
    scores_a, losses = _paired(scores_a, losses)
    scores_b, losses = _paired(scores_b, losses)
    counts = _resamples(losses.shape, draws, rng, over)
    drawn = _resampled_lds(scores_a, losses, *counts) - _resampled_lds(scores_b, losses, *counts)
    lds_a, _ = _spearman(scores_a, -losses)
    lds_b, _ = _spearman(scores_b, -losses)
    return float(lds_a.mean() - lds_b.mean()), _interval(drawn)


def noise_ceiling(losses_a: ArrayLike, losses_b: ArrayLike) -> dict[str, float]:
    """How far the labels' own noise lets any score come, from the same subsets trained twice.

    Takes losses (T, R) of two seeds. `reliability` is the mean over targets of Spearman's rho
    between the seeds; `lds` its square root, what a score equal to the noiseless label reaches.
    """
    first, second = np.asarray(losses_a, dtype=float), np.asarray(losses_b, dtype=float)
    _check_shapes(first, second, "losses of one seed", "of the other")
    reliability = float(_spearman(first, second)[0].mean())
    return {"reliability": reliability, "lds": max(reliability, 0.0) ** 0.5}


def recall_at_k(scores: ArrayLike, proponents: Sequence[ArrayLike], k: int) -> float:
    """Share of a target's proponents among its k highest scores, mean over targets with any.

    Takes scores (T, N) and T lists of pool rows. Equal scores count as in a random order, so
    the pool's order earns nothing. Raises InputError where no target has proponents.
    """
    if k < 1:
        raise InputError(f"recall_at_k got k = {k}; ask for at least one row.")
    recalls = []
    for row, rows in _with_proponents(scores, proponents):
        above, equal = _standing(row, row[rows])
        recalls.append(np.clip((k - above) / equal, 0, 1).mean())
    return float(np.mean(recalls))


def mean_reciprocal_rank(scores: ArrayLike, proponents: Sequence[ArrayLike]) -> float:
    """1 / rank of a target's best proponent, mean over targets with any.

    Takes scores (T, N) and T lists of pool rows. Equal scores count as in a random order: the
    expectation is exact. Raises InputError where no target has proponents.
    """
    reciprocals = []
    for row, rows in _with_proponents(scores, proponents):
        best = row[rows].max()
        above, equal = _standing(row, best)
        reciprocals.append(_expected_reciprocal(int(above), int(equal), int((row[rows] == best).sum())))
    return float(np.mean(reciprocals))


def _expected_reciprocal(above: int, equal: int, wanted: int) -> float:
    """E[1 / (above + J)], J the first of `wanted` places in a random order of `equal`."""
    place = np.arange(equal - wanted + 1)
    # P(J > j) is a product: each of the first j places goes to one of the unwanted.
    later = np.concatenate([[1.0], np.cumprod((equal - wanted - place) / (equal - place))])
    return float(((later[:-1] - later[1:]) / (above + place + 1)).sum())


def _standing(row: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of a row's scores lie above each value, and how many equal it."""
    ordered = np.sort(row)
    upper = np.searchsorted(ordered, values, side="right")
    return len(row) - upper, upper - np.searchsorted(ordered, values, side="left")


def _with_proponents(scores: ArrayLike, proponents: Sequence[ArrayLike]):
    scores = np.asarray(scores)
    if scores.ndim != 2 or len(scores) != len(proponents):
        raise InputError(
            f"scores have shape {scores.shape} for {len(proponents)} lists of proponents; "
            "give (targets, pool) and one list a target."
        )
    known = []
    for target, (row, given) in enumerate(zip(scores, proponents, strict=True)):
        rows = np.unique(np.asarray(given, dtype=np.int64))
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(row)):
            wrong = rows[0] if rows[0] < 0 else rows[-1]
            raise InputError(
                f"Target {target} has proponent row {wrong}, outside the pool of {len(row)}; "
                "give pool rows."
            )
        if len(rows):
            known.append((row, rows))
    if not known:
        raise InputError("No target has proponents; retrieval needs at least one that has.")
    return known


def _paired(scores: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, losses = np.asarray(scores, dtype=float), np.asarray(losses, dtype=float)
    _check_shapes(scores, losses, "subset scores", "losses")
    if not np.isfinite(scores).all():
        raise InputError("Subset scores hold values that are not finite; only losses may miss.")
    return scores, losses


def _check_shapes(a: np.ndarray, b: np.ndarray, noun_a: str, noun_b: str) -> None:
    if a.ndim != 2 or a.shape != b.shape:
        raise InputError(
            f"The {noun_a} have shape {a.shape}, the {noun_b} {b.shape}; "
            "both must be (targets, subsets)."
        )
    if a.shape[0] < 1 or a.shape[1] < 2:
        raise InputError(
            f"The {noun_a} have shape {a.shape}; a rank correlation needs at least one target "
            "and two subsets."
        )


def _spearman(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """Row-wise rho (T,) over the pairs that are finite in both, and the count of constant rows."""
    present = np.isfinite(a) & np.isfinite(b)
    rho = np.zeros(len(a))
    flat = np.zeros(len(a), dtype=bool)
    whole = present.all(axis=1)
    rho[whole], flat[whole] = _rank_correlation(a[whole], b[whole])
    for row in np.flatnonzero(~whole):
        keep = present[row]
        one, is_flat = _rank_correlation(a[row : row + 1, keep], b[row : row + 1, keep])
        rho[row], flat[row] = one[0], is_flat[0]
    return rho, int(flat.sum())


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rho of rows without gaps, 0 where a row is constant, and which rows are."""
    if a.size == 0:
        return np.zeros(len(a)), np.ones(len(a), dtype=bool)
    ranks_a, ranks_b = rankdata(a, axis=1), rankdata(b, axis=1)
    mean = (a.shape[1] + 1) / 2
    return _pearson(ranks_a - mean, ranks_b - mean, np.ones_like(ranks_a))


def _pearson(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted correlation along the last axis of centred values, 0 where flat; which are flat."""
    weighted = weights * a
    spread_a = (weighted * a).sum(axis=-1)
    spread_b = (weights * b * b).sum(axis=-1)
    flat = (spread_a < FLAT) | (spread_b < FLAT)
    norm = np.sqrt(np.where(flat, 1.0, spread_a) * np.where(flat, 1.0, spread_b))
    return np.where(flat, 0.0, (weighted * b).sum(axis=-1) / norm), flat


def _resamples(
    shape: tuple[int, ...], draws: int, rng: np.random.Generator, over: str
) -> tuple[np.ndarray, np.ndarray]:
    """How often each target (draws, T) and each subset (draws, M) occurs in every resample."""
    if over not in RESAMPLED:
        raise InputError(f"over is {over!r}; choose one of {', '.join(RESAMPLED)}.")
    if draws < 1:
        raise InputError(f"draws is {draws}; a bootstrap needs at least one.")

    def counts(size: int, drawn: bool) -> np.ndarray:
        if not drawn:
            return np.ones((draws, size), dtype=np.int64)
        return rng.multinomial(size, np.full(size, 1 / size), size=draws)

    return counts(shape[0], over != "subsets"), counts(shape[1], over != "targets")


def _resampled_lds(
    scores: np.ndarray, losses: np.ndarray, target_counts: np.ndarray, subset_counts: np.ndarray
) -> np.ndarray:
    """Mean LDS (draws,) in every resample, given as counts.

    Sorting happens once a target: in a resample, the rank of a value is half-way between the
    running counts before and after its group of ties in that fixed order.
    """
    total = np.zeros(len(subset_counts))
    for row, row_losses in enumerate(losses):
        present = np.isfinite(row_losses)
        counts = subset_counts[:, present]
        if counts.shape[1] == 0:
            continue  # a target without losses counts 0, as in lds_per_target
        a = _resampled_ranks(scores[row, present], counts)
        b = _resampled_ranks(-row_losses[present], counts)
        total += target_counts[:, row] * _pearson(a, b, counts)[0]
    return total / target_counts.sum(axis=1)


def _resampled_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Centred average ranks (draws, M) of the values when value j occurs counts[:, j] times."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, values, side="left")
    last = np.searchsorted(ordered, values, side="right")
    running = np.zeros((len(counts), len(values) + 1))
    np.cumsum(counts[:, order], axis=1, out=running[:, 1:])
    return (running[:, first] + running[:, last] - running[:, -1:]) / 2


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
