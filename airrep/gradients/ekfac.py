"""EK-FAC: the Fisher matrix of linear layers, diagonal in a Kronecker-factored eigenbasis."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Self

import torch

from airrep.examples import InputError, TokenizedExample
from airrep.gradients.covariances import token_covariances
from airrep.gradients.layer_gradient import LayerGradient, wide
from airrep.gradients.per_example import BatchGradients, GradientModel

BLOCK = 2**26  # numbers of one layer's gradients held at once
OVERSAMPLING = 8  # directions more than wanted, which make the wanted ones better

Batches = Iterable[Sequence[TokenizedExample]]
# Matrices P (T, d_out, d_in), as (P,) or as left (T, d_out, r) and right (T, r, d_in).
Factors = tuple[torch.Tensor, ...]


class DrawnLabels(GradientModel):
    """Gradients of labels that are drawn, with a seed, from what the model predicts.

    Their second moment is the true Fisher matrix.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampler = torch.Generator(self.device).manual_seed(seed)

    def backward(
        self, examples: Sequence[TokenizedExample], sampler: torch.Generator | None = None
    ) -> BatchGradients:
        return super().backward(examples, sampler or self.sampler)


@dataclass(frozen=True)
class LayerCurvature:
    """The Fisher matrix E[vec(G) vec(G)^T] of one linear layer's gradients G (d_out, d_in).

    It counts as diagonal in the basis of `out_vectors` Q_S (d_out, d_out) and `in_vectors` Q_A
    (d_in, d_in), eigenvectors in columns; `eigenvalues` Lambda (d_out, d_in) is the mean over
    examples of the squared entries of Q_S^T G Q_A (George et al., arXiv 1806.03884).
    """

    out_vectors: torch.Tensor
    in_vectors: torch.Tensor
    eigenvalues: torch.Tensor

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return replace(
            self,
            out_vectors=self.out_vectors.to(device),
            in_vectors=self.in_vectors.to(device),
            eigenvalues=self.eigenvalues.to(device),
        )

    def precondition(self, gradient: LayerGradient, damping: float) -> torch.Tensor:
        """(F + lambda I)^-1 G (B, d_out, d_in), with lambda = damping x the mean eigenvalue.

        That is Q_S ((Q_S^T G Q_A) / (Lambda + lambda)) Q_A^T (Grosse et al., arXiv 2308.03296).
        """
        shift = damping * self.eigenvalues.mean()
        # A layer without any gradient counts for nothing.
        inverse = torch.where(shift > 0, 1 / (self.eigenvalues + shift), 0)
        rotated = _rotated(gradient, self.out_vectors, self.in_vectors)
        return self.out_vectors @ (rotated * inverse) @ self.in_vectors.T


def fit_curvature(
    model: GradientModel, start: Callable[[str], Batches]
) -> dict[str, LayerCurvature]:
    """The curvature of every layer of the model, from two passes over a pool.

    `start` starts a pass, given its name. The first gives the factors E[a a^T] and E[b b^T]
    (`token_covariances`), whose eigenvectors are the basis, the second the eigenvalues. With a
    `DrawnLabels` model it is the true Fisher matrix, else the empirical one. Raises InputError
    for layers that are too wide and gradients that are not finite.
    """
    factors = token_covariances(model, start("factors"))
    bases = {}
    for name in list(factors):
        one = factors.pop(name)  # each is as large as what is made of it
        bases[name] = _eigenvectors(name, one.outer), _eigenvectors(name, one.inner)
    return {
        name: LayerCurvature(*bases[name], eigenvalues)
        for name, eigenvalues in _eigenvalues(model, start("eigenvalues"), bases).items()
    }


def leading_factors(matrices: torch.Tensor, rank: int, seed: int) -> Factors:
    """Matrices (T, d_out, d_in) in their leading `rank` singular directions, as two factors.

    The directions come from two steps of subspace iteration from a seeded start (Halko et al.,
    arXiv 0909.4061).
    """
    sampler = torch.Generator().manual_seed(seed)
    start = torch.randn(matrices.shape[-1], rank + OVERSAMPLING, generator=sampler)
    left = torch.linalg.qr(matrices @ start.to(matrices)).Q
    for _ in range(2):
        left = torch.linalg.qr(matrices @ (matrices.mT @ left)).Q
    # Singular vectors of the matrices in that subspace, largest first.
    left = left @ torch.linalg.svd(left.mT @ matrices, full_matrices=False).U[..., :rank]
    return left, left.mT @ matrices


def products(factors: Factors, gradient: LayerGradient) -> torch.Tensor:
    """Products <P_t, G_i> (T, B) of matrices P with the gradients of B examples.

    Both are materialised, some at a time: sum_l b_l^T P a_l through the tokens takes as many
    operations for a single P as G takes for all.
    """
    columns = []
    for some in gradient.blocks(BLOCK):
        whole = some.full()
        step = max(1, BLOCK // whole[0].numel())
        parts = zip(*(factor.split(step) for factor in factors), strict=True)
        rows = [reduce(torch.matmul, part).flatten(1) @ whole.flatten(1).T for part in parts]
        columns.append(torch.cat(rows))
    return torch.cat(columns, dim=1)


def _eigenvectors(name: str, factor: torch.Tensor) -> torch.Tensor:
    """Float32 eigenvectors of a layer's covariance, in columns."""
    if not factor.isfinite().all():
        raise InputError(
            f"Gradients of the layer {name} are not finite; check the language model's weights."
        )
    return torch.linalg.eigh(factor).eigenvectors.float()


def _eigenvalues(
    model: GradientModel, batches: Batches, bases: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Mean over examples of the squared gradients (d_out, d_in) in each layer's basis."""
    sums = {name: q_out.new_zeros(len(q_out), len(q_in)) for name, (q_out, q_in) in bases.items()}
    count = 0
    for batch in batches:
        count += len(batch)
        for name, gradient in model.backward(batch).layers.items():
            for part in gradient.blocks(BLOCK):
                sums[name] += _rotated(part, *bases[name]).square().sum(0)
    return {name: total / count for name, total in sums.items()}


def _rotated(gradient: LayerGradient, q_out: torch.Tensor, q_in: torch.Tensor) -> torch.Tensor:
    """Q_S^T G Q_A (B, d_out, d_in)."""
    widened = LayerGradient(wide(gradient.inputs), wide(gradient.output_gradients), gradient.mask)
    return widened.projected(q_out, q_in)
