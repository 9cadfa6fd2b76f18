"""The rows of results.json: what one method is worth, what a comparison says, the ceiling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from airrep.attributor import Attributor
from airrep.examples import Example, InputError
from airrep.label_store import Labels
from airrep.metrics import (
    Resamples,
    break_even,
    calibration,
    calibration_bins,
    interval,
    lds_per_target,
    linear_gap,
    mean_reciprocal_rank,
    mislabel_auc,
    ndcg_at_k,
    noise_ceiling,
    recall_at_k,
    resampled_ceiling,
    share_of_ceiling,
    sign_test,
)

LEARNED = "airrep"  # the method the others are baselines of, if it ran
GIVEN = "given"  # scores of an outside tool: reading them says nothing of what they cost
NOTICEABLE = 1.2  # rates closer than this factor may be one rate, measured twice
RECALL_AT = (1, 5, 10, 50)
NDCG_AT = 10


@dataclass(frozen=True)
class Benchmark:
    """What every method is judged by, and the resamples that all intervals share."""

    pool: Sequence[Example]
    targets: Sequence[Example]
    labels: Labels
    resamples: Resamples


@dataclass(frozen=True)
class MethodRun:
    """What one method gave: scores (T, N), subset scores (T, M) by pooling, seconds, bytes.

    `losses` (T, M) are what it is judged by. Costs of given scores are None: what they were
    elsewhere is not known.
    """

    name: str
    attributor: Attributor
    scores: np.ndarray
    subset_scores: dict[str, np.ndarray]
    losses: np.ndarray
    fit_seconds: float | None
    query_seconds: float | None
    examples_per_second: float | None
    bytes_per_example: int | None

    @property
    def own_subset_scores(self) -> np.ndarray:
        """Subset scores (T, M) by the method's own pooling."""
        return self.subset_scores[self.attributor.pooling]

    @property
    def lds(self) -> np.ndarray:
        """The LDS (T,) of every target."""
        return self._judged[0]

    @property
    def constant_targets(self) -> int:
        """How many targets have the same score for all subsets."""
        return self._judged[1]

    @cached_property
    def _judged(self) -> tuple[np.ndarray, int]:
        return lds_per_target(self.own_subset_scores, self.losses)


@dataclass(frozen=True)
class Ceiling:
    """The noise ceiling: its row, and its LDS in every resample (draws,)."""

    row: dict[str, Any]
    drawn: np.ndarray


def method_row(
    run: MethodRun,
    drawn: Mapping[str, np.ndarray],
    benchmark: Benchmark,
    ceiling: Ceiling | None,
) -> dict[str, Any]:
    """One method's row; `drawn` holds its LDS (draws,) by what was resampled."""
    losses = benchmark.labels.losses
    lds = float(run.lds.mean())
    calibrated = _calibration(run, benchmark)
    return {
        "name": run.name,
        "method": run.attributor.name,
        "oracle": run.attributor.oracle,
        "learns": run.attributor.learns,
        "pooling": run.attributor.pooling,
        "lds": lds,
        "ci95": list(interval(drawn["both"])),
        "ci95_targets": list(interval(drawn["targets"])),
        "ci95_subsets": list(interval(drawn["subsets"])),
        "lds_of_ceiling": (
            share_of_ceiling(lds, drawn["both"], ceiling.row["lds"], ceiling.drawn)
            if ceiling
            else None
        ),
        "constant_targets": run.constant_targets,
        **{
            f"lds_{pooling}": float(lds_per_target(scores, losses)[0].mean())
            for pooling, scores in run.subset_scores.items()
        },
        "calibration": calibrated,
        "linear_gap": (
            linear_share(calibrated["slope"] * run.own_subset_scores, benchmark)
            if calibrated
            else None
        ),
        "fit_seconds": run.fit_seconds,
        "examples_per_second": run.examples_per_second,
        "query_seconds": run.query_seconds,
        "bytes_per_example": run.bytes_per_example,
        "retrieval": _retrieval(run.scores, benchmark.pool, benchmark.targets),
        "mislabel": _mislabel(run.scores, benchmark.pool),
        "per_task": _per_task(run.lds, benchmark.targets),
    }


def linear_share(predicted: np.ndarray, benchmark: Benchmark) -> dict[str, Any] | None:
    """`linear_gap` of predictions (T, M) in nats on this benchmark."""
    labels = benchmark.labels
    return linear_gap(predicted, labels.losses, labels.subsets, len(benchmark.pool))


def preparation(
    run: MethodRun, runs: Sequence[MethodRun], prepared: Mapping[str, float]
) -> dict[str, Any]:
    """Seconds before a method fits anything, and the pool size where that has paid for itself.

    `prepared` has those seconds by method, where they are known; a slower method's own count for
    this one (none where they are not known). `break_even_examples` is by name of every clearly
    slower method that is no oracle, 0 where this one is ahead from the start; null where its
    seconds are not known.
    """
    rate, prepare_seconds = run.examples_per_second, prepared.get(run.name)
    if prepare_seconds is None or rate is None:
        return {"prepare_seconds": prepare_seconds, "break_even_examples": None}
    slower = {
        other.name: other.examples_per_second
        for other in runs
        if not other.attributor.oracle
        and other.examples_per_second is not None
        and other.examples_per_second * NOTICEABLE < rate
    }
    return {
        "prepare_seconds": prepare_seconds,
        "break_even_examples": {
            name: break_even(max(0.0, prepare_seconds - prepared.get(name, 0.0)), rate, other)
            for name, other in slower.items()
        },
    }


def comparison_rows(runs: Sequence[MethodRun], drawn: np.ndarray) -> dict[str, Any]:
    """The learned method against each other one, and against the best that learns no labels, by
    paired resamples: AirRep, or where it did not run the first that learns.

    `drawn` (methods, draws) holds the LDS of every run in the shared resamples.
    """
    learning = [row for row, run in enumerate(runs) if run.attributor.learns]
    named = [row for row in learning if runs[row].attributor.name == LEARNED]
    learned = next(iter([*named, *learning]), None)
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
            "sign_test": sign_test(runs[learned].lds, runs[other].lds),
        }

    def against_best(rows: list[int]) -> dict[str, Any] | None:
        if not rows:
            return None
        best = max(rows, key=lambda row: runs[row].lds.mean())
        names = {"method": runs[learned].name, "best_baseline": runs[best].name}
        return names | against(best)

    baselines = [row for row, run in enumerate(runs) if not run.attributor.learns]
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


def measure_ceiling(
    labels: Labels, repeats: Labels | None, resamples: Resamples, rng: np.random.Generator
) -> Ceiling | None:
    """Ceiling from the subsets that were trained with both seeds; None for fewer than two.

    Targets are resampled as for the LDS, repeated subsets by `rng`. Raises InputError for
    repeats of other targets or another plan.
    """
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
    pair = labels.losses[:, first], repeats.losses[:, second]
    drawn = resampled_ceiling(*pair, resamples.with_subsets(len(numbers), rng))
    row = {**noise_ceiling(*pair), "ci95": list(interval(drawn)), "subsets": len(numbers)}
    return Ceiling(row, drawn)


def _calibration(run: MethodRun, benchmark: Benchmark) -> dict[str, Any] | None:
    given = run.own_subset_scores, benchmark.labels.losses, benchmark.resamples
    found = calibration(*given)
    return found and {**found, "bins": calibration_bins(*given)}


def _retrieval(
    scores: np.ndarray, pool: Sequence[Example], targets: Sequence[Example]
) -> dict[str, Any] | None:
    """Where the proponents stand that targets name in their meta; None when no target does."""
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
        f"ndcg_at_{NDCG_AT}": ndcg_at_k(scores, known, NDCG_AT),
    }


def _mislabel(scores: np.ndarray, pool: Sequence[Example]) -> dict[str, Any] | None:
    """None with fewer than two examples that are flipped on purpose, or two that are not."""
    flipped = np.array([bool(example.meta.get("flipped")) for example in pool])
    return mislabel_auc(scores, flipped) if min(flipped.sum(), (~flipped).sum()) > 1 else None


def _per_task(lds: np.ndarray, targets: Sequence[Example]) -> dict[str, float]:
    """Mean LDS over each task's targets; targets without a task are left out."""
    by_task: dict[str, list[float]] = {}
    for target, value in zip(targets, lds, strict=True):
        if target.task is not None:
            by_task.setdefault(target.task, []).append(float(value))
    return {task: float(np.mean(values)) for task, values in sorted(by_task.items())}
