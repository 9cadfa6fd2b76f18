"""Seeded plans: the subsets of the pool that get labels, and the splits of the targets."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from airrep.examples import InputError

KINDS = ("fixed", "bernoulli")
LISTED = 4096  # spaces of at most this many subsets are listed, larger ones drawn from
TRIES = 10_000


def make_plan(
    rows: Sequence[int] | np.ndarray,
    count: int,
    *,
    size: int | None = None,
    fraction: float | None = None,
    kind: str = "fixed",
    seed: int,
    exclude_plans: Iterable[Sequence[ArrayLike]] = (),
) -> list[np.ndarray]:
    """`count` different subsets of `rows` (pool rows), each sorted int64.

    kind "fixed": every subset has `size` rows (or round(fraction * rows)), all equally likely.
    kind "bernoulli": every row is in with probability `fraction` (or size / rows); empty subsets
    are drawn again. No subset of `exclude_plans` comes back. Subset j has its own child seed, so
    a longer plan begins with the shorter one. Raises InputError for values outside their ranges
    and when more different subsets are asked for than there are.
    """
    pool = _check_rows(rows)
    if count < 1:
        raise InputError(f"The plan asks for {count} subsets; ask for at least 1.")
    space = _space(pool, size, fraction, kind)
    taken = {
        np.sort(np.asarray(subset, dtype=np.int64)).tobytes()
        for plan in exclude_plans
        for subset in plan
    }
    taken = {key for key in taken if space.holds(np.frombuffer(key, dtype=np.int64))}
    if count > space.count - len(taken):
        raise InputError(
            f"The plan asks for {count} different subsets, but {space} has only {space.count}, "
            f"of which {len(taken)} are excluded; ask for fewer or change the size."
        )
    listed = _listed(space, taken) if space.count <= LISTED else None
    plan = []
    for number in range(count):
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
        subset = listed.draw(generator) if listed else _draw_new(space, taken, generator, number)
        taken.add(subset.tobytes())
        plan.append(subset)
    return plan


def split_targets(count: int, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Random target rows of each split, sorted int64: disjoint, together all `count` rows.

    `shares` (adding up to 1) become whole numbers by largest remainder. Raises InputError for
    shares that do not add up and for splits that would be empty.
    """
    total = sum(shares.values())
    if not shares or min(shares.values()) <= 0 or not math.isclose(total, 1.0, abs_tol=1e-6):
        raise InputError(
            f"The target shares are {dict(shares)}; give positive shares that add up to 1."
        )
    exact = np.asarray([share / total * count for share in shares.values()])
    sizes = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(sizes - exact, kind="stable")
    sizes[order[: count - sizes.sum()]] += 1
    if sizes.min() < 1:
        name = list(shares)[int(sizes.argmin())]
        raise InputError(
            f"{count} targets leave none for the split {name!r} of {dict(shares)}; "
            "give more targets or a larger share."
        )
    shuffled = np.random.default_rng(seed).permutation(count)
    parts = np.split(shuffled, np.cumsum(sizes)[:-1])
    return {name: np.sort(part).astype(np.int64) for name, part in zip(shares, parts, strict=True)}


@dataclass(frozen=True)
class _Fixed:
    """All subsets of one size."""

    rows: np.ndarray
    size: int

    @property
    def count(self) -> int:
        return math.comb(len(self.rows), self.size)

    @property
    def tries(self) -> int:
        # Each try finds a new subset with probability at least 1 / count.
        return max(TRIES, 100 * self.count)

    def __str__(self) -> str:
        return f"drawing {self.size} of {len(self.rows)} rows"

    def holds(self, subset: np.ndarray) -> bool:
        return len(subset) == self.size and bool(np.isin(subset, self.rows).all())

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        return np.sort(generator.choice(self.rows, self.size, replace=False, shuffle=False))

    def weighted(self) -> Iterator[tuple[np.ndarray, float]]:
        for subset in combinations(self.rows.tolist(), self.size):
            yield np.asarray(subset, dtype=np.int64), 1.0


@dataclass(frozen=True)
class _Bernoulli:
    """All subsets but the empty one; every row is in with the same probability."""

    rows: np.ndarray
    fraction: float

    @property
    def count(self) -> int:
        return 1 if self.fraction == 1 else 2 ** len(self.rows) - 1

    @property
    def tries(self) -> int:
        return TRIES

    def __str__(self) -> str:
        return f"drawing each of {len(self.rows)} rows with probability {self.fraction:g}"

    def holds(self, subset: np.ndarray) -> bool:
        possible = len(subset) == len(self.rows) if self.fraction == 1 else len(subset) > 0
        return possible and bool(np.isin(subset, self.rows).all())

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        return self.rows[generator.random(len(self.rows)) < self.fraction]

    def weighted(self) -> Iterator[tuple[np.ndarray, float]]:
        everything = self.rows.tolist()
        for size in range(1, len(everything) + 1):
            weight = self.fraction**size * (1 - self.fraction) ** (len(everything) - size)
            for subset in combinations(everything, size):
                yield np.asarray(subset, dtype=np.int64), weight


class _Listed:
    """The subsets still to be had, with their probabilities."""

    def __init__(self, subsets: list[np.ndarray], weights: list[float]) -> None:
        self.subsets = subsets
        self.weights = np.asarray(weights)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Takes one out; what rejection would give, without its waiting."""
        place = int(generator.choice(len(self.subsets), p=self.weights / self.weights.sum()))
        self.weights = np.delete(self.weights, place)
        return self.subsets.pop(place)


def _listed(space: _Fixed | _Bernoulli, taken: set[bytes]) -> _Listed:
    left = [
        (subset, weight) for subset, weight in space.weighted() if subset.tobytes() not in taken
    ]
    return _Listed([subset for subset, _ in left], [weight for _, weight in left])


def _draw_new(
    space: _Fixed | _Bernoulli, taken: set[bytes], generator: np.random.Generator, number: int
) -> np.ndarray:
    tries = 0
    while tries < space.tries:
        subset = space.draw(generator)
        if len(subset) and subset.tobytes() not in taken:
            return subset
        tries += 1
    raise InputError(
        f"No new subset came up in {tries} tries after {number} subsets: {space} gives almost "
        "only empty or known ones; change the fraction or ask for fewer subsets."
    )


def _space(
    pool: np.ndarray, size: int | None, fraction: float | None, kind: str
) -> _Fixed | _Bernoulli:
    if kind not in KINDS:
        raise InputError(f"There is no subset kind {kind!r}; choose one of {', '.join(KINDS)}.")
    if (size is None) == (fraction is None):
        raise InputError(
            f"The plan got size {size} and fraction {fraction}; give exactly one of the two."
        )
    if fraction is not None and not 0 < fraction <= 1:
        raise InputError(f"The subset fraction is {fraction}; give one above 0 and at most 1.")
    if size is None:
        assert fraction is not None
        size = round(fraction * len(pool))
    elif not 1 <= size <= len(pool):
        raise InputError(
            f"The subset size is {size}, but there are {len(pool)} rows to draw from; "
            f"give a size from 1 to {len(pool)}."
        )
    if kind == "bernoulli":
        return _Bernoulli(pool, size / len(pool) if fraction is None else fraction)
    if size == 0:
        raise InputError(
            f"A fraction of {fraction} of {len(pool)} rows is an empty subset; raise the fraction."
        )
    return _Fixed(pool, size)


def _check_rows(rows: Sequence[int] | np.ndarray) -> np.ndarray:
    pool = np.asarray(rows)
    if pool.ndim != 1 or not len(pool) or not np.issubdtype(pool.dtype, np.integer):
        raise InputError(
            f"The rows to draw from have shape {pool.shape} and type {pool.dtype}; "
            "give a list of integer pool rows."
        )
    unique = np.unique(pool).astype(np.int64)
    if len(unique) < len(pool) or unique[0] < 0:
        raise InputError(
            "The rows to draw from repeat or are negative; give each pool row once, from 0 up."
        )
    return unique
