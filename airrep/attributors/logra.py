"""LoGra: influence in the space of low-rank projections of every layer's gradient."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import nn

from airrep.attributors.gradient import (
    Arrays,
    FeatureAttributor,
    MakeFeatures,
    PoolFeatures,
    Tokens,
)
from airrep.attributors.language_model import OpenedLM
from airrep.choices import check_choice
from airrep.examples import InputError
from airrep.gradients.covariances import token_covariances
from airrep.gradients.curvature import FisherBlocks, KFACBlocks, inverse_norms
from airrep.gradients.layer_gradient import LayerGradient, wide
from airrep.gradients.layers import linear_layers
from airrep.gradients.per_example import GradientModel, Projections
from airrep.gradients.projections import pca_projections, projected_shapes
from airrep.gradients.store import GradientStore

CURVATURES: dict[str, type[FisherBlocks] | type[KFACBlocks]] = {
    "fisher": FisherBlocks,
    "kfac": KFACBlocks,
}
PROJECTIONS = ("random", "pca")
NORMALISATIONS = ("dot", "cosine")
PARAMETERS = ("weights", "biases")


@dataclass(eq=False, repr=False)
class LoGraAttributor(FeatureAttributor):
    """score(x, z) = phi(x)^T (F + ridge)^-1 phi(z), phi the projected gradients of summed losses
    (arXiv 2405.13954).

    `projection`: "random", or "pca" of inputs and output gradients. `curvature` F, one block a
    layer: "fisher", the mean of phi phi^T over the pool, or "kfac". The ridge is `damping` times
    F's mean eigenvalue. `normalise`: "dot", or "cosine" in the metric of (F + ridge)^-1.
    `sample`: how many examples of the pool PCA and KFAC are estimated from. `parameters`:
    "weights" of the layers, or "biases", of which a layer need have none: gradients of a layer's
    outputs, summed over tokens. For the last linear layer of the last block these say which
    responses the model should have thought likelier, and take little more than a forward pass.
    """

    name = "logra"

    _: KW_ONLY
    projection: str = "random"
    curvature: str = "fisher"
    damping: float = 0.1
    normalise: str = "cosine"
    sample: int = 512
    parameters: str = "weights"

    def _check(self) -> None:
        check_choice("projection", self.projection, PROJECTIONS)
        check_choice("curvature", self.curvature, CURVATURES)
        check_choice("normalise", self.normalise, NORMALISATIONS)
        check_choice("parameters", self.parameters, PARAMETERS)
        if self.parameters == "biases" and self.curvature == "kfac":
            raise InputError("curvature 'kfac' is of weights; take 'fisher' for biases.")
        if self.projection == "pca" and self.projection_rank is None:
            raise InputError("projection 'pca' needs a projection_rank; give one, such as 16.")

    def _gradient_model(self, opened: OpenedLM) -> GradientModel:
        layers = linear_layers(opened.model, self.layers).values()
        if self.parameters == "biases" and any(isinstance(one, nn.Embedding) for one in layers):
            raise InputError("An input embedding has no biases; leave it out of the layers.")
        return super()._gradient_model(opened)

    def _about(self, opened: OpenedLM) -> dict[str, Any]:
        about: dict[str, Any] = {}  # with random projections of weights: Grad-Dot's features
        if self.projection == "pca":
            about |= {"projection": self.projection, "sample": self.sample}
        if self.parameters != "weights":
            about["parameters"] = self.parameters
        return about

    def _sizes(self, shapes: Mapping[str, tuple[int, int]]) -> list[int]:
        """How many features each layer has, of its gradient's shape after projection."""
        if self.parameters == "biases":
            return [d_out for d_out, _ in shapes.values()]
        return [d_out * d_in for d_out, d_in in shapes.values()]

    def _width(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        return sum(self._sizes(shapes))

    def _maker(self, model: GradientModel, seed: str) -> MakeFeatures:
        return _bias_features if self.parameters == "biases" else super()._maker(model, seed)

    def _projections(self, model: GradientModel, seed: str, pool: Tokens) -> Projections:
        if self.projection == "random" or self.projection_rank is None:
            return super()._projections(model, seed, pool)
        return pca_projections(
            token_covariances(model, self._sample(pool, self.sample)), self.projection_rank
        )

    def _learn(self, store: GradientStore, model: GradientModel, pool: Tokens) -> Arrays:
        curvature: FisherBlocks | KFACBlocks
        if self.curvature == "fisher":
            sizes = self._sizes(projected_shapes(model.shapes, self.projection_rank))
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


def _bias_features(layers: Mapping[str, LayerGradient]) -> torch.Tensor:
    """The gradients (B, d) of all layers' biases, one after the other."""
    return torch.cat([wide(layer.output_gradients).sum(dim=1) for layer in layers.values()], dim=1)
