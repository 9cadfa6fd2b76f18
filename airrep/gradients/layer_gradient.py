"""One linear layer's gradients of several examples, kept as factors.

For a linear layer with inputs a (L, d_in) and gradients b (L, d_out) of its outputs, an example's
gradient of the weight is the sum over tokens of b_l a_l^T, in nn.Linear's orientation. It is
seldom needed as a matrix: products and projections of gradients are cheaper from a and b.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch

BLOCK = 2**24  # numbers of a product held at once


@dataclass(frozen=True)
class LayerGradient:
    """One layer's gradients of B examples, as the factors of sums over L tokens.

    `inputs` (B, L, d_in), `output_gradients` (B, L, d_out), `mask` (B, L): which tokens are real.
    Where none is, the output gradients are 0 (the inputs need not be).
    """

    inputs: torch.Tensor
    output_gradients: torch.Tensor
    mask: torch.Tensor

    def full(self) -> torch.Tensor:
        """The gradients (B, d_out, d_in) themselves, at least float32."""
        return wide(self.output_gradients).transpose(1, 2) @ wide(self.inputs)

    def projected(self, p_out: torch.Tensor, p_in: torch.Tensor) -> torch.Tensor:
        """P_out^T G P_in (B, r_out, r_in), without G."""
        inner, outer = times(self.inputs, p_in), times(self.output_gradients, p_out)
        return LayerGradient(inner, outer, self.mask).full()

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (n, d_in) and output gradients (n, d_out) of the real tokens alone."""
        return wide(self.inputs[self.mask]), wide(self.output_gradients[self.mask])

    def dot(self, other: "LayerGradient") -> torch.Tensor:
        """Products <G_i, G'_j> (B, B') of all gradients, in the form that takes fewer operations.

        The ghost form is the sum over token pairs of (a_l . a'_l')(b_l . b'_l').
        """
        size, length, d_in, d_out = self._sizes()
        others, other_length = other.mask.shape
        ghost = size * length * others * other_length * (d_in + d_out)
        full = (size * length + others * other_length + size * others) * d_in * d_out
        return self._ghost_dot(other) if ghost <= full else self._full_dot(other)

    def squared_norms(self) -> torch.Tensor:
        """|G_i|^2 (B,), the diagonal of `dot(self)`."""
        size, length, d_in, d_out = self._sizes()
        if length * (d_in + d_out) <= d_in * d_out:
            a, b = wide(self.inputs), wide(self.output_gradients)
            return ((a @ a.mT) * (b @ b.mT)).sum((1, 2))
        step = max(1, BLOCK // (size * d_in))
        return add_up(part.full().square().sum((1, 2)) for part in self.output_slices(step))

    def split(self, size: int) -> Iterator["LayerGradient"]:
        """The same for `size` examples at a time."""
        parts = (one.split(size) for one in (self.inputs, self.output_gradients, self.mask))
        for inputs, output_gradients, mask in zip(*parts, strict=True):
            yield LayerGradient(inputs, output_gradients, mask)

    def blocks(self, numbers: int) -> Iterator["LayerGradient"]:
        """The same for so many examples at a time that their matrices have at most `numbers`
        numbers together; at least one."""
        _, _, d_in, d_out = self._sizes()
        yield from self.split(max(1, numbers // (d_out * d_in)))

    def output_slices(self, step: int) -> Iterator["LayerGradient"]:
        """The same for `step` outputs at a time, in their order."""
        for part in self.output_gradients.split(step, dim=-1):
            yield LayerGradient(self.inputs, part, self.mask)

    def _sizes(self) -> tuple[int, int, int, int]:
        return *self.inputs.shape, self.output_gradients.shape[-1]

    def _ghost_dot(self, other: "LayerGradient") -> torch.Tensor:
        others, other_length = other.mask.shape
        a, b = wide(other.inputs).flatten(0, 1), wide(other.output_gradients).flatten(0, 1)
        step = max(1, BLOCK // (len(a) * self.inputs.shape[1]))
        products = []
        for part in self.split(step):
            mine, gradients = wide(part.inputs), wide(part.output_gradients)
            pairs = (mine.flatten(0, 1) @ a.T) * (gradients.flatten(0, 1) @ b.T)
            products.append(pairs.view(*part.mask.shape, others, other_length).sum((1, 3)))
        return torch.cat(products)

    def _full_dot(self, other: "LayerGradient") -> torch.Tensor:
        width = max(len(self.inputs), len(other.inputs)) * self.inputs.shape[-1]
        step = max(1, BLOCK // width)
        pairs = zip(self.output_slices(step), other.output_slices(step), strict=True)
        return add_up(a.full().flatten(1) @ b.full().flatten(1).T for a, b in pairs)


def add_up(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors of one shape."""
    return reduce(torch.add, parts)


def times(states: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    """States (..., d) projected to (..., r), in the states' precision; None leaves them."""
    return states if projection is None else states @ projection.to(states.dtype)


def wide(states: torch.Tensor) -> torch.Tensor:
    """At least float32, in which sums are made."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
