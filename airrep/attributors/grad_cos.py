"""Grad-Cos: cosines of the gradients of a target's loss and a pool example's."""

from dataclasses import dataclass

import torch

from airrep.attributors.grad_dot import GradDotAttributor
from airrep.attributors.gradient import Arrays, PoolFeatures, Tokens
from airrep.gradients.curvature import inverse_norms
from airrep.gradients.per_example import GradientModel
from airrep.gradients.store import GradientStore


@dataclass(eq=False, repr=False)
class GradCosAttributor(GradDotAttributor):
    """score(x, z) = cosine of G(x) and G(z), normalised over all chosen layers together.

    `projection_rank` as for Grad-Dot; with one, norms too are of the projections.
    """

    name = "grad_cos"
    cosine = True

    def _learn(self, store: GradientStore, model: GradientModel, pool: Tokens) -> Arrays:
        return {"scale": inverse_norms(store)}

    def _queries(self, features: torch.Tensor, pool: PoolFeatures) -> torch.Tensor:
        return torch.nn.functional.normalize(features)
