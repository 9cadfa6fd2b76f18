"""A softmax head with ridge on frozen features: fitted to the end, with its exact derivatives.

Letters: n examples, d features, c logits that are free. Parameters (c, d) are flattened row by
row, so the Hessian (c d, c d) has a d x d block for each pair of logits.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import log_softmax, logsumexp, softmax

from airrep.examples import InputError

MAX_STEPS = 100
# Largest entry of the gradient, as a share of the largest there could be.
TOLERANCE = 1e-12
BLOCK = 2**24  # numbers in one block of per-example gradients: bounds the memory


@dataclass(frozen=True)
class LinearHead:
    """Minimises sum of counts x cross-entropy + l2/2 |weights|^2 over examples' features (n, d).

    Two classes have one free logit (c = 1, plain logistic regression: class 0 has logit 0), more
    have one each (c = classes). An intercept is a column of ones among the features, under the
    same ridge. Labels are class numbers (n,); losses are in nats.
    """

    weights: np.ndarray
    classes: int
    l2: float

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Of every class, (n, classes)."""
        return softmax(self._logits(features), axis=1)

    def losses(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Cross-entropy (n,)."""
        return -log_softmax(self._logits(features), axis=1)[np.arange(len(labels)), labels]

    def margins(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """log(p / (1 - p)) of the own class, (n,)."""
        logits = self._logits(features)
        own = np.arange(len(labels)), labels
        margins = logits[own]
        logits[own] = -np.inf
        return margins - logsumexp(logits, axis=1)

    def residuals(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Derivative (n, c) of the loss by the free logits: probability minus 1 for the own class.

        The gradient of one example's loss is residual[a] x feature[j] at logit a, feature j.
        """
        residuals = self.probabilities(features)
        residuals[np.arange(len(labels)), labels] -= 1
        return residuals[:, -len(self.weights) :]

    def gradients(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Gradients (n, c d) of the examples' losses, without ridge."""
        return outer(self.residuals(features, labels), features)

    def curvatures(self, features: np.ndarray) -> np.ndarray:
        """Second derivative (n, c, c) of the loss by the free logits: diag(p) - p p^T."""
        p = self.probabilities(features)[:, -len(self.weights) :]
        curvatures = -p[:, :, None] * p[:, None, :]
        diagonal = np.arange(p.shape[1])
        curvatures[:, diagonal, diagonal] += p
        return curvatures

    def hessian(self, features: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """Second derivative (c d, c d) of the objective over these examples, ridge included."""
        p = self.probabilities(features)[:, -len(self.weights) :]
        weight = np.ones(len(p)) if counts is None else counts
        c, d = self.weights.shape
        hessian = self.l2 * np.eye(c * d)
        for logit in range(c):
            part = slice(logit * d, (logit + 1) * d)
            hessian[part, part] += features.T @ (features * (weight * p[:, logit])[:, None])
        for rows in blocks(len(p), c * d):
            cross = outer(p[rows], features[rows])
            hessian -= cross.T @ (cross * weight[rows, None])
        return hessian

    def moved(self, change: np.ndarray) -> "LinearHead":
        """The head with a flat change (c d,) added to its weights."""
        return replace(self, weights=self.weights + change.reshape(self.weights.shape))

    def _logits(self, features: np.ndarray) -> np.ndarray:
        logits = features @ self.weights.T
        return logits if self.classes > 2 else np.column_stack([np.zeros(len(logits)), logits])


def fit_linear_head(
    features: ArrayLike,
    labels: ArrayLike,
    l2: float,
    classes: int | None = None,
    counts: np.ndarray | None = None,
    start: LinearHead | None = None,
) -> LinearHead:
    """The head that minimises the objective, by Newton's method with backtracking, in float64.

    Takes features (n, d), labels (n,), the ridge `l2` and, where wanted, how often each example
    counts (n,) and a head to start from. Ends when the gradient is zero up to rounding. Raises
    InputError for shapes that do not fit, values that are not finite, labels outside the
    classes, fewer than two classes, and l2 that is not above 0.
    """
    features, labels = _checked(features, labels, l2)
    classes = int(labels.max()) + 1 if classes is None else classes
    if classes < 2 or labels.max() >= classes:
        raise InputError(
            f"The labels go up to {labels.max()} for {classes} classes; give at least two classes "
            "and labels from 0 to one less."
        )
    weight = np.ones(len(labels)) if counts is None else counts
    zero = np.zeros((1 if classes == 2 else classes, features.shape[1]))
    head = LinearHead(zero if start is None else start.weights, classes, l2)
    largest = TOLERANCE * max(1.0, float((weight @ np.abs(features)).max()))
    for _ in range(MAX_STEPS):
        residuals = head.residuals(features, labels) * weight[:, None]
        gradient = (residuals.T @ features + l2 * head.weights).ravel()
        if np.abs(gradient).max() <= largest:
            return head
        step = cho_solve(factor_hessian(head.hessian(features, weight)), -gradient)
        head = _backtrack(head, step, float(gradient @ step), features, labels, weight)
    raise InputError(
        f"The head's gradient is still {np.abs(gradient).max():.1e} after {MAX_STEPS} steps; scale "
        "the features to about 1 or give a larger l2."
    )


def factor_hessian(hessian: np.ndarray) -> tuple[np.ndarray, bool]:
    """For `cho_solve`; InputError for a Hessian that is singular up to rounding."""
    try:
        return cho_factor(hessian, lower=True)
    except LinAlgError:
        raise InputError(
            "The head's Hessian is singular up to rounding; give a larger l2."
        ) from None


def outer(residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Flat outer products (n, c d) of (n, c) and (n, d), row by row."""
    products = residuals[:, :, None] * features[:, None, :]
    return products.reshape(len(features), residuals.shape[1] * features.shape[1])


def blocks(rows: int, width: int) -> list[slice]:
    """Slices of rows, so that each holds a bounded number of numbers of this width."""
    height = max(1, BLOCK // width)
    return [slice(start, start + height) for start in range(0, rows, height)]


def _backtrack(
    head: LinearHead,
    step: np.ndarray,
    slope: float,
    features: np.ndarray,
    labels: np.ndarray,
    weight: np.ndarray,
) -> LinearHead:
    """The first of step, step/2, step/4, ... that lowers the objective enough."""

    def objective(head: LinearHead) -> float:
        return weight @ head.losses(features, labels) + head.l2 / 2 * np.sum(head.weights**2)

    now = objective(head)
    # Near the minimum the objective no longer shows the descent in its digits.
    rounding = 1e-12 * abs(now)
    share = 1.0
    while (
        objective(head.moved(share * step)) > now + 1e-4 * share * slope + rounding
        and share > 1e-10
    ):
        share /= 2
    return head.moved(share * step)


def _checked(features: ArrayLike, labels: ArrayLike, l2: float) -> tuple[np.ndarray, np.ndarray]:
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if features.ndim != 2 or features.size == 0 or labels.shape != features.shape[:1]:
        raise InputError(
            f"The features have shape {features.shape}, the labels {labels.shape}; give "
            "(examples, features) and one label an example."
        )
    if not np.isfinite(features).all():
        raise InputError("The features hold values that are not finite; give finite ones.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InputError(
            f"The labels are {labels.dtype} from {labels.min()}; give class numbers from 0."
        )
    if not 0 < l2 < np.inf:
        raise InputError(f"l2 is {l2}; give a number above 0, so that the head is unique.")
    return features, labels
