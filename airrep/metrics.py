"""Quality of scores: pure functions of arrays.

Matrices are (targets, subsets) or (targets, pool). Scores are higher = more helpful, losses are
higher = worse, so a good score ranks subsets as the negative loss does. A loss that is not finite
is missing: it is left out for its target, never replaced.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from airrep.examples import InputError

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


def resampled_lds(
    scores: Sequence[ArrayLike], losses: ArrayLike, draws: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Mean LDS of several methods in bootstrap resamples that they share.

    Takes one (T, M) array of subset scores a method, and losses (T, M). Returns (methods, draws)
    under "targets", "subsets" and "both", by what is drawn with replacement. Ranks are recomputed
    in every resample; a subset drawn twice ties with itself, which pulls a resample's rho towards
    0 by about 1 part in M. The difference of two rows is a
    paired bootstrap. Raises InputError for shapes that differ and fewer than one draw.
    """
    pairs = [_paired(one, losses) for one in scores]
    if not pairs:
        raise InputError("There are no subset scores to resample; give those of one method.")
    if draws < 1:
        raise InputError(f"draws is {draws}; a bootstrap needs at least one.")
    stacked, wanted = np.stack([one for one, _ in pairs]), -pairs[0][1]
    target_counts = _counts(len(wanted), draws, rng)
    subset_counts = _counts(wanted.shape[1], draws, rng)
    over_subsets, over_both = np.zeros((len(pairs), draws)), np.zeros((len(pairs), draws))
    for target, rho in enumerate(_resampled_rhos(stacked, wanted, subset_counts)):
        over_subsets += rho
        over_both += rho * target_counts[target]
    fixed = np.stack([_spearman(one, wanted)[0] for one in stacked])
    sums = {"targets": fixed @ target_counts, "subsets": over_subsets, "both": over_both}
    return {over: drawn / len(wanted) for over, drawn in sums.items()}


def bootstrap_lds(
    scores: ArrayLike,
    losses: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    over: str = "both",
) -> tuple[float, float]:
    """95% percentile interval of the mean LDS over resampled targets, subsets or both."""
    return interval(_pick(resampled_lds([scores], losses, draws, rng), over)[0])


def paired_bootstrap(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    losses: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    over: str = "both",
) -> tuple[float, tuple[float, float]]:
    """LDS of a minus LDS of b, and its 95% interval over resamples that both methods share."""
    drawn = _pick(resampled_lds([scores_a, scores_b], losses, draws, rng), over)
    lds_a, _ = lds_per_target(scores_a, losses)
    lds_b, _ = lds_per_target(scores_b, losses)
    return float(lds_a.mean() - lds_b.mean()), interval(drawn[0] - drawn[1])


def interval(drawn: ArrayLike) -> tuple[float, float]:
    """The 95% percentile interval of values from resamples."""
    low, high = np.quantile(np.asarray(drawn, dtype=float), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_ceiling(
    losses_a: ArrayLike, losses_b: ArrayLike, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95% percentile interval of `noise_ceiling`'s lds over resampled targets and subsets."""
    first, second = np.asarray(losses_a, dtype=float), np.asarray(losses_b, dtype=float)
    _check_shapes(first, second, "losses of one seed", "losses of the other")
    present = np.isfinite(first) & np.isfinite(second)
    drawn = resampled_lds(
        [np.where(present, -first, 0.0)], np.where(present, second, np.nan), draws, rng
    )["both"]
    return interval(np.sqrt(np.maximum(drawn, 0.0)))


def noise_ceiling(losses_a: ArrayLike, losses_b: ArrayLike) -> dict[str, float]:
    """How far the labels' own noise lets any score come, from the same subsets trained twice.

    Takes losses (T, R) of two seeds. `reliability` is the mean over targets of Spearman's rho
    between the seeds; `lds` its square root, what a score equal to the noiseless label reaches.
    """
    first, second = np.asarray(losses_a, dtype=float), np.asarray(losses_b, dtype=float)
    _check_shapes(first, second, "losses of one seed", "losses of the other")
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
        reciprocals.append(
            _expected_reciprocal(int(above), int(equal), int((row[rows] == best).sum()))
        )
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


def _with_proponents(
    scores: ArrayLike, proponents: Sequence[ArrayLike]
) -> list[tuple[np.ndarray, np.ndarray]]:
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
    return _pearson(ranks_a - mean, ranks_b - mean)


def _pearson(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation along the last axis of centred values, 0 where flat; and which are flat."""
    return _from_moments((a * b).sum(axis=-1), (a * a).sum(axis=-1), (b * b).sum(axis=-1))


def _from_moments(
    product: np.ndarray, spread_a: np.ndarray, spread_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    flat = (spread_a < FLAT) | (spread_b < FLAT)
    norm = np.sqrt(np.where(flat, 1.0, spread_a) * np.where(flat, 1.0, spread_b))
    return np.where(flat, 0.0, product / norm), flat


def _pick(drawn: dict[str, np.ndarray], over: str) -> np.ndarray:
    if over not in drawn:
        raise InputError(f"over is {over!r}; choose one of {', '.join(drawn)}.")
    return drawn[over]


def _counts(size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `size` things occurs in every resample: (size, draws)."""
    return rng.multinomial(size, np.full(size, 1 / size), size=draws).T.astype(float)


def _resampled_rhos(
    scores: np.ndarray, wanted: np.ndarray, counts: np.ndarray
) -> Iterator[np.ndarray]:
    """Target by target, Spearman's rho (K, draws) of scores (K, T, M) with wanted (T, M).

    Sorting happens once a target: in a resample, the rank of a value is half-way between the
    running counts before and after its group of ties in that fixed order.
    """
    for target, row in enumerate(wanted):
        rho = np.zeros((len(scores), counts.shape[1]))
        present = np.isfinite(row)
        if present.any():  # a target without losses counts 0, as in lds_per_target
            weights = counts[present]
            b = _resampled_ranks(row[present], weights)
            weighted = weights * b
            spread_b = np.einsum("md,md->d", weighted, b)
            for method, values in enumerate(scores[:, target, present]):
                a = _resampled_ranks(values, weights)
                product = np.einsum("md,md->d", weighted, a)
                spread_a = np.einsum("md,md,md->d", weights, a, a)
                rho[method] = _from_moments(product, spread_a, spread_b)[0]
        yield rho


def _resampled_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Centred average ranks (M, draws) of the values when value j occurs counts[j] times."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, values, side="left")
    last = np.searchsorted(ordered, values, side="right")
    running = np.zeros((len(values) + 1, counts.shape[1]))
    np.cumsum(counts[order], axis=0, out=running[1:])
    return (running[first] + running[last] - running[-1]) / 2
