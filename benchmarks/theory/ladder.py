"""What does each step from exact leave-one-out down to TRAK lose, in size and in order?

    python -m benchmarks.theory.ladder

The rungs, all estimates of how much a target's margin log(p / (1 - p)) falls when one pool
example is left out:

- ALO: the example's own Newton step (rescaled influence).
- IF: influence, the Hessian of the whole fit.
- TRAK: the same with F = sum of phi phi^T in the Hessian's place, phi the gradient of the margin,
  not projected: phi(x)^T (F + l2 I)^-1 phi(z) (1 - p(z)).
- TRAK at m: phi projected to m random dimensions, m in multiples of the effective dimension
  tr(F (F + l2 I)^-1).

Error: |estimate - truth| / |truth| over targets and examples left out, the truth by refitting.
Rank: Spearman over the examples left out, mean over targets. LDS: over refits on random halves
of the pool. Kept: LDS as a share of the best of unprojected and projected TRAK.
"""

import argparse

import numpy as np
from scipy.special import expit

from airrep.gradients.linear_head import outer
from airrep.gradients.linear_influence import HeadInfluence
from airrep.metrics import lds_per_target
from benchmarks.theory.problems import Problem, bundled_problem, gaussian_problem, without
from benchmarks.theory.table import print_table, spread

MULTIPLES = (0.5, 1, 2, 5, 10, 20)
PROBLEMS = ("breast_cancer", "digits", "gaussian")


def main() -> None:
    """Prints two tables for every problem and ridge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--l2", type=float, nargs="+", default=[1.0, 100.0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in options.problems:
        for l2 in options.l2:
            runs = [study(make_problem(name, l2, seed), seed) for seed in range(options.seeds)]
            print(
                f"\n{name}, l2 {l2:g}: {spread((run['weights'] for run in runs), 0)} weights, "
                f"effective dimension {spread((run['effective_dimension'] for run in runs), 1)}"
            )
            print_table(["rung", "error", "rank", "LDS", "kept"], summary(runs))


def make_problem(name: str, l2: float, seed: int) -> Problem:
    """A pool of about 400 with 50 targets."""
    rng = np.random.default_rng(seed)
    if name == "gaussian":
        return gaussian_problem(400, 200, 50, l2, rng, strength=3.0)
    return bundled_problem(name, 50, l2, rng, pool=400)


def study(problem: Problem, seed: int, left_out: int = 40, subsets: int = 40) -> dict:
    """The rungs of one problem: {"rungs": {name: {"error", "rank", "lds"}}, ...}."""
    rng = np.random.default_rng([seed, 1])
    influence = problem.influence()
    n = len(problem.labels)
    rows = rng.choice(n, left_out, replace=False)
    truth = np.stack([margin_falls(problem, influence, without(n, row)) for row in rows], axis=1)
    halves = np.zeros((subsets, n))
    for half in halves:
        half[rng.choice(n, n // 2, replace=False)] = 1
    losses = np.stack([refit_losses(problem, influence, half) for half in halves], axis=1)
    scores, effective = rungs(problem, influence, rng)
    return {
        "weights": influence.head.weights.size,
        "effective_dimension": effective,
        "rungs": {
            name: {
                "error": np.linalg.norm(score[:, rows] - truth) / np.linalg.norm(truth),
                # Spearman of score and fall of the margin: LDS takes losses, which are the other
                # way up.
                "rank": lds_per_target(score[:, rows], -truth)[0].mean(),
                "lds": lds_per_target(score @ halves.T, losses)[0].mean(),
            }
            for name, score in scores.items()
        },
    }


def rungs(
    problem: Problem, influence: HeadInfluence, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], float]:
    """Scores (T, n) of every rung, and the effective dimension."""
    head = influence.head
    target = margin_gradients(problem.target_features, problem.target_labels, influence)
    pool = margin_gradients(problem.features, problem.labels, influence)
    wrong = expit(-head.margins(problem.features, problem.labels))
    effective = effective_dimension(pool, problem.l2)
    scores = {
        # A margin's gradient points against the loss's.
        "ALO": -influence.loss_changes(target, influence.rescaled_residuals),
        "IF": -influence.loss_changes(target, influence.residuals),
        "TRAK": trak(target, pool, problem.l2) * wrong,
    }
    for multiple in MULTIPLES:
        m = max(1, round(multiple * effective))
        projection = rng.normal(size=(pool.shape[1], m)) / np.sqrt(m)
        projected = trak(target @ projection, pool @ projection, problem.l2) * wrong
        scores[f"TRAK at {multiple:g}"] = projected
    return scores, effective


def trak(target: np.ndarray, pool: np.ndarray, l2: float) -> np.ndarray:
    """phi(x)^T (Phi^T Phi + l2 I)^-1 phi(z), (T, n), by way of the (n, n) kernel."""
    kernel = pool @ pool.T + l2 * np.eye(len(pool))
    return np.linalg.solve(kernel, pool @ target.T).T


def effective_dimension(gradients: np.ndarray, l2: float) -> float:
    """tr(F (F + l2 I)^-1) with F the sum of outer products of gradients (n, p)."""
    squares = np.linalg.svd(gradients, compute_uv=False) ** 2
    return float((squares / (squares + l2)).sum())


def margin_gradients(
    features: np.ndarray, labels: np.ndarray, influence: HeadInfluence
) -> np.ndarray:
    """Gradient of log(p / (1 - p)) of the own class, (n, c d).

    By the logits it is 1 for the own class, and for the others minus their share of 1 - p.
    """
    own = np.arange(len(labels)), labels
    others = influence.head.probabilities(features)
    others[own] = 0
    by_logits = -others / others.sum(axis=1, keepdims=True)
    by_logits[own] = 1
    return outer(by_logits[:, -len(influence.head.weights) :], features)


def margin_falls(problem: Problem, influence: HeadInfluence, counts: np.ndarray) -> np.ndarray:
    """Exact fall (T,) of the targets' margins by refitting."""
    refit = problem.fit(counts, influence.head)
    target = problem.target_features, problem.target_labels
    return influence.head.margins(*target) - refit.margins(*target)


def refit_losses(problem: Problem, influence: HeadInfluence, counts: np.ndarray) -> np.ndarray:
    """Targets' losses (T,) after refitting."""
    refit = problem.fit(counts, influence.head)
    return refit.losses(problem.target_features, problem.target_labels)


def summary(runs: list[dict]) -> list[list[str]]:
    """Rows of the table: mean and standard deviation over seeds."""
    rows = []
    for name in runs[0]["rungs"]:
        found = [run["rungs"][name] for run in runs]
        row = [spread(one[key] for one in found) for key in ("error", "rank", "lds")]
        kept = spread(one["lds"] / best_trak(run) for one, run in zip(found, runs, strict=True))
        rows.append([name, *row, kept if name.startswith("TRAK") else ""])
    return rows


def best_trak(run: dict) -> float:
    """The best LDS among TRAK's rungs."""
    return max(one["lds"] for name, one in run["rungs"].items() if name.startswith("TRAK"))


if __name__ == "__main__":
    main()
