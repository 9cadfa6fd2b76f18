"""Products of whole gradients, without projections and without storing any."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from airrep.examples import TokenizedExample
from airrep.gradients.layer_gradient import LayerGradient, add_up
from airrep.gradients.per_example import GradientModel


def exact_products(
    model: GradientModel,
    targets: Sequence[TokenizedExample],
    pool: Sequence[TokenizedExample],
    batches: Callable[[Sequence[TokenizedExample]], Iterable[np.ndarray]],
    cosine: bool = False,
) -> np.ndarray:
    """<G(x), G(z)> (targets, pool) float32 over all layers of the model, or their cosines.

    `batches` cuts texts into rows to run together. Of memory it takes the activations of one
    batch of targets and one of the pool; the pool runs once for every batch of targets.
    """
    products = np.empty((len(targets), len(pool)), dtype=np.float32)
    for rows in batches(targets):
        mine = model.backward([targets[row] for row in rows]).layers
        lengths = _norms(mine) if cosine else None
        for columns in batches(pool):
            theirs = model.backward([pool[row] for row in columns]).layers
            block = add_up(mine[name].dot(theirs[name]) for name in mine)
            if lengths is not None:
                block = block / torch.outer(lengths, _norms(theirs))
            products[np.ix_(rows, columns)] = block.cpu().numpy()
    return products


def _norms(layers: dict[str, LayerGradient]) -> torch.Tensor:
    """Norms (B,) of whole gradients, at least so large that 0 can be divided by them."""
    squares = add_up(layer.squared_norms() for layer in layers.values())
    return squares.sqrt().clamp(min=torch.finfo(squares.dtype).tiny)
