"""Scores against what retraining without, or with, chosen examples does to the targets."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from airrep.examples import InputError
from airrep.metrics.bootstrap import Resamples, interval, resampled_correlation
from airrep.metrics.correlation import centred, centred_ranks, correlation, paired


def leave_one_out_correlation(
    scores: ArrayLike,
    changes: ArrayLike,
    rows: ArrayLike,
    draws: int,
    rng: np.random.Generator,
) -> dict[str, dict[str, Any]]:
    """Correlation of scores with the measured effect of leaving single examples out.

    Takes scores (T, N), pool rows (n,) that were left out one at a time, and the loss changes
    (T, n) in nats: loss without the row minus loss with it, so + = the row helped. Returns
    "pearson" and "spearman", each with `per_target` (constant rows count 0), their `mean`, and
    its `ci95` over resampled targets and rows. Changes that are not finite are missing. Raises
    InputError for shapes that differ and rows outside the pool.
    """
    scores, rows = np.asarray(scores, dtype=float), np.asarray(rows)
    if scores.ndim != 2 or rows.ndim != 1 or ((rows < 0) | (rows >= scores.shape[1])).any():
        raise InputError(
            f"Scores of shape {scores.shape} do not hold the {rows.size} rows left out; give "
            "(targets, pool) and pool rows."
        )
    chosen, changes = paired(scores[:, rows], changes, "scores of the rows left out")
    present = np.isfinite(changes)
    resamples = Resamples.draw(changes.shape, draws, rng)
    found = {}
    for name, centre in (("pearson", centred), ("spearman", centred_ranks)):
        a, b = centre(chosen, present), centre(changes, present)
        rho, _ = correlation(a, b)
        drawn = resampled_correlation(a[None], b, present, resamples)["both"][0]
        found[name] = {
            "mean": float(rho.mean()),
            "ci95": list(interval(drawn)),
            "per_target": rho.tolist(),
        }
    return found


def against_random(
    values: ArrayLike, random: ArrayLike, draws: int, rng: np.random.Generator
) -> dict[str, Any]:
    """One chosen run against several random ones, on the same targets.

    Takes values (T,) of the chosen run and (T, R) of R random runs, in one unit. Returns the
    means of both, their `difference` (chosen minus random), its 95% interval over resampled
    targets and random runs together, and `targets`, the number used: those with a missing value
    are left out. Raises InputError for shapes that differ and where no target is whole.
    """
    chosen, others = np.asarray(values, dtype=float), np.asarray(random, dtype=float)
    if others.ndim != 2 or others.shape[1] < 1 or chosen.shape != others.shape[:1]:
        raise InputError(
            f"The chosen run has values of shape {chosen.shape}, the random runs "
            f"{others.shape}; give (targets,) and (targets, runs)."
        )
    whole = np.isfinite(chosen) & np.isfinite(others).all(axis=1)
    if not whole.any():
        raise InputError("Every target lacks the value of some run; give whole runs.")
    chosen, others = chosen[whole], others[whole]
    resamples = Resamples.draw(others.shape, draws, rng)
    run_means = resamples.targets.T @ others / len(chosen)
    drawn_random = (run_means * resamples.subsets.T).mean(axis=1)
    drawn = chosen @ resamples.targets / len(chosen) - drawn_random
    return {
        "mean": float(chosen.mean()),
        "random": float(others.mean()),
        "difference": float(chosen.mean() - others.mean()),
        "ci95": list(interval(drawn)),
        "targets": len(chosen),
    }


def tail_removal(
    removed: ArrayLike,
    random: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    *,
    control: ArrayLike | None = None,
) -> dict[str, Any]:
    """What removing each target's most helpful examples does, beyond removing any.

    Takes loss changes in nats, loss after removal minus loss before: (T,) of a target after its
    own top examples were removed, (T, R) of the same target after R random removals of that
    size, and `control` (T, C) of C other targets after the row's removal. Returns
    `against_random` for "random" and "control" (null where not given): a good score has a
    positive difference from both, and one that breaks the model as a whole only from the first.
    """
    return {
        "random": against_random(removed, random, draws, rng),
        "control": None if control is None else against_random(removed, control, draws, rng),
    }


def data_selection(
    losses: ArrayLike,
    random_losses: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    *,
    matches: ArrayLike | None = None,
    random_matches: ArrayLike | None = None,
) -> dict[str, Any]:
    """Training on selected examples against training on as many random ones.

    Takes target losses (T,) in nats after the selected run and (T, R) after R random runs, and
    exact matches (0 or 1) of the same shapes where they are known. Returns `against_random` for
    "loss" (a good selection has a negative difference) and "exact_match" (positive, or null).
    """
    return {
        "loss": against_random(losses, random_losses, draws, rng),
        "exact_match": (
            None
            if matches is None or random_matches is None
            else against_random(matches, random_matches, draws, rng)
        ),
    }
