"""What is tried when a method is tuned: values of its constructor's parameters.

A method that is not here has nothing to tune. The values are around those in use.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from airrep.attributor import POOLINGS, Attributor

Params = dict[str, Any]
Values = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Grid:
    """Values of parameters, by what has to be computed again when they change.

    `features`: what a method keeps in its `store`; `fit`: the rest of fitting; `score`: only
    scoring; `pooling`: only the subsets' scores.
    """

    features: Values = field(default_factory=dict)
    fit: Values = field(default_factory=dict)
    score: Values = field(default_factory=dict)
    pooling: Sequence[str] = ()

    @property
    def values(self) -> dict[str, Sequence[Any]]:
        """The values of every parameter."""
        pooling = {"pooling": self.pooling} if self.pooling else {}
        return {**self.features, **self.fit, **self.score, **pooling}

    def without(self, fixed: Collection[str]) -> Self:
        """The grid without the parameters that are not to be tuned."""

        def rest(values: Values) -> Values:
            return {key: some for key, some in values.items() if key not in fixed}

        pooling = () if "pooling" in fixed else self.pooling
        return type(self)(rest(self.features), rest(self.fit), rest(self.score), pooling)

    def draw(self, attributor: Attributor, count: int, seed: int) -> list[Params]:
        """Up to `count` points: the attributor's own parameters, then others as drawn.

        More points hold the fewer ones of the same seed.
        """
        own = {key: getattr(attributor, key) for key in self.values}
        products = itertools.product(*self.values.values())
        points = [dict(zip(self.values, values, strict=True)) for values in products]
        others = [point for point in points if point != own]
        order = np.random.default_rng(seed).permutation(len(others))[: count - 1]
        return [own, *(others[row] for row in order)]

    def stages(self, params: Params) -> tuple[str, str, str]:
        """Three texts that are equal for points which share features, the fit, and scores."""
        features = [params[key] for key in self.features]
        fit = [features, *(params[key] for key in self.fit)]
        return repr(features), repr(fit), repr([fit, *(params[key] for key in self.score)])


DAMPINGS = (0.01, 0.1, 1.0)  # shares of the mean curvature
LAYERS = {"layers": (None, "mlp")}  # all linear layers of the blocks, or feed-forward ones
RANKS = {"projection_rank": (8, 16)}

_EXACT = Grid(features=LAYERS, pooling=POOLINGS)
_TFIDF = Grid(fit={"sublinear_tf": (False, True)}, pooling=POOLINGS)
_HEAD = Grid(fit={"dimensions": (16, 64), "l2": (0.1, 1.0, 10.0)}, pooling=POOLINGS)

GRIDS: dict[str, Grid] = {
    "embedding": Grid(pooling=POOLINGS),
    "response_embedding": Grid(score={"scale": (0.3, 0.6, 1.0, 1.5)}, pooling=POOLINGS),
    "kernels": Grid(fit={"components": (5, 10, 20), "penalty": (0.001, 0.01, 0.1)}),
    "bm25": Grid(fit={"k1": (0.9, 1.2, 1.5, 2.0), "b": (0.4, 0.75, 1.0)}, pooling=POOLINGS),
    "tfidf": _TFIDF,
    "response_tfidf": _TFIDF,
    "influence": _HEAD,
    "rescaled_influence": _HEAD,
    "newton_step": replace(_HEAD, pooling=("step", "attention")),
    "repsim": Grid(fit={"position": ("last", "mean")}, pooling=POOLINGS),
    "grad_dot": _EXACT,
    "grad_cos": _EXACT,
    "tracin": _EXACT,
    "logra": Grid(
        {**RANKS, **LAYERS}, {"damping": DAMPINGS, "normalise": ("dot", "cosine")}, {}, POOLINGS
    ),
    "less": Grid({**RANKS, **LAYERS}, {}, {}, POOLINGS),
    "trak": Grid({**LAYERS, "width": (2048, 4096)}, {"damping": DAMPINGS}, {}, POOLINGS),
    "datainf": Grid({**RANKS, **LAYERS}, {"damping": DAMPINGS}, {}, POOLINGS),
    "ekfac": Grid({}, {**LAYERS, "fisher": ("true", "empirical")}, {"damping": DAMPINGS}, POOLINGS),
}
