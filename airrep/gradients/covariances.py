"""Second moments of a layer's inputs and output gradients over the tokens of many examples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from airrep.examples import InputError, TokenizedExample
from airrep.gradients.per_example import GradientModel

MAX_WIDTH = 2**14  # of one side: its matrix has 2 GiB


@dataclass
class TokenCovariance:
    """`inner` (d_in, d_in) = E[a a^T] and `outer` (d_out, d_out) = E[b b^T], float64.

    The mean is over the `tokens` a layer was given, prompts' tokens too (not padding); `examples`
    is how many they are of. a and b are not centred.
    """

    inner: torch.Tensor
    outer: torch.Tensor
    tokens: int
    examples: int


def token_covariances(
    model: GradientModel, batches: Iterable[Sequence[TokenizedExample]]
) -> dict[str, TokenCovariance]:
    """The covariances of every layer of the model over batches of examples.

    Raises InputError for a layer too wide for its covariance to fit.
    """
    sums: dict[str, TokenCovariance] = {}
    for batch in batches:
        for name, layer in model.backward(batch).layers.items():
            a, b = layer.tokens()
            if name not in sums:
                sums[name] = _empty(name, a, b)
            total = sums[name]
            total.inner += a.T @ a
            total.outer += b.T @ b
            total.tokens += len(a)
            total.examples += len(batch)
    for total in sums.values():
        total.inner /= total.tokens
        total.outer /= total.tokens
    return sums


def _empty(name: str, a: torch.Tensor, b: torch.Tensor) -> TokenCovariance:
    """Sums over no tokens yet, of a layer's inputs and output gradients (n, d)."""
    widest = max(a.shape[1], b.shape[1])
    if widest > MAX_WIDTH:
        raise InputError(
            f"The layer {name} has {widest:,} inputs or outputs, too many for their covariance (at "
            f"most {MAX_WIDTH:,}); leave it out, or use random projections and the raw Fisher "
            "matrix."
        )
    inner, outer = (
        torch.zeros(side.shape[1], side.shape[1], dtype=torch.float64, device=side.device)
        for side in (a, b)
    )
    return TokenCovariance(inner, outer, 0, 0)
