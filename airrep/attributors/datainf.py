"""DataInf: influence with the mean of inverses in place of the inverse of a mean."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from airrep.attributors.gradient import Arrays, FeatureAttributor, PoolFeatures, Tokens
from airrep.examples import InputError
from airrep.gradients.per_example import GradientModel
from airrep.gradients.projections import projected_shapes
from airrep.gradients.store import GradientStore


@dataclass(eq=False, repr=False)
class DataInfAttributor(FeatureAttributor):
    """score(x, z) = sum over layers of <H^-1 g(x), g(z)> (Kwon et al., arXiv 2310.00902).

    For each layer H^-1 v is the mean over the pool's g_i of
    (v - <v, g_i> g_i / (lambda + |g_i|^2)) / lambda, with lambda = `damping` times the mean over
    the pool of |g_i|^2 / d, d the numbers in g_i. That comes near (E[g g^T] + lambda I)^-1 where d
    is small, as in adapters of low rank. g is the gradient of the loss summed over the response's
    tokens, projected to `projection_rank`; with None it is whole, for layers that are small.
    """

    name = "datainf"

    _: KW_ONLY
    damping: float = 0.1

    def _check(self) -> None:
        if self.damping <= 0:
            raise InputError(
                f"damping is {self.damping}; give a share of the mean squared gradient above 0."
            )

    def _learn(self, store: GradientStore, model: GradientModel, pool: Tokens) -> Arrays:
        shapes = projected_shapes(model.shapes, self.projection_rank).values()
        return learn_layers(store, [d_out * d_in for d_out, d_in in shapes], self.damping)

    def _queries(self, features: torch.Tensor, pool: PoolFeatures) -> torch.Tensor:
        return solve(features, pool.store, pool.arrays)


def learn_layers(store: GradientStore, sizes: Sequence[int], damping: float) -> Arrays:
    """What `solve` needs to know of a pool's features, of layers with so many numbers each:
    1 / lambda (layers,) and 1 / (n (lambda + |g_i|^2)) (layers, n)."""
    norms = np.empty((len(sizes), store.rows))
    for rows, features in store.blocks():
        for layer, part in enumerate(features.split(sizes, dim=1)):
            norms[layer, rows] = part.square().sum(1)
    dampings = damping * norms.mean(axis=1) / sizes
    # A layer without any gradient counts for nothing.
    dampings[dampings == 0] = np.inf
    return {
        "sizes": np.asarray(sizes),
        "inverses": (1 / dampings).astype(np.float32),
        "weights": (1 / (dampings[:, None] + norms) / store.rows).astype(np.float32),
    }


def solve(features: torch.Tensor, store: GradientStore, learned: Arrays) -> torch.Tensor:
    """H^-1 of features (T, d), in one pass over the pool's."""
    sizes = learned["sizes"].tolist()
    weights = torch.from_numpy(learned["weights"]).to(features)
    removed = torch.zeros_like(features)
    for rows, block in store.blocks(features.device):
        sides = (one.split(sizes, dim=1) for one in (features, block, removed))
        for weight, mine, theirs, total in zip(weights[:, rows], *sides, strict=True):
            total += ((mine @ theirs.T) * weight) @ theirs
    inverses = torch.from_numpy(np.repeat(learned["inverses"], sizes))
    return (features - removed) * inverses.to(features)
