"""How often does `airrep verify` find forged labels and claims, and how often honest ones?

    python benchmarks/verification.py --draws 100

Every draw is a new store: losses are linear in the examples of random subsets, by task and by
single example, plus the noise of a seed, with the reliability asked for; a part of the noise is
common to all targets of a run, and some runs are noisier than others. A verifier draws k labels
and trains them again. The first table says how often the store is rejected, by kind and share of
forgery, where re-runs come out exactly (the same machine and seed) and where they are another
seed. `found` is the share of forged labels drawn that other seeds show. The second says how often
claims are refused. Brackets hold 95% Clopper-Pearson intervals.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from scipy.stats import binomtest, hypergeom

from airrep.verification import (
    ClaimKind,
    claim_error,
    claim_margin,
    claim_value,
    compare_exact,
    compare_seeds,
    is_accepted,
    reruns_needed,
)

POOL, SIZE, TASKS = 500, 50, 20
SPREAD = 0.4  # standard deviation of a target's losses over subsets, nats
COMMON = 0.2  # share of the noise's variance that all targets of a run have in common
TOLERANCE = 0.01
CONFIDENCE, EPSILON = 0.95, 0.05
KINDS: tuple[ClaimKind, ...] = ("lds", "slope", "gap")


class World:
    """Subsets (M, N), what they do to targets (T, M), and new seeds of the losses."""

    def __init__(self, targets: int, subsets: int, reliability: float, rng: np.random.Generator):
        self.rng = rng
        order = rng.random((subsets, POOL)).argpartition(SIZE, axis=1)[:, :SIZE]
        self.subsets = list(order)
        tasks, of_target = rng.integers(TASKS, size=POOL), rng.integers(TASKS, size=targets)
        same = (of_target[:, None] == tasks) * 1.0
        effects = same + 0.1 * rng.normal(size=TASKS)[tasks] + 0.15 * rng.normal(size=same.shape)
        worth = np.stack([effects[:, rows].sum(axis=1) for rows in order], axis=1)
        scale = SPREAD * reliability**0.5 / worth.std(axis=1, keepdims=True)
        self.effects = effects * scale
        self.worth = worth * scale
        self.means = rng.normal(1.5, 0.6, size=(targets, 1))
        self.noise = SPREAD * (1 - reliability) ** 0.5

    def losses(self) -> np.ndarray:
        rng, shape = self.rng, self.worth.shape
        common = rng.laplace(scale=(COMMON / 2) ** 0.5, size=shape[1])
        own = rng.normal(scale=(1 - COMMON) ** 0.5, size=shape)
        noisier = rng.lognormal(sigma=0.3, size=shape[1]) / np.exp(0.09)
        return self.means - self.worth + self.noise * noisier * (common + own)


Forge = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def another(losses: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    steps = rng.integers(1, losses.shape[1], size=len(columns))
    return losses[:, (columns + steps) % losses.shape[1]]


def noisy(losses: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    found = another(losses, columns, rng)
    return found + rng.normal(scale=0.1, size=found.shape)


def shifted(by: float) -> Forge:
    return lambda losses, columns, rng: losses[:, columns] + by


def plausible(losses: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mean, spread = losses.mean(axis=1, keepdims=True), losses.std(axis=1, keepdims=True)
    return mean + spread * rng.normal(size=(len(losses), len(columns)))


FORGERIES: dict[str, Forge] = {
    "another subset's": another,
    "another's + noise": noisy,
    "+ 0.2 nats": shifted(0.2),
    "+ 1 nat": shifted(1.0),
    "noise around means": plausible,
}


def main() -> None:
    """Runs both simulations and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--subsets", type=int, default=164)
    parser.add_argument("--reliability", type=float, default=0.7)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--fresh", type=int, default=32)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    label_table(options)
    claim_table(options)
    print(f"{time.perf_counter() - start:.0f} s, seed {options.seed}")


def label_table(options: argparse.Namespace) -> None:
    """Rejections of stores, honest ones first."""
    needed = reruns_needed(options.subsets, 0.05, CONFIDENCE)
    counts = sorted({20, needed})
    cells = [("honest", 0.0)] + [(kind, share) for kind in FORGERIES for share in options.shares]
    exact = {(cell, k): 0 for cell in cells for k in counts}
    seeds, drawn, seen = dict(exact), dict(exact), dict(exact)
    for draw in range(options.draws):
        rng = np.random.default_rng([options.seed, draw])
        world = World(options.targets, options.subsets, options.reliability, rng)
        honest, other, again = world.losses(), world.losses(), world.losses()
        order = rng.permutation(options.subsets)
        for cell in cells:
            columns = rng.permutation(options.subsets)[: forged_count(cell[1], options.subsets)]
            stored = honest.copy()
            if len(columns):
                stored[:, columns] = FORGERIES[cell[0]](honest, columns, rng)
            for k in counts:
                some = order[:k]
                forged = np.isin(some, columns)
                same = compare_exact(stored[:, some], honest[:, some], TOLERANCE).consistent
                runs = stored[:, some], other[:, some], again[:, some]
                alike = compare_seeds(*runs, 1 - CONFIDENCE).consistent
                exact[cell, k] += not same.all()
                seeds[cell, k] += not alike.all()
                drawn[cell, k] += forged.sum()
                seen[cell, k] += (forged & ~alike).sum()
    print("forged labels        share   k  exact            other seeds      predicted  found")
    for cell, k in exact:
        predicted = hypergeom.sf(0, options.subsets, forged_count(cell[1], options.subsets), k)
        found = f"{seen[cell, k] / drawn[cell, k]:.2f}" if drawn[cell, k] else "-"
        print(
            f"{cell[0]:19s} {cell[1]:6.0%} {k:3d}  {rate(exact[cell, k], options.draws)}  "
            f"{rate(seeds[cell, k], options.draws)}  {predicted:9.2f}  {found:>5s}"
        )


def claim_table(options: argparse.Namespace) -> None:
    """Refusals of claims about scores, honest ones first."""
    refused: dict[tuple[str, ClaimKind], int] = {}
    values: dict[tuple[str, ClaimKind], list[list[float]]] = {}
    for draw in range(options.draws):
        rng = np.random.default_rng([options.seed, draw, 1])
        world = World(options.targets, options.subsets, options.reliability, rng)
        losses = world.losses()
        first, fresh = slice(None, -options.fresh), slice(-options.fresh, None)
        honest = world.effects + 2 * world.effects.std() * rng.normal(size=world.effects.shape)
        for name, scores, claimed in (
            ("honest", honest, honest),
            ("scaled x10", 10 * honest, honest),
            ("boosted", *2 * (fitted(honest, world.subsets[first], losses[:, first]),)),
        ):
            old = pooled(claimed, world.subsets[first]), losses[:, first], world.subsets[first]
            new = pooled(scores, world.subsets[fresh]), losses[:, fresh], world.subsets[fresh]
            slope = claim_value("slope", *old, POOL)
            for kind in KINDS:
                says, found = (claim_value(kind, *labels, POOL, slope) for labels in (old, new))
                error = claim_error(kind, *new, POOL, slope)
                margin = claim_margin(kind, error, options.fresh, CONFIDENCE)
                refuses = not is_accepted(kind, says, found, EPSILON, margin)
                refused[name, kind] = refused.get((name, kind), 0) + refuses
                values.setdefault((name, kind), []).append([says, found, margin])
    print("\nscores      claim  claimed  measured  margin  refused")
    for (name, kind), count in refused.items():
        says, found, margin = np.mean(values[name, kind], axis=0)
        print(
            f"{name:11s} {kind:6s} {says:7.2f} {found:9.2f} {margin:7.2f}  "
            f"{rate(count, options.draws)}"
        )


def pooled(scores: np.ndarray, subsets: list[np.ndarray]) -> np.ndarray:
    return np.stack([scores[:, rows].sum(axis=1) for rows in subsets], axis=1)


def fitted(scores: np.ndarray, subsets: list[np.ndarray], losses: np.ndarray) -> np.ndarray:
    """Scores changed as little as makes them predict the published labels exactly."""
    members = np.zeros((len(subsets), scores.shape[1]))
    for number, rows in enumerate(subsets):
        members[number, rows] = 1
    wrong = losses.mean(axis=1, keepdims=True) - losses - (pooled(scores, subsets))
    return scores + wrong @ np.linalg.pinv(members).T


def forged_count(share: float, labels: int) -> int:
    return int(np.ceil(share * labels - 1e-9))


def rate(count: int, draws: int) -> str:
    low, high = binomtest(int(count), draws).proportion_ci()
    return f"{count / draws:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
