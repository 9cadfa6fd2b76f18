"""Trains the planted task in a process of its own: to be killed, or to be one of several.

Usage: train_in_process.py BASE OUTPUT THREADS KILLED_AT TRAINABLE_LAYERS DROPOUT
At checkpoint number KILLED_AT (0: never) the process kills itself in the middle of writing it.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from training_task import planted_examples, planted_labels

from airrep import checkpoint
from airrep.encoder import AirRepEncoder
from airrep.train_settings import TrainSettings
from airrep.trainer import TrainResult, train_encoder


def settings_of(trainable_layers: int | None, dropout: bool) -> TrainSettings:
    return TrainSettings(
        learning_rate=2e-3,
        warmup_steps=2,
        max_steps=8,
        targets_per_step=9,
        subsets_per_step=12,
        trainable_layers=trainable_layers,
        dropout=dropout,
        chunk_tokens=100,
        max_graph_tokens=400,
        average=0.8,
        checkpoint_every=2,
        show_progress=False,
    )


def train(base: Path, output: Path | None, settings: TrainSettings) -> TrainResult:
    pool, targets = planted_examples(24, seed=1), planted_examples(16, seed=2)
    labels = planted_labels(pool, targets, subsets=20, size=6)
    encoder = AirRepEncoder.from_base(base)
    return train_encoder(encoder, pool, targets, labels, settings, output)


def kill_in_write(number: int) -> None:
    """The write of checkpoint `number` ends half-way, with SIGKILL."""
    write = checkpoint.save_file
    calls: list[int] = []

    def save_file(tensors: dict[str, Any], path: Path) -> None:
        write(tensors, path)
        calls.append(1)
        if len(calls) == number:
            os.truncate(path, 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_file


def main(base: str, output: str, threads: str, killed_at: str, layers: str, dropout: str) -> None:
    torch.set_num_threads(int(threads))
    if int(killed_at):
        kill_in_write(int(killed_at))
    trained = None if layers == "all" else int(layers)
    train(Path(base), Path(output), settings_of(trained, dropout == "dropout"))


if __name__ == "__main__":
    main(*sys.argv[1:])
