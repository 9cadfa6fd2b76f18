"""Is the size of a predicted removal effect right, and are flipped labels found by it?

    python -m benchmarks.theory.removal

First table: groups of 5% of a pool of 300 are left out and the head is refitted. Slope: of the
predicted on the actual change of 50 targets' margins log(p / (1 - p)), through the origin, over
targets and groups; 1 is right, less is too small. Rank: Spearman over groups, mean over targets.
Groups: `single` examples; `random`; `class`, all of one class; `cluster`, the nearest neighbours
of an example among its class.

Second table: 10% of the labels are flipped. AUC of finding them by the mean harm to the targets
and by self-influence (the example's own loss when it is left out); and by how much leaving
exactly the flipped ones out lowers the targets' mean loss, in nats: actual and predicted.
"""

import argparse
from dataclasses import replace

import numpy as np

from airrep.gradients.linear_influence import HeadInfluence
from airrep.metrics import lds_per_target, mislabel_auc
from benchmarks.theory.problems import (
    BUNDLED,
    Problem,
    bundled_problem,
    gaussian_problem,
    without,
)
from benchmarks.theory.table import print_table, spread

METHODS = {"IF": "influence", "RIF": "rescaled_influence", "NS": "newton_step"}
GROUPS = ("single", "random", "class", "cluster")
POOL, TARGETS = 300, 50
RATIOS = (0.02, 0.1, 0.3, 1.0)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--l2", type=float, default=1.0)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    problems = [f"gaussian {ratio:g}" for ratio in RATIOS] + list(BUNDLED)
    header = [
        "problem",
        "groups",
        *(f"slope {m}" for m in METHODS),
        *(f"rank {m}" for m in METHODS),
    ]
    print_table(header, (row for name in problems for row in removal_rows(name, options)))
    header = [
        "problem",
        *(f"AUC {by} {m}" for by in ("harm", "self") for m in ("IF", "RIF")),
        "fall",
        *(f"fall by {m}" for m in METHODS),
    ]
    print()
    print_table(header, (flip_row(name, options) for name in problems))


def removal_rows(name: str, options: argparse.Namespace) -> list[list[str]]:
    """Rows of the first table for one problem."""
    rows = []
    for kind in GROUPS:
        runs = [
            removal(make_problem(name, options.l2, seed), kind, seed, options.draws)
            for seed in range(options.seeds)
        ]
        cells = [
            spread(run[what][m] for run in runs) for what in ("slope", "rank") for m in METHODS
        ]
        rows.append([name, kind, *cells])
    return rows


def flip_row(name: str, options: argparse.Namespace) -> list[str]:
    """The row of the second table for one problem."""
    runs = [flips(make_problem(name, options.l2, seed), seed) for seed in range(options.seeds)]
    return [name, *(spread(run[key] for run in runs) for key in runs[0])]


def make_problem(name: str, l2: float, seed: int) -> Problem:
    """ "gaussian" and the ratio d/n, or bundled data."""
    rng = np.random.default_rng(seed)
    kind, *ratio = name.split()
    if ratio:
        return gaussian_problem(POOL, round(float(ratio[0]) * POOL), TARGETS, l2, rng, strength=2.0)
    return bundled_problem(kind, TARGETS, l2, rng, POOL)


def removal(problem: Problem, kind: str, seed: int, draws: int) -> dict[str, dict[str, float]]:
    """Slope and rank of each method's predictions for `draws` groups of a kind."""
    rng = np.random.default_rng([seed, 1])
    influence = problem.influence()
    target = problem.target_features, problem.target_labels
    before = influence.head.margins(*target)
    groups = [without(len(problem.labels), choose_group(problem, kind, rng)) for _ in range(draws)]
    actual = np.stack(
        [problem.fit(group, influence.head).margins(*target) - before for group in groups], axis=1
    )
    found: dict[str, dict[str, float]] = {"slope": {}, "rank": {}}
    for name, method in METHODS.items():
        steps = [getattr(influence, method)(group) for group in groups]
        predicted = np.stack(
            [influence.head.moved(step).margins(*target) - before for step in steps], axis=1
        )
        found["slope"][name] = float((predicted * actual).sum() / (actual**2).sum())
        found["rank"][name] = float(lds_per_target(predicted, -actual)[0].mean())
    return found


def choose_group(problem: Problem, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Rows of a group; see the top of the file."""
    n = len(problem.labels)
    size = 1 if kind == "single" else round(0.05 * n)
    first = rng.integers(n)
    if kind in ("single", "random"):
        return rng.choice(n, size, replace=False)
    same = np.flatnonzero(problem.labels == problem.labels[first])
    if kind == "class":
        return rng.choice(same, min(size, len(same)), replace=False)
    distance = np.linalg.norm(problem.features[same] - problem.features[first], axis=1)
    return same[np.argsort(distance)[:size]]


def flips(problem: Problem, seed: int, share: float = 0.1) -> dict[str, float]:
    """The second table's cells, in its order."""
    rng = np.random.default_rng([seed, 2])
    n = len(problem.labels)
    flipped = np.zeros(n, dtype=bool)
    flipped[rng.choice(n, round(share * n), replace=False)] = True
    shift = rng.integers(1, problem.classes, size=n)
    poisoned = replace(
        problem,
        labels=np.where(flipped, (problem.labels + shift) % problem.classes, problem.labels),
    )
    influence = poisoned.influence()
    target = problem.target_features, problem.target_labels
    gradients = influence.head.gradients(*target)
    residuals = {"IF": influence.residuals, "RIF": influence.rescaled_residuals}
    cells = {}
    for name, used in residuals.items():
        cells[f"harm {name}"] = mislabel_auc(influence.loss_changes(gradients, used), flipped)[
            "auc"
        ]
    for name, used in residuals.items():
        own = self_influence(influence, poisoned, used)
        cells[f"self {name}"] = mislabel_auc(-own[None], flipped)["auc"]
    before = influence.head.losses(*target).mean()
    counts = without(n, np.flatnonzero(flipped))
    heads = {"fall": poisoned.fit(counts, influence.head)}
    for name, method in METHODS.items():
        heads[f"fall by {name}"] = influence.head.moved(getattr(influence, method)(counts))
    cells |= {name: before - head.losses(*target).mean() for name, head in heads.items()}
    return {key: float(value) for key, value in cells.items()}


def self_influence(influence: HeadInfluence, problem: Problem, residuals: np.ndarray) -> np.ndarray:
    """Nats (n,) that each example's own loss rises by when it is left out."""
    gradients = influence.head.gradients(problem.features, problem.labels)
    return np.diag(influence.loss_changes(gradients, residuals))


if __name__ == "__main__":
    main()
