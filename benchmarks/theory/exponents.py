"""How do the errors of Newton step and influence grow with n, k left out and d features?

    python -m benchmarks.theory.exponents

Logistic regression on Gaussian features, ridge 0.001 n. theta_T: refitted without the group T of
k examples; NS and IF: its estimates by Newton step and by influence; norms are Euclidean, mean
over groups. Two regressions over the grid, for each seed: log |theta_T - NS| on log n, log k,
log d, where kd/n^2 (arXiv 2512.12572) means -2, 1, 1; and log |NS - IF| on log n, log(k + d),
log(kd), where (k + d) sqrt(kd)/n^2 means -2, 1, 0.5. Errors: standard errors over seeds.

Groups: `random`; `aligned`, the k examples of a random half that have label 1 and the largest
logits; `wrong`, the k of a random half with the largest loss.
"""

import argparse
from collections.abc import Sequence
from itertools import product

import numpy as np

from airrep.gradients.linear_head import LinearHead
from benchmarks.theory.problems import Problem, gaussian_problem, without
from benchmarks.theory.table import print_table

GROUPS = ("random", "aligned", "wrong")
STATED = {"newton_step": (-2, 1, 1), "influence": (-2, 1, 0.5)}


def main() -> None:
    """Prints the exponents for each kind of group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--d", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    grid = list(product(options.n, options.k, options.d))
    header = ["groups", "error of", "n", "k or k + d", "d or kd", "R2"]
    print_table(
        header,
        (
            row
            for kind in options.groups
            for row in summary(
                kind, [study(grid, kind, seed, options.draws) for seed in range(options.seeds)]
            )
        ),
    )
    print("\nstated: newton_step -2, 1, 1; influence -2, 1, 0.5")


def study(
    grid: Sequence[tuple[int, int, int]], kind: str, seed: int, draws: int = 5
) -> dict[str, tuple[np.ndarray, float]]:
    """Exponents (3,) and R2 of both errors over a grid of (n, k, d)."""
    n, k, d = np.asarray(grid, dtype=float).T
    errors = np.asarray([measure(*cell, kind, seed, draws) for cell in grid])
    newton, influence = np.log(errors).T
    return {
        "newton_step": regress(newton, np.log(n), np.log(k), np.log(d)),
        "influence": regress(influence, np.log(n), np.log(k + d), np.log(k * d)),
    }


def measure(n: int, k: int, d: int, kind: str, seed: int, draws: int) -> tuple[float, float]:
    """Mean |theta_T - NS| and mean |NS - IF| over groups of k."""
    rng = np.random.default_rng([seed, n, k, d])
    problem = gaussian_problem(n, d, 0, 1e-3 * n, rng)
    influence = problem.influence()
    errors = []
    for _ in range(draws):
        counts = without(n, choose_group(problem, influence.head, k, kind, rng))
        truth = problem.fit(counts, influence.head).weights - influence.head.weights
        step = influence.newton_step(counts)
        errors.append(
            (
                np.linalg.norm(truth.ravel() - step),
                np.linalg.norm(step - influence.influence(counts)),
            )
        )
    newton, first_order = np.mean(errors, axis=0)
    return float(newton), float(first_order)


def choose_group(
    problem: Problem, head: LinearHead, k: int, kind: str, rng: np.random.Generator
) -> np.ndarray:
    """Rows of a group; see the top of the file."""
    if kind == "random":
        return rng.choice(len(problem.labels), k, replace=False)
    half = rng.choice(len(problem.labels), len(problem.labels) // 2, replace=False)
    features, labels = problem.features[half], problem.labels[half]
    far = np.where(labels == 1, features @ head.weights[0], -np.inf)
    value = head.losses(features, labels) if kind == "wrong" else far
    return half[np.argsort(-value)[:k]]


def regress(y: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares with an intercept: the columns' coefficients, and R2."""
    design = np.column_stack([*columns, np.ones(len(y))])
    coefficients, *_ = np.linalg.lstsq(design, y)
    residual = y - design @ coefficients
    return coefficients[:-1], float(1 - residual.var() / y.var())


def summary(kind: str, runs: Sequence[dict[str, tuple[np.ndarray, float]]]) -> list[list[str]]:
    """Rows of the table: mean and standard error over seeds."""
    rows = []
    for name in STATED:
        found = np.asarray([run[name][0] for run in runs])
        error = found.std(axis=0, ddof=1) / np.sqrt(len(runs))
        cells = [f"{m:.2f} ± {e:.2f}" for m, e in zip(found.mean(axis=0), error, strict=True)]
        fit = np.mean([run[name][1] for run in runs])
        rows.append([kind, name, *cells, f"{fit:.3f}"])
    return rows


if __name__ == "__main__":
    main()
