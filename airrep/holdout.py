"""The split of labels: subsets and targets that train, and those that choose the best step."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from airrep.attributor import check_subsets
from airrep.examples import Example, InputError, fingerprint_examples
from airrep.label_store import Labels
from airrep.objectives import standardise_labels
from airrep.train_settings import TrainSettings

# Of held-out labels; see `is_little`.
LEAST_SUBSETS, LEAST_TARGETS = 8, 5
SPLIT = 1  # keeps the split's random numbers apart from those of the steps


@dataclass(frozen=True)
class Holdout:
    """Columns of labels.subsets and rows of targets, ascending; held-out ones never train."""

    train_subsets: np.ndarray
    held_subsets: np.ndarray
    train_targets: np.ndarray
    held_targets: np.ndarray


@dataclass(frozen=True)
class TrainingLabels:
    """What a method that learns from labels is given: the targets, their labels, and which of them
    `settings` hold out. As text it is its size and hash."""

    targets: Sequence[Example]
    labels: Labels
    settings: TrainSettings

    def __str__(self) -> str:
        held = (
            self.settings.seed,
            self.settings.validation_subsets,
            self.settings.validation_targets,
        )
        about = f"{held} {self.labels.fingerprint} {fingerprint_examples(self.targets)}"
        digest = hashlib.sha256(about.encode()).hexdigest()
        subsets = len(self.labels.subsets)
        return f"{len(self.targets)} targets x {subsets} subsets, {digest[:16]}"


def check_labels(
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    target_weights: np.ndarray | None,
) -> None:
    """Raises InputError unless pool, targets, labels and target weights fit together."""
    if labels.losses.shape != (len(targets), len(labels.subsets)):
        raise InputError(
            f"The labels hold losses of shape {labels.losses.shape} for {len(targets)} targets "
            f"and {len(labels.subsets)} subsets; give the targets they were made for."
        )
    check_subsets(labels.subsets, len(pool))
    if target_weights is None:
        return
    if target_weights.shape != (len(targets),) or not (target_weights >= 0).all():
        raise InputError(
            f"target_weights have shape {target_weights.shape} for {len(targets)} targets; give "
            "one number of at least 0 for each."
        )


def hold_out(labels: Labels, settings: TrainSettings) -> Holdout:
    """A seeded split; labels outside train_targets x train_subsets never reach the gradient.

    Raises InputError where too few subsets or targets are left on a side that is asked for.
    """
    rng = np.random.default_rng([settings.seed, SPLIT])
    target_count, subset_count = labels.losses.shape
    held_subsets, train_subsets = _part(rng, subset_count, settings.validation_subsets)
    held_targets, train_targets = _part(rng, target_count, settings.validation_targets)
    if len(train_subsets) < 2 or (settings.validation_subsets > 0 and len(held_subsets) < 2):
        raise InputError(
            f"{subset_count} labelled subsets leave {len(train_subsets)} for training and "
            f"{len(held_subsets)} held out; make more labels, so that each side has 2 or more, or "
            "set validation_subsets to 0."
        )
    if len(train_targets) < 1 or (settings.validation_targets > 0 and len(held_targets) < 1):
        raise InputError(
            f"{target_count} targets leave {len(train_targets)} for training and "
            f"{len(held_targets)} held out; give more targets, or set validation_targets to 0."
        )
    # Without held-out targets, the held-out subsets are judged on the training ones.
    judged = held_targets if len(held_targets) else train_targets
    return Holdout(train_subsets, held_subsets, train_targets, judged)


def held_out_labels(labels: Labels, settings: TrainSettings) -> tuple[np.ndarray, Labels]:
    """What training with these settings never takes a gradient of: rows of targets, and labels.

    To fit what is chosen after training: losses are (held-out targets, held-out subsets). Raises
    InputError where nothing is held out.
    """
    split = hold_out(labels, settings)
    if not len(split.held_subsets):
        raise InputError(
            "validation_subsets is 0, so no label is held out; give a share, such as 0.2."
        )
    columns = split.held_subsets
    return split.held_targets, Labels(
        [labels.subsets[column] for column in columns],
        labels.losses[np.ix_(split.held_targets, columns)],
        labels.numbers[columns],
    )


def is_little(subsets: int, targets: int) -> bool:
    """Whether so few held-out labels judge that chance chooses as much as quality does."""
    return subsets < LEAST_SUBSETS or targets < LEAST_TARGETS


def few_held_out(split: Holdout) -> str | None:
    """A sentence to warn with where the held-out labels are too few to choose a step by."""
    subsets, targets = len(split.held_subsets), len(split.held_targets)
    if subsets == 0 or not is_little(subsets, targets):
        return None
    return (
        f"The step is chosen on {subsets} held-out subsets and {targets} targets, which is little: "
        f"hold out at least {LEAST_SUBSETS} and {LEAST_TARGETS} (make more labels, or raise "
        "validation_subsets and validation_targets), or set validation_subsets to 0 to take the "
        "last step"
    )


def training_labels(labels: Labels, settings: TrainSettings) -> tuple[Holdout, np.ndarray, int]:
    """The split, the labels (train targets, train subsets), and how many targets were dropped.

    Mean and spread of a label are over training subsets alone, so that held-out losses reach
    nothing. Targets without spread are dropped from the training side.
    """
    split = hold_out(labels, settings)
    values, kept = standardise_labels(
        labels.losses[np.ix_(split.train_targets, split.train_subsets)]
    )
    if not kept.any():
        raise InputError(
            f"None of the {len(kept)} training targets has losses that vary over the subsets; "
            "check that fine-tuning changed the language model."
        )
    split = replace(split, train_targets=split.train_targets[kept])
    return split, values[kept], int((~kept).sum())


def more_labels(
    split: Holdout, labels: Labels, others: Sequence[Labels]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Subsets of `others`, and their labels (train targets, subsets): what may train beside ours.

    `others` are of the same targets, from other language models, recipes or seeds; each one's
    losses are standardised by themselves. A subset that is held out of `labels` is left out.
    """
    held = {_members(labels.subsets[column]) for column in split.held_subsets}
    subsets: list[np.ndarray] = []
    values = [np.empty((len(split.train_targets), 0), dtype=np.float32)]
    for other in others:
        columns = np.flatnonzero([_members(subset) not in held for subset in other.subsets])
        subsets += [other.subsets[column] for column in columns]
        values.append(standardise_labels(other.losses[np.ix_(split.train_targets, columns)])[0])
    return subsets, np.concatenate(values, axis=1)


def _members(subset: np.ndarray) -> bytes:
    return np.sort(np.asarray(subset, dtype=np.int64)).tobytes()


def _part(rng: np.random.Generator, count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(count)
    held = round(share * count)
    return np.sort(order[:held]), np.sort(order[held:])
