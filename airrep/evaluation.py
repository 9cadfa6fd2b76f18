"""Runs attribution methods on one benchmark and gathers their quality and their cost."""

import contextlib
import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from airrep.attributor import POOLINGS, Attributor, check_subsets
from airrep.examples import Example, InputError
from airrep.label_store import Labels
from airrep.metrics import (
    bootstrap_ceiling,
    interval,
    lds_per_target,
    mean_reciprocal_rank,
    noise_ceiling,
    recall_at_k,
    resampled_lds,
)
from airrep.provenance import git_revision, installed_versions

LEARNED = "airrep"  # the method the others are baselines of
RECALL_AT = (1, 5, 10, 50)
WARM_UP = 16  # pool examples of the fit that is not timed


@dataclass(frozen=True)
class _Run:
    """What one method gave: scores (T, N), subset scores (T, M) by pooling, LDS (T,), seconds."""

    name: str
    attributor: Attributor
    scores: np.ndarray
    subset_scores: dict[str, np.ndarray]
    lds: np.ndarray
    constant_targets: int
    fit_seconds: float
    score_seconds: float


def evaluate(
    methods: Mapping[str, Attributor],
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    *,
    benchmark: str,
    repeat_labels: Labels | None = None,
    draws: int = 1000,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Quality and cost of unfitted methods by name: results for results.json, and their scores.

    `labels` are the losses of `targets` under models trained on held-out subsets of `pool`;
    `repeat_labels` are those of some of the same subsets with another seed and give the noise
    ceiling. Intervals are 95% bootstraps (`draws` resamples, fixed by `seed`) over targets and
    subsets together; all methods share the resamples, so differences are paired. Results hold
    only finite JSON; what is not known is null. Scores are (targets, pool), higher = more
    helpful. A method that cannot run here (no tasks, a package that is not installed) is listed
    under "skipped" with its reason. Seconds leave out first-use costs such as imports.

    Raises InputError when labels, pool and targets do not belong together, and when no method
    can run.
    """
    subsets = _check_labels(labels, pool, targets)
    about = _finite_json(config or {})
    runs, skipped = _run_all(methods, pool, targets, subsets, labels.losses, show_progress)
    lds_rng, ceiling_rng = np.random.default_rng(seed).spawn(2)
    drawn = resampled_lds(
        [run.subset_scores[run.attributor.pooling] for run in runs], labels.losses, draws, lds_rng
    )
    results = {
        "benchmark": benchmark,
        "targets": len(targets),
        "subsets": len(subsets),
        "pool": len(pool),
        "missing_losses": int((~np.isfinite(labels.losses)).sum()),
        "constant_label_targets": sum(
            len(np.unique(row[np.isfinite(row)])) < 2 for row in labels.losses
        ),
        "draws": draws,
        "seed": seed,
        "noise_ceiling": _ceiling(labels, repeat_labels, draws, ceiling_rng),
        "methods": [
            _method_row(
                run, {over: drawn[over][row] for over in drawn}, pool, targets, labels.losses
            )
            for row, run in enumerate(runs)
        ],
        "skipped": skipped,
        **_comparisons(runs, drawn["both"]),
        "versions": installed_versions(),
        "git_revision": git_revision(),
        "config": about,
    }
    return results, {run.name: run.scores for run in runs}


def _check_labels(
    labels: Labels, pool: Sequence[Example], targets: Sequence[Example]
) -> list[np.ndarray]:
    if len(labels.losses) != len(targets):
        raise InputError(
            f"The labels hold losses of {len(labels.losses)} targets, but {len(targets)} targets "
            "were given; give the targets these labels were made for."
        )
    if labels.losses.shape[1] != len(labels.subsets) or len(labels.subsets) < 2:
        raise InputError(
            f"The labels have {labels.losses.shape[1]} columns of losses for "
            f"{len(labels.subsets)} subsets; an evaluation needs one a subset and at least two."
        )
    return check_subsets(labels.subsets, len(pool))


def _run_all(
    methods: Mapping[str, Attributor],
    pool: Sequence[Example],
    targets: Sequence[Example],
    subsets: list[np.ndarray],
    losses: np.ndarray,
    show_progress: bool,
) -> tuple[list[_Run], list[dict[str, str]]]:
    runs, skipped = [], []
    for name, attributor in tqdm(methods.items(), desc="methods", disable=not show_progress):
        try:
            runs.append(_run(name, attributor, pool, targets, subsets, losses))
        except (InputError, ImportError) as error:
            skipped.append({"name": name, "reason": str(error)})
    if not runs:
        reasons = " ".join(f"{row['name']}: {row['reason']}" for row in skipped)
        raise InputError(f"No method could run. {reasons or 'Give at least one method.'}")
    return runs, skipped


def _run(
    name: str,
    attributor: Attributor,
    pool: Sequence[Example],
    targets: Sequence[Example],
    subsets: list[np.ndarray],
    losses: np.ndarray,
) -> _Run:
    _warm_up(attributor, pool, targets)
    start = time.perf_counter()
    attributor.fit(pool)
    fitted = time.perf_counter()
    scores = attributor.score(targets)
    scored = time.perf_counter()
    pooled = {}
    for pooling in POOLINGS:
        variant = copy.copy(attributor)
        variant.pooling = pooling
        pooled[pooling] = variant.score_subsets(targets, subsets, scores)
    lds, constant = lds_per_target(pooled[attributor.pooling], losses)
    return _Run(name, attributor, scores, pooled, lds, constant, fitted - start, scored - fitted)


def _warm_up(attributor: Attributor, pool: Sequence[Example], targets: Sequence[Example]) -> None:
    """First use pays for imports and kernels; unmeasured, the order of methods does not count."""
    # Too few examples for this method, or a fault: the whole pool will show it.
    with contextlib.suppress(InputError):
        copy.copy(attributor).fit(pool[:WARM_UP]).score(targets[:1])


def _method_row(
    run: _Run,
    drawn: Mapping[str, np.ndarray],
    pool: Sequence[Example],
    targets: Sequence[Example],
    losses: np.ndarray,
) -> dict[str, Any]:
    fit_seconds = max(run.fit_seconds, 1e-9)
    return {
        "name": run.name,
        "method": run.attributor.name,
        "oracle": run.attributor.oracle,
        "pooling": run.attributor.pooling,
        "lds": float(run.lds.mean()),
        "ci95": list(interval(drawn["both"])),
        "ci95_targets": list(interval(drawn["targets"])),
        "ci95_subsets": list(interval(drawn["subsets"])),
        "constant_targets": run.constant_targets,
        **{
            f"lds_{pooling}": float(lds_per_target(scores, losses)[0].mean())
            for pooling, scores in run.subset_scores.items()
        },
        "fit_seconds": fit_seconds,
        "examples_per_second": len(pool) / fit_seconds,
        "query_seconds": run.score_seconds / len(targets),
        "bytes_per_example": run.attributor.bytes_per_example,
        "retrieval": _retrieval(run.scores, pool, targets),
        "per_task": _per_task(run.lds, targets),
    }


def _retrieval(
    scores: np.ndarray, pool: Sequence[Example], targets: Sequence[Example]
) -> dict[str, Any] | None:
    """Recall and MRR over the targets whose meta names proponents; None when no target's does."""
    rows = {example.id: row for row, example in enumerate(pool)}
    named = [list(target.meta.get("proponents") or []) for target in targets]
    known = [[rows[name] for name in names if name in rows] for names in named]
    if not any(known):
        return None
    return {
        "targets": sum(bool(found) for found in known),
        "outside_pool": sum(map(len, named)) - sum(map(len, known)),
        **{f"recall_at_{k}": recall_at_k(scores, known, k) for k in RECALL_AT},
        "mrr": mean_reciprocal_rank(scores, known),
    }


def _per_task(lds: np.ndarray, targets: Sequence[Example]) -> dict[str, float]:
    """Mean LDS over each task's targets; targets without a task are left out."""
    by_task: dict[str, list[float]] = {}
    for target, value in zip(targets, lds, strict=True):
        if target.task is not None:
            by_task.setdefault(target.task, []).append(float(value))
    return {task: float(np.mean(values)) for task, values in sorted(by_task.items())}


def _comparisons(runs: Sequence[_Run], drawn: np.ndarray) -> dict[str, Any]:
    """The learned method against each other one, and against the best, by paired resamples."""
    learned = next((row for row, run in enumerate(runs) if run.attributor.name == LEARNED), None)
    if learned is None:
        return {"comparison": None, "comparison_without_oracles": None, "differences": []}

    def against(other: int) -> dict[str, Any]:
        difference = drawn[learned] - drawn[other]
        low, high = interval(difference)
        return {
            "difference": float(runs[learned].lds.mean() - runs[other].lds.mean()),
            "ci95": [low, high],
            "share_not_better": float((difference <= 0).mean()),
            "wins": low > 0,
        }

    def against_best(rows: list[int]) -> dict[str, Any] | None:
        if not rows:
            return None
        best = max(rows, key=lambda row: runs[row].lds.mean())
        names = {"method": runs[learned].name, "best_baseline": runs[best].name}
        return names | against(best)

    baselines = [row for row, run in enumerate(runs) if run.attributor.name != LEARNED]
    return {
        "comparison": against_best(baselines),
        "comparison_without_oracles": against_best(
            [row for row in baselines if not runs[row].attributor.oracle]
        ),
        "differences": [
            {"method": runs[learned].name, "baseline": run.name} | against(row)
            for row, run in enumerate(runs)
            if row != learned
        ],
    }


def _ceiling(
    labels: Labels, repeats: Labels | None, draws: int, rng: np.random.Generator
) -> dict[str, Any] | None:
    """Ceiling from the subsets that were trained with both seeds; None for fewer than two."""
    if repeats is None:
        return None
    if len(repeats.losses) != len(labels.losses):
        raise InputError(
            f"The repeated labels hold {len(repeats.losses)} targets, the labels "
            f"{len(labels.losses)}; give repeats of the same targets."
        )
    numbers, first, second = np.intersect1d(labels.numbers, repeats.numbers, return_indices=True)
    if len(numbers) < 2:
        return None
    for number, row, again in zip(numbers, first, second, strict=True):
        if not np.array_equal(labels.subsets[row], repeats.subsets[again]):
            raise InputError(
                f"Subset {number} differs between the labels and the repeated labels; "
                "give two seeds of one plan."
            )
    losses, again_losses = labels.losses[:, first], repeats.losses[:, second]
    low, high = bootstrap_ceiling(losses, again_losses, draws, rng)
    ceiling = noise_ceiling(losses, again_losses)
    return {**ceiling, "ci95": [low, high], "subsets": len(numbers)}


def _finite_json(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(config), default=str, allow_nan=False))
    except ValueError as error:
        raise InputError(
            f"config cannot be written as JSON ({error}); give finite values."
        ) from None
