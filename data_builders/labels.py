"""Making labels: fine-tune the language model on every subset, record every target's loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from airrep.examples import InputError
from airrep.label_store import LabelStore
from data_builders.finetune import FineTuner


@dataclass(frozen=True)
class LabelJob:
    """Labels wanted in one store: its targets' rows among the tuner's, and how many repeats.

    Repeat r > 0 trains the first `repeats` subsets of the plan again with another seed.
    """

    store: LabelStore
    target_rows: np.ndarray
    repeats: int = 0

    def missing(self) -> list[tuple[int, int]]:
        """(number, repeat) of every label that does not exist yet, in plan order."""
        again = [number for number in self.store.missing(repeat=1) if number < self.repeats]
        return [(n, 0) for n in self.store.missing(repeat=0)] + [(n, 1) for n in again]


def make_labels(
    jobs: Sequence[LabelJob],
    tuner: Callable[[], FineTuner],
    seed: int,
    shard: str = "1/1",
    show_progress: bool = True,
) -> int:
    """Makes the labels that are missing and returns how many it made.

    `tuner` is called once, and only when a label is missing: loading the model is the slow part
    of a run that has nothing to do. A label depends on (seed, subset number, repeat) besides the
    model, the recipe and the data, so any order, any number of workers and any interruption end
    in the same store. `shard` "i/n" makes every n-th missing label, from the i-th. Raises
    InputError when losses are not finite; the labels made before stay.
    """
    wanted = [(job, *label) for job in jobs for label in job.missing()]
    part, parts = parse_shard(shard)
    mine = [
        (job, number, repeat)
        for job, number, repeat in wanted
        # By the number, not by the place in what is missing: workers that start at different
        # times must agree on whose label it is.
        if (number + repeat) % parts == part - 1
    ]
    if not mine:
        return 0
    fine_tuner = tuner()
    made = 0
    with tqdm(total=len(mine), desc="labels", unit="label", disable=not show_progress) as bar:
        for job, number, repeat in mine:
            generator = np.random.default_rng([seed, number, repeat])
            losses = fine_tuner.losses(job.store.subsets[number], job.target_rows, generator)
            job.store.write(number, losses, repeat)
            made += 1
            bar.update()
    return made


def parse_shard(shard: str) -> tuple[int, int]:
    """(i, n) of "i/n", i from 1 to n; raises InputError otherwise."""
    first, slash, second = shard.partition("/")
    if slash and first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise InputError(f'shard is {shard!r}; give "i/n" with i from 1 to n, such as "2/4".')
