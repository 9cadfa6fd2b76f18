"""Several methods as one: a weighted mean of their scores, brought to one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from airrep.attributor import Attributor
from airrep.attributors import make_attributor
from airrep.examples import Example, InputError
from airrep.label_store import Labels
from airrep.metrics import lds_per_target

if TYPE_CHECKING:
    from airrep.pooling import Membership

ROUNDS = 20  # of fitting: a weight is a multiple of 1/20 at finest
# A member as given: an attributor, a method's name, or its name and parameters.
Member = Attributor | str | tuple[str, Mapping[str, Any]]


class EnsembleAttributor(Attributor):
    """score(x, z) = sum_m w_m z_m(x, z), in the units of the first member.

    z_m is member m's score minus its mean over the pool, over its standard deviation there, for
    each target by itself; a member that scores all examples the same adds nothing. The sum is
    multiplied by the first member's standard deviation and its mean is added, so that with all
    weight on it the ensemble is the first member, and attention pooling is as sharp as it is for
    that member: put AirRep first. Subsets are pooled once, from these scores.

    `members` are unfitted attributors, names of methods, or pairs (name, parameters); `weights`
    one number of at least 0 a member, None for equal ones. `fit_weights` finds weights from
    labels that no member was trained on.
    """

    name = "ensemble"

    def __init__(
        self,
        members: Sequence[Member],
        weights: Sequence[float] | None = None,
        pooling: str = "attention",
    ) -> None:
        self.members = members
        self.weights = weights
        self.pooling = pooling

    @property
    def oracle(self) -> bool:  # type: ignore[override]
        """Whether one of the members is an oracle."""
        return any(_made(member).oracle for member in self.members)

    def _fit(self, pool: Sequence[Example]) -> None:
        self.weights_ = _shares(self.weights, len(self.members))
        self.members_ = [_made(member).fit(pool) for member in self.members]

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        return combine([member.score(targets) for member in self.members_], self.weights_)

    def _state(self) -> dict[str, np.ndarray]:
        state = {"pool_size": np.asarray([self.pool_size_])}
        for number, member in enumerate(self.members_):
            state |= {f"{number}/{key}": array for key, array in member._state().items()}
        return state

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.weights_ = _shares(self.weights, len(self.members))
        self.members_ = [_made(member) for member in self.members]
        for number, member in enumerate(self.members_):
            prefix = f"{number}/"
            own = {key: array for key, array in state.items() if key.startswith(prefix)}
            member._restore({key.removeprefix(prefix): array for key, array in own.items()})
            member.pool_size_ = int(state["pool_size"][0])

    def _saved_params(self) -> dict[str, Any]:
        members = [(member.name, member._saved_params()) for member in self.members_]
        return {"members": members, "weights": self.weights_.tolist(), "pooling": self.pooling}

    def _save_parts(self, folder: Path) -> None:
        for number, member in enumerate(self.members_):
            (folder / str(number)).mkdir(exist_ok=True)
            member._save_parts(folder / str(number))

    def _load_parts(self, folder: Path) -> None:
        for number, member in enumerate(self.members_):
            member._load_parts(folder / str(number))
        # Kept as the argument too, so that fitting again needs no other way of making them.
        self.members = self.members_


def combine(scores: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """The weighted mean (T, N) of members' scores (T, N) in the units of the first one.

    See `EnsembleAttributor` for the formula. Raises InputError for shapes or numbers that do not
    fit together.
    """
    shares = _shares(weights, len(scores))
    if len({one.shape for one in scores}) > 1:
        raise InputError(
            f"The members' scores have shapes {[one.shape for one in scores]}; give scores of the "
            "same targets and pool."
        )
    first = np.asarray(scores[0], dtype=np.float64)
    units, mean = first.std(axis=1, keepdims=True), first.mean(axis=1, keepdims=True)
    total = sum(share * _standardise(one) for share, one in zip(shares, scores, strict=True))
    return np.asarray(mean + units * total, dtype=np.float32)


def fit_weights(
    scores: Sequence[np.ndarray], labels: Labels, pooling: str = "attention"
) -> np.ndarray:
    """Weights (members,), summing to 1, of the ensemble with the highest LDS on the labels.

    `scores` are members' scores (T, N); `labels.losses` (T, M) are of the same targets, and must
    be labels that no member was trained on: `airrep.holdout.held_out_labels` gives those that
    training held out. Never give test labels. Weights are chosen by ensemble selection with
    replacement (Caruana et al., "Ensemble selection from libraries of models", 2004): the member
    that raises the LDS of the mean most is added again and again, `ROUNDS` times, and the best
    of the means on the way is taken, the earlier of equal ones.
    """
    from airrep.pooling import membership

    members = membership(labels.subsets, scores[0].shape[1])
    counts = np.zeros(len(scores))
    best, best_lds = counts, -np.inf
    for _ in range(ROUNDS):
        tried = [counts + one for one in np.eye(len(scores))]
        found = [_lds(combine(scores, each), labels, members, pooling) for each in tried]
        counts = tried[int(np.argmax(found))]
        if max(found) > best_lds:
            best, best_lds = counts, max(found)
    return best / best.sum()


def _lds(scores: np.ndarray, labels: Labels, members: Membership, pooling: str) -> float:
    import torch

    from airrep.pooling import pool_scores

    pooled = pool_scores(torch.from_numpy(scores), members, pooling)
    return float(lds_per_target(pooled.numpy(), labels.losses)[0].mean())


def _standardise(scores: np.ndarray) -> np.ndarray:
    """Each target's scores minus their mean over their standard deviation; 0 without spread."""
    scores = np.asarray(scores, dtype=np.float64)
    centred = scores - scores.mean(axis=1, keepdims=True)
    std = centred.std(axis=1, keepdims=True)
    # Rounding spreads equal scores by some 1e-7 of their size.
    flat = std <= 1e-6 * np.abs(scores).max(axis=1, keepdims=True)
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, std))


def _shares(weights: Sequence[float] | np.ndarray | None, count: int) -> np.ndarray:
    """Weights (members,) that sum to 1; InputError where they are not weights of the members."""
    given = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if count == 0 or given.shape != (count,) or not (given >= 0).all() or not given.sum() > 0:
        raise InputError(
            f"An ensemble of {count} members got weights {weights}; give at least one member, and "
            "a number of at least 0 for each, not all 0."
        )
    return given / given.sum()


def _made(member: Member) -> Attributor:
    """The member as an attributor."""
    if isinstance(member, Attributor):
        return member
    name, params = (member, {}) if isinstance(member, str) else member
    return make_attributor(name, **params)
