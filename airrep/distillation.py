"""Distillation: the encoder learns another method's scores before it sees any label.

The score of a pair costs no fine-tuning run, so a teacher that is slow to ask, such as a gradient
method, can label as many random subsets as are wanted, for as many targets. The encoder learns the
teacher's faults too, and the labels that come after may be too few to undo them: compare with
training from the untrained encoder by LDS on held-out labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from accelerate import Accelerator

from airrep.attributor import Attributor
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError
from airrep.holdout import hold_out
from airrep.label_store import Labels
from airrep.pooling import membership, pool_scores
from airrep.score_files import read_scores
from airrep.train_settings import DistilSettings, TrainSettings
from airrep.trainer import TrainResult, train_encoder

LESSON = 4  # keeps the random numbers of a lesson's targets apart from those of training
CLIP = 10.0  # standard deviations of a target's scores
EVALUATE_EVERY = 20  # steps
MOST_SCORES = 2**28  # that a teacher is asked for at once: 1 GiB


@dataclass(frozen=True)
class Lesson:
    """What a teacher is asked: the scores of `targets` for `pool`, which label `subsets` of it.

    The targets are the training targets of `target_rows`, then examples of the pool; `pool` is the
    whole pool's `pool_rows`, and subsets are of its rows. Targets whose labels training holds out
    are not among them, in the pool either, so that what is measured on those labels stays true of
    targets that nobody has seen.
    """

    targets: list[Example]
    pool: list[Example]
    target_rows: np.ndarray
    pool_rows: np.ndarray
    subsets: list[np.ndarray]

    @classmethod
    def choose(
        cls,
        pool: Sequence[Example],
        targets: Sequence[Example],
        labels: Labels,
        settings: TrainSettings,
        distil: DistilSettings,
    ) -> Self:
        """All training targets that `settings` do not hold out, others of the pool, and random
        subsets as large as those of the labels, but at most half of the lesson's pool."""
        own = hold_out(labels, settings).train_targets
        held = {_text(targets[row]) for row in np.setdiff1d(np.arange(len(targets)), own)}
        known = held | {_text(targets[row]) for row in own}
        rows = np.flatnonzero([_text(one) not in held for one in pool])
        others = rows[[_text(pool[row]) not in known for row in rows.tolist()]]
        rng = np.random.default_rng([settings.seed, LESSON])
        chosen = np.sort(others[rng.permutation(len(others))[: distil.pool_targets]])
        asked = [*(targets[row] for row in own), *(pool[row] for row in chosen.tolist())]
        rows = np.sort(rng.permutation(rows)[: distil.pool_examples])
        size = int(np.median([len(subset) for subset in labels.subsets]))
        size = max(1, min(size, len(rows) // 2))
        subsets = [
            np.sort(rng.choice(len(rows), size, replace=False)) for _ in range(distil.subsets)
        ]
        return cls(asked, [pool[row] for row in rows.tolist()], own, rows, subsets)

    def scores(self, teacher: Attributor) -> np.ndarray:
        """What a method that is fitted to the whole pool says: (targets, pool), float32."""
        size = max(1, MOST_SCORES // teacher.pool_size_)
        starts = range(0, len(self.targets), size)
        blocks = (teacher.score(self.targets[start : start + size]) for start in starts)
        return np.concatenate([block[:, self.pool_rows] for block in blocks])

    def labels(self, scores: np.ndarray) -> Labels:
        """The teacher's labels: a subset helps a target as much as its examples do, by `scores`
        (targets, pool), on average.

        A score that is further than `CLIP` standard deviations from its target's mean counts as
        one that is as far: a target that is itself in the pool is most of what it helps. Raises
        InputError for scores of another shape.
        """
        if scores.shape != (len(self.targets), len(self.pool)):
            raise InputError(
                f"The teacher's scores have shape {scores.shape} for {len(self.targets)} targets "
                f"and {len(self.pool)} pool examples; give a row a target and a column a pool "
                "example."
            )
        scores = np.asarray(scores, dtype=np.float32)
        mean, spread = scores.mean(axis=1, keepdims=True), scores.std(axis=1, keepdims=True)
        clipped = torch.from_numpy(np.clip(scores, mean - CLIP * spread, mean + CLIP * spread))
        sums = pool_scores(clipped, membership(self.subsets, len(self.pool)), "sum").numpy()
        sizes = np.array([len(subset) for subset in self.subsets], dtype=np.float32)
        # A loss is low where a subset helps.
        return Labels(self.subsets, -sums / sizes, np.arange(len(self.subsets)))


def distil_settings(settings: TrainSettings, distil: DistilSettings) -> TrainSettings:
    """How the encoder learns from a teacher where it learns from labels by `settings`."""
    rate = distil.learning_rate
    if rate is None:
        rate = settings.learning_rate * (3 if settings.trainable_layers == 0 else 1)
    return replace(
        settings,
        target_weighting=None,
        learning_rate=rate,
        max_steps=distil.steps,
        targets_per_step=distil.targets_per_step,
        subsets_per_step=distil.subsets_per_step,
        evaluate_every=EVALUATE_EVERY,
    )


def taught_settings(settings: TrainSettings) -> TrainSettings:
    """How an encoder that a teacher has taught learns from labels: it starts as it is, for how
    sharp its attention should be it has learned already."""
    return replace(settings, start_scale=None)


def distil_encoder(
    encoder: AirRepEncoder,
    lesson: Lesson,
    scores: np.ndarray,
    settings: TrainSettings,
    distil: DistilSettings,
    output: Path | None,
    accelerator: Accelerator | None = None,
) -> TrainResult:
    """Trains the encoder, in place, to score a lesson's subsets as a teacher does.

    `scores` (targets, pool), higher = more helpful, may come from any attributor. This is
    `train_encoder` with the teacher's labels: held-out subsets and targets of the lesson choose the
    step, and LDS is the rank correlation with the teacher. Targets all weigh the same. Raises
    InputError for scores of another shape, and where `train_encoder` does.
    """
    return train_encoder(
        encoder,
        lesson.pool,
        lesson.targets,
        lesson.labels(scores),
        distil_settings(settings, distil),
        output,
        accelerator,
    )


def read_teacher_scores(
    path: str | Path, pool: Sequence[Example], targets: Sequence[Example]
) -> np.ndarray:
    """Scores (targets, pool) of a .safetensors or .npy file, matched by id where it has ids.

    Raises InputError where `read_scores` does, for a pair without a score, and for a file of
    subset scores alone.
    """
    given = read_scores(path).of_pool(pool)
    if given.scores is None:
        raise InputError(f"{path} has subset_scores alone; a teacher needs scores of pairs.")
    return given.scores[given.target_rows(targets)]


def _text(example: Example) -> tuple[str, str]:
    return example.prompt, example.response
