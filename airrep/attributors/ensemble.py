"""Several methods as one: a weighted mean of their scores, brought to one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from airrep.attributor import check_subsets
from airrep.attributors.members import Member, WithMembers
from airrep.examples import Example, InputError
from airrep.metrics import lds_per_target

REFERENCES = 100  # random subsets that give the scale of subsets' scores
PERCENTILES = (15.87, 50.0, 84.13)  # of a normal distribution: one standard deviation apart
LEAST_SPREAD = 1e-3  # of the standard deviation
ROUNDS = 20  # of fitting: a weight is a multiple of 1/20 at finest


class EnsembleAttributor(WithMembers):
    """score(x, z) = sum_m w_m z_m(x, z), in the units of the first member.

    z_m is member m's score minus its mean over the pool, over its standard deviation there, for
    each target by itself; a member that scores all examples the same adds nothing. The sum is
    multiplied by the first member's standard deviation and its mean is added, so that with all
    weight on it the ensemble is the first member.

    The score of a subset is made in the same way of the members' scores of it, each pooled as that
    member does by itself, so that one member's large scores cannot drown another's. In place of
    mean and standard deviation stand the median and half the distance between the 16th and the
    84th percentile over random subsets of the pool (`reference_subsets`), of a size that depends
    on the subsets asked for: a target that is an example of the pool too scores the few subsets
    that it is in far above the others, and would have a scale of its own.

    `members` are unfitted attributors, names of methods, or pairs (name, parameters); `weights`
    one number of at least 0 a member, None for equal ones. `fit_weights` finds weights from
    labels that no member was trained on. What the members say of the last targets is kept.
    """

    name = "ensemble"
    poolings = ("members",)
    pooling = "members"
    _known: tuple[list[Example], list[np.ndarray]] | None = None  # each member's scores of targets

    def __init__(self, members: Sequence[Member], weights: Sequence[float] | None = None) -> None:
        self.members = members
        self.weights = weights

    def _fit(self, pool: Sequence[Example]) -> None:
        made = self._make_members()
        self.weights_ = _shares(self.weights, len(made))
        self.members_ = [member.fit(pool) for member in made]
        self._known = None

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        return combine(self._member_scores(targets), self.weights_)

    def score_subsets(
        self,
        targets: Sequence[Example],
        subsets: Sequence[ArrayLike],
        scores: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores (targets, subsets), float32; a copy with another `pooling` pools `scores`."""
        self._check_fitted()
        if self.pooling != "members":
            return super().score_subsets(targets, subsets, scores)
        pooled, reference = self.member_subset_scores(targets, subsets)
        return combine(pooled, self.weights_, reference)

    def member_subset_scores(
        self, targets: Sequence[Example], subsets: Sequence[ArrayLike]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Each member's scores (T, M) of the subsets, and of `reference_subsets` (T, R)."""
        self._check_fitted()
        rows = check_subsets(subsets, self.pool_size_)
        both = [*rows, *reference_subsets(rows, self.pool_size_)]
        pooled = [
            member.score_subsets(targets, both, scores)
            for member, scores in zip(self.members_, self._member_scores(targets), strict=True)
        ]
        return [one[:, : len(rows)] for one in pooled], [one[:, len(rows) :] for one in pooled]

    def _member_scores(self, targets: Sequence[Example]) -> list[np.ndarray]:
        """Each member's scores (T, N); those of the last targets are kept, for their subsets."""
        if self._known is None or self._known[0] != list(targets):
            self._known = list(targets), [member.score(targets) for member in self.members_]
        return self._known[1]

    def _state(self) -> dict[str, np.ndarray]:
        return {"pool_size": np.asarray([self.pool_size_])} | self._members_state()

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.weights_ = _shares(self.weights, len(self.members))
        self._restore_members(state, int(state["pool_size"][0]))

    def _saved_params(self) -> dict[str, Any]:
        return super()._saved_params() | {"weights": self.weights_.tolist()}


def combine(
    scores: Sequence[np.ndarray],
    weights: Sequence[float] | np.ndarray,
    reference: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """The weighted mean (T, N) of members' scores (T, N) in the units of the first one.

    See `EnsembleAttributor` for the formula: centre and spread are those of each member's
    `reference` (T, R) of random subsets, or mean and standard deviation of the scores themselves.
    Raises InputError for shapes or numbers that do not fit together.
    """
    if len({one.shape for one in scores}) > 1:
        raise InputError(
            f"The members' scores have shapes {[one.shape for one in scores]}; give scores of the "
            "same targets and pool."
        )
    references = [None] * len(scores) if reference is None else reference
    centre, units, _ = _units(scores[0], references[0])
    mixed = mix(list(map(standardise, scores, references)), weights)
    return np.asarray(centre + units * mixed, dtype=np.float32)


def mix(
    scores: Sequence[np.ndarray] | np.ndarray, weights: Sequence[float] | np.ndarray
) -> np.ndarray:
    """The weighted mean (T, N) of members' standardised scores (T, N).

    Raises InputError for weights that are not the members'.
    """
    return np.einsum("k,ktn->tn", _shares(weights, len(scores)), np.asarray(scores))


def reference_subsets(subsets: Sequence[np.ndarray], pool_size: int) -> list[np.ndarray]:
    """Random subsets of the pool, always the same ones, of the median size of those given.

    They have half of the pool at most: all subsets of the whole pool are one.
    """
    median = int(np.median([len(subset) for subset in subsets]))
    size = max(1, min(median, pool_size // 2))
    rng = np.random.default_rng(0)
    return [rng.choice(pool_size, size, replace=False) for _ in range(REFERENCES)]


def standardise(scores: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """Scores (T, N) minus their centre, over their spread: those of the `reference` (T, R) of
    random subsets, or mean and standard deviation of the scores themselves. 0 for a target
    without spread."""
    centre, spread, is_flat = _units(scores, reference)
    return np.where(is_flat, 0.0, (scores - centre) / np.where(is_flat, 1.0, spread))


def fit_weights(scores: Sequence[np.ndarray], losses: np.ndarray) -> np.ndarray:
    """Weights (members,), summing to 1, of the ensemble with the highest LDS on the labels.

    `scores` are members' standardised scores (T, M) of the subsets that gave the losses (T, M),
    which must be labels that no member was trained on: `airrep.holdout.held_out_labels` gives
    those that training held out. Never give test labels. Weights are chosen by ensemble selection
    with replacement (Caruana et al., "Ensemble selection from libraries of models", 2004): the
    member that raises the LDS of the mean most is added again and again, `ROUNDS` times, and the
    best of the means on the way is taken, the earlier of equal ones.
    """
    counts = np.zeros(len(scores))
    best, best_lds = counts, -np.inf
    stacked = np.stack(scores)  # (members, T, M), copied once
    for _ in range(ROUNDS):
        tried = [counts + one for one in np.eye(len(scores))]
        found = [float(lds_per_target(mix(stacked, one), losses)[0].mean()) for one in tried]
        counts = tried[int(np.argmax(found))]
        if max(found) > best_lds:
            best, best_lds = counts, max(found)
    return best / best.sum()


def _units(
    scores: np.ndarray, reference: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each target's centre and spread (T, 1), and whether there is no spread."""
    given = np.asarray(scores if reference is None else reference, dtype=np.float64)
    centre, spread = given.mean(axis=1, keepdims=True), given.std(axis=1, keepdims=True)
    # Rounding spreads equal scores by some 1e-7 of their size.
    is_flat = spread <= 1e-6 * np.abs(given).max(axis=1, keepdims=True)
    if reference is not None:
        low, middle, high = np.percentile(given, PERCENTILES, axis=1)[..., None]
        # Where most are equal (words that few subsets have) percentiles say nothing.
        is_told = (high - low) / 2 > LEAST_SPREAD * spread
        centre = np.where(is_told, middle, centre)
        spread = np.where(is_told, (high - low) / 2, spread)
    return centre, spread, is_flat


def _shares(weights: Sequence[float] | np.ndarray | None, count: int) -> np.ndarray:
    """Weights (members,) that sum to 1; InputError where they are not weights of the members."""
    try:
        given = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        given = np.empty(0)
    fits = count > 0 and given.shape == (count,) and np.isfinite(given).all()
    if not fits or not (given >= 0).all() or not given.sum() > 0:
        raise InputError(
            f"An ensemble of {count} members got weights {weights}; give at least one member, and "
            "a number of at least 0 for each, not all 0."
        )
    return given / given.sum()
