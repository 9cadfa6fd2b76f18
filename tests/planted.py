"""A benchmark whose answer is known: losses that follow planted scores, and methods that know."""

from dataclasses import dataclass

import numpy as np

from airrep.attributor import Attributor
from airrep.attributors import make_attributor
from airrep.examples import Example
from airrep.label_store import Labels

TASKS = ("colours", "numbers", "places", "words")
HOSTILE = "</script><script>alert('x')</script><b>bold</b> & \"quoted\" {{ 7 * 7 }} \u2028 end"


@dataclass(frozen=True)
class Benchmark:
    """Pool, targets, two seeds of labels, and the scores (targets, pool) behind the losses."""

    pool: list[Example]
    targets: list[Example]
    labels: Labels
    repeats: Labels
    truth: np.ndarray


class Planted(Attributor):
    """Knows the scores behind the losses, up to a given noise: a stand-in for a trained AirRep."""

    name = "airrep"
    learns = True

    def __init__(self, truth: np.ndarray, noise: float = 0.0, pooling: str = "sum") -> None:
        self.truth = truth
        self.noise = noise
        self.pooling = pooling

    def _fit(self, pool):
        self.rows_ = np.asarray([int(example.id.split("-")[1]) for example in pool])

    def _score(self, targets):
        blur = np.random.default_rng(1).normal(size=self.truth.shape) * self.noise
        rows = [int(target.id.split("-")[1]) for target in targets]
        return (self.truth + blur)[np.ix_(rows, self.rows_)]

    def _state(self):
        return {"rows": self.rows_}

    def _restore(self, state):
        self.rows_ = state["rows"]


def planted_benchmark(pool_size=60, target_count=24, subset_count=30, noise=0.3, seed=0):
    """Losses fall linearly in the planted scores of a subset; every example's best is planted."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(target_count, pool_size))
    best = truth.argmax(axis=1)
    pool = [
        Example(f"pool-{row}", f"Ask {row}? {HOSTILE}", f"Reply {row}.", TASKS[row % 4])
        for row in range(pool_size)
    ]
    targets = [
        Example(
            f"target-{row}",
            f"Target question {row}? {HOSTILE}",
            f"Target answer {row}.",
            TASKS[row % 4],
            {"proponents": [f"pool-{best[row]}"]} if row % 2 else {},
        )
        for row in range(target_count)
    ]
    subsets = [rng.choice(pool_size, size=12, replace=False) for _ in range(subset_count)]
    sums = np.stack([truth[:, subset].sum(axis=1) for subset in subsets], axis=1)

    def losses() -> np.ndarray:
        wobble = rng.normal(size=sums.shape) * noise * sums.std()
        return (3 - 0.05 * (sums + wobble)).astype(np.float32)

    labels = Labels(subsets, losses(), np.arange(subset_count))
    again = np.arange(0, subset_count, 3)
    repeats = Labels([subsets[row] for row in again], losses()[:, again], again)
    return Benchmark(pool, targets, labels, repeats, truth)


def planted_methods(truth: np.ndarray, noise: float = 0.3) -> dict[str, Attributor]:
    return {
        "airrep": Planted(truth, noise),
        **{name: make_attributor(name) for name in ("tfidf", "same_task", "random")},
    }
