"""What a target's loss depends on: how alike the labels of two targets are.

    airrep labels --config configs/minimix.yaml
    python benchmarks/label_structure.py --run out/minimix

Two targets are alike where the same training subsets lower the losses of both: the correlation of
their training labels over subsets, mean over pairs of targets, by whether the pair shares task and
response. Noise lowers every figure alike. Test labels are not read.
"""

from argparse import ArgumentParser
from pathlib import Path

import numpy as np

from airrep.objectives import standardise_labels
from airrep.run_folder import RunFolder


def main() -> None:
    """Prints the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder with its labels")
    folder = RunFolder(parser.parse_args().run)
    store = folder.open_labels("train")
    _, targets = folder.read_labelled("train", store)
    labels, kept = standardise_labels(store.read().losses)
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


if __name__ == "__main__":
    main()
