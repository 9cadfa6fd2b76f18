"""Bootstrap of statistics that are sums over targets of sums over subsets.

A resample is a vector of counts: how often each target and each subset was drawn. Sums over the
drawn subsets are then one matrix product for all targets and resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from airrep.examples import InputError
from airrep.metrics.correlation import correlation, from_squares

LEVEL = 0.95
BLOCK = 2**20  # methods x targets x draws held at once, in each of a few arrays
# A resample that drew one value again and again has a spread of rounding errors only.
FLAT = 1e-12


@dataclass(frozen=True)
class Resamples:
    """How often each target (T, draws) and each subset (M, draws) occurs in every resample.

    What shares its resamples is compared pairwise: draw once and give it to every call.
    """

    targets: np.ndarray
    subsets: np.ndarray

    @classmethod
    def draw(cls, shape: tuple[int, ...], draws: int, rng: np.random.Generator) -> Self:
        """Resamples of (T, M) values; raises InputError for fewer than one draw."""
        target_count, subset_count = shape
        return cls(_counts(target_count, draws, rng), _counts(subset_count, draws, rng))

    def with_subsets(self, subset_count: int, rng: np.random.Generator) -> Self:
        """The same targets in every resample, other subsets."""
        return type(self)(self.targets, _counts(subset_count, self.targets.shape[1], rng))


def interval(drawn: ArrayLike) -> tuple[float, float]:
    """The 95% percentile interval of values from resamples."""
    low, high = np.quantile(np.asarray(drawn, dtype=float), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resampled_correlation(
    a: np.ndarray, b: np.ndarray, present: np.ndarray, resamples: Resamples
) -> dict[str, np.ndarray]:
    """Mean over targets of the correlation of centred rows, in every resample.

    Takes a (K, T, M) of K methods, b and present (T, M), a and b 0 in gaps. Returns (K, draws)
    under "targets", "subsets" and "both", by what is drawn with replacement. A row that is
    constant in a resample counts 0.
    """
    check_resamples(resamples, b)
    fixed = correlation(a, b)[0] @ resamples.targets
    over_subsets, over_both = np.zeros_like(fixed), np.zeros_like(fixed)
    for rows, square_a, square_b, product in resampled_products(a, b, present, resamples.subsets):
        rho = from_squares(product, square_a, square_b)
        over_subsets += rho.sum(axis=1)
        over_both += np.einsum("ktd,td->kd", rho, resamples.targets[rows])
    sums = {"targets": fixed, "subsets": over_subsets, "both": over_both}
    return {over: drawn / len(b) for over, drawn in sums.items()}


def resampled_products(
    a: np.ndarray, b: np.ndarray, present: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Sums of a², b² and ab around the resample's own means, for blocks of targets.

    Takes what `resampled_correlation` takes and counts (M, draws); yields the block's rows t and
    arrays (K, t, draws), (t, draws) and (K, t, draws). Five matrix products, in bounded memory.
    """
    size = max(1, BLOCK // (len(a) * counts.shape[1]))
    for start in range(0, len(b), size):
        rows = slice(start, start + size)
        some_a, some_b = a[:, rows], b[rows]
        drawn = _drawn(present[rows], counts)
        sum_a, sum_b = some_a @ counts, some_b @ counts
        square_a = _around_mean(some_a * some_a, sum_a, sum_a, drawn, counts)
        square_b = _around_mean(some_b * some_b, sum_b, sum_b, drawn, counts)
        for square, values in ((square_a, some_a), (square_b, some_b)):
            square[square <= FLAT * (values * values).sum(axis=-1, keepdims=True)] = 0
        yield rows, square_a, square_b, _around_mean(some_a * some_b, sum_a, sum_b, drawn, counts)


def check_resamples(resamples: Resamples, values: np.ndarray) -> None:
    """Raises InputError unless the resamples are of the targets and subsets of values (T, M)."""
    found = len(resamples.targets), len(resamples.subsets)
    if found != values.shape:
        raise InputError(
            f"The resamples are of {found[0]} targets and {found[1]} subsets, the losses have "
            f"shape {values.shape}; draw them for these losses."
        )


def _counts(size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    if draws < 1:
        raise InputError(f"draws is {draws}; a bootstrap needs at least one.")
    counts = rng.multinomial(size, np.full(size, 1 / size), size=draws)
    return np.ascontiguousarray(counts.T, dtype=float)


def _drawn(present: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many present values every resample holds, at least 1: (t, draws)."""
    drawn = np.tile(counts.sum(axis=0), (len(present), 1))
    gaps = ~present.all(axis=1)
    drawn[gaps] = present[gaps].astype(float) @ counts
    return np.maximum(drawn, 1)


def _around_mean(
    products: np.ndarray,
    sum_a: np.ndarray,
    sum_b: np.ndarray,
    drawn: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    return products @ counts - sum_a * sum_b / drawn
