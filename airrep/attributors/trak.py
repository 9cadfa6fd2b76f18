"""TRAK: a linear model of the response's margin, in randomly projected gradients."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from airrep.attributors.gradient import (
    Arrays,
    FeatureAttributor,
    MakeFeatures,
    PoolFeatures,
    Tokens,
)
from airrep.attributors.language_model import OpenedLM, checked_checkpoints
from airrep.examples import Example, InputError
from airrep.gradients.curvature import FisherBlocks
from airrep.gradients.per_example import GradientModel
from airrep.gradients.projections import SignProjection, projected_shapes
from airrep.gradients.store import GradientStore

ENOUGH = 10  # times the effective dimension


@dataclass(eq=False, repr=False)
class TRAKAttributor(FeatureAttributor):
    """score(x, z) = phi(x)^T (Phi^T Phi + lambda I)^-1 phi(z) (1 - p(z)), averaged over
    checkpoints and projections (arXiv 2303.14186).

    phi is the gradient of the response's margin, the sum over its tokens of log(p / (1 - p)),
    projected on each layer's sides to `projection_rank` and then together to `width` random
    numbers. 1 - p(z) is the mean over z's response tokens. lambda is `damping` times the mean
    eigenvalue of Phi^T Phi. `projections` are drawn for each of the `checkpoints` (None: `lm`
    alone).

    A width of 10 to 20 times the effective dimension (`effective_dimensions`) keeps 95% of the
    best LDS; `fit` warns below 10.
    """

    name = "trak"
    output = "margin"

    _: KW_ONLY
    checkpoints: Sequence[str | Path] | None = None
    projections: int = 1
    width: int = 2048
    damping: float = 0.1

    def effective_dimensions(self) -> list[float]:
        """tr(F (F + lambda I)^-1) with F = Phi^T Phi, of every checkpoint and projection."""
        self._check_fitted()
        return [_kernel(one).effective_dimension() for one in self.features_]

    def _check(self) -> None:
        if self.projections < 1:
            raise InputError(f"projections is {self.projections}; give at least 1.")

    def _fit(self, pool: Sequence[Example]) -> None:
        super()._fit(pool)
        largest = max(_kernel(one).effective_dimension() for one in self.features_)
        if self.width < ENOUGH * largest:
            warnings.warn(
                f"trak's width {self.width} is less than {ENOUGH} times the effective dimension "
                f"{largest:.0f}; a larger width or more damping may give better scores.",
                stacklevel=3,
            )

    def _draws(self) -> list[tuple[str | Path, str]]:
        return [
            (checkpoint, f"{self.seed}/{draw}")
            for checkpoint in checked_checkpoints(self.lm, self.checkpoints)
            for draw in range(self.projections)
        ]

    def _weights(self) -> list[float]:
        count = len(self._draws())
        return [1 / count] * count

    def _about(self, opened: OpenedLM) -> dict[str, Any]:
        return {"sign_projection": self.width}

    def _width(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        return self.width

    def _maker(self, model: GradientModel, seed: str) -> MakeFeatures:
        shapes = projected_shapes(model.shapes, self.projection_rank)
        return SignProjection(shapes, self.width, seed, model.device)

    def _learn(self, store: GradientStore, model: GradientModel, pool: Tokens) -> Arrays:
        kernel = FisherBlocks.fit(store, [self.width], self.damping)
        return {
            **{f"kernel/{key}": array for key, array in kernel.arrays().items()},
            # The kernel is a mean over the pool, and TRAK's a sum.
            "scale": store.doubts() / np.float32(store.rows),
        }

    def _queries(self, features: torch.Tensor, pool: PoolFeatures) -> torch.Tensor:
        return _kernel(pool).solve(features)


def _kernel(features: PoolFeatures) -> FisherBlocks:
    return FisherBlocks.from_arrays(features.group("kernel"))
