"""Which estimate ranks training subsets best: sums of single effects, or one Newton step each?

    python -m benchmarks.theory.subsets

The head is refitted on random subsets of a pool of 300, of a given share; LDS over 40 subsets,
mean over 50 targets. IF and RIF add up their single effects; NS is the target's loss after one
Newton step from the pool's head to the subset's.
"""

import argparse

import numpy as np

from airrep.metrics import lds_per_target
from benchmarks.theory.problems import BUNDLED, Problem, bundled_problem
from benchmarks.theory.table import print_table, spread


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.9])
    parser.add_argument("--l2", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for name in BUNDLED:
        for l2 in options.l2:
            for share in options.shares:
                runs = [
                    study(
                        bundled_problem(name, 50, l2, np.random.default_rng(seed), 300), share, seed
                    )
                    for seed in range(options.seeds)
                ]
                cells = [spread(run[method] for run in runs) for method in runs[0]]
                rows.append([name, f"{l2:g}", f"{share:g}", *cells])
    print_table(["problem", "l2", "share", "IF", "RIF", "NS"], rows)


def study(problem: Problem, share: float, seed: int, subsets: int = 40) -> dict[str, float]:
    """LDS of each method."""
    rng = np.random.default_rng([seed, 1])
    influence = problem.influence()
    head, n = influence.head, len(problem.labels)
    counts = np.zeros((subsets, n))
    for row in counts:
        row[rng.choice(n, round(share * n), replace=False)] = 1
    target = problem.target_features, problem.target_labels
    losses = np.stack([problem.fit(row, head).losses(*target) for row in counts], axis=1)
    gradients = head.gradients(*target)
    stepped = [head.moved(influence.newton_step(row)).losses(*target) for row in counts]
    scores = {
        "IF": influence.loss_changes(gradients, influence.residuals) @ counts.T,
        "RIF": influence.loss_changes(gradients, influence.rescaled_residuals) @ counts.T,
        "NS": -np.stack(stepped, axis=1),
    }
    return {name: float(lds_per_target(score, losses)[0].mean()) for name, score in scores.items()}


if __name__ == "__main__":
    main()
