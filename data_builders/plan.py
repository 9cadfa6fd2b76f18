"""What labels will cost, from a probe of about a minute on the machine that is to make them."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from airrep.device import peak_memory
from airrep.examples import TokenizedExample
from data_builders.finetune import FineTuner

PROBE_TARGETS = 128
BYTES_PER_LOSS = 4
MEMORY_SHARE = 0.9  # beyond it a run is likely to end for want of memory

# Builds the tuner of some pool examples and targets, loading the model anew.
MakeTuner = Callable[[Sequence[TokenizedExample], Sequence[TokenizedExample]], FineTuner]


@dataclass(frozen=True)
class LabelPlan:
    """The predicted costs of making labels on one machine like this one.

    `setup_seconds` pass before the first label (loading, frozen layers); `label_seconds` are
    those of all labels after it: fine-tuning, then measuring every target. `memory_bytes` is the
    largest use of the device that trains (on a CPU, of the process), out of
    `memory_limit_bytes`; `disk_bytes` the size of all losses.
    """

    labels: int
    engine: str
    models: int
    setup_seconds: float
    label_seconds: float
    memory_bytes: int
    memory_limit_bytes: int
    disk_bytes: int
    notes: tuple[str, ...]

    @property
    def seconds_per_label(self) -> float:
        return self.label_seconds / max(1, self.labels)

    @property
    def hours(self) -> float:
        return (self.setup_seconds + self.label_seconds) / 3600

    def describe(self, price: float | None = None, hours: float | None = None) -> str:
        """The plan in words; `price` is that of an hour of the machine, `hours` a budget."""

        def cost(taken: float) -> str:
            return "" if price is None else f", {price * taken:.2f} at {price:g} an hour"

        gib = 2**30
        lines = [
            *self.notes,
            f"engine {self.engine}, {_count(self.models, 'model')} at once: "
            f"{self.seconds_per_label:.3g} s a label",
            f"{_count(self.labels, 'label')}: {self.hours:.3g} hours of one such machine"
            f"{cost(self.hours)}; {self.setup_seconds:.0f} s of that before the first",
            f"memory: {self.memory_bytes / gib:.1f} of {self.memory_limit_bytes / gib:.1f} GiB; "
            f"disk: {self.disk_bytes / 2**20:.1f} MiB",
        ]
        if hours is not None:
            bought = _count(self.labels_within(hours), "label")
            lines.append(f"{hours:g} hours buy {bought}{cost(hours)}")
        if self.memory_bytes > MEMORY_SHARE * self.memory_limit_bytes:
            lines.append(
                "Memory may run out: lower recipe.batch_size or recipe.max_length, train fewer "
                "weights, or take fewer examples."
            )
        return "\n".join(lines)

    def labels_within(self, hours: float) -> int:
        """How many labels so many hours of one such machine buy."""
        return max(0, int((3600 * hours - self.setup_seconds) / self.seconds_per_label))


def plan_labels(
    make_tuner: MakeTuner,
    pool: Sequence[TokenizedExample],
    targets: Sequence[Sequence[TokenizedExample]],
    subset: np.ndarray,
    labels: Sequence[int],
    loading_seconds: float = 0.0,
    seed: int = 0,
) -> LabelPlan:
    """Trains twice on a subset of pool rows, measures a sample of targets, scales up by tokens.

    `targets` and `labels` (how many are wanted) have one entry a label store. The first training
    pays for first use and is not counted.
    """
    every = [target for store in targets for target in store]
    chosen = np.random.default_rng(seed).permutation(len(every))[:PROBE_TARGETS]
    sample = [every[row] for row in chosen]
    examples = [pool[row] for row in subset]
    start = time.perf_counter()
    tuner = make_tuner(examples, sample)
    setup = time.perf_counter() - start
    share = _tokens([*pool, *every]) / _tokens([*examples, *sample])
    rows, measured = np.arange(len(examples)), np.arange(len(sample))

    def train() -> None:
        generators = [np.random.default_rng([seed, n]) for n in range(tuner.most_models)]
        tuner.losses_of([rows] * tuner.most_models, measured, generators)

    train()
    models = tuner.most_models  # fewer now than asked for if memory ran out
    whole, measuring = _seconds(train), _seconds(lambda: tuner.measure(measured))
    training = max(whole - measuring, 0.0) / models
    per_token = measuring / models / _tokens(sample)
    stored = 0 if tuner.trunk is None else tuner.trunk.activations.nbytes
    return LabelPlan(
        labels=sum(labels),
        engine=tuner.engine,
        models=models,
        setup_seconds=loading_seconds + setup * (share if stored else 1),
        label_seconds=sum(
            count * (training + per_token * _tokens(store))
            for count, store in zip(labels, targets, strict=True)
        ),
        memory_bytes=int(peak_memory(tuner.device) + stored * (share - 1)),
        memory_limit_bytes=_memory_limit(tuner.device),
        disk_bytes=BYTES_PER_LOSS
        * sum(map(math.prod, zip(labels, map(len, targets), strict=True))),
        notes=tuple(tuner.notes),
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _tokens(examples: Sequence[TokenizedExample]) -> int:
    return sum(len(example) for example in examples)


def _seconds(work: Callable[[], object]) -> float:
    """Wall time of work that ends in numbers on the CPU, so that nothing is still under way."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _memory_limit(device: torch.device) -> int:
    """Bytes there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
