"""Curvature of the loss in the space of projected gradients, one block a layer.

Both forms stand for the block of the Fisher matrix, F = E[g g^T] over pool examples, with
`damping` times its mean eigenvalue added to its diagonal. `solve` applies the inverse. Matrices are
small, and stay on the CPU in float64 whatever the device of the features.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, Self

import numpy as np
import torch

from airrep.examples import InputError
from airrep.gradients.covariances import MAX_WIDTH, TokenCovariance
from airrep.gradients.store import GradientStore

Arrays = dict[str, np.ndarray]


class Curvature(Protocol):
    """What can be divided by."""

    def solve(self, features: torch.Tensor) -> torch.Tensor: ...


class FisherBlocks:
    """The raw Fisher matrix of every layer (d_l, d_l), as a Cholesky factor in float64.

    `sizes` are the d_l, whose sum is the width of a feature row. `ridges` (layers,) is what was
    added to the diagonals.
    """

    def __init__(self, sizes: Sequence[int], factors: list[torch.Tensor], ridges: list[float]):
        self.sizes, self.factors, self.ridges = list(sizes), factors, ridges

    @classmethod
    def fit(cls, store: GradientStore, sizes: Sequence[int], damping: float) -> Self:
        """From the pool's features.

        Raises InputError for a damping below 0, or one too small for the matrix to be inverted,
        and for blocks too wide to fit.
        """
        _check(damping)
        if max(sizes) > MAX_WIDTH:
            raise InputError(
                f"A block of {max(sizes):,} features is too wide for its Fisher matrix (at most "
                f"{MAX_WIDTH:,}); give a smaller projection_rank or width."
            )
        sums = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
        for _, rows in store.blocks():
            for total, part in zip(sums, rows.split(list(sizes), dim=1), strict=True):
                total += part.T @ part
        factors, ridges = [], []
        for fisher in (total / store.rows for total in sums):
            # A layer without any gradient counts for nothing, whatever it is divided by.
            ridge = damping * float(fisher.trace()) / len(fisher) if fisher.any() else 1.0
            fisher.diagonal().add_(ridge)
            factors.append(_cholesky(fisher, damping))
            ridges.append(ridge)
        return cls(sizes, factors, ridges)

    def solve(self, features: torch.Tensor) -> torch.Tensor:
        """(F + ridge)^-1 of every row (n, d)."""
        parts = [
            torch.cholesky_solve(part.double().T, factor).T
            for part, factor in zip(
                features.cpu().split(self.sizes, dim=1), self.factors, strict=True
            )
        ]
        return torch.cat(parts, dim=1).to(features)

    def effective_dimension(self) -> float:
        """tr(F (F + ridge)^-1), summed over the blocks."""
        return sum(
            len(factor) - ridge * float(torch.cholesky_inverse(factor).trace())
            for factor, ridge in zip(self.factors, self.ridges, strict=True)
        )

    def arrays(self) -> Arrays:
        """What `from_arrays` reads."""
        factors = {f"factor/{row}": one.numpy() for row, one in enumerate(self.factors)}
        return factors | {"ridges": np.asarray(self.ridges)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        ridges = arrays["ridges"].tolist()
        factors = [torch.from_numpy(arrays[f"factor/{row}"]) for row in range(len(ridges))]
        return cls([len(factor) for factor in factors], factors, ridges)


class KFACBlocks:
    """F of every layer as a Kronecker product of token covariances (K-FAC, "expand").

    F = (tokens an example) x E[b b^T] x E[a a^T]: tokens are taken as independent of each other,
    and inputs of output gradients.
    """

    def __init__(self, bases: list[tuple[torch.Tensor, torch.Tensor]], values: list[torch.Tensor]):
        self.bases, self.values = bases, values

    @classmethod
    def fit(cls, covariances: Iterable[TokenCovariance], damping: float) -> Self:
        """From the covariances of every layer, in the space of the features."""
        _check(damping)
        bases, values = [], []
        for one in covariances:
            outer, basis_out = torch.linalg.eigh(one.outer.cpu())
            inner, basis_in = torch.linalg.eigh(one.inner.cpu())
            spectrum = torch.outer(outer.clamp(min=0), inner.clamp(min=0))
            spectrum *= one.tokens / one.examples
            ridge = damping * spectrum.mean() if spectrum.any() else torch.tensor(1.0)
            if not ridge > 0 and not spectrum.min() > 0:
                raise _singular(damping)
            bases.append((basis_out, basis_in))
            values.append(spectrum + ridge)
        return cls(bases, values)

    def solve(self, features: torch.Tensor) -> torch.Tensor:
        """(F + ridge)^-1 of every row (n, d)."""
        parts = features.cpu().split([one.numel() for one in self.values], dim=1)
        solved = []
        for part, (basis_out, basis_in), values in zip(parts, self.bases, self.values, strict=True):
            matrix = part.to(values).view(len(part), *values.shape)
            turned = basis_out.T @ matrix @ basis_in / values
            solved.append((basis_out @ turned @ basis_in.T).flatten(1))
        return torch.cat(solved, dim=1).to(features)

    def arrays(self) -> Arrays:
        """What `from_arrays` reads."""
        arrays: Arrays = {}
        for row, (outer, inner) in enumerate(self.bases):
            arrays |= {f"out/{row}": outer.numpy(), f"in/{row}": inner.numpy()}
        return arrays | {f"values/{row}": one.numpy() for row, one in enumerate(self.values)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        found = {key: torch.from_numpy(array) for key, array in arrays.items()}
        rows = range(sum(key.startswith("values/") for key in found))
        bases = [(found[f"out/{row}"], found[f"in/{row}"]) for row in rows]
        return cls(bases, [found[f"values/{row}"] for row in rows])


def inverse_norms(store: GradientStore, curvature: Curvature | None = None) -> np.ndarray:
    """1 / |z| (rows,) float32 of every feature row, or 1 / sqrt(z^T (F + ridge)^-1 z)."""
    norms = np.empty(store.rows, dtype=np.float32)
    for rows, values in store.blocks():
        solved = values if curvature is None else curvature.solve(values)
        norms[rows] = (values * solved).sum(1).clamp(min=0).sqrt().numpy()
    return 1 / np.maximum(norms, np.finfo(np.float32).tiny)


def _cholesky(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise _singular(damping)
    return factor


def _check(damping: float) -> None:
    if damping < 0:
        raise InputError(f"damping is {damping}; give a share of the mean eigenvalue, at least 0.")


def _singular(damping: float) -> InputError:
    return InputError(
        f"The curvature cannot be inverted with damping {damping}; give more, such as 0.1."
    )
