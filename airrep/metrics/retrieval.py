"""Does a score find the examples that are known to support a target?"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from airrep.examples import InputError


def recall_at_k(scores: ArrayLike, proponents: Sequence[ArrayLike], k: int) -> float:
    """Share of a target's proponents among its k highest scores, mean over targets with any.

    Takes scores (T, N) and T lists of pool rows. Equal scores count as in a random order, so
    the pool's order earns nothing. Raises InputError where no target has proponents.
    """
    _check_k(k, "recall_at_k")
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


def ndcg_at_k(scores: ArrayLike, proponents: Sequence[ArrayLike], k: int) -> float:
    """Discounted gain of the k highest scores over the best one possible, mean over targets.

    A proponent at rank r gains 1 / log2(r + 1), other rows nothing. Takes scores (T, N) and T
    lists of pool rows; targets without proponents do not count. Equal scores count as in a
    random order: the expectation is exact. Raises InputError where no target has proponents.
    """
    _check_k(k, "ndcg_at_k")
    gains = []
    for row, rows in _with_proponents(scores, proponents):
        discount = 1 / np.log2(np.arange(len(row)) + 2)
        discount[k:] = 0
        until = np.concatenate([[0.0], np.cumsum(discount)])
        above, equal = _standing(row, row[rows])
        gained = ((until[above + equal] - until[above]) / equal).sum()
        gains.append(gained / until[min(len(rows), k)])
    return float(np.mean(gains))


def _check_k(k: int, name: str) -> None:
    if k < 1:
        raise InputError(f"{name} got k = {k}; ask for at least one row.")


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
