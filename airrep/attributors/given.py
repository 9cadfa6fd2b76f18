"""Scores that another tool gave: a file of them, matched by id and judged like any method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from airrep.attributor import Attributor, check_subsets
from airrep.examples import Example, InputError
from airrep.score_files import (
    GivenScores,
    check_scores,
    pack_scores,
    read_scores,
    unpack_scores,
)


class GivenAttributor(Attributor):
    """Serves the scores of a file; `scores` is its path, or what `read_scores` gave.

    Pool and targets may be a part of the file's. With subset scores, `plan` is the list of
    subsets (pool rows) that their columns stand for, and other subsets are an InputError. Where
    a file has subset scores alone, an example's score is what its presence is worth: the mean
    over the subsets that hold it minus the mean over the others, 0 where all or none do.
    """

    name = "given"

    def __init__(
        self,
        scores: str | Path | GivenScores,
        pooling: str = "sum",
        plan: Sequence[ArrayLike] | None = None,
    ) -> None:
        self.scores = scores
        self.pooling = pooling
        self.plan = plan

    def _fit(self, pool: Sequence[Example]) -> None:
        given = self.scores if isinstance(self.scores, GivenScores) else read_scores(self.scores)
        if given.pooling not in (None, self.pooling):
            raise InputError(
                f"{given.source} says that its scores pool by {given.pooling!r}, but pooling is "
                f"{self.pooling!r}; give the file's."
            )
        self.plan_ = _check_plan(given, self.plan, len(pool))
        self.given_ = given.of_pool(pool)

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        rows = self.given_.target_rows(targets)
        if self.given_.scores is not None:
            return self.given_.scores[rows]
        assert self.given_.subset_scores is not None
        return _worth_of_presence(self.given_.subset_scores[rows], self.plan_, self.pool_size_)

    def score_subsets(
        self,
        targets: Sequence[Example],
        subsets: Sequence[ArrayLike],
        scores: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores (targets, subsets): those of the file where it has them, else pooled ones."""
        self._check_fitted()
        if self.given_.subset_scores is None:
            return super().score_subsets(targets, subsets, scores)
        numbers = {_members(subset): number for number, subset in enumerate(self.plan_)}
        wanted = [_members(rows) for rows in check_subsets(subsets, self.pool_size_)]
        unknown = [place for place, members in enumerate(wanted) if members not in numbers]
        if unknown:
            raise InputError(
                f"Subset {unknown[0]} is not in the plan that {self.given_.source} has subset "
                "scores of; ask for subsets of that plan."
            )
        columns = [numbers[members] for members in wanted]
        return self.given_.subset_scores[self.given_.target_rows(targets)][:, columns]

    def _state(self) -> dict[str, np.ndarray]:
        state = pack_scores(self.given_)
        if self.plan_:
            state["plan_rows"] = np.concatenate(self.plan_)
            state["plan_ends"] = np.cumsum([len(subset) for subset in self.plan_])
        return state

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.given_ = check_scores(
            str(self.scores), unpack_scores(state), {"pooling": self.pooling}
        )
        self.plan_ = []
        if "plan_rows" in state:
            self.plan_ = np.split(state["plan_rows"], state["plan_ends"][:-1])
        # Kept as the arguments too, so that fitting again needs no other file.
        self.scores, self.plan = self.given_, self.plan_ or None

    def _saved_params(self) -> dict[str, Any]:
        return {"scores": self.given_.source, "pooling": self.pooling}


def _check_plan(
    given: GivenScores, plan: Sequence[ArrayLike] | None, pool_size: int
) -> list[np.ndarray]:
    """The plan whose subsets the columns of subset scores are; empty where there are none."""
    if given.subset_scores is None:
        return []
    count = given.subset_scores.shape[1]
    if plan is None or len(plan) != count:
        raise InputError(
            f"{given.source} has scores of {count} subsets, and the plan has "
            f"{0 if plan is None else len(plan)}; give a column a subset of the plan, in its order."
        )
    return check_subsets(plan, pool_size)


def _worth_of_presence(
    subset_scores: np.ndarray, plan: Sequence[np.ndarray], pool_size: int
) -> np.ndarray:
    """Scores (T, N): mean subset score with an example minus the mean without it."""
    members = np.zeros((len(plan), pool_size))
    for number, rows in enumerate(plan):
        members[number, rows] = 1
    held = members.sum(axis=0)
    without = len(plan) - held
    inside = subset_scores @ members
    outside = subset_scores.sum(axis=1, keepdims=True) - inside
    known = (held > 0) & (without > 0)
    return np.where(known, inside / np.maximum(held, 1) - outside / np.maximum(without, 1), 0)


def _members(rows: np.ndarray) -> bytes:
    """The same for two subsets of the same rows, whatever their order."""
    return np.sort(rows).tobytes()
