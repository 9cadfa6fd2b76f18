"""LESS: cosines of a target's gradient and the step Adam would take along a pool example's."""

import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch

from airrep.attributors.gradient import (
    Arrays,
    FeatureAttributor,
    MakeFeatures,
    PoolFeatures,
    Tokens,
)
from airrep.attributors.language_model import OpenedLM, checked_checkpoints, checked_rates
from airrep.gradients.adam import AdamFeatures, pool_moments, saved_moments
from airrep.gradients.curvature import inverse_norms
from airrep.gradients.layers import linear_layers
from airrep.gradients.per_example import GradientModel
from airrep.gradients.store import GradientStore
from airrep.provenance import hash_files
from airrep.weights import MOMENTS_FILE


@dataclass(eq=False, repr=False)
class LESSAttributor(FeatureAttributor):
    """score(x, z) = sum over checkpoints of learning rate x cosine of P g(x) and P Adam(g(z))
    (arXiv 2402.04333).

    g are gradients of mean response losses, P the layers' projections. Adam's moments are those
    in a checkpoint's folder (`saved_moments`); where there are none `fit` says so and estimates
    them: no momentum, and the mean square of the gradients of `sample` examples of the pool.
    `checkpoints` (None: `lm` alone) have a learning rate each; without `learning_rates` all count
    the same.
    """

    name = "less"
    output = "mean_loss"

    _: KW_ONLY
    checkpoints: Sequence[str | Path] | None = None
    learning_rates: Sequence[float] | None = None
    sample: int = 512

    def _draws(self) -> list[tuple[str | Path, str]]:
        found = checked_checkpoints(self.lm, self.checkpoints)
        return [(checkpoint, f"{self.seed}/0") for checkpoint in found]

    def _weights(self) -> list[float]:
        return checked_rates(len(self._draws()), self.learning_rates)

    def _about(self, opened: OpenedLM) -> dict[str, Any]:
        file = opened.path / MOMENTS_FILE
        if file.is_file():
            return {"moments": hash_files([file])}
        return {"moments": f"estimated from {self.sample} examples"}

    def _pool_maker(
        self, opened: OpenedLM, model: GradientModel, seed: str, pool: Tokens
    ) -> MakeFeatures:
        # Adam divides every entry of a gradient by another number, so it has to be whole.
        projections, model.projections = model.projections, {}
        moments = saved_moments(opened.path, linear_layers(opened.model, self.layers))
        if moments is None:
            warnings.warn(
                f"{opened.source} has no {MOMENTS_FILE}; less estimates Adam's second moments from "
                f"{min(self.sample, len(pool))} examples of the pool, without momentum.",
                stacklevel=2,
            )
            moments = pool_moments(model, self._sample(pool, self.sample))
        return AdamFeatures(moments, projections)

    def _learn(self, store: GradientStore, model: GradientModel, pool: Tokens) -> Arrays:
        return {"scale": inverse_norms(store)}

    def _queries(self, features: torch.Tensor, pool: PoolFeatures) -> torch.Tensor:
        return torch.nn.functional.normalize(features)
