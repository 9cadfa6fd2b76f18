"""How far the labels of a target can be trusted, from the labels alone."""

import numpy as np

RIDGE = 0.1  # of the mean square of a label
# A target that nothing predicts may be the only one of its kind: it is not silenced.
LEAST_WEIGHT = 0.05


def target_reliability(labels: np.ndarray) -> np.ndarray:
    """Share (T,) of the variance of a target's labels that is more than noise, from 0 to 1.

    Takes standardised labels (T, M), NaN where missing. Noise is what the other targets do not
    tell: each label is predicted by ridge regression on the other targets' labels of the same
    subset, fitted on the other subsets, and the share is the squared correlation of prediction
    and label (0 where it is negative). It is too low where there are few subsets to fit on. Noise
    that all targets share, such as a fine-tuning run that went badly, counts as signal, and a
    target like no other counts as noise.

    All leave-one-out fits come from one inverse of a (M, M) kernel: leaving a target out is a
    change of rank one (Sherman and Morrison), leaving a subset out has a closed form (Allen's
    PRESS). Takes O(M^3 + T M^2).
    """
    features = np.nan_to_num(labels.astype(np.float64)).T / np.sqrt(len(labels))  # (M, T)
    inverse = np.linalg.inv(features @ features.T + RIDGE * np.eye(len(features)))
    solved = inverse @ features
    rest = 1 - (features * solved).sum(axis=0)  # of the change of rank one
    errors = (solved / rest) / (np.diag(inverse)[:, None] + solved**2 / rest)
    return np.maximum(_correlation(features - errors, features), 0.0) ** 2


def reliability_weights(labels: np.ndarray) -> np.ndarray:
    """Weights (T,) of targets in an objective: their reliability, at least `LEAST_WEIGHT`."""
    return np.maximum(target_reliability(labels), LEAST_WEIGHT)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's r of every column, 0 where one does not vary."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return (a * b).sum(axis=0) / np.where(norm > 1e-12, norm, np.inf)
