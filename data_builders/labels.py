"""Making labels: fine-tune the language model on every subset, record every target's loss."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from tqdm import tqdm

from airrep.examples import InputError
from airrep.label_mirror import LabelMirror
from airrep.label_store import LabelStore, NotFiniteError
from data_builders.finetune import FineTuner

ATTEMPTS = 2  # trainings of one subset before its label is given up
HOPELESS = 3  # labels lost, and none made, before the rest is not tried


@dataclass(frozen=True)
class LabelJob:
    """Labels wanted in one store: its targets' rows among the tuner's, and how many repeats.

    Repeat r > 0 trains the first `repeats` subsets of the plan again with another seed. Every
    label goes to the `mirror` as well, where there is one.
    """

    store: LabelStore
    target_rows: np.ndarray
    repeats: int = 0
    mirror: LabelMirror | None = None

    def missing(self) -> list[tuple[int, int]]:
        """(number, repeat) of every label that does not exist yet, in plan order."""
        again = [number for number in self.store.missing(repeat=1) if number < self.repeats]
        return [(n, 0) for n in self.store.missing(repeat=0)] + [(n, 1) for n in again]


@dataclass(frozen=True)
class TrainedLabel:
    """Losses (targets,), how many trainings had diverged before, and the seconds of all of them.

    Seconds are the label's share of its group's; loading the model, and running its frozen layers
    once, is not in them.
    """

    losses: np.ndarray
    attempt: int
    seconds: float


@dataclass(frozen=True)
class Group:
    """Labels of one job that are trained together: (number, repeat), and the subset of each."""

    labels: Sequence[tuple[int, int]]
    subsets: Sequence[np.ndarray]
    target_rows: np.ndarray

    def train(self, tuner: FineTuner, seed: int) -> list[TrainedLabel]:
        """The labels; losses that are not finite after `ATTEMPTS` trainings stay as they are."""
        found: dict[int, tuple[np.ndarray, int]] = {}
        spent = np.zeros(len(self.labels))
        rows = list(range(len(self.labels)))
        for attempt in range(ATTEMPTS):
            if not rows:
                break
            # The first attempt's seed is as if there were no others.
            again = [attempt] if attempt else []
            started = time.perf_counter()
            losses = tuner.losses_of(
                [self.subsets[row] for row in rows],
                self.target_rows,
                [np.random.default_rng([seed, *self.labels[row], *again]) for row in rows],
            )
            spent[rows] += (time.perf_counter() - started) / len(rows)
            found |= {row: (own, attempt) for row, own in zip(rows, losses, strict=True)}
            rows = [row for row in rows if not np.isfinite(found[row][0]).all()]
        return [TrainedLabel(*found[row], float(spent[row])) for row in range(len(spent))]


# A group, whose it is, and what `Group.train` found.
TrainedGroup = tuple[LabelJob, Group, list[TrainedLabel]]


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
    wanted = missing_labels(jobs, shard)
    if not wanted:
        return 0
    fine_tuner = tuner()
    for note in fine_tuner.notes:
        print(note)
    trained = (
        (job, group, group.train(fine_tuner, seed))
        for job, group in groups(wanted, fine_tuner.most_models)
    )
    return store_labels(trained, len(wanted), show_progress)


def missing_labels(jobs: Sequence[LabelJob], shard: str = "1/1") -> list[tuple[LabelJob, int, int]]:
    """(job, number, repeat) of every label of the shard that does not exist yet, in plan order.

    Raises InputError for an impossible shard.
    """
    part, parts = parse_shard(shard)
    return [
        (job, number, repeat)
        for job in jobs
        for number, repeat in job.missing()
        # By the number, not by the place in what is missing: workers that start at different
        # times must agree on whose label it is.
        if (number + repeat) % parts == part - 1
    ]


def groups(
    labels: Sequence[tuple[LabelJob, int, int]], size: int
) -> Iterator[tuple[LabelJob, Group]]:
    """The labels of each job, up to `size` together."""
    for job, own in groupby(labels, key=lambda label: label[0]):
        numbers = [(number, repeat) for _, number, repeat in own]
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            subsets = [job.store.subsets[number] for number, _ in part]
            yield job, Group(part, subsets, job.target_rows)


def store_labels(trained: Iterable[TrainedGroup], count: int, show_progress: bool) -> int:
    """Stores `count` labels as they come, in any order; returns `count`.

    Raises InputError that names the subsets that diverged, after the others are stored; at once
    when the first `HOPELESS` all did.
    """
    lost: list[InputError] = []
    tried = 0
    with tqdm(total=count, desc="labels", unit="label", disable=not show_progress) as bar:
        for job, group, found in trained:
            for (number, repeat), made in zip(group.labels, found, strict=True):
                try:
                    job.store.write(number, made.losses, repeat, made.attempt, made.seconds)
                except NotFiniteError as error:
                    lost.append(error)
                else:
                    if job.mirror is not None:
                        job.mirror.put(number, repeat)
            tried += len(found)
            bar.update(len(found))
            if len(lost) == tried >= HOPELESS:
                break
    if lost:
        raise InputError(
            f"{len(lost)} of {count} labels are missing: training diverged, twice. {lost[0]}"
        )
    return count


def parse_shard(shard: str) -> tuple[int, int]:
    """(i, n) of "i/n", i from 1 to n; raises InputError otherwise."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    raise InputError(f'shard is {shard!r}; give "i/n" with i from 1 to n, such as "2/4".')
