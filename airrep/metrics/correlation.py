"""Row-wise correlation of two matrices, of values or of ranks, with gaps."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from airrep.examples import InputError


def paired(
    scores: ArrayLike, losses: ArrayLike, noun: str = "subset scores"
) -> tuple[np.ndarray, np.ndarray]:
    """Both as floats (T, M); InputError for other shapes and scores that are not finite."""
    scores, losses = np.asarray(scores, dtype=float), np.asarray(losses, dtype=float)
    check_shapes(scores, losses, noun, "losses")
    if not np.isfinite(scores).all():
        raise InputError(f"The {noun} hold values that are not finite; only losses may miss.")
    return scores, losses


def check_shapes(a: np.ndarray, b: np.ndarray, noun_a: str, noun_b: str) -> None:
    """Raises InputError unless both are (targets, columns) with at least two columns."""
    if a.ndim != 2 or a.shape != b.shape:
        raise InputError(
            f"The {noun_a} have shape {a.shape}, the {noun_b} {b.shape}; "
            "both must be (targets, subsets)."
        )
    if a.shape[0] < 1 or a.shape[1] < 2:
        raise InputError(
            f"The {noun_a} have shape {a.shape}; a correlation needs at least one target "
            "and two subsets."
        )


def centred(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Values minus their row's mean over what is present, 0 in gaps; a constant row is all 0."""
    low = np.where(present, values, np.inf).min(axis=-1, keepdims=True)
    # From the lowest value, so that a constant row has no rounding error to correlate with.
    above = np.where(present, values - np.where(np.isfinite(low), low, 0.0), 0.0)
    mean = above.sum(axis=-1, keepdims=True) / np.maximum(present.sum(axis=-1, keepdims=True), 1)
    return np.where(present, above - mean, 0.0)


def centred_ranks(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Average ranks among what is present in a row, minus their mean, 0 in gaps."""
    # Gaps go to the end, where they change no other rank.
    ranks = rankdata(np.where(present, values, np.inf), axis=-1)
    mean = (present.sum(axis=-1, keepdims=True) + 1) / 2
    return np.where(present, ranks - mean, 0.0)


def correlation(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation (..., T) of centred rows, 0 where a row is constant; and which are constant."""
    square_a, square_b = _dot(a, a), _dot(b, b)
    flat = (square_a == 0) | (square_b == 0)
    return from_squares(_dot(a, b), square_a, square_b), flat


def from_squares(product: np.ndarray, square_a: np.ndarray, square_b: np.ndarray) -> np.ndarray:
    """Correlation from sums of products and squares around the mean; 0 where a square is 0."""
    norm = np.sqrt(square_a * square_b)
    return np.divide(product, norm, out=np.zeros_like(norm), where=norm > 0)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, without an array of all the products."""
    return np.einsum("...m,...m->...", a, b)
