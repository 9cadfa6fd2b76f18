"""How much better the encoder gets with more training labels, judged on held-out ones.

Test labels have no part in it. Targets and subsets are held out once, by the split of
`airrep.holdout`; encoders are trained on nested random parts of the other subsets, each as any
encoder is: it holds out a share of its own part to choose its step.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from airrep.attributors.airrep import AirRepAttributor
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError
from airrep.holdout import Holdout, hold_out
from airrep.label_store import Labels
from airrep.metrics import Resamples, interval, lds_per_target, resampled_lds
from airrep.provenance import git_revision, installed_versions, write_json_atomic
from airrep.train_settings import TrainSettings
from airrep.trainer import train_encoder

ORDER = 4  # keeps the random order of subsets apart from the trainer's random numbers
FILE = "learning_curve.json"
POINT_KEYS = {"labels", "lds", "ci95", "by_seed"}
POINTS = 4  # counts when none are given, each half of the next


@dataclass(frozen=True)
class CurveLabels:
    """What points train on and are judged by: the subsets (columns) and targets (rows) of each."""

    pool: Sequence[Example]
    targets: Sequence[Example]
    labels: Labels
    split: Holdout

    def part(self, count: int, seed: int) -> tuple[list[Example], Labels]:
        """Targets and labels of `count` subsets; a larger count holds those of a smaller one."""
        rng = np.random.default_rng([seed, ORDER])
        columns = np.sort(rng.permutation(self.split.train_subsets)[:count])
        return self._of(self.split.train_targets, columns)

    def judged(self) -> tuple[list[Example], Labels]:
        """The held-out targets, and the labels of the held-out subsets."""
        return self._of(self.split.held_targets, self.split.held_subsets)

    def _of(self, rows: np.ndarray, columns: np.ndarray) -> tuple[list[Example], Labels]:
        labels = Labels(
            [self.labels.subsets[column] for column in columns],
            self.labels.losses[np.ix_(rows, columns)],
            self.labels.numbers[columns],
        )
        return [self.targets[row] for row in rows], labels


def split_for_curve(
    pool: Sequence[Example], targets: Sequence[Example], labels: Labels, settings: TrainSettings
) -> CurveLabels:
    """Holds out subsets and targets as the settings say; InputError where they hold out none."""
    for name in ("validation_subsets", "validation_targets"):
        if getattr(settings, name) == 0:
            raise InputError(
                f"A learning curve is judged on held-out labels, and train.{name} is 0; give a "
                "share, such as 0.2."
            )
    return CurveLabels(pool, targets, labels, hold_out(labels, settings))


def pick_counts(data: CurveLabels, settings: TrainSettings, wanted: str | None = None) -> list[int]:
    """The numbers of training labels, ascending: those wanted (a,b,c), or all and some halvings.

    Raises InputError for other texts, for more labels than there are, and for so few that none
    can be held out of them.
    """
    most = len(data.split.train_subsets)
    if wanted is None:
        halvings = [most >> times for times in range(POINTS)]
        return sorted({count for count in halvings if _is_enough(data, settings, count)} | {most})
    try:
        counts = {int(part) for part in wanted.split(",")}
    except ValueError:
        raise InputError(f"counts is {wanted!r}; give whole numbers, such as 10,20,40.") from None
    for count in counts:
        if not 1 <= count <= most:
            raise InputError(
                f"counts has {count}; {most} training labels are there beside the "
                f"{len(data.split.held_subsets)} held-out ones: give 1 to {most}."
            )
        if not _is_enough(data, settings, count):
            raise InputError(
                f"counts has {count}; with train.validation_subsets {settings.validation_subsets} "
                "that leaves fewer than 2 labels to train on, or to choose the step by: give more."
            )
    return sorted(counts)


def learning_curve(
    path: Path,
    make_encoder: Callable[[], AirRepEncoder],
    data: CurveLabels,
    settings: TrainSettings,
    counts: Sequence[int],
    seeds: int,
    draws: int,
    inputs: Mapping[str, Any],
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """LDS on held-out training labels by number of training labels; written to `path` as JSON.

    Every count is trained with `seeds` orders of the subsets and seeds of training, each from the
    encoder that `make_encoder` gives. What one training shows is written at once, so a killed run
    goes on from there; other counts and more seeds are added to those that are there. `inputs`
    say what the encoder, labels and settings are. Under several processes all must call it.
    Raises InputError for seeds below 1, and where the file is of other inputs.
    """
    if seeds < 1:
        raise InputError(f"seeds is {seeds}; give at least 1.")
    accelerator = Accelerator() if accelerator is None else accelerator
    trained = _known(path, inputs)
    missing = [
        (count, seed)
        for count in counts
        for seed in range(seeds)
        if not any((one["labels"], one["seed"]) == (count, seed) for one in trained)
    ]
    found = _summary(inputs, trained)
    show = settings.show_progress and accelerator.is_main_process
    for count, seed in tqdm(missing, desc="encoders", disable=not show):
        trained.append(_train(make_encoder(), data, settings, count, seed, draws, accelerator))
        found = _summary(inputs, trained)
        if accelerator.is_main_process:
            write_json_atomic(path, found)
    return found


def read_curve(path: Path) -> dict[str, Any] | None:
    """What `learning_curve` wrote, None when there is none; InputError for another file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(point.keys() >= POINT_KEYS for point in found["points"]) and found["trained"]:
            return found
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path} is not a learning curve; delete it and run `airrep learning-curve`.")


def describe_curve(found: Mapping[str, Any]) -> list[str]:
    """A line a point, for the terminal."""
    return [
        f"{point['labels']:6,} labels: LDS {point['lds']:.3f} ({point['ci95'][0]:.3f} to "
        f"{point['ci95'][1]:.3f}) on held-out training labels; by seed "
        + ", ".join(f"{lds:.3f}" for lds in point["by_seed"])
        for point in found["points"]
    ]


def _is_enough(data: CurveLabels, settings: TrainSettings, count: int) -> bool:
    try:
        hold_out(data.part(count, 0)[1], settings)
    except InputError:
        return False
    return True


def _train(
    encoder: AirRepEncoder,
    data: CurveLabels,
    settings: TrainSettings,
    count: int,
    seed: int,
    draws: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Trains one encoder and judges it."""
    own = replace(settings, seed=settings.seed + seed, wandb="disabled", show_progress=False)
    targets, labels = data.part(count, own.seed)
    result = train_encoder(encoder, data.pool, targets, labels, own, None, accelerator)
    judged, held_out = data.judged()
    attributor = AirRepAttributor(result.encoder).fit(data.pool)
    scores, losses = attributor.score_subsets(judged, held_out.subsets), held_out.losses
    # One seed for all: points and seeds share the resamples, so their differences mean something.
    resamples = Resamples.draw(losses.shape, draws, np.random.default_rng(settings.seed))
    drawn = resampled_lds([scores], losses, resamples)["both"][0]
    return {
        "labels": count,
        "seed": seed,
        "lds": float(lds_per_target(scores, losses)[0].mean()),
        "ci95": list(interval(drawn)),
        "best_step": result.best_step,
        "seconds": result.history[-1]["seconds"],
    }


def _summary(inputs: Mapping[str, Any], trained: list[dict[str, Any]]) -> dict[str, Any]:
    """Points, and the ends of their intervals, are means over seeds; that is on the safe side."""
    trained = sorted(trained, key=lambda one: (one["labels"], one["seed"]))
    points = []
    for labels, same in groupby(trained, key=lambda one: one["labels"]):
        own = list(same)
        points.append(
            {
                "labels": labels,
                "lds": float(np.mean([one["lds"] for one in own])),
                "ci95": np.mean([one["ci95"] for one in own], axis=0).tolist(),
                "by_seed": [one["lds"] for one in own],
            }
        )
    return {
        "points": points,
        "trained": trained,
        "inputs": dict(inputs),
        "versions": installed_versions(),
        "git_revision": git_revision(),
    }


def _known(path: Path, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trainings that the file holds; raises InputError where they are of other inputs."""
    found = read_curve(path)
    if found is None:
        return []
    wanted = json.loads(json.dumps(dict(inputs)))
    if found.get("inputs") != wanted:
        raise InputError(
            f"{path} is of other labels, settings or another encoder; delete it to train anew."
        )
    return found["trained"]
