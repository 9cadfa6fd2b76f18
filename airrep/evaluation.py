"""Runs attribution methods on one benchmark and gathers their quality and their cost."""

import contextlib
import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from airrep.attributor import (
    POOLINGS,
    Attributor,
    NotApplicableError,
    check_subsets,
    subset_scores_of,
)
from airrep.evaluation_rows import (
    GIVEN,
    Benchmark,
    MethodRun,
    comparison_rows,
    linear_share,
    measure_ceiling,
    method_row,
    preparation,
)
from airrep.examples import Example, InputError
from airrep.known_runs import KnownRuns
from airrep.label_store import Labels
from airrep.metrics import Resamples, resampled_lds
from airrep.provenance import git_revision, installed_versions

WARM_UP = 16  # pool examples of the fit that is not timed


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
    prepare_seconds: Mapping[str, float] | None = None,
    known: KnownRuns | None = None,
    show_progress: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Quality and cost of unfitted methods by name: results for results.json, and their scores.

    `labels` are the losses of `targets` under models trained on held-out subsets of `pool`;
    `repeat_labels` are those of some of the same subsets with another seed and give the noise
    ceiling. Intervals are 95% bootstraps (`draws` resamples, fixed by `seed`) over targets and
    subsets together; all methods share the resamples, so differences are paired. Results hold
    only finite JSON; what is not known is null. Scores are (targets, pool), higher = more
    helpful; a method that pools in a way of its own has those of subsets (targets, subsets) too,
    under `subset_scores_of` its name. A method that cannot run here (no tasks, a package that is
    not installed) is listed under "skipped" with its reason. Seconds leave out first-use costs
    such as imports, and given scores have none; what went into a method before (labels, training)
    is `prepare_seconds`, by name, where it is known. Methods whose runs are `known` are not run,
    and those that are run are kept there.

    Raises InputError when labels, pool and targets do not belong together, when a method fails
    (its encoder is damaged), and when no method can run.
    """
    subsets = _check_labels(labels, pool, targets)
    about = _finite_json(config or {})
    prepared = _check_seconds(prepare_seconds or {}, methods)
    lds_rng, ceiling_rng = np.random.default_rng(seed).spawn(2)
    resamples = Resamples.draw(labels.losses.shape, draws, lds_rng)
    ceiling = measure_ceiling(labels, repeat_labels, resamples, ceiling_rng)
    given = Benchmark(pool, targets, labels, resamples)
    runs, skipped = _run_all(methods, pool, targets, subsets, labels.losses, known, show_progress)
    drawn = resampled_lds([run.own_subset_scores for run in runs], labels.losses, resamples)
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
        "noise_ceiling": ceiling and ceiling.row,
        "linear_share_of_labels": linear_share(np.zeros(labels.losses.shape), given),
        "methods": [
            method_row(run, {over: drawn[over][row] for over in drawn}, given, ceiling)
            | preparation(run, runs, prepared)
            for row, run in enumerate(runs)
        ],
        "skipped": skipped,
        **comparison_rows(runs, drawn["both"]),
        "versions": installed_versions(),
        "git_revision": git_revision(),
        "config": about,
    }
    scores = {run.name: run.scores for run in runs}
    own = [run for run in runs if run.attributor.pooling not in POOLINGS]
    return results, scores | {subset_scores_of(run.name): run.own_subset_scores for run in own}


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
    known: KnownRuns | None,
    show_progress: bool,
) -> tuple[list[MethodRun], list[dict[str, str]]]:
    runs, skipped = [], []
    for name, attributor in tqdm(methods.items(), desc="methods", disable=not show_progress):
        run = None if known is None else known.read(name, attributor, losses)
        if run is not None:
            tqdm.write(f"{name}: as it was run before")
            runs.append(run)
            continue
        try:
            runs.append(_run(name, attributor, pool, targets, subsets, losses))
            if known is not None:
                known.write(runs[-1])
        except (NotApplicableError, ImportError) as error:
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
) -> MethodRun:
    _warm_up(attributor, pool, targets)
    start = time.perf_counter()
    attributor.fit(pool)
    fitted = time.perf_counter()
    scores = attributor.score(targets)
    scored = time.perf_counter()
    pooled = {}
    for pooling in dict.fromkeys([*POOLINGS, attributor.pooling]):
        variant = copy.copy(attributor)
        variant.pooling = pooling
        pooled[pooling] = variant.score_subsets(targets, subsets, scores)
    fit_seconds = max(fitted - start, 1e-9)
    pool_seconds = scored - start if attributor.fits_late else fit_seconds
    is_timed = attributor.name != GIVEN
    return MethodRun(
        name=name,
        attributor=attributor,
        scores=scores,
        subset_scores=pooled,
        losses=losses,
        fit_seconds=fit_seconds if is_timed else None,
        query_seconds=(scored - fitted) / len(targets) if is_timed else None,
        examples_per_second=len(pool) / pool_seconds if is_timed else None,
        bytes_per_example=attributor.bytes_per_example if is_timed else None,
    )


def _warm_up(attributor: Attributor, pool: Sequence[Example], targets: Sequence[Example]) -> None:
    """First use pays for imports and kernels; unmeasured, the order of methods does not count."""
    if "members" in attributor.params():
        return  # a fit would be the members' own
    trial = copy.copy(attributor)
    if "store" in trial.params():
        trial.store = None  # type: ignore[attr-defined]  # that folder is for the whole pool's
    # Too few examples for this method, or a fault: the whole pool will show it.
    with contextlib.suppress(InputError):
        trial.fit(pool[:WARM_UP]).score(targets[:1])


def _check_seconds(
    prepare_seconds: Mapping[str, float], methods: Mapping[str, Attributor]
) -> Mapping[str, float]:
    for name, seconds in prepare_seconds.items():
        if name not in methods or not 0 <= seconds < math.inf:
            raise InputError(
                f"prepare_seconds got {seconds} for {name!r}; give seconds of at least 0 for "
                f"methods among {', '.join(methods)}."
            )
    return prepare_seconds


def _finite_json(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(config), default=str, allow_nan=False))
    except ValueError as error:
        raise InputError(
            f"config cannot be written as JSON ({error}); give finite values."
        ) from None
