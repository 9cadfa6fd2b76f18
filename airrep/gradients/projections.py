"""Projections of gradients to fewer numbers: per layer and side, or of all layers together.

A random number depends on the seed, the layer's name and the side, and on nothing else: not on
the device, nor on which layers were chosen beside it.
"""

import hashlib
from collections.abc import Mapping

import torch

from airrep.examples import InputError
from airrep.gradients.covariances import TokenCovariance
from airrep.gradients.layer_gradient import LayerGradient, add_up
from airrep.gradients.per_example import Projections

MAX_SIGNS = 2**31  # numbers of a dense projection, 8 GiB


def random_projections(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: str, device: torch.device
) -> Projections:
    """LoGra's random projections (arXiv 2405.13954): normal numbers with variance 1 / rank.

    A side no wider than the rank stays as it is, so that a high rank loses nothing. Raises
    InputError for a rank below 1.
    """
    _check_rank(rank)

    def side(name: str, which: str, width: int) -> torch.Tensor:
        if width <= rank:
            return torch.eye(width, device=device)
        drawn = torch.randn(width, rank, generator=_generator(seed, name, which))
        return (drawn / rank**0.5).to(device)

    return {
        name: (side(name, "out", d_out), side(name, "in", d_in))
        for name, (d_out, d_in) in shapes.items()
    }


def pca_projections(covariances: Mapping[str, TokenCovariance], rank: int) -> Projections:
    """The directions in which a layer's inputs and output gradients vary most, as columns."""
    _check_rank(rank)
    return {
        name: (_main_directions(one.outer, rank), _main_directions(one.inner, rank))
        for name, one in covariances.items()
    }


def projected_shapes(
    shapes: Mapping[str, tuple[int, int]], rank: int | None
) -> dict[str, tuple[int, int]]:
    """(r_out, r_in) of every layer's gradient after projection to a rank (None: unprojected)."""
    if rank is None:
        return dict(shapes)
    _check_rank(rank)
    return {name: (min(rank, d_out), min(rank, d_in)) for name, (d_out, d_in) in shapes.items()}


def flat_features(layers: Mapping[str, LayerGradient]) -> torch.Tensor:
    """The gradients of all layers (B, d), each layer's matrix row by row."""
    return torch.cat([layer.full().flatten(1) for layer in layers.values()], dim=1)


class SignProjection:
    """Johnson-Lindenstrauss projection of all layers' gradients together to k numbers.

    Entries are +-1 / sqrt(k), as in TRAK (arXiv 2303.14186). Raises InputError where the matrix
    does not fit.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        width: int,
        seed: str,
        device: torch.device,
    ) -> None:
        _check_rank(width)
        sizes = {name: d_out * d_in for name, (d_out, d_in) in shapes.items()}
        if sum(sizes.values()) * width > MAX_SIGNS:
            raise InputError(
                f"A projection of {sum(sizes.values()):,} numbers to {width:,} does not fit in "
                "memory; give a smaller rank, fewer layers or a smaller width."
            )
        self.signs = {
            name: _signs(size, width, _generator(seed, name, "all")).to(device)
            for name, size in sizes.items()
        }

    def __call__(self, layers: Mapping[str, LayerGradient]) -> torch.Tensor:
        """Features (B, k)."""
        return add_up(layers[name].full().flatten(1) @ self.signs[name] for name in self.signs)


def _signs(size: int, width: int, generator: torch.Generator) -> torch.Tensor:
    coins = torch.randint(2, (size, width), generator=generator, dtype=torch.int8)
    return (2 * coins.float() - 1) / width**0.5


def _main_directions(covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors (d, r) of the largest eigenvalues, with the sign that makes them unique."""
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).float()


def _generator(*parts: str) -> torch.Generator:
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise InputError(f"The rank of a projection is {rank}; give at least 1.")
