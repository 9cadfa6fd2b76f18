"""Retraining the language model on parts of the pool, paired: one seed, one order for all.

A loss depends on (seed, part of the pool) alone, not on its place in a plan. So losses that one
plan has are taken over by the next, and two models of one seed differ by their examples only.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from airrep.config import RunConfig
from airrep.examples import Example, fingerprint_examples
from airrep.label_store import LabelStore, fingerprint_plan
from airrep.weights import fingerprint_weights, resolve_model
from data_builders.finetune import FineTuner
from data_builders.labels import parse_shard
from data_builders.recipes import Recipe, batches


@dataclass(frozen=True)
class Retraining:
    """Models to train on subsets of a base of pool rows, each with `seeds` seeds.

    With `keep_steps`, a row is seen in the step in which the model of the whole base sees it, and
    rows that are left out leave a gap: for removing a few. Without, steps are full: for small
    parts of the base. `losses` is the store (targets, subsets); `matches`, where it is wanted,
    holds 1 where greedy decoding gives the response and 0 elsewhere.
    """

    base: np.ndarray
    seeds: int
    keep_steps: bool
    losses: LabelStore
    matches: LabelStore | None = None

    @property
    def stores(self) -> list[LabelStore]:
        return [self.losses] if self.matches is None else [self.losses, self.matches]

    def missing(self) -> list[tuple[int, int]]:
        """(repeat, number) of every model not trained yet; each repeat is a seed."""
        return [
            (repeat, number)
            for repeat in range(self.seeds)
            for number in sorted({n for store in self.stores for n in store.missing(repeat)})
        ]

    def steps(self, number: int, repeat: int, recipe: Recipe, seed: int) -> list[np.ndarray]:
        """The pool rows of every training step of a model."""
        subset = self.losses.subsets[number]
        generator = np.random.default_rng([seed, repeat])
        if not self.keep_steps:
            return batches(subset, recipe, generator)
        steps = (rows[np.isin(rows, subset)] for rows in batches(self.base, recipe, generator))
        return [rows for rows in steps if len(rows)]

    def read(self, store: LabelStore) -> np.ndarray:
        """Values (seeds, targets, subsets) of a store that is complete."""
        return np.stack([store.read(repeat).losses for repeat in range(self.seeds)])


def open_retraining(
    config: RunConfig,
    name: str,
    pool: Sequence[Example],
    targets: Sequence[Example],
    subsets: Sequence[np.ndarray],
    seeds: int,
    *,
    keep_steps: bool,
    exact_match: bool,
) -> Retraining:
    """Makes or opens the stores of a plan, whose first subset is the base.

    They are folders `interventions/NAME-<hash of the plan>` in the run's folder. Models that
    another plan there has trained are not trained again.
    """
    base = np.asarray(subsets[0])
    fingerprint = {
        "examples": fingerprint_examples(pool),
        "targets": fingerprint_examples(targets),
        "lm": fingerprint_weights(resolve_model(config.lm)),
        "recipe": config.recipe.fingerprint(),
        "seed": _sha256(str(config.seed)),
        "order": _sha256(f"{keep_steps} {base.tolist()}"),
    }
    about = {
        "examples": f"{len(pool)} examples",
        "targets": f"{len(targets)} test targets",
        "plan": f"{len(subsets)} parts of the pool",
        "lm": config.lm,
        "recipe": config.recipe.relevant(),
        "seed": config.seed,
        "order": "of the whole base" if keep_steps else "of each part",
    }

    def store(values: str) -> LabelStore:
        wanted = fingerprint | {"values": _sha256(values)}
        digest = _sha256(str(sorted(wanted.items())) + fingerprint_plan(subsets))
        path = Path(config.output) / "interventions" / f"{name}-{digest[:12]}"
        made = LabelStore.create(path, wanted, subsets, len(targets), about | {"values": values})
        _take_over(made, seeds)
        return made

    matches = store("exact match") if exact_match else None
    return Retraining(base, seeds, keep_steps, store("loss"), matches)


def retrain(
    job: Retraining,
    tuner: Callable[[], FineTuner],
    seed: int,
    shard: str = "1/1",
    first_only: bool = False,
    show_progress: bool = True,
) -> int:
    """Trains the models that are missing and returns how many it trained.

    Says after the first ones how long the rest will take; with `first_only` it stops there.
    `shard` "i/n" trains a share, as `make_labels` does; any number of workers and any
    interruption end in the same stores. Raises InputError when losses are not finite; what was
    stored before stays.
    """
    part, parts = parse_shard(shard)
    mine = [(r, n) for r, n in job.missing() if (r + n) % parts == part - 1]
    if not mine:
        return 0
    fine_tuner = tuner()
    for note in fine_tuner.notes:
        print(note)
    # Weights of several models are there at once only while they train: matches need them.
    size = 1 if job.matches is not None else fine_tuner.most_models
    made = 0
    with tqdm(total=len(mine), desc="models", unit="model", disable=not show_progress) as bar:
        for repeat, numbers in _groups(mine, size):
            started = time.perf_counter()
            _make(job, fine_tuner, numbers, repeat, seed)
            if made == 0:
                each = (time.perf_counter() - started) / len(numbers)
                left = len(mine) - len(numbers)
                tqdm.write(f"{each:.1f} s a model: about {each * left:,.0f} s for {left} more")
            made += len(numbers)
            bar.update(len(numbers))
            if first_only:
                break
    return made


def _make(
    job: Retraining, tuner: FineTuner, numbers: Sequence[int], repeat: int, seed: int
) -> None:
    targets = np.arange(job.losses.target_count)
    plans = [job.steps(number, repeat, tuner.recipe, seed) for number in numbers]
    losses = tuner.losses_after(plans, targets)
    if job.matches is not None:
        job.matches.write(numbers[0], tuner.exact_matches(targets), repeat)
    for number, row in zip(numbers, losses, strict=True):
        job.losses.write(number, row, repeat)


def _groups(models: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, list[int]]]:
    """The numbers of each repeat, up to `size` together."""
    for repeat, own in groupby(models, key=lambda model: model[0]):
        numbers = [number for _, number in own]
        for start in range(0, len(numbers), size):
            yield repeat, numbers[start : start + size]


def _take_over(store: LabelStore, seeds: int) -> None:
    """Copies the labels of the same subsets from stores beside this one."""
    numbers = {subset.tobytes(): number for number, subset in enumerate(store.subsets)}
    for path in sorted(store.path.parent.glob("*/manifest.json")):
        other = LabelStore.open(path.parent)
        if path.parent == store.path or _without_plan(other) != _without_plan(store):
            continue
        for repeat in range(seeds):
            missing, labels = set(store.missing(repeat)), other.read(repeat)
            for subset, losses in zip(labels.subsets, labels.losses.T, strict=True):
                number = numbers.get(subset.tobytes())
                if number in missing:
                    store.write(number, losses, repeat)


def _without_plan(store: LabelStore) -> dict[str, Any]:
    return {name: value for name, value in store.fingerprint.items() if name != "plan"}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
