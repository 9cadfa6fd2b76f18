"""How much sooner our training is as good as the published way of training on the same labels.

    airrep labels --config configs/demo.yaml
    python -m benchmarks.published_trainer --config configs/demo.yaml --train.max_steps 60
    python -m benchmarks.published_trainer --config configs/minimix.yaml \
        --train.mixed_precision bf16 --train.max_steps 60     # wants a GPU

Trains the encoder of a configuration twice on a run's training labels, with the same labels held
out. The published way (arXiv 2505.18513) takes 32 subsets a step, encodes the examples of each one
for itself, ranks subsets in pairs and reads the text alone, at a learning rate of 1e-4; chunks,
gradient caching and precision are ours in both, so its steps are likely faster here than its own
code's. Prints, for each, seconds and steps until the held-out LDS that is the published way's
best, and what a step costs. Test labels are not read. Seconds include an evaluation every
`--train.evaluate_every` steps; preparation is not counted (frozen layers, and two passes that
give our scores their scale). Other runs' labels and a teacher are left aside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser

from airrep.config import RunConfig
from airrep.device import pick_device
from airrep.encoder import AirRepEncoder
from airrep.pooling import Membership, membership
from airrep.run_folder import RunFolder
from airrep.train_run import TrainRun
from airrep.train_settings import check_settings
from airrep.trainer import Trainer
from airrep.weights import resolve_model

PUBLISHED = {
    "objective": "pairwise_ranking",
    "response_words": False,
    "start_scale": None,
    "scale_learning_rate": None,
    "subsets_per_step": 32,
    "learning_rate": 1e-4,
}


class PublishedTrainer(Trainer):
    """Encodes an example once for every drawn subset that it is in."""

    def _encoded(self, subsets: Sequence[np.ndarray]) -> tuple[np.ndarray, Membership]:
        bounds = np.cumsum([0, *map(len, subsets)])
        own = [np.arange(*pair) for pair in pairwise(bounds)]
        return np.concatenate(subsets), membership(own, int(bounds[-1]))


def main() -> None:
    """Trains both, and prints the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig)
    values = vars(parser.instantiate(parser.parse_args()))
    values.pop("config")
    config = RunConfig(**values)
    if config.train.evaluate_every < 2:
        parser.error("train.evaluate_every is 1; give 2 or more, so that steps can be timed")
    if config.train.validation_subsets == 0:
        parser.error(
            "train.validation_subsets is 0; hold some out, or nothing tells how good it is"
        )
    histories = {
        "published way": train(config, PublishedTrainer, PUBLISHED),
        "ours": train(config, Trainer, {}),
    }
    level = max(judged(entry) for entry in histories["published way"])
    print(f"\nHeld-out LDS {level:.3f}, the published way's best, on {pick_device(config.device)}")
    print("| training | s to it | steps to it | s a step | examples/s | best LDS | GiB (GPU) |")
    print("|---|---|---|---|---|---|---|")
    for name, history in histories.items():
        show(name, history, level)


def train(config: RunConfig, kind: type[Trainer], changes: Mapping[str, Any]) -> list[dict]:
    """The history of one training."""
    folder = RunFolder(Path(config.output))
    store = folder.open_labels("train")
    settings = replace(config.train, **{"checkpoint_every": 0, "wandb": "disabled", **changes})
    check_settings(settings)
    accelerator = Accelerator(cpu=pick_device(config.device) == "cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    encoder = AirRepEncoder.from_base(resolve_model(config.encoder))
    data = folder.read_labelled("train", store)
    trainer = kind(encoder, *data, store.read(), settings, TrainRun(None, {}), accelerator, None)
    return trainer.train().history


def judged(entry: Mapping[str, Any]) -> float:
    """The held-out LDS of a step; below all others where it was not taken."""
    return -2.0 if entry["validation_lds"] is None else float(entry["validation_lds"])


def show(name: str, history: Sequence[Mapping[str, Any]], level: float) -> None:
    """A row of the table."""
    first = next((entry for entry in history if judged(entry) >= level), None)
    reached = ("never", "never") if first is None else (f"{first['seconds']:.1f}", first["step"])
    # Between two evaluations, where a step's time is all that passes.
    seconds = float(
        np.median(
            [
                after["seconds"] - before["seconds"]
                for before, after in pairwise(history)
                if after["validation_lds"] is None
            ]
        )
    )
    # A process's own peak would be that of both trainings.
    memory = f"{history[-1]['peak_memory_gib']:.1f}" if torch.cuda.is_available() else "–"
    rate = float(np.median([one["examples_per_second"] for one in history[1:]]))
    print(
        f"| {name} | {reached[0]} | {reached[1]} | {seconds:.2f} | {rate:.0f} "
        f"| {max(map(judged, history)):.3f} | {memory} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
