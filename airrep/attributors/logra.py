"""LoGra: influence in the space of low-rank projections of every layer's gradient."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from airrep.attributors.gradient import Arrays, FeatureAttributor, PoolFeatures, Tokens
from airrep.attributors.language_model import OpenedLM
from airrep.choices import check_choice
from airrep.examples import Example, InputError
from airrep.gradients.covariances import token_covariances
from airrep.gradients.curvature import FisherBlocks, KFACBlocks, inverse_norms
from airrep.gradients.per_example import GradientModel, Projections
from airrep.gradients.projections import pca_projections, projected_shapes
from airrep.gradients.store import GradientStore

CURVATURES: dict[str, type[FisherBlocks] | type[KFACBlocks]] = {
    "fisher": FisherBlocks,
    "kfac": KFACBlocks,
}
PROJECTIONS = ("random", "pca")
NORMALISATIONS = ("dot", "cosine")


@dataclass(eq=False, repr=False)
class LoGraAttributor(FeatureAttributor):
    """score(x, z) = phi(x)^T (F + ridge)^-1 phi(z), phi the projected gradients of summed losses
    (arXiv 2405.13954).

    `projection`: "random", or "pca" of inputs and output gradients. `curvature` F, one block a
    layer: "fisher", the mean of phi phi^T over the pool, or "kfac". The ridge is `damping` times
    F's mean eigenvalue. `normalise`: "dot", or "cosine" in the metric of (F + ridge)^-1.
    `sample`: how many examples of the pool PCA and KFAC are estimated from.
    """

    name = "logra"

    _: KW_ONLY
    projection: str = "random"
    curvature: str = "fisher"
    damping: float = 0.1
    normalise: str = "cosine"
    sample: int = 512

    def _fit(self, pool: Sequence[Example]) -> None:
        check_choice("projection", self.projection, PROJECTIONS)
        check_choice("curvature", self.curvature, CURVATURES)
        check_choice("normalise", self.normalise, NORMALISATIONS)
        if self.projection == "pca" and self.projection_rank is None:
            raise InputError("projection 'pca' needs a projection_rank; give one, such as 16.")
        super()._fit(pool)

    def _about(self, opened: OpenedLM) -> dict[str, Any]:
        sample = self.sample if self.projection == "pca" else None
        return {"projection": self.projection, "sample": sample}

    def _projections(self, model: GradientModel, seed: str, pool: Tokens) -> Projections:
        if self.projection == "random" or self.projection_rank is None:
            return super()._projections(model, seed, pool)
        return pca_projections(
            token_covariances(model, self._sample(pool, self.sample)), self.projection_rank
        )

    def _learn(self, store: GradientStore, model: GradientModel, pool: Tokens) -> Arrays:
        curvature: FisherBlocks | KFACBlocks
        if self.curvature == "fisher":
            shapes = projected_shapes(model.shapes, self.projection_rank).values()
            sizes = [d_out * d_in for d_out, d_in in shapes]
            curvature = FisherBlocks.fit(store, sizes, self.damping)
        else:
            covariances = token_covariances(model, self._sample(pool, self.sample))
            curvature = KFACBlocks.fit(covariances.values(), self.damping)
        arrays = {f"curvature/{key}": array for key, array in curvature.arrays().items()}
        if self.normalise == "cosine":
            arrays["scale"] = inverse_norms(store, curvature)
        return arrays

    def _queries(self, features: torch.Tensor, pool: PoolFeatures) -> torch.Tensor:
        found = CURVATURES[self.curvature].from_arrays(pool.group("curvature"))
        solved = found.solve(features)
        if self.normalise == "dot":
            return solved
        lengths = (solved * features).sum(1, keepdim=True).clamp(min=0).sqrt()
        return solved / lengths.clamp(min=torch.finfo(torch.float32).tiny)
