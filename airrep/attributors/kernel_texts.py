"""What kernels read of texts, and the spaces that they place them in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from scipy import sparse

GATE_SPREAD = 0.5  # what a target's weights depend on, as standard deviations over the pool


@dataclass(frozen=True)
class ReadTexts:
    """Of texts: the encoder's means (n, d), the response's words (n, e), which tokens a response
    has (n, vocabulary), hashes (n, keys) of what is the same in two texts or not, and logarithms
    of the numbers of tokens (n, 2), of the text and of its response."""

    text: np.ndarray
    words: np.ndarray
    tokens: sparse.csr_array
    keys: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class PlacedTexts:
    """Of texts: rows of length 1 whose products are cosines, hashes, standardised lengths (n, 2),
    and what weights are linear in (n, 3 + 2 components), none of which a saved pool has."""

    text: np.ndarray
    words: np.ndarray
    tokens: sparse.csr_array
    keys: np.ndarray
    lengths: np.ndarray
    gates: np.ndarray

    def part(self, rows: slice) -> PlacedTexts:
        """Some of the texts."""
        return PlacedTexts(*(part[rows] for part in vars(self).values()))


@dataclass(frozen=True)
class Space:
    """A space of vectors as the pool has it: mean and standard deviation of every number (d,), and
    principal axes (k, d) that give coordinates of standard deviation GATE_SPREAD.

    A causal language model has a few numbers that are far larger than all others, and say little.
    """

    mean: np.ndarray
    deviation: np.ndarray
    axes: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, count: int) -> Space:
        """The space of a pool's vectors (n, d), with at most `count` axes."""
        unit = _unit(vectors)
        mean, deviation = mean_and_deviation(unit)
        standardised = (unit - mean) / deviation
        spread, directions = np.linalg.eigh(standardised.T @ standardised / len(unit))
        chosen = np.argsort(-spread)[:count]
        chosen = chosen[spread[chosen] > 1e-6]
        axes = directions.T[chosen] * (GATE_SPREAD / np.sqrt(spread[chosen]))[:, None]
        return cls(mean, deviation, axes.astype(np.float32))

    def place(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (n, d) standardised, of length 1, and their coordinates (n, k)."""
        standardised = (_unit(vectors) - self.mean) / self.deviation
        return _unit(standardised), standardised @ self.axes.T


def mean_and_deviation(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (d,) of numbers (n, d), float32; what does not vary has a
    deviation of infinity, so that it counts for nothing."""
    deviation = numbers.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, np.inf).astype(np.float32)
    return numbers.mean(axis=0), deviation


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def text_key(content: bytes) -> int:
    """A hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
