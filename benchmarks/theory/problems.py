"""Classification problems small enough to fit thousands of times: bundled data, and Gaussian."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from airrep.gradients.linear_head import LinearHead, fit_linear_head
from airrep.gradients.linear_influence import HeadInfluence

BUNDLED = ("wine", "breast_cancer", "digits")
DIGITS_DIMENSIONS = 20  # principal components, so that a fit takes hundredths of a second


@dataclass(frozen=True)
class Problem:
    """A pool (n, d), targets (T, d) from the same source, and the ridge."""

    features: np.ndarray
    labels: np.ndarray
    target_features: np.ndarray
    target_labels: np.ndarray
    l2: float

    @property
    def classes(self) -> int:
        return int(np.concatenate([self.labels, self.target_labels]).max()) + 1

    def fit(self, counts: np.ndarray | None = None, start: LinearHead | None = None) -> LinearHead:
        """The head over the pool, or over as much of it as `counts` (n,) says."""
        return fit_linear_head(self.features, self.labels, self.l2, self.classes, counts, start)

    def influence(self) -> HeadInfluence:
        return HeadInfluence(self.fit(), self.features, self.labels)


def bundled_problem(
    name: str, targets: int, l2: float, rng: np.random.Generator, pool: int | None = None
) -> Problem:
    """A data set of scikit-learn, standardised, with an intercept, split at random."""
    features, labels = _bundled(name)
    order = rng.permutation(len(labels))
    held, kept = order[:targets], order[targets:][:pool]
    return Problem(features[kept], labels[kept], features[held], labels[held], l2)


def gaussian_problem(
    n: int, d: int, targets: int, l2: float, rng: np.random.Generator, strength: float = 1.0
) -> Problem:
    """Standard normal features; labels by logistic regression with weights of this length."""
    weights = rng.normal(size=d)
    weights *= strength / np.linalg.norm(weights)
    features = rng.normal(size=(n + targets, d))
    labels = (rng.random(n + targets) < 1 / (1 + np.exp(-features @ weights))).astype(int)
    return Problem(features[:n], labels[:n], features[n:], labels[n:], l2)


def without(n: int, rows: np.ndarray) -> np.ndarray:
    """Counts (n,) that leave these rows out."""
    counts = np.ones(n)
    counts[rows] = 0
    return counts


@cache
def _bundled(name: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    features = StandardScaler().fit_transform(features)
    if name == "digits":
        # The sign of a component does not matter: the ridge does not see it.
        features = PCA(DIGITS_DIMENSIONS, random_state=0).fit_transform(features)
        features /= features.std()
    return np.column_stack([features, np.ones(len(features))]), labels
