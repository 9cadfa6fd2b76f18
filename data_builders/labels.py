"""Making labels: fine-tune the language model on every subset, record every target's loss."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from tqdm import tqdm

from airrep.examples import InputError
from airrep.label_store import LabelStore, NotFiniteError
from data_builders.finetune import FineTuner

ATTEMPTS = 2  # trainings of one subset before its label is given up
HOPELESS = 3  # labels lost, and none made, before the rest is not tried


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
    in the same store. `shard` "i/n" makes every n-th missing label, from the i-th. A subset whose
    losses are not finite is trained once more in another order, which the store records; all
    others are made before InputError names those that diverged again.
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
    for note in fine_tuner.notes:
        print(note)
    lost: list[InputError] = []
    tried = 0
    with tqdm(total=len(mine), desc="labels", unit="label", disable=not show_progress) as bar:
        for job, labels in _groups(mine, fine_tuner.most_models):
            lost += _make_group(fine_tuner, job, labels, seed)
            tried += len(labels)
            bar.update(len(labels))
            if len(lost) == tried >= HOPELESS:
                break
    if lost:
        raise InputError(
            f"{len(lost)} of {len(mine)} labels are missing: training diverged, twice. {lost[0]}"
        )
    return len(mine)


def _make_group(
    tuner: FineTuner, job: LabelJob, labels: Sequence[tuple[int, int]], seed: int
) -> list[InputError]:
    """Makes and stores the labels (number, repeat); returns what is wrong with the lost ones."""
    lost: list[InputError] = []
    for attempt in range(ATTEMPTS):
        if not labels:
            break
        # The first attempt's seed is as if there were no others.
        again = [attempt] if attempt else []
        found = tuner.losses_of(
            [job.store.subsets[number] for number, _ in labels],
            job.target_rows,
            [np.random.default_rng([seed, *label, *again]) for label in labels],
        )
        diverged = []
        for (number, repeat), losses in zip(labels, found, strict=True):
            if attempt + 1 < ATTEMPTS and not np.isfinite(losses).all():
                diverged.append((number, repeat))
                continue
            try:
                job.store.write(number, losses, repeat, attempt)
            except NotFiniteError as error:
                lost.append(error)
        labels = diverged
    return lost


def _groups(
    labels: Sequence[tuple[LabelJob, int, int]], size: int
) -> Iterator[tuple[LabelJob, list[tuple[int, int]]]]:
    """The labels of each job, up to `size` together."""
    for job, own in groupby(labels, key=lambda label: label[0]):
        numbers = [(number, repeat) for _, number, repeat in own]
        for start in range(0, len(numbers), size):
            yield job, numbers[start : start + size]


def parse_shard(shard: str) -> tuple[int, int]:
    """(i, n) of "i/n", i from 1 to n; raises InputError otherwise."""
    first, slash, second = shard.partition("/")
    if slash and first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise InputError(f'shard is {shard!r}; give "i/n" with i from 1 to n, such as "2/4".')
