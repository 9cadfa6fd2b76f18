"""Random scores: what no knowledge at all reaches."""

import hashlib
from collections.abc import Sequence

import numpy as np

from airrep.attributor import Attributor
from airrep.examples import Example


class RandomAttributor(Attributor):
    """Scores uniform in [-1, 1), fixed by the seed and the pair's content.

    Hashing the pair instead of drawing in order keeps a pair's score the same in any batch and
    any order of the pool, which the contract asks of every method.
    """

    name = "random"

    def __init__(self, seed: int = 0, pooling: str = "sum") -> None:
        self.seed = seed
        self.pooling = pooling

    def _fit(self, pool: Sequence[Example]) -> None:
        self.keys_ = self._keys(pool, "pool")

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        scores = np.empty((len(targets), len(self.keys_)), dtype=np.float32)
        for row, key in enumerate(self._keys(targets, "target")):
            # 24 bits are what a float32 holds exactly.
            scores[row] = (_mix(self.keys_ ^ key) >> np.uint64(40)) / 2**23 - 1
        return scores

    def _keys(self, examples: Sequence[Example], side: str) -> np.ndarray:
        """One 64-bit key per example; the sides differ, so x scores x like any other pair."""
        keys = []
        for example in examples:
            parts = (str(self.seed), side, example.id, example.prompt, example.response)
            digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
            keys.append(int.from_bytes(digest[:8], "little"))
        return np.asarray(keys, dtype=np.uint64)

    def _state(self) -> dict[str, np.ndarray]:
        return {"keys": self.keys_}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.keys_ = state["keys"]


def _mix(keys: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): every bit reaches every bit."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
