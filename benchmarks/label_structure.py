"""What a target's loss depends on: how alike labels are, and what of a subset tells them.

    airrep labels --config configs/minimix.yaml
    python benchmarks/label_structure.py --run out/minimix

Two targets are alike where the same training subsets lower the losses of both: the correlation of
their training labels over subsets, mean over pairs of targets, by whether the pair shares task and
response. Noise lowers every figure alike.

Then, for answers that several targets of a task share, how well the mean of those targets' labels
is told by counting a subset's examples: predicted by ridge regression in 6 folds, rank correlation
inside each fold, mean over folds and answers. Test labels are not read.
"""

from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from airrep.examples import Example
from airrep.objectives import standardise_labels
from airrep.run_folder import RunFolder

SHARING = 4  # targets of a task with one response, from which on their mean label is told
RIDGE = 20.0  # of standardised counts
ANSWERS = 6  # other responses of a task that are counted, the most frequent ones


def main() -> None:
    """Prints the tables."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder with its labels")
    folder = RunFolder(parser.parse_args().run)
    store = folder.open_labels("train")
    pool, targets = folder.read_labelled("train", store)
    read = store.read()
    labels, kept = standardise_labels(read.losses)
    labels, targets = labels[kept], [targets[row] for row in np.flatnonzero(kept)]
    present = np.isfinite(labels).astype(np.float32)
    labels = np.nan_to_num(labels)
    alike = (labels @ labels.T) / np.maximum(present @ present.T, 1)
    tasks = np.asarray([str(target.task) for target in targets])
    responses = np.asarray([target.response.strip() for target in targets])
    same_task, same_response = tasks[:, None] == tasks, responses[:, None] == responses
    others = ~np.eye(len(targets), dtype=bool)
    print(f"{len(targets)} targets of {len(set(tasks))} tasks, {labels.shape[1]} subsets\n")
    print("| pairs of targets | correlation of their labels | pairs |\n|---|---|---|")
    for name, pairs in {
        "same task, same response": same_task & same_response,
        "same task, another response": same_task & ~same_response,
        "another task, same response": ~same_task & same_response,
        "another task, another response": ~same_task & ~same_response,
    }.items():
        chosen = pairs & others
        mean = f"{alike[chosen].mean():.2f}" if chosen.any() else "–"
        print(f"| {name} | {mean} | {chosen.sum() // 2:,} |")
    show_counts(pool, targets, read.subsets, labels)


def show_counts(
    pool: Sequence[Example],
    targets: Sequence[Example],
    subsets: Sequence[np.ndarray],
    labels: np.ndarray,
) -> None:
    """Prints how well counts tell the labels of answers that targets share."""
    groups = defaultdict(list)
    for row, target in enumerate(targets):
        groups[str(target.task), target.response.strip()].append(row)
    shared = {answer: rows for answer, rows in groups.items() if len(rows) >= SHARING}
    tasks = np.asarray([str(example.task) for example in pool])
    responses = np.asarray([example.response.strip() for example in pool])
    model = make_pipeline(StandardScaler(), Ridge(RIDGE))
    folds = list(KFold(6, shuffle=True, random_state=0).split(subsets))
    told = defaultdict(list)
    for (task, response), rows in shared.items():
        same_task, same_response = tasks == task, responses == response
        kinds, counts = np.unique(responses[same_task & ~same_response], return_counts=True)
        frequent = kinds[np.argsort(-counts, kind="stable")][:ANSWERS]
        masks = {
            "the same answer": [same_task & same_response],
            "and the task's other answers": [
                *(same_task & (responses == other) for other in frequent),
                same_task,
            ],
            "and the same answer in other tasks": [same_response & ~same_task],
            "and the other answers there": [
                (responses == other) & ~same_task for other in frequent
            ],
        }
        wanted, columns = labels[rows].mean(axis=0), []
        for name, added in masks.items():
            columns += [[mask[subset].sum() for subset in subsets] for mask in added]
            found = cross_val_predict(model, np.transpose(columns), wanted, cv=folds)
            # In each fold apart: what a fold is predicted holds the mean of all others.
            told[name].append(
                np.mean([spearmanr(found[fold], wanted[fold]).statistic for _, fold in folds])
            )
    print(f"\n{len(shared)} answers, of {sum(map(len, shared.values()))} targets\n")
    print("| examples of a subset that are counted | rank correlation with the label |\n|---|---|")
    for name, found in told.items():
        print(f"| {name} | {np.mean(found):.2f} |")


if __name__ == "__main__":
    main()
